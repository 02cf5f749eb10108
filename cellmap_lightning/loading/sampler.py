"""The order of samples: a stream of numbers, distributed over ranks."""

from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed
from torch.utils.data import DistributedSampler

from cellmap_lightning.errors import CellMapError, CellMapValueError


class StreamSampler(DistributedSampler[int]):
    """The numbers of the samples of an epoch that one rank reads: every ``world``-th of the stream.

    The k-th batches of all ranks together are the k-th global batch, for any number of ranks. While training, numbers
    continue through the epochs; otherwise each pass is the same.

    It is a `DistributedSampler` so that Lightning does not replace it, and calls `set_epoch`. Its loader begins each
    pass with `start`. If other code iterates it, each iteration is a pass: on one rank only, since a foreign loader
    on several ranks would distribute the samples a second time. See docs/runs.md.

    Attributes:
        skip: samples at the beginning of the epoch, over all ranks, that the running pass omits.
        epoch_of: maps the argument of `set_epoch` to the epoch of the next pass; set by the loader.

    Args:
        count: samples per epoch over all ranks.
        is_train: epochs differ, and the remainder of an epoch that cannot be distributed evenly is dropped.
        rank: rank of this process; by default that of `torch.distributed`, else 0.
        world: number of processes; likewise, else 1.

    Raises:
        CellMapValueError: fewer samples than ranks, or a rank outside ``range(world)``.
    """

    def __init__(self, count: int, is_train: bool, rank: int | None = None, world: int | None = None) -> None:
        # The constructor of the base class needs a dataset to permute; its attributes are set here instead.
        if (rank is None) != (world is None) or (world is not None and not 0 <= (rank or 0) < world):
            span = "given together with world" if world is None or rank is None else f"in [0, {world})"
            raise CellMapValueError(f"rank must be {span}, got {rank} with world={world}")
        self._fixed = (rank, world) if rank is not None and world is not None else None
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
                f"{count} samples cannot be distributed over {self.num_replicas} ranks; each needs at least one"
            )

    @property
    def _rank_and_world(self) -> tuple[int, int]:
        """The rank and the number of processes, read late: a loader may be built before the process group exists."""
        if self._fixed is not None:
            return self._fixed
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    @property
    def rank(self) -> int:  # type: ignore[override]
        """The rank of this process."""
        return self._rank_and_world[0]

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """The number of processes."""
        return self._rank_and_world[1]

    def _stop(self, skip: int) -> int:
        """Return the end of an epoch whose first ``skip`` samples are omitted."""
        return self.count - (self.count - skip) % self.num_replicas if self.is_train else self.count

    def left(self, skip: int) -> int:
        """Return the samples of an epoch that this rank reads, if the first ``skip`` over all ranks are omitted."""
        rank, world = self._rank_and_world
        return len(range(skip + rank, self._stop(skip), world))

    @property
    def next_epoch(self) -> int:
        """The epoch of the next pass."""
        return self._next_epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, as a Trainer or a loop counts it."""
        self._next_epoch = int(epoch) if self.epoch_of is None else self.epoch_of(int(epoch))

    def resume_at(self, epoch: int) -> None:
        """Set the epoch of the next pass of a resumed run."""
        self._next_epoch = int(epoch)

    def first(self, epoch: int) -> int:
        """Return the number of the first sample of an epoch."""
        since, sample = self._origin
        return sample + (epoch - since) * self.count if self.is_train else 0

    def begin_at(self, epoch: int, first: int) -> None:
        """Set the number of the first sample of an epoch, for a resumed run whose epochs had another length."""
        self._origin = (int(epoch), int(first))

    def start(self, skip: int = 0) -> None:
        """Begin a pass, of the epoch that was set, or of the one after the last."""
        self.epoch = self._next_epoch
        self.skip = skip
        self._next_epoch += 1
        self._started = True

    def numbers(self) -> Iterator[int]:
        """Return the numbers of the pass that was started last."""
        rank, world = self._rank_and_world
        first = self.first(self.epoch)
        return (first + k for k in range(self.skip + rank, self._stop(self.skip), world))

    def __iter__(self) -> Iterator[int]:
        if not self._started:
            rank, world = self._rank_and_world
            if world > 1:
                raise CellMapError(
                    f"the sampler of a CellMapDataLoader distributes its samples over {world} ranks itself (this is "
                    f"rank {rank}), and is iterated by another loader, which may distribute them again; use the "
                    "CellMapDataLoader itself, without accelerator.prepare(loader) or similar, or create it with "
                    "options=LoaderOptions(rank=0, world=1)"
                )
            self.start()
        self._started = False
        return self.numbers()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"epoch_of": None}

    def __len__(self) -> int:
        return self.left(0)
