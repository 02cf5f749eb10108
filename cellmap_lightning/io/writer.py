"""Writing of multiscale groups: OME-NGFF 0.4 in Zarr v2, OME-NGFF 0.5 in Zarr v3.

Two conventions hold everywhere. A ``translation`` is the **centre** of voxel 0, so that a level whose voxels are ``f``
times as large starts at ``t + s * (f - 1) / 2`` and covers the same physical box as level 0. And a ragged last plane,
too thin for a window, is **dropped**: the box of a coarse level then ends up to ``f - 1`` fine voxels early, but every
voxel is computed from data alone.
"""

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Never, get_args

import zarr
import zarr.codecs
from numpy.typing import NDArray

from cellmap_lightning.errors import CellMapFileExistsError, CellMapValueError
from cellmap_lightning.flat_options import refuse_flat
from cellmap_lightning.io.downsampling import downsample_mean, downsample_mode
from cellmap_lightning.io.object_folder import ObjectFolder, OutputPath, zarr_location
from cellmap_lightning.validation import one_of

__all__ = [
    "ArrayOptions",
    "ImageDescription",
    "check_room",
    "codec_of",
    "create_level",
    "make_room",
    "multiscale_attributes",
    "write_group",
    "write_multiscale",
]

Compressor = Literal["zstd", "lz4", "gzip"]
ZarrFormat = Literal[2, 3]

_NODE_FILES = (".zgroup", ".zarray", "zarr.json")
_RESERVED = ("multiscales", "ome")


@dataclass(frozen=True, kw_only=True)
class ArrayOptions:
    """The form in which the arrays of a multiscale group are stored, the same for every level.

    Example:
        >>> ArrayOptions(zarr_format=3, chunks=(32, 32, 32), shards=(128, 128, 128)).compressor
        'zstd'

    Attributes:
        zarr_format: 2 writes OME-NGFF 0.4, 3 writes OME-NGFF 0.5.
        chunks: Chunk shape in voxels.
        shards: Shard shape in voxels, a multiple of ``chunks``; Zarr v3 only.
        compressor: ``"zstd"`` and ``"lz4"`` are inside Blosc; None stores plain bytes.

    Raises:
        CellMapValueError: An option is invalid, or they contradict each other.
    """

    zarr_format: ZarrFormat = 2
    chunks: Sequence[int] = (64, 64, 64)
    shards: Sequence[int] | None = None
    compressor: Compressor | None = "zstd"

    def __post_init__(self) -> None:
        one_of("zarr_format", self.zarr_format, get_args(ZarrFormat))
        codec_of(self.compressor, self.zarr_format)
        object.__setattr__(self, "chunks", tuple(int(c) for c in self.chunks))
        if any(c < 1 for c in self.chunks):
            raise CellMapValueError(f"chunks {self.chunks} must be positive")
        if self.shards is None:
            return
        object.__setattr__(self, "shards", tuple(int(s) for s in self.shards))
        if self.zarr_format == 2:
            raise CellMapValueError("shards need zarr_format=3: Zarr v2 has no sharding")
        pairs = zip(self.shards, self.chunks, strict=False)
        if len(self.shards) != len(self.chunks) or any(s < 1 or s % c for s, c in pairs):
            raise CellMapValueError(f"shards {self.shards} must be multiples of chunks {self.chunks}")


@dataclass(frozen=True, kw_only=True)
class ImageDescription:
    """The name of a multiscale image, and its spatial axes.

    Example:
        >>> ImageDescription(axes=("y", "x")).unit
        'nanometer'

    Attributes:
        name: Name of the multiscale; the folder's name when None.
        axes: Names of the spatial axes, in the order of the array.
        unit: Unit of lengths, as OME-NGFF spells it.
    """

    name: str | None = None
    axes: Sequence[str] = ("z", "y", "x")
    unit: str = "nanometer"


