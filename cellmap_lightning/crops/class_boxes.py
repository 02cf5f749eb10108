"""Classes of a crop that lie elsewhere than its other classes, as where a translation was lost."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cellmap_lightning.geometry.lattice import LATTICE_TOLERANCE, Box, Lattice
from cellmap_lightning.io.ngff import Multiscale


@dataclass(frozen=True)
class ClassBox:
    """The box of a class that differs from that of most classes of its crop.

    Attributes:
        name: the class.
        box: its box, nm.
        others: the classes that share the most frequent box, of equally frequent ones the first.
        usual: the box of the first of them, nm.
    """

    name: str
    box: Box
    others: tuple[str, ...]
    usual: Box

    def __str__(self) -> str:
        others = ", ".join(self.others[:3]) + (f" and {len(self.others) - 3} more" if len(self.others) > 3 else "")
        return f"{self.name} {self.box}, {others} {self.usual}"


def differing_boxes(images: Mapping[str, Multiscale]) -> tuple[ClassBox, ...]:
    """Return the classes whose box differs from that of most classes by more than a voxel of the coarser labels.

    Args:
        images: the label image of each class; of a box of a crop, the whole images are compared.
    """
    lattices = {name: (image.whole or image).finest.lattice for name, image in images.items()}
    groups: list[list[str]] = []
    for name, lattice in lattices.items():
        for group in groups:
            if _same_box(lattice, lattices[group[0]]):
                group.append(name)
                break
        else:
            groups.append([name])
    if len(groups) < 2:
        return ()
    usual = max(groups, key=len)
    box = lattices[usual[0]].box
    return tuple(
        ClassBox(name, lattices[name].box, tuple(usual), box)
        for group in groups
        if group is not usual
        for name in group
    )


def _same_box(one: Lattice, other: Lattice) -> bool:
    """Return whether the edges of two boxes differ by a voxel of the coarser lattice at most."""
    most = np.maximum(one.step, other.step) * (1 + LATTICE_TOLERANCE)
    lower, upper = np.subtract(one.box.lower, other.box.lower), np.subtract(one.box.upper, other.box.upper)
    return bool((np.abs(lower) <= most).all() and (np.abs(upper) <= most).all())
