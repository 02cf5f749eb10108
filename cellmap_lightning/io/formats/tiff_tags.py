"""Tags of TIFF pages on which the meaning of their bytes depends, compared between the pages of a file.

tifffile decodes all pages of a series with the tags of its first one, and compares them with a few others at most.
"""

import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cellmap_lightning.errors import MetadataError

#: Photometric interpretations of TIFF: 0 is white, and indices of a table of colours.
WHITE, PALETTE = 0, 3
#: Names of the tags that all pages of a volume have alike, and the values that they have where they are not stored.
_TAGS: dict[int, tuple[str, int]] = {
    256: ("ImageWidth", 0), 257: ("ImageLength", 0), 258: ("BitsPerSample", 1), 259: ("Compression", 1),
    262: ("PhotometricInterpretation", 1), 266: ("FillOrder", 1), 274: ("Orientation", 1),
    277: ("SamplesPerPixel", 1), 278: ("RowsPerStrip", 0), 317: ("Predictor", 1), 322: ("TileWidth", 0),
    323: ("TileLength", 0), 339: ("SampleFormat", 1),
}  # fmt: skip
#: Tags that mark pages of reduced resolution and masks (the first two bits of the one, 2 of the other).
_SUBFILE, _OLD_SUBFILE = 254, 255
#: Tags of a page at most, as in tifffile.
_MOST_TAGS = 4096
#: Names of SampleFormat, for messages.
_KINDS = {1: "uint", 2: "int", 3: "float"}
#: ``struct`` formats of tags of one number: BYTE, SHORT, LONG and LONG8.
_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}


@dataclass(frozen=True)
class PageTags:
    """The tags of a page.

    Attributes:
        index: number of the page in its chain.
        values: the values of `_TAGS`, by name.
        is_reduced: whether the page is marked as a version of reduced resolution, or as a mask.
    """

    index: int
    values: dict[str, int]
    is_reduced: bool

    @property
    def shape(self) -> list[int]:
        """Rows and columns."""
        return [self.values["ImageLength"], self.values["ImageWidth"]]

    @property
    def dtype(self) -> str:
        """Type of the gray values, such as ``uint8``."""
        kind = _KINDS.get(self.values["SampleFormat"], f"SampleFormat {self.values['SampleFormat']} of ")
        return f"{kind}{self.values['BitsPerSample']}"

    def with_orientation(self, other: "PageTags") -> "PageTags":
        """Return the tags with the orientation of another page."""
        return replace(self, values=self.values | {"Orientation": other.values["Orientation"]})

    def check_like(self, path: str, first: "PageTags") -> None:
        """Check that the page is stored like another one.

        Raises:
            MetadataError: it differs.
        """
        if self.values == first.values:
            return
        if (self.shape, self.dtype) != (first.shape, first.dtype):
            raise MetadataError(
                f"{path}: page {self.index} has shape {self.shape} and type {self.dtype}, and page {first.index} has "
                f"shape {first.shape} and type {first.dtype}; all pages of a volume have one size and type: move what "
                "is no section to another file, or write the volume again"
            )
        name = next(name for name, value in self.values.items() if value != first.values[name])
        more = " (0: 0 is white, 1: 0 is black, 3: a palette)" if name == "PhotometricInterpretation" else ""
        raise MetadataError(
            f"{path}: page {self.index} has {name} {self.values[name]}, and page {first.index} has "
            f"{first.values[name]}{more}; store all pages alike"
        )


def read_tags(tiff: Any, offset: int, index: int) -> tuple[PageTags, int]:
    """Return the tags of a page, and the offset of the next page, 0 for the last one.

    Args:
        tiff: the file, of tifffile.
        offset: first byte of the page's directory.
        index: number of the page.

    Raises:
        EOFError: the file ends before.
    """
    order, is_big = tiff.byteorder, tiff.is_bigtiff
    count_format, entry, next_format = (
        (f"{order}Q", f"{order}HHQ8s", f"{order}Q") if is_big else (f"{order}H", f"{order}HHI4s", f"{order}I")
    )
    descriptor = tiff.filehandle.fileno()
    size, start = struct.calcsize(entry), offset + struct.calcsize(count_format)
    # Nearly all directories are shorter than this; the others take a second read.
    data = os.pread(descriptor, 512, offset)
    count = int(_unpack(count_format, data))
    if count > _MOST_TAGS:
        raise EOFError(f"page {index} has {count} tags")
    length = count * size
    data = data[start - offset :]
    if len(data) < length + struct.calcsize(next_format):
        data = os.pread(descriptor, length + struct.calcsize(next_format), start)
    if len(data) < length:
        raise EOFError(f"the tags of page {index} are cut off")
    values, subfile = dict(_TAGS.values()), 0
    for code, kind, number, raw in struct.iter_unpack(entry, data[:length]):
        if code in _TAGS and kind in _NUMBERS and number == 1:
            values[_TAGS[code][0]] = _unpack(order + _NUMBERS[kind], raw)
        elif code in (_SUBFILE, _OLD_SUBFILE) and kind in _NUMBERS:
            value = _unpack(order + _NUMBERS[kind], raw)
            subfile |= value & 5 if code == _SUBFILE else int(value == 2)
    # One strip may be declared as any number of rows from that of the page on.
    rows = values["RowsPerStrip"] or values["ImageLength"]
    values["RowsPerStrip"] = 0 if values["TileWidth"] else min(rows, values["ImageLength"])
    rest = data[length:]
    return PageTags(index, values, bool(subfile)), _unpack(next_format, rest)


