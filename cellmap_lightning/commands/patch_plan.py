"""The patches of a prediction: the context and the patch size that a network needs, at the least cost."""

import math
from dataclasses import dataclass
from itertools import product

from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.prediction.blending import Tiling

#: Voxels by which lengths of patches are multiples apart, at least, and the largest number of them to choose from.
_UNIT, _CHOICES = 8, 24


@dataclass(frozen=True)
class PatchNeeds:
    """Limits of the choice of patches.

    Attributes:
        volume: output voxels of the volume.
        first: first voxel of the part that is predicted.
        length: voxels of that part.
        patch: output voxels of the patch of the training, the smallest that is considered.
        context: voxels on either side of a patch whose output the border of the patch changes.
        step: see `Reach`.
        voxel_bytes: see `Reach`.
        memory: bytes that the outputs of all layers may take for a patch.
        fixed: only the patch of the training is considered.
    """

    volume: Shape
    first: Shape
    length: Shape
    patch: Shape
    context: Shape
    step: Shape
    voxel_bytes: float
    memory: float
    fixed: bool = False


@dataclass(frozen=True)
class PatchPlan:
    """Chosen patches.

    Attributes:
        patch: output voxels of a patch.
        context: voxels on either side that are computed and not written.
        computed: voxels that the network computes for each one that is written, if everything were one block.
    """

    patch: Shape
    context: Shape
    computed: float


def plan_patch(needs: PatchNeeds) -> PatchPlan | None:
    """Return the patches that cost least; None if no allowed patch is larger than its context.

    Along an axis on which one patch holds the whole volume, no context is needed.

    Example:
        >>> at, n = (0, 0, 0), (256, 256, 256)
        >>> plan_patch(PatchNeeds(n, at, n, (64, 64, 64), (16, 16, 16), (4, 4, 4), 100, 1e9)).patch
        (144, 144, 144)
    """
    axes = [_choices(needs, axis) for axis in range(3)]
    best: tuple[float, int, PatchPlan] | None = None
    for (a, ca, na), (b, cb, nb), (c, cc, nc) in product(*axes):
        voxels = a * b * c
        if voxels * needs.voxel_bytes > needs.memory and (a, b, c) != needs.patch:
            continue
        cost = na * nb * nc / math.prod(needs.length)
        # Of equal costs the smallest patch, which needs least memory.
        if best is None or (cost, voxels) < best[:2]:
            best = cost, voxels, PatchPlan((a, b, c), (ca, cb, cc), cost)
    return None if best is None else best[2]


def _choices(needs: PatchNeeds, axis: int) -> list[tuple[int, int, int]]:
    """Return lengths of a patch along an axis, each with its context and the voxels that are computed along it."""
    smallest, volume, context = needs.patch[axis], needs.volume[axis], needs.context[axis]
    unit = max(needs.step[axis], _UNIT)
    # Nothing is gained beyond the part that is predicted with its context, and nothing lies beyond the volume.
    largest = min(volume, needs.length[axis] + 2 * context)
    count = 1 if needs.fixed or smallest == 1 else max(1, (largest - smallest) // unit + 1)
    choices = []
    for patch in range(smallest, smallest + min(count, _CHOICES) * unit, unit):
        trim = 0 if patch >= volume else context
        if patch <= 2 * trim:
            continue
        along = Tiling(_only(volume, axis), _only(patch, axis), "trim", None, list(_only(trim, axis, 0)))
        length = needs.length[axis]
        choices.append((patch, trim, along.count(axis, needs.first[axis], length, length) * patch))
    return choices


def _only(value: int, axis: int, other: int = 1) -> Shape:
    """Return a shape that has a length along one axis."""
    z, y, x = (value if a == axis else other for a in range(3))
    return z, y, x
