"""One job writes to an output at a time, and a job whose output was taken away stops."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from cellmap_lightning.errors import CellMapFileExistsError, OutputError
from cellmap_lightning.prediction import output_lock
from cellmap_lightning.prediction.journal import Journal, journal_folder
from cellmap_lightning.prediction.output_lock import FILE, OutputLock, read_owner
from tests import processes
from tests.prediction.test_output import contents, finish, new, predict, settings, write

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="locks of the system, and /proc")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Hearts beat faster, and the dead are known sooner."""
    monkeypatch.setattr(output_lock, "HEARTBEAT", 0.05)
    monkeypatch.setattr(output_lock, "DEAD", 0.4)


HOLDER = """
    import sys, time
    from pathlib import Path
    from cellmap_lightning.prediction import output_lock
    output_lock.HEARTBEAT = 0.05
    lock = output_lock.OutputLock(Path(sys.argv[1]))
    print(lock.acquire(), flush=True)
    time.sleep(600)
"""


def holder(folder):
    """A process that holds the lock of a folder; its token is its first line."""
    return processes.started(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder)], stdout=subprocess.PIPE, text=True
    )


def test_another_process_is_refused_and_the_owner_named(tmp_path):
    with holder(tmp_path) as process:
        process.stdout.readline()
        with pytest.raises(
            CellMapFileExistsError, match=rf"another job writes there \(process {process.pid} on .*, since 2"
        ):
            OutputLock(tmp_path).acquire()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        lock = OutputLock(tmp_path)
        lock.acquire()  # what it left says nothing any more
        lock.check()
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_process_cannot_lock_an_output_twice(tmp_path):
    first, second = OutputLock(tmp_path), OutputLock(tmp_path)
    token = first.acquire()
    assert first.acquire() == token
    with pytest.raises(CellMapFileExistsError, match="this process already writes there"):
        second.acquire()
    first.release()
    assert second.acquire() != token
    second.release()
    lock = OutputLock(tmp_path)
    lock.acquire()
    del lock  # as after an error that nothing handled
    OutputLock(tmp_path).acquire()


def test_children_do_not_hold_it(tmp_path):
    """A worker process that outlives its parent for a while keeps nothing locked."""
    lock = OutputLock(tmp_path)
    lock.acquire()
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    try:
        lock.release()
        with holder(tmp_path) as process:
            assert len(process.stdout.readline()) == 17
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def foreign(folder, **changed):
    """The lock file of a process on another machine."""
    owner = {"token": "a" * 16, "host": "node7", "boot": "another", "pid": 1, "started": 1, "since": "2026-01-01"}
    (folder / FILE).write_text(json.dumps(owner | changed))


