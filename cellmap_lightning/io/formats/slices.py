"""Folders with one TIFF or PNG file per section, in the order of the numbers in their names."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.errors import CellMapError, MetadataError, missing_extra
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.formats.open_files import OPEN_FILES
from cellmap_lightning.io.formats.tiff_notes import page_notes
from cellmap_lightning.io.formats.tiff_pages import TiffArray, TiffPages
from cellmap_lightning.io.formats.volume import FormatArray, FormatLevel, FormatVolume
from cellmap_lightning.io.ngff import Note
from cellmap_lightning.io.store import StorePath
from cellmap_lightning.validation import first_few

#: Suffixes of the files of a folder, which has files of one suffix.
SUFFIXES = (".tif", ".tiff", ".png")
#: Files and folders of Windows, macOS and network drives that are ignored, in lower case; so are hidden ones.
_OF_SYSTEMS = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "__macosx", "$recycle.bin", "lost+found"}


class SlicesFormat:
    """Folders of TIFF or PNG files, each a section of the volume."""

    name = "folder of slices"
    suffixes: tuple[str, ...] = ()

    def matches(self, path: StorePath) -> bool:
        """Return whether a location is a folder with two slices or more, and nothing else that is not of the system."""
        return isinstance(path, Path) and path.is_dir() and len(_files(path)) > 1

    def open(self, path: StorePath) -> FormatVolume:
        """Read the header of each slice.

        Raises:
            MissingExtraError: tifffile or Pillow is not installed.
            MetadataError: slices differ in size or type, are colour images, or a number is missing.
        """
        assert isinstance(path, Path)
        files = _files(path)
        _check_numbers(path, files)
        first = _header(path / files[0])
        for name in files[1:]:
            other = _header(path / name)
            if str(other) != str(first):
                raise MetadataError(
                    f"{path / name}: has {other}, and {files[0]} has {first}; all slices of a volume have one size, "
                    "type, meaning of 0 and orientation: move what is no slice elsewhere, or write it again"
                )
        shape, codec = first.shape, _suffix(files[0])[1:]
        array = _SlicesArray(path, (len(files), *shape), first.dtype, (1, *shape), details=files, codec=codec)
        array.names = files
        return FormatVolume((FormatLevel(path.name, array),), has_voxel_size=False, notes=first.notes)

    def children(self, path: StorePath) -> list[str]:
        """Return no names: a folder holds one volume."""
        return []


class _SlicesArray(FormatArray):
    """The slices of a folder, each a file of the chunk grid."""

    names: tuple[str, ...] = ()

    @property
    def metadata(self) -> StorePath:
        return self.path / self.names[0]

    def key(self, index: Sequence[int]) -> str:
        return self.names[index[0]]

    def file(self, index: Sequence[int]) -> str:
        return f"{self.path}/{self.names[index[0]]}"

    def read(self, start: Sequence[int], shape: Sequence[int]) -> AnyArray:
        out = np.empty(tuple(shape), self.dtype)
        for number, plane in enumerate(out):
            file = Path(self.file((start[0] + number,)))
            try:
                self._read_slice(file, start[1:], plane)
            except CellMapError:
                raise
            except Exception as e:  # codecs raise any type
                e.add_note(f"in {file}")  # of thousands of slices
                raise
        return out

    def _read_slice(self, file: Path, start: Sequence[int], plane: AnyArray) -> None:
        """Write a part of a slice to ``plane``."""
        if _suffix(file.name) == ".png":
            y, x = (slice(first, first + count) for first, count in zip(start, plane.shape, strict=True))
            plane[...] = _pixels(file, self.shape[1:], self.dtype)[y, x]
        else:
            with OPEN_FILES.use(TiffPages, str(file)) as tiff:
                tiff.read_into(0, 0, start, plane)


def _files(folder: Path) -> tuple[str, ...]:
    """Return the names of the slices of a folder in the order of their numbers; empty if it holds other files too."""
    names = _entries(folder)
    kinds = {_suffix(name) for name in names}
    if len(kinds) != 1 or not kinds <= set(SUFFIXES):
        return ()
    return tuple(sorted(names, key=_natural))


def _entries(folder: Path) -> list[str]:
    """Return the names in a folder, without hidden ones and those of operating systems."""
    names = [entry.name for entry in folder.iterdir()]
    return [name for name in names if not name.startswith(".") and name.lower() not in _OF_SYSTEMS]


def stray_entries(folder: Path) -> str:
    """Return a sentence on what a folder holds beside slices; empty if it holds less than two slices, or little else.

    Args:
        folder: a folder that is not a folder of slices.
    """
    try:
        names = sorted(_entries(folder), key=_natural)
    except OSError:
        return ""
    counts = Counter(suffix for name in names if (suffix := _suffix(name)) in SUFFIXES)
    if not counts:
        return ""
    suffix, count = counts.most_common(1)[0]
    others = [name for name in names if _suffix(name) != suffix]
    numbered = all(re.search(r"\d", Path(name).stem) for name in names if _suffix(name) == suffix)
    if count < 2 or count <= len(others) or not numbered:
        return ""
    return (
        f"holds {count} slices ({suffix}) and beside them {first_few(others)}: a folder of slices has files of one "
        "suffix and nothing else; move what is no slice elsewhere, or give slices one suffix"
    )


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key for sorting by the numbers in names, in which s9 comes before s10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _check_numbers(folder: Path, files: Sequence[str]) -> None:
    """Check that the last numbers in the names follow each other.

    Raises:
        MetadataError: a number is missing or repeated.
    """
    numbers = [int(found[-1]) for name in files if (found := re.findall(r"\d+", Path(name).stem))]
    if len(numbers) != len(files):
        bare = [name for name in files if not re.search(r"\d", Path(name).stem)]
        raise MetadataError(
            f"{folder}: slices need a number in their names, and {first_few(bare)} "
            f"{'has' if len(bare) == 1 else 'have'} none; move what is no slice elsewhere, or rename it"
        )
    for (first, second), (one, other) in zip(itertools.pairwise(numbers), itertools.pairwise(files), strict=True):
        if second != first + 1:
            raise MetadataError(
                f"{folder}: {other} follows {one}, so that slices are missing between them or their numbers are not in "
                "the order of the sections; add or rename them, or move what is no slice elsewhere"
            )


@dataclass(frozen=True)
class _Header:
    """The header of a slice.

    Attributes:
        shape: rows and columns.
        dtype: type of its gray values.
        is_white: whether its 0 is marked as white.
        orientation: the tag Orientation of TIFF.
        notes: assumptions about it.
    """

    shape: tuple[int, int]
    dtype: str
    is_white: bool = False
    orientation: int = 1
    notes: tuple[Note, ...] = ()

    def __str__(self) -> str:
        text = f"{self.shape[0]} x {self.shape[1]} pixels of {self.dtype}"
        text += " in which 0 is white" if self.is_white else ""
        return text + (f" with Orientation {self.orientation}" if self.orientation != 1 else "")


def _header(file: Path) -> _Header:
    """Return the header of a slice.

    Raises:
        MetadataError: it cannot be read, is cut off, or is a colour image.
    """
    if _suffix(file.name) == ".png":
        return _png_header(file)
    tiff = TiffPages(str(file))  # not shared: thousands of slices would displace each other
    try:
        series = tiff.levels[0]
        if len(series.shape) != 2:
            raise MetadataError(f"{file}: should be one gray page, has shape {list(series.shape)} ({series.axes})")
        TiffArray(file, tiff)  # which compares the size of the file with its tags
        y, x = series.shape
        return _Header((int(y), int(x)), str(series.dtype), tiff.is_white, tiff.orientation, page_notes(tiff))
    finally:
        tiff.close()


#: Types of the pixels of PNG files, by Pillow's modes.
_MODES = {"L": "uint8", "I;16": "uint16", "I;16B": "uint16", "I": "uint16", "1": "uint8"}


def _png_header(file: Path) -> _Header:
    _check_png_end(file)
    with _png(file) as image:
        if image.mode not in _MODES:
            raise MetadataError(f"{file}: has colours (mode {image.mode}); store it in gray values of 8 or 16 bits")
        return _Header((image.height, image.width), _MODES[image.mode])


#: The last chunk of a PNG file: its length of 0, its name and its checksum.
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def _check_png_end(file: Path) -> None:
    """Check that a PNG file is not cut off, by its last bytes, and where others follow them by its chunks.

    Raises:
        MetadataError: it is.
    """
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - len(_PNG_END)))
        if stream.read() == _PNG_END:
            return
        place = 8  # the signature
        while place + 8 <= size:
            stream.seek(place)
            head = stream.read(8)
            place += 12 + int.from_bytes(head[:4], "big")
            if head[4:] == b"IEND":
                break
        else:
            place = size + 1
        if place > size:
            raise MetadataError(f"{file}: is cut off after {size} bytes, or no PNG file; copy or write it again")


def _pixels(file: Path, shape: Sequence[int], dtype: "np.dtype[Any]") -> AnyArray:
    """Return the gray values of a PNG file.

    Raises:
        MetadataError: its size or type has changed since the folder was opened.
    """
    with _png(file) as image:
        values = np.asarray(image)
    if values.shape != tuple(shape):
        raise MetadataError(f"{file}: has {list(values.shape)} pixels, had {list(shape)} when the folder was opened")
    return values.astype(dtype)


def _png(file: Path) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise missing_extra("png", f"{file}: PNG files need Pillow") from None
    try:
        return Image.open(file, formats=["PNG"])
    except (UnidentifiedImageError, OSError) as e:
        raise MetadataError(f"{file}: not a whole PNG file ({e}); copy or write it again") from e
