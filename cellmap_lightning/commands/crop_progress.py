"""The progress of ``cellmap-predict`` over the crops of a manifest."""

import logging
from collections.abc import Sequence

from cellmap_lightning.wording import duration_text, large_count, plural

log = logging.getLogger(__name__)


class CropProgress:
    """Log lines with the size of all crops, and with the time that the crops left take.

    The time is estimated from the voxels per second of this command so far. Crops that were complete already take no
    time, and do not count.

    Args:
        voxels: number of voxels to predict in each crop, in the order in which they are predicted.

    Example:
        >>> progress = CropProgress([1000, 3000])
        >>> progress.add(1000, seconds=20.0)
        >>> progress.left()
        60.0
    """

    def __init__(self, voxels: Sequence[int]) -> None:
        self._voxels = list(voxels)
        self._done, self._computed, self._seconds, self._processes = 0, 0, 0.0, 1
        log.info("%s, %s voxels in all", plural(len(self._voxels), "crop"), large_count(sum(self._voxels)))

    def add(self, computed: int, seconds: float, processes: int = 1) -> None:
        """Add the next crop, which is finished.

        Args:
            computed: number of voxels that this process computed of it; 0 if it was complete already.
            seconds: time that it took.
            processes: number of processes that share each crop.
        """
        self._done += 1
        self._processes = processes
        if computed:
            self._computed += computed
            self._seconds += seconds

    def left(self) -> float | None:
        """Return the seconds that the crops left take; None if there are none, or nothing was computed so far."""
        rest = sum(self._voxels[self._done :])
        if not rest or not self._computed:
            return None
        return rest / self._processes * self._seconds / self._computed

    def log_left(self) -> None:
        """Log the number of finished crops and the time that the others take."""
        seconds = self.left()
        if seconds is not None:
            log.info(
                "%d of %s done; about %s left", self._done, plural(len(self._voxels), "crop"), duration_text(seconds)
            )
