"""Arrays of zarr-python whose compressors decode no more than the size of a chunk.

Each compressor of an array, also inside of shards and before other compressors, is replaced by one with a limit. So
nothing is decoded twice, and zarr-python's pipeline stops where a chunk would decode to too much.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numcodecs
import numpy as np
import zarr
from numcodecs.abc import Codec
from numcodecs.compat import ensure_contiguous_ndarray, ndarray_copy
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import ShardingCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer
from zarr.core.metadata import ArrayV2Metadata

from cellmap_lightning.io.integrity import COMPRESSORS, Encoded, SizeError, check_header
from cellmap_lightning.io.streams import STREAMS, decode_stream


def bounded(array: "zarr.Array[Any]", encoded: Encoded) -> "zarr.Array[Any]":
    """Return the same array with limits on the decoded size of its compressors.

    Args:
        array: the array, to be read.
        encoded: the stored form of its chunks.
    """
    if not _has_limits(encoded):
        return array
    metadata: Any = array.metadata
    limits = iter(encoded.compressors)
    if isinstance(metadata, ArrayV2Metadata):
        filters = tuple(_bounded_v2(codec, limits, encoded) for codec in metadata.filters or ())
        compressor: Any = metadata.compressor
        if compressor is not None:
            compressor = _bounded_v2(compressor, limits, encoded)
        metadata = replace(metadata, filters=filters or None, compressor=compressor)
    else:
        metadata = replace(metadata, codecs=tuple(_bounded_v3(metadata.codecs, encoded)))
    return zarr.Array(zarr.AsyncArray(metadata=metadata, store_path=array.store_path))


def decode_bounded(stored: Any, encoded: Encoded) -> Any:
    """Return the decoded bytes of a compressor, up to its limit.

    Raises:
        SizeError: it decodes to another number of bytes than a chunk has.
        DamagedError: it is cut short, or cannot be decoded.
    """
    stored = ensure_contiguous_ndarray(stored)
    if encoded.codec in STREAMS:
        decoded = decode_stream(encoded.codec, stored, encoded.most)
        if encoded.exact and len(decoded) != encoded.nbytes:
            raise SizeError(
                f"it decodes to {len(decoded)} bytes; a chunk of the array has {encoded.nbytes}", len(decoded)
            )
        return decoded
    decode = _DECODERS[encoded.codec]
    if encoded.codec == "zstd" and encoded.exact:  # frames may lack a size, and `out` limits all
        try:
            return decode(stored, np.empty(encoded.nbytes, np.uint8))
        except ValueError as e:
            if "buffer too small" not in str(e):
                raise
            text = f"it would decode to more than {encoded.nbytes} bytes, which a chunk of the array has"
            raise SizeError(text, encoded.nbytes + 1) from e
    check_header(memoryview(stored).cast("B"), encoded)
    return decode(stored)


_DECODERS: dict[str, Callable[..., Any]] = {
    "blosc": numcodecs.Blosc().decode, "lz4": numcodecs.LZ4().decode, "zstd": numcodecs.Zstd().decode,
}  # fmt: skip


class _BoundedV2(Codec):  # type: ignore[misc]
    """A compressor of Zarr v2 with a limit."""

    codec_id = "bounded"  # zarr-python reads it from the class

    def __init__(self, codec: Any, encoded: Encoded) -> None:
        self.codec_id, self._codec, self._encoded = codec.codec_id, codec, encoded

    def encode(self, buf: Any) -> Any:
        return self._codec.encode(buf)

    def decode(self, buf: Any, out: Any = None) -> Any:
        decoded = decode_bounded(buf, self._encoded)
        return decoded if out is None else ndarray_copy(decoded, out)

    def get_config(self) -> Any:
        return self._codec.get_config()


def _bounded_v2(codec: Any, limits: Iterator[Encoded], outer: Encoded) -> Any:
    if codec.codec_id not in COMPRESSORS:
        return codec
    limit = next(limits)
    return _BoundedV2(codec, limit) if _needs_limit(limit, outer) else codec


@dataclass(frozen=True)
class _BoundedV3(BytesBytesCodec):
    """A compressor of Zarr v3 with a limit."""

    codec: Any
    encoded: Encoded

    is_fixed_size = False

    def to_dict(self) -> Any:
        return self.codec.to_dict()

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        size: int = self.codec.compute_encoded_size(input_byte_length, chunk_spec)
        return size

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        decoded = await asyncio.to_thread(decode_bounded, chunk_bytes.as_numpy_array(), self.encoded)
        return chunk_spec.prototype.buffer.from_bytes(decoded)


def _bounded_v3(codecs: Iterable[Any], outer: Encoded) -> Iterator[Any]:
    limits = iter(outer.compressors)
    for codec in codecs:
        if isinstance(codec, ShardingCodec) and outer.shard is not None:
            yield ShardingCodec(
                chunk_shape=codec.chunk_shape, codecs=tuple(_bounded_v3(codec.codecs, outer.shard.chunk)),
                index_codecs=codec.index_codecs, index_location=codec.index_location,
            )  # fmt: skip
        elif isinstance(codec, BytesBytesCodec) and _name(codec) in COMPRESSORS:
            limit = next(limits)
            yield _BoundedV3(codec, limit) if _needs_limit(limit, outer) else codec
        else:
            yield codec


def _name(codec: BytesBytesCodec) -> str:
    return str(codec.to_dict()["name"]).removeprefix("numcodecs.")


def _has_limits(encoded: Encoded) -> bool:
    """Return whether any compressor needs a limit."""
    inside = encoded.shard is not None and _has_limits(encoded.shard.chunk)
    return inside or any(_needs_limit(limit, encoded) for limit in encoded.compressors)


def _needs_limit(limit: Encoded, outer: Encoded) -> bool:
    """Return whether a compressor's input is not covered by `check_file`, which checks the outermost header."""
    return limit.codec in STREAMS or limit.codec == "zstd" or outer.opaque or limit is not outer.compressors[-1]
