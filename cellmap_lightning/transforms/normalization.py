"""Normalization of raw, and value transforms of inputs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.io.statistics import Statistics
from cellmap_lightning.runtime.buffers import BUFFERS

AUTO = "auto"


@dataclass(frozen=True)
class Normalize:
    """A rule of normalization; see docs/transforms.md.

    Attributes:
        rule: ``dtype``, ``range``, ``percentile`` or ``zscore``.
        low: stored value, or percentile, that is mapped to 0.
        high: stored value, or percentile, that is mapped to 1.
        invert: exchange dark and bright.
    """

    rule: str = "dtype"
    low: float = 0.0
    high: float = 0.0
    invert: bool = False

    @classmethod
    def parse(cls, value: Any, invert: Any = False) -> "Normalize":
        """Parse ``dtype``, ``zscore``, ``{range: [lo, hi]}`` or ``{percentile: [lo, hi]}``.

        Raises:
            CellMapValueError: the value is not one of these.

        Example:
            >>> Normalize.parse({"range": [0, 200]})
            Normalize(rule='range', low=0.0, high=200.0, invert=False)
        """
        if not isinstance(invert, bool):
            raise CellMapValueError(f"invert must be true or false, got {invert!r}")
        if value in ("dtype", "zscore"):
            return cls(value, invert=invert)
        if isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in ("range", "percentile"):
            (rule, span), *_ = value.items()
            if is_range(span) and span[0] < span[1] and (rule == "range" or 0 <= span[0] < span[1] <= 100):
                return cls(rule, float(span[0]), float(span[1]), invert)
        raise CellMapValueError(
            "normalize must be dtype, zscore, {range: [lowest, highest]} in stored values, or {percentile: "
            f"[lowest, highest]}} with 0 <= lowest < highest <= 100; got {value!r}"
        )

    @property
    def needs_statistics(self) -> bool:
        """True if the rule depends on the values of the volume."""
        return self.rule in ("percentile", "zscore")

    def affine(self, dtype: np.dtype[Any], statistics: Statistics | None, where: str = "") -> tuple[float, float]:
        """Return offset and factor: ``(stored - offset) * factor`` is the input.

        Args:
            dtype: the stored type.
            statistics: statistics of the volume, if the rule needs them.
            where: name of the volume in messages.

        Raises:
            CellMapValueError: the volume has a single value, which cannot be scaled.
        """
        if self.rule == "dtype":
            info = np.iinfo(dtype) if dtype.kind in "iu" else None
            low, high = (float(info.min), float(info.max)) if info else (0.0, 1.0)
        elif self.rule == "range":
            low, high = self.low, self.high
        else:
            assert statistics is not None
            if self.rule == "percentile":
                low, high = statistics.percentile(self.low), statistics.percentile(self.high)
            else:
                low, high = statistics.mean, statistics.mean + statistics.std
            if not high > low:
                raise CellMapValueError(
                    f"{where}: normalize {self.rule} needs values that differ; all are about {low:g}"
                )
        factor = 1.0 / (high - low)
        if not self.invert:
            return low, factor
        # One minus the value, or the negative of a z-score.
        return (low if self.rule == "zscore" else high), -factor


def is_finite(value: Any) -> bool:
    """Return True for a finite number that is not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_range(value: Any) -> bool:
    """Return True for ``[lowest, highest]``: two finite numbers in ascending order."""
    return isinstance(value, Sequence) and len(value) == 2 and all(map(is_finite, value)) and value[0] <= value[1]


