"""A check that a reader can open an array and decode its chunks, made from the metadata alone.

zarr-python opens a copy of the metadata in memory, then writes and reads one small chunk with the array's codecs.
TensorStore only parses a copy: once it opens anything, its threads make the process unsafe to fork, so the rest of its
rules is reimplemented here. Each kind of array is checked once per process.
"""

import asyncio
import contextlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import zarr.api.asynchronous
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.integrity import COMPRESSORS, FILTERS
from cellmap_lightning.io.ngff import ArrayInfo

#: The library that decodes: zarr-python, or TensorStore, which is several times as fast where no cache is possible.
Reader = Literal["zarr", "tensorstore"]
READERS: tuple[Reader, ...] = ("zarr", "tensorstore")

#: The problem of each kind of array and reader; "" for none.
_results: dict[tuple[str, int, Reader], str] = {}
_TITLES = {"zarr": "zarr-python", "tensorstore": "TensorStore"}
_Metadata = dict[str, Any]
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_FIELDS = {
    2: ("zarr_format", "shape", "chunks", "dtype", "compressor", "fill_value", "order", "filters"),
    3: (
        "zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs",
    ),
}  # fmt: skip
_OPTIONAL = {
    2: ("dimension_separator",),
    3: ("attributes", "storage_transformers", "dimension_names"),
}
_TYPES = "bool, int8 to int64, uint8 to uint64, float16 to float64"


def check_openable(info: ArrayInfo, reader: Reader) -> None:
    """Check that a reader can open an array and decode its chunks.

    It costs some milliseconds for the first array of a kind, and nothing for the others: attributes and the number of
    voxels make no difference. An array that was pickled in another process was checked there.

    Args:
        info: the array.
        reader: the reader.

    Raises:
        MetadataError: it cannot; the message names the file, the field, and a valid value.
    """
    if not info.document:
        return
    key = info.document, info.zarr_format, reader
    text = _results.get(key)
    if text is None:
        # No lock, which could be held in a fork: two threads may both check a kind, with the same result.
        text = _results[key] = _Check(info.zarr_format, reader).problem(json.loads(info.document))
    if text:
        raise MetadataError(f"{info.metadata}: {text}")


def _has(reader: Reader) -> bool:
    if reader == "tensorstore":
        try:
            import tensorstore  # noqa: F401
        except ImportError:
            return False
    return True


class _Check:
    """The checks of one reader and one version of Zarr.

    Args:
        zarr_format: 2 or 3.
        reader: the reader.
    """

    def __init__(self, zarr_format: int, reader: Reader) -> None:
        self.zarr_format, self.reader = zarr_format, reader

    def refusal(self, meta: _Metadata) -> Exception | None:
        """Return the error with which the reader refuses an array, or None."""
        try:
            if self.reader == "zarr":
                _run_zarr(meta, self.zarr_format)
            else:
                _parse_with_tensorstore(meta, self.zarr_format)
        except Warning:  # where the user turns warnings into errors
            return None
        except Exception as e:  # codecs raise any type
            return e
        return None

    def accepts(self, meta: _Metadata) -> bool:
        """Return whether the reader can open an array."""
        return self.refusal(meta) is None

    def problem(self, meta: _Metadata) -> str:
        """Return the problem and a valid value; "" for none."""
        error = self.refusal(meta)
        if error is None:
            return ""
        detail = re.sub(r"Error parsing (?:object member|value) [^:]*: ", "", f"{type(error).__name__}: {error}")
        detail = " ".join(detail.split()).removesuffix(":").removesuffix(".")
        other: Reader = "tensorstore" if self.reader == "zarr" else "zarr"
        other_reads = _has(other) and _Check(self.zarr_format, other).accepts(meta)
        title, reason = _TITLES[self.reader], self._reason(meta, other_reads)
        text = f"{reason} ({title}: {detail})" if reason else f"{title} cannot open the array: {detail}"
        return f"{text}; reader={other} reads it" if other_reads else text

    def _reason(self, meta: _Metadata, other_reads: bool) -> str:
        """Name the field that the reader refuses and a valid value; "" where no single field is the cause.

        Where the other reader accepts the field, it is not wrong, and no other value is suggested.
        """
        defaults = _defaults(meta, self.zarr_format)
        return (
            self._missing_fields(meta, defaults)
            or self._unknown_field(meta)
            or self._refused_field(meta, defaults, other_reads)
        )

    def _missing_fields(self, meta: _Metadata, defaults: _Metadata) -> str:
        """Name the fields without which the reader refuses an array."""
        missing = {name: defaults[name] for name in _FIELDS[self.zarr_format] if name in defaults.keys() - meta.keys()}
        if not missing or not self.accepts(meta | missing):
            return ""
        whole = meta | missing
        needed = [m for m in missing if not self.accepts({n: v for n, v in whole.items() if n != m})] or [*missing]
        rights = [_right(name, meta, self.zarr_format) for name in needed]
        return f"missing {' and '.join(map(repr, needed))}; right would be {' and '.join(rights)}"

    def _unknown_field(self, meta: _Metadata) -> str:
        """Name a field outside of the specification, if the reader accepts the array without such fields."""
        known = (*_FIELDS[self.zarr_format], *_OPTIONAL[self.zarr_format])
        unknown = [name for name in meta if name not in known]
        if not unknown or not self.accepts({name: value for name, value in meta.items() if name in known}):
            return ""
        return (
            f"the field {unknown[0]!r} is not part of the specification; right would be to leave it out, or to mark it "
            'with "must_understand": false'
        )

    def _refused_field(self, meta: _Metadata, defaults: _Metadata, other_reads: bool) -> str:
        """Name the field with whose default value the reader accepts the array."""
        for name, value in defaults.items():
            if name not in meta or not self.accepts(meta | {name: value}):
                continue
            if name == "codecs":
                reason = _reason_of_codecs(meta) if not other_reads else ""
                return reason or f"its codecs ({_chain(meta[name])}) cannot be read"
            if other_reads:
                return f"{name} is {_short(meta[name])}, which cannot be read"
            return f"{name} is {_short(meta[name])}; right would be {_right(name, meta, self.zarr_format)}"
        return ""


