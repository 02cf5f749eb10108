"""`cellmap_data.empty_image`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cellmap_lightning.errors import CellMapTypeError


class EmptyImage:
    """An unannotated class: every patch is NaN; see docs/migration.md.

    The arguments are those of `CellMapImage`; shape and scale are z, y, x, and two numbers mean one slice.

    Args:
        path: where it would be.
        target_class: the class.
        target_scale: voxel size, nm.
        target_voxel_shape: voxels of a patch.
        pad: has no effect, as all that follow but ``axis_order``.
        pad_value: see ``pad``.
        interpolation: see ``pad``.
        axis_order: names of the axes.
        value_transform: see ``pad``.
        context: see ``pad``.
        device: where patches are.

    Raises:
        CellMapTypeError: arguments of cellmap-data of 2025.
    """

    def __init__(
        self,
        path: str = "",
        target_class: str = "",
        target_scale: Sequence[float] = (),
        target_voxel_shape: Sequence[int] = (),
        pad: bool = False,
        pad_value: float = float("nan"),
        interpolation: str = "nearest",
        axis_order: str | Sequence[str] = "zyx",
        value_transform: Callable[..., Any] | None = None,
        context: Any = None,
        device: str | torch.device | None = None,
        **older: Any,
    ) -> None:
        if older or not target_scale or not target_voxel_shape:
            raise CellMapTypeError(
                f"EmptyImage: path, target_class, target_scale and target_voxel_shape are needed, got {sorted(older)}; "
                "call EmptyImage(path, target_class, target_scale, target_voxel_shape), which is NaN everywhere"
            )
        self.path, self.label_class = path, target_class
        self.axes = list(axis_order)
        missing = len(self.axes) - len(target_voxel_shape)
        shape = [1] * missing + list(target_voxel_shape)
        scale = [target_scale[0]] * (len(self.axes) - len(target_scale)) + list(target_scale)
        self.output_shape = {axis: int(n) for axis, n in zip(self.axes, shape, strict=True)}
        self.scale = {axis: float(s) for axis, s in zip(self.axes, scale, strict=True)}
        self.device = device
        self.bounding_box = self.sampling_box = None
        self.total_voxels = 0

    def __getitem__(self, center: Mapping[str, float]) -> torch.Tensor:
        """NaN of the patch's shape."""
        return torch.full(
            tuple(self.output_shape.values()), torch.nan, dtype=torch.float32, device=self.device or "cpu"
        )

    @property
    def class_counts(self) -> dict[str, int]:
        """No voxels."""
        return {self.label_class: 0}

    def set_spatial_transforms(self, transforms: Mapping[str, Any] | None) -> None:
        """Do nothing: NaN is NaN, however it is turned."""

    def to(self, device: str | torch.device) -> "EmptyImage":
        """Give patches on a device."""
        self.device = device
        return self

    def __repr__(self) -> str:
        return f"EmptyImage({self.label_class!r}, shape={list(self.output_shape.values())})"
