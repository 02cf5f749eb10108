"""`cellmap_data.image_writer`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cellmap_lightning.compat.array_writer import ImageWriter as Writer
from cellmap_lightning.compat.utils.metadata import create_multiscale_metadata
from cellmap_lightning.errors import CellMapTypeError
from cellmap_lightning.geometry.lattice import AXES

__all__ = ["ImageWriter", "create_multiscale_metadata"]


class ImageWriter(Writer):
    """An `array_writer.ImageWriter` with the attributes of cellmap-data; see docs/migration.md.

    Attributes:
        base_path: the multiscale group.
        label_class: name of the class.
        scale_level: 0.
        axes: ``zyx``.
        spatial_axes: the same as a list.
        context: what was given; no effect.
    """

    def __init__(
        self,
        path: str,
        target_class: str,
        scale: Mapping[str, float] | Sequence[float],
        bounding_box: Mapping[str, Sequence[float]],
        write_voxel_shape: Mapping[str, int] | Sequence[int],
        scale_level: int = 0,
        axis_order: str = "zyx",
        context: Any = None,
        overwrite: bool = False,
        dtype: npt.DTypeLike = np.float32,
        fill_value: float = 0,
        **more: Any,
    ) -> None:
        super().__init__(
            path, target_class, scale, bounding_box, write_voxel_shape, scale_level, axis_order, context, overwrite,
            dtype, fill_value, **more,
        )  # fmt: skip
        self.base_path, self.label_class = str(path), target_class
        self.scale_level, self.context = scale_level, context
        self.axes, self.spatial_axes = "".join(axis_order), list(AXES)

    @property
    def array_path(self) -> str:
        """Path of the array."""
        return str(self.path / f"s{self.scale_level}")

    @property
    def scale(self) -> dict[str, float]:
        """Voxel size, ``{axis: nm}``."""
        return dict(zip(AXES, self.lattice.step, strict=True))

    @property
    def offset(self) -> dict[str, float]:
        """Lower edge of the array, ``{axis: nm}``; ``translation`` on disk is the centre of voxel 0."""
        return {axis: lower for axis, (lower, _) in self.bounding_box.items()}

    @property
    def world_shape(self) -> dict[str, float]:
        """Extent of the array, ``{axis: nm}``."""
        return {axis: upper - lower for axis, (lower, upper) in self.bounding_box.items()}

    @property
    def write_world_shape(self) -> dict[str, float]:
        """Extent of a patch, ``{axis: nm}``."""
        return {a: n * s for a, n, s in zip(AXES, self.write_voxel_shape, self.lattice.step, strict=True)}

    @property
    def chunk_shape(self) -> list[int]:
        """Voxels of a chunk."""
        return list(self.write_voxel_shape)

    def __setitem__(self, center: Mapping[str, Any], values: Any) -> None:
        """Write a patch ``[z, y, x]`` around a centre in nm, or several of them around as many.

        Raises:
            CellMapTypeError: a single number.
        """
        check_patch(values, self.target_class)
        super().__setitem__(center, values)


def check_patch(values: Any, name: str) -> None:
    """Check that values are not a single number.

    Raises:
        CellMapTypeError: they are one.
    """
    advice = "give an array or tensor with the shape of the patch"
    if np.isscalar(values):
        raise CellMapTypeError(f"{name}: Scalar writes are not supported, got {values!r}; {advice}")
    if isinstance(values, np.ndarray) and values.ndim == 0:
        raise CellMapTypeError(f"{name}: Zero-dimensional NumPy arrays are not supported; {advice}")
    if torch.is_tensor(values) and values.dim() == 0:
        raise CellMapTypeError(f"{name}: Zero-dimensional torch.Tensors are not supported; {advice}")
