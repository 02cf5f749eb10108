"""`cellmap_data.image`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cellmap_lightning.volumes.image import CellMapImage as Image
from cellmap_lightning.volumes.resample import Method


class CellMapImage(Image):
    """A `cellmap_lightning.CellMapImage` with a value transform.

    Args:
        path: see there, as for what is not described here.
        target_class: see there.
        target_scale: see there; two numbers mean slices as thick as the first of them.
        target_voxel_shape: see there; two numbers mean a single slice.
        pad: see there.
        pad_value: see there.
        interpolation: see there.
        axis_order: see there.
        value_transform: applied to each patch.
        context: has no effect.
        device: where patches are delivered; by default the CPU.
    """

    def __init__(
        self,
        path: str,
        target_class: str,
        target_scale: Sequence[float],
        target_voxel_shape: Sequence[int],
        pad: bool = False,
        pad_value: float = float("nan"),
        interpolation: Method = "nearest",
        axis_order: str | Sequence[str] = "zyx",
        value_transform: Callable[..., Any] | None = None,
        context: Any = None,
        device: str | torch.device | None = None,
    ) -> None:
        scale, shape = list(target_scale), list(target_voxel_shape)
        scale = [scale[0]] * (3 - len(scale)) + scale
        shape = [1] * (3 - len(shape)) + shape
        super().__init__(path, target_class, scale, shape, pad, pad_value, interpolation, "".join(axis_order))
        self.value_transform, self.device = value_transform, device
        self.axes = list(self.axis_order)
        self.label_class = target_class
        self.scale = dict(zip(self.axes, map(float, scale), strict=True))
        self.output_shape = dict(zip(self.axes, map(int, shape), strict=True))

    def __getitem__(self, center: Mapping[str, float]) -> torch.Tensor:
        """The patch around a centre (nm), transformed."""
        patch = super().__getitem__(center)
        if self.value_transform is not None:
            patch = self.value_transform(patch)
        return patch if self.device is None else patch.to(self.device)

    def to(self, device: str | torch.device) -> "CellMapImage":
        """Deliver patches on a device."""
        self.device = device
        return self