def codec_of(compressor: Compressor | None, zarr_format: int, level: int = 5) -> Any:
    """Return the ``compressors`` argument of `zarr.create_array` for the name of a compressor.

    Args:
        compressor: its name, or None.
        zarr_format: 2 or 3.
        level: compression level, from 1 to 9.
    """
    if compressor is None:
        return None
    one_of("compressor", compressor, ("zstd", "lz4", "gzip", None))
    if compressor == "gzip":
        return {"id": "gzip", "level": level} if zarr_format == 2 else zarr.codecs.GzipCodec(level=level)
    if zarr_format == 2:
        return {"id": "blosc", "cname": compressor, "clevel": level, "shuffle": 1, "blocksize": 0}
    return zarr.codecs.BloscCodec(cname=compressor, clevel=level, shuffle="shuffle")


def make_room(path: Path, overwrite: bool) -> None:
    """Remove the Zarr group or array at ``path``, if there is one and ``overwrite`` is set.

    Raises:
        CellMapFileExistsError: see `check_room`.
    """
    check_room(path, overwrite)
    if path.exists():
        shutil.rmtree(path)


def check_room(path: Path, overwrite: bool) -> None:
    """Check that `make_room` may remove what is at ``path``.

    Raises:
        CellMapFileExistsError: ``path`` exists and ``overwrite`` is not set, or it is not a Zarr group or array.
    """
    if not path.exists():
        return
    if not overwrite:
        raise CellMapFileExistsError(f"{path} exists already; choose another path or pass overwrite=True")
    is_node = path.is_dir() and (any((path / name).is_file() for name in _NODE_FILES) or not any(path.iterdir()))
    if not is_node:
        raise CellMapFileExistsError(
            f"{path} is neither a Zarr group nor a Zarr array: it is not removed, even with overwrite=True"
        )


def write_group(
    path: str | os.PathLike[str] | ObjectFolder,
    attributes: Mapping[str, Any] | None = None,
    zarr_format: ZarrFormat = 2,
) -> None:
    """Create a Zarr group at ``path`` unless there is one, and merge ``attributes`` into its attributes.

    Args:
        path: Folder of the group. Its parents are created as folders, but not as groups.
        attributes: JSON-like attributes; keys that the group has already are replaced.
        zarr_format: 2 or 3. A group of the other format is an error.

    Raises:
        CellMapFileExistsError: If an array, a group of the other format or a file is there.
    """
    one_of("zarr_format", zarr_format, (2, 3))
    path = path if isinstance(path, ObjectFolder) else Path(path)
    group_file = ".zgroup" if zarr_format == 2 else "zarr.json"
    if path.exists() and not path.is_dir():
        raise CellMapFileExistsError(f"{path} is a file; a Zarr group is a folder")
    if any((path / name).exists() for name in _NODE_FILES):
        try:
            group = zarr.open_group(zarr_location(path), mode="r+", zarr_format=zarr_format, use_consolidated=False)
        except (FileNotFoundError, ValueError) as error:
            raise CellMapFileExistsError(
                f"{path} is not a Zarr v{zarr_format} group; expected the {group_file} of a group"
            ) from error
        if attributes:
            group.update_attributes(dict(attributes))
        return
    zarr.create_group(zarr_location(path), zarr_format=zarr_format, attributes=dict(attributes or {}))


def create_level(
    path: OutputPath,
    shape: Sequence[int],
    dtype: Any,
    chunks: Sequence[int],
    zarr_format: ZarrFormat,
    codec: Any,
    shards: Sequence[int] | None = None,
    axes: Sequence[str] = ("z", "y", "x"),
    attributes: dict[str, Any] | None = None,
    fill_value: float = 0,
) -> zarr.Array[Any]:
    """Create the array of a level below a group.

    Args:
        path: folder of the array.
        shape: voxels along each axis.
        dtype: type of a voxel.
        chunks: voxels of a chunk.
        zarr_format: 2 or 3.
        codec: one codec, several, or None, as `zarr.create_array` takes them.
        shards: voxels of a shard; Zarr v3 only.
        axes: names of the axes.
        attributes: attributes of the array.
        fill_value: value of voxels that are not written.
    """
    v3: dict[str, Any] = {"dimension_names": tuple(axes), "shards": shards} if zarr_format == 3 else {}
    return zarr.create_array(
        zarr_location(path),
        shape=tuple(shape),
        dtype=dtype,
        chunks=tuple(chunks),
        compressors=codec,
        fill_value=fill_value,
        zarr_format=zarr_format,
        chunk_key_encoding={"name": "v2" if zarr_format == 2 else "default", "separator": "/"},
        attributes=attributes,
        **v3,
    )


