"""Files that survive a power loss: what was written is flushed to the disk before something else relies on it."""

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

#: Errors of file systems, and of kinds of files, that cannot be flushed.
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EISDIR)


def flush(paths: Iterable[str]) -> None:
    """Flush files to the disk, and the entries of their folders. A file that does not exist is left out.

    Raises:
        OSError: the disk reports an error; what was written there may be lost.
    """
    folders = set()
    for path in paths:
        folders.add(os.path.dirname(path))  # noqa: PTH120  thousands of them, and a Path costs more than the call
        with contextlib.suppress(FileNotFoundError):
            _flush(path)
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            _flush(folder)


def _flush(path: str) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as e:
        if e.errno in _UNSUPPORTED:  # folders on Windows
            return
        raise
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all, also after a power loss."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    flush([str(draft)])
    draft.replace(path)
    flush([str(path)])


def remove(path: Path) -> None:
    """Remove a file, if it is there, and flush its folder, so that it does not come back after a power loss."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        _flush(str(path.parent))
