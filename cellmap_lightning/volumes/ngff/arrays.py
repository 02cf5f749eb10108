"""The metadata of Zarr arrays, versions 2 and 3, read from their JSON.

Specifications: https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html,
https://zarr-specs.readthedocs.io/en/latest/v3/core/v3.0.html.

An array is described without being opened: zarr-python comes in when the first chunk is needed.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.volumes.integrity import COMPRESSORS, FILTERS, Encoded
from cellmap_lightning.volumes.store import Remote, StorePath, exists, read_json

#: Bytes of a chunk at most, since it is decoded whole; of an array; and chunks of a shard, whose index is read whole.
MOST_CHUNK_BYTES, MOST_ARRAY_BYTES, MOST_INNER_CHUNKS = 1 << 32, 1 << 60, 1 << 24

_UNKNOWN = Encoded("", 0, exact=False)


@dataclass(frozen=True)
class ArrayInfo:
    """What an array's metadata says.

    Attributes:
        path: the array's folder.
        zarr_format: 2 or 3.
        shape: voxels along the stored axes.
        chunks: voxels of the smallest part that can be read by itself (the inner chunk of a shard).
        dtype: the stored type.
        attributes: the array's own attributes.
        files: voxels of what is stored in one file (the chunk, or the shard).
        prefix: what stands before a chunk's indices in the name of its file.
        separator: what stands between them.
        checksum: of all that the metadata says.
        encoded: how chunks are stored in a file.
        codec: what compresses a chunk, such as ``blosc-zstd``; ``none`` where nothing does.
    """

    path: StorePath
    zarr_format: int
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    attributes: Mapping[str, Any] = field(repr=False)
    files: tuple[int, ...] = ()
    prefix: str = ""
    separator: str = "."
    checksum: str = ""
    encoded: Encoded = _UNKNOWN
    codec: str = "none"

    @property
    def metadata(self) -> StorePath:
        """The file that describes the array."""
        return self.path / ("zarr.json" if self.zarr_format == 3 else ".zarray")

    def file(self, index: Sequence[int]) -> str:
        """Where the chunk or shard with these indices is stored, whether or not it was written."""
        key = f"{self.prefix}{self.separator.join(map(str, index))}"
        return str(self.path / key) if isinstance(self.path, Remote) else f"{self.path}/{key}"


def read_attributes(path: StorePath) -> tuple[dict[str, Any], int] | None:
    """Attributes and Zarr format of a group or an array, or None when ``path`` is neither."""
    node = read_json(path / "zarr.json")
    if node is not None:
        attributes = node.get("attributes", {})
        if not isinstance(attributes, dict):
            raise MetadataError(f"{path / 'zarr.json'}: attributes should be an object, got {attributes!r}")
        return attributes, 3
    attributes = read_json(path / ".zattrs")
    if attributes is None and not (exists(path / ".zgroup") or exists(path / ".zarray")):
        return None
    return attributes or {}, 2


def read_array(path: StorePath) -> ArrayInfo | None:
    """Describe the array in ``path`` from its metadata, or return None when there is none.

    Raises:
        MetadataError: the metadata is malformed.
    """
    file = path / "zarr.json"
    meta = read_json(file)
    if meta is not None:
        return _array_v3(file, path, meta) if meta.get("node_type") == "array" else None
    file = path / ".zarray"
    meta = read_json(file)
    if meta is None:
        return None
    attributes = read_json(path / ".zattrs") or {}
    chunks, separator = meta.get("chunks"), meta.get("dimension_separator", ".")
    info = _array(file, path, 2, meta.get("shape"), chunks, chunks, meta.get("dtype"), attributes)
    filters, compressor = meta.get("filters") or [], meta.get("compressor")
    if not isinstance(filters, list):
        raise MetadataError(f"{file}: filters should be a list, got {filters!r}")
    names = [_codec(file, codec, "id") for codec in [*filters, *([] if compressor is None else [compressor])]]
    encoded = Encoded(names[-1] if compressor is not None else "", _nbytes(info), exact=not filters)
    info = replace(info, codec=_called([compressor] if compressor is not None else [], "id"))
    return _stored(file, info, meta, separator, "", encoded)


def _array_v3(file: StorePath, path: StorePath, meta: dict[str, Any]) -> ArrayInfo:
    try:
        chunks = files = meta["chunk_grid"]["configuration"]["chunk_shape"]
        codecs, shard = _codecs(file, meta["codecs"]), {}
        index: list[str] = []
        if "sharding_indexed" in codecs:
            shard = next(c["configuration"] for c in meta["codecs"] if c["name"] == "sharding_indexed")
            chunks = shard["chunk_shape"]
            codecs, index = _codecs(file, shard["codecs"]), _codecs(file, shard["index_codecs"])
        dtype = meta["data_type"]
        keys = meta.get("chunk_key_encoding") or {"name": "default"}
        default = keys["name"] == "default"
        separator = (keys.get("configuration") or {}).get("separator", "/" if default else ".")
        location = shard.get("index_location", "end")
    except (KeyError, TypeError, AttributeError) as e:
        raise MetadataError(f"{file}: not the metadata of a Zarr v3 array with a regular chunk grid ({e!r})") from e
    info = _array(file, path, 3, meta.get("shape"), chunks, files, dtype, meta.get("attributes") or {})
    inner = math.prod(-(-n // c) for n, c in zip(info.files, info.chunks, strict=True)) if shard else 0
    if inner > MOST_INNER_CHUNKS:
        raise MetadataError(f"{file}: a shard has {inner} chunks, more than the {MOST_INNER_CHUNKS} that can be read")
    tail = 4 if codecs[-1:] == ["crc32c"] else 0
    bytewise = [name for name in codecs if name not in ("transpose", "bytes", "crc32c")]
    last = codecs[-2] if tail and len(codecs) > 1 else codecs[-1] if codecs else ""
    compressor = last if last in COMPRESSORS else ""
    encoded = Encoded(
        compressor, _nbytes(info), bytewise == [compressor] * bool(compressor), tail, inner, location == "end",
        4 if "crc32c" in index else 0,
    )  # fmt: skip
    info = replace(info, codec=_called(shard.get("codecs", meta["codecs"]), "name"))
    return _stored(file, info, meta, separator, f"c{separator}" if default else "", encoded)


def _codecs(file: StorePath, codecs: Any) -> list[str]:
    if not isinstance(codecs, list):
        raise MetadataError(f"{file}: codecs should be a list, got {codecs!r}")
    return [_codec(file, codec, "name") for codec in codecs]


def _codec(file: StorePath, codec: Any, key: str) -> str:
    """The name of a codec, if it is one that yields numbers, of which it can be told how many."""
    name = codec.get(key) if isinstance(codec, dict) else None
    bare = name.removeprefix("numcodecs.") if isinstance(name, str) else ""
    known = COMPRESSORS | FILTERS | ({"bytes", "sharding_indexed", "transpose"} if key == "name" else set())
    if bare not in known:
        raise MetadataError(f"{file}: the codec {name!r} is none that can be read: {', '.join(sorted(known))}")
    return bare


def _called(codecs: list[dict[str, Any]], key: str) -> str:
    """What people call the compressors among some codecs."""
    names = []
    for codec in codecs:
        name = str(codec[key]).removeprefix("numcodecs.")
        settings = codec if key == "id" else codec.get("configuration") or {}
        if name in COMPRESSORS:
            names.append(f"{name}-{settings['cname']}" if "cname" in settings else name)
    return "+".join(names) or "none"


def _stored(
    file: StorePath, info: ArrayInfo, meta: dict[str, Any], separator: Any, prefix: str, encoded: Encoded
) -> ArrayInfo:
    if separator not in (".", "/"):
        raise MetadataError(f"{file}: chunks are named with '.' or '/' between their indices, got {separator!r}")
    return replace(info, prefix=prefix, separator=separator, checksum=_checksum(meta), encoded=encoded)


def _nbytes(info: ArrayInfo) -> int:
    return math.prod(info.chunks) * info.dtype.itemsize


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _array(
    file: StorePath, path: StorePath, zarr_format: int, shape: Any, chunks: Any, files: Any, dtype: Any, attributes: Any
) -> ArrayInfo:
    for what, value in (("shape", shape), ("chunks", chunks), ("chunks", files)):
        good = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value)
        if not good:
            raise MetadataError(f"{file}: {what} should be positive whole numbers, got {value!r}")
    if not isinstance(attributes, dict):
        raise MetadataError(f"{file}: attributes should be an object, got {attributes!r}")
    if len(shape) != len(chunks) or len(shape) != len(files):
        raise MetadataError(f"{file}: shape {shape} and chunks {list(chunks)} differ in length")
    try:
        stored = np.dtype(dtype if dtype is not None else "missing")  # numpy takes None for float64
    except (TypeError, ValueError, SyntaxError) as e:
        raise MetadataError(f"{file}: unknown data type {dtype!r}") from e
    if stored.kind not in "uif" and stored != np.bool_:
        raise MetadataError(f"{file}: data type {dtype!r} is not a number")
    for what, value, most in (("shape", shape, MOST_ARRAY_BYTES), ("chunks", chunks, MOST_CHUNK_BYTES)):
        nbytes = math.prod(value) * stored.itemsize
        if nbytes > most:
            raise MetadataError(f"{file}: {what} {value} of {stored} have {nbytes} bytes; at most {most} can be read")
    return ArrayInfo(path, zarr_format, tuple(shape), tuple(chunks), stored.newbyteorder("="), attributes, tuple(files))
