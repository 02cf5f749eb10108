"""Noise of detectors: single voxels of extreme values, and counting noise."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.transforms.effect_options import Span, option, span
from cellmap_lightning.transforms.effects import PatchGrid, SampleEffect, within


@dataclass(frozen=True, kw_only=True)
class SaltPepper(SampleEffect):
    """Single voxels that become dark or bright, as often the one as the other.

    Attributes:
        fraction: probability of a voxel to change.
        values: the dark and the bright value, in normalized units.

    Example:
        >>> SaltPepper(probability=0.1, fraction=[0, 0.01]).values
        (0.0, 1.0)
    """

    name = "salt_pepper"
    stream = 8
    fraction: Span = option(span(least=0, most=1))
    values: Span = option(span(), (0.0, 1.0))

    def numbers(self, grid: PatchGrid) -> int:
        """Return 1: the fraction."""
        return 1

    def change(
        self, values: torch.Tensor, numbers: FloatArray, grid: PatchGrid, generator: Callable[[], torch.Generator]
    ) -> torch.Tensor:
        """Replace voxels."""
        half = within(self.fraction, float(numbers[0])) / 2
        drawn = torch.empty(values.shape, dtype=torch.float32, device=values.device).uniform_(generator=generator())
        dark, bright = self.values
        return values.masked_fill(drawn < half, dark).masked_fill_(drawn >= 1 - half, bright)


@dataclass(frozen=True, kw_only=True)
class Poisson(SampleEffect):
    """Counting noise: each value becomes a Poisson-distributed count, divided by the mean count of the value 1.

    Values below 0, which are no intensities, are unchanged.

    Attributes:
        counts: mean count of the normalized value 1; the fewer, the more noise.

    Example:
        >>> Poisson(probability=0.2, counts=[30, 300]).counts
        (30.0, 300.0)
    """

    name = "poisson"
    stream = 9
    counts: Span = option(span("counts", least=1))

    def numbers(self, grid: PatchGrid) -> int:
        """Return 1: the counts."""
        return 1

    def change(
        self, values: torch.Tensor, numbers: FloatArray, grid: PatchGrid, generator: Callable[[], torch.Generator]
    ) -> torch.Tensor:
        """Draw counts."""
        counts = within(self.counts, float(numbers[0]))
        drawn = torch.poisson(values.clamp(min=0).mul_(counts), generator()).div_(counts)
        return torch.where(values < 0, values, drawn)
