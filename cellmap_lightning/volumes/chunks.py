"""The one way to a chunk: whatever is read from a store is read, decoded and checked here."""

import os
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from cellmap_lightning.errors import CellMapError, ChunkError
from cellmap_lightning.volumes.geometry import Shape
from cellmap_lightning.volumes.ngff import Level
from cellmap_lightning.volumes.resample import AnyArray


class ChunkReader:
    """Reads boxes of one stored array, in the order z, y, x.

    The array is opened by zarr-python at the first read, once per process: a reader that was pickled or forked opens it
    anew. Any number of threads may read at a time.

    Args:
        level: the array.
        label: what error messages call it, such as ``crop12/mito``.
    """

    def __init__(self, level: Level, label: str = "") -> None:
        info = level.array
        self.level = level
        self.label = label
        self.shape: Shape = level.zyx(info.shape)
        self.chunks: Shape = level.zyx(info.chunks)
        # Booleans are read as the 0 and 1 that they stand for.
        self.dtype: np.dtype[Any] = np.dtype(np.uint8) if info.dtype == np.bool_ else info.dtype
        self._opened: tuple[int, zarr.Array[Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"level": self.level, "label": self.label}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _open(self) -> "zarr.Array[Any]":
        # Two threads may both open it at the same time: the one that is kept is as good as the other, and a lock held
        # while a fork happens would stay locked in the child. Process and array are one value, so that no thread sees
        # the array of one process with the number of another.
        opened, pid = self._opened, os.getpid()
        if opened is None or opened[0] != pid:
            info = self.level.array
            store = LocalStore(info.path, read_only=True)
            opened = pid, zarr.open_array(store, mode="r", zarr_format=3 if info.zarr_format == 3 else 2)
            self._opened = opened
        return opened[1]

    def read(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        """The decoded voxels of a box inside the array, in native byte order.

        Raises:
            ChunkError: the store or the codec failed; the message names the array and the box.
        """
        level = self.level
        box: list[slice | int] = [0] * level.ndim
        for axis, first, count in zip(level.axes, start, shape, strict=True):
            box[axis] = slice(first, first + count)
        try:
            stored = np.asarray(self._open()[tuple(box)])
        except CellMapError:
            raise
        except Exception as e:  # codecs and stores raise whatever they like
            where = ", ".join(f"{a}[{o}:{o + n}]" for a, o, n in zip("zyx", start, shape, strict=True))
            name = f"{self.label}: " if self.label else ""
            raise ChunkError(f"{name}{level.path}: voxels {where} could not be read: {type(e).__name__}: {e}") from e
        kept = sorted(level.axes)
        out = stored.transpose([kept.index(a) for a in level.axes])
        return np.ascontiguousarray(out, dtype=self.dtype)
