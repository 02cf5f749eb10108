"""MRC files (``.mrc``, ``.rec``, ``.map``), mapped into memory.

Format: https://www.ccpem.ac.uk/mrc-format/mrc2014/; lengths in it are in Angstrom. Bytes (mode 0) are signed, but
unsigned in files of IMOD that do not mark them as signed: https://bio3d.colorado.edu/imod/doc/mrc_format.txt.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError, missing_extra
from cellmap_lightning.geometry.lattice import to_vector
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.formats.open_files import OPEN_FILES
from cellmap_lightning.io.formats.volume import FormatArray, FormatLevel, FormatVolume
from cellmap_lightning.io.store import StorePath

#: IMOD's mark, at byte 152, before its flags, of which bit 0 means signed bytes; and their place in mrcfile's header.
_IMOD, _SIGNED, _MARK = 1146047817, 1, slice(40, 48)
_AXES = {1: "x", 2: "y", 3: "z"}


class MrcFormat:
    """MRC files of electron microscopes and of IMOD."""

    name = "MRC"
    suffixes = (".mrc", ".rec", ".map")

    def matches(self, path: StorePath) -> bool:
        """Return whether a location is an MRC file."""
        return isinstance(path, Path) and path.suffix in self.suffixes and path.is_file()

    def open(self, path: StorePath) -> FormatVolume:
        """Read the header of a file.

        Raises:
            MissingExtraError: mrcfile is not installed.
            MetadataError: it is not an MRC file, or is shorter than its header declares.
        """
        with OPEN_FILES.use(_opened, str(path)) as file:
            header, size = file.header, file.voxel_size
            if file.data is None or file.data.ndim != 3:
                raise MetadataError(f"{path}: should hold one volume, holds {getattr(file.data, 'shape', None)}")
            axes = "".join(_AXES.get(int(header[name]), "?") for name in ("maps", "mapr", "mapc"))
            array = _MrcArray(path, file.data.shape, np.uint8 if _is_unsigned(file) else file.data.dtype)
            # The header has 0 for all lengths where the program that wrote it knew none.
            scale = to_vector(np.array([float(size[axis]) for axis in "zyx"]) / 10)
            origin = np.array([float(header.origin[axis]) for axis in "zyx"]) / 10
            starts = {axis: int(header[f"n{axis}start"]) for axis in "zyx"}
        if not origin.any():
            origin = np.array([starts[axis] for axis in "zyx"]) * scale
        known = min(scale) > 0
        level = FormatLevel(path.name, array, axes, scale if known else (1.0, 1.0, 1.0), to_vector(origin))
        return FormatVolume((level,), known)

    def children(self, path: StorePath) -> list[str]:
        """Return no names: a file holds one array."""
        return []


class _MrcArray(FormatArray):
    def read(self, start: Sequence[int], shape: Sequence[int]) -> AnyArray:
        box = tuple(slice(first, first + count) for first, count in zip(start, shape, strict=True))
        with OPEN_FILES.use(_opened, str(self.container)) as file:
            return np.array(file.data[box]).view(self.dtype) if self.dtype == np.uint8 else np.array(file.data[box])


def _is_unsigned(file: Any) -> bool:
    """Return whether bytes that MRC defines as signed are unsigned, as IMOD writes them."""
    if file.data.dtype != np.int8:
        return False
    order = file.header.dtype["mode"].byteorder
    stamp, flags = np.frombuffer(file.header.extra2.tobytes()[_MARK], np.dtype("i4").newbyteorder(order)).tolist()
    return bool(stamp == _IMOD and not flags & _SIGNED)


def _opened(path: str) -> Any:
    try:
        import mrcfile
    except ImportError:
        raise missing_extra("mrc", f"{path}: MRC files need mrcfile") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # such as a header that does not fit the file
            return mrcfile.mmap(path, mode="r")
    except (ValueError, OSError, RuntimeWarning) as e:
        raise MetadataError(f"{path}: not a whole MRC file ({e}); copy or write it again") from e
