"""Random intensity augmentation of raw, applied to whole batches on their device and seeded by sample numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.runtime.rng import AUGMENT, hashes, uniforms
from cellmap_lightning.transforms.normalization import is_range
from cellmap_lightning.validation import did_you_mean

#: Transforms in the order in which they are applied. The index of a name is also its column of random numbers, and the
#: number of names is where those of noise begin: a change of either changes the samples of published seeds.
NAMES = ("blur", "contrast", "brightness", "gamma", "noise")
_LEAST = {"blur": 0.0, "contrast": 0.0, "brightness": -math.inf, "gamma": 0.0, "noise": 0.0}


class IntensityTransforms:
    """Random blur, contrast, brightness, gamma and noise of normalized raw; see docs/transforms.md.

    Args:
        config: any of these, each a range ``[lowest, highest]`` of a uniform distribution; all inputs of a sample use
            the same values.
            ``blur``: standard deviation of a Gaussian, nm; the patch is padded with its border voxels.
            ``contrast``: factor about 0.5.
            ``brightness``: offset.
            ``gamma``: exponent of the absolute value; the sign stays.
            ``noise``: standard deviation of Gaussian noise, independent for each voxel.

    Raises:
        CellMapKeyError: an unknown name.
        CellMapValueError: an invalid range.
    """

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        self.ranges: dict[str, tuple[float, float]] = {}
        for name, span in (config or {}).items():
            if name not in NAMES:
                hint = did_you_mean(name, NAMES, f"; it has {', '.join(NAMES)}")
                raise CellMapKeyError(f"intensity_transforms has no {name!r}{hint}")
            if span is None:
                continue
            if not is_range(span) or span[0] < _LEAST[name]:
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
        """Augment a batch.

        Args:
            raw: float32 ``[N, 1, z, y, x]``, which is not changed.
            seed: random seed, combined with the number of each sample.
            samples: numbers of the samples.
            number: number of the input, so that each input has different noise.
            scale: voxel size, nm.

        Returns:
            float32 of the same shape. Noise is reproducible on the same kind of device.
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
            for part, std, noise_seed in zip(noise, value["noise"].flatten().tolist(), seeds, strict=True):
                if std:
                    part.normal_(0, std, generator=torch.Generator(raw.device).manual_seed(noise_seed >> 1))
                else:
                    part.zero_()
            raw = noise.add_(raw)
        return raw


def _power(raw: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Raise the absolute values of each sample to its exponent, and keep the signs."""
    if raw.device.type != "cpu":
        return raw.abs().pow_(exponents.to(raw.device)).copysign_(raw)
    out = raw.abs()
    for part, exponent in zip(out.numpy(), exponents.flatten().tolist(), strict=True):
        # Not torch: it uses another function, with other last bits, for the remainder of each thread's share.
        np.power(part, np.float32(exponent), out=part)
    return out.copysign_(raw)


def _blurred(raw: torch.Tensor, sigmas: Sequence[float], scale: Sequence[float], most: float) -> torch.Tensor:
    """Blur each sample with its Gaussian, axis by axis; an axis of length 1 is not blurred.

    Args:
        raw: float32 ``[N, 1, z, y, x]``.
        sigmas: standard deviation of each sample, nm.
        scale: voxel size, nm.
        most: largest standard deviation, from which the radius follows.
    """
    # Explicit sums, since the last bits of a convolution depend on the number of samples and of threads.
    cpu = raw.device.type == "cpu"
    xp: Any = np if cpu else torch  # on the CPU, torch would start its threads for each of many short sums
    values: Any = raw.numpy() if cpu else raw
    out = xp.empty_like(values)
    step = 1 if cpu else len(raw)  # one sample at a time fits into the CPU cache
    for first in range(0, len(raw), step):
        some = values[first : first + step]
        for axis, voxel in enumerate(scale, start=2):
            radius, size = math.ceil(3 * most / voxel), raw.shape[axis]
            if size == 1 or radius == 0:
                continue
            kernels = [_gaussian(sigma / voxel, radius) for sigma in sigmas[first : first + step]]
            weights: Any = np.array(kernels, np.float32)
            if not cpu:
                weights = torch.from_numpy(weights).to(raw.device)
            middle, *others = weights.T.reshape(radius + 1, -1, 1, 1, 1, 1)
            before = (slice(None),) * axis
            lower, upper = (some[(*before, slice(i, i + 1))] for i in (0, size - 1))
            padded = xp.concatenate([lower] * radius + [some] + [upper] * radius, axis)
            some = some * middle
            part = xp.empty_like(some)
            for distance, weight in enumerate(others, start=1):
                # The kernel is symmetric: voxels at the same distance on both sides share a weight.
                starts = (radius - distance, radius + distance)
                xp.add(*(padded[(*before, slice(start, start + size))] for start in starts), out=part)
                part *= weight
                some += part
        out[first : first + step] = some
    return torch.from_numpy(out) if cpu else out


def _gaussian(sigma: float, radius: int) -> list[float]:
    """Return the weights of the middle voxel and of those at distances of 1 to ``radius`` voxels; their sum is 1."""
    side = [math.exp(-0.5 * (distance / sigma) ** 2) if sigma > 0 else 0.0 for distance in range(1, radius + 1)]
    total = 1 + 2 * math.fsum(side)
    return [1 / total, *(weight / total for weight in side)]
