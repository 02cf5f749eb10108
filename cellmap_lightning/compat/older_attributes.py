"""Attributes and methods of datasets that cellmap-data had in 2025 and has no more in 2026."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cellmap_lightning.compat.utils.geometry import box_shape
from cellmap_lightning.compat.utils.misc import min_redundant_inds

Box = Mapping[str, Sequence[float]]


class OlderAttributes:
    """Derives the attributes of 2025 from those of 2026.

    Attributes:
        axis_order: the order of axes, always ``zyx``.
        context: what was given; no effect.
        empty_value: NaN, the value of unannotated voxels in targets.
        device: where samples are; the loader delivers on its own device.
    """

    axis_order = "zyx"
    context: Any = None
    empty_value = math.nan
    device = torch.device("cpu")
    bounding_box: Any
    sampling_box: Any
    input_arrays: Any
    target_arrays: Any

    @property
    def has_data(self) -> bool:
        """Return True if there is a position."""
        return len(self) > 0  # type: ignore[arg-type]

    @property
    def center(self) -> dict[str, float]:
        """Centre of the box, ``{axis: nm}``."""
        return {axis: (lower + upper) / 2 for axis, (lower, upper) in self.bounding_box.items()}

    @property
    def largest_voxel_sizes(self) -> dict[str, float]:
        """The largest voxel size of any array along each axis, nm."""
        scales = [_three(spec["scale"]) for spec in (self.input_arrays | self.target_arrays).values()]
        return dict(zip(self.axis_order, map(max, zip(*scales, strict=True)), strict=True))

    @property
    def bounding_box_shape(self) -> dict[str, int]:
        """Voxels of the box along each axis, of the largest voxel size."""
        return box_shape(self.bounding_box, self.largest_voxel_sizes)

    @property
    def sampling_box_shape(self) -> dict[str, int]:
        """Voxels of the box of centres along each axis, of the largest voxel size."""
        return box_shape(self.sampling_box, self.largest_voxel_sizes)

    @property
    def size(self) -> float:
        """Volume of the box, nm³."""
        z, y, x = (upper - lower for lower, upper in self.bounding_box.values())
        return float(z * y * x)

    def get_random_subset_indices(
        self, num_samples: int, rng: torch.Generator | None = None, **kwargs: Any
    ) -> Sequence[int]:
        """Return random positions; each is there once before any is there twice.

        Args:
            num_samples: how many.
            rng: generator of the draw.
            **kwargs: no effect.
        """
        found: list[int] = min_redundant_inds(len(self), num_samples, False, rng).tolist()  # type: ignore[arg-type]
        return found


def _three(scale: Sequence[float]) -> list[float]:
    return [float(scale[0])] * (3 - len(scale)) + [float(s) for s in scale]
