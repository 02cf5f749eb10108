"""Small volumes written with zarr-python and json alone, as other programs write them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cellmap_lightning.crops.options import ReadOptions
from tests.make import make_dataset

SIZE = 32
FORMATS = [2, 3]
SEMANTIC = {"type": "semantic_segmentation", "encoding": {"absent": 0, "present": 1, "unknown": 255}}
INSTANCE = {"type": "instance_segmentation", "encoding": {"absent": 0, "unknown": 255}}


def ramp(shape=(SIZE,) * 3, dtype="u1"):
    z, y, x = np.indices(shape)
    return ((z * 3 + y * 5 + x * 7) % 200 + 1).astype(dtype)


def cube(value=1, dtype="u1", size=SIZE):
    """A cube of foreground, half as long as the array."""
    labels = np.zeros((size,) * 3, dtype)
    labels[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = value
    return labels


def annotated(kind=None, counts=None):
    block = {"class_name": "mito"}
    if kind is not None:
        block["annotation_type"] = kind
    if counts is not None:
        block["complement_counts"] = counts
    return {"cellmap": {"annotation": block}}


def counts_of(labels, unknown=255):
    return {"absent": int((labels == 0).sum()), "unknown": int((labels == unknown).sum())}


def write_group(path, attributes, zarr_format=2):
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if zarr_format == 2:
        (path / ".zgroup").write_text('{"zarr_format": 2}')
        (path / ".zattrs").write_text(json.dumps(attributes))
    else:
        node = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        (path / "zarr.json").write_text(json.dumps(node))


def multiscale(levels, axes="zyx", unit="nanometer", version="0.4", **more):
    """The metadata of an image; levels are ``{name: (scale, translation or None)}``."""
    described = [{"name": a, "type": "space", **({"unit": unit} if unit is not None else {})} for a in axes]
    datasets = []
    for name, (scale, translation) in levels.items():
        steps = [{"type": "scale", "scale": [float(s) for s in scale]}]
        if translation is not None:
            steps.append({"type": "translation", "translation": [float(t) for t in translation]})
        datasets.append({"path": name, "coordinateTransformations": steps})
    return {"version": version, "name": "image", "axes": described, "datasets": datasets, **more}


def write_image(
    path, arrays, scale=(8, 8, 8), translation=None, zarr_format=2, nested=True, chunks=16, attributes=None,
    array_attributes=None, unit="nanometer", levels=None, **zarr_options,
):  # fmt: skip
    """Write an image.

    Args:
        path: the group.
        arrays: voxels of ``s0``, or ``{name: voxels}``.
        scale: of ``s0``.
        translation: likewise.
        zarr_format: 2 or 3.
        nested: chunks in folders.
        chunks: voxels along each axis.
        attributes: more attributes of the group.
        array_attributes: of ``s0``.
        unit: of all axes; None for none.
        levels: ``{name: (scale, translation or None)}`` where there are several.
        zarr_options: of ``zarr.create_array``.
    """
    arrays = arrays if isinstance(arrays, dict) else {"s0": arrays}
    image = multiscale(levels or {"s0": (scale, translation)}, unit=unit)
    if zarr_format == 2:
        block: dict[str, Any] = {"multiscales": [image]}
    else:
        image.pop("version")
        block = {"ome": {"version": "0.5", "multiscales": [image]}}
    write_group(path, {**block, **(attributes or {})}, zarr_format)
    keys = {"name": "v2" if zarr_format == 2 else "default", "separator": "/" if nested else "."}
    for name, data in arrays.items():
        options = {"chunk_key_encoding": keys, **zarr_options}
        array = zarr.create_array(
            f"{path}/{name}", shape=data.shape, chunks=tuple(min(chunks, n) for n in data.shape), dtype=data.dtype,
            zarr_format=zarr_format, attributes=array_attributes if name == "s0" else None, **options,
        )  # fmt: skip
        array[...] = data
    return Path(path)


def write_pair(root, labels, raw=None, *, crop="crop1", zarr_format=2, scale=(8, 8, 8), **of_labels):
    """Raw and one class of a crop; returns both paths."""
    root = Path(root)
    em = root / "v.zarr" / "em"
    if not em.exists():
        write_image(em, ramp() if raw is None else raw, scale, zarr_format=zarr_format)
    write_image(root / "v.zarr" / crop / "mito", labels, scale, zarr_format=zarr_format, **of_labels)
    return str(em), f"{root}/v.zarr/{crop}/[mito]"


def metadata_file(path, zarr_format=2, name="s0"):
    return Path(path) / name / (".zarray" if zarr_format == 2 else "zarr.json")


def edit(file, change):
    """Change the JSON of a file in place."""
    content = json.loads(Path(file).read_text())
    change(content)
    Path(file).write_text(json.dumps(content))


def dataset(raw, target, size=SIZE, scale=(8, 8, 8), classes=("mito",), **options):
    array = {"shape": [size] * 3, "scale": list(scale)}
    return make_dataset(
        raw,
        target,
        list(classes),
        {"raw": array},
        {"labels": array},
        read=ReadOptions(cache="none", max_workers=2),
        **options,
    )


def sample(raw, target, **options):
    """The first sample as arrays, ``{name: [z, y, x]}`` of the first channel."""
    with dataset(raw, target, **options) as data:
        return {name: np.asarray(value)[0] for name, value in data[0].items() if name in ("raw", "labels")}


def remove_chunks(level):
    for entry in Path(level).iterdir():
        if entry.name not in (".zarray", ".zattrs", "zarr.json"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
