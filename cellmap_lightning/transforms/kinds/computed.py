"""The base of targets that are computed from instance ids on the host and travel as half-precision floats."""

import math
from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.kinds.kind import TargetKind


class ComputedKind(TargetKind):
    """Numbers that are computed from the instance ids of each class, NaN where they depend on an unknown voxel.

    Half precision has steps of at most 0.0005 between -1 and 1, and halves what is transferred.

    Attributes:
        axes: axes of the patch that are longer than 1.
    """

    computed = True
    reads = "ids"
    unknown = math.nan
    channels_first = True

    def __init__(self, window: Window, classes: int) -> None:
        super().__init__(window, classes)
        self.axes = tuple(axis for axis, n in enumerate(window.shape) if n > 1)

    def compact(self, id_dtype: np.dtype[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return the shape of the channels, and float16."""
        return (self.channels, *self.window.shape), np.dtype(np.float16)

    def encode(self, stored: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """Compute the channels of each class."""
        for channels, ids in zip(np.split(out, self.classes), stored, strict=True):
            channels[...] = self.values(ids)

    @abstractmethod
    def values(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Compute the channels of one class.

        Args:
            ids: instance ids of the patch with the margin, ``[z, y, x]``; 0 in the background, -1 where unknown.

        Returns:
            ``[channels of a class, z, y, x]`` of the patch.
        """

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Convert the channels to float32."""
        return compact.to(torch.float32)
