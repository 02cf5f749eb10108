"""Voxels of TIFF pages: mapped into memory if they are not compressed, else decoded tile by tile or strip by strip."""

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import MetadataError, missing_extra
from cellmap_lightning.geometry.grids import touched_cells
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.formats.open_files import OPEN_FILES
from cellmap_lightning.io.formats.tiff_tags import PALETTE, WHITE, check_pages, read_chain
from cellmap_lightning.io.formats.volume import FormatArray


@dataclass(frozen=True)
class Page:
    """The stored tiles or strips of a page.

    Attributes:
        offsets: first byte of each.
        counts: bytes of each; 0 for a sparse tile, which holds zeros.
        tables: tables of JPEG compression, or None.
    """

    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    tables: Any


class _PageErrors(logging.Handler):
    """The errors that tifffile logs about pages that it leaves out, as in files that are cut off."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Collect a message."""
        text = record.getMessage()
        if "page offset" in text:
            self.texts.append(text)


class TiffPages:
    """An open TIFF file, with the pages of all resolutions of its first image read.

    tifffile reads pages on demand and is not thread-safe, so that all are read here.

    Args:
        path: the file.

    Attributes:
        tiff: the file, of tifffile.
        levels: its resolutions, of tifffile.
        pages: the pages of each.
        orientation: the tag Orientation; 1 if the first row is the upper one and the first column the left one.
        thumbnail: the tags of a smaller last page that is no plane of the volume, or None.

    Raises:
        MissingExtraError: tifffile is not installed.
        MetadataError: it is not a TIFF file, is cut off, is one of several files of a volume, lacks planes that its
            metadata declare, holds several images, or its pages are not stored alike.
    """

    def __init__(self, path: str) -> None:
        try:
            import tifffile
        except ImportError:
            raise missing_extra("tiff", f"{path}: TIFF files need tifffile") from None
        log, errors = logging.getLogger("tifffile"), _PageErrors()
        log.addHandler(errors)
        self.tiff: Any = None
        try:
            self.tiff = _opened(path)
            series = self.tiff.series
            _check_interpretation(path, series[0].keyframe)
            self.levels = series[0].levels
            self.pages = [_stored(path, [self._page(path, page) for page in level.pages]) for level in self.levels]
            if errors.texts:
                raise ValueError(errors.texts[0])
            chain = read_chain(self.tiff)
            self.orientation = chain[0].values["Orientation"] if chain else 1
            self.thumbnail = check_pages(path, self.tiff, series, chain)
        except (tifffile.TiffFileError, ValueError, OSError, IndexError, KeyError, TypeError) as e:
            self.close()
            if isinstance(e, MetadataError):
                raise
            raise MetadataError(f"{path}: not a whole TIFF file ({e}); copy or write it again") from e
        finally:
            log.removeHandler(errors)

    @property
    def is_white(self) -> bool:
        """Whether the pages mark 0 as white, so that viewers show them inverted."""
        return bool(self.levels[0].keyframe.photometric == WHITE)

    def _page(self, path: str, page: Any) -> Page | None:
        if page is None:
            return None
        if page.parent is not self.tiff:
            raise MetadataError(f"{path}: its pages are spread over several files; store them in one file")
        return Page(tuple(page.dataoffsets), tuple(page.databytecounts), getattr(page, "jpegtables", None))

    def close(self) -> None:
        """Close the file."""
        if self.tiff is not None:
            self.tiff.close()

    def read_into(self, level: int, number: int, start: Sequence[int], out: AnyArray) -> None:
        """Write a part of a page to ``out``, decoding the tiles or strips that hold it.

        Args:
            level: the resolution.
            number: the page.
            start: first row and column.
            out: ``[y, x]``.
        """
        page, keyframe = self.pages[level][number], self.levels[level].keyframe
        chunk, columns = keyframe.chunks[:2], keyframe.chunked[1]
        descriptor = self.tiff.filehandle.fileno()
        for place in itertools.product(*touched_cells(start, out.shape, chunk)):
            index = place[0] * columns + place[1]
            count = page.counts[index]
            data = os.pread(descriptor, count, page.offsets[index])  # thread-safe, since it has no shared position
            if len(data) < count:
                raise EOFError(f"page {number} ends after {len(data)} of {count} bytes")
            tile = keyframe.decode(data, index, jpegtables=page.tables)[0] if count else None
            if tile is not None:
                _copy(tile.reshape(tile.shape[-3:-1]), np.multiply(place, chunk), start, out)


