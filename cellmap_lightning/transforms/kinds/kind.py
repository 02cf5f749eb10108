"""The interface of a kind of target."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.targets import packed_bytes

UNKNOWN_ID = -1
#: The function from a network's output to values of a kind.
Activation = Literal["sigmoid", "softmax", "tanh"]


class TargetKind(ABC):
    """The content of a target array; see docs/targets.md.

    Attributes:
        name: value of ``kind`` in a configuration.
        reads: ``bits`` (packed presence) or ``ids``.
        options: the other keys of its specification.
        margin: halo, in voxels, that is read on every side of the patch and cropped when it is encoded.
        channels: channels of the finished target.
        dtype: type of the finished target.
        computed: True if it is computed from the stored labels, False if it is a copy of them.
        unknown: value of unannotated voxels in its compact form.
        channels_first: True if its compact form is ``[channels, z, y, x]``, else ``[z, y, x, bytes]``.
        activation: function from a network's output to its values; None if no loss can compare it with an output.
        value_range: least and greatest value.
        directional: True if its channels are directions, which a mirrored patch exchanges.
    """

    unknown: ClassVar[float] = 0
    channels_first: ClassVar[bool] = False
    computed: ClassVar[bool] = False
    name: ClassVar[str]
    reads: ClassVar[Literal["bits", "ids"]] = "bits"
    options: ClassVar[tuple[str, ...]] = ()
    activation: ClassVar[Activation | None] = None
    value_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    directional: ClassVar[bool] = False
    dtype: torch.dtype = torch.float32

    def __init__(self, window: Window, classes: int) -> None:
        self.window = window
        self.classes = classes
        self.channels = classes
        self.margin: Shape = (0, 0, 0)

    @property
    def identity(self) -> tuple[Any, ...]:
        """All that it depends on, for comparison."""
        return (self.name,)

    @property
    def outputs(self) -> int:
        """The channels that a network needs for it."""
        return self.channels

    @property
    def components(self) -> tuple[dict[str, Any], ...]:
        """The channels of one class, as plain values for metadata; ``name`` is the end of the channel's name."""
        return ({"kind": self.name, "name": ""},)

    def describe(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Return one description per channel that is predicted: its unique ``name``, its class, and `components`."""
        return [
            {**component, "class": name, "name": "_".join(filter(None, (name, component["name"])))}
            for name in classes
            for component in self.components
        ]

    @property
    def inner(self) -> tuple[slice, slice, slice]:
        """The patch within the array that is read with the margin."""
        z, y, x = (slice(m, m + n) for m, n in zip(self.margin, self.window.shape, strict=True))
        return z, y, x

    def compact(self, id_dtype: np.dtype[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape (of one sample) and type of its compact form."""
        return (*self.window.shape, packed_bytes(self.classes)), np.dtype(np.uint8)

    def encode(self, stored: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """Write the labels that were read, with the margin, to the compact form; kinds without margin skip this."""
        raise NotImplementedError

    def forget(self, compact: "np.ndarray[Any, Any] | torch.Tensor", counts: Sequence[int]) -> None:
        """Mark the first voxels along z, y and x of a sample's compact form as unknown, in place.

        Args:
            compact: one sample, see `compact`.
            counts: voxels along each axis, at most those of the patch.
        """
        for axis, count in enumerate(counts, start=int(self.channels_first)):
            compact[(slice(None),) * axis + (slice(count),)] = self.unknown

    @abstractmethod
    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Convert the compact form of a batch to ``[N, channels, z, y, x]``, on its device."""


def signed(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the signed integer type that holds every value of ``dtype`` and -1; int64 at most."""
    if dtype.kind == "i":
        return dtype
    if dtype.kind == "f":
        return np.dtype(np.int64)
    return np.dtype(f"i{min(2 * dtype.itemsize, 8)}")
