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
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
import zarr.codecs
from numpy.typing import NDArray

from cellmap_lightning.errors import CellMapFileExistsError, CellMapTypeError, CellMapValueError
from cellmap_lightning.io.object_folder import ObjectFolder, OutputPath, zarr_location
from cellmap_lightning.validation import one_of

__all__ = [
    "codec_of",
    "create_level",
    "downsample_mean",
    "downsample_mode",
    "make_room",
    "multiscale_attributes",
    "write_group",
    "write_multiscale",
]

Compressor = Literal["zstd", "lz4", "gzip"]
ZarrFormat = Literal[2, 3]

_NODE_FILES = (".zgroup", ".zarray", "zarr.json")
_RESERVED = ("multiscales", "ome")


# ---------------------------------------------------------------------------------------------------- the pyramid


def _window_parts(data: NDArray[Any], factors: Sequence[int]) -> list[NDArray[Any]]:
    """Return the members of every window, as ``prod(factors)`` strided views of one common shape."""
    if len(factors) != data.ndim or any(f < 1 for f in factors):
        raise CellMapValueError(
            f"factors {tuple(factors)} do not fit an array of shape {data.shape}: one integer >= 1 each"
        )
    shape = [n // f for n, f in zip(data.shape, factors, strict=True)]
    if 0 in shape:
        raise CellMapValueError(f"an array of shape {data.shape} has no whole window of {tuple(factors)} voxels")
    return [
        data[tuple(slice(o, o + n * f, f) for o, n, f in zip(offsets, shape, factors, strict=True))]
        for offsets in product(*(range(f) for f in factors))
    ]


def _axis_sums(data: NDArray[Any], factors: Sequence[int], wide: np.dtype[Any]) -> NDArray[Any]:
    """Return the sum of every window, computed axis by axis, so that most of the work runs along whole rows."""
    sums: NDArray[Any] = data
    for axis, factor in enumerate(factors):
        end = sums.shape[axis] // factor * factor
        before = (slice(None),) * axis
        members = [sums[(*before, slice(o, end, factor))] for o in range(factor)]
        sums = members[0].astype(wide) if factor == 1 else np.add(members[0], members[1], dtype=wide)
        for member in members[2:]:
            sums += member
    return sums


def downsample_mean(data: NDArray[Any], factors: Sequence[int] = (2, 2, 2)) -> NDArray[Any]:
    """Average every window of ``factors`` voxels.

    Integers are summed exactly and rounded to nearest, halves upwards, so that repeated levels do not darken.

    Args:
        data: Integer or floating array.
        factors: Window size in voxels, one per axis.

    Returns:
        Array of the same dtype and of shape ``data.shape[i] // factors[i]``.

    Raises:
        CellMapTypeError: If the dtype has no mean (booleans, strings).
        CellMapValueError: If the array is smaller than one window.
    """
    parts = _window_parts(data, factors)
    n = len(parts)
    if data.dtype.kind == "f":
        total = np.zeros(parts[0].shape, np.float64)
        for part in parts:
            total += part
        return (total / n).astype(data.dtype)
    if data.dtype.kind not in "iu":
        raise CellMapTypeError(f"cannot average dtype {data.dtype}; integers and floats have a mean")
    # Sums fit into twice as many bits for any sensible window; there is no integer type wider than eight bytes.
    bits = data.dtype.itemsize * 8
    if bits < 64 and n <= 1 << bits - 1:
        sums = _axis_sums(data, factors, np.dtype(f"{data.dtype.kind}{data.dtype.itemsize * 2}"))
        sums += sums.dtype.type(n // 2)
        if n & n - 1:
            sums //= sums.dtype.type(n)
        else:  # a shift is several times as fast as a division
            sums >>= sums.dtype.type(n.bit_length() - 1)
        return sums.astype(data.dtype)
    # Without a wider type: quotients and remainders by n are summed separately, so that nothing overflows.
    quotient = np.zeros(parts[0].shape, data.dtype)
    remainder = np.zeros(parts[0].shape, np.int64)
    for part in parts:
        whole = part // n
        quotient += whole
        remainder += (part - whole * n).astype(np.int64)
    quotient += ((remainder + n // 2) // n).astype(data.dtype)
    return quotient


def downsample_mode(data: NDArray[Any], factors: Sequence[int] = (2, 2, 2)) -> NDArray[Any]:
    """Take the most frequent value of every window of ``factors`` voxels.

    A tie goes to the smaller value: background before foreground, foreground before ``unknown``.

    Args:
        data: Integer or boolean array.
        factors: Window size in voxels, one per axis.

    Returns:
        Array of the same dtype and of shape ``data.shape[i] // factors[i]``.

    Raises:
        CellMapTypeError: If the dtype is not one of labels.
        CellMapValueError: If the array is smaller than one window.
    """
    if data.dtype.kind not in "iub":
        raise CellMapTypeError(f"cannot take the mode of dtype {data.dtype}; labels are integers")
    parts = _window_parts(data, factors)
    least = parts[0].copy()
    most = parts[0].copy()
    for part in parts[1:]:
        np.minimum(least, part, out=least)
        np.maximum(most, part, out=most)
    # Nearly all windows of a label volume hold one value; only the others are sorted.
    mixed = np.nonzero(least != most)
    if mixed[0].size:
        members = np.sort(np.stack([part[mixed] for part in parts]), axis=0)
        # The longest run of equal values wins; of equally long runs the first, which has the smaller value.
        winner = members[0].copy()
        run = np.ones(winner.shape, np.int32)
        longest = run.copy()
        for before, value in pairwise(members):
            run = np.where(value == before, run + 1, 1).astype(np.int32)
            better = run > longest
            winner[better] = value[better]
            np.maximum(longest, run, out=longest)
        least[mixed] = winner
    return least


# ---------------------------------------------------------------------------------------------------- the groups


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
    shutil.rmtree(path)


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
    zarr_format: ZarrFormat = 2,
    chunks: Sequence[int] = (64, 64, 64),
    shards: Sequence[int] | None = None,
    compressor: Compressor | None = "zstd",
    axes: Sequence[str] = ("z", "y", "x"),
    unit: str = "nanometer",
    name: str | None = None,
    attributes: Mapping[str, Any] | None = None,
    array_attributes: Callable[[int, NDArray[Any]], Mapping[str, Any]] | None = None,
    overwrite: bool = False,
) -> None:
    """Write an array and its pyramid as a multiscale group with arrays ``s0 .. s{levels - 1}``.

    The multiscale metadata are written last: a group that has them is complete. Metadata are never consolidated, since
    a consolidated copy would be stale as soon as a class is added to a parent group.

    Args:
        path: Local folder of the group.
        data: Level 0, one axis per entry of ``axes``.
        scale: Voxel size of level 0 per axis, in ``unit``.
        translation: Centre of voxel 0 of level 0 per axis, in ``unit``.
        levels: Number of levels, level 0 included.
        mode: ``"mean"`` for intensities (see `downsample_mean`), ``"mode"`` for labels (see `downsample_mode`).
        factors: Voxels of one level that make one of the next, per axis.
        zarr_format: 2 writes OME-NGFF 0.4, 3 writes OME-NGFF 0.5.
        chunks: Chunk shape in voxels, the same for every level.
        shards: Shard shape in voxels, a multiple of ``chunks``; Zarr v3 only.
        compressor: ``"zstd"`` and ``"lz4"`` are inside Blosc; None stores plain bytes.
        axes: Names of the spatial axes, in the order of the array.
        unit: Unit of ``scale`` and ``translation``, as OME-NGFF spells it.
        name: Name of the multiscale; the folder's name when None.
        attributes: More attributes of the group. ``multiscales`` and ``ome`` belong to this function.
        array_attributes: Called with each level's number and array; what it returns becomes that array's attributes.
        overwrite: Replace a Zarr group or array that is at ``path``.

    Raises:
        CellMapFileExistsError: If ``path`` exists and ``overwrite`` is False, or is not a Zarr node.
        CellMapValueError: If the arguments contradict each other or ``levels`` is more than the shape allows.
        CellMapTypeError: If the dtype has no mean, or no mode.

    Example:
        >>> write_multiscale("crop1/raw", raw, scale=(8, 8, 8), translation=(4, 4, 4), levels=3)
        >>> write_multiscale("crop1/mito", labels, scale=(8, 8, 8), translation=(4, 4, 4), mode="mode")
    """
    path = Path(path)
    pyramid = _Pyramid(data.shape, scale, translation, levels, factors, axes)
    chunks, shards = _checked_chunks(chunks, shards, axes, zarr_format)
    one_of("zarr_format", zarr_format, (2, 3))
    one_of("mode", mode, ("mean", "mode"))
    reserved = [key for key in _RESERVED if key in (attributes or {})]
    if reserved:
        raise CellMapValueError(
            f"attributes must not contain {', '.join(reserved)}: these are written from the arguments"
        )
    codec = codec_of(compressor, zarr_format)

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
        path.name if name is None else name, pyramid.scale, pyramid.translation, levels, pyramid.factors, zarr_format,
        axes, unit,
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


def _checked_chunks(
    chunks: Sequence[int], shards: Sequence[int] | None, axes: Sequence[str], zarr_format: int
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return the shapes of chunks and shards as integers.

    Raises:
        CellMapValueError: they are not positive, or do not fit each other or the format.
    """
    chunks = tuple(int(c) for c in _per_axis("chunks", chunks, axes))
    if any(c < 1 for c in chunks):
        raise CellMapValueError(f"chunks {chunks} must be positive")
    if shards is None:
        return chunks, None
    shards = tuple(int(s) for s in _per_axis("shards", shards, axes))
    if zarr_format == 2:
        raise CellMapValueError("shards need zarr_format=3: Zarr v2 has no sharding")
    if any(s < 1 or s % c for s, c in zip(shards, chunks, strict=True)):
        raise CellMapValueError(f"shards {shards} must be multiples of chunks {chunks}")
    return chunks, shards
