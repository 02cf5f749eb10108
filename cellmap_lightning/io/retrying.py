"""A store that does not give up at the first fault, and not for ever: retries, deadlines, checks, and what is missing.

It stands around any store of zarr-python's, local or remote. Each object is asked for a bounded number of times and
seconds. What may pass is tried again, later each time and not in step with other processes; what will not pass, such as
a refusal, is an error at once.
"""

import asyncio
import errno
import logging
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import LocalStore, WrapperStore

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.io.integrity import (
    DamagedError,
    EmptyError,
    Encoded,
    check_file,
    check_part,
    problem_of,
)

log = logging.getLogger(__name__)

#: Seconds before the second attempt, and at most before any; each is varied by half.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
#: Responses after which it is worth asking again.
_PASSING = {408, 425, 429, 500, 502, 503, 504}
#: Errors of the system that pass: of network file systems, and of connections.
_PASSING_ERRNO = {
    getattr(errno, name)
    for name in (
        "EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "EINTR", "EIO",
        "ENETDOWN", "ENETRESET", "ENETUNREACH", "EPIPE", "EREMOTEIO", "ESTALE", "ETIMEDOUT",
    )
    if hasattr(errno, name)
}  # fmt: skip
_T = TypeVar("_T")
#: What says that there is no such object; the last one of archives.
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, KeyError)
_METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")

# Not the generator of the user's program, whose numbers would then depend on the network.
_jitter = random.Random()


@dataclass(frozen=True)
class RetryPolicy:
    """How long an object is tried for.

    Attributes:
        attempts: how many times it is asked for at most.
        timeout: seconds after which it is given up, with all attempts. One that does not answer gets half of what is
            left, the last one all of it.

    Raises:
        CellMapValueError: a number that cannot be one.
    """

    attempts: int = 5
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise CellMapValueError(f"read_attempts must be a whole number of at least 1, got {self.attempts!r}")
        good = isinstance(self.timeout, int | float) and not isinstance(self.timeout, bool)
        if not good or not 0 < self.timeout < float("inf"):
            raise CellMapValueError(f"read_timeout must be a positive number of seconds, got {self.timeout!r}")


#: What is asked of a store where nobody says.
DEFAULT_RETRY = RetryPolicy()


class ObjectError(Exception):
    """An object that could not be read.

    Attributes:
        key: the object.
        attempts: how many times it was asked for.
        seconds: for how long.
    """

    def __init__(self, key: str, attempts: int, seconds: float, cause: Exception) -> None:
        super().__init__(key, attempts, seconds, cause)
        self.key, self.attempts, self.seconds, self.cause = key, attempts, seconds, cause

    def __str__(self) -> str:
        tried = f"{self.attempts} attempt{'s' if self.attempts > 1 else ''} in {self.seconds:.3g} s"
        return f"{described(self.cause)} ({self.key}, {tried})"


class RangeError(OSError):
    """A server that does not give parts of objects, or a part that is too short."""


class Counts:
    """What this process has read from stores so far.

    Attributes:
        reads: objects that were asked for.
        retries: attempts after the first.
        failures: objects that were given up.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin again: in a forked child it counts its own."""
        self._lock = threading.Lock()
        self.reads = self.retries = self.failures = 0

    def add(self, name: str) -> int:
        """Count one more, and say how many there are."""
        with self._lock:
            found: int = getattr(self, name) + 1
            setattr(self, name, found)
        return found


COUNTS = Counts()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=COUNTS.reset)


def power_of_two(number: int) -> bool:
    """Whether the occurrence of that number is worth a line in the log: thousands of them are ten lines."""
    return number & (number - 1) == 0


def tried(
    read: Callable[[Sequence[str]], Mapping[str, Any]],
    keys: Sequence[str],
    retry_policy: RetryPolicy,
    refused: dict[str, ObjectError] | None = None,
) -> dict[str, bytes | None]:
    """Several small objects, each asked for again where its error may pass; None where there is none.

    Args:
        read: from keys to what was read of each, or the error.
        keys: the objects.
        retry_policy: how long they are tried for.
        refused: gets the errors of objects that are forbidden, which may not exist; without it, they are raised.

    Raises:
        ObjectError: one of them could not be read.
    """
    found: dict[str, bytes | None] = {}
    began, left = time.monotonic(), list(keys)
    for attempt in range(1, retry_policy.attempts + 1):
        again = {}
        for key, value in read(left).items():
            if isinstance(value, _ABSENT):
                found[key] = None
            elif refused is not None and isinstance(value, Exception) and is_forbidden(value):
                refused[key] = ObjectError(key, attempt, time.monotonic() - began, value)
            elif isinstance(value, Exception):
                again[key] = value
            else:
                found[key] = value
        if not again:
            return found
        key, error = next(iter(again.items()))
        pause = min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE) * _jitter.uniform(0.5, 1.5)
        seconds = time.monotonic() - began
        if (
            attempt == retry_policy.attempts
            or not all(map(passes, again.values()))
            or seconds + pause > retry_policy.timeout
        ):
            COUNTS.add("failures")
            raise ObjectError(key, attempt, seconds, error) from error
        COUNTS.add("retries")
        left = list(again)
        time.sleep(pause)
    return found


