"""Check of the values of float raw against the range that the normalization assumes."""

import math
from typing import Any

import numpy as np

from cellmap_lightning.transforms.normalization import Normalize

#: Largest absolute value of float raw that passes as about 0 to 1: z-scores do, 8 or 16 bits stored as floats do not.
LARGEST = 10.0
#: Width of the middle 99 % of the values below which they are nearly constant between 0 and 1.
NARROWEST = 0.01
#: Largest values of unsigned types, which float raw was probably stored in before.
_TYPES = (255.0, 65535.0)


def is_assumed(rule: Normalize, dtype: np.dtype[Any]) -> bool:
    """Return True if stored values become an input as they are, and are assumed to be about 0 to 1."""
    return rule.rule == "dtype" and dtype.kind == "f"


def contradiction(low: float, high: float) -> str | None:
    """Return how values contradict the range of about 0 to 1, and the settings that fit them; None if they do not.

    Args:
        low: 0.5th percentile of float raw, see `is_assumed`.
        high: its 99.5th percentile.
    """
    if max(abs(low), abs(high)) <= LARGEST and not 0 < high - low < NARROWEST:
        return None
    lowest, highest = _range(low, high)
    return (
        f"the middle 99 % of its values span {low:.6g} to {high:.6g}, and normalize=dtype keeps float values as they "
        f'are, for about 0 to 1; set normalize={{"range": [{lowest:.10g}, {highest:.10g}]}}, '
        'or normalize={"percentile": [0.5, 99.5]} for volumes that differ; an entry of datasets can have its own'
    )


def _range(low: float, high: float) -> tuple[float, float]:
    """Return a range of round numbers that holds all values: that of an unsigned type if they fill much of it."""
    for largest in _TYPES:
        if low >= 0 and 0.4 * largest < high <= largest:
            return 0.0, largest
    digits = 1 - math.floor(math.log10(high - low or abs(high)))
    step, noise = 10.0**-digits, 1e-4  # noise of float32, as a part of a step
    lowest = 0.0 if 0 <= low < 0.1 * high else round(math.floor(low / step + noise) * step, digits)
    highest = round(math.ceil(high / step - noise) * step, digits)
    return lowest, highest if highest > lowest else lowest + step
