"""NumPy files (``.npy``), mapped into memory.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.formats.open_files import OPEN_FILES
from cellmap_lightning.io.formats.volume import FormatArray, FormatLevel, FormatVolume
from cellmap_lightning.io.store import StorePath


class NpyFormat:
    """NumPy files of three axes or more; the last three are z, y and x."""

    name = "npy"
    suffixes = (".npy",)

    def matches(self, path: StorePath) -> bool:
        """Return whether a location is a NumPy file."""
        return isinstance(path, Path) and path.suffix in self.suffixes and path.is_file()

    def open(self, path: StorePath) -> FormatVolume:
        """Read the header of a file.

        Raises:
            MetadataError: it is not a NumPy file of numbers, or is shorter than its header declares.
        """
        try:
            with OPEN_FILES.use(_mapped, str(path)) as voxels:
                array = _NpyArray(path, voxels.shape, voxels.dtype)
        except (ValueError, OSError, EOFError, SyntaxError) as e:
            if isinstance(e, MetadataError):
                raise
            raise MetadataError(f"{path}: not a whole NumPy file of numbers ({e}); write it again") from e
        return FormatVolume((FormatLevel(path.name, array),), has_voxel_size=False)

    def children(self, path: StorePath) -> list[str]:
        """Return no names: a file holds one array."""
        return []


class _NpyArray(FormatArray):
    def read(self, start: Sequence[int], shape: Sequence[int]) -> AnyArray:
        box = tuple(slice(first, first + count) for first, count in zip(start, shape, strict=True))
        with OPEN_FILES.use(_mapped, str(self.container)) as voxels:
            return np.array(voxels[box])


def _mapped(path: str) -> Any:
    return np.load(path, mmap_mode="r", allow_pickle=False)
