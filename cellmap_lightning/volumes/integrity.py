"""What the stored bytes of a chunk must be like, checked before they are decoded.

Codecs trust what they are given: Blosc copies beyond the end of a chunk that was cut short, Zstandard allocates what a
header says. So lengths are compared first, and a chunk that would decode to more than the array's metadata allows is
refused. Values are not looked at: a flipped bit is noticed where a checksum was stored, and nowhere else.

Formats: https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst,
https://datatracker.ietf.org/doc/html/rfc8878 (Zstandard),
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html.
"""

import bz2
import lzma
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

#: Codecs whose decoded size can be bounded before they run.
COMPRESSORS = frozenset({"blosc", "zstd", "gzip", "zlib", "lz4", "bz2", "lzma"})
#: Codecs that leave numbers numbers. Others hold objects, as ``pickle`` does, or are not known here.
FILTERS = frozenset(
    {
        "adler32", "astype", "bitround", "crc32", "crc32c", "delta", "fixedscaleoffset", "fletcher32",
        "jenkins_lookup3", "packbits", "quantize", "shuffle",
    }
)  # fmt: skip

#: Bytes to which deflate can expand one at most.
_DEFLATE = 1032
#: Bytes that any chunk may decode to without a closer look.
_HARMLESS = 1 << 32
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
    """

    codec: str
    nbytes: int
    exact: bool = True
    tail: int = 0
    head: int = 0
    opaque: bool = False
    shard: "Shard | None" = None

    @property
    def most(self) -> int:
        """Bytes that the compressor may yield."""
        return self.nbytes if self.exact else 16 * self.nbytes + (1 << 20)


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

    def entries(self, index: memoryview) -> npt.NDArray[np.uint64]:
        """Return the index's pairs of first byte and number of bytes, one for each chunk."""
        shape = (*self.grid, 2)
        axes = self.index_axes or tuple(range(len(shape)))
        numbers = np.frombuffer(index[: 16 * math.prod(self.grid)], self.index_type)
        return numbers.reshape([shape[a] for a in axes]).transpose(np.argsort(axes)).reshape(-1, 2)


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
    if encoded.opaque:
        return
    check = _CHECKS.get(encoded.codec)
    if check is not None:
        check(stored, encoded)
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


def decoded_bytes(stored: memoryview, encoded: Encoded) -> int | None:
    """Return how many bytes a chunk decodes to, by decoding it where only deflate was used; None where it is not known.

    It is for messages: what else does not fit, `check_file` counts.
    """
    stored = stored[encoded.head : len(stored) - encoded.tail]
    if encoded.codec in ("gzip", "zlib") and encoded.exact and not encoded.opaque:
        try:
            decoder = zlib.decompressobj(32 + zlib.MAX_WBITS)
            part = decoder.decompress(stored, encoded.nbytes)
        except zlib.error:
            return None
        return len(part) if decoder.eof else None
    return len(stored) if encoded.codec == "" and encoded.exact else None


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
    at, decoded, said = 0, 0, True
    while at < len(stored):
        frame, known, at = _frame(stored, at)
        decoded, said = decoded + frame, said and known
    if said:
        _expect(decoded, encoded)
    elif decoded > encoded.most + _HARMLESS:  # as much as its blocks could hold, where the frame does not say
        raise DamagedError(f"it could decode to {decoded} bytes, and a chunk of the array has {encoded.nbytes}")


def _frame(stored: memoryview, at: int) -> tuple[int, bool, int]:
    """Bytes that a frame decodes to, or could; whether it says so itself; and where it ends."""
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
        at, could, last = at + width, 0, False
        while not last:
            block = int.from_bytes(stored[at : at + 3], "little")
            last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
            if at + 3 > len(stored) or kind == 3:
                raise IndexError
            at, could = at + 3 + (1 if kind == 1 else length), could + (_BLOCK if kind == 2 else length)
        at += 4 * (head >> 2 & 1)
        if at > len(stored):
            raise IndexError
    except IndexError:
        raise DamagedError(f"it is cut short: a Zstandard frame does not end in the {len(stored)} bytes") from None
    return (size, True, at) if width else (could, False, at)


def _deflate(stored: memoryview, encoded: Encoded) -> None:
    if len(stored) * _DEFLATE > encoded.most + _HARMLESS:
        _decoded(stored, encoded, lambda: zlib.decompressobj(32 + zlib.MAX_WBITS))


def _bz2(stored: memoryview, encoded: Encoded) -> None:
    _decoded(stored, encoded, bz2.BZ2Decompressor)


def _lzma(stored: memoryview, encoded: Encoded) -> None:
    _decoded(stored, encoded, lambda: lzma.LZMADecompressor(memlimit=_HARMLESS))


def _decoded(stored: memoryview, encoded: Encoded, decoder: Callable[[], Any]) -> None:
    """Decode once to count, and throw away: formats that do not say their size."""
    total, rest = 0, bytes(stored)
    try:
        while rest:  # several streams may follow each other
            found = decoder()
            feed = rest
            while not found.eof:
                part = found.decompress(feed, 1 << 20)
                total += len(part)
                if total > encoded.most:
                    raise DamagedError(f"it would decode to more than {encoded.most} bytes, which a chunk has at most")
                feed = getattr(found, "unconsumed_tail", b"")
                if not part and not feed and not found.eof:
                    raise DamagedError(f"it is cut short: its stream does not end in the {len(stored)} bytes")
            rest = found.unused_data
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as e:
        raise DamagedError(f"it cannot be decoded ({e})") from e
    _expect(total, encoded)


_CHECKS: dict[str, Callable[[memoryview, Encoded], None]] = {
    "blosc": _blosc, "zstd": _zstd, "lz4": _lz4, "gzip": _deflate, "zlib": _deflate, "bz2": _bz2, "lzma": _lzma,
}  # fmt: skip
