"""A Zarr store wrapper with retries, timeouts, integrity checks and a record of missing chunks.

It wraps any store of zarr-python, local or remote. Each object is requested a bounded number of times and seconds.
Transient errors are retried with exponential backoff and jitter; permanent ones, such as a refusal, are raised at once.
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

from cellmap_lightning.io.integrity import (
    DamagedError,
    EmptyError,
    Encoded,
    check_file,
    check_part,
    problem_of,
)
from cellmap_lightning.validation import int_at_least, positive_number

log = logging.getLogger(__name__)

#: Backoff in seconds: before the second attempt, and at most before any. Jitter varies each by half.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
#: Status codes of transient errors.
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
#: Transient errors of the system: of network file systems, and of connections.
_TRANSIENT_ERRNO = {
    getattr(errno, name)
    for name in (
        "EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "EINTR", "EIO",
        "ENETDOWN", "ENETRESET", "ENETUNREACH", "EPIPE", "EREMOTEIO", "ESTALE", "ETIMEDOUT",
    )
    if hasattr(errno, name)
}  # fmt: skip
_T = TypeVar("_T")
#: Errors for an object that does not exist; the last one is raised by archives.
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError, KeyError)
_METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")

# Separate from the global generator, whose numbers would otherwise depend on the network.
_jitter = random.Random()


@dataclass(frozen=True)
class RetryPolicy:
    """Number of attempts and timeout for one object.

    Attributes:
        attempts: requests at most.
        timeout: seconds for all attempts together. An attempt without an answer ends after half of the remaining time,
            the last one after all of it.

    Raises:
        CellMapValueError: a value out of range.

    Example:
        >>> RetryPolicy(attempts=3, timeout=30)
        RetryPolicy(attempts=3, timeout=30)
    """

    attempts: int = 5
    timeout: float = 60.0

    def __post_init__(self) -> None:
        int_at_least("read_attempts", self.attempts, 1)
        positive_number("read_timeout", self.timeout)


#: The default policy.
DEFAULT_RETRY = RetryPolicy()


class ObjectError(Exception):
    """An object that could not be read.

    Attributes:
        key: the object.
        attempts: number of requests.
        seconds: duration of all of them.
        cause: the last error.
    """

    def __init__(self, key: str, attempts: int, seconds: float, cause: Exception) -> None:
        super().__init__(key, attempts, seconds, cause)
        self.key, self.attempts, self.seconds, self.cause = key, attempts, seconds, cause

    def __str__(self) -> str:
        attempts = f"{self.attempts} attempt{'s' if self.attempts > 1 else ''} in {self.seconds:.3g} s"
        return f"{described(self.cause)} ({self.key}, {attempts})"


class RangeError(OSError):
    """A server that does not support byte ranges."""


class Counts:
    """Counters of the reads of this process; thread-safe.

    Attributes:
        reads: objects that were requested.
        retries: attempts after the first.
        failures: objects that could not be read.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set all counters to 0, as a forked child must."""
        self._lock = threading.Lock()
        self.reads = self.retries = self.failures = 0

    def add(self, name: str) -> int:
        """Increment a counter, and return its new value."""
        with self._lock:
            value: int = getattr(self, name) + 1
            setattr(self, name, value)
        return value


COUNTS = Counts()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=COUNTS.reset)


def power_of_two(number: int) -> bool:
    """Return whether a number is a power of two, to log thousands of occurrences in about ten lines."""
    return number & (number - 1) == 0


def backoff(attempt: int) -> float:
    """Return the seconds to wait after an attempt (1, 2, ...): exponential backoff with jitter."""
    pause: float = min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)
    return pause * _jitter.uniform(0.5, 1.5)


def tried(
    read: Callable[[Sequence[str]], Mapping[str, Any]],
    keys: Sequence[str],
    retry_policy: RetryPolicy,
    refused: dict[str, ObjectError] | None = None,
) -> dict[str, bytes | None]:
    """Return the content of several small objects, read with retries; None for those that do not exist.

    Args:
        read: reads some keys, and returns the content or the error of each.
        keys: the objects.
        retry_policy: attempts and timeout.
        refused: receives the errors of forbidden objects, which may not exist; without it, they are raised.

    Raises:
        ObjectError: an object could not be read.
    """
    contents: dict[str, bytes | None] = {}
    began, remaining = time.monotonic(), list(keys)
    for attempt in range(1, retry_policy.attempts + 1):
        errors = {}
        for key, value in read(remaining).items():
            if isinstance(value, _ABSENT):
                contents[key] = None
            elif refused is not None and isinstance(value, Exception) and is_forbidden(value):
                refused[key] = ObjectError(key, attempt, time.monotonic() - began, value)
            elif isinstance(value, Exception):
                errors[key] = value
            else:
                contents[key] = value
        if not errors:
            return contents
        pause, seconds = backoff(attempt), time.monotonic() - began
        is_last = attempt == retry_policy.attempts or seconds + pause > retry_policy.timeout
        if is_last or not all(map(is_transient, errors.values())):
            COUNTS.add("failures")
            key, error = next(iter(errors.items()))
            raise ObjectError(key, attempt, seconds, error) from error
        COUNTS.add("retries")
        remaining = list(errors)
        time.sleep(pause)
    return contents


class RetryingStore(WrapperStore[Store]):
    """A store whose reads are retried, bounded in time and checked for integrity.

    Some stores answer "forbidden" for objects that do not exist: S3 does, where objects may not be listed. So a chunk
    that is refused counts as missing, but only if the array's metadata can be read after the refusal: expired
    credentials are an error, and never background.

    Args:
        store: the store to read from.
        encoded: the stored form of a chunk.
        retry_policy: attempts and timeout of each object.
        name: name of the store, for the log.
        metadata: the object that describes the array, such as ``.zarray``; without one, a refusal is an error.
        empty: whether a chunk of 0 bytes is an error, or counts as missing.

    Example:
        >>> store = RetryingStore(open_store(info.path), info.encoded, DEFAULT_RETRY, str(info.path))
        >>> zarr.open_array(store, mode="r")
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
        #: Chunks that were requested and do not exist.
        self.missed: set[str] = set()
        self._is_local = _is_local(store)
        # Time at which the last successful read of the metadata began.
        self._verified_at = float("-inf")
        self._verifying = asyncio.Lock()

    @property
    def wrapped(self) -> Store:
        """Store that is read from."""
        return self._store

    def _with_store(self, store: Store) -> "RetryingStore":
        return RetryingStore(store, self._encoded, self._retry_policy, self._name, self._metadata, self._empty)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object, or None if it does not exist.

        Raises:
            ObjectError: it could not be read, or is damaged.
        """

        async def read() -> Buffer | None:
            return self._checked(key, await self._read(key, prototype, byte_range), byte_range)

        return await self._retry(key, read)

    async def stores(self, key: str) -> bool:
        """Return whether an object exists and has any bytes.

        Its first byte is requested, since not every server answers other requests.

        Raises:
            ObjectError: the store did not answer.
        """

        async def read() -> bool:
            first = await self._read(key, default_buffer_prototype(), RangeByteRequest(0, 1))
            return first is not None and len(first) > 0

        return await self._retry(key, read)

    async def content(self, key: str) -> Buffer | None:
        """Return the content of an object, unchecked; None if it does not exist.

        Raises:
            ObjectError: the store did not answer.
        """
        return await self._retry(key, lambda: self._read(key, default_buffer_prototype(), None))

    async def _read(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        try:
            part = await self._store.get(key, prototype, byte_range)
        except Exception as e:  # stores raise any type
            if byte_range is not None and _status(e) == 416:  # "range not satisfiable": the object is shorter
                part = prototype.buffer.from_bytes(b"")
            elif await self._is_missing(key, e):
                return None
            else:
                raise
        if byte_range is None or part is None or len(part):
            return part
        # A part without bytes: the object is empty, or ends before the part.
        whole = await self._store.get(key, prototype)
        if whole is not None and len(whole):
            raise DamagedError(f"it is cut short: {len(whole)} bytes are stored, and a part after them was requested")
        return part

    async def _is_missing(self, key: str, error: Exception) -> bool:
        """Return whether an object that was refused does not exist.

        The metadata is read again, unless another read of it began after this refusal. An earlier read does not count,
        however recent: the credentials may have expired in between. An object that was missing before still is.
        """
        if self._is_local or key == self._metadata or not self._metadata or not is_forbidden(error):
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

    async def _retry(self, key: str, read: Callable[[], Awaitable[_T]]) -> _T:
        """Return the result of `read`, after retries."""
        COUNTS.add("reads")
        clock = asyncio.get_running_loop().time
        began, attempt = clock(), 0
        end = began + self._retry_policy.timeout
        while True:
            attempt += 1
            remaining = end - clock()
            try:
                # Half of the time for one attempt, so that a request without an answer leaves time for another.
                async with asyncio.timeout(remaining if attempt == self._retry_policy.attempts else remaining / 2):
                    return await read()
            except Exception as e:  # stores raise any type
                pause = backoff(attempt)
                if attempt == self._retry_policy.attempts or not is_transient(e) or clock() + pause >= end:
                    COUNTS.add("failures")
                    raise ObjectError(key, attempt, clock() - began, e) from e
                number = COUNTS.add("retries")
                if power_of_two(number):
                    log.warning(
                        "%s/%s: %s; retrying in %.2g s (retries of this process so far: %d)",
                        self._name, key, described(e), pause, number,
                    )  # fmt: skip
            await asyncio.sleep(pause)

    def _checked(self, key: str, part: Buffer | None, byte_range: ByteRequest | None) -> Buffer | None:
        """Return the part of an object that was read, after integrity checks; None for a missing chunk."""
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
        self._check_length(len(stored), byte_range)
        shard = self._encoded.shard
        at_start = isinstance(byte_range, RangeByteRequest) and byte_range.start == 0
        is_index = isinstance(byte_range, SuffixByteRequest) or (at_start and shard is not None and not shard.at_end)
        if shard is not None and not is_index:
            check_part(stored, shard)

    def _check_length(self, length: int, byte_range: ByteRequest) -> None:
        """Check the number of bytes that a request for a part of an object returned."""
        expected = None
        if isinstance(byte_range, RangeByteRequest):
            expected = byte_range.end - byte_range.start
        elif isinstance(byte_range, SuffixByteRequest):
            expected = byte_range.suffix
        if expected is not None and length > expected:
            raise RangeError(
                errno.EOPNOTSUPP,
                f"{expected} bytes of it were requested and {length} came: the server does not support byte ranges, "
                "which sharded arrays need",
            )
        if not length:  # for an object that has any bytes, `_read` raises
            raise EmptyError
        if expected is not None and length < expected:
            raise DamagedError(f"it is cut short: {length} of {expected} bytes that belong to it are stored")

    def _check_missing(self, key: str) -> None:
        """Check a chunk that a local store reports as missing: zarr-python does so too for what is not a file."""
        if not isinstance(self._store, LocalStore):
            return
        problem = problem_of(f"{self._store.root}/{key}", self._encoded.most_stored)
        if problem is not None:
            raise problem


def _is_local(store: Store) -> bool:
    """Return whether a store, or the store that it wraps, is a folder of this machine."""
    inner: Any = store
    while isinstance(inner, WrapperStore):
        inner = getattr(inner, "_store", None)
    return isinstance(inner, LocalStore)


def is_transient(error: Exception) -> bool:
    """Return whether an error is transient."""
    if isinstance(error, PermissionError):
        return False
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    if isinstance(error, DamagedError | TimeoutError | ConnectionError):
        return True  # a damaged file may be a file that is being written
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT_ERRNO
    # By module name, so that the libraries need not be imported: broken connections, truncated bodies.
    kinds = [kind for kind in type(error).__mro__ if kind.__module__.partition(".")[0] in ("aiohttp", "botocore")]
    return bool(kinds) and not _refused(error)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status code of an error, or None."""
    status: Any = getattr(error, "status", None)
    response: Any = getattr(error, "response", None)
    if status is None and isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def _refused(error: Exception) -> bool:
    """Return whether an error is about permissions or credentials."""
    text = f"{type(error).__name__} {error}".lower()
    return (
        isinstance(error, PermissionError)
        or _status(error) in (401, 403)
        or any(word in text for word in ("credential", "expiredtoken", "token has expired", "accessdenied"))
        or is_forbidden(error)
    )


