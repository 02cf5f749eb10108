"""Zarr stores that read regular files and members of archives, with size limits."""

import asyncio
import os
from pathlib import Path
from typing import Any

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import FsspecStore, LocalStore

from cellmap_lightning.io.event_loop import cancel_at_exit
from cellmap_lightning.io.files import LargeFileError, excess, open_regular, read_part
from cellmap_lightning.io.store import MOST_JSON_BYTES, Remote, StorePath

_METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")


def open_store(where: StorePath, most: int | None = None) -> Store:
    """Return the store from which zarr-python reads an array.

    Args:
        where: the array.
        most: size limit of chunks in bytes; None for no limit.
    """
    cancel_at_exit()
    if not isinstance(where, Remote):
        return RegularFileStore(where, read_only=True, most=most)
    from fsspec.asyn import AsyncFileSystem
    from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

    plain = fs = where.filesystem(asynchronous=True)
    if not isinstance(fs, AsyncFileSystem) or not fs.async_impl:
        fs = AsyncFileSystemWrapper(fs, asynchronous=True)
    absent = (FileNotFoundError, IsADirectoryError, NotADirectoryError, KeyError)  # the last one of archives
    settings: dict[str, Any] = {"read_only": True, "path": where.key, "allowed_exceptions": absent}
    return ArchiveStore(fs, plain, most, **settings) if where.is_archive else FsspecStore(fs, **settings)


class RegularFileStore(LocalStore):
    """A store of a local folder that reads only regular files.

    Args:
        root: the folder.
        read_only: whether writing is refused.
        most: size limit of chunk files in bytes; None for no limit.

    Example:
        >>> zarr.open_array(RegularFileStore("/data/a.zarr/s0", read_only=True), mode="r")
    """

    def __init__(
        self,
        root: Path | str,
        *,
        read_only: bool = False,
        most: int | None = None,
    ) -> None:
        super().__init__(root, read_only=read_only)
        self._most = most

    def with_read_only(self, read_only: bool = False) -> "RegularFileStore":
        """Return the same store with another permission to write."""
        return RegularFileStore(self.root, read_only=read_only, most=self._most)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the content of a file; None if it does not exist or is a folder.

        Raises:
            IrregularFileError: it is a FIFO, a device or a socket.
            LargeFileError: it exceeds the size limit.
        """
        if not self._is_open:
            await self._open()
        prototype = prototype or default_buffer_prototype()
        most = MOST_JSON_BYTES if key.rpartition("/")[2] in _METADATA else self._most
        try:
            content = await asyncio.to_thread(_read, f"{self.root}/{key}", most, byte_range)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        return prototype.buffer.from_bytes(content)


def _read(path: str, most: int | None, byte_range: ByteRequest | None) -> bytes:
    handle, size = open_regular(path, most)
    try:
        start, stop = _span(size, byte_range)
        if start:
            os.lseek(handle, start, os.SEEK_SET)
        return read_part(handle, max(0, stop - start))
    finally:
        os.close(handle)


def _span(size: int, byte_range: ByteRequest | None) -> tuple[int, int]:
    """Return first byte and end of a part of a file."""
    if byte_range is None:
        return 0, size
    if isinstance(byte_range, RangeByteRequest):
        return min(byte_range.start, size), min(byte_range.end, size)
    if isinstance(byte_range, OffsetByteRequest):
        return min(byte_range.offset, size), size
    if isinstance(byte_range, SuffixByteRequest):
        return max(0, size - byte_range.suffix), size
    raise TypeError(f"a part of a file is a range, an offset or a suffix, got {byte_range!r}")


class ArchiveStore(FsspecStore):
    """A store of a zip file that decodes members only up to the size in its directory and a size limit.

    Args:
        fs: its file system, for asynchronous reads.
        archive: its file system, which holds the directory.
        most: size limit of chunks in bytes; None for no limit.
        **settings: see `FsspecStore`.

    Example:
        >>> store = open_store(parse_location("zip://s0::/data/vol.zip"))
    """

    def __init__(self, fs: Any, archive: Any, most: int | None, **settings: Any) -> None:
        super().__init__(fs, **settings)
        self._archive, self._most = archive, most

    def with_read_only(self, read_only: bool = False) -> "ArchiveStore":
        """Return the same store with another permission to write."""
        settings = {"path": self.path, "allowed_exceptions": self.allowed_exceptions, "read_only": read_only}
        return ArchiveStore(self.fs, self._archive, self._most, **settings)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return a member, or None if it does not exist.

        Raises:
            LargeFileError: it exceeds the size limit.
        """
        try:
            entry = self._archive.info(f"{self.path}/{key}" if self.path else key)
        except self.allowed_exceptions:
            return None
        if entry["type"] == "directory":
            return None
        size = int(entry["size"])
        most = MOST_JSON_BYTES if key.rpartition("/")[2] in _METADATA else self._most
        if most is not None and size > most:
            raise LargeFileError(excess(size, most))
        if byte_range is None:  # a read without an end would ignore the size in the directory
            byte_range = RangeByteRequest(0, size)
        elif not isinstance(byte_range, RangeByteRequest):
            byte_range = RangeByteRequest(*_span(size, byte_range))
        return await super().get(key, prototype, byte_range)
