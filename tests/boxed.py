"""A crop with a box, and the same place as a smaller crop in its own Zarr groups."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale

#: Edge of the raw volume and first voxel of the crop in it, voxels of 8 nm; nm of voxel edges.
VOLUME, CROP, SIZE = 112, 16, (80, 72, 88)
#: First voxel and end of the box, in voxels of the crop; neither lies on the chunks of 32 voxels.
START, END = (20, 12, 8), (70, 60, 78)
CLASSES = ["mito", "nuc"]


def labels(seed: int = 0) -> dict[str, np.ndarray]:
    """Return a mask with unknown voxels, and ids, with foreground inside and outside of the box."""
    rng = np.random.default_rng(seed)
    z, y, x = np.ogrid[: SIZE[0], : SIZE[1], : SIZE[2]]
    mito = np.zeros(SIZE, np.uint8)
    ids = np.zeros(SIZE, np.uint16)
    for number in range(1, 25):
        center = rng.uniform(0, SIZE)
        ball = (z - center[0]) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2 < rng.uniform(4, 10) ** 2
        (mito if number % 2 else ids)[ball] = 1 if number % 2 else number
    mito[30:40, 20:30, 60:] = 255
    return {"mito": mito, "nuc": ids}


def annotation(kind: str) -> dict[str, Any]:
    """Return CellMap's annotation attributes, without counts."""
    encoding = {"absent": 0, "present": 1, "unknown": 255}
    return {"cellmap": {"annotation": {"annotation_type": {"type": kind, "encoding": encoding}}}}


def write_crops(folder: Path, zarr_format: Literal[2, 3] = 2) -> tuple[str, str, str]:
    """Write raw, a crop, and the part of the crop in the box; return raw and the two target paths."""
    root = folder / "jrc_a.zarr"
    write_group(root, zarr_format=zarr_format)
    raw = np.random.default_rng(1).integers(1, 255, (VOLUME,) * 3, np.uint8)
    storage = ArrayOptions(chunks=(32, 32, 32), zarr_format=zarr_format)
    common: dict[str, Any] = {"scale": (8, 8, 8), "levels": 3, "storage": storage}
    write_multiscale(root / "recon-1/em/raw", raw, translation=(4, 4, 4), mode="mean", **common)
    box = tuple(slice(a, b) for a, b in zip(START, END, strict=True))
    for name, stored in labels().items():
        kind = "instance_segmentation" if name == "nuc" else "semantic_segmentation"
        at = 8 * CROP + 4
        corner = tuple(at + 8 * first for first in START)
        for crop, part, translation in (("crop1", stored, (at,) * 3), ("crop2", stored[box], corner)):
            attributes = annotation(kind)
            if name == "nuc":
                attributes["cellmap"]["annotation"]["complement_counts"] = {
                    "absent": int((part == 0).sum()),
                    "unknown": 0,
                }
            path = root / "recon-1/labels/groundtruth" / crop / name
            write_multiscale(path, part, translation=translation, mode="mode", attributes=attributes, **common)
    crops = [f"{root}/recon-1/labels/groundtruth/{crop}/[{','.join(CLASSES)}]" for crop in ("crop1", "crop2")]
    return f"{root}/recon-1/em/raw", crops[0], crops[1]


def nm(start: tuple[int, ...], end: tuple[int, ...]) -> dict[str, list[int]]:
    """Return a box of voxels of the crop in nm."""
    return {"min_nm": [8 * (CROP + n) for n in start], "max_nm": [8 * (CROP + n) for n in end]}


def voxels(start: tuple[int, ...], end: tuple[int, ...]) -> dict[str, list[int]]:
    """Return a box of voxels of the crop."""
    return {"min_voxels": list(start), "max_voxels": list(end)}
