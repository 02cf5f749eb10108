"""Folders of remote stores that outputs are written to, with retries.

An object is written as a whole: readers see the earlier object or the new one, also if the writer is killed. So files
that are renamed after they are complete, as on a disk, are not needed.
"""

import asyncio
import contextlib
import errno
import fnmatch
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.io.event_loop import cancel_at_exit
from cellmap_lightning.io.retrying import COUNTS, DEFAULT_RETRY, backoff, is_forbidden, is_transient
from cellmap_lightning.io.store import Remote, parse_location

#: Errors that are answers, and no faults.
_ANSWERS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
_READ_ONLY = ("http", "https", "zip")
_T = TypeVar("_T")


@dataclass(frozen=True)
class ObjectFolder(Remote):
    """A remote location that is written to, with the methods of `Path` that outputs use.

    Folders exist as long as they contain objects. Transient errors are retried.

    Example:
        >>> folder = output_path("s3://bucket/mito.zarr", {"endpoint_url": "http://localhost:9000"})
        >>> (folder / "notes.txt").write_text("begun")
    """

    def _retried(self, act: Callable[[Any], _T]) -> _T:
        """Return the result of an act on the file system, after retries.

        Raises:
            OSError: it failed; the message names the location.
        """
        fs, began, attempt = self.filesystem(), time.monotonic(), 0
        while True:
            attempt += 1
            try:
                return act(fs)
            except _ANSWERS:
                raise
            except Exception as e:  # stores raise any type
                time.sleep(_pause(self, attempt, began, e))

    def exists(self) -> bool:
        """Return whether an object or a folder exists."""
        return bool(self._retried(lambda fs: fs.exists(self.key)))

    def is_file(self) -> bool:
        """Return whether it is an object."""
        return bool(self._retried(lambda fs: fs.isfile(self.key)))

    def is_dir(self) -> bool:
        """Return whether it is a folder."""
        return bool(self._retried(lambda fs: fs.isdir(self.key)))

    def iterdir(self) -> Iterator["ObjectFolder"]:
        """Yield the objects and folders in the folder."""
        try:
            entries = self._retried(lambda fs: fs.ls(self.key, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            name = str(entry).rstrip("/").rpartition("/")[2]
            if name and name != self.name:
                yield self / name

    def glob(self, pattern: str) -> Iterator["ObjectFolder"]:
        """Yield the objects and folders in the folder whose names match a pattern."""
        yield from (entry for entry in self.iterdir() if fnmatch.fnmatchcase(entry.name, pattern))

    def absolute(self) -> "ObjectFolder":
        """Return the location, which is always absolute."""
        return self

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder exists with its first object."""

    def read_bytes(self) -> bytes:
        """Return the content of the object.

        Raises:
            FileNotFoundError: it does not exist.
        """
        return bytes(self._retried(lambda fs: fs.cat_file(self.key)))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the content of the object as text."""
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, content: bytes) -> int:
        """Write the object atomically; return its number of bytes."""
        self._retried(lambda fs: fs.pipe_file(self.key, content))
        return len(content)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        """Write the object atomically; return its number of bytes."""
        return self.write_bytes(text.encode(encoding))

    def create(self, content: bytes) -> None:
        """Write the object if it does not exist; in one step, where the store has conditional writes.

        Raises:
            FileExistsError: it exists.
        """

        def put(fs: Any) -> None:
            try:
                fs.pipe_file(self.key, content, mode="create")
            except (NotImplementedError, TypeError):
                fs.pipe_file(self.key, content)
            except OSError as e:
                if "PreconditionFailed" in str(e):
                    raise FileExistsError(errno.EEXIST, "it exists", str(self)) from e
                raise

        if self.exists():
            raise FileExistsError(errno.EEXIST, "it exists", str(self))
        self._retried(put)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object.

        Raises:
            FileNotFoundError: it does not exist, unless ``missing_ok`` is set. Some stores do not report it.
        """
        try:
            self._retried(lambda fs: fs.rm_file(self.key))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Delete the folder with all objects in it, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._retried(lambda fs: fs.rm(self.key, recursive=True))

    def store(self) -> "WritableStore":
        """Return the store through which zarr-python reads and writes the folder."""
        cancel_at_exit()
        from fsspec.asyn import AsyncFileSystem
        from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

        fs = self.filesystem(asynchronous=True)
        if not isinstance(fs, AsyncFileSystem) or not fs.async_impl:
            fs = AsyncFileSystemWrapper(fs, asynchronous=True)
        return WritableStore(fs, self)


#: A folder that outputs are written to.
OutputPath = Path | ObjectFolder


def zarr_location(path: OutputPath) -> "str | WritableStore":
    """Return the location of a node as zarr-python takes it."""
    return path.store() if isinstance(path, ObjectFolder) else str(path)


def remove_tree(path: OutputPath) -> None:
    """Remove a folder with all files in it."""
    if isinstance(path, ObjectFolder):
        path.remove_tree()
    else:
        shutil.rmtree(path)


class WritableStore(FsspecStore):
    """A store of zarr-python whose reads and writes are retried.

    Args:
        fs: the asynchronous file system.
        folder: the folder.
        read_only: whether writing is refused.

    Example:
        >>> zarr.open_group(output_path("s3://bucket/mito.zarr").store(), mode="a")
    """

    def __init__(self, fs: Any, folder: ObjectFolder, read_only: bool = False) -> None:
        super().__init__(fs, read_only=read_only, path=folder.key, allowed_exceptions=_ANSWERS)
        self._folder = folder

    def with_read_only(self, read_only: bool = False) -> "WritableStore":
        """Return the same store with another permission to write."""
        return WritableStore(self.fs, self._folder, read_only)

    async def _retried(self, act: Callable[[], Awaitable[_T]]) -> _T:
        began, attempt = time.monotonic(), 0
        while True:
            attempt += 1
            try:
                return await act()
            except Exception as e:  # stores raise any type
                await asyncio.sleep(_pause(self._folder, attempt, began, e))

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object, or None if it does not exist."""
        get = super().get
        return await self._retried(lambda: get(key, prototype, byte_range))

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        """Write an object."""
        put = super().set
        await self._retried(lambda: put(key, value, byte_range))

    async def delete(self, key: str) -> None:
        """Delete an object, if it exists."""
        self._check_writable()

        async def remove() -> None:
            with contextlib.suppress(*_ANSWERS):
                # The public `delete` lists the object first.
                await self.fs._rm_file(f"{self.path}/{key}")  # noqa: SLF001

        await self._retried(remove)


def _pause(folder: ObjectFolder, attempt: int, began: float, error: Exception) -> float:
    """Return the seconds to wait before the next attempt.

    Raises:
        OSError: the error is permanent, or the attempts are used up.
    """
    pause = backoff(attempt)
    seconds = time.monotonic() - began
    if is_transient(error) and attempt < DEFAULT_RETRY.attempts and seconds + pause < DEFAULT_RETRY.timeout:
        COUNTS.add("retries")
        return pause
    COUNTS.add("failures")
    number = errno.EACCES if isinstance(error, PermissionError) or is_forbidden(error) else None
    if number is None:
        number = error.errno if isinstance(error, OSError) and error.errno is not None else errno.EIO
    attempts = f"{attempt} attempts" if attempt > 1 else "1 attempt"
    text = getattr(error, "strerror", None) or str(error)
    raise OSError(number, folder.hide(f"{text} ({attempts})")) from None


def output_path(path: "str | os.PathLike[str] | Remote", options: Mapping[str, Any] | None = None) -> OutputPath:
    """Return the folder of an output, local or remote.

    Args:
        path: a path, or an address such as ``s3://bucket/mito.zarr``.
        options: ``storage_options`` of an address.

    Raises:
        CellMapValueError: an address of a kind that cannot be written.
    """
    text = path.url if isinstance(path, Remote) else os.fspath(path)
    if "://" not in text or text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    place = path if isinstance(path, Remote) else parse_location(text, options)
    if not isinstance(place, Remote) or place.protocol in _READ_ONLY or place.url_parts[2]:
        raise CellMapValueError(f"{place}: outputs are written to folders, s3:// and gs://; this can only be read")
    return ObjectFolder(place.url, place.options)