# -- zarr-python


def _run_zarr(meta: _Metadata, zarr_format: int) -> None:
    """Open the array with zarr-python, and pass a small chunk through its codecs.

    It uses a temporary event loop in a temporary thread: that of zarr-python would still run when worker processes are
    forked.
    """
    with ThreadPoolExecutor(1, "cellmap-check") as thread:
        thread.submit(asyncio.run, _pass_through_zarr(meta, zarr_format)).result()


async def _pass_through_zarr(meta: _Metadata, zarr_format: int) -> None:
    await _opened(meta, zarr_format)
    array = await _opened(_small(meta, zarr_format), zarr_format)
    value = 0 if array.metadata.fill_value == 1 else 1
    await array.setitem(..., value)
    await array.getitem(...)


async def _opened(meta: _Metadata, zarr_format: Any) -> Any:
    text = default_buffer_prototype().buffer.from_bytes(json.dumps(meta).encode())
    store = MemoryStore({"zarr.json" if zarr_format == 3 else ".zarray": text})
    return await zarr.api.asynchronous.open_array(store=store, mode="r+", zarr_format=zarr_format)


def _small(meta: _Metadata, zarr_format: int) -> _Metadata:
    """Return metadata with one small chunk, of equal length along all axes, so that transpositions keep its shape."""
    ndim = len(meta["shape"])
    shape = [4 if ndim <= 5 else 2 if ndim <= 10 else 1] * ndim
    if zarr_format == 2:
        return meta | {"shape": shape, "chunks": shape, "compressor": _without_level(meta.get("compressor"))}
    grid = {"name": "regular", "configuration": {"chunk_shape": shape}}
    return meta | {"shape": shape, "chunk_grid": grid, "codecs": _small_codecs(meta["codecs"], shape)}


def _small_codecs(codecs: list[Any], shape: list[int]) -> list[Any]:
    return [_small_codec(codec, shape) for codec in codecs]


def _small_codec(codec: Any, shape: list[int]) -> Any:
    settings = codec.get("configuration") if isinstance(codec, dict) else None
    if isinstance(codec, dict) and codec.get("name") == "sharding_indexed":
        settings = codec["configuration"]
        inner = {"chunk_shape": shape, "codecs": _small_codecs(settings.get("codecs", [_BYTES]), shape)}
        return {**codec, "configuration": settings | inner}
    return {**codec, "configuration": _without_level(settings)} if isinstance(settings, dict) else codec


def _without_level(settings: Any) -> Any:
    """Return the settings of a compressor with its lowest level, which makes no difference to a reader."""
    if not isinstance(settings, dict):
        return settings
    return settings | {name: 1 for name in ("level", "clevel", "acceleration", "preset") if name in settings}


# -- TensorStore


