"""`cellmap_data.utils.metadata`: OME-NGFF 0.4 metadata of multiscale images."""

import json
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from cellmap_lightning.geometry.lattice import vector
from cellmap_lightning.io.ngff import read_multiscale


def generate_base_multiscales_metadata(
    ds_name: str,
    scale_level: int,
    voxel_size: Sequence[float],
    translation: Sequence[float],
    units: str,
    axes: Sequence[str],
) -> dict[str, Any]:
    """Return the metadata of an image with one level.

    Args:
        ds_name: name of the image; of a path, what follows ``.zarr``.
        scale_level: number of the level.
        voxel_size: in the order of the axes.
        translation: centre of voxel 0.
        units: unit of all axes.
        axes: names of the axes.
    """
    image = {
        "axes": [{"name": axis, "type": "space", "unit": units} for axis in axes],
        "coordinateTransformations": [{"scale": [1.0] * len(axes), "type": "scale"}],
        "datasets": [_level(scale_level, voxel_size, translation)],
        "name": ds_name.rpartition(".zarr")[2],
        "version": "0.4",
    }
    return {"multiscales": [image]}


def add_multiscale_metadata_levels(
    multsc: MutableMapping[str, Any], base_scale_level: int, levels_to_add: int
) -> MutableMapping[str, Any]:
    """Add levels of twice the voxel size each to metadata, in place, and return it.

    Args:
        multsc: metadata with the first level.
        base_scale_level: number of that level.
        levels_to_add: how many to add.
    """
    levels = multsc["multiscales"][0]["datasets"]
    first = {kind: value for item in levels[0]["coordinateTransformations"] for kind, value in item.items()}
    for number in range(1, levels_to_add + 1):
        factor = 2**number
        scale = [s * factor for s in first["scale"]]
        # The centre of the first voxel moves, its lower edge stays.
        translation = [t + s * (factor - 1) / 2 for t, s in zip(first["translation"], first["scale"], strict=True)]
        levels.append(_level(base_scale_level + number, scale, translation))
    return multsc


def create_multiscale_metadata(
    ds_name: str,
    voxel_size: Sequence[float],
    translation: Sequence[float],
    units: str,
    axes: Sequence[str],
    base_scale_level: int = 0,
    levels_to_add: int = 0,
    out_path: str | None = None,
) -> dict[str, Any] | None:
    """Return the metadata of an image, or write it to a file.

    Args:
        ds_name: see `generate_base_multiscales_metadata`, as for what is not described here.
        voxel_size: see there.
        translation: see there.
        units: see there.
        axes: see there.
        base_scale_level: number of the first level.
        levels_to_add: how many coarser ones there are.
        out_path: the file to write; None to return the metadata.
    """
    found = generate_base_multiscales_metadata(ds_name, base_scale_level, voxel_size, translation, units, axes)
    add_multiscale_metadata_levels(found, base_scale_level, levels_to_add)
    if out_path is None:
        return found
    write_metadata(found, out_path)
    return None


def write_metadata(z_attrs: Mapping[str, Any], out_path: str) -> None:
    """Write metadata to a JSON file."""
    Path(out_path).write_text(json.dumps(z_attrs, indent=4), encoding="utf-8")


def find_level(path: str, target_scale: Mapping[str, float]) -> str:
    """Return the coarsest level that is not coarser than asked for along any axis, else the finest.

    Args:
        path: the multiscale group.
        target_scale: ``{axis: nm}``.
    """
    levels = read_multiscale(path).levels
    asked = vector(target_scale, "target_scale")
    fine = [level for level in levels if all(s <= a for s, a in zip(level.scale, asked, strict=True))]
    return (fine[-1] if fine else levels[0]).name


def _level(number: int, scale: Sequence[float], translation: Sequence[float]) -> dict[str, Any]:
    steps = [{"scale": list(scale), "type": "scale"}, {"translation": list(translation), "type": "translation"}]
    return {"coordinateTransformations": steps, "path": f"s{number}"}
