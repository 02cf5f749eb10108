"""Memory for batches on the CPU: what a batch that is gone leaves behind is used for the next one of its size.

Memory that a process asks the system for has to be zeroed page by page when it is first touched, which costs as much as
writing the batch. A block comes back when nothing refers to it any more: no tensor, no view of one, no NumPy array.
"""

import ctypes
import math
import os
from collections import defaultdict, deque
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.weak import at_end

#: Blocks of one size that wait to be used again: the batch before this one, and one ahead of it.
WAITING = 2
#: Bytes below which a block is cheap to make.
SMALL = 1 << 18


class Buffers:
    """Blocks of memory that are used again."""

    def __init__(self) -> None:
        # A deque that is full drops its oldest block. Blocks come back at any time and anywhere, so no lock is held.
        self._waiting: dict[int, deque[npt.NDArray[np.uint8]]] = defaultdict(partial(deque, maxlen=WAITING))

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array whose values are not set, C-contiguous."""
        kind = np.dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        if nbytes < SMALL:
            return np.empty(shape, kind)
        try:
            block = self._waiting[nbytes].pop()
        except IndexError:
            block = np.empty(nbytes, np.uint8)
        # Everything that looks into the memory holds on to this object, and nothing else does.
        holder = (ctypes.c_uint8 * nbytes).from_address(block.ctypes.data)
        at_end(holder, self._waiting[nbytes].append, block)
        return np.frombuffer(memoryview(holder), kind).reshape(shape)

    def clear(self) -> None:
        """Give back to the system what waits."""
        self._waiting.clear()


#: The blocks of this process.
BUFFERS = Buffers()

if hasattr(os, "register_at_fork"):
    # To write to the parent's blocks would copy them first; those of its batches come back to what is dropped here.
    os.register_at_fork(after_in_child=BUFFERS.clear)
