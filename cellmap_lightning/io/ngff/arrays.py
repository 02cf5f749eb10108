"""The metadata of Zarr arrays, versions 2 and 3, read from their JSON.

Specifications: https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html,
https://zarr-specs.readthedocs.io/en/latest/v3/core/v3.0.html.

An array is described without being opened: zarr-python is used only when the first chunk is read.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.integrity import Encoded
from cellmap_lightning.io.ngff.codecs import describe_compressors, encoding_v2, encoding_v3, parse_codecs
from cellmap_lightning.io.ngff.limits import MOST_AXES, check_length
from cellmap_lightning.io.store import Remote, StorePath, exists, read_json
from cellmap_lightning.io.stored_array import StoredArray
from cellmap_lightning.io.versions import versions

#: Bytes of a chunk at most, since it is decoded whole; and of an array.
MOST_CHUNK_BYTES, MOST_ARRAY_BYTES = 1 << 32, 1 << 60

_UNKNOWN = Encoded("", 0, exact=False)


@dataclass(frozen=True)
class ArrayInfo:
    """The metadata of an array; docs/data.md lists the supported formats.

    Attributes:
        path: the array's folder.
        zarr_format: 2 or 3.
        shape: voxels along the stored axes.
        chunks: voxels of the smallest part that can be read by itself (the inner chunk of a shard).
        dtype: the stored type.
        attributes: the array's own attributes.
        files: voxels in one file (the chunk, or the shard).
        prefix: text before a chunk's indices in the name of its file.
        separator: text between the indices.
        checksum: checksum of the metadata.
        encoded: the stored form of a file.
        codec: compressor of a chunk, such as ``blosc-zstd``; ``none`` without one.
        axis_names: names of the stored axes in the array's own metadata, in lower case; empty where some have none.
        document: JSON of the metadata on which opening depends; it is not pickled.
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
    axis_names: tuple[str, ...] = ()
    document: str = field(default="", repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"document": ""}

    @property
    def metadata(self) -> StorePath:
        """File that describes the array."""
        return self.path / ("zarr.json" if self.zarr_format == 3 else ".zarray")

    @cached_property
    def version(self) -> str:
        """Version of the metadata on a server; empty for local arrays, and where the server sends none.

        It is requested once and pickled with the array; see `fetch_versions`.

        Raises:
            MetadataError: the server does not answer.
        """
        return versions([self.metadata])[0] if isinstance(self.metadata, Remote) else ""

    def key(self, index: Sequence[int]) -> str:
        """Return the name of a chunk or shard in the array's store."""
        return f"{self.prefix}{self.separator.join(map(str, index))}"

    def file(self, index: Sequence[int]) -> str:
        """Return the path or address of a chunk or shard, whether or not it exists."""
        key = self.key(index)
        return str(self.path / key) if isinstance(self.path, Remote) else f"{self.path}/{key}"


def fetch_versions(arrays: Iterable[StoredArray]) -> None:
    """Request the versions of many remote arrays concurrently.

    Raises:
        MetadataError: a server does not answer.
    """
    wanted = [
        (info, info.metadata) for info in arrays if isinstance(info.path, Remote) and "version" not in info.__dict__
    ]
    places = {place: "" for _, place in wanted if isinstance(place, Remote)}
    places.update(zip(places, versions(list(places)), strict=True))
    for info, place in wanted:
        if isinstance(place, Remote):
            info.__dict__["version"] = places[place]


def read_attributes(path: StorePath) -> tuple[dict[str, Any], int] | None:
    """Return attributes and Zarr format of a group or an array; None if ``path`` is neither."""
    node = read_json(path / "zarr.json")
    if node is not None:
        attributes = node.get("attributes", {})
        if not isinstance(attributes, dict):
            raise MetadataError(f"{path / 'zarr.json'}: attributes should be an object, got {attributes!r}")
        older = None if _describes_image(node, attributes) else _attributes_beside(path, attributes)
        return (attributes, 3) if older is None else (older, 2)
    attributes = read_json(path / ".zattrs")
    if attributes is None and not (exists(path / ".zgroup") or exists(path / ".zarray")):
        return None
    return attributes or {}, 2


def _describes_image(node: Mapping[str, Any], attributes: Mapping[str, Any]) -> bool:
    """Return whether a ``zarr.json`` describes an array or an image, and not another group."""
    return node.get("node_type") == "array" or "ome" in attributes or "multiscales" in attributes


