"""Label arrays of the annotated crops, with the attributes that the field stores beside them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.demo.geometry import Array
from cellmap_lightning.demo.scene import Scene
from cellmap_lightning.demo.specimen import INSTANCE_CLASSES, LABEL_SCALE, MATERIAL_IDS, UNKNOWN, DemoCrop, membership
from cellmap_lightning.io.writer import ArrayOptions, ZarrFormat, write_group, write_multiscale


def write_crop(scene: Scene, folder: Path, crop: DemoCrop, zarr_format: ZarrFormat) -> None:
    """Write the label groups of a crop: one per annotated class, and ``all`` with the ids of all classes."""
    material, owner = scene.paint(crop.offset, crop.shape)
    about = {
        "version": "0.1.1",
        "name": crop.name,
        "description": "Synthetic; closed-form geometry, no specimen.",
        "created_by": [],
        "created_with": ["cellmap_lightning.demo.synthetic"],
        "start_date": None,
        "end_date": None,
        "duration_days": None,
        "protocol_uri": None,
        "class_names": list(crop.classes),
    }
    write_group(folder, {"cellmap": {"annotation": about}}, zarr_format)
    # Raw voxel 0 is centred on 0, so the volume's corner is half a raw voxel, one label voxel, before it.
    translation = [s * (o - 0.5) for s, o in zip(LABEL_SCALE, crop.offset, strict=True)]
    for name in (*crop.classes, "all"):
        is_class = name != "all"
        write_multiscale(
            folder / name,
            crop_label(name, crop, material, owner) if is_class else MATERIAL_IDS[material],
            scale=LABEL_SCALE,
            translation=translation,
            levels=3,
            mode="mode",
            storage=ArrayOptions(zarr_format=zarr_format),
            attributes={"cellmap": {"annotation": _annotation(name)}} if is_class else None,
            array_attributes=_level_attributes(name, name in crop.bare) if is_class else None,
        )


def crop_label(name: str, crop: DemoCrop, material: Array, owner: Array) -> Array:
    """Return the label array of a class in a crop.

    Args:
        name: the class.
        crop: the crop.
        material: material of each voxel, see `Scene.paint`.
        owner: object of each voxel, likewise.
    """
    label = membership(name)[material]
    if name not in INSTANCE_CLASSES:
        if name in crop.unknown:
            label[:, :, crop.shape[2] * 3 // 4 :] = UNKNOWN
        return label
    objects = label if name == "nuc" else label * owner
    numbers = np.unique(objects[objects > 0])
    # Ids need not start at 1; those of vesicles pass through the code for unknown, which no voxel of this array means.
    first, dtype = (UNKNOWN - 1, np.uint16) if name == "ves" else (1, np.uint8)
    # Objects are renumbered without gaps through a table of their numbers, which are bytes.
    ids = np.zeros(256, dtype)
    ids[numbers] = np.arange(first, first + len(numbers))
    return np.asarray(ids[objects])


def _annotation(name: str) -> dict[str, Any]:
    if name in INSTANCE_CLASSES:
        kind: dict[str, Any] = {"type": "instance_segmentation", "encoding": {"absent": 0, "unknown": UNKNOWN}}
    else:
        kind = {"type": "semantic_segmentation", "encoding": {"absent": 0, "present": 1, "unknown": UNKNOWN}}
    return {"class_name": name, "annotation_type": kind}


def _level_attributes(name: str, bare: bool) -> Callable[[int, Array], dict[str, Any]]:
    """Return a function that computes the attributes of a level: annotation and counts on ``s0``, none elsewhere."""

    def attributes(level: int, label: Array) -> dict[str, Any]:
        if level or bare:
            return {}
        unknown = 0 if name in INSTANCE_CLASSES else int(np.count_nonzero(label == UNKNOWN))
        counts = {"absent": label.size - int(np.count_nonzero(label)), "unknown": unknown}
        return {"cellmap": {"annotation": {**_annotation(name), "complement_counts": counts}}}

    return attributes
