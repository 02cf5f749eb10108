"""Files that survive a power loss: what was written is flushed to the disk before something else relies on it."""

import contextlib
import errno
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

#: From how many files on several are flushed at a time, and how many: the file system then writes its own journal once
#: for several of them.
_FEW, THREADS = 4, 16
#: Errors of file systems, and of kinds of files, that cannot be flushed.
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EISDIR)


def flush(paths: Iterable[str]) -> None:
    """Flush files to the disk, and the entries of their folders. A file that does not exist is left out.

    Raises:
        OSError: the disk reports an error; what was written there may be lost.
    """
    files = list(dict.fromkeys(paths))
    folders = list({os.path.dirname(path) for path in files})  # noqa: PTH120  a Path costs more than the call
    if len(files) < _FEW:
        for path in (*files, *folders):
            _flush(path)
        return
    with ThreadPoolExecutor(THREADS, "cellmap-flush") as pool:
        for group in (files, folders):
            list(pool.map(_flush, group))


def _flush(path: str) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
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
