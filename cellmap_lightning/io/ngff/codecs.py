"""Stored sizes of chunks, derived from the codecs in an array's metadata.

The codecs of a chunk are followed in the order of encoding. Filters, transpositions and checksums change the number of
bytes by a known amount; a compressor does not. `integrity` compares the facts about the outermost compressor and about
shards with the stored bytes.

Specifications: https://zarr-specs.readthedocs.io/en/latest/v3/core/v3.0.html#codecs,
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html,
https://numcodecs.readthedocs.io/en/stable/.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.integrity import COMPRESSORS, FILTERS, Encoded, Shard
from cellmap_lightning.io.ngff.limits import MOST_CODECS, check_length
from cellmap_lightning.io.store import StorePath

#: Chunks of a shard at most, since its index is read whole; and depth of nested shards.
MOST_INNER_CHUNKS, MOST_NESTED = 1 << 24, 4
#: Factor by which filters may enlarge a chunk: uint8 as complex128 has 16 times as many bytes.
MOST_EXPANSION = 16

#: Checksums of four bytes, and their default location.
_CHECKSUMS = {"crc32c": "end", "crc32": "start", "adler32": "start", "fletcher32": "end", "jenkins_lookup3": "end"}
#: Codecs of Zarr v3 that are not filters or compressors.
_V3 = frozenset({"bytes", "sharding_indexed", "transpose"})

Codec = tuple[str, dict[str, Any]]


def parse_codecs(file: StorePath, codecs: Any, key: str) -> list[Codec]:
    """Return name and settings of each codec of a list.

    Args:
        file: the metadata file, for messages.
        codecs: the list.
        key: key of the name: ``id`` in Zarr v2, ``name`` in v3.

    Raises:
        MetadataError: it is not a list, or has a codec that does not yield numbers of a known size.
    """
    if not isinstance(codecs, list):
        raise MetadataError(f"{file}: codecs should be a list, got {codecs!r}")
    check_length(file, "codecs", codecs, MOST_CODECS)
    parsed = []
    for entry in codecs:
        # The short form of Zarr v3.1 is the name alone.
        codec = {"name": entry} if isinstance(entry, str) and key == "name" else entry
        name = codec.get(key) if isinstance(codec, dict) else None
        bare = name.removeprefix("numcodecs.") if isinstance(name, str) else ""
        known = COMPRESSORS | FILTERS | (_V3 if key == "name" else frozenset())
        if bare not in known:
            shown = name if name is not None else codec
            raise MetadataError(f"{file}: the codec {shown!r} cannot be read; known are {', '.join(sorted(known))}")
        settings = codec if key == "id" else codec.get("configuration") or {}
        if not isinstance(settings, dict):
            raise MetadataError(f"{file}: the configuration of the codec {name!r} should be an object")
        if bare == "lzma" and settings.get("filters"):  # these determine how much is allocated
            raise MetadataError(f"{file}: the codec {name!r} has filters, as raw LZMA has; only xz and lzma are read")
        parsed.append((bare, settings))
    return parsed


def describe_compressors(codecs: Sequence[Codec]) -> str:
    """Return the names of the compressors among some codecs, such as ``blosc-zstd``; ``none`` without any."""
    names = [_compressor_name(*codec) for codec in _flat(codecs) if codec[0] in COMPRESSORS]
    return "+".join(names) or "none"


def _compressor_name(name: str, settings: dict[str, Any]) -> str:
    return f"{name}-{settings['cname']}" if "cname" in settings else name


def _flat(codecs: Sequence[Codec], depth: int = 0) -> list[Codec]:
    """Return all codecs, with those inside of shards in their place."""
    flat: list[Codec] = []
    for name, settings in codecs:
        inner = settings.get("codecs") if name == "sharding_indexed" else None
        if isinstance(inner, list) and depth < MOST_NESTED:
            flat += _flat(parse_codecs(_NO_FILE, inner, "name"), depth + 1)
        else:
            flat.append((name, settings))
    return flat


_NO_FILE: Any = "codecs"


class _Chain:
    """The stored form of a chunk after each codec, in the order of encoding.

    Args:
        file: the metadata file, for messages.
        nbytes: bytes of the chunk's voxels.
        exact: whether that is certain.
    """

    def __init__(self, file: StorePath, nbytes: int, exact: bool = True) -> None:
        self._file, self._most = file, MOST_EXPANSION * nbytes + (1 << 20)
        self.nbytes, self.exact = nbytes, exact
        self._compressors: list[Encoded] = []
        self._shard: Shard | None = None
        self._head = self._tail = 0
        self._shuffled = False

    def add(self, name: str, settings: dict[str, Any]) -> None:
        """Apply a filter, a checksum or a compressor.

        Raises:
            MetadataError: a filter enlarges a chunk too much, or could do so in decoding.
        """
        if name in COMPRESSORS:
            self._compressors.append(Encoded(name, self.nbytes, self.exact))
            self._head = self._tail = 0
            self.exact = self._shuffled = False
        elif name in _CHECKSUMS:
            self.nbytes += 4
            if settings.get("location", _CHECKSUMS[name]) == "start":
                self._head += 4
            else:
                self._tail += 4
        elif name == "shuffle":
            self._shuffled = True
        else:
            size = _filtered(self._file, name, settings, self.nbytes)
            if self._compressors and size != self.nbytes:  # its decoder would enlarge an unknown number of bytes
                raise MetadataError(
                    f"{self._file}: the codec {name!r} stands after a compressor and changes the number of bytes; "
                    "such filters are read in front of compressors only"
                )
            if size is not None and size > self._most:
                raise MetadataError(
                    f"{self._file}: the codec {name!r} makes {size} bytes of a chunk; at most {self._most} are read"
                )
            self.nbytes, self.exact = (self.nbytes, False) if size is None else (size, self.exact)

    def add_shard(self, shard: Shard) -> None:
        """Put chunks together in a shard, whose size depends on what they hold."""
        self._shard, self._head, self._tail, self.exact, self._shuffled = shard, 0, 0, False, False
        self.nbytes += shard.index_bytes

    @property
    def encoded(self) -> Encoded:
        """Stored form after the codecs so far."""
        if self._compressors:
            last = self._compressors[-1]
            return replace(
                last, tail=self._tail, head=self._head, opaque=self._shuffled, shard=self._shard,
                compressors=tuple(self._compressors),
            )  # fmt: skip
        if self._shard is not None:
            return Encoded("", self.nbytes, False, self._tail, self._head, self._shuffled, self._shard)
        return Encoded("", self.nbytes, self.exact)


def _filtered(file: StorePath, name: str, settings: dict[str, Any], nbytes: int) -> int | None:
    """Return the bytes after a filter; None where the number is unknown."""
    if name in ("bitround", "transpose", "bytes"):
        return nbytes
    if name == "packbits":
        return 1 + -(-nbytes // 8)
    try:
        if name == "astype":
            before, after = settings["decode_dtype"], settings["encode_dtype"]
        else:  # delta, fixedscaleoffset, quantize
            before = settings["dtype"]
            after = settings.get("astype") or before
        types = np.dtype(before), np.dtype(after)
        other = next((kind for kind in types if kind.kind not in "biufc"), None)
        if other is not None:  # such as |V1000000, with a million bytes per element
            raise MetadataError(f"{file}: the codec {name!r} has the data type {other.str!r}, which is not a number")
        return nbytes // int(types[0].itemsize) * int(types[1].itemsize)
    except MetadataError:
        raise
    except (KeyError, TypeError, ValueError, SyntaxError, ZeroDivisionError):
        return None  # which is refused when the array is opened


def encoding_v2(file: StorePath, filters: Sequence[Codec], compressor: Codec | None, nbytes: int) -> Encoded:
    """Return the stored form of a chunk of Zarr v2.

    Raises:
        MetadataError: a filter enlarges a chunk too much.
    """
    chain = _Chain(file, nbytes)
    for name, settings in [*filters, *([compressor] if compressor is not None else [])]:
        chain.add(name, settings)
    return chain.encoded


def encoding_v3(
    file: StorePath, codecs: Sequence[Codec], shape: tuple[int, ...], nbytes: int, exact: bool = True, depth: int = 0
) -> tuple[Encoded, tuple[int, ...]]:
    """Return the stored form of a chunk of Zarr v3, and the shape of the smallest part that is encoded separately.

    Args:
        file: the metadata file, for messages.
        codecs: its codecs.
        shape: voxels along each axis.
        nbytes: bytes of its voxels.
        exact: whether that is certain.
        depth: number of shards around it.

    Raises:
        MetadataError: the settings of a shard are malformed, or a filter enlarges a chunk too much.
    """
    chain = _Chain(file, nbytes, exact)
    axes = tuple(range(len(shape)))  # for each axis after the transpositions so far, the array's axis
    part, separate = shape, True
    for name, settings in codecs:
        if name == "transpose":
            axes = tuple(axes[a] for a in _order(settings, len(shape)))
        elif name == "sharding_indexed":
            inner = _shape(file, settings, len(shape))
            here = [shape[a] for a in axes]
            shard = _shard(file, settings, here, inner, chain, depth)
            chain.add_shard(shard)
            part = tuple(inner[axes.index(a)] for a in range(len(shape)))
            separate = True
        else:
            chain.add(name, settings)
            separate = separate and name == "bytes"
    # A shard inside of another codec must be decoded whole.
    return chain.encoded, part if separate else shape


def _order(settings: dict[str, Any], ndim: int) -> Sequence[int]:
    order = settings.get("order")
    if order == "F":
        return range(ndim)[::-1]
    if isinstance(order, list) and all(type(n) is int for n in order) and sorted(order) == list(range(ndim)):
        return order
    return range(ndim)  # which is refused when the array is opened


def _shape(file: StorePath, settings: dict[str, Any], ndim: int) -> tuple[int, ...]:
    shape = settings.get("chunk_shape")
    good = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
    if not isinstance(shape, list) or not good or len(shape) != ndim:
        raise MetadataError(f"{file}: chunk_shape of a shard should be {ndim} positive whole numbers, got {shape!r}")
    return tuple(shape)


def _shard(
    file: StorePath, settings: dict[str, Any], shape: Sequence[int], inner: tuple[int, ...], chain: _Chain, depth: int
) -> Shard:
    """Return the layout of a shard of some shape, whose size is the current one of the chain."""
    if depth >= MOST_NESTED:
        raise MetadataError(f"{file}: more than {MOST_NESTED} shards inside each other cannot be read")
    grid = tuple(-(-n // c) for n, c in zip(shape, inner, strict=True))
    if math.prod(grid) > MOST_INNER_CHUNKS:
        raise MetadataError(
            f"{file}: a shard has {math.prod(grid)} chunks, more than the {MOST_INNER_CHUNKS} that can be read"
        )
    location = settings.get("index_location", "end")
    if location not in ("start", "end"):
        raise MetadataError(f"{file}: index_location of a shard should be 'start' or 'end', got {location!r}")
    nbytes, rest = divmod(chain.nbytes * math.prod(inner), math.prod(shape))
    codecs = parse_codecs(file, settings.get("codecs", ["bytes"]), "name")
    chunk, _ = encoding_v3(file, codecs, inner, nbytes, chain.exact and not rest, depth + 1)
    tail, byte_order, axes = 0, "<", tuple(range(len(grid) + 1))
    for name, options in parse_codecs(file, settings.get("index_codecs", ["bytes", "crc32c"]), "name"):
        if name == "transpose":
            axes = tuple(axes[a] for a in _order(options, len(axes)))
        elif name == "bytes":
            byte_order = ">" if options.get("endian") == "big" else "<"
        elif name in _CHECKSUMS:
            tail += 4
    ordered = axes == tuple(range(len(axes)))
    return Shard(grid, chunk, location == "end", tail, f"{byte_order}u8", () if ordered else axes)
