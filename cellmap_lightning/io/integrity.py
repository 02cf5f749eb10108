"""Checks of the stored bytes of a chunk, made before they are decoded.

Codecs trust what they are given: Blosc copies beyond the end of a chunk that was cut short, Zstandard allocates what a
header says. So lengths are compared first, and a chunk that would decode to more than the array's metadata allows is
refused. Formats that do not store their decoded size (gzip, zlib, bz2, LZMA) are decoded in `streams`, which stops at
the limit. Values are not checked: a flipped bit is noticed where a checksum was stored, and nowhere else.

Formats: https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst,
https://datatracker.ietf.org/doc/html/rfc8878 (Zstandard),
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html.
"""

import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cellmap_lightning.io.files import IrregularFileError, LargeFileError, excess, irregularity

#: Codecs whose decoded size can be bounded.
COMPRESSORS = frozenset({"blosc", "zstd", "gzip", "zlib", "lz4", "bz2", "lzma"})
#: Codecs that leave numbers numbers. Others hold objects, as ``pickle`` does, or are not known here.
FILTERS = frozenset(
    {
        "adler32", "astype", "bitround", "crc32", "crc32c", "delta", "fixedscaleoffset", "fletcher32",
        "jenkins_lookup3", "packbits", "quantize", "shuffle",
    }
)  # fmt: skip

#: Bytes that the blocks of a Zstandard frame without a size may hold beyond those of a chunk: they are not always full.
_UNFILLED = 1 << 24
#: Bytes that headers and checksums of a file may take, and of a chunk inside of a shard.
_OVERHEAD, _OVERHEAD_INSIDE = 1 << 20, 256
#: Bytes of a Zstandard block at most.
_BLOCK = 1 << 17


class DamagedError(ValueError):
    """Stored bytes that are no chunk of their array."""


class EmptyError(DamagedError):
    """A stored object of 0 bytes."""

    def __init__(self) -> None:
        super().__init__("it is empty: 0 bytes are stored")


class SizeError(DamagedError):
    """A chunk that holds another number of bytes than a chunk of its array.

    Attributes:
        nbytes: bytes that it holds.
    """

    def __init__(self, text: str, nbytes: int) -> None:
        super().__init__(text)
        self.nbytes = nbytes


@dataclass(frozen=True)
class Encoded:
    """The stored form of a chunk, as far as its codecs determine it.

    Attributes:
        codec: the outermost compressor, or ``""``.
        nbytes: bytes that it decodes to: those of a chunk's voxels, and of checksums that were added before it.
        exact: whether that number is certain; otherwise it is an estimate.
        tail: bytes of checksums behind the compressed bytes.
        head: bytes of checksums before them.
        opaque: the compressed bytes were shuffled afterwards, so that their header cannot be read.
        shard: the chunks inside, where this is a shard.
        compressors: the stored form after each compressor, in the order of encoding; of a shard, of those around it.
    """

    codec: str
    nbytes: int
    exact: bool = True
    tail: int = 0
    head: int = 0
    opaque: bool = False
    shard: "Shard | None" = None
    compressors: tuple["Encoded", ...] = field(default=(), compare=False, repr=False)

    @property
    def most(self) -> int:
        """Bytes that the compressor may yield."""
        return self.nbytes if self.exact else 16 * self.nbytes + (1 << 20)

    @property
    def most_stored(self) -> int:
        """Bytes that a file may have: more than any compressor makes of what cannot be compressed."""
        return 2 * (self.shard.most if self.shard is not None else self.most) + _OVERHEAD


