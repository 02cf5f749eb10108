"""`cellmap_data.image`."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cellmap_lightning.compat.utils.geometry import box_shape
from cellmap_lightning.crops.image import CellMapImage as Image
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.grids import covering_boxes
from cellmap_lightning.geometry.lattice import AXES, FloatArray
from cellmap_lightning.geometry.resample import AnyArray, Method
from cellmap_lightning.io.ngff import read_encoding
from cellmap_lightning.io.readers import open_reader

__all__ = ["CellMapImage", "box_shape"]

log = logging.getLogger(__name__)


class CellMapImage(Image):
    """A `cellmap_lightning.CellMapImage` with a value transform; see docs/migration.md.

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
        self.value_transform, self.device = value_transform, device or "cpu"
        self.axes = list(self.axis_order)
        self.label_class = target_class
        self.scale = dict(zip(self.axes, map(float, scale), strict=True))
        self.output_shape = dict(zip(self.axes, map(int, shape), strict=True))
        #: Extent of a patch, nm.
        self.output_size = {axis: self.output_shape[axis] * self.scale[axis] for axis in self.axes}
        self.context = context
        self._current_spatial_transforms: Mapping[str, Any] | None = None
        self._mirrored: list[int] = []
        self._transposed: list[int] | None = None
        self._turn: FloatArray | None = None

    def read_into(self, center: FloatArray, out: AnyArray, turn: FloatArray | None = None) -> None:
        """Write the patch around ``center`` to ``out``, rotated as `set_spatial_transforms` says."""
        super().read_into(center, out, self._turn if turn is None else turn)

    def __getitem__(self, center: Mapping[str, float]) -> torch.Tensor:
        """Return the patch around a centre (nm), rotated, mirrored, transposed and transformed."""
        center = {axis: float(np.mean(value)) for axis, value in center.items()}
        box = self.bounding_box
        outside = [axis for axis, (lower, upper) in box.items() if not self._reaches(axis, center[axis], lower, upper)]
        if outside:
            log.warning(
                "%s: out-of-bounds read: the patch around %s nm lies outside the image along %s (%s nm); choose a "
                "centre in sampling_box", self.path, center, ", ".join(outside), box,
            )  # fmt: skip
        patch = super().__getitem__(center)
        if self._mirrored:
            patch = patch.flip(self._mirrored)
        if self._transposed is not None:
            patch = patch.permute(self._transposed).contiguous()
        if self.value_transform is not None:
            patch = self.value_transform(patch)
        return patch.to(self.device)

    def _reaches(self, axis: str, center: float, lower: float, upper: float) -> bool:
        """Return whether a patch, rotated or not, may reach the image along an axis."""
        half = self.output_size[axis] / 2
        if self._turn is not None:
            half = math.sqrt(sum(size**2 for size in self.output_size.values())) / 2
        return lower < center + half and center - half < upper

    def get_center(self, idx: int) -> dict[str, float]:
        """Return the centre of the patch at a position, ``{axis: nm}``."""
        return super().get_center(idx)

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
        encoding, reader = read_encoding(self.image, finest), open_reader(finest, self.target_class)
        count = 0
        for start, shape in covering_boxes(reader.shape, reader.chunks):
            stored = reader.read(start, shape)
            count += int((encoding.present(stored) if encoding is not None else stored != 0).sum())
        return {self.target_class: int(count * math.prod(finest.scale) / math.prod(self.scale.values()))}

    def set_spatial_transforms(self, transforms: Mapping[str, Any] | None) -> None:
        """Rotate, mirror and transpose the patches from now on.

        Args:
            transforms: ``{"mirror": {axis: bool}, "transpose": [axis that becomes each axis], "rotation_matrix":
                matrix in the order of ``axes``, which turns what is shown}``; None for none of them. The rotation
                comes first.

        Raises:
            CellMapValueError: something else is asked for, or the matrix is not a rotation.
        """
        given = dict(transforms or {})
        mirror, transpose = given.pop("mirror", None) or {}, given.pop("transpose", None)
        matrix = given.pop("rotation_matrix", None)
        if not isinstance(mirror, Mapping):
            mirror = dict(zip(self.axes, mirror, strict=True))
        strange = [axis for axis, on in mirror.items() if axis not in self.axes or not isinstance(on, bool | np.bool_)]
        if strange:
            raise CellMapValueError(
                f"spatial transforms of an image: mirror must be {{axis: True or False}} of {self.axes}, got "
                f"{mirror!r}; give probabilities to the dataset, as spatial_transforms"
            )
        if given:
            raise CellMapValueError(
                f"spatial transforms of an image: {sorted(given)} is unknown; there are mirror, transpose and "
                "rotation_matrix"
            )
        turn = None if matrix is None else self._rotation(matrix)
        self._mirrored = [self.axes.index(axis) for axis, on in mirror.items() if on]
        self._transposed = None if transpose is None else [int(axis) for axis in transpose]
        self._turn = turn
        self._current_spatial_transforms = transforms

    def _rotation(self, matrix: Any) -> FloatArray:
        """Return what takes directions of the patch to those of the image, in the order z, y, x."""
        given = np.asarray(matrix, float)
        if given.shape != (3, 3) or not np.allclose(given @ given.T, np.eye(3), atol=1e-6):
            raise CellMapValueError(
                f"spatial transforms of an image: rotation_matrix must be an orthogonal 3 x 3 matrix, got {matrix!r}"
            )
        order = [self.axes.index(axis) for axis in AXES]
        turn: FloatArray = given[np.ix_(order, order)].T
        return turn

    def to(self, device: str | torch.device) -> "CellMapImage":
        """Deliver patches on a device."""
        self.device = device
        return self
