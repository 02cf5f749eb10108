"""Targets that are read from presence: one mask per class, or one class number per voxel."""

from typing import Any

import torch

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.kinds.kind import TargetKind
from cellmap_lightning.transforms.targets import unpack


class Binary(TargetKind):
    """1 where a class is present, 0 where it is absent, NaN where unannotated; see docs/targets.md."""

    name = "binary"
    activation = "sigmoid"

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Unpack the bits."""
        return unpack(compact, self.classes)


class Labels(TargetKind):
    """One number per voxel, for a softmax: 0 background, ``i + 1`` class ``i``, the first listed class that is present.

    Voxels in which no class is known to be present and some class is unannotated have the ignore index.

    Args:
        ignore_index: number of incompletely annotated voxels.
    """

    name = "labels"
    options = ("ignore_index",)
    activation = "softmax"
    dtype = torch.int64

    def __init__(self, window: Window, classes: int, ignore_index: int = -100) -> None:
        super().__init__(window, classes)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int) or 0 <= ignore_index <= classes:
            raise CellMapValueError(
                f"ignore_index must be a whole number outside the classes' 0 to {classes}, got {ignore_index!r}"
            )
        self.ignore_index = ignore_index
        self.channels = 1

    @property
    def outputs(self) -> int:
        """The classes, and the background before them."""
        return self.classes + 1

    @property
    def identity(self) -> tuple[Any, ...]:
        """Name and ignore index."""
        return self.name, self.ignore_index

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Convert the bits to class numbers."""
        out = torch.zeros(compact.shape[:-1], dtype=torch.int64, device=compact.device)
        for index in range(self.classes):
            known = compact[..., 2 * (index // 8) + 1] & (1 << (index % 8))
            out.masked_fill_(known == 0, self.ignore_index)
        # From last to first, so that the first listed class that is present wins.
        for index in reversed(range(self.classes)):
            present = compact[..., 2 * (index // 8)] & (1 << (index % 8))
            out.masked_fill_(present != 0, index + 1)
        return out[:, None]
