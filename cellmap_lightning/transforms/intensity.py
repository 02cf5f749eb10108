"""Random intensity augmentation of raw, applied to whole batches on their device and seeded by sample numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.runtime.rng import AUGMENT, hashes, uniforms
from cellmap_lightning.transforms.box_effects import Cutnoise, Cutout
from cellmap_lightning.transforms.degradation import LowResolution, MotionBlur, Stripes
from cellmap_lightning.transforms.detector_noise import Poisson, SaltPepper
from cellmap_lightning.transforms.effect_options import make
from cellmap_lightning.transforms.effects import Draws, Effect, PatchGrid, axis_number, broadcast
from cellmap_lightning.transforms.histogram import MatchHistogram
from cellmap_lightning.transforms.normalization import is_range
from cellmap_lightning.transforms.section_effects import DarkSection, MissingSection, SectionContrast
from cellmap_lightning.validation import did_you_mean

#: Transforms that have a range alone. The index of a name is also its column of random numbers, and the number of names
#: is where those of noise begin: a change of either changes the samples of published seeds. Effects have separate
#: streams instead, see `Effect.stream`.
NAMES = ("blur", "contrast", "brightness", "gamma", "noise")
_LEAST = {"blur": 0.0, "contrast": 0.0, "brightness": -math.inf, "gamma": 0.0, "noise": 0.0}
EFFECTS: Mapping[str, type[Effect]] = {
    kind.name: kind
    for kind in (
        MissingSection, DarkSection, SectionContrast, LowResolution, MotionBlur, Stripes, Cutout, Cutnoise, SaltPepper,
        Poisson, MatchHistogram,
    )
}  # fmt: skip
#: All names in the order in which they are applied: optics, values, sections, detector, and then defects.
ORDER = (
    "low_resolution", "motion_blur", "blur", "match_histogram", "contrast", "brightness", "gamma", "section_contrast",
    "dark_section", "stripes", "poisson", "noise", "salt_pepper", "cutnoise", "cutout", "missing_section",
)  # fmt: skip


class IntensityTransforms:
    """Random changes of normalized raw; see docs/transforms.md.

    Args:
        config: any of these. A range is ``[lowest, highest]`` of a uniform distribution; all inputs of a sample use the
            same values.
            ``blur``: range of the standard deviation of a Gaussian, nm; the patch is padded with its border voxels.
            ``contrast``: range of a factor about 0.5.
            ``brightness``: range of an offset.
            ``gamma``: range of an exponent of the absolute value; the sign stays.
            ``noise``: range of the standard deviation of Gaussian noise, independent for each voxel.
            ``low_resolution``, ``motion_blur``, ``match_histogram``, ``section_contrast``, ``dark_section``,
            ``stripes``, ``poisson``, ``salt_pepper``, ``cutnoise``, ``cutout``, ``missing_section``: the options of an
            effect, with its ``probability``; see the class of that name.

    Raises:
        CellMapKeyError: an unknown name, or an unknown or missing option.
        CellMapValueError: an invalid value.

    Example:
        >>> IntensityTransforms({"noise": [0, 0.05], "missing_section": {"probability": 0.02}})  # doctest: +SKIP
    """

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        self.ranges: dict[str, tuple[float, float]] = {}
        self.effects: dict[str, Effect] = {}
        for name, value in (config or {}).items():
            if name not in ORDER:
                hint = did_you_mean(name, ORDER, f"; it has {', '.join(ORDER)}")
                raise CellMapKeyError(f"intensity_transforms has no {name!r}{hint}")
            if value is None:
                continue
            if name in EFFECTS:
                effect = make(EFFECTS[name], f"intensity_transforms.{name}", value)
                if effect.probability > 0:
                    self.effects[name] = effect
                continue
            if not is_range(value) or value[0] < _LEAST[name]:
                least = "" if _LEAST[name] == -math.inf else f", none below {_LEAST[name]:g}"
                raise CellMapValueError(f"intensity_transforms.{name} must be [lowest, highest]{least}, got {value!r}")
            self.ranges[name] = (float(value[0]), float(value[1]))

    def __bool__(self) -> bool:
        return bool(self.ranges or self.effects)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, IntensityTransforms)
            and (self.ranges, self.effects) == (other.ranges, other.effects)
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.ranges.items())), tuple(sorted(self.effects))))

    def __repr__(self) -> str:
        return f"IntensityTransforms({self.ranges | self.effects})"

    def __call__(
        self,
        raw: torch.Tensor,
        seed: int,
        samples: Sequence[int],
        number: int,
        scale: Sequence[float],
        reference: Window | None = None,
    ) -> torch.Tensor:
        """Augment a batch.

        Args:
            raw: float32 ``[N, 1, z, y, x]``, which is not changed.
            seed: random seed, combined with the number of each sample.
            samples: numbers of the samples.
            number: number of the input, so that each input has different noise.
            scale: voxel size, nm.
            reference: patch of the first input, in which sections and boxes are placed; None if this is it.

        Returns:
            float32 of the same shape. Noise is reproducible on the same kind of device.
        """
        window = Window(raw.shape[2:], scale)
        grid = PatchGrid(window, reference or window)
        value = self._drawn(seed, samples)
        given = raw
        for name in ORDER:
            if name in self.effects:
                raw = raw.clone() if raw is given else raw
                effect = self.effects[name]
                effect.apply(raw, Draws(seed, effect.stream, samples, number), grid)
            elif name == "blur" and name in value:
                raw = _blurred(raw, value["blur"].flatten().tolist(), scale, self.ranges["blur"][1])
            elif name == "contrast" and (name in value or "brightness" in value):
                raw = _linear(raw, value)
            elif name == "gamma" and name in value:
                raw = _power(raw, value["gamma"])
            elif name == "noise" and name in value:
                seeds = hashes(seed, AUGMENT, samples, len(NAMES) + number + 1)[:, -1].tolist()
                raw = _noisy(raw, value["noise"].flatten().tolist(), seeds)
        return raw

    def _drawn(self, seed: int, samples: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the value of each transform that has a range for each sample, ``[N, 1, 1, 1, 1]`` on the CPU."""
        drawn = uniforms(seed, AUGMENT, samples, len(NAMES)).astype(np.float32)
        value = {}
        for column, name in enumerate(NAMES):
            if name in self.ranges:
                low, high = self.ranges[name]
                value[name] = torch.from_numpy(low + (high - low) * drawn[:, column]).reshape(-1, 1, 1, 1, 1)
        return value

    def hidden(
        self, seed: int, samples: Sequence[int], window: Window, reference: Window, device: torch.device
    ) -> torch.Tensor | None:
        """Return the voxels of a target that overlap missing sections.

        Args:
            seed: random seed, combined with the number of each sample.
            samples: numbers of the samples.
            window: patch of the target.
            reference: patch of the first input.
            device: device of the result.

        Returns:
            bool ``[N, 1, z, y, x]`` with length 1 along the axes in a section; None if no voxel does, or targets stay
            known.
        """
        missing = self.effects.get("missing_section")
        if not isinstance(missing, MissingSection) or not missing.unknown:
            return None
        hidden = missing.hidden(Draws(seed, missing.stream, samples, 0), PatchGrid(window, reference))
        return broadcast(hidden, axis_number(missing.axis), device) if hidden.any() else None


def _linear(raw: torch.Tensor, value: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Multiply each sample by its contrast about 0.5, and add its brightness."""
    factor = value.get("contrast", torch.ones(1, dtype=torch.float32, device="cpu"))
    shift = 0.5 * (1 - factor) + value.get("brightness", torch.zeros(1, dtype=torch.float32, device="cpu"))
    return raw * factor.to(raw.device) + shift.to(raw.device)


def _noisy(raw: torch.Tensor, stds: Sequence[float], seeds: Sequence[int]) -> torch.Tensor:
    """Add Gaussian noise to each sample."""
    noise = torch.empty_like(raw)
    for part, std, seed in zip(noise, stds, seeds, strict=True):
        if std:
            part.normal_(0, std, generator=torch.Generator(raw.device).manual_seed(seed >> 1))
        else:
            part.zero_()
    return noise.add_(raw)


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
