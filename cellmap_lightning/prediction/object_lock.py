"""An exclusive lock on an output in a remote store, which has no locks of a file system.

The lock is an object in the output, `FILE`, that contains a token, the owner and a counter. Its owner replaces it every
`HEARTBEAT` seconds with the next number. A job that finds the number unchanged for `DEAD` seconds takes the output
over; an owner on the same machine whose process has ended, at once. Creating the object is one step in stores with
conditional writes, such as S3. Taking over is not: of two jobs that do so at the same time the last one remains, and
the other one stops at its next block, as it checks the token before and after each.
"""

import contextlib
import json
import logging
import os
import threading
import time
import weakref
from typing import Any

from cellmap_lightning.errors import CellMapFileExistsError, OutputError
from cellmap_lightning.io.object_folder import ObjectFolder
from cellmap_lightning.prediction import output_lock
from cellmap_lightning.prediction.output_lock import FILE, describe_owner, is_running, new_owner, read_owner

log = logging.getLogger(__name__)


class ObjectLock:
    """The lock of one output in a remote store; see docs/prediction.md.

    Args:
        output: the folder of the output.

    Example:
        >>> lock = ObjectLock(output_path("s3://bucket/mito.zarr"))
        >>> lock.acquire()
    """

    def __init__(self, output: ObjectFolder) -> None:
        self.output, self.path = output, output / FILE
        self.token: str | None = None
        self._pid = os.getpid()
        self._end: weakref.finalize[Any, Any] | None = None

    def acquire(self) -> str:
        """Acquire the lock, and return its new token; return the current token if the lock is held already.

        Raises:
            CellMapFileExistsError: another job holds it; the message names the owner.
        """
        if self.token is not None and self._pid == os.getpid():
            return self.token
        self._pid, owner = os.getpid(), new_owner()
        while True:
            before = read_owner(self.output)
            if before is not None and self._alive(before):
                raise self._taken(before)
            content = json.dumps(owner).encode()
            if before is not None or self.path.exists():  # its owner is dead, or it is damaged
                self.path.write_bytes(content)
                break
            try:
                self.path.create(content)
                break
            except FileExistsError:  # a race: another job has just created it
                continue
        now = read_owner(self.output)
        if now is None or now.get("token") != owner["token"]:
            raise self._taken(now)
        self.token = str(owner["token"])
        stop = threading.Event()
        thread = threading.Thread(
            target=_beat, args=(stop, self.output, owner), name="cellmap-output-lock", daemon=True
        )  # fmt: skip
        thread.start()
        self._end = weakref.finalize(self, _stop, os.getpid(), stop, thread)
        return self.token

    def _taken(self, owner: dict[str, Any] | None) -> CellMapFileExistsError:
        return CellMapFileExistsError(
            f"{self.output}: another job writes there ({describe_owner(owner)}); wait for it, end it, or choose "
            "another output"
        )

    def _alive(self, owner: dict[str, Any]) -> bool:
        """Return True if an owner still runs; for one on another machine, wait for its next heartbeat."""
        running = is_running(owner)
        if running is not None:
            return running
        log.info(
            "%s: waiting %.0f s for a heartbeat of its owner (%s)", self.output, output_lock.DEAD, describe_owner(owner)
        )
        end = time.monotonic() + output_lock.DEAD
        while time.monotonic() < end:
            time.sleep(min(1.0, output_lock.DEAD / 10))
            now = read_owner(self.output)
            if now != owner:
                return now is not None
        return False

    def check(self) -> None:
        """Check that the output still belongs to this job. Do nothing if the lock is not held.

        Raises:
            OutputError: the output was removed, or another job has taken it over.
        """
        if self.token is None or self._pid != os.getpid():
            return
        owner = read_owner(self.output)
        if owner is None:
            raise OutputError(f"{self.output} was removed, or its lock {FILE}, while this job writes to it")
        if owner.get("token") != self.token:
            raise OutputError(
                f"{self.output} was taken over by another job ({describe_owner(owner)}); this job stops, and its last "
                "block is incomplete"
            )

    def release(self) -> None:
        """Release the lock, and remove its object if it still belongs to this job."""
        if self.token is None:
            return
        token, self.token = self.token, None
        if self._pid != os.getpid():  # it belongs to the parent
            return
        if self._end is not None:
            self._end()
        with contextlib.suppress(OSError):
            if (read_owner(self.output) or {}).get("token") == token:
                self.path.unlink()


def _beat(stop: threading.Event, output: ObjectFolder, owner: dict[str, Any]) -> None:
    """Replace the object with the next number until ``stop`` is set, or another job owns it."""
    number = 0
    while not stop.wait(output_lock.HEARTBEAT):
        with contextlib.suppress(OSError):
            if (read_owner(output) or {}).get("token") != owner["token"]:
                return
            number += 1
            (output / FILE).write_bytes(json.dumps(owner | {"beat": number}).encode())


def _stop(pid: int, stop: threading.Event, thread: threading.Thread) -> None:
    """End the heartbeat, also of a lock that was dropped without `release`."""
    if pid != os.getpid():
        return
    stop.set()
    if thread is not threading.current_thread():
        thread.join()
