"""OME-NGFF multiscales 0.4 (Zarr v2) and 0.5 (Zarr v3), and CellMap annotation attributes, read from their JSON.

Specifications: https://ngff.openmicroscopy.org/0.4/#multiscale-md, https://ngff.openmicroscopy.org/0.5/#multiscale-md,
https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html, https://zarr-specs.readthedocs.io/en/latest/v3/core/v3.0.html;
annotations: https://github.com/janelia-cellmap/cellmap-schemas.

An array is described without being opened: zarr-python comes in when the first chunk is needed.
"""

import contextlib
import hashlib
import json
import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.volumes.geometry import AXES, SCALE_TOLERANCE, Lattice, Shape, Vector, to_vector
from cellmap_lightning.volumes.integrity import COMPRESSORS, FILTERS, Encoded
from cellmap_lightning.volumes.store import Remote, StorePath, children, exists, keeping, located, missing, read_json

log = logging.getLogger(__name__)

#: Nanometres in one unit (UDUNITS-2 names, as OME-NGFF asks for, and the abbreviations seen in the wild).
UNITS_NM = {
    "angstrom": 0.1,
    "nanometer": 1.0,
    "nm": 1.0,
    "micrometer": 1e3,
    "um": 1e3,
    "µm": 1e3,
    "millimeter": 1e6,
    "mm": 1e6,
    "meter": 1e9,
    "picometer": 1e-3,
}
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


@dataclass(frozen=True)
class Level:
    """One resolution of a multiscale image.

    Attributes:
        path: the array's folder.
        name: its path inside the image, such as ``s0``.
        scale: voxel size in nm (z, y, x).
        translation: centre of voxel 0 in nm (z, y, x).
        axes: which stored axis is z, y, x.
        ndim: number of stored axes.
    """

    path: StorePath
    name: str
    scale: Vector
    translation: Vector
    axes: tuple[int, int, int]
    ndim: int

    @cached_property
    def info(self) -> ArrayInfo | None:
        """The array's metadata, or None when the image lists a level that is not on disk."""
        info = read_array(self.path)
        if info is not None and len(info.shape) != self.ndim:
            raise MetadataError(
                f"{self.path}: the array has {len(info.shape)} axes {list(info.shape)}, the image's "
                f"metadata has {self.ndim}"
            )
        if info is not None:
            other = [n for i, n in enumerate(info.shape) if i not in self.axes]
            if any(n != 1 for n in other):
                raise MetadataError(
                    f"{self.path}: shape {list(info.shape)} has a non-spatial axis longer than 1; "
                    "only channel and time axes of length 1 can be read"
                )
        return info

    @cached_property
    def lattice(self) -> Lattice:
        """The voxels in nm.

        Raises:
            CellMapFileNotFoundError: the level is not on disk.
        """
        return Lattice(self.translation, self.scale, self.zyx(self.array.shape))

    @property
    def array(self) -> ArrayInfo:
        """The array's metadata.

        Raises:
            CellMapFileNotFoundError: the level is not on disk.
        """
        if self.info is None:
            raise missing(self.path, f"level {self.name!r} is listed in {self.path.parent} but")
        return self.info

    def zyx(self, stored: Sequence[int]) -> Shape:
        """Lengths along the stored axes, in the order z, y, x."""
        z, y, x = (int(stored[a]) for a in self.axes)
        return z, y, x


@dataclass(frozen=True)
class Multiscale:
    """One multiscale image.

    Attributes:
        path: the group's folder.
        levels: finest first, as listed.
        attributes: the group's attributes.
    """

    path: StorePath
    levels: tuple[Level, ...]
    attributes: Mapping[str, Any] = field(repr=False)

    @cached_property
    def present(self) -> tuple[Level, ...]:
        """The levels that are on disk.

        Raises:
            CellMapFileNotFoundError: none is.
        """
        found = tuple(level for level in self.levels if level.info is not None)
        if not found:
            raise missing(self.levels[0].path, f"{self.path}: none of its levels is on disk;")
        return found

    @property
    def finest(self) -> Level:
        """The finest level on disk."""
        return self.present[0]


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


