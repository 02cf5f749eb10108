"""Slots of shared memory, allocated once, in which worker processes deliver their batches.

torch creates a new shared file for every tensor of every batch, whose page faults cost more than reading the batch. A
worker has as many slots as it can have batches in flight: ``prefetch_factor`` requested ones, the one requested when
the last one was taken, and the one that is being copied out.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.batches.layout import BatchLayout
from cellmap_lightning.cache.shared_memory import SharedBlock
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.runtime.buffers import BUFFERS

_ALIGN = 4096

#: Name, type, shape, and first byte in the slot.
Place = tuple[str, np.dtype[Any], tuple[int, ...], int]


class SlotBatch(NamedTuple):
    """The location of a batch in the slots, sent from a worker to the main process; see docs/speed.md.

    Attributes:
        worker: the worker that owns the slot.
        number: number of the batch among those of the worker, from 0 on.
        samples: samples of a compact batch; 0 for a finished one.
        places: places of the arrays of a finished batch.
    """

    worker: int
    number: int
    samples: int
    places: tuple[Place, ...] = ()


class Slots:
    """The slots of the worker processes of one loader; see docs/speed.md.

    Args:
        layout: the layout of the batches.
        batch_size: largest number of samples in a batch.
        workers: number of worker processes.
        prefetch_factor: batches requested ahead from each worker.
        finished: workers finish their batches.
    """

    def __init__(
        self, layout: BatchLayout, batch_size: int, workers: int, prefetch_factor: int, finished: bool
    ) -> None:
        self.finished = finished
        self.count = prefetch_factor + 2
        memory = layout.memory(batch_size)
        bytes_of = memory.arrays if finished else memory.compact.arrays
        # The arrays, the numbers of samples and positions, and the number of the batch, each on separate pages.
        sizes = [*bytes_of.values(), 8 * batch_size, 8 * batch_size, 8]
        self.nbytes = sum(math.ceil(size / _ALIGN) * _ALIGN for size in sizes)
        self.block = SharedBlock(workers * self.count * self.nbytes)
        self.layout = layout
        self._compact = layout.compact()
        self._places: dict[int, tuple[Place, ...]] = {}
        self._number = 0

    @staticmethod
    def possible() -> bool:
        """Return True if this system can share memory with processes of any start method."""
        return sys.platform.startswith("linux")

    def _bytes(self, worker: int, number: int) -> npt.NDArray[np.uint8]:
        assert self.block.buffer is not None
        first = (worker * self.count + number % self.count) * self.nbytes
        return np.frombuffer(self.block.buffer, np.uint8, self.nbytes, first)

    def compact_places(self, count: int) -> tuple[Place, ...]:
        """Return the places of the arrays of a compact batch of ``count`` samples."""
        if count not in self._places:
            shapes = {name: ((count, *shape), dtype) for name, (shape, dtype) in self._compact.items()}
            shapes |= dict.fromkeys(("idx", "sample"), ((count,), np.dtype(np.int64)))
            self._places[count] = _consecutive(shapes)
        return self._places[count]

    def open(self, worker: int, places: tuple[Place, ...]) -> tuple[int, dict[str, npt.NDArray[Any]]]:
        """Return the number of the next slot of a worker, and its memory as arrays. Called in the worker."""
        number, self._number = self._number, self._number + 1
        memory = self._bytes(worker, number)
        # The number is stored beside the batch, so that `take` detects a slot that was overwritten.
        memory[-_ALIGN:].view(np.int64)[0] = number
        return number, {name: _array(memory, dtype, shape, at) for name, dtype, shape, at in places}

    def put(self, worker: int, batch: Mapping[str, torch.Tensor]) -> SlotBatch:
        """Copy a finished batch to the next slot of a worker. Called in the worker."""
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        places = _consecutive({name: (array.shape, array.dtype) for name, array in arrays.items()})
        number, targets = self.open(worker, places)
        for name, array in arrays.items():
            targets[name][...] = array
        return SlotBatch(worker, number, 0, places)

    def take(self, batch: SlotBatch, pin: bool) -> CompactBatch | dict[str, torch.Tensor]:
        """Return a copy of a batch, made in the main process before the next one is requested.

        Raises:
            CellMapError: the worker has written another batch to the slot since.
        """
        memory = self._bytes(batch.worker, batch.number)
        out: dict[str, torch.Tensor] = {}
        for name, dtype, shape, at in batch.places or self.compact_places(batch.samples):
            if pin:
                out[name] = torch.empty(shape, dtype=getattr(torch, dtype.name), device="cpu", pin_memory=True)
            else:
                out[name] = torch.from_numpy(BUFFERS.empty(shape, dtype))
            out[name].numpy()[...] = _array(memory, dtype, shape, at)
        # Read after the copy: a batch that was overwritten meanwhile is noticed too.
        number = int(memory[-_ALIGN:].view(np.int64)[0])
        if number != batch.number:
            raise CellMapError(
                f"worker {batch.worker} wrote batch {number} over batch {batch.number} before it was used; batches "
                "must be taken from the loader's workers in the order of the requests"
            )
        return CompactBatch(out, self.layout) if batch.samples else out

    def close(self) -> None:
        """Release the memory."""
        self.block.close()


def _array(memory: npt.NDArray[np.uint8], dtype: np.dtype[Any], shape: tuple[int, ...], at: int) -> npt.NDArray[Any]:
    return memory[at : at + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def _consecutive(shapes: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> tuple[Place, ...]:
    """Return the places of arrays one after the other, each beginning on a new page."""
    places, at = [], 0
    for name, (shape, dtype) in shapes.items():
        places.append((name, dtype, tuple(shape), at))
        at += math.ceil(math.prod(shape) * dtype.itemsize / _ALIGN) * _ALIGN
    return tuple(places)
