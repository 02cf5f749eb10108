"""Random changes of the values of raw: for a whole batch at a time, where it is finished, each sample by its number."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.runtime.rng import AUGMENT, hashes, uniforms

#: In the order in which they act.
NAMES = ("blur", "contrast", "brightness", "gamma", "noise")
_LEAST = {"blur": 0.0, "contrast": 0.0, "brightness": -math.inf, "gamma": 0.0, "noise": 0.0}


class IntensityTransforms:
    """Random blur, contrast, brightness, gamma and noise of normalized raw.

    Args:
        config: any of these, each ``[lowest, highest]``, from which every sample draws uniformly; all inputs of a
            sample draw the same.
            ``blur``: standard deviation of a Gaussian, nm; beyond the patch its border voxels go on.
            ``contrast``: factor about 0.5.
            ``brightness``: what is added.
            ``gamma``: exponent of the absolute value; the sign stays.
            ``noise``: standard deviation of what is added to each voxel by itself.

    Raises:
        CellMapKeyError: an unknown name.
        CellMapValueError: a range that is none, or below what makes sense.
    """

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        self.ranges: dict[str, tuple[float, float]] = {}
        for name, span in (config or {}).items():
            if name not in NAMES:
                raise CellMapKeyError(f"intensity_transforms has no {name!r}; it has {', '.join(NAMES)}")
            if span is None:
                continue
            good = (
                isinstance(span, Sequence)
                and len(span) == 2
                and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in span)
                and _LEAST[name] <= span[0] <= span[1]
            )
            if not good:
                least = "" if _LEAST[name] == -math.inf else f", none below {_LEAST[name]:g}"
                raise CellMapValueError(f"intensity_transforms.{name} must be [lowest, highest]{least}, got {span!r}")
            self.ranges[name] = (float(span[0]), float(span[1]))

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IntensityTransforms) and self.ranges == other.ranges

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.ranges.items())))

    def __repr__(self) -> str:
        return f"IntensityTransforms({self.ranges})"

    def __call__(
        self, raw: torch.Tensor, seed: int, samples: Sequence[int], number: int, scale: Sequence[float]
    ) -> torch.Tensor:
        """Change a batch.

        Args:
            raw: float32 ``[N, 1, z, y, x]``; it stays as it is.
            seed: what is drawn follows from it and from the number of each sample.
            samples: their numbers.
            number: which input this is: its noise is its own.
            scale: voxel size, nm.

        Returns:
            float32 of the same shape. Noise is the same again on the same kind of device.
        """
        drawn = uniforms(seed, AUGMENT, samples, len(NAMES)).astype(np.float32)
        value = {}
        for column, name in enumerate(NAMES):
            if name in self.ranges:
                low, high = self.ranges[name]
                value[name] = torch.from_numpy(low + (high - low) * drawn[:, column]).reshape(-1, 1, 1, 1, 1)
        if "blur" in value:
            raw = _blurred(raw, value["blur"].flatten().tolist(), scale, self.ranges["blur"][1])
        if "contrast" in value or "brightness" in value:
            factor = value.get("contrast", torch.ones(1, dtype=torch.float32, device="cpu"))
            shift = 0.5 * (1 - factor) + value.get("brightness", torch.zeros(1, dtype=torch.float32, device="cpu"))
            raw = raw * factor.to(raw.device) + shift.to(raw.device)
        if "gamma" in value:
            raw = _power(raw, value["gamma"])
        if "noise" in value:
            seeds = hashes(seed, AUGMENT, samples, len(NAMES) + number + 1)[:, -1].tolist()
            noise = torch.empty_like(raw)
            for part, std, own in zip(noise, value["noise"].flatten().tolist(), seeds, strict=True):
                part.normal_(
                    0, std, generator=torch.Generator(raw.device).manual_seed(own >> 1)
                ) if std else part.zero_()
            raw = noise.add_(raw)
        return raw


def _power(raw: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Each sample's absolute values to a power of its own, with their signs."""
    if raw.device.type != "cpu":
        return raw.abs().pow_(exponents.to(raw.device)).copysign_(raw)
    out = raw.abs()
    for part, exponent in zip(out.numpy(), exponents.flatten().tolist(), strict=True):
        # Torch has another function, of other last bits, for what is left over of each thread's share.
        np.power(part, np.float32(exponent), out=part)
    return out.copysign_(raw)


def _blurred(raw: torch.Tensor, sigmas: Sequence[float], scale: Sequence[float], most: float) -> torch.Tensor:
    """Each sample under a Gaussian of its own, axis by axis; the axes of a slice have no neighbours.

    Sums are written out, since the last bits of a convolution depend on the number of samples and of threads.
    """
    cpu = raw.device.type == "cpu"
    xp: Any = np if cpu else torch  # torch would wake its threads for each of many short sums
    values: Any = raw.numpy() if cpu else raw
    out = xp.empty_like(values)
    few = 1 if cpu else len(raw)  # what one sample takes stays in a processor's cache
    for first in range(0, len(raw), few):
        some = values[first : first + few]
        for axis, step in enumerate(scale, start=2):
            radius, size = math.ceil(3 * most / step), raw.shape[axis]
            if size == 1 or radius == 0:
                continue
            weights = np.array([_gaussian(sigma / step, radius) for sigma in sigmas[first : first + few]], np.float32)
            there: Any = weights if cpu else torch.from_numpy(weights).to(raw.device)
            middle, *others = there.T.reshape(radius + 1, -1, 1, 1, 1, 1)
            before = (slice(None),) * axis
            lower, upper = (some[(*before, slice(at, at + 1))] for at in (0, size - 1))
            padded = xp.concatenate([lower] * radius + [some] + [upper] * radius, axis)
            some = some * middle
            part = xp.empty_like(some)
            for at, weight in enumerate(others, start=1):
                either = (padded[(*before, slice(begin, begin + size))] for begin in (radius - at, radius + at))
                xp.add(*either, out=part)
                part *= weight
                some += part
        out[first : first + few] = some
    return torch.from_numpy(out) if cpu else out


def _gaussian(sigma: float, radius: int) -> list[float]:
    """Weights of the middle voxel and of those on either side of it, in voxels."""
    side = [math.exp(-0.5 * (at / sigma) ** 2) if sigma > 0 else 0.0 for at in range(1, radius + 1)]
    whole = 1 + 2 * math.fsum(side)
    return [1 / whole, *(weight / whole for weight in side)]