class RetryingStore(WrapperStore[Store]):
    """A store whose reads are bounded in time and checked.

    Some stores answer "forbidden" for what does not exist: S3 does, where objects may not be listed. So a chunk that is
    refused counts as missing, but only if the array's metadata can be read after the refusal: credentials that expired
    are an error, and never background.

    Args:
        store: what is read.
        encoded: how chunks are stored in it.
        retry_policy: how long an object is tried for.
        name: what log lines call it.
        metadata: the object that describes the array, such as ``.zarray``; without one, a refusal is an error.
        empty: whether a chunk of 0 bytes is an error, or counts as missing.
    """

    def __init__(
        self,
        store: Store,
        encoded: Encoded,
        retry_policy: RetryPolicy,
        name: str,
        metadata: str = "",
        empty: Literal["error", "missing"] = "error",
    ) -> None:
        super().__init__(store)
        self._encoded, self._retry_policy, self._name = encoded, retry_policy, name
        self._metadata, self._empty = metadata, empty
        #: Chunks that were asked for and are not there.
        self.missed: set[str] = set()
        self._folder = _folder(store)
        # When the metadata was last read after a refusal.
        self._verified_at = float("-inf")
        self._verifying = asyncio.Lock()

    def _with_store(self, store: Store) -> "RetryingStore":
        return RetryingStore(store, self._encoded, self._retry_policy, self._name, self._metadata, self._empty)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return the object, or None where there is none.

        Raises:
            ObjectError: it could not be read, or is damaged.
        """

        async def read() -> Buffer | None:
            return self._checked(key, await self._read(key, prototype, byte_range), byte_range)

        return await self._tried(key, read)

    async def stores(self, key: str) -> bool:
        """Return whether there is such an object and it has any bytes.

        Its first byte is asked for, since not every server answers other requests.

        Raises:
            ObjectError: the store did not answer.
        """

        async def read() -> bool:
            first = await self._read(key, default_buffer_prototype(), RangeByteRequest(0, 1))
            return first is not None and len(first) > 0

        return await self._tried(key, read)

    async def content(self, key: str) -> Buffer | None:
        """Return all that is stored in an object, unchecked; None where there is none.

        Raises:
            ObjectError: the store did not answer.
        """
        return await self._tried(key, lambda: self._read(key, default_buffer_prototype(), None))

    async def _read(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        try:
            part = await self._store.get(key, prototype, byte_range)
        except Exception as e:  # stores raise whatever they like
            if byte_range is not None and _status(e) == 416:  # "range not satisfiable": the object ends before it
                part = prototype.buffer.from_bytes(b"")
            elif await self._is_missing(key, e):
                return None
            else:
                raise
        if byte_range is None or part is None or len(part):
            return part
        whole = await self._store.get(key, prototype)
        if whole is not None and len(whole):
            raise DamagedError(f"it is cut short: {len(whole)} bytes are stored, and a part behind them was asked for")
        return part

    async def _is_missing(self, key: str, error: Exception) -> bool:
        """Whether an object that was refused does not exist.

        The metadata is read again, unless another read of it began after this refusal. No earlier one counts, however
        recent: the credentials may have expired in between. An object that was missing before still is.
        """
        if self._folder is not None or key == self._metadata or not self._metadata or not is_forbidden(error):
            return False
        if key in self.missed:
            return True
        refused_at = time.monotonic()
        async with self._verifying:
            if self._verified_at < refused_at:
                began = time.monotonic()
                try:
                    text = await self._store.get(self._metadata, default_buffer_prototype())
                except Exception as e:
                    if is_forbidden(e):
                        return False
                    raise
                if text is None:
                    return False
                self._verified_at = began
        return True

    async def _tried(self, key: str, read: Callable[[], Awaitable[_T]]) -> _T:
        """What `read` gives at last."""
        COUNTS.add("reads")
        clock = asyncio.get_running_loop().time
        began, attempt = clock(), 0
        end = began + self._retry_policy.timeout
        while True:
            attempt += 1
            left = end - clock()
            try:
                async with asyncio.timeout(left if attempt == self._retry_policy.attempts else left / 2):
                    return await read()
            except Exception as e:  # stores raise whatever they like
                pause = min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE) * _jitter.uniform(0.5, 1.5)
                if attempt == self._retry_policy.attempts or not passes(e) or clock() + pause >= end:
                    COUNTS.add("failures")
                    raise ObjectError(key, attempt, clock() - began, e) from e
                number = COUNTS.add("retries")
                if power_of_two(number):
                    log.warning(
                        "%s/%s: %s; it is asked for again in %.2g s (retries of this process so far: %d)",
                        self._name, key, described(e), pause, number,
                    )  # fmt: skip
            await asyncio.sleep(pause)

    def _checked(self, key: str, part: Buffer | None, byte_range: ByteRequest | None) -> Buffer | None:
        """What was read of an object, if it can be decoded."""
        if key.rpartition("/")[2] in _METADATA:
            return part
        if part is None:
            self._check_missing(key)
            self.missed.add(key)
            return None
        try:
            self._check(part, byte_range)
        except EmptyError:
            if self._empty == "error":
                raise
            self.missed.add(key)
            return None
        self.missed.discard(key)
        return part

    def _check(self, part: Buffer, byte_range: ByteRequest | None) -> None:
        stored = memoryview(np.ascontiguousarray(part.as_numpy_array()).view(np.uint8).data)
        if byte_range is None:
            check_file(stored, self._encoded)
            return
        shard = self._encoded.shard
        wanted = None
        if isinstance(byte_range, RangeByteRequest):
            wanted = byte_range.end - byte_range.start
        elif isinstance(byte_range, SuffixByteRequest):
            wanted = byte_range.suffix
        if wanted is not None and len(stored) > wanted:
            raise RangeError(
                errno.EOPNOTSUPP,
                f"{wanted} bytes of it were asked for and {len(stored)} came: the server does not support byte ranges, "
                "which sharded arrays need",
            )
        if not len(stored):  # where the object has any bytes, `_read` raises
            raise EmptyError
        if wanted is not None and len(stored) < wanted:
            raise DamagedError(f"it is cut short: {len(stored)} of {wanted} bytes that belong to it are stored")
        at_start = isinstance(byte_range, RangeByteRequest) and byte_range.start == 0
        is_index = isinstance(byte_range, SuffixByteRequest) or (at_start and shard is not None and not shard.at_end)
        if shard is not None and not is_index:
            check_part(stored, shard)

    def _check_missing(self, key: str) -> None:
        """Stores of zarr-python's take for missing what is there and is no file."""
        if not isinstance(self._store, LocalStore):
            return
        wrong = problem_of(f"{self._store.root}/{key}", self._encoded.most_stored)
        if wrong is not None:
            raise wrong


