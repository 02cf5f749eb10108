"""The order of samples: numbers of one stream, dealt out over ranks."""

from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed
from torch.utils.data import DistributedSampler

from cellmap_lightning.errors import CellMapError, CellMapValueError


class StreamSampler(DistributedSampler[int]):
    """Numbers of the samples of an epoch that one rank reads: every ``world``-th of the stream.

    The k-th batches of all ranks together are the k-th global batch, whatever their number. While training, numbers go
    on through the epochs; otherwise each pass is the same.

    It is a `DistributedSampler` so that Lightning leaves it alone, and calls `set_epoch`.

    Its loader begins each pass with `start`. Where something else iterates it, each iteration is a pass: on one rank
    only, since whatever drives it there would distribute the samples a second time.

    Attributes:
        skip: samples at the beginning of the epoch, over all ranks, that the pass under way leaves out.
        epoch_of: from the epoch that `set_epoch` is given to that of the next pass; set by the loader.

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
        self.epoch_of: Callable[[int], int] | None = None
        self._next_epoch = 0
        self._started = False
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
        """Return the end of an epoch whose first ``skip`` samples are left out."""
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
        self._next_epoch = int(epoch) if self.epoch_of is None else self.epoch_of(int(epoch))

    def resume_at(self, epoch: int) -> None:
        """The next pass is this epoch, where a run is resumed."""
        self._next_epoch = int(epoch)

    def first(self, epoch: int) -> int:
        """Number of the first sample of an epoch."""
        since, sample = self._origin
        return sample + (epoch - since) * self.count if self.is_train else 0

    def begin_at(self, epoch: int, first: int) -> None:
        """Number samples so that this is the first of the epoch: a run goes on whose epochs had another length."""
        self._origin = (int(epoch), int(first))

    def start(self, skip: int = 0) -> None:
        """Begin a pass: the epoch that was set, or the one after the last."""
        self.epoch = self._next_epoch
        self.skip = skip
        self._next_epoch += 1
        self._started = True

    def numbers(self) -> Iterator[int]:
        """Return the numbers of the pass that was started last."""
        rank, world = self._place
        first = self.first(self.epoch)
        return (first + k for k in range(self.skip + rank, self._stop(self.skip), world))

    def __iter__(self) -> Iterator[int]:
        if not self._started:
            rank, world = self._place
            if world > 1:
                raise CellMapError(
                    f"the sampler of a CellMapDataLoader distributes its samples over {world} ranks itself (this is "
                    f"rank {rank}), and is iterated by another loader, which may distribute them again; use the "
                    "CellMapDataLoader as it is, without accelerator.prepare(loader) or the like, or make it with "
                    "rank=0, world=1"
                )
            self.start()
        self._started = False
        return self.numbers()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"epoch_of": None}

    def __len__(self) -> int:
        return self.left(0)
