"""What the numbers of a model become in the array that is written."""

import math
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError

Floats = npt.NDArray[np.float32]

#: How values are stored: probabilities as ``round(255 p)``, as they are, or as labels 0 and 1.
OutputType = Literal["uint8", "float16", "float32", "labels"]
#: By how much a probability may miss [0, 1]: the noise of half precision.
_TOLERANCE = 2e-3
_BITS_OF_255 = int(np.float32(255).view(np.uint32))
#: Voxels that are worked on at a time: with what is made of them they stay in the processor's cache.
PUT_VOXELS = 1 << 17


class StoredValues:
    """How the values of an output are stored, and which of them count as foreground.

    Args:
        kind: see `OutputType`.
        threshold: from which value a voxel is 1 with ``labels``, and counted as foreground.

    Attributes:
        dtype: type of a stored voxel.
        least: the least stored value of a voxel that reaches the threshold, where what is stored tells that.

    Raises:
        CellMapValueError: another kind.
    """

    def __init__(self, kind: OutputType = "uint8", threshold: float = 0.5) -> None:
        if kind not in get_args(OutputType):
            raise CellMapValueError(f"dtype is one of {', '.join(get_args(OutputType))}, got {kind!r}")
        self.kind, self.threshold = kind, threshold
        self.dtype: np.dtype[Any] = np.dtype(np.uint8 if kind == "labels" else kind)
        self.least: float | None = {"labels": 1, "float32": threshold, "float16": None}.get(kind)
        if kind == "uint8":
            self.least = _least_stored(threshold)
        self._scaled: Floats = np.empty(0, np.float32)

    def store(self, values: Floats, out: npt.NDArray[Any], where: str) -> None:
        """Put values where they are stored. One thread at a time.

        Args:
            values: what the model gave, ``[C, z, y, x]``.
            out: of `dtype`, the same shape, any strides.
            where: of what, for an error.

        Raises:
            CellMapValueError: values that are no numbers, or no probabilities where these are stored.
        """
        planes = max(1, PUT_VOXELS // math.prod(values.shape[2:]))
        put = {"uint8": self._put_scaled, "labels": self._put_labels}.get(self.kind, self._put_floats)
        for channel, stored in zip(values, out, strict=True):
            for z in range(0, len(channel), planes):
                put(channel[z : z + planes], stored[z : z + planes], where)

    def reached(self, stored: npt.NDArray[Any], values: Floats | None = None) -> list[int]:
        """How many voxels of each channel reach the threshold.

        Args:
            stored: as they are stored, ``[C, z, y, x]``.
            values: what the model gave; needed where what is stored does not tell, see `least`.
        """
        if self.least is not None:
            channels, least = stored, self.least
        else:
            assert values is not None
            channels, least = values, self.threshold
        return [sum(int(np.count_nonzero(plane >= least)) for plane in channel) for channel in channels]

    def _put_labels(self, values: Floats, out: npt.NDArray[Any], where: str) -> None:
        _check(float(values.min()), float(values.max()), self.kind, where)
        np.greater_equal(values, self.threshold, out=out.view(np.bool_))

    def _put_floats(self, values: Floats, out: npt.NDArray[Any], where: str) -> None:
        with np.errstate(over="ignore"):
            out[...] = values
        if self.kind == "float16" and np.isinf(out).any() and not np.isinf(values).any():
            raise CellMapValueError(f"{where}: {np.abs(values).max():g} is too large for float16; use float32")

    def _put_scaled(self, values: Floats, out: npt.NDArray[Any], where: str) -> None:
        if self._scaled.size < values.size:
            self._scaled = np.empty(values.size, np.float32)
        scaled = self._scaled[: values.size].reshape(values.shape)
        with np.errstate(over="ignore"):
            np.multiply(values, np.float32(255), out=scaled)
        # The bits of a float of at least 0 keep its order as a number; those of any other, and of NaN, are beyond them.
        if scaled.view(np.uint32).max() > _BITS_OF_255:
            _check(float(values.min()), float(values.max()), self.kind, where)
            np.clip(scaled, 0, 255, out=scaled)
        np.rint(scaled, out=out, casting="unsafe")


def _check(low: float, high: float, kind: str, where: str) -> None:
    """Raise where values that end at ``low`` and ``high`` are no probabilities."""
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
        found = "NaN" if math.isnan(low + high) else f"values from {low:.4g} to {high:.4g}"
        raise CellMapValueError(
            f"{where}: the model gave {found}, and dtype={kind} stores probabilities from 0 to 1; "
            "activation='sigmoid' (or 'softmax') makes them of logits, dtype='float32' stores any number"
        )


def _least_stored(threshold: float) -> int | None:
    """The least ``round(255 p)`` of a probability that reaches a threshold, if none that does not is stored as that.

    Rounding keeps the order, so it is enough to look at the two numbers on either side of the threshold.
    """
    reaches = np.float32(threshold)  # as numpy compares float32 with it
    around = np.array([np.nextafter(reaches, np.float32(-np.inf)), reaches])
    below, least = np.rint(around * np.float32(255)).tolist()
    return int(least) if below < least and below >= 0 and least <= 255 else None
