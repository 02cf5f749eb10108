"""Messages for errors of file systems: no permission, a full disk, a quota, a read-only disk."""

import errno
import io
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

#: What is wrong, and what to do, by the number of an error.
_PROBLEMS = {
    errno.EACCES: "permission denied; choose another folder, or change the permissions of this one",
    errno.EPERM: "permission denied; choose another folder, or change the permissions of this one",
    errno.EROFS: "the file system is read-only; choose a folder on another one",
    errno.ENOSPC: "the disk is full; free space on it, or choose a folder on another one",
    errno.EDQUOT: "the quota is used up; remove files of yours there, or choose a folder on another file system",
}


def is_file_error(error: object) -> bool:
    """Return True for an error of a file system that has a message here."""
    return isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno in _PROBLEMS)


def file_error_message(error: OSError, place: object = None) -> str:
    """Return one line with the path that cannot be read or written, what is wrong, and what to do.

    Args:
        error: an error for which `is_file_error` is true.
        place: the folder or file that the command writes to, for an error that names no file and shows none.
    """
    opened = _open_file(error)
    if (
        opened
        and place
        and Path(str(place)).absolute() not in (Path(opened).absolute(), *Path(opened).absolute().parents)
    ):
        opened = None  # such as the temporary copy of a checkpoint, which is on another disk
    path = error.filename or opened or place or error.strerror or str(error)
    if isinstance(path, bytes):
        path = path.decode(errors="replace")
    return f"{path}: {_PROBLEMS.get(error.errno or 0, _PROBLEMS[errno.EACCES])}"


def _open_file(error: BaseException) -> str | None:
    """Return the file that was open where an error was raised: errors of ``write`` and ``close`` do not name it."""
    for frame in reversed(list(_frames(error.__traceback__))):
        for value in frame.tb_frame.f_locals.values():
            name = getattr(value, "name", None) if isinstance(value, io.IOBase) else None
            if isinstance(name, str) and not name.startswith("<"):
                return name
    return None


def _frames(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next