def multiscale_attributes(
    name: str,
    scale: Sequence[float],
    translation: Sequence[float],
    levels: int,
    factors: Sequence[int] = (2, 2, 2),
    zarr_format: ZarrFormat = 2,
    axes: Sequence[str] = ("z", "y", "x"),
    unit: str = "nanometer",
    steps: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Return the attributes of a multiscale image with arrays ``s0 .. s{levels - 1}``.

    Args:
        name: name of the multiscale.
        scale: voxel size of level 0 per axis.
        translation: centre of voxel 0 of level 0 per axis.
        levels: number of levels.
        factors: voxels of one level that make one of the next.
        zarr_format: 2 for OME-NGFF 0.4, 3 for 0.5.
        axes: names of the axes.
        unit: unit of the lengths.
        steps: ``factors`` of each level but the last, where they are not the same.
    """
    datasets = []
    powers = [1] * len(axes)
    for level in range(levels):
        if level:
            powers = [p * f for p, f in zip(powers, steps[level - 1] if steps else factors, strict=True)]
        datasets.append(
            {
                "path": f"s{level}",
                "coordinateTransformations": [
                    {"type": "scale", "scale": [s * p for s, p in zip(scale, powers, strict=True)]},
                    {
                        "type": "translation",
                        "translation": [
                            t + s * (p - 1) / 2 for t, s, p in zip(translation, scale, powers, strict=True)
                        ],
                    },
                ],
            }
        )
    multiscale: dict[str, Any] = {
        "name": name,
        "axes": [{"name": axis, "type": "space", "unit": unit} for axis in axes],
        "datasets": datasets,
    }
    if zarr_format == 2:
        return {"multiscales": [{"version": "0.4", **multiscale}]}
    return {"ome": {"version": "0.5", "multiscales": [multiscale]}}


def _per_axis(name: str, values: Sequence[Any], axes: Sequence[str]) -> tuple[Any, ...]:
    if len(values) != len(axes):
        raise CellMapValueError(f"{name} {tuple(values)} has {len(values)} entries; the axes are {', '.join(axes)}")
    return tuple(values)


def write_multiscale(
    path: str | os.PathLike[str],
    data: NDArray[Any],
    *,
    scale: Sequence[float],
    translation: Sequence[float],
    levels: int = 1,
    mode: Literal["mean", "mode"] = "mean",
    factors: Sequence[int] = (2, 2, 2),
    storage: ArrayOptions | None = None,
    description: ImageDescription | None = None,
    attributes: Mapping[str, Any] | None = None,
    array_attributes: Callable[[int, NDArray[Any]], Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    **flat: Never,
) -> None:
    """Write an array and its pyramid as a multiscale group with arrays ``s0 .. s{levels - 1}``.

    The multiscale metadata are written last: a group that has them is complete. Metadata are never consolidated, since
    a consolidated copy would be stale as soon as a class is added to a parent group.

    Args:
        path: Local folder of the group.
        data: Level 0, one axis per entry of the description's axes.
        scale: Voxel size of level 0 per axis, in the description's unit.
        translation: Centre of voxel 0 of level 0 per axis, in the same unit.
        levels: Number of levels, level 0 included.
        mode: ``"mean"`` for intensities (see `downsample_mean`), ``"mode"`` for labels (see `downsample_mode`).
        factors: Voxels of one level that make one of the next, per axis.
        storage: Format, chunks and compression of the arrays.
        description: Name, axes and unit of the image.
        attributes: More attributes of the group. ``multiscales`` and ``ome`` belong to this function.
        array_attributes: Called with each level's number and array; what it returns becomes that array's attributes.
        overwrite: Replace a Zarr group or array that is at ``path``.
        flat: None; options that are given flat are an error that names their dataclass.

    Raises:
        CellMapFileExistsError: If ``path`` exists and ``overwrite`` is False, or is not a Zarr node.
        CellMapValueError: If the arguments contradict each other or ``levels`` is more than the shape allows.
        CellMapTypeError: If the dtype has no mean, or no mode; or an argument is unknown.

    Example:
        >>> write_multiscale("crop1/raw", raw, scale=(8, 8, 8), translation=(4, 4, 4), levels=3)
        >>> write_multiscale("crop1/mito", labels, scale=(8, 8, 8), translation=(4, 4, 4), mode="mode")
    """
    refuse_flat(write_multiscale, flat, {"storage": ArrayOptions, "description": ImageDescription})
    path, storage, description = Path(path), storage or ArrayOptions(), description or ImageDescription()
    axes, zarr_format = description.axes, storage.zarr_format
    pyramid = _Pyramid(data.shape, scale, translation, levels, factors, axes)
    chunks = _per_axis("chunks", storage.chunks, axes)
    shards = None if storage.shards is None else _per_axis("shards", storage.shards, axes)
    one_of("mode", mode, ("mean", "mode"))
    reserved = [key for key in _RESERVED if key in (attributes or {})]
    if reserved:
        raise CellMapValueError(
            f"attributes must not contain {', '.join(reserved)}: these are written from the arguments"
        )
    codec = codec_of(storage.compressor, zarr_format)

    make_room(path, overwrite)
    write_group(path, zarr_format=zarr_format)
    array = data
    for level in range(levels):
        if level:
            downsample = downsample_mean if mode == "mean" else downsample_mode
            array = downsample(array, pyramid.factors)
        target = create_level(
            path / f"s{level}", array.shape, array.dtype, chunks, zarr_format, codec, shards, axes,
            dict(array_attributes(level, array)) if array_attributes else None,
        )  # fmt: skip
        target[...] = array

    block = multiscale_attributes(
        path.name if description.name is None else description.name, pyramid.scale, pyramid.translation, levels,
        pyramid.factors, zarr_format, axes, description.unit,
    )  # fmt: skip
    write_group(path, {**(attributes or {}), **block}, zarr_format)


class _Pyramid:
    """The checked geometry of a pyramid; see `write_multiscale` for the arguments."""

    def __init__(
        self,
        shape: Sequence[int],
        scale: Sequence[float],
        translation: Sequence[float],
        levels: int,
        factors: Sequence[int],
        axes: Sequence[str],
    ) -> None:
        if len(shape) != len(axes) or len(set(axes)) != len(axes):
            raise CellMapValueError(
                f"axes {tuple(axes)} do not name the {len(shape)} axes of an array of shape {tuple(shape)}"
            )
        self.scale = tuple(float(s) for s in _per_axis("scale", scale, axes))
        self.translation = tuple(float(t) for t in _per_axis("translation", translation, axes))
        self.factors = tuple(int(f) for f in _per_axis("factors", factors, axes))
        if any(not math.isfinite(s) or s <= 0 for s in self.scale) or not all(map(math.isfinite, self.translation)):
            raise CellMapValueError(
                f"scale {self.scale} must be positive and, like translation {self.translation}, finite"
            )
        if levels < 1 or any(n < f ** (levels - 1) for n, f in zip(shape, self.factors, strict=True)):
            raise CellMapValueError(
                f"levels is {levels}: shape {tuple(shape)} with factors {self.factors} does not have that many"
            )