#: Images that were read since somebody began to share them; None while nobody does.
_shared: dict[StorePath, Multiscale] | None = None
_sharing = threading.Lock()


@contextlib.contextmanager
def shared_metadata() -> Iterator[None]:
    """While it lasts, an image that was read is not read again: hundreds of crops lie in the same raw volume."""
    global _shared
    with _sharing:
        outer, _shared = _shared, {} if _shared is None else _shared
    try:
        with keeping():
            yield
    finally:
        with _sharing:
            _shared = outer


def read_multiscale(path: str | StorePath) -> Multiscale:
    """Read the multiscale image in the group ``path``.

    Raises:
        CellMapFileNotFoundError: ``path`` does not exist.
        MetadataError: it holds no multiscale image, or one that breaks the specification.
    """
    shared = _shared
    if shared is None:
        return _read_multiscale(path)
    key = located(path)
    found = shared.get(key)
    if found is None:
        found = shared[key] = _read_multiscale(key)
    return found


def _read_multiscale(path: str | StorePath) -> Multiscale:
    group = located(path)
    node = read_attributes(group)
    if node is None and not exists(group):
        raise missing(group, "image")
    file = group / ("zarr.json" if node and node[1] == 3 else ".zattrs")
    attributes = node[0] if node else {}
    ome = attributes.get("ome")
    scales = ome.get("multiscales") if isinstance(ome, dict) else None
    if scales is None:
        scales = attributes.get("multiscales")
    if not isinstance(scales, list) or not scales or not isinstance(scales[0], dict):
        names = children(group)
        raise MetadataError(
            f"{group} holds no OME-NGFF multiscale image (no 'multiscales' in {file.name})"
            + (f"; it holds {', '.join(names[:12])}" if names else "")
        )
    image = scales[0]
    stored, units = _axes(file, image)
    z, y, x = (stored.index(a) for a in AXES)
    datasets = image.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        raise MetadataError(f"{file}: 'datasets' should list the levels, got {datasets!r}")
    levels: list[Level] = []
    for entry in datasets:
        name = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name or ".." in PurePosixPath(name).parts or name.startswith("/"):
            raise MetadataError(f"{file}: a level's path should be a name inside the image, got {name!r}")
        scale, translation = np.ones(len(stored)), np.zeros(len(stored))
        where = f"{file}, level {name!r}"
        own, common = _transformations(where, entry), _transformations(where, image)
        if not any(isinstance(step, dict) and step.get("type") == "scale" for step in own):
            raise MetadataError(f"{where}: its coordinateTransformations have no scale, so its voxels have no size")
        for step in own + common:
            scale, translation = _compose(where, step, scale, translation)
        if not (np.isfinite(scale).all() and (scale > 0).all() and np.isfinite(translation).all()):
            raise MetadataError(
                f"{where}: scale must be positive and finite, got scale {scale.tolist()}, "
                f"translation {translation.tolist()}"
            )
        s, t = to_vector(scale[[z, y, x]] * units), to_vector(translation[[z, y, x]] * units)
        if levels and math.prod(s) < math.prod(levels[-1].scale) * (1 - SCALE_TOLERANCE):
            raise MetadataError(
                f"{where}: its voxels {list(s)} nm are finer than those of level {levels[-1].name!r} before it "
                f"({list(levels[-1].scale)} nm); levels are listed finest first"
            )
        levels.append(Level(group / name, name, s, t, (z, y, x), len(stored)))
    return Multiscale(group, tuple(levels), attributes)


