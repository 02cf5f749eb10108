"""Reading of regular files, without blocking and with bounded size.

A FIFO blocks a reader until another process writes to it, a device such as ``/dev/zero`` never ends, and a sparse file
of some bytes on disk may have terabytes. So a file is opened without blocking, and its type and size are checked before
it is read. Links to regular files are followed.
"""

import os
import stat
from pathlib import Path

from cellmap_lightning.errors import CellMapValueError

#: Flags for reading: opening a FIFO returns at once, and a terminal does not become the controlling terminal.
READ_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY", "O_CLOEXEC"):
    READ_FLAGS |= getattr(os, _name, 0)

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a folder",
}


class IrregularFileError(ValueError):
    """A FIFO, a device or a socket in place of a file."""


class LargeFileError(ValueError):
    """A file that is larger than its format allows."""


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        CellMapValueError: it or a part of its path is a file.
        OSError: it cannot be made for another reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next((place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()), folder)
        raise CellMapValueError(
            f"{folder}: cannot be made, since {file} is a file; choose another output, or remove the file"
        ) from None


def irregularity(mode: int) -> str:
    """Return the problem with a file of a mode (``st_mode``); "" for a regular file or a folder."""
    kind = stat.S_IFMT(mode)
    if kind in (stat.S_IFREG, stat.S_IFDIR):
        return ""
    return f"it is {_KINDS.get(kind, 'not a regular file')}; only regular files, and links to them, are read"


def excess(size: int, most: int) -> str:
    """Return the problem with a file of more than ``most`` bytes; "" for a smaller one."""
    return f"it has {size} bytes; at most {most} are read" if size > most else ""


def open_regular(path: str, most: int | None = None) -> tuple[int, int]:
    """Open a regular file, and return its descriptor and its size.

    Args:
        path: the file.
        most: size limit in bytes; None for no limit.

    Raises:
        IrregularFileError: it is a FIFO, a device or a socket.
        IsADirectoryError: it is a folder.
        LargeFileError: it is larger.
        OSError: it cannot be opened.
    """
    try:
        handle = os.open(path, READ_FLAGS)
    except FileNotFoundError:
        raise
    except OSError:
        problem = _irregularity_of(path)  # the system refuses sockets, and devices without a driver
        if problem:
            raise IrregularFileError(problem) from None
        raise
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(f"{path} is a folder")
            raise IrregularFileError(irregularity(status.st_mode))
        if most is not None and status.st_size > most:
            raise LargeFileError(excess(status.st_size, most))
    except BaseException:
        os.close(handle)
        raise
    return handle, status.st_size


def _irregularity_of(path: str) -> str:
    try:
        return irregularity(os.stat(path).st_mode)  # noqa: PTH116  a Path costs more than the call
    except (OSError, ValueError):  # the latter for an invalid path
        return ""


def read_regular(path: str, most: int) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes, also if its size changes meanwhile.

    Raises:
        Exception: see `open_regular`.
    """
    handle, size = open_regular(path, most)
    try:
        content = read_part(handle, size + 1)  # one byte more than expected, to detect growth
        if len(content) > size:  # it grows, or is a kernel file, whose size is reported as 0
            content += read_part(handle, most + 1 - len(content))
            if len(content) > most:
                raise LargeFileError(f"it has more than {most} bytes; at most {most} are read")
        return content
    finally:
        os.close(handle)


def read_part(handle: int, count: int) -> bytes:
    """Return the next ``count`` bytes of an open file, or all that remain."""
    content = os.read(handle, count)
    if len(content) == count or not content:
        return content
    parts, left = [content], count - len(content)
    while left > 0:  # the system reads at most 2 GiB at a time
        part = os.read(handle, left)
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def problem_of_archive(address: str) -> str:
    """Return the problem with the local archive to which an address is chained; "" for none.

    Args:
        address: such as ``zip://inside::/data/vol.zip``.
    """
    path = address.partition("::")[2].rpartition("::")[2].removeprefix("file://")
    if not path or "://" in path:
        return ""
    problem = _irregularity_of(path)
    return f"{path}: {problem}" if problem else ""
