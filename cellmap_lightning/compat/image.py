"""`cellmap_data.image`."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from cellmap_lightning.crops.image import CellMapImage as Image
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.resample import Method
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import read_encoding


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
        #: Extent of a patch, nm.
        self.output_size = {axis: self.output_shape[axis] * self.scale[axis] for axis in self.axes}
        self._mirrored: list[int] = []
        self._transposed: list[int] | None = None

    def __getitem__(self, center: Mapping[str, float]) -> torch.Tensor:
        """Return the patch around a centre (nm), mirrored, transposed and transformed."""
        patch = super().__getitem__(center)
        if self._mirrored:
            patch = patch.flip(self._mirrored)
        if self._transposed is not None:
            patch = patch.permute(self._transposed).contiguous()
        if self.value_transform is not None:
            patch = self.value_transform(patch)
        return patch if self.device is None else patch.to(self.device)

    @property
    def total_voxels(self) -> int:
        """Voxels of the whole image, of the size of a patch's voxels."""
        sides = ((upper - lower) / self.scale[axis] for axis, (lower, upper) in self.bounding_box.items())
        return math.prod(max(1, round(side)) for side in sides)

    @cached_property
    def class_counts(self) -> dict[str, int]:
        """Foreground voxels, ``{class: count}``, in voxels of the size of a patch's; read from the finest level.

        Nothing is written to the data.
        """
        finest = self.image.finest
        encoding, reader = read_encoding(self.image, finest), ChunkReader(finest, self.target_class)
        count = 0
        for corner in itertools.product(*(range(0, n, c) for n, c in zip(reader.shape, reader.chunks, strict=True))):
            z, y, x = (min(c, n - a) for a, c, n in zip(corner, reader.chunks, reader.shape, strict=True))
            stored = reader.read((corner[0], corner[1], corner[2]), (z, y, x))
            count += int((encoding.present(stored) if encoding is not None else stored != 0).sum())
        return {self.target_class: int(count * math.prod(finest.scale) / math.prod(self.scale.values()))}

    def set_spatial_transforms(self, transforms: Mapping[str, Any] | None) -> None:
        """Mirror and transpose the patches from now on.

        Args:
            transforms: ``{"mirror": {axis: bool}, "transpose": [axis that becomes each axis]}``; None for neither.

        Raises:
            CellMapValueError: something else is asked for.
        """
        given = dict(transforms or {})
        mirror, transpose = given.pop("mirror", None) or {}, given.pop("transpose", None)
        if not isinstance(mirror, Mapping):
            mirror = dict(zip(self.axes, mirror, strict=True))
        if given:
            raise CellMapValueError(
                f"an image mirrors and transposes, and has no {sorted(given)}; give rotations to the dataset, as "
                "spatial_transforms"
            )
        self._mirrored = [self.axes.index(axis) for axis, on in mirror.items() if on]
        self._transposed = None if transpose is None else [int(axis) for axis in transpose]

    def to(self, device: str | torch.device) -> "CellMapImage":
        """Deliver patches on a device."""
        self.device = device
        return self
