"""A memory pool for batches on the CPU: the memory of a released batch is reused for the next one of its size.

Newly allocated memory is zeroed by the system page by page when it is first touched, which costs as much as writing the
batch. A block returns to the pool once nothing refers to it: no tensor, no view of one, no NumPy array.
"""

import ctypes
import math
import os
import weakref
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

#: Idle blocks of one size in the pool at most: that of the batch before this one, and of one ahead of it.
MOST_IDLE = 2
#: Bytes below which an array is allocated as usual.
SMALL = 1 << 18


class Buffers:
    """A pool of reusable memory blocks; thread-safe.

    Example:
        >>> BUFFERS.empty((2, 1, 64, 64, 64), "float32").shape
        (2, 1, 64, 64, 64)
    """

    def __init__(self) -> None:
        self._idle: dict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return a C-contiguous array of uninitialized values."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < SMALL:
            return np.empty(shape, dtype)
        try:
            block = self._idle[nbytes].pop()
        except IndexError:
            block = np.empty(nbytes, np.uint8)
        # Every view of the memory refers to this object, so its finalizer runs when the last view is gone.
        holder = (ctypes.c_uint8 * nbytes).from_address(block.ctypes.data)
        weakref.finalize(holder, self._return_block, block, os.getpid()).atexit = False
        return np.frombuffer(memoryview(holder), dtype).reshape(shape)

    def _return_block(self, block: npt.NDArray[np.uint8], pid: int) -> None:
        # A finalizer may interrupt any code of any thread, also code that holds a lock, so none is taken here. The
        # list methods are atomic.
        idle = self._idle[len(block)]
        if len(idle) < MOST_IDLE and pid == os.getpid():
            idle.append(block)

    def clear(self) -> None:
        """Release all idle blocks."""
        self._idle.clear()


#: The pool of this process.
BUFFERS = Buffers()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=BUFFERS.clear)  # writing to the parent's pages would copy them
