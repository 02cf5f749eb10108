"""Checks of the stored bytes of a chunk, made before they are decoded.

Codecs trust their input: Blosc reads beyond the end of a truncated chunk, Zstandard allocates what a header says. So
lengths are compared first, and a chunk that would decode to more than the array's metadata allows is refused. Formats
that do not store their decoded size (gzip, zlib, bz2, LZMA) are decoded in `streams`, which stops at the limit. Values
are not checked: a flipped bit is detected only where a checksum is stored.

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
#: Filters that map numbers to numbers. Others yield objects, such as ``pickle``, or are unknown.
FILTERS = frozenset(
    {
        "adler32", "astype", "bitround", "crc32", "crc32c", "delta", "fixedscaleoffset", "fletcher32",
        "jenkins_lookup3", "packbits", "quantize", "shuffle",
    }
)  # fmt: skip

#: Slack in bytes for a Zstandard frame without a size, whose blocks are counted as full.
_UNFILLED = 1 << 24
#: Bytes of headers and checksums at most: of a file, and of a chunk inside of a shard.
_OVERHEAD, _OVERHEAD_INSIDE = 1 << 20, 256
#: Bytes of a Zstandard block at most.
_BLOCK = 1 << 17


class DamagedError(ValueError):
    """Stored bytes that are not a valid chunk of the array."""


class EmptyError(DamagedError):
    """A stored object of 0 bytes."""

    def __init__(self) -> None:
        super().__init__("it is empty: 0 bytes are stored")


class SizeError(DamagedError):
    """A chunk whose decoded size differs from that of a chunk of the array.

    Attributes:
        nbytes: its decoded size in bytes.
    """

    def __init__(self, text: str, nbytes: int) -> None:
        super().__init__(text)
        self.nbytes = nbytes


@dataclass(frozen=True)
class Encoded:
    """The stored form of a chunk, as far as it follows from the codecs.

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
        """Bytes that the compressor may decode to."""
        return self.nbytes if self.exact else 16 * self.nbytes + (1 << 20)

    @property
    def most_stored(self) -> int:
        """Bytes that a file may have: more than any compressor makes of incompressible data."""
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
    """Return the problem with a chunk file without reading it; None for none.

    A missing file is valid: such a chunk holds the fill value.

    Args:
        path: the file.
        most: size limit in bytes.
    """
    try:
        status = os.stat(path)  # noqa: PTH116  thousands of them, and a Path costs more than the call
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):  # noqa: PTH114  as above
            return DamagedError(f"it is a link to {os.readlink(path)}, which is not there")  # noqa: PTH115  as above
        return None
    except OSError:  # raised again by the reader
        return None
    if stat.S_ISREG(status.st_mode) and status.st_size <= most:  # nearly always
        return None
    if stat.S_ISDIR(status.st_mode):
        return DamagedError("a folder stands where the chunk should be a file")
    problem = irregularity(status.st_mode)
    if problem:
        return IrregularFileError(problem)
    problem = excess(status.st_size, most)
    return LargeFileError(problem) if problem else None


def check_file(stored: memoryview, encoded: Encoded) -> None:
    """Check the content of a file: a chunk, or a shard with its chunks.

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
    problem = excess(len(stored), encoded.most_stored)
    if problem:
        raise LargeFileError(problem)
    if encoded.opaque:
        return
    if encoded.codec:
        check_header(stored, encoded)
    elif encoded.shard is not None:
        _check_shard(stored, encoded.shard)
    elif encoded.exact and len(stored) != encoded.nbytes:
        text = f"{len(stored)} bytes are stored, but an uncompressed chunk has {encoded.nbytes}"
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
    except EmptyError as e:  # one chunk is empty, and not the whole object
        raise DamagedError("a chunk of the shard is empty: its index gives it 0 bytes") from e


def _expect(decoded: int, encoded: Encoded) -> None:
    if decoded > encoded.most or (encoded.exact and decoded != encoded.nbytes):
        text = f"it would decode to {decoded} bytes, but a chunk of the array has {encoded.nbytes}"
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
    """Return the decoded size of a frame (or a bound), whether it is certain, and the end of the frame.

    The size of a frame without a size field is certain if none of its blocks is compressed.
    """
    magic = int.from_bytes(stored[at : at + 4], "little")
    if magic & 0xFFFFFFF0 == 0x184D2A50:  # a skippable frame
        return 0, True, at + 8 + int.from_bytes(stored[at + 4 : at + 8], "little")
    if magic != 0xFD2FB528:
        raise DamagedError("it is not a Zstandard frame")
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
    """Check the decoded size in the header of compressed bytes, if the format has one.

    Raises:
        DamagedError: it is cut short, or would decode to too much.
    """
    check = _HEADERS.get(encoded.codec)
    if check is not None:
        check(stored, encoded)


_HEADERS: dict[str, Callable[[memoryview, Encoded], None]] = {"blosc": _blosc, "zstd": _zstd, "lz4": _lz4}
