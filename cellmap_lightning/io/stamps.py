"""Stamps of files: short values that change when a file is written, replaced or reached through another link.

Time and size alone do not show that a file was replaced: ``rsync -a``, ``cp -p``, ``tar`` and container layers preserve
the modification time, and all chunks without compression have one size. Inode and change time are set by the kernel and
cannot be copied. The device number is ignored, since it differs between mounts; so is the inode on FUSE file systems
(sshfs, rclone, gcsfuse), which often assign new inodes at each mount.
"""

import hashlib
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

from cellmap_lightning.runtime.location import filesystem

_PACKED = struct.Struct("<Qqqq")
_WORD = (1 << 64) - 1
#: The stamp of a file that does not exist or cannot be examined.
ABSENT = bytes(_PACKED.size)
#: Bit mask of inodes for each device: 0 where inodes are ignored.
_masks: dict[int, int] = {}


def file_stamp(path: str) -> bytes:
    """Return the stamp of a file: inode, change time, modification time and size; for a link also its target.

    The two times are in nanoseconds. A link is followed, so that a change of the file behind it shows too.

    Args:
        path: the file. Links among its folders are followed, and show as another inode.

    Returns:
        The stamp; `ABSENT` where the file does not exist or its folder cannot be searched.
    """
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            return _link_stamp(path)
    except OSError:
        return ABSENT
    return _pack(status, path)


def _pack(status: os.stat_result, path: str) -> bytes:
    mask = _masks.get(status.st_dev)
    if mask is None:
        mask = _mask(status.st_dev, path)
    return _PACKED.pack(status.st_ino & mask, status.st_ctime_ns, status.st_mtime_ns, status.st_size)


def _mask(device: int, path: str) -> int:
    kind = filesystem(Path(path))
    mask = _masks[device] = 0 if kind == "fuse" or kind.startswith("fuse.") else _WORD
    return mask


def _link_stamp(path: str) -> bytes:
    target = os.fsencode(os.readlink(path))  # noqa: PTH115  thousands of them, and a Path costs more than the call
    try:
        status = os.stat(path)  # noqa: PTH116  as above
    except OSError:  # a dead link
        return ABSENT + target
    return _pack(status, path) + target


def stamped_size(stamp: bytes) -> int | None:
    """Return the size in bytes of the file of a stamp; None where there was no file."""
    return None if stamp.startswith(ABSENT) else int(_PACKED.unpack_from(stamp)[3])


def digest_of(parts: Iterable[object]) -> str:
    """Return a text of 32 hexadecimal digits that changes when any of the parts does."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(repr(part).encode())
        digest.update(b"\n")
    return digest.hexdigest()