def _folder(store: Store) -> LocalStore | None:
    """The folder of this machine that a store reads, or None."""
    while isinstance(store, WrapperStore):
        store = store._store
    return store if isinstance(store, LocalStore) else None


def passes(error: Exception) -> bool:
    """Whether an error may be gone the next time."""
    if isinstance(error, PermissionError):
        return False
    status = _status(error)
    if status is not None:
        return status in _PASSING
    if isinstance(error, DamagedError | TimeoutError | ConnectionError):
        return True  # a file may be in the middle of being written
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING_ERRNO
    # By name, so that libraries need not be imported: connections that broke, bodies that were cut short.
    kinds = [kind for kind in type(error).__mro__ if kind.__module__.partition(".")[0] in ("aiohttp", "botocore")]
    return bool(kinds) and not _refused(error)


def _status(error: BaseException) -> int | None:
    """The status of a response, where the error is one."""
    found: Any = getattr(error, "status", None)
    response: Any = getattr(error, "response", None)
    if found is None and isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return found if isinstance(found, int) else None


def _refused(error: Exception) -> bool:
    """Whether somebody is not allowed to read, or has not said who they are."""
    text = f"{type(error).__name__} {error}".lower()
    return (
        isinstance(error, PermissionError)
        or _status(error) in (401, 403)
        or any(word in text for word in ("credential", "expiredtoken", "token has expired", "accessdenied"))
        or is_forbidden(error)
    )


#: Error codes of S3 that also stand for an object that does not exist.
_FORBIDDEN_CODES = ("AccessDenied", "Forbidden", "403")
#: Words of an error that speaks of credentials, and not of the object.
_OF_CREDENTIALS = ("expired", "credential", "signature", "token", "access key", "accesskey", "request time")


def is_forbidden(error: BaseException) -> bool:
    """Return whether an error is a refusal as some stores give it for what does not exist.

    A refusal that speaks of credentials is none.
    """
    response: Any = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None  # botocore's
    if code is not None:
        return code in _FORBIDDEN_CODES
    text = str(getattr(error, "message", None) or error).lower()  # aiohttp's text also has the address
    if any(word in text for word in _OF_CREDENTIALS):
        return False
    forbidden = isinstance(error, PermissionError) or _status(error) == 403
    return forbidden or (isinstance(error, OSError) and text.startswith("forbidden"))  # the last one of gcsfs


def described(error: Exception) -> str:
    """An error for people: its kind, what it says, and what would help."""
    if isinstance(error, TimeoutError) and not str(error):
        text = "TimeoutError: no answer, or not all of it, in time; read_timeout says how long to wait"
    else:
        text = f"{type(error).__name__}: {error}"
    if _refused(error):
        text += "; reading is not allowed: credentials are missing, wrong or expired, or the file belongs to others"
    return text