def _opened(path: str) -> Any:
    """Return a file, of tifffile.

    Pages that a program wrote one by one with tifffile are as many images for it; where these are alike, they are the
    planes of a stack.
    """
    import tifffile

    tiff = tifffile.TiffFile(path)
    try:
        series = tiff.series
    except RuntimeError as e:
        chain = read_chain(tiff)
        tiff.close()
        for tags in chain[1:]:
            tags.check_like(path, chain[0])
        raise ValueError(e) from e
    kinds = {(one.kind, one.shape, one.dtype) for one in series}
    if len(series) == 1 or len(kinds) > 1 or series[0].kind != "shaped" or len(series[0].shape) != 2:
        return tiff
    tiff.close()
    return tifffile.TiffFile(path, is_shaped=False)


def _check_interpretation(path: str, first: Any) -> None:
    """Check that the values of the pages are gray values, of one interpretation.

    Raises:
        MetadataError: they are indices of colours, or are stored in tiles of several planes.
    """
    if first.photometric == PALETTE:
        raise MetadataError(f"{path}: has colours (a palette); store it in gray values of 8 or 16 bits")
    if first.is_tiled and first.tiledepth > 1:
        raise MetadataError(
            f"{path}: has tiles of {first.tiledepth} planes (TileDepth), which cannot be read; store each section as a "
            "page, or convert it to Zarr or HDF5"
        )


def _copy(tile: AnyArray, corner: npt.ArrayLike, start: npt.ArrayLike, out: AnyArray) -> None:
    """Copy the part of a tile that lies in ``out``; corner and start are their first row and column."""
    low = np.maximum(corner, start)
    high = np.minimum(np.add(corner, tile.shape), np.add(start, out.shape))
    inside, outside = ((low - first, high - first) for first in (corner, start))
    (y0, x0), (y1, x1) = inside
    (top, left), (bottom, right) = outside
    out[top:bottom, left:right] = tile[y0:y1, x0:x1]


class TiffArray(FormatArray):
    """The voxels of one resolution of a TIFF file; the last two axes are y and x.

    Args:
        path: the file.
        tiff: the same, open.
        number: the resolution.

    Raises:
        MetadataError: the file is shorter than its pages declare.
    """

    def __init__(self, path: Path, tiff: TiffPages, number: int = 0) -> None:
        series = tiff.levels[number]
        keyframe = series.keyframe
        #: First byte of voxels without compression; None where pages are decoded.
        self.offset: int | None = series.dataoffset
        self.number = number
        self.stored = np.dtype(keyframe.parent.byteorder + series.dtype.char)
        tile = [min(c, n) for c, n in zip(keyframe.chunks[:2], series.shape[-2:], strict=True)]
        super().__init__(
            path / str(number) if number else path, series.shape, series.dtype,
            (*[1] * (len(series.shape) - 2), *tile) if self.offset is None else None, container=path,
            codec="none" if self.offset is not None else str(getattr(keyframe.compression, "name", "")).lower(),
            details=(number, self.offset, str(self.stored)),
        )  # fmt: skip
        pages = [page for page in tiff.pages[number] if page is not None]
        end = max((o + n for page in pages for o, n in zip(page.offsets, page.counts, strict=True)), default=0)
        if self.offset is not None:
            end = max(end, self.offset + series.nbytes)
        size = path.stat().st_size
        if end > size:
            raise MetadataError(f"{path}: is cut off: its pages end at byte {end}, the file at {size}; copy it again")

    def read(self, start: Sequence[int], shape: Sequence[int]) -> AnyArray:
        """Return the voxels of a box, along the stored axes."""
        box = tuple(slice(first, first + count) for first, count in zip(start, shape, strict=True))
        path = str(self.container)
        if self.offset is not None:
            mapped: np.memmap[Any, Any] = np.memmap(path, self.stored, "r", self.offset, self.shape)
            return np.array(mapped[box])
        out = np.zeros(tuple(shape), self.dtype)
        numbers = np.arange(int(np.prod(self.shape[:-2]))).reshape(self.shape[:-2])[box[:-2]]
        with OPEN_FILES.use(TiffPages, path) as tiff:
            for number, plane in zip(numbers.ravel().tolist(), out.reshape(-1, *out.shape[-2:]), strict=True):
                tiff.read_into(self.number, number, start[-2:], plane)
        return out


def _stored(path: str, pages: Sequence[Page | None]) -> list[Page]:
    """Return the pages of a level after a check that all planes that the metadata declare are stored.

    Raises:
        MetadataError: some are not, as in one file of a set of OME-TIFF files.
    """
    absent = [number for number, page in enumerate(pages) if page is None]
    if absent:
        raise MetadataError(
            f"{path}: {len(absent)} of the {len(pages)} planes that its metadata declare are not stored in it, the "
            f"first is plane {absent[0]}, counted from 0; was it cut, or is it one of several files? Write the whole "
            "volume as one file"
        )
    return [page for page in pages if page is not None]
