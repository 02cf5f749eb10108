"""Lines on the terminal."""

import logging
import os
import pty
import shlex
import sys

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from cellmap_lightning.batches.arrays import parse_classes
from cellmap_lightning.commands.messages import TerminalFormatter, wrapped
from cellmap_lightning.commands.override_form import as_overrides
from cellmap_lightning.commands.program import _message
from cellmap_lightning.errors import CellMapTypeError
from tests import processes
from tests.commands.test_cli import run_forked


def record(text):
    return logging.LogRecord("x", logging.INFO, "x.py", 1, text, (), None)


def test_without_a_terminal_lines_are_not_wrapped():
    assert TerminalFormatter("%(message)s").format(record("word " * 100)) == "word " * 100


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals")
@pytest.mark.parametrize("columns", [40, 80, 200])
def test_lines_fit_the_terminal(monkeypatch, columns):
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb"):
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("COLUMNS", str(columns))
        path = "/" + "folder/" * 20
        text = TerminalFormatter("%(levelname)s %(message)s").format(record(f"{'word ' * 100}\nsecond {path}"))
        lines = text.split("\n")
        assert all(len(line) <= columns or path in line for line in lines)
        assert path in text, "a path is not broken, so that it can be copied"
        assert [line for line in lines if not line.startswith("    ")] == [
            lines[0],
            next(x for x in lines if "second" in x),
        ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("choose another path or pass overwrite=True", "choose another path or pass overwrite=true"),
        (
            "replace it with overwrite=True, or accept_changed_raw=True",
            "replace it with overwrite=true, or accept_changed_raw=true",
        ),
        ("split.blocks.gap_nm=None chooses; pad=False refuses", "split.blocks.gap_nm=null chooses; pad=false refuses"),
        (
            "overwrite=true is right, and so are True and x=Truely",
            "overwrite=true is right, and so are True and x=Truely",
        ),
    ],
)
def test_messages_of_commands_have_the_form_of_overrides(text, expected):
    assert as_overrides(text) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="a path that even root may not write to")
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", ["hydra.run.dir=/sys/kernel/run"]),
        ("train", ["-m", "hydra.sweep.dir=/sys/kernel/run", "task.dice_weight=0,1"]),
        ("convert", ["input=a.npy", "output=/sys/kernel/run/a.zarr", "voxel_size=[8,8,8]"]),
    ],
)
def test_folders_that_may_not_be_written_are_named(tmp_path, command, arguments):
    np.save(tmp_path / "a.npy", np.ones((8, 8, 8), np.uint8))
    more = ["data.csv_path=none.csv", "data.classes=[mito]"] if command == "train" else []
    code, text = run_forked(*arguments, *more, cwd=tmp_path, command=command)
    assert (code, "Traceback" in text) == (1, False), text
    assert "/sys/kernel/run: permission denied; choose another folder" in text


def test_errors_of_permissions_are_found_below_others():
    error = RuntimeError("a store failed")
    error.__cause__ = PermissionError(13, "Permission denied", "out.zarr")
    assert _message(error).startswith("out.zarr: permission denied; choose another folder")


@pytest.mark.parametrize(
    ("command", "text", "expected"),
    [
        ("train", 'normalize={"range": [0, 255]}', "'data.normalize={range: [0,255]}'"),
        ("preview", 'a normalize={"percentile": [0.5, 99.5]}.', "a 'data.normalize={percentile: [0.5,99.5]}'."),
        ("predict", 'normalize={"range": [0, 2e4]}', "'metadata.normalize={range: [0,2e4]}'"),
        ("train", 'data.normalize={"range": [0, 1]}', 'data.normalize={"range": [0, 1]}'),
    ],
)
def test_a_normalization_can_be_typed_as_it_is_printed(command, text, expected):
    assert as_overrides(text, command) == expected
    if expected != text:
        key, value = shlex.split(expected.strip("a. "))[0].split("=", 1)
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
        assert list(parsed.value()) == [text.split('"')[1]]


@pytest.mark.parametrize(
    ("classes", "python", "command"),
    [("mito", "['mito']", "[mito]"), ("mito,er", "['mito', 'er']", "[mito,er]"), (" a ", "['a']", "[a]")],
)
def test_one_name_of_a_class_in_place_of_a_list(classes, python, command):
    with pytest.raises(CellMapTypeError) as caught:
        parse_classes(classes)
    assert str(caught.value).endswith(f"; give classes={python}")
    assert as_overrides(str(caught.value)).endswith(f"; give data.classes={command}")


@pytest.mark.parametrize("classes", ["", " ", ","])
def test_classes_that_a_shell_has_emptied(classes):
    with pytest.raises(CellMapTypeError, match="classes must be a list of names") as caught:
        parse_classes(classes)
    hint = "; ${...} needs single quotes in a shell: 'data.classes=${classes:tested_classes.csv}'"
    assert str(caught.value).endswith(hint)
    assert as_overrides(str(caught.value)).endswith(hint)


def test_log_records_of_a_command_have_the_form_of_overrides():
    code = (
        "import logging\nfrom cellmap_lightning.commands.private_run import protect_logs\nprotect_logs([], 'predict')\n"
        "logging.basicConfig(format='%(message)s')\n"
        "logging.warning('set normalize={\"range\": [%d, 3]} or overwrite=%s', 1, True)"
    )
    done = processes.run([sys.executable, "-c", code], 60)
    assert done.stderr == "set 'metadata.normalize={range: [1,3]}' or overwrite=true\n"


@pytest.mark.parametrize("width", [20, 40, 100])
@pytest.mark.parametrize(
    "copied",
    [
        "/a/long/path/that/is/not/to/be/broken/anywhere-at-all.zarr",
        "'data.normalize={range: [0, 255]}'",
        "cellmap-convert input=a.tif output=a.zarr 'classes={1: mito, 2: er}' voxel_size=[8,8,8]",
        "pip install 'cellmap-lightning[slurm] @ x' --upgrade-strategy=eager",
        "cellmap-train -m data.fold=0,1,2 run.name=mito",
    ],
)
def test_what_is_copied_is_never_broken(width, copied):
    text = wrapped(f"Error: {'word ' * 30}; it doesn't fit, so run {copied}, and then {'more ' * 30}", width)
    assert copied in text
    assert all(len(line) <= width or copied[:20] in line for line in text.split("\n"))
    assert text.count("\n") > 1
    assert " ".join(text.split()) == " ".join(wrapped(text, 10_000).split())


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals")
@pytest.mark.parametrize("columns", [40, 80, 200])
def test_errors_fit_the_terminal_and_stay_one_line_elsewhere(tmp_path, columns):
    arguments = ["data.csv_path=none.csv", "data.classes=[mito]", "data.split=stratifed"]
    code, text = run_forked(*arguments, cwd=tmp_path, columns=columns)
    assert code == 1
    shown = text[text.index("Error: ") :].splitlines()
    code, plain = run_forked(*arguments, cwd=tmp_path)
    (line,) = [line for line in plain.splitlines() if line.startswith("Error: ")]
    assert all(len(one) <= columns for one in shown)
    assert " ".join(" ".join(shown).split()) == line
