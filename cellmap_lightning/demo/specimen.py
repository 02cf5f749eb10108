"""Classes, materials, voxel lattices and annotated crops of the synthetic volume."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

CLASS_IDS: Mapping[str, int] = {
    "ecs": 1,
    "pm": 2,
    "mito_mem": 3,
    "mito_lum": 4,
    "ves_mem": 8,
    "ves_lum": 9,
    "er_mem": 16,
    "er_lum": 17,
    "cyto": 35,
    "nuc": 37,
    "ves": 41,
    "mito": 50,
    "er": 51,
}
"""The classes of the volume and their ids in the CellMap challenge."""

TRAIN_CLASSES = ("mito", "er", "nuc", "pm")
"""Classes that a small network learns from local texture; every one occurs in the training and the validation crops."""

INSTANCE_CLASSES = ("mito", "nuc", "ves")
"""Classes whose labels are ids of objects."""

UNKNOWN = 255
"""Code of unknown voxels in semantic labels."""

RAW_SCALE = (5.24, 4.0, 4.0)
RAW_SHAPE = (128, 320, 320)
LABEL_SCALE = tuple(s / 2 for s in RAW_SCALE)
LABEL_SHAPE = tuple(2 * n for n in RAW_SHAPE)
EXTENT = tuple(s * n for s, n in zip(RAW_SCALE, RAW_SHAPE, strict=True))
"""Size of the volume, nm."""


class Material(IntEnum):
    """The material of a label voxel; finer than the classes, because the layers of one class differ in shade."""

    ECS = 0
    PM = 1
    CYTO = 2
    MITO_MEM = 3
    MITO_GAP = 4
    MITO_LUM = 5
    ER_MEM = 6
    ER_LUM = 7
    VES_MEM = 8
    VES_LUM = 9
    NE_MEM = 10
    NE_LUM = 11
    NUC_RIM = 12
    NUC = 13


# Grey value in raw, and the class in the label `all`; the nuclear envelope (NE) counts as nucleus.
_MATERIALS: Mapping[Material, tuple[int, str]] = {
    Material.ECS: (206, "ecs"),
    Material.PM: (62, "pm"),
    Material.CYTO: (150, "cyto"),
    Material.MITO_MEM: (58, "mito_mem"),
    Material.MITO_GAP: (96, "mito_mem"),
    Material.MITO_LUM: (112, "mito_lum"),
    Material.ER_MEM: (66, "er_mem"),
    Material.ER_LUM: (190, "er_lum"),
    Material.VES_MEM: (64, "ves_mem"),
    Material.VES_LUM: (116, "ves_lum"),
    Material.NE_MEM: (60, "nuc"),
    Material.NE_LUM: (188, "nuc"),
    Material.NUC_RIM: (150, "nuc"),
    Material.NUC: (158, "nuc"),
}
_PARTS: Mapping[str, tuple[str, ...]] = {
    "mito": ("mito_mem", "mito_lum"),
    "er": ("er_mem", "er_lum"),
    "ves": ("ves_mem", "ves_lum"),
}
SHADES = np.array([shade for shade, _ in _MATERIALS.values()], np.uint8)
"""Grey value of each material in raw."""
MATERIAL_IDS = np.array([CLASS_IDS[name] for _, name in _MATERIALS.values()], np.uint8)
"""Id of the class of each material in the label ``all``."""


def membership(name: str) -> NDArray[np.uint8]:
    """Return 1 for each material that belongs to a class, and 0 for the others."""
    parts = _PARTS.get(name, (name,))
    return np.array([atom in parts for _, atom in _MATERIALS.values()], np.uint8)


@dataclass(frozen=True)
class DemoCrop:
    """An annotated box.

    Attributes:
        name: its folder.
        usage: the split in the CSV.
        offset: label voxels from the volume's corner; even offsets are corners of raw voxels.
        shape: label voxels.
        classes: the annotated classes.
        unknown: classes whose annotation stops before the end of x.
        bare: classes whose ``s0`` has no attributes.
    """

    name: str
    usage: Literal["train", "validate"]
    offset: tuple[int, int, int]
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    unknown: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()

    @property
    def corners(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Lower and upper corner, nm from the volume's corner."""
        lower = np.array(self.offset) * LABEL_SCALE
        return lower, lower + np.array(self.shape) * LABEL_SCALE


CROPS = (
    # Cytoplasm only: nuc is annotated and absent.
    DemoCrop("crop1", "train", (64, 48, 60), (128, 216, 216), ("mito", "mito_mem", "er", "nuc", "ves")),
    # Its corner is odd in raw voxels: on the lattice of raw s0, between the voxels of raw s1.
    DemoCrop(
        "crop2",
        "train",
        (56, 290, 20),
        (128, 216, 216),
        ("mito", "er", "er_mem", "nuc", "pm", "cyto"),
        unknown=("er", "er_mem"),
    ),
    # At the volume's border on three sides; nuc and ves are unannotated.
    DemoCrop("crop3", "train", (0, 0, 400), (128, 216, 240), ("ecs", "pm", "mito", "er")),
    DemoCrop("crop4", "validate", (72, 300, 248), (128, 208, 240), ("ecs", "pm", "mito", "er", "nuc", "ves")),
    # Smaller than any sensible patch.
    DemoCrop("crop5", "train", (64, 40, 320), (32, 48, 48), ("mito", "mito_mem"), bare=("mito_mem",)),
)
