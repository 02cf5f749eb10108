"""The conversion of model outputs to stored values."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.validation import one_of

Floats = npt.NDArray[np.float32]

#: Type of stored values: probabilities as ``round(255 p)``, unchanged values, or labels 0 and 1.
OutputType = Literal["uint8", "float16", "float32", "labels"]
#: Smallest value of foreground: of all channels, or ``{channel: value}``, with `DEFAULT_THRESHOLD` for the others.
Threshold = float | Mapping[str, float]
DEFAULT_THRESHOLD = 0.5
#: Tolerated excess of a probability over [0, 1]: the noise of half precision.
_TOLERANCE = 2e-3
_BITS_OF_255 = int(np.float32(255).view(np.uint32))
#: Voxels that are processed at a time: with their intermediate results they fit the processor's cache.
PUT_VOXELS = 1 << 17


def threshold_of(threshold: Threshold, name: str) -> float:
    """Return the threshold of a channel."""
    return threshold.get(name, DEFAULT_THRESHOLD) if isinstance(threshold, Mapping) else threshold


class StoredValues:
    """The storage type of an output, and the threshold of foreground; see docs/prediction.md.

    Args:
        kind: see `OutputType`.
        threshold: smallest value of foreground, which is 1 with ``labels``; of all channels, or of each.

    Attributes:
        dtype: type of a stored voxel.
        least: smallest stored value of foreground, of all channels or of each; None if stored values do not determine
            foreground.

    Raises:
        CellMapValueError: the kind is unknown.
    """

    def __init__(self, kind: OutputType = "uint8", threshold: float | Sequence[float] = DEFAULT_THRESHOLD) -> None:
        one_of("dtype", kind, get_args(OutputType))
        self.kind = kind
        self._thresholds = tuple(threshold) if isinstance(threshold, Sequence) else (threshold,)
        self.dtype: np.dtype[Any] = np.dtype(np.uint8 if kind == "labels" else kind)
        least = [_least_stored(value, kind) for value in self._thresholds]
        self.least = tuple(value for value in least if value is not None) if None not in least else None
        self._scaled: Floats = np.empty(0, np.float32)

    def store(self, values: Floats, out: npt.NDArray[Any], where: str) -> None:
        """Convert values, and write them to an array. Not thread-safe.

        Args:
            values: output of the model, ``[C, z, y, x]``.
            out: array of `dtype` and of the same shape, with any strides.
            where: name of the block, for messages.

        Raises:
            CellMapValueError: values are NaN or no probabilities, and the type stores probabilities.
        """
        planes = max(1, PUT_VOXELS // math.prod(values.shape[2:]))
        put = {"uint8": self._put_scaled, "labels": self._put_labels}.get(self.kind, self._put_floats)
        for channel, stored, threshold in zip(values, out, self._of_channels(self._thresholds, values), strict=True):
            for z in range(0, len(channel), planes):
                put(channel[z : z + planes], stored[z : z + planes], where, threshold)

    def reached(self, stored: npt.NDArray[Any], values: Floats | None = None) -> list[int]:
        """Return the number of voxels of each channel that reach the threshold.

        Args:
            stored: stored values, ``[C, z, y, x]``.
            values: output of the model; needed if `least` is None.
        """
        if self.least is not None:
            channels, limits = stored, self._of_channels(self.least, stored)
        else:
            assert values is not None
            channels, limits = values, self._of_channels(self._thresholds, values)
        return [
            sum(int(np.count_nonzero(plane >= limit)) for plane in channel)
            for channel, limit in zip(channels, limits, strict=True)
        ]

    @staticmethod
    def _of_channels(limits: tuple[float, ...], channels: npt.NDArray[Any]) -> tuple[float, ...]:
        """Return the limit of each channel."""
        return limits * len(channels) if len(limits) == 1 else limits

    def _put_labels(self, values: Floats, out: npt.NDArray[Any], where: str, threshold: float) -> None:
        _check(float(values.min()), float(values.max()), self.kind, where)
        np.greater_equal(values, threshold, out=out.view(np.bool_))

    def _put_floats(self, values: Floats, out: npt.NDArray[Any], where: str, threshold: float) -> None:
        with np.errstate(over="ignore"):
            out[...] = values
        if self.kind == "float16" and np.isinf(out).any() and not np.isinf(values).any():
            raise CellMapValueError(f"{where}: {np.abs(values).max():g} is too large for float16; use float32")

    def _put_scaled(self, values: Floats, out: npt.NDArray[Any], where: str, threshold: float) -> None:
        if self._scaled.size < values.size:
            self._scaled = np.empty(values.size, np.float32)
        scaled = self._scaled[: values.size].reshape(values.shape)
        with np.errstate(over="ignore"):
            np.multiply(values, np.float32(255), out=scaled)
        # The bits of non-negative floats are ordered as the numbers; those of negative floats and of NaN are larger. So
        # one comparison of integers finds values outside [0, 255].
        if scaled.view(np.uint32).max() > _BITS_OF_255:
            _check(float(values.min()), float(values.max()), self.kind, where)
            np.clip(scaled, 0, 255, out=scaled)
        np.rint(scaled, out=out, casting="unsafe")


def _check(low: float, high: float, kind: str, where: str) -> None:
    """Raise an error if values with minimum ``low`` and maximum ``high`` are no probabilities."""
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
        values = "NaN" if math.isnan(low + high) else f"values from {low:.4g} to {high:.4g}"
        raise CellMapValueError(
            f"{where}: the model returned {values}, and dtype={kind} stores probabilities from 0 to 1; "
            "activation='sigmoid' (or 'softmax') converts logits, dtype='float32' stores any number"
        )


def _least_stored(threshold: float, kind: OutputType) -> float | None:
    """Return the smallest stored value of numbers that reach a threshold; None if others are stored so too.

    Of ``round(255 p)``: rounding is monotonic, and it suffices to compare the numbers on both sides of the threshold.
    """
    if kind != "uint8":
        return {"labels": 1, "float32": threshold}.get(kind)
    reaches = np.float32(threshold)  # float32, as numpy converts it to compare
    around = np.array([np.nextafter(reaches, np.float32(-np.inf)), reaches])
    below, least = np.rint(around * np.float32(255)).tolist()
    return int(least) if below < least and below >= 0 and least <= 255 else None
