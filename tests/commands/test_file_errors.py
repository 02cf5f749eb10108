"""A read-only file system, a full disk, a quota: one line with the path and the remedy."""

import errno
import functools
import io
import shutil
import sys

import numpy as np
import pytest

from cellmap_lightning.commands.file_errors import file_error_message, is_file_error
from cellmap_lightning.commands.program import _message
from tests import processes
from tests.commands.test_cli import run_forked

READ_ONLY = "the file system is read-only; choose a folder on another one"
FULL = "the disk is full; free space on it, or choose a folder on another one"
QUOTA = "the quota is used up; remove files of yours there, or choose a folder on another file system"


@functools.cache
def can_mount():
    """Return True where a process may mount file systems in a namespace of its own."""
    if shutil.which("unshare") is None:
        return False
    script = "mkdir -p /tmp && mount -t tmpfs -o size=64k none /tmp"
    return processes.run(["unshare", "-rm", "sh", "-c", script], 60).returncode == 0


def run_mounted(command, *arguments, cwd, full):
    """Run a command in a namespace where ``disk`` is a small file system: read-only, or full."""
    (cwd / "disk").mkdir()
    mount = "mount -t tmpfs -o size=64k none disk; "
    mount += "head -c 65536 /dev/zero > disk/other; " if full else "mount -o remount,ro disk; "
    main = f"from cellmap_lightning.commands.{command}_command import main; main()"
    script = ["unshare", "-rm", "sh", "-c", mount + 'exec "$@"', "sh", sys.executable, "-c", main, *arguments]
    return processes.run(script, 120, cwd=cwd)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("command", "arguments", "named"),
    [
        ("train", ["data.csv_path=a.csv", "data.classes=[mito]", "hydra.run.dir=disk/run"], "disk/run"),
        ("train", ["-m", "seed=1,2", "data.csv_path=a.csv", "data.classes=[a]", "hydra.sweep.dir=disk/a"], "disk/a"),
        ("convert", ["input=a.npy", "output=disk/a.zarr", "voxel_size=[8,8,8]"], "disk/a.zarr"),
    ],
)
def test_a_real_disk_that_is_full_or_read_only(tmp_path, full, command, arguments, named):
    if not can_mount():
        pytest.skip("file systems cannot be mounted here")
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 255, (64, 64, 64), dtype=np.uint8))
    done = run_mounted(command, *arguments, cwd=tmp_path, full=full)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert named in last
    assert last.endswith(FULL if full else READ_ONLY)


@pytest.mark.parametrize(("number", "text"), [(errno.EROFS, READ_ONLY), (errno.ENOSPC, FULL), (errno.EDQUOT, QUOTA)])
def test_each_error_has_a_remedy(number, text):
    wrapped = RuntimeError("a store failed")
    wrapped.__cause__ = OSError(number, "x", "out/a.zarr")
    assert _message(wrapped) == f"out/a.zarr: {text}"


def fail(stream):
    """Raise the error of a write, which names no file."""
    assert stream.writable()
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("place", "named"),
    [(None, "{folder}/a.txt"), ("{folder}", "{folder}/a.txt"), ("{folder}/run", "{folder}/run")],
)
def test_the_open_file_is_named_where_the_error_names_none(tmp_path, place, named):
    """One outside of the place that the command writes to is a temporary file."""
    place = place and place.format(folder=tmp_path)
    with (tmp_path / "a.txt").open("w") as stream, pytest.raises(OSError, match="No space") as caught:
        fail(stream)
    assert file_error_message(caught.value, place) == f"{named.format(folder=tmp_path)}: {FULL}"


def test_without_any_file_the_place_is_named():
    with pytest.raises(OSError, match="No space") as caught:
        fail(io.BytesIO())
    assert file_error_message(caught.value, "out").startswith("out: the disk is full")


@pytest.mark.parametrize("error", [OSError("x"), OSError(errno.EIO, "x"), FileNotFoundError(2, "x"), ValueError("x")])
def test_other_errors_have_no_such_message(error):
    assert not is_file_error(error)


@pytest.mark.parametrize(
    ("command", "key", "meant"),
    [
        ("train", "data.batchsize", "data.batch_size"),
        ("train", "patch.shap", "patch.shape"),
        ("preview", "sample", "samples"),
    ],
)
def test_a_wrong_key_has_one_remedy(tmp_path, command, key, meant):
    """Hydra proposes ``+key=value``, which would be refused later."""
    code, text = run_forked(f"{key}=2", cwd=tmp_path, command=command)
    assert code == 1
    assert text.splitlines()[0] == f"Error: There is no {key!r}; did you mean {meant!r}?"
    assert "append" not in text
    assert "HYDRA_FULL_ERROR" not in text


@pytest.mark.parametrize("argument", ["data=nope", "model=unett"])
def test_other_errors_of_hydra_stay(tmp_path, argument):
    code, text = run_forked(argument, cwd=tmp_path)
    assert code == 1
    assert f"Could not find '{argument.replace('=', '/')}'" in text
    assert "Available options" in text
