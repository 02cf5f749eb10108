"""Programs that tests start: they end with the test, together with everything that they have started."""

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

#: In the environment of every program that a test starts: names the test.
MARK = "CELLMAP_TEST"
_numbers = itertools.count()


@contextlib.contextmanager
def started(command, **kwargs) -> Iterator[subprocess.Popen]:
    """Start a program, and kill it and its descendants in the end; see `subprocess.Popen`."""
    process = subprocess.Popen(command, start_new_session=True, **kwargs)
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Kill a program that was started in a separate session, with its descendants, and close its pipes."""
    kill(descendants(process.pid))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # those whose parents have ended are in its group
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    process.wait()


def run(command, timeout, check=False, **kwargs) -> subprocess.CompletedProcess:
    """Run a program, and return its exit status and output, as text; see `subprocess.run`."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with started(command, **(given | kwargs)) as process:
        out, errors = process.communicate(timeout=timeout)
    done = subprocess.CompletedProcess(command, process.returncode, out, errors)
    if check:
        done.check_returncode()
    return done


def children(pid: int) -> set[int]:
    """The processes that a process has started and that have not ended."""
    found = set()
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found |= {int(child) for child in (task / "children").read_text().split()}
    return found


def descendants(pid: int) -> set[int]:
    """The children of a process, and theirs."""
    found = children(pid)
    return found.union(*map(descendants, found))


@contextlib.contextmanager
def marking() -> Iterator[str]:
    """Mark the programs that are started meanwhile, so that they can be found when their parents have ended."""
    mark = f"{os.getpid()}-{next(_numbers)}"
    before = os.environ.get(MARK)
    os.environ[MARK] = mark
    try:
        yield mark
    finally:
        os.environ.pop(MARK)
        if before is not None:
            os.environ[MARK] = before


def left_behind(mark: str, before: set[int]) -> set[int]:
    """The marked programs and the descendants of this process that were not there before.

    Those that `multiprocessing` starts once for all processes are left out.
    """
    found, variable = descendants(os.getpid()) - before, f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
    return {pid for pid in found if not _lasting(pid)}


def _lasting(pid: int) -> bool:
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"multiprocessing.resource_tracker" in command or b"multiprocessing.forkserver" in command
    return False


def alive(pids: Iterable[int]) -> list[int]:
    """Return those of some processes that have not ended."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def kill(pids: set[int]) -> None:
    """Kill processes, wait until they have ended, and remove what they have in shared memory."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 60
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.01)
    for pid in pids:
        for file in Path("/dev/shm").glob(f"torch_{pid}_*"):
            file.unlink(missing_ok=True)
