"""Checks of outputs, and the reasons of writes that fail."""

import errno

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.io.store import Remote, StorePath, exists
from cellmap_lightning.prediction.journal import SETTINGS, journal_folder


def write_failure(error: OSError) -> str:
    """Return the reason for a failed write, in words."""
    return {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the quota is used up",
        errno.EROFS: "the disk is read-only",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
    }.get(error.errno or 0, str(error))


def check_finished(*groups: StorePath) -> None:
    """Check that the outputs in some groups are complete: an unfinished one has a journal, and lacks blocks.

    Args:
        groups: outputs of `cellmap-predict` or `cellmap-segment`, or groups in them.

    Raises:
        CellMapValueError: one is not complete.
    """
    for group in dict.fromkeys(groups):
        for work, command in (("prediction", "cellmap-predict"), ("segmentation", "cellmap-segment")):
            if exists(group / journal_folder(work) / SETTINGS):
                raise CellMapValueError(
                    f"{group}: the {work} is not finished; run the same {command} again, which continues it"
                )


def check_apart(output: StorePath, raw: StorePath) -> None:
    """Check that an output is separate from raw data, which are never written to.

    Raises:
        CellMapValueError: one of them is inside of the other.
    """
    a, b = _parts(output), _parts(raw)
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        raise CellMapValueError(
            f"the output {output} and the raw volume {raw} must not be inside of each other; choose another output"
        )


def _parts(place: StorePath) -> tuple[str, ...]:
    """Return the folders of a location, from the topmost one on."""
    return tuple(place.url.rstrip("/").split("/")) if isinstance(place, Remote) else place.absolute().parts
