"""Intermediate files of a segmentation: arrays of one block, written atomically and compressed."""

import io
import os
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import OutputError

Arrays = dict[str, npt.NDArray[Any]]
#: Labels consist of long runs, for which the fastest level compresses about as much as others.
_CODEC = numcodecs.Blosc("zstd", clevel=1, shuffle=numcodecs.Blosc.SHUFFLE)


class BlockFiles:
    """The files of one kind, such as ``labels``, one for each block.

    Args:
        folder: folder of the journal, which is removed at the end.
        kind: beginning of their names.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind

    def path(self, number: int) -> Path:
        """Return the file of a block."""
        return self.folder / f"{self.kind}-{number:010d}.npz"

    def write(self, number: int, arrays: Arrays) -> str:
        """Write the arrays of a block atomically; return the file, which is not flushed to the disk yet."""
        stored: Arrays = {}
        for name, array in arrays.items():
            flat = np.ascontiguousarray(array).reshape(-1)
            stored[name] = np.frombuffer(_CODEC.encode(flat) if array.size else b"", np.uint8)
            stored[f"{name}.shape"] = np.array(array.shape, np.int64)
            stored[f"{name}.dtype"] = np.array(array.dtype.str)
        content = io.BytesIO()
        np.savez(content, **stored)  # type: ignore[arg-type]
        path = self.path(number)
        draft = path.with_name(f"{path.name}.{os.getpid()}")  # another process may repeat the step
        draft.write_bytes(content.getvalue())
        draft.replace(path)
        return str(path)

    def read(self, number: int, *names: str) -> Arrays:
        """Return arrays of a block, all if no names are given.

        Raises:
            OutputError: the file was removed or damaged.
        """
        try:
            with np.load(self.path(number), allow_pickle=False) as stored:
                wanted = names or tuple(name for name in stored.files if "." not in name)
                return {name: _decoded(stored, name) for name in wanted}
        except Exception as e:  # zip files and codecs raise any type
            raise OutputError(f"{self.path(number)} cannot be read ({e}); start over with overwrite=True") from e


def _decoded(stored: Any, name: str) -> npt.NDArray[Any]:
    shape, dtype = tuple(stored[f"{name}.shape"].tolist()), np.dtype(str(stored[f"{name}.dtype"]))
    if 0 in shape:
        return np.empty(shape, dtype)
    array = np.empty(shape, dtype)
    _CODEC.decode(stored[name].tobytes(), out=array)
    return array
