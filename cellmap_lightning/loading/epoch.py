"""The samples of a training epoch: how many there are, and how many of them fill no batch."""

import logging

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.loading.run import Run
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)

#: Default number of batches per epoch, over all ranks.
DEFAULT_BATCHES_PER_EPOCH = 1000


def check_epoch_settings(samples: int | None, batches: int | None) -> None:
    """Check that the length of an epoch is given once.

    Args:
        samples: ``samples_per_epoch`` of `CellMapDataModule`.
        batches: its ``batches_per_epoch``.

    Raises:
        CellMapTypeError: both are given.
    """
    if samples is not None and batches is not None:
        raise CellMapTypeError("samples_per_epoch and batches_per_epoch exclude each other; give one of them")


def epoch_samples(samples: int | None, batches: int | None, batch_size: int, world: int) -> int:
    """Return the number of samples of a training epoch, over all ranks.

    Args:
        samples: ``samples_per_epoch`` of `CellMapDataModule`; None for ``batches``.
        batches: its ``batches_per_epoch``; None for the default.
        batch_size: samples of a batch of one rank.
        world: number of ranks.

    Raises:
        CellMapValueError: they make no complete batch for each rank.
    """
    if samples is None:
        samples = (batches or DEFAULT_BATCHES_PER_EPOCH) * batch_size
    if samples < world * batch_size:
        raise CellMapValueError(
            f"an epoch of {samples} samples has no complete batch of {batch_size} for each of {world} ranks; "
            "raise samples_per_epoch or batches_per_epoch"
        )
    return samples


class DroppedSamples:
    """The log of the samples of an epoch that fill no global batch."""

    def __init__(self) -> None:
        #: Samples of an epoch and of a global batch in the last message.
        self._reported: tuple[int, int] | None = None

    def report(self, samples: int, batch_size: int, run: Run) -> None:
        """Log the dropped samples.

        Only on one rank, and only if the numbers have changed: a Trainer may create a loader for every epoch.

        Args:
            samples: samples of an epoch.
            batch_size: samples of the smallest batch of a rank: 1 if an incomplete batch is not dropped.
            run: the run, whose ranks share the samples.
        """
        size = run.world * batch_size
        dropped = samples % size
        if not dropped or self._reported == (samples, size) or not run.reports:
            return
        self._reported = samples, size
        log.info(
            "train: an epoch of %s is %s of %d (ranks: %d, samples of each: %d); the last %s "
            "fill%s no batch and %s dropped",
            plural(samples, "sample"), plural(samples // size, "global batch", "global batches"), size, run.world,
            batch_size, plural(dropped, "sample"),
            "s" * (dropped == 1), "is" if dropped == 1 else "are",
        )  # fmt: skip
