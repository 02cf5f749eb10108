"""The options that define the output of a prediction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, Box, Shape
from cellmap_lightning.io.writer import ZarrFormat
from cellmap_lightning.prediction.blending import Blend
from cellmap_lightning.prediction.model_output import Activation
from cellmap_lightning.prediction.quantize import OutputType, Threshold
from cellmap_lightning.validation import one_of, positive_number


@dataclass(frozen=True)
class PredictionOptions:
    """The options of `PredictionWriter` that are the same for all volumes; see there, and docs/prediction.md.

    Raises:
        CellMapValueError: an option is invalid.
    """

    blend: Blend
    overlap: float | Sequence[float] | None
    context: int | Sequence[int] | None
    zarr_format: ZarrFormat
    dtype: OutputType
    threshold: Threshold
    region: Box | None
    key: str | None
    activation: Activation | None
    chunks: Shape
    shards: Shape | None
    levels: int | None
    block_size_mb: float
    model_id: str | None
    tta_flips: str
    mask: str | None
    skip_empty: bool
    overwrite: bool
    check_space: bool
    accept_changed_raw: bool

    def __post_init__(self) -> None:
        one_of("blend", self.blend, get_args(Blend))
        one_of("dtype", self.dtype, get_args(OutputType))
        if self.activation is not None:
            one_of("activation", self.activation, get_args(Activation))
        if self.zarr_format not in (2, 3):
            raise CellMapValueError(
                f"zarr_format must be 2 (OME-NGFF 0.4) or 3 (OME-NGFF 0.5), got {self.zarr_format!r}"
            )
        positive_number("block_size_mb", self.block_size_mb)
        thresholds = self.threshold if isinstance(self.threshold, Mapping) else {"": self.threshold}
        for name, value in thresholds.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise CellMapValueError(f"threshold{name and f' of {name}'} must be a finite number, got {value!r}")
        if self.shards and (self.zarr_format == 2 or any(s % c for s, c in zip(self.shards, self.chunks, strict=True))):
            raise CellMapValueError(
                f"shards need zarr_format=3, and must be multiples of the chunks {list(self.chunks)}, got "
                f"zarr_format={self.zarr_format} and {list(self.shards)}"
            )

    @property
    def unit(self) -> Shape:
        """The voxels of the smallest file that is written as a whole: a shard, or a chunk."""
        return self.shards or self.chunks


def parse_lengths(name: str, value: Sequence[int]) -> Shape:
    """Return the three lengths of a chunk or shard.

    Raises:
        CellMapValueError: they are not three positive whole numbers.
    """
    lengths = list(value)
    if len(lengths) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in lengths):
        raise CellMapValueError(f"{name} must be three positive numbers of voxels (z, y, x), got {value!r}")
    return lengths[0], lengths[1], lengths[2]


def parse_flips(axes: str | Sequence[str]) -> str:
    """Return the axes of test-time augmentation, in the order z, y, x.

    Raises:
        CellMapValueError: they are not axes, or one of them is given twice.
    """
    flips = "".join(axis for axis in AXES if axis in axes)
    if sorted(flips) != sorted(axes):
        raise CellMapValueError(f"tta_flips must be axes of the patch, each of z, y and x at most once, got {axes!r}")
    return flips
