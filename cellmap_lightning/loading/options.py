"""The arguments of loaders: torch's, which pass through, and those of the run that a loader is part of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from cellmap_lightning.errors import CellMapTypeError
from cellmap_lightning.loading.prefetch import PrefetchDecision
from cellmap_lightning.loading.resume import Steps
from cellmap_lightning.loading.waiting import WaitTimes
from cellmap_lightning.resident.device_cache import DeviceCache
from cellmap_lightning.validation import did_you_mean

#: Default timeout of worker processes, in seconds: decoding for the first batches may take minutes.
WORKER_TIMEOUT = 1200.0
#: Arguments of torch's loader that a loader sets itself. Lightning passes them when it makes a loader from another.
_SET_HERE = ("collate_fn", "generator")


@dataclass(frozen=True)
class LoaderOptions:
    """The part of a loader in a run: its rank, its device, and the batches that are read ahead.

    `CellMapDataModule` sets them from the Trainer.

    Example:
        >>> LoaderOptions(rank=0, world=2)  # doctest: +ELLIPSIS
        LoaderOptions(rank=0, world=2, device=None, ...)

    Args:
        rank: this process among ``world``; by default that of `torch.distributed`.
        world: number of processes.
        device: the device that uses the batches; they are copied to it if ``decision`` prefetches. By default the CPU.
        decision: prefetching of batches, see `prefetch.decide`; by default none.
        waiting: the counters of seconds that batches are waited for.
        steps: the Trainer's count of batches, from which `CellMapDataLoader.state_dict` derives the progress of a pass;
            by default the batches that were delivered are counted.
        resident: voxels on a device, from which batches are gathered there; see docs/device.md. Other datasets than
            those of this package, and those with ``__getitem__`` of user code, do not use it.
    """

    rank: int | None = None
    world: int | None = None
    device: torch.device | None = None
    decision: PrefetchDecision | None = None
    waiting: WaitTimes | None = None
    steps: Steps | None = None
    resident: DeviceCache | None = None


class TorchOptions(TypedDict, total=False):
    """The other arguments of `torch.utils.data.DataLoader` that `CellMapDataLoader` takes; see docs/batches.md.

    Args:
        drop_last: drop an incomplete last batch; by default while training.
        pin_memory: read into page-locked memory.
        persistent_workers: leave worker processes running between epochs; by default if there are any.
        prefetch_factor: batches ahead per worker process.
        timeout: seconds after which a worker that delivers nothing is an error; 0 waits without limit. Reads of single
            objects have a shorter timeout, see `ReadOptions`.
        multiprocessing_context: start method of worker processes; by default one that is safe with the reader.
        worker_init_fn: called in each worker process.
        shuffle: accepted for compatibility with torch; the order follows from ``is_train``.
    """

    drop_last: bool | None
    pin_memory: bool
    persistent_workers: bool | None
    prefetch_factor: int | None
    timeout: float
    multiprocessing_context: Any
    worker_init_fn: Any
    shuffle: bool | None


def check_torch_options(given: Mapping[str, Any], is_copy: bool) -> TorchOptions:
    """Return torch's arguments after a check of their names.

    Args:
        given: the arguments.
        is_copy: the loader is made from another one, whose own arguments are passed too.

    Raises:
        CellMapTypeError: an argument is unknown, or set by the loader.
    """
    options: Any = {name: value for name, value in given.items() if not (is_copy and name in _SET_HERE)}
    for name in options:
        if name not in TorchOptions.__annotations__:
            names = (*TorchOptions.__annotations__, *LoaderOptions.__dataclass_fields__)
            advice = f"; use options=LoaderOptions({name}=...)" if name in LoaderOptions.__dataclass_fields__ else ""
            raise CellMapTypeError(
                f"CellMapDataLoader: it has no argument {name!r}{advice or did_you_mean(name, names)}"
            )
    checked: TorchOptions = options
    return checked
