"""Durable files: data are flushed to the disk before other files refer to them, and so survive a power loss.

Objects of remote stores are durable once a write returns.
"""

import contextlib
import errno
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from cellmap_lightning.io.object_folder import ObjectFolder, OutputPath

#: Number of files from which on they are flushed in parallel, and number of threads: the file system then commits its
#: journal once for several of them.
_PARALLEL_FROM, THREADS = 4, 16
#: Errors of file systems, and of types of files, that cannot be flushed.
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EISDIR)


def flush(paths: Iterable[str]) -> None:
    """Flush files to the disk, and the entries of their folders. Files that do not exist are skipped.

    Raises:
        OSError: the disk reports an error; the written data may be lost.
    """
    files = list(dict.fromkeys(paths))
    folders = list({os.path.dirname(path) for path in files})  # noqa: PTH120  a Path costs more than the call
    if len(files) < _PARALLEL_FROM:
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


def write_bytes(path: OutputPath, content: bytes) -> None:
    """Write a file atomically, also with respect to a power loss."""
    if isinstance(path, ObjectFolder):
        path.write_bytes(content)
        return
    draft = path.with_name(f"{path.name}.draft")
    draft.write_bytes(content)
    flush([str(draft)])
    draft.replace(path)
    flush([str(path)])


def write_text(path: OutputPath, text: str) -> None:
    """Write a file atomically, also with respect to a power loss."""
    write_bytes(path, text.encode())


def remove(path: OutputPath) -> None:
    """Remove a file, if it exists, and flush its folder, so that it does not reappear after a power loss."""
    if isinstance(path, ObjectFolder):
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        _flush(str(path.parent))
