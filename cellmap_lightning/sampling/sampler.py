"""The order of samples: numbers of one stream, dealt out over ranks."""

from collections.abc import Iterator

import torch.distributed
from torch.utils.data import DistributedSampler

from cellmap_lightning.errors import CellMapValueError


class StreamSampler(DistributedSampler[int]):
    """Numbers of the samples of an epoch that one rank reads: every ``world``-th of the stream.

    The k-th batches of all ranks together are the k-th global batch, whatever their number. While training, numbers go
    on through the epochs; otherwise each pass is the same.

    It is a `DistributedSampler` so that Lightning leaves it alone, and calls `set_epoch`.

    Attributes:
        skip: samples at the beginning of the epoch, over all ranks, that the pass under way leaves out.

    Args:
        count: samples of an epoch over all ranks.
        is_train: whether epochs differ. The samples of an epoch that cannot be dealt out evenly are then left out.
        rank: this process; by default that of `torch.distributed`, else 0.
        world: processes; likewise, else 1.

    Raises:
        CellMapValueError: fewer samples than ranks.
    """

    def __init__(self, count: int, is_train: bool, rank: int | None = None, world: int | None = None) -> None:
        # The base class would want a dataset to permute; everything that it sets is set here.
        if (rank is None) != (world is None) or (world is not None and not 0 <= (rank or 0) < world):
            raise CellMapValueError(f"rank {rank} is none of {world}")
        self._given = (rank, world) if rank is not None and world is not None else None
        self.count = count
        self.is_train = is_train
        self.shuffle = False
        self.drop_last = is_train
        self.epoch = 0
        self.skip = 0
        self._next_epoch = 0
        #: An epoch, and the number of its first sample.
        self._origin = (0, 0)
        if not len(self):
            raise CellMapValueError(
                f"{count} samples cannot be dealt out over {self.num_replicas} ranks: at least one for each is needed"
            )

    @property
    def _place(self) -> tuple[int, int]:
        """Rank and number of processes: a loader may be built before the processes find each other."""
        if self._given is not None:
            return self._given
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    @property
    def rank(self) -> int:  # type: ignore[override]
        """This process."""
        return self._place[0]

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """Processes."""
        return self._place[1]

    def _stop(self, skip: int) -> int:
        """Behind the last sample of an epoch that is dealt out, when so many are left out at its beginning."""
        return self.count - (self.count - skip) % self.num_replicas if self.is_train else self.count

    def left(self, skip: int) -> int:
        """Samples of an epoch that this rank reads, when so many over all ranks are left out at its beginning."""
        rank, world = self._place
        return len(range(skip + rank, self._stop(skip), world))

    @property
    def next_epoch(self) -> int:
        """The epoch of the next pass."""
        return self._next_epoch

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this epoch."""
        self._next_epoch = int(epoch)

    def first(self, epoch: int) -> int:
        """Number of the first sample of an epoch."""
        since, sample = self._origin
        return sample + (epoch - since) * self.count if self.is_train else 0

    def begin_at(self, epoch: int, first: int) -> None:
        """Number samples so that this is the first of the epoch: a run goes on whose epochs had another length."""
        self._origin = (int(epoch), int(first))

    def start(self, skip: int = 0) -> None:
        """A pass begins: it is the epoch that was set, or the one after the last."""
        self.epoch = self._next_epoch
        self.skip = skip
        self._next_epoch += 1

    def __iter__(self) -> Iterator[int]:
        rank, world = self._place
        first = self.first(self.epoch)
        return (first + k for k in range(self.skip + rank, self._stop(self.skip), world))

    def __len__(self) -> int:
        return self.left(0)