def _parse_with_tensorstore(meta: _Metadata, zarr_format: int) -> None:
    """Parse the metadata with TensorStore, which checks single fields, and check here what it checks on opening.

    Raises:
        ValueError: it would refuse them.
    """
    import tensorstore

    driver = "zarr3" if zarr_format == 3 else "zarr"
    required = [name for name in _FIELDS[zarr_format] if name not in meta]
    if required:
        raise ValueError(f"missing fields: {', '.join(required)}")
    fixed = ("zarr_format", "node_type")
    for name, right in zip(fixed, (zarr_format, "array"), strict=True):
        if name in meta and (meta[name] != right or type(meta[name]) is not type(right)):
            raise ValueError(f"{name} is {meta[name]!r}")
    if zarr_format == 2:
        meta = {name: value for name, value in meta.items() if name in (*_FIELDS[2], *_OPTIONAL[2])}
    tensorstore.Spec({"driver": driver, "kvstore": {"driver": "memory"}, "metadata": meta})
    if zarr_format == 3:
        chunk = meta["chunk_grid"]["configuration"]["chunk_shape"]
        _check_chain(meta["codecs"], chunk, np.dtype(_type_name(meta)).itemsize)


#: Settings that TensorStore requires.
_NEEDED = {
    "blosc": ("cname", "clevel", "shuffle", "blocksize"),
    "gzip": ("level",),
    "zstd": ("level",),
    "transpose": ("order",),
    "sharding_indexed": ("chunk_shape", "codecs", "index_codecs"),
}


def _check_chain(codecs: list[Any], shape: list[int], itemsize: int) -> None:
    """Check codecs against TensorStore's requirements beyond their names and settings.

    Args:
        codecs: the codecs, in the order of encoding.
        shape: shape of the array that they encode.
        itemsize: bytes of one of its elements.

    Raises:
        ValueError: TensorStore would refuse them.
    """
    for codec in codecs:
        _check_settings(codec, itemsize)
    names = [_name(codec) for codec in codecs]
    serializers = [name for name in names if name in ("bytes", "sharding_indexed")]
    if len(serializers) != 1:
        raise ValueError(f"one of the codecs must turn an array to bytes, got {len(serializers)}")
    for codec, name in zip(codecs, names, strict=True):
        if name == "transpose":
            order = codec["configuration"]["order"]
            if isinstance(order, str):
                order = list(range(len(shape)))[:: -1 if order == "F" else 1]
            if sorted(order) != list(range(len(shape))):
                raise ValueError(f"{order} is not an order of {len(shape)} axes")
            shape = [shape[a] for a in order]
        elif name == "sharding_indexed":
            if names[-1] != name:
                raise ValueError(f"no codec may follow sharding_indexed, got {names[-1]}")
            _check_shard(codec["configuration"], shape, itemsize)


def _check_settings(codec: Any, itemsize: int) -> None:
    """Check that a codec has all settings that TensorStore requires."""
    if not isinstance(codec, dict):
        raise ValueError(f"expected an object for the codec {codec!r}")
    name, settings = _name(codec), codec.get("configuration") or {}
    absent = [key for key in _NEEDED.get(name, ()) if key not in settings]
    if name == "blosc" and settings.get("shuffle") != "noshuffle" and "typesize" not in settings:
        absent.append("typesize")
    if absent:
        raise ValueError(f"missing settings of the codec {name}: {', '.join(absent)}")
    if name == "bytes" and itemsize > 1 and "endian" not in settings:
        raise ValueError('the codec bytes needs "endian"')


def _check_shard(settings: dict[str, Any], shape: list[int], itemsize: int) -> None:
    """Check the chunks and the index of a shard."""
    inner, index = settings["chunk_shape"], settings["index_codecs"]
    if any(n % c for n, c in zip(shape, inner, strict=True)):
        raise ValueError(f"chunks {inner} do not divide the shard {list(shape)}")
    variable = [name for name in map(_name, index) if name in COMPRESSORS]
    if variable:
        raise ValueError(f"index_codecs must have a fixed size, got {', '.join(variable)}")
    _check_chain(index, [*shape, 2], 8)  # pairs of 64-bit numbers
    _check_chain(settings["codecs"], inner, itemsize)


def _name(codec: Any) -> str:
    return str(codec.get("name") if isinstance(codec, dict) else codec)


# -- the reason


def _defaults(meta: _Metadata, zarr_format: int) -> _Metadata:
    """Return a value of each field that every reader accepts."""
    kind = _type_name(meta)
    zero: Any = False if kind == "bool" else 0
    if zarr_format == 2:
        fields = {"zarr_format": 2, "fill_value": zero, "order": "C", "compressor": None, "filters": None}
        return fields | ({"dtype": np.dtype(kind).str} if kind else {})
    shape = meta["shape"]
    return {
        "zarr_format": 3, "node_type": "array", "fill_value": zero, "data_type": kind or "uint8",
        "storage_transformers": [], "dimension_names": [None] * len(shape),
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}, "codecs": [_BYTES],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
    }  # fmt: skip