@dataclass(frozen=True)
class Shard:
    """The layout of a shard: chunks, and an index with the first byte and the number of bytes of each.

    Attributes:
        grid: chunks along each stored axis.
        chunk: the stored form of one of them.
        at_end: whether the index stands behind the chunks.
        index_tail: bytes of checksums behind the index.
        index_type: the type of its numbers, with their byte order.
        index_axes: the axis of the index that each of its stored axes is; empty where they are in order.
    """

    grid: tuple[int, ...]
    chunk: Encoded
    at_end: bool = True
    index_tail: int = 0
    index_type: str = "<u8"
    index_axes: tuple[int, ...] = ()

    @property
    def index_bytes(self) -> int:
        """Bytes of the index."""
        return 16 * math.prod(self.grid) + self.index_tail

    @property
    def most(self) -> int:
        """Bytes that its chunks and its index may have."""
        chunk = self.chunk.shard.most if self.chunk.shard is not None else self.chunk.most
        return math.prod(self.grid) * (chunk + _OVERHEAD_INSIDE) + self.index_bytes

    def entries(self, index: memoryview) -> npt.NDArray[np.uint64]:
        """Return the index's pairs of first byte and number of bytes, one for each chunk."""
        shape = (*self.grid, 2)
        axes = self.index_axes or tuple(range(len(shape)))
        numbers = np.frombuffer(index[: 16 * math.prod(self.grid)], self.index_type)
        return numbers.reshape([shape[a] for a in axes]).transpose(np.argsort(axes)).reshape(-1, 2)


def problem_of(path: str, most: int) -> Exception | None:
    """Return what is wrong with the file of a chunk, of whose content nothing is read; None where nothing is.

    A file that is not there is not wrong: such a chunk holds the fill value.

    Args:
        path: the file.
        most: bytes that it may have.
    """
    try:
        status = os.stat(path)  # noqa: PTH116  thousands of them, and a Path costs more than the call
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):  # noqa: PTH114  as above
            return DamagedError(f"it is a link to {os.readlink(path)}, which is not there")  # noqa: PTH115  as above
        return None
    except OSError:  # the reader meets it as well
        return None
    if stat.S_ISDIR(status.st_mode):
        return DamagedError("a folder stands where the chunk should be a file")
    wrong = irregularity(status.st_mode)
    if wrong:
        return IrregularFileError(wrong)
    wrong = excess(status.st_size, most)
    return LargeFileError(wrong) if wrong else None


def check_file(stored: memoryview, encoded: Encoded) -> None:
    """Check all that is stored in one file: a chunk, or a shard with its chunks.

    Raises:
        EmptyError: it has no bytes.
        DamagedError: it is cut short, or would decode to too much.
    """
    if not len(stored):
        raise EmptyError
    checksums = encoded.head + encoded.tail
    if len(stored) < checksums:
        raise DamagedError(f"it is cut short: {len(stored)} bytes are stored, less than its checksums have")
    if checksums:
        stored = stored[encoded.head : len(stored) - encoded.tail]
    wrong = excess(len(stored), encoded.most_stored)
    if wrong:
        raise LargeFileError(wrong)
    if encoded.opaque:
        return
    if encoded.codec:
        check_header(stored, encoded)
    elif encoded.shard is not None:
        _check_shard(stored, encoded.shard)
    elif encoded.exact and len(stored) != encoded.nbytes:
        text = f"{len(stored)} bytes are stored, and an uncompressed chunk has {encoded.nbytes}"
        raise SizeError(text, len(stored))


def _check_shard(stored: memoryview, shard: Shard) -> None:
    size = shard.index_bytes
    if len(stored) < size:
        raise DamagedError(f"it is cut short: {len(stored)} bytes are stored, and the shard's index alone has {size}")
    entries = shard.entries(stored[len(stored) - size :] if shard.at_end else stored[:size])
    for first, count in entries[entries[:, 0] != np.iinfo(np.uint64).max].tolist():
        if first + count > len(stored):
            raise DamagedError(
                f"it is cut short: {len(stored)} bytes are stored, and its index names a chunk up to {first + count}"
            )
        check_part(stored[first : first + count], shard)


