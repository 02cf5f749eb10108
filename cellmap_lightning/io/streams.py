"""Decoders of gzip, zlib, bz2 and LZMA with a size limit: these formats do not store their decoded size.

Deflate expands a byte to 1032 at most, bz2 and LZMA to much more, and a stream may be followed by others. So each is
decoded with a limit on its output, and a chunk that holds more is an error once the limit is reached.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from cellmap_lightning.io.integrity import DamagedError, SizeError

#: Bytes that an LZMA decoder may allocate: the highest preset needs 65 MiB, and a header can ask for 4 GiB.
LZMA_MEMORY = 1 << 28
#: Bytes that are passed at a time after the first stream: a decoder copies the bytes that follow its stream.
_STEP = 1 << 14

_DECODERS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(16 + zlib.MAX_WBITS),
    "zlib": zlib.decompressobj,
    "bz2": bz2.BZ2Decompressor,
    "lzma": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, LZMA_MEMORY),
}
#: Codecs that `decode_stream` decodes.
STREAMS = frozenset(_DECODERS)
_XZ = b"\xfd7zXZ\0"


def decode_stream(codec: str, stored: Any, most: int) -> bytes:
    """Return the decoded bytes of a chunk.

    Concatenated streams are decoded as the libraries of the formats do: all of them, except in zlib; zeros between gzip
    streams are skipped; other bytes after a stream of bz2 or LZMA are ignored.

    Args:
        codec: one of `STREAMS`.
        stored: the stored bytes.
        most: size limit of the result in bytes.

    Raises:
        SizeError: it would decode to more.
        DamagedError: it is cut short, or cannot be decoded.
    """
    view = memoryview(stored).cast("B")
    make = _DECODERS[codec]
    if codec == "lzma" and _XZ.startswith(bytes(view[: len(_XZ)])):
        make = _xz
    parts: list[bytes] = []
    at, total, step = 0, 0, len(view)
    while at < len(view):
        try:
            at, total = _decode_one(make(), view, at, step, most, parts, total)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as e:
            if at and codec in ("bz2", "lzma"):
                break
            raise DamagedError(f"it cannot be decoded ({e})") from e
        if codec == "zlib":
            break
        if codec == "gzip":
            at = _after_zeros(view, at)
        step = _STEP
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, LZMA_MEMORY)


def _decode_one(
    decoder: Any, view: memoryview, at: int, step: int, most: int, parts: list[bytes], total: int
) -> tuple[int, int]:
    """Decode the stream at a byte, and return its end and the number of bytes decoded so far."""
    while not decoder.eof:
        if at == len(view):
            raise DamagedError(f"it is cut short: its stream does not end in the {len(view)} bytes that are stored")
        piece = view[at : at + step]
        part = decoder.decompress(piece, most - total + 1)  # one byte more than allowed, to detect excess
        at, total = at + len(piece), total + len(part)
        if total > most:
            raise SizeError(f"it would decode to more than {most} bytes, which a chunk has at most", total)
        if part:
            parts.append(part)
    return at - len(decoder.unused_data), total


def _after_zeros(view: memoryview, at: int) -> int:
    while at < len(view):
        piece = bytes(view[at : at + _STEP])
        rest = piece.lstrip(b"\0")
        at += len(piece) - len(rest)
        if rest:
            break
    return at