def _right(name: str, meta: _Metadata, zarr_format: int) -> str:
    kind = _type_name(meta) or "the data type"
    texts = {
        "zarr_format": str(zarr_format),
        "node_type": "'array'",
        "fill_value": f"a value of {kind}, such as 0" + (", or null" if zarr_format == 2 else ""),
        "data_type": f"its name ({_TYPES})" + (f", here {kind!r}" if _type_name(meta) else ""),
        "dtype": "its type with the byte order" + (f", here {np.dtype(kind).str!r}" if _type_name(meta) else ""),
        "order": "'C' or 'F'",
        "compressor": "the settings of a codec of numcodecs, or null",
        "filters": "settings of codecs of numcodecs, or null",
        "storage_transformers": "none, since no reader here supports any",
        "dimension_names": f"a name for each of the {len(meta['shape'])} axes, or none",
        "chunk_grid": "{'name': 'regular', 'configuration': {'chunk_shape': ...}}",
        "chunk_key_encoding": "{'name': 'default'} or {'name': 'v2'}, with a separator",
        "codecs": "codecs that the reader supports, with their settings",
    }
    return texts[name]


def _type_name(meta: _Metadata) -> str:
    stored = meta.get("data_type", meta.get("dtype"))
    stored = stored.get("name") if isinstance(stored, dict) else stored
    try:
        return str(np.dtype(stored).newbyteorder("=").name)
    except (TypeError, ValueError, SyntaxError):
        return ""


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = repr(text) if isinstance(value, str) else text
    return text if len(text) <= 160 else f"{text[:157]}..."


def _reason_of_codecs(meta: _Metadata) -> str:
    """Return the problem that every reader has with the codecs; "" for none."""
    codecs, chunk = meta["codecs"], meta["chunk_grid"]
    for codec in _all_codecs(codecs):
        bare = _name(codec)
        if isinstance(codec, str):
            return f'the codec {codec!r} is a bare name; right would be {{"name": "{codec}"}}'
        if bare in (COMPRESSORS | FILTERS) - {"blosc", "zstd", "gzip", "crc32c"}:
            return f"the codec {bare!r} is not one of Zarr v3; right would be 'numcodecs.{bare}', if it is that"
        if bare == "transpose" and isinstance((codec.get("configuration") or {}).get("order"), str):
            order = codec["configuration"]["order"]
            axes = list(range(len(meta["shape"])))
            right = axes[::-1] if order == "F" else axes
            return f"the order of the codec 'transpose' is {order!r}; right would be the axes, as in {right}"
    with contextlib.suppress(KeyError, IndexError, TypeError, ValueError, AttributeError):
        return _reason_of_chain(codecs, chunk["configuration"]["chunk_shape"])
    return ""


def _reason_of_chain(codecs: list[Any], shape: list[int]) -> str:
    """Return the problem with the order of codecs or with the shapes of shards; "" for none."""
    names = [_name(codec) for codec in codecs]
    serializers = [name for name in names if name in ("bytes", "sharding_indexed")]
    if len(serializers) != 1:
        return (
            f"{len(serializers)} of its codecs turn an array to bytes ({', '.join(names) or 'there are no codecs'}); "
            "right would be one, 'bytes' or 'sharding_indexed'"
        )
    for codec, name in zip(codecs, names, strict=True):
        if name == "transpose":
            shape = [shape[a] for a in codec["configuration"]["order"]]
        if name == "sharding_indexed":
            return _reason_of_shard(codec["configuration"], shape)
    return ""


def _reason_of_shard(settings: dict[str, Any], shape: list[int]) -> str:
    inner = settings["chunk_shape"]
    if any(n % c for n, c in zip(shape, inner, strict=True)):
        return f"the chunks {inner} do not divide their shard {list(shape)}; right would be chunks that do"
    index = map(_name, settings.get("index_codecs", ()))
    variable = [name for name in index if name.removeprefix("numcodecs.") in COMPRESSORS]
    if variable:
        return (
            f"index_codecs of its shards have {variable[0]!r}, after which the size of the index is not known; "
            "right would be 'bytes' and 'crc32c' alone"
        )
    return _reason_of_chain(settings.get("codecs", [_BYTES]), inner)


def _chain(codecs: list[Any]) -> str:
    """Return the names of codecs, with those inside of shards in brackets."""
    names = []
    for codec in codecs:
        settings = codec.get("configuration") if isinstance(codec, dict) else None
        inner = settings.get("codecs") if isinstance(settings, dict) else None
        names.append(_name(codec) + (f" [{_chain(inner)}]" if isinstance(inner, list) else ""))
    return ", ".join(names)


def _all_codecs(codecs: list[Any]) -> list[Any]:
    """Return all codecs, with those inside of shards."""
    flat = []
    for codec in codecs:
        flat.append(codec)
        settings = codec.get("configuration") if isinstance(codec, dict) else None
        if isinstance(settings, dict) and _name(codec) == "sharding_indexed":
            flat += _all_codecs([*(settings.get("codecs") or []), *(settings.get("index_codecs") or [])])
    return flat