#: Error codes that S3 also returns for an object that does not exist.
_FORBIDDEN_CODES = ("AccessDenied", "Forbidden", "403")
#: Words by which an error is about credentials, and not about the object.
_OF_CREDENTIALS = ("expired", "credential", "signature", "token", "access key", "accesskey", "request time")


def is_forbidden(error: BaseException) -> bool:
    """Return whether an error is a refusal that some stores also return for objects that do not exist.

    A refusal that mentions credentials is not.
    """
    response: Any = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None  # botocore's
    if code is not None:
        return code in _FORBIDDEN_CODES
    text = str(getattr(error, "message", None) or error).lower()  # the text of aiohttp's errors includes the URL
    if any(word in text for word in _OF_CREDENTIALS):
        return False
    forbidden = isinstance(error, PermissionError) or _status(error) == 403
    return forbidden or (isinstance(error, OSError) and text.startswith("forbidden"))  # the latter is raised by gcsfs


def described(error: Exception) -> str:
    """Return the message for an error: its type, its text and a remedy."""
    if isinstance(error, TimeoutError) and not str(error):
        text = "TimeoutError: no answer, or not all of it, in time; read_timeout sets how long to wait"
    else:
        text = f"{type(error).__name__}: {error}"
    if _refused(error):
        text += "; reading is not allowed: credentials are missing, wrong or expired, or the file belongs to others"
    return text