@dataclass(frozen=True, eq=False)
class Scaling:
    """Normalization of a batch by the offset and factor of each sample's crop; see docs/transforms.md.

    Attributes:
        starts: first position of each crop, int64 ``[K]``.
        offsets: float64 ``[K]``.
        factors: float64 ``[K]``.
    """

    starts: torch.Tensor
    offsets: torch.Tensor
    factors: torch.Tensor

    @cached_property
    def _far(self) -> bool:
        return bool(self.offsets.abs().max() > 2**16)

    @classmethod
    def of(cls, starts: Sequence[int], affine: Sequence[tuple[float, float]]) -> "Scaling":
        """Create from one entry per crop; equal entries are merged to one."""
        if len(set(affine)) == 1:
            starts, affine = [0], affine[:1]
        offsets, factors = zip(*affine, strict=True)
        return cls(
            torch.tensor(list(starts), dtype=torch.int64, device="cpu"),
            torch.tensor(offsets, dtype=torch.float64, device="cpu"),
            torch.tensor(factors, dtype=torch.float64, device="cpu"),
        )

    @classmethod
    def none(cls) -> "Scaling":
        """Create the identity, which keeps stored values."""
        return cls.of([0], [(0.0, 1.0)])

    def __call__(self, raw: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Normalize stored values ``[N, ...]`` of samples at positions ``[N]`` to float32."""
        # Near a large offset, float32 cannot distinguish the values of wide types.
        wide = (raw.dtype.itemsize > 2 and raw.dtype != torch.float32) or self._far
        if len(self.starts) == 1 and raw.device.type == "cpu":
            dtype = np.float64 if wide else np.float32
            value = BUFFERS.empty(tuple(raw.shape), dtype)
            offset, factor = dtype(self.offsets.item()), dtype(self.factors.item())
            if offset == 0:  # bit-identical, in one pass
                np.multiply(raw.numpy(), factor, out=value, dtype=dtype, casting="unsafe")
            else:
                np.subtract(raw.numpy(), offset, out=value, dtype=dtype, casting="unsafe")
                np.multiply(value, factor, out=value)
            return torch.from_numpy(value.astype(np.float32, copy=False))
        working = torch.float64 if wide else torch.float32
        out = raw.to(working, copy=True)
        if len(self.starts) == 1:
            return out.sub_(self.offsets.item()).mul_(self.factors.item()).to(torch.float32)
        crop = torch.searchsorted(self.starts.to(positions.device), positions, right=True) - 1
        shape = (-1, *[1] * (raw.ndim - 1))
        out -= self.offsets.to(raw.device, working)[crop].reshape(shape)
        return out.mul_(self.factors.to(raw.device, working)[crop].reshape(shape)).to(torch.float32)


def input_transforms(transforms: Any, inputs: Sequence[str], what: str) -> dict[str, Any]:
    """Return the transform of each input: ``"auto"`` (normalize), None, or a callable.

    Args:
        transforms: one for all inputs, or ``{input: transform}``; a list is a chain of callables.
        inputs: names of the inputs.
        what: the argument, for messages.

    Raises:
        CellMapKeyError: an input does not exist.
        CellMapValueError: an invalid transform.
    """
    if isinstance(transforms, Mapping):
        unknown = [name for name in transforms if name not in inputs]
        if unknown:
            raise CellMapKeyError(f"{what}: {unknown} are not among the inputs {list(inputs)}")
        return {name: _check(transforms.get(name, AUTO), what) for name in inputs}
    return {name: _check(transforms, what) for name in inputs}


def _check(transform: Any, what: str) -> Any:
    if isinstance(transform, Sequence) and not isinstance(transform, str):
        return Chain([_callable(t, what) for t in transform])
    if transform is None or transform == AUTO or callable(transform):
        return transform
    raise CellMapValueError(f"{what} must be 'auto', null or something that can be called, got {transform!r}")


def _callable(transform: Any, what: str) -> Callable[..., Any]:
    if not callable(transform):
        raise CellMapValueError(f"{what}: {transform!r} in the list cannot be called")
    function: Callable[..., Any] = transform
    return function


class Chain:
    """Callables applied one after the other; chains of the same callables are equal.

    Example:
        >>> Chain([torch.neg, torch.abs])(torch.tensor([1.0]))
        tensor([1.])

    Args:
        transforms: the callables.
    """

    def __init__(self, transforms: Sequence[Callable[..., Any]]) -> None:
        self.transforms = list(transforms)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and self.transforms == other.transforms

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.transforms)))

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """Apply the callables in order."""
        for transform in self.transforms:
            value = transform(value)
        return value


def seed_own_generator(transform: Any, seed: int) -> None:
    """Seed the random generator that a transform holds, if it has MONAI's method for that.

    Args:
        transform: a callable; one with ``set_random_state(seed=...)`` is seeded, and so is each part of a `Chain`.
        seed: a whole number of at least 0.
    """
    if isinstance(transform, Chain):
        for number, part in enumerate(transform.transforms):
            seed_own_generator(part, seed + number)
    elif hasattr(transform, "set_random_state"):
        transform.set_random_state(seed=seed & 0xFFFFFFFF)


class OnDictionary:
    """Adapter of a transform of dictionaries, such as MONAI's ``RandGaussianNoised(keys="raw")``, to tensors.

    Args:
        transform: callable from ``{key: tensor}`` to a mapping that holds ``key``.
        key: key of the tensor in the dictionary.

    Example:
        >>> transform = OnDictionary(RandGaussianNoised(keys="raw"))  # doctest: +SKIP
    """

    def __init__(self, transform: Callable[..., Any], key: str = "raw") -> None:
        self.transform = transform
        self.key = key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OnDictionary) and (self.transform, self.key) == (other.transform, other.key)

    def __hash__(self) -> int:
        return hash((id(self.transform), self.key))

    def set_random_state(self, seed: int) -> None:
        """Seed the random generator of the transform, if it has one."""
        seed_own_generator(self.transform, seed)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """Apply the transform to a tensor."""
        result: torch.Tensor = self.transform({self.key: value})[self.key]
        return result