def _axes(file: StorePath, image: dict[str, Any]) -> tuple[list[str], np.ndarray[Any, np.dtype[np.float64]]]:
    """Names of the stored axes, and the nm in one unit of z, y, x."""
    axes = image.get("axes")
    if not isinstance(axes, list) or not all(isinstance(a, dict) and isinstance(a.get("name"), str) for a in axes):
        raise MetadataError(f"{file}: 'axes' should be a list of objects with a name, got {axes!r}")
    names = [a["name"] for a in axes]
    if len(set(names)) != len(names) or not set(AXES) <= set(names):
        raise MetadataError(f"{file}: the axes z, y and x are needed once each, got {names}")
    units = []
    for name in AXES:
        unit = axes[names.index(name)].get("unit")
        if unit is None:
            log.warning("%s: axis %r has no unit; nanometre is assumed", file, name)
            unit = "nanometer"
        if not isinstance(unit, str) or unit not in UNITS_NM:
            raise MetadataError(f"{file}: axis {name!r} has the unit {unit!r}; one of {', '.join(UNITS_NM)} is needed")
        units.append(UNITS_NM[unit])
    return names, np.asarray(units)


def _transformations(where: str, node: dict[str, Any]) -> list[Any]:
    steps = node.get("coordinateTransformations") or []
    if not isinstance(steps, list):
        raise MetadataError(f"{where}: 'coordinateTransformations' should be a list, got {steps!r}")
    return steps


def _compose(where: str, step: Any, scale: Any, translation: Any) -> tuple[Any, Any]:
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "identity":
        return scale, translation
    value = step.get(kind) if kind in ("scale", "translation") else None
    good = isinstance(value, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value
    )
    if value is None or not good or len(value) != len(scale):
        raise MetadataError(f"{where}: needs a scale or translation of {len(scale)} numbers, got {step!r}")
    values = np.asarray(value, dtype=np.float64)
    if kind == "scale":
        return scale * values, translation * values
    return scale, translation + values


@dataclass(frozen=True)
class Encoding:
    """What the stored integers of a label array mean.

    Attributes:
        absent: value of voxels where the class is not.
        unknown: value of voxels that nobody annotated, or None where every value is meant.
        ambiguous: ``unknown`` could also be an instance's id, since nothing on disk rules it out.
    """

    absent: int
    unknown: int | None
    ambiguous: bool = False

    def present(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Whether each stored value says that the class is there."""
        there: npt.NDArray[np.bool_] = stored != self.absent
        if self.unknown is not None:
            there &= stored != self.unknown
        return there


def _annotation(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """CellMap's annotation block in the attributes of a group or an array, empty where there is none."""
    block = attributes.get("cellmap")
    block = block.get("annotation") if isinstance(block, dict) else None
    return block if isinstance(block, dict) else {}


def _whole(value: Any) -> int:
    number = int(value)
    if number != value:
        raise ValueError(f"{value!r} is not a whole number")
    return number


def read_encoding(image: Multiscale, level: Level) -> Encoding:
    """The encoding of a label level, from the array's own attributes, its finest level's, or the class group's.

    In an instance segmentation whose ``complement_counts.unknown`` is 0, the code of ``unknown`` is an instance.

    Raises:
        MetadataError: the encoding is malformed.
    """
    blocks = [
        _annotation(attributes)
        for attributes in (level.array.attributes, image.finest.array.attributes, image.attributes)
    ]
    kind: dict[str, Any] = next(
        (b["annotation_type"] for b in blocks if isinstance(b.get("annotation_type"), dict)), {}
    )
    codes = kind.get("encoding", {"absent": 0, "unknown": 255})
    try:
        absent, unknown = _whole(codes["absent"]), codes.get("unknown")
        unknown = None if unknown is None else _whole(unknown)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
        raise MetadataError(
            f"{image.path}: the annotation's encoding needs whole numbers for 'absent' and 'unknown', got {codes!r}"
        ) from e
    # Only the finest level's count says that nothing is unknown: a coarser one may have lost it in the pyramid.
    counts = _annotation(image.finest.array.attributes).get("complement_counts")
    counts = counts if isinstance(counts, dict) else {}
    if kind.get("type") == "instance_segmentation" and counts.get("unknown") == 0:
        return Encoding(absent, None)
    return Encoding(absent, unknown, ambiguous=kind.get("type") != "semantic_segmentation")
