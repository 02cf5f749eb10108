"""An exclusive lock on an output: one job writes to it at a time, on any machine that sees its file system.

The lock is a file in the output, `FILE`, which contains a token and the owner. It combines two mechanisms, since
neither is enough alone:

- a lock of the operating system on the file, which ends with its process, also after a crash;
- a heartbeat, the file's modification time, for file systems that do not share such locks between machines: a file of
  another machine is owned while its time advances, and otherwise stale and taken over.
"""

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import struct
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from cellmap_lightning.cache.shared_memory import boot
from cellmap_lightning.errors import CellMapFileExistsError, OutputError
from cellmap_lightning.io.object_folder import OutputPath

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

FILE = ".cellmap-lock"
#: Seconds between heartbeats, and seconds without any after which an owner on another machine is dead: longer than NFS
#: caches attributes.
HEARTBEAT, DEAD = 10.0, 75.0
_BUSY = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_MAX_BYTES = 4096


class _LockedFiles:
    """The files that this process has locked, with their descriptors; -1 until they are open."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.descriptors: dict[str, int] = {}

    def after_fork(self) -> None:
        """Close the files in a forked child, which would otherwise stay locked after the end of its parent."""
        self.guard = threading.Lock()  # another thread may have held the old one during the fork
        for fd in self.descriptors.values():
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self.descriptors.clear()


_locked = _LockedFiles()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locked.after_fork)


def _boot() -> str:
    """Return the identity of the running kernel, whose processes share their locks; empty if it is unknown."""
    try:
        return boot()
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Return the start time of a process, in ticks since the boot; None if it does not run."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


class OutputLock:
    """The lock of one output; see docs/prediction.md.

    Args:
        output: the folder of the output, which must exist when the lock is acquired.
    """

    def __init__(self, output: Path) -> None:
        self.path = output / FILE
        self.token: str | None = None
        self._key = str(self.path.absolute())
        self._fd, self._pid = -1, os.getpid()
        self._end: weakref.finalize[Any, Any] | None = None

    def acquire(self) -> str:
        """Acquire the lock, and return its new token; return the current token if the lock is held already.

        Raises:
            CellMapFileExistsError: another job holds it; the message names the owner.
        """
        if self.token is not None and self._pid == os.getpid():
            return self.token
        self._pid = os.getpid()
        self._key = str(self.path.resolve())
        with _locked.guard:
            if self._key in _locked.descriptors:
                raise CellMapFileExistsError(
                    f"{self.path.parent}: this process already writes there; choose another output"
                )
            _locked.descriptors[self._key] = -1
        try:
            self._fd = self._open()
            with _locked.guard:
                _locked.descriptors[self._key] = self._fd
            self.token = self._sign()
        except BaseException:
            _close(self._fd, self._key)
            self._fd = -1
            raise
        stop = threading.Event()
        thread = threading.Thread(target=_beat, args=(stop, self._fd), name="cellmap-output-lock", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end, os.getpid(), stop, thread, self._fd, self._key)
        return self.token

    def _open(self) -> int:
        """Open and lock the file; wait until an owner on another machine proves to be alive or dead."""
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                locked = _lock(fd)
                status = self._stat()
                if status is None or status.st_ino != os.fstat(fd).st_ino:  # a race: its owner has just removed it
                    os.close(fd)
                    continue
                owner = _read(fd)
                if locked is False or self._alive(fd, owner, locked is True):
                    raise CellMapFileExistsError(
                        f"{self.path.parent}: another job writes there ({describe_owner(owner)}); wait for it, end it, "
                        "or choose another output"
                    )
                return fd
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(fd)
                raise

    def _alive(self, fd: int, owner: dict[str, Any] | None, locked: bool) -> bool:
        """Return True if the owner in a file still runs, by other evidence than locks of the system."""
        if owner is None:
            return False
        running = is_running(owner)
        if running is not None:
            return running and not locked
        log.info("%s: waiting %.0f s for a heartbeat of its owner (%s)", self.path.parent, DEAD, describe_owner(owner))
        before, end = os.fstat(fd).st_mtime_ns, time.monotonic() + DEAD
        while time.monotonic() < end:
            time.sleep(min(1.0, DEAD / 10))
            status = self._stat()
            if status is None or status.st_mtime_ns != before:
                return status is not None
        return False

    def _stat(self) -> os.stat_result | None:
        try:
            return self.path.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _sign(self) -> str:
        """Write the owner and a new token to the file."""
        owner = new_owner()
        text = json.dumps(owner).encode()
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text, 0)
        return str(owner["token"])

    def check(self) -> None:
        """Check that the output still belongs to this job. Do nothing if the lock is not held.

        Raises:
            OutputError: the output was removed, or another job has taken it over.
        """
        if self.token is None or self._pid != os.getpid():
            return
        status, owner = self._stat(), _read(self._fd)
        if status is None:
            raise OutputError(f"{self.path.parent} was removed, or its lock {FILE}, while this job writes to it")
        replaced = status.st_ino != os.fstat(self._fd).st_ino
        if replaced or owner is None or owner.get("token") != self.token:
            owner = read_owner(self.path.parent) if replaced else owner
            raise OutputError(
                f"{self.path.parent} was taken over by another job ({describe_owner(owner)}); this job stops, and its "
                "last block is incomplete"
            )

    def release(self) -> None:
        """Release the lock, and remove its file if it still belongs to this job."""
        if self.token is None:
            return
        if self._pid != os.getpid():  # it belongs to the parent
            self.token, self._fd = None, -1
            return
        with contextlib.suppress(OSError):
            status, owner = self._stat(), _read(self._fd)
            owned = owner is not None and owner.get("token") == self.token
            if owned and status is not None and status.st_ino == os.fstat(self._fd).st_ino:
                self.path.unlink()
        self.token, self._fd = None, -1
        if self._end is not None:
            self._end()


def _beat(stop: threading.Event, fd: int) -> None:
    """Update the modification time of the file until ``stop`` is set."""
    while not stop.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(fd)


def _end(pid: int, stop: threading.Event, thread: threading.Thread, fd: int, key: str) -> None:
    """End the heartbeat and close the file, also of a lock that was dropped without `release`."""
    if pid != os.getpid():  # a copy in a forked child, whose descriptors are closed
        return
    stop.set()
    if thread is not threading.current_thread() and thread.ident is not None:
        thread.join()
    _close(fd, key)


def _close(fd: int, key: str) -> None:
    if fd >= 0:
        os.close(fd)
    with _locked.guard:
        _locked.descriptors.pop(key, None)


def _lock(fd: int) -> bool | None:
    """Lock a file; return False if another job has locked it, and None if the system does not support locks."""
    if sys.platform == "win32":
        return None
    try:
        if hasattr(fcntl, "F_OFD_SETLK"):
            # A lock of the descriptor. A lock of the process would be lost when any other descriptor of the file is
            # closed in it, such as that of code that copies the output.
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        else:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as e:
        if e.errno in _BUSY:
            return False
        if e.errno in _UNSUPPORTED:
            return None
        raise


def _read(fd: int) -> dict[str, Any] | None:
    """Return the owner in a lock file; None if it is empty or damaged."""
    try:
        owner = json.loads(os.pread(fd, _MAX_BYTES, 0))
    except ValueError:
        return None
    return owner if isinstance(owner, dict) else None


def new_owner() -> dict[str, Any]:
    """Return the description of this process as an owner, with a new token."""
    return {
        "token": secrets.token_hex(8), "host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(),
        "started": _started(os.getpid()), "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip


def is_running(owner: dict[str, Any]) -> bool | None:
    """Return whether the process of an owner runs; None for one on another machine."""
    if not owner.get("boot") or owner.get("boot") != _boot():
        return None
    pid = owner.get("pid")  # a process with the same number may be another one
    return isinstance(pid, int) and _started(pid) == owner.get("started")


def read_owner(output: OutputPath) -> dict[str, Any] | None:
    """Return the owner in the lock file of an output; None if there is no such file, or it is damaged."""
    try:
        owner = json.loads((output / FILE).read_bytes()[:_MAX_BYTES])
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def describe_owner(owner: dict[str, Any] | None) -> str:
    """Return an owner in words."""
    if owner is None:
        return "owner unknown"
    return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