def _attributes_beside(path: StorePath, attributes: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return attributes of a Zarr v2 node beside a ``zarr.json`` that describes no image; None where v3 applies.

    Some programs leave such a group in a folder of Zarr v2; it must not hide the array or image there.
    """
    older = read_json(path / ".zattrs")
    if older is not None and ("multiscales" in older or (older and not attributes)):
        return older
    return (older or {}) if exists(path / ".zarray") else None


def read_array(path: StorePath) -> ArrayInfo | None:
    """Return the metadata of the array in ``path``, or None if it is not an array.

    Raises:
        MetadataError: the metadata is malformed.
    """
    file = path / "zarr.json"
    meta = read_json(file)
    if meta is not None and meta.get("node_type") == "array":
        return _array_v3(file, path, meta)
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
    compressors = parse_codecs(file, [] if compressor is None else [compressor], "id")
    encoded = encoding_v2(
        file, parse_codecs(file, filters, "id"), compressors[0] if compressors else None, _nbytes(info)
    )
    info = replace(info, codec=describe_compressors(compressors))
    return _stored(file, info, meta, separator, "", encoded)


def _array_v3(file: StorePath, path: StorePath, meta: dict[str, Any]) -> ArrayInfo:
    try:
        files = meta["chunk_grid"]["configuration"]["chunk_shape"]
        codecs = parse_codecs(file, meta["codecs"], "name")
        dtype = _short(meta["data_type"])
        keys = _named(meta.get("chunk_key_encoding") or "default")
        default = keys["name"] == "default"
        separator = (keys.get("configuration") or {}).get("separator", "/" if default else ".")
    except (KeyError, TypeError, AttributeError) as e:
        raise MetadataError(f"{file}: not the metadata of a Zarr v3 array with a regular chunk grid ({e!r})") from e
    attributes = meta.get("attributes") or {}
    info = _array(file, path, 3, meta.get("shape"), None, files, dtype, attributes)
    encoded, chunks = encoding_v3(file, codecs, info.files, _nbytes(info))
    _check_bytes(file, "chunks", chunks, info.dtype, MOST_CHUNK_BYTES)
    info = replace(info, chunks=chunks, codec=describe_compressors(codecs))
    return _stored(file, info, meta, separator, f"c{separator}" if default else "", encoded)


def _named(extension: Any) -> Any:
    """Return an extension point of Zarr v3 as an object; its short form is the name alone."""
    return {"name": extension} if isinstance(extension, str) else extension


def _short(extension: Any) -> Any:
    """Return the name of a data type, whose long form is an object."""
    return extension.get("name") if isinstance(extension, dict) else extension


def _stored(
    file: StorePath, info: ArrayInfo, meta: dict[str, Any], separator: Any, prefix: str, encoded: Encoded
) -> ArrayInfo:
    if separator not in (".", "/"):
        raise MetadataError(f"{file}: chunks are named with '.' or '/' between their indices, got {separator!r}")
    own, xarrays = (
        axis_names(names, info) for names in (meta.get("dimension_names"), info.attributes.get("_ARRAY_DIMENSIONS"))
    )
    return replace(
        info, prefix=prefix, separator=separator, checksum=_checksum(meta), encoded=encoded,
        document=_document(meta, info.files), axis_names=own or xarrays,
    )  # fmt: skip


def axis_names(names: Any, array: StoredArray) -> tuple[str, ...]:
    """Return names of the stored axes in lower case; empty if they are not a name for each axis of an array.

    Args:
        names: a value of the metadata: a list of names or of objects with a name, or a letter for each axis.
        array: the array.
    """
    values = list(names) if isinstance(names, list | str) else []
    values = [value.get("name") if isinstance(value, dict) else value for value in values]
    if len(values) != len(array.shape) or not all(isinstance(value, str) and value for value in values):
        return ()
    # funlib marks axes that are not spatial by "^".
    return tuple(sys.intern(value.rstrip("^").lower()) for value in values)


def _nbytes(info: ArrayInfo) -> int:
    return math.prod(info.chunks) * info.dtype.itemsize


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _document(meta: dict[str, Any], chunks: tuple[int, ...]) -> str:
    """Return the metadata on which opening depends, as the same object for all arrays of a kind.

    Attributes are irrelevant, and of the shape, which is checked here, only the number of axes matters.
    """
    kind = {name: value for name, value in meta.items() if name != "attributes"}
    return sys.intern(json.dumps(kind | {"shape": chunks}, sort_keys=True))


def _array(
    file: StorePath, path: StorePath, zarr_format: int, shape: Any, chunks: Any, files: Any, dtype: Any, attributes: Any
) -> ArrayInfo:
    """Check the fields that both formats share; where ``chunks`` is None, ``files`` stands for both."""
    chunks = files if chunks is None else chunks
    for name, value in (("shape", shape), ("chunks", chunks), ("chunks", files)):
        if isinstance(value, list):
            check_length(file, f"lengths in {name}", value, MOST_AXES)
        good = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value)
        if not good:
            raise MetadataError(f"{file}: {name} should be positive whole numbers, got {value!r}")
    if not isinstance(attributes, dict):
        raise MetadataError(f"{file}: attributes should be an object, got {attributes!r}")
    if len(shape) != len(chunks) or len(shape) != len(files):
        raise MetadataError(f"{file}: shape {shape} and chunks {list(chunks)} differ in length")
    try:
        stored = np.dtype(dtype if dtype is not None else "missing")  # None would be float64
    except (TypeError, ValueError, SyntaxError) as e:
        raise MetadataError(f"{file}: unknown data type {dtype!r}") from e
    if stored.kind not in "uif" and stored != np.bool_:
        raise MetadataError(f"{file}: data type {dtype!r} is not a number")
    _check_bytes(file, "shape", shape, stored, MOST_ARRAY_BYTES)
    if zarr_format == 2:
        _check_bytes(file, "chunks", chunks, stored, MOST_CHUNK_BYTES)
    return ArrayInfo(path, zarr_format, tuple(shape), tuple(chunks), stored.newbyteorder("="), attributes, tuple(files))


def _check_bytes(file: StorePath, name: str, shape: Sequence[int], dtype: np.dtype[Any], most: int) -> None:
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > most:
        raise MetadataError(f"{file}: {name} {list(shape)} of {dtype} have {nbytes} bytes; at most {most} can be read")