def read_chain(tiff: Any) -> list[PageTags]:
    """Return the tags of all pages of a file but those of SubIFDs, up to the first one that cannot be read."""
    chain: list[PageTags] = []
    first = tiff.pages.first
    offset, seen = int(first.offset), set[int]()
    while offset and offset not in seen:
        seen.add(offset)
        try:
            tags, offset = read_tags(tiff, offset, len(chain))
        except EOFError:
            break  # tifffile reports files that are cut off
        chain.append(tags)
    return chain


def check_pages(path: str, tiff: Any, series: Sequence[Any], chain: Sequence[PageTags]) -> PageTags | None:
    """Check that the pages of the first image of a file are stored alike, and are all pages of the file.

    Pages that are marked as reduced resolution or as masks, and pyramids in SubIFDs, are no part of the volume.

    Args:
        path: the file, for messages.
        tiff: the same, of tifffile.
        series: its images, of tifffile.
        chain: tags of its pages.

    Returns:
        A last page that is smaller along both axes, which is left out as a thumbnail; None without one.

    Raises:
        MetadataError: pages differ, or belong to several images.
    """
    main = series[0]
    numbers = _numbers(main)
    inside = [tags for tags in chain if tags.index in numbers]
    others = [tags for tags in chain if tags.index not in numbers and not tags.is_reduced]
    thumbnail = None
    if len(others) == 1 and _is_thumbnail(others[0], inside):
        thumbnail, others = others[0], []
    if others and len(series) > 1 and main.kind != "generic":
        raise MetadataError(f"{path}: {_images(series)}")
    for tags in others:
        tags.check_like(path, inside[0])
    if others:
        raise MetadataError(
            f"{path}: its description ({main.kind}) names {len(inside)} of its {len(chain)} pages, the first other one "
            f"is page {others[0].index}; write the volume again"
        )
    if len(inside) > 1:
        first = inside[0].with_orientation(inside[1])  # which some programs write for the first page alone
        for tags in inside[1:]:
            tags.check_like(path, first)
    for level in main.levels[1:]:
        _check_level(path, tiff, level)
    return thumbnail


def _numbers(main: Any) -> set[int]:
    """Return the numbers of the pages that hold the planes of an image."""
    planes = math.prod(int(count) for count in main.shape[:-2])
    pages = [page.index for page in main.pages[:planes] if page is not None]
    if main.dataoffset is not None and pages:
        return set(range(pages[0], pages[0] + planes))  # one block of voxels, whatever pages point into it
    return set(pages)


def _is_thumbnail(last: PageTags, inside: Sequence[PageTags]) -> bool:
    """Return whether a page follows those of a stack and is smaller along both axes."""
    if len(inside) < 2 or last.index < inside[-1].index or last.dtype != inside[0].dtype:
        return False
    return all(n < m for n, m in zip(last.shape, inside[0].shape, strict=True))


def _check_level(path: str, tiff: Any, level: Any) -> None:
    """Check the pages of a level of a pyramid, which may be SubIFDs."""
    stored = [page for page in level.pages if page is not None and page.offset and page.parent is tiff]
    pages = [read_tags(tiff, int(page.offset), number)[0] for number, page in enumerate(stored)]
    for tags in pages[1:]:
        tags.check_like(f"{path} (level {level.shape})", pages[0])


def _images(series: Sequence[Any]) -> str:
    """Return a sentence on a file of several images."""
    shown = [f"{n}: {list(one.shape)} ({str(one.axes).lower()})" for n, one in enumerate(series[:4])]
    more = f" and {len(series) - 4} more" if len(series) > 4 else ""
    return (
        f"holds {len(series)} images, {', '.join(shown)}{more}; a file of one volume can be read: save the volume in a "
        "file without the others (thumbnails are recognized as pages of reduced resolution, NewSubfileType 1)"
    )


def _unpack(text: str, data: bytes) -> int:
    size = struct.calcsize(text)
    if len(data) < size:
        raise EOFError("a tag is cut off")
    return int(struct.unpack(text, data[:size])[0])
