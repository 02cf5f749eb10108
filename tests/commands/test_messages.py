"""Lines on the terminal."""

import logging
import os
import pty
import sys

import numpy as np
import pytest

from cellmap_lightning.commands.messages import TerminalFormatter, as_overrides
from cellmap_lightning.commands.program import _message
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
