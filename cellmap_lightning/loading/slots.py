"""Batches from worker processes: written to slots of shared memory that are made once, so that only numbers travel.

The stock way makes a new shared file for every tensor of every batch, whose pages cost more than reading the batch. A
worker has as many slots as batches of its can be under way: ``prefetch_factor`` that it was asked for, the one that was
asked for when the last one was taken, and the one that is being copied out.
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
    """What travels: where a batch lies.

    Attributes:
        worker: whose slot.
        turn: how many batches the worker wrote before.
        samples: of a compact batch; 0 for a finished one.
        places: where the arrays of a finished batch are.
    """

    worker: int
    turn: int
    samples: int
    places: tuple[Place, ...] = ()


class Slots:
    """The slots of the worker processes of one loader.

    Args:
        layout: the layout of the batches.
        batch_size: samples of a batch at most.
        workers: worker processes.
        prefetch_factor: batches that a worker is asked for ahead.
        finished: workers finish their batches.
    """

    def __init__(
        self, layout: BatchLayout, batch_size: int, workers: int, prefetch_factor: int, finished: bool
    ) -> None:
        self.finished = finished
        self.count = prefetch_factor + 2
        memory = layout.memory(batch_size)
        bytes_of = memory.arrays if finished else memory.compact.arrays
        # The arrays, the numbers of the samples and positions, and the batch's own number, each on pages of its own.
        sizes = [*bytes_of.values(), 8 * batch_size, 8 * batch_size, 8]
        self.nbytes = sum(math.ceil(size / _ALIGN) * _ALIGN for size in sizes)
        self.block = SharedBlock(workers * self.count * self.nbytes)
        self.layout = layout
        self._compact = layout.compact()
        self._places: dict[int, tuple[Place, ...]] = {}
        self._turn = 0

    @staticmethod
    def possible() -> bool:
        """Whether this system shares memory with processes however they are started."""
        return sys.platform.startswith("linux")

    def _bytes(self, worker: int, turn: int) -> npt.NDArray[np.uint8]:
        assert self.block.buffer is not None
        first = (worker * self.count + turn % self.count) * self.nbytes
        return np.frombuffer(self.block.buffer, np.uint8, self.nbytes, first)

    def compact_places(self, count: int) -> tuple[Place, ...]:
        """Where the arrays of a compact batch of so many samples are."""
        if count not in self._places:
            shapes = {name: ((count, *shape), dtype) for name, (shape, dtype) in self._compact.items()}
            shapes |= dict.fromkeys(("idx", "sample"), ((count,), np.dtype(np.int64)))
            self._places[count] = _laid_out(shapes)
        return self._places[count]

    def open(self, worker: int, places: tuple[Place, ...]) -> tuple[int, dict[str, npt.NDArray[Any]]]:
        """The next slot of a worker, in the worker: its number, and its memory as arrays."""
        turn, self._turn = self._turn, self._turn + 1
        memory = self._bytes(worker, turn)
        memory[-_ALIGN:].view(np.int64)[0] = turn
        return turn, {name: _array(memory, dtype, shape, at) for name, dtype, shape, at in places}

    def put(self, worker: int, batch: Mapping[str, torch.Tensor]) -> SlotBatch:
        """Copy a finished batch to the next slot of a worker, in the worker."""
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        places = _laid_out({name: (array.shape, array.dtype) for name, array in arrays.items()})
        turn, targets = self.open(worker, places)
        for name, array in arrays.items():
            targets[name][...] = array
        return SlotBatch(worker, turn, 0, places)

    def take(self, batch: SlotBatch, pin: bool) -> CompactBatch | dict[str, torch.Tensor]:
        """Copy a batch out of its slot, in the main process, before the next one is asked for.

        Raises:
            CellMapError: the worker has written another batch there since.
        """
        memory = self._bytes(batch.worker, batch.turn)
        out: dict[str, torch.Tensor] = {}
        for name, dtype, shape, at in batch.places or self.compact_places(batch.samples):
            if pin:
                out[name] = torch.empty(shape, dtype=getattr(torch, dtype.name), device="cpu", pin_memory=True)
            else:
                out[name] = torch.from_numpy(BUFFERS.empty(shape, dtype))
            out[name].numpy()[...] = _array(memory, dtype, shape, at)
        number = int(memory[-_ALIGN:].view(np.int64)[0])
        if number != batch.turn:
            raise CellMapError(
                f"worker {batch.worker} wrote batch {number} over batch {batch.turn} before it was used; this happens "
                "only if batches are taken from the loader's workers in another order than they were asked for"
            )
        return CompactBatch(out, self.layout) if batch.samples else out

    def close(self) -> None:
        """Give the memory back."""
        self.block.close()


def _array(memory: npt.NDArray[np.uint8], dtype: np.dtype[Any], shape: tuple[int, ...], at: int) -> npt.NDArray[Any]:
    return memory[at : at + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def _laid_out(shapes: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> tuple[Place, ...]:
    """The arrays one after the other, each on pages of its own."""
    places, at = [], 0
    for name, (shape, dtype) in shapes.items():
        places.append((name, dtype, tuple(shape), at))
        at += math.ceil(math.prod(shape) * dtype.itemsize / _ALIGN) * _ALIGN
    return tuple(places)