def check_part(stored: memoryview, shard: Shard) -> None:
    """Check the stored bytes of one chunk of a shard; see `check_file`."""
    try:
        check_file(stored, shard.chunk)
    except EmptyError as e:  # of the shard's chunks alone: the object is not empty
        raise DamagedError("a chunk of the shard is empty: its index gives it 0 bytes") from e


def _expect(decoded: int, encoded: Encoded) -> None:
    if decoded > encoded.most or (encoded.exact and decoded != encoded.nbytes):
        text = f"it would decode to {decoded} bytes, and a chunk of the array has {encoded.nbytes}"
        raise SizeError(text, decoded)


def _blosc(stored: memoryview, encoded: Encoded) -> None:
    if len(stored) < 16:
        raise DamagedError(f"it is cut short: {len(stored)} bytes are stored, less than Blosc's header")
    decoded, _, length = np.frombuffer(stored[4:16], "<u4").tolist()
    if length > len(stored):
        raise DamagedError(f"it is cut short: {len(stored)} bytes are stored, and Blosc's header says {length}")
    if length < len(stored):
        raise DamagedError(f"it is too long: {len(stored)} bytes are stored, and Blosc's header says {length}")
    _expect(decoded, encoded)


def _lz4(stored: memoryview, encoded: Encoded) -> None:
    if len(stored) < 4:
        raise DamagedError(f"it is cut short: {len(stored)} bytes are stored, less than the header")
    _expect(int.from_bytes(stored[:4], "little"), encoded)


def _zstd(stored: memoryview, encoded: Encoded) -> None:
    at, decoded, certain = 0, 0, True
    while at < len(stored):
        frame, known, at = _frame(stored, at)
        decoded, certain = decoded + frame, certain and known
    if certain:
        _expect(decoded, encoded)
    elif not encoded.exact and decoded > encoded.most + _UNFILLED:  # otherwise the decoder's output is limited
        raise DamagedError(f"it could decode to {decoded} bytes; a chunk of the array has {encoded.nbytes}")


def _frame(stored: memoryview, at: int) -> tuple[int, bool, int]:
    """Bytes that a frame decodes to, or could; whether that is certain; and where it ends.

    A frame without its size is certain where none of its blocks is compressed.
    """
    magic = int.from_bytes(stored[at : at + 4], "little")
    if magic & 0xFFFFFFF0 == 0x184D2A50:  # skipped by whoever decodes
        return 0, True, at + 8 + int.from_bytes(stored[at + 4 : at + 8], "little")
    if magic != 0xFD2FB528:
        raise DamagedError("it is no Zstandard frame")
    try:
        head = stored[at + 4]
        single, size_flag = head >> 5 & 1, head >> 6
        at += 5 + (not single) + (0, 1, 2, 4)[head & 3]
        width = (single, 2, 4, 8)[size_flag]
        size = int.from_bytes(stored[at : at + width], "little") + (256 if width == 2 else 0)
        at, could, certain, last = at + width, 0, True, False
        while not last:
            block = int.from_bytes(stored[at : at + 3], "little")
            last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
            if at + 3 > len(stored) or kind == 3:
                raise IndexError
            at, could = at + 3 + (1 if kind == 1 else length), could + (_BLOCK if kind == 2 else length)
            certain = certain and kind != 2
        at += 4 * (head >> 2 & 1)
        if at > len(stored):
            raise IndexError
    except IndexError:
        raise DamagedError(f"it is cut short: a Zstandard frame does not end in the {len(stored)} bytes") from None
    return (size, True, at) if width else (could, certain, at)


def check_header(stored: memoryview, encoded: Encoded) -> None:
    """Check the header of what a compressor made, where it has one that says how much it decodes to.

    Raises:
        DamagedError: it is cut short, or would decode to too much.
    """
    check = _HEADERS.get(encoded.codec)
    if check is not None:
        check(stored, encoded)


_HEADERS: dict[str, Callable[[memoryview, Encoded], None]] = {"blosc": _blosc, "zstd": _zstd, "lz4": _lz4}