@pytest.mark.parametrize("locks", [True, False])
def test_owner_on_another_machine_is_alive_while_its_heartbeat_continues(tmp_path, monkeypatch, locks):
    if not locks:  # a file system without locks
        monkeypatch.setattr(output_lock, "_lock", lambda fd: None)
    foreign(tmp_path)
    began = time.monotonic()
    OutputLock(tmp_path).acquire()
    assert time.monotonic() - began >= 0.4
    assert read_owner(tmp_path)["token"] != "a" * 16
    foreign(tmp_path)
    beat = f"os.utime({str(tmp_path / FILE)!r}); print(flush=True); time.sleep(0.01)"
    code = f"import os, time\nwhile True:\n    {beat}"
    monkeypatch.setattr(output_lock, "DEAD", 5.0)  # the owner is alive at its first heartbeat
    with processes.started([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(CellMapFileExistsError, match="process 1 on node7, since 2026-01-01"):
            OutputLock(tmp_path).acquire()


@pytest.mark.parametrize("lives", [True, False])
def test_without_system_locks_a_local_owner_is_checked_by_its_process(tmp_path, monkeypatch, lives):
    monkeypatch.setattr(output_lock, "_lock", lambda fd: None)
    with holder(tmp_path) as process:
        process.stdout.readline()
        if not lives:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            OutputLock(tmp_path).acquire()
        else:
            with pytest.raises(CellMapFileExistsError, match=f"process {process.pid} on"):
                OutputLock(tmp_path).acquire()


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 200, b"[1]", b'{"boot": null}'])
def test_a_damaged_lock_file_locks_nothing(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    lock = OutputLock(tmp_path)
    lock.acquire()
    lock.check()
    lock.release()


def test_lost_lock_is_an_error(tmp_path):
    def moved(lock):
        lock.path.rename(tmp_path / "elsewhere")

    def replaced(lock):
        lock.path.unlink()
        foreign(tmp_path)

    def overwritten(lock):  # where machines do not see each other's locks
        foreign(tmp_path)

    for change, text in (
        (lambda lock: lock.path.unlink(), "was removed"),
        (moved, "was removed"),
        (replaced, "taken over by another job .process 1 on node7"),
        (overwritten, "taken over by another job .process 1 on node7"),
    ):
        lock = OutputLock(tmp_path)
        lock.acquire()
        lock.check()
        change(lock)
        there = lock.path.read_bytes() if lock.path.exists() else None
        with pytest.raises(OutputError, match=text):
            lock.check()
        lock.release()
        assert (lock.path.read_bytes() if lock.path.exists() else None) == there  # what is another's stays
        lock.path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------ of an output


@pytest.mark.parametrize("kind", ["v2", "v3", "sharded"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_two_jobs_into_one_output(tmp_path, kind, overwrite):
    """The second job fails with any options, and changes nothing; the output is that of the first."""
    out = tmp_path / "out.zarr"
    first = new(out, kind)
    stored = write(first)
    before = contents(out)
    child = os.fork()
    if child == 0:
        try:
            new(out, kind).open(settings(model="n"), overwrite)
        except CellMapFileExistsError as e:
            os._exit(7 if f"process {os.getppid()} on" in str(e) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert contents(out) == before
    assert finish(first)
    assert Journal(out).settings["model"] == "m"
    assert (first.array("mito")[...] == stored[0]).all()
    assert not (out / FILE).exists()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["removed", "begun again", "taken over"])
def test_job_stops_when_its_output_is_taken_over(tmp_path, rank, how):
    out = tmp_path / "out.zarr"
    first = new(out)
    first.open(settings())
    other = new(out, rank=1)
    output = first if rank == 0 else other
    output.skip(0)
    if how == "removed":
        shutil.rmtree(out)
    elif how == "begun again":
        shutil.rmtree(out)
        foreign_output(out)
    else:
        foreign(out)
    with pytest.raises(OutputError, match=r"removed|taken over"):
        output.skip(1)
    if how != "taken over":
        assert not out.exists() or 1 not in Journal(out).finished


def foreign_output(out):
    """The same output, begun by another process."""
    child = os.fork()
    if child == 0:
        new(out).open(settings(), overwrite=True)
        os._exit(0)  # as if it were killed: its lock stays
    os.waitpid(child, 0)


def test_a_finished_output_that_cannot_be_written_to_is_recognised(tmp_path, monkeypatch):
    out = tmp_path / "out.zarr"
    predict(out)
    before = contents(out)

    def refused(self):
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(OutputLock, "acquire", refused)
    again = new(out)
    again.open(settings())
    assert finish(again)
    assert contents(out) == before
    (out / ".zattrs").write_text("{}")
    (out / journal_folder("prediction")).mkdir()
    with pytest.raises(OutputError, match="read-only"):
        new(out).open(settings())


@pytest.mark.parametrize("place", ["a", "a/b", "a/b/out.zarr"])
def test_a_place_that_cannot_be_written_to_has_no_blocks_to_resume(tmp_path, place):
    """Nothing was begun there; a file stands in for a folder, as even root cannot make folders in it."""
    (tmp_path / "a").write_text("")
    with pytest.raises(OutputError, match="cannot be begun") as caught:
        new(tmp_path / place / "p.zarr").open(settings())
    assert str(caught.value).endswith("; choose another output, or make this place writable")
    assert "Finished blocks" not in str(caught.value)
