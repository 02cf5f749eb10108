"""Samples to be drawn: their arrays, checked, and planes of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.visualization.figures.canvas import Array, BoolArray, FloatArray
from cellmap_lightning.visualization.figures.slices import THRESHOLD

#: The arrays that are drawn as outlines.
OUTLINED = ("target", "prediction")


@dataclass(frozen=True, eq=False)
class SheetSample:
    """One row of a contact sheet.

    Attributes:
        raw: intensities, ``[z, y, x]``, or ``[y, x]`` for a 2D sample.
        target: 1 inside, 0 outside and NaN where unannotated, ``[class, z, y, x]`` (2D: ``[class, y, x]``), or None.
        prediction: probabilities of the same shape as ``target``, or None.
        scale: voxel size in nm, in the order ``(z, y, x)``. A 2D sample may give ``(y, x)``.
        header: dataset, crop, box, transforms: text above the row.
        pictures: of ``target`` and ``prediction``, where they are drawn in colours instead of outlines: red, green,
            blue and opacity from 0 to 1, ``[z, y, x, 4]`` (2D: ``[y, x, 4]``).

    Example:
        >>> sample = SheetSample(raw, target, None, (8, 8, 8), "jrc_hela-2/crop1")
        >>> contact_sheet([sample], ["mito"], path="sheet.png")
    """

    raw: FloatArray
    target: FloatArray | None
    prediction: FloatArray | None
    scale: Sequence[float]
    header: str = ""
    pictures: Mapping[str, FloatArray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Cut:
    """One plane of a sample, the content of a panel.

    Attributes:
        raw: ``[row, column]``.
        masks: of target and prediction, where the sample has them: ``[class, row, column]``.
        unknown: ``[row, column]``, unknown for every class; None without a target.
        nm: size of a pixel (row, column).
        pictures: colours of target and prediction, ``[row, column, 4]``.
        partly: ``[row, column]`` of classes by their index, unknown although another class is known there; without
            classes that are unknown in the whole sample.
    """

    raw: Array
    masks: Mapping[str, BoolArray]
    unknown: BoolArray | None
    nm: tuple[float, float]
    pictures: Mapping[str, Array] = field(default_factory=dict)
    partly: Mapping[int, BoolArray] = field(default_factory=dict)

    @property
    def extent_nm(self) -> tuple[float, float]:
        """Height and width, nm."""
        return self.raw.shape[0] * self.nm[0], self.raw.shape[1] * self.nm[1]


@dataclass(frozen=True, eq=False)
class SampleArrays:
    """The arrays of a sample, all with an axis z.

    Attributes:
        raw: ``[z, y, x]``.
        stacks: target and prediction, where the sample has them: ``[class, z, y, x]``.
        scale: voxel size (z, y, x), nm.
        pictures: colours of target and prediction, ``[z, y, x, 4]``.
    """

    raw: Array
    stacks: Mapping[str, Array]
    scale: tuple[float, float, float]
    pictures: Mapping[str, Array] = field(default_factory=dict)

    @property
    def occurring(self) -> set[int]:
        """Classes with a voxel in target or prediction."""
        return {c for stack in self.stacks.values() for c, mask in enumerate(stack) if (mask >= THRESHOLD).any()}

    @cached_property
    def annotated(self) -> tuple[int, ...]:
        """Classes of the target with a known voxel."""
        target = self.stacks.get("target")
        return () if target is None else tuple(c for c, values in enumerate(target) if not np.isnan(values).all())

    def cut(self, *index: int | slice) -> Cut:
        """Return one plane: ``(z,)`` for xy, ``(slice(None), y)`` for xz."""
        planes = {name: stack[(slice(None), *index)] for name, stack in self.stacks.items()}
        target = planes.get("target")
        sz, sy, sx = self.scale
        unknown: BoolArray | None = None
        partly: dict[int, BoolArray] = {}
        if target is not None and len(target):
            missing = np.isnan(target)
            unknown = np.asarray(missing.all(axis=0))
            differing = {c: missing[c] & ~unknown for c in self.annotated}
            partly = {c: mask for c, mask in differing.items() if mask.any()}
        return Cut(
            raw=self.raw[index],
            masks={name: plane >= THRESHOLD for name, plane in planes.items()},
            unknown=unknown,
            partly=partly,
            nm=(sy, sx) if len(index) == 1 else (sz, sx),
            pictures={name: picture[index] for name, picture in self.pictures.items()},
        )


def sample_arrays(sample: SheetSample, classes: int, where: str) -> SampleArrays:
    """Return the arrays of a sample.

    Args:
        sample: arrays or tensors of any floating type, on any device.
        classes: number of classes.
        where: the sample, for messages.

    Raises:
        CellMapValueError: shapes, voxel size or number of classes do not fit together.
    """
    raw = _as_array(sample.raw)
    if raw.ndim not in (2, 3) or not raw.size:
        raise CellMapValueError(f"{where}: raw must be [z, y, x] or [y, x] and not empty, got the shape {raw.shape}")
    scale = tuple(float(s) for s in sample.scale)
    if len(scale) not in {3, raw.ndim} or not all(math.isfinite(s) and s > 0 for s in scale):
        raise CellMapValueError(f"{where}: scale must be one positive number of nm for each of z, y, x, got {scale}")
    is_flat = raw.ndim == 2
    stacks = {}
    for name in OUTLINED:
        if getattr(sample, name) is None:
            continue
        stack = _as_array(getattr(sample, name))
        if stack.shape != (classes, *raw.shape):
            raise CellMapValueError(
                f"{where}: {name} must have one channel for each of the {classes} classes and then the shape of raw, "
                f"{raw.shape}; got the shape {stack.shape}"
            )
        stacks[name] = stack[:, None] if is_flat else stack
    pictures = {}
    for name, picture in sample.pictures.items():
        if name not in stacks or np.shape(picture) != (*raw.shape, 4):
            raise CellMapValueError(
                f"{where}: a picture of {name} needs an array {name} beside it and the shape {(*raw.shape, 4)}; its "
                f"shape is {np.shape(picture)}"
            )
        pictures[name] = _as_array(picture)[None] if is_flat else _as_array(picture)
    sz, sy, sx = scale if len(scale) == 3 else (1.0, *scale)
    return SampleArrays(raw[None] if is_flat else raw, stacks, (sz, sy, sx), pictures)


def _as_array(values: Any) -> Array:
    if hasattr(values, "detach"):  # a tensor, perhaps bfloat16, which NumPy does not have, perhaps on a GPU
        values = values.detach().cpu().float()
    return np.asarray(values)
