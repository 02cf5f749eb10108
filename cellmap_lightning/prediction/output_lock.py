"""An exclusive lock on an output: one job writes to it at a time, on any machine that sees its file system.

The lock is a file in the output, `FILE`, which holds a token and names the owner. Two mechanisms, since neither is
enough alone:

- a lock of the operating system on the file, which ends with its process, however that ends;
- a heartbeat, the file's modification time, for file systems that do not share such locks between machines: a file of
  another machine counts as owned while its time moves, and is taken over where it does not.
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

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

FILE = ".cellmap-lock"
#: Seconds between two heartbeats, and without any after which the owner on another machine counts as dead: longer than
#: NFS caches attributes.
HEARTBEAT, DEAD = 10.0, 75.0
_BUSY = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_MOST_BYTES = 4096

#: Files that this process has locked, with their descriptors once they are open.
_held: dict[str, int] = {}
_guard = threading.Lock()


def _after_fork() -> None:
    """Close the files in a forked child, which would otherwise keep them locked after the end of its parent."""
    global _guard
    _guard = threading.Lock()
    for fd in _held.values():
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _boot() -> str:
    """Return what names the running kernel, whose locks all of its processes see; empty where it is not known."""
    try:
        return boot()
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Return when a process was started, in ticks since the boot; None where there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


class OutputLock:
    """The lock of one output.

    Args:
        output: the folder of the output, which exists when the lock is acquired.
    """

    def __init__(self, output: Path) -> None:
        self.path = output / FILE
        self.token: str | None = None
        self._key = str(self.path.absolute())
        self._fd, self._pid = -1, os.getpid()
        self._end: weakref.finalize[Any, Any] | None = None

    def acquire(self) -> str:
        """Acquire the lock, and return its new token. Where it is held already, return its token.

        Raises:
            CellMapFileExistsError: another job has it; the message names the owner.
        """
        if self.token is not None and self._pid == os.getpid():
            return self.token
        self._pid = os.getpid()
        self._key = str(self.path.resolve())
        with _guard:
            if self._key in _held:
                raise CellMapFileExistsError(f"{self.path.parent}: this process already writes there")
            _held[self._key] = -1
        try:
            self._fd = self._open()
            with _guard:
                _held[self._key] = self._fd
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
        """Open and lock the file, and wait for a dead owner on another machine to be known as such."""
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                locked = _lock(fd)
                there = self._stat()
                if there is None or there.st_ino != os.fstat(fd).st_ino:  # its owner has just removed it
                    os.close(fd)
                    continue
                owner = _read(fd)
                if locked is False or self._alive(fd, owner, locked is True):
                    raise CellMapFileExistsError(
                        f"{self.path.parent}: another job writes there ({_described(owner)}); wait for it, end it, or "
                        "choose another output"
                    )
                return fd
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(fd)
                raise

    def _alive(self, fd: int, owner: dict[str, Any] | None, locked: bool) -> bool:
        """Return whether the owner that a file names still runs, as far as locks of the system do not say."""
        if owner is None:
            return False
        if owner.get("boot") == _boot():
            pid = owner.get("pid")
            return not locked and isinstance(pid, int) and _started(pid) == owner.get("started")
        log.info("%s: waiting %.0f s to see whether its owner lives (%s)", self.path.parent, DEAD, _described(owner))
        before, end = os.fstat(fd).st_mtime_ns, time.monotonic() + DEAD
        while time.monotonic() < end:
            time.sleep(min(1.0, DEAD / 10))
            there = self._stat()
            if there is None or there.st_mtime_ns != before:
                return there is not None
        return False

    def _stat(self) -> os.stat_result | None:
        try:
            return self.path.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _sign(self) -> str:
        """Write the owner and a new token to the file."""
        token = secrets.token_hex(8)
        owner = {
            "token": token, "host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(),
            "started": _started(os.getpid()), "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }  # fmt: skip
        text = json.dumps(owner).encode()
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text, 0)
        return token

    def check(self) -> None:
        """Check that the output still belongs to this job. Where the lock is not held, nothing is checked.

        Raises:
            OutputError: the output was removed, or another job has taken it over.
        """
        if self.token is None or self._pid != os.getpid():
            return
        there, owner = self._stat(), _read(self._fd)
        if there is None:
            raise OutputError(f"{self.path.parent} was removed, or its lock {FILE}, while this job writes to it")
        if there.st_ino != os.fstat(self._fd).st_ino or owner is None or owner.get("token") != self.token:
            with contextlib.suppress(OSError):
                owner = read_owner(self.path.parent) if there.st_ino != os.fstat(self._fd).st_ino else owner
            raise OutputError(
                f"{self.path.parent} was taken over by another job ({_described(owner)}); this one stops, and what it "
                "wrote since is not complete"
            )

    def release(self) -> None:
        """Give the lock up, and remove its file if it is still that of this job."""
        if self.token is None:
            return
        if self._pid != os.getpid():  # that of the parent
            self.token, self._fd = None, -1
            return
        with contextlib.suppress(OSError):
            there, owner = self._stat(), _read(self._fd)
            mine = owner is not None and owner.get("token") == self.token
            if mine and there is not None and there.st_ino == os.fstat(self._fd).st_ino:
                self.path.unlink()
        self.token, self._fd = None, -1
        if self._end is not None:
            self._end()


def _beat(stop: threading.Event, fd: int) -> None:
    """Renew the time of the file until told to stop."""
    while not stop.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(fd)


def _end(pid: int, stop: threading.Event, thread: threading.Thread, fd: int, key: str) -> None:
    """End the heartbeat and close the file; also for a lock that was dropped without `release`."""
    if pid != os.getpid():  # a copy in a forked child, whose descriptors are closed
        return
    stop.set()
    if thread is not threading.current_thread() and thread.ident is not None:
        thread.join()
    _close(fd, key)


def _close(fd: int, key: str) -> None:
    if fd >= 0:
        os.close(fd)
    with _guard:
        _held.pop(key, None)


def _lock(fd: int) -> bool | None:
    """Lock a file; return False where another job has locked it, and None where the system has no such locks."""
    if sys.platform == "win32":
        return None
    try:
        if hasattr(fcntl, "F_OFD_SETLK"):
            # A lock of this descriptor. One of the process would be lost when any other descriptor of the file, such as
            # that of a program that copies the output, is closed in it.
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
    """Return what the file says of its owner; None where it is empty or damaged."""
    try:
        found = json.loads(os.pread(fd, _MOST_BYTES, 0))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_owner(output: Path) -> dict[str, Any] | None:
    """Return what the lock file of an output says of its owner; None where there is none."""
    try:
        found = json.loads((output / FILE).read_bytes()[:_MOST_BYTES])
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _described(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "its lock does not name it"
    return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
