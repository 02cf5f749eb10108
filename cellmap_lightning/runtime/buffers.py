"""Memory for batches on the CPU: what a batch that is gone leaves behind is used for the next one of its size.

Memory that a process asks the system for has to be zeroed page by page when it is first touched, which costs as much as
writing the batch. A block comes back when nothing refers to it any more: no tensor, no view of one, no NumPy array.
"""

import ctypes
import math
import os
import weakref
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

#: Blocks of one size that wait to be used again: the batch before this one, and one ahead of it.
WAITING = 2
#: Bytes below which a block is cheap to make.
SMALL = 1 << 18


class Buffers:
    """Blocks of memory that are used again."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)

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
        weakref.finalize(holder, self._back, block, os.getpid()).atexit = False
        return np.frombuffer(memoryview(holder), kind).reshape(shape)

    def _back(self, block: npt.NDArray[np.uint8], pid: int) -> None:
        # May run anywhere and at any time, so that no lock is held here: lists need none.
        waiting = self._waiting[len(block)]
        if len(waiting) < WAITING and pid == os.getpid():
            waiting.append(block)

    def clear(self) -> None:
        """Give back to the system what waits."""
        self._waiting.clear()


#: The blocks of this process.
BUFFERS = Buffers()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=BUFFERS.clear)  # to write to the parent's would copy them first
