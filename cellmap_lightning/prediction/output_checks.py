"""Checks of outputs, and the reasons of writes that fail."""

import errno
from pathlib import Path

from cellmap_lightning.errors import CellMapValueError


def write_failure(error: OSError) -> str:
    """Return the reason for a failed write, in words."""
    return {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the quota is used up",
        errno.EROFS: "the disk is read-only",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
    }.get(error.errno or 0, str(error))


def check_apart(output: Path, raw: Path) -> None:
    """Check that an output is separate from raw data, which are never written to.

    Raises:
        CellMapValueError: one of them is inside of the other.
    """
    a, b = output.absolute(), raw.absolute()
    if a == b or b in a.parents or a in b.parents:
        raise CellMapValueError(
            f"the output {output} and the raw volume {raw} must not be inside of each other; choose another output"
        )
