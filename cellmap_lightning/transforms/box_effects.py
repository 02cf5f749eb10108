"""Effects on random boxes: constant values and noise."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.transforms.effect_options import Span, count, number, option, span
from cellmap_lightning.transforms.effects import PatchGrid, SampleEffect, within

#: Random numbers of a box: its centre and edges, and one of the effect.
_NUMBERS = 7


@dataclass(frozen=True, kw_only=True)
class BoxEffect(SampleEffect):
    """An effect on boxes, whose centres are uniform in the first input.

    Attributes:
        size: edge of a box, nm, drawn separately for each axis; a patch with a single voxel along an axis is covered.
        count: boxes per sample.
    """

    size: Span = option(span("nm", least=0))
    count: int = option(count, 1)

    def numbers(self, grid: PatchGrid) -> int:
        """Return those of every box."""
        return _NUMBERS * self.count

    def change(
        self, values: torch.Tensor, numbers: FloatArray, grid: PatchGrid, generator: Callable[[], torch.Generator]
    ) -> torch.Tensor:
        """Change the boxes one after the other."""
        values, source = values.clone(), generator()
        for drawn in numbers.reshape(-1, _NUMBERS):
            self.change_box(values[self._box(drawn, grid)], float(drawn[-1]), source)
        return values

    def _box(self, numbers: FloatArray, grid: PatchGrid) -> tuple[slice, ...]:
        """Return the voxels whose centres lie in a box."""
        box = []
        for axis in range(3):
            centers = grid.centers(axis)
            middle = (float(numbers[axis]) - 0.5) * float(grid.reference.extent[axis])
            half = within(self.size, float(numbers[3 + axis])) / 2
            low, high = np.searchsorted(centers, middle - half), np.searchsorted(centers, middle + half, side="right")
            box.append(slice(int(low), int(high)) if len(centers) > 1 else slice(None))
        return tuple(box)

    @abstractmethod
    def change_box(self, values: torch.Tensor, uniform: float, generator: torch.Generator) -> None:
        """Change the voxels of a box ``[z, y, x]``, possibly none, in place.

        Args:
            values: the voxels.
            uniform: a random number in [0, 1).
            generator: of the sample's voxels.
        """


@dataclass(frozen=True, kw_only=True)
class Cutout(BoxEffect):
    """Boxes of a constant value.

    Attributes:
        fill: the value, in normalized units.

    Example:
        >>> Cutout(probability=0.2, size=[40, 160]).fill
        0.0
    """

    name = "cutout"
    stream = 6
    fill: float = option(number, 0.0)

    def change_box(self, values: torch.Tensor, uniform: float, generator: torch.Generator) -> None:
        """Fill a box."""
        values.fill_(self.fill)


@dataclass(frozen=True, kw_only=True)
class Cutnoise(BoxEffect):
    """Boxes with added Gaussian noise.

    Attributes:
        std: standard deviation of the noise, in normalized units.

    Example:
        >>> Cutnoise(probability=0.2, size=[40, 160], std=[0, 0.2]).count
        1
    """

    name = "cutnoise"
    stream = 7
    std: Span = option(span(least=0))

    def change_box(self, values: torch.Tensor, uniform: float, generator: torch.Generator) -> None:
        """Add noise to a box."""
        noise = torch.empty(values.shape, dtype=values.dtype, device=values.device).normal_(generator=generator)
        values.add_(noise.mul_(within(self.std, uniform)))
