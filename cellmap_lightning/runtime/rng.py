"""Counter-based random numbers: deterministic functions of seed, purpose and counter, the same on every machine.

The mixing function is the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014, doi:10.1145/2660193.2660195, with the constants of its variant 13).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_ONE, _TWO = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

#: Purposes of the numbers; each has a separate stream.
PLACE, TURN, VALUES, ORDER, AUGMENT, INDEX, HIDE, SHUFFLE = range(8)
#: Purposes of spatial transforms beside `TURN`; the last two are of a sample's control points and sections.
STRETCH, ELASTIC, SLIP, MISALIGN, CONTROLS, SECTIONS = range(16, 22)
#: First of the purposes of intensity effects: effect ``n`` uses ``EFFECT + 2 * n`` and the next one.
EFFECT = 1000


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _ONE
    z = (z ^ (z >> np.uint64(27))) * _TWO
    return z ^ (z >> np.uint64(31))


def hashes(
    seed: int, purpose: int, counters: Sequence[int] | npt.NDArray[np.int64], count: int
) -> npt.NDArray[np.uint64]:
    """Return ``[len(counters), count]`` independent 64-bit numbers, a function of (seed, purpose, counter) alone."""
    key = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64) + _GAMMA)
    key = _mix(key + np.array([purpose + 1], np.uint64) * _GAMMA)  # arrays wrap around, scalars would warn
    state = _mix(key + np.asarray(counters, np.int64).astype(np.uint64) * _GAMMA)
    return _mix(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GAMMA)


def uniforms(
    seed: int, purpose: int, counters: Sequence[int] | npt.NDArray[np.int64], count: int
) -> npt.NDArray[np.float64]:
    """Return ``[len(counters), count]`` independent numbers in [0, 1); see `hashes`."""
    return (hashes(seed, purpose, counters, count) >> np.uint64(11)).astype(np.float64) / (
        1 << 53
    )  # the 53 bits of a double
