"""What the stored values of raw become."""

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
    """The rule by which stored values become an input.

    Attributes:
        rule: ``dtype``, ``range``, ``percentile`` or ``zscore``.
        low: what becomes 0: a stored value, or a percentile.
        high: what becomes 1, likewise.
        invert: exchange dark and bright.
    """

    rule: str = "dtype"
    low: float = 0.0
    high: float = 0.0
    invert: bool = False

    @classmethod
    def parse(cls, value: Any, invert: Any = False) -> "Normalize":
        """Read ``dtype``, ``zscore``, ``{range: [lo, hi]}`` or ``{percentile: [lo, hi]}``.

        Raises:
            CellMapValueError: it is none of these.
        """
        if not isinstance(invert, bool):
            raise CellMapValueError(f"invert must be true or false, got {invert!r}")
        if value in ("dtype", "zscore"):
            return cls(value, invert=invert)
        if isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in ("range", "percentile"):
            (rule, span), *_ = value.items()
            good = isinstance(span, Sequence) and len(span) == 2 and all(map(_finite, span))
            if good and span[0] < span[1] and (rule == "range" or 0 <= span[0] < span[1] <= 100):
                return cls(rule, float(span[0]), float(span[1]), invert)
        raise CellMapValueError(
            "normalize must be dtype, zscore, {range: [lowest, highest]} in stored values, or {percentile: "
            f"[lowest, highest]}} with 0 <= lowest < highest <= 100; got {value!r}"
        )

    @property
    def needs_statistics(self) -> bool:
        """Whether the values of the volume have to be looked at."""
        return self.rule in ("percentile", "zscore")

    def affine(self, dtype: np.dtype[Any], statistics: Statistics | None, where: str = "") -> tuple[float, float]:
        """Offset and factor: ``(stored - offset) * factor`` is the input.

        Raises:
            CellMapValueError: the volume has a single value, so that nothing can be told apart by it.
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
        # One minus it; of a z-score, its negative.
        return (low if self.rule == "zscore" else high), -factor


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, eq=False)
class Scaling:
    """Offset and factor of the crop that each sample comes from.

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
        """One entry per crop; one for all where they agree."""
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
        """Stored values as they are."""
        return cls.of([0], [(0.0, 1.0)])

    def __call__(self, raw: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Normalize a batch: float32 from ``[N, ...]`` stored values and ``[N]`` positions."""
        # Near a large offset float32 cannot tell the values of wide types apart.
        wide = (raw.dtype.itemsize > 2 and raw.dtype != torch.float32) or self._far
        if len(self.starts) == 1 and raw.device.type == "cpu":
            kind = np.float64 if wide else np.float32
            value = BUFFERS.empty(tuple(raw.shape), kind)
            offset, factor = kind(self.offsets.item()), kind(self.factors.item())
            if offset == 0:  # the same bits, in one pass
                np.multiply(raw.numpy(), factor, out=value, dtype=kind, casting="unsafe")
            else:
                np.subtract(raw.numpy(), offset, out=value, dtype=kind, casting="unsafe")
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
    """Transform of each input: ``"auto"`` (normalize), None, or a callable; from one for all or ``{input: ...}``.

    A list is a chain of callables.

    Raises:
        CellMapKeyError: an input that does not exist.
        CellMapValueError: something that is none of these.
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
    found: Callable[..., Any] = transform
    return found


class Chain:
    """Callables one after the other; two chains of the same callables are equal.

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
        """Apply them in order."""
        for transform in self.transforms:
            value = transform(value)
        return value


def seed_own_generator(transform: Any, seed: int) -> None:
    """Seed the generator that a transform keeps for itself, if it has MONAI's method for that.

    Args:
        transform: a callable; one with ``set_random_state(seed=...)`` is seeded, and so is each part of a `Chain`.
        seed: any whole number that is not negative.
    """
    if isinstance(transform, Chain):
        for number, part in enumerate(transform.transforms):
            seed_own_generator(part, seed + number)
    elif hasattr(transform, "set_random_state"):
        transform.set_random_state(seed=seed & 0xFFFFFFFF)


class OnDictionary:
    """A transform of dictionaries, such as MONAI's ``RandGaussianNoised(keys="raw")``, as one of a tensor.

    Args:
        transform: from ``{key: tensor}`` to a mapping that holds ``key``.
        key: the name under which it finds the tensor.
    """

    def __init__(self, transform: Callable[..., Any], key: str = "raw") -> None:
        self.transform = transform
        self.key = key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OnDictionary) and (self.transform, self.key) == (other.transform, other.key)

    def __hash__(self) -> int:
        return hash((id(self.transform), self.key))

    def set_random_state(self, seed: int) -> None:
        """Seed the generator of the transform, if it has one of its own."""
        seed_own_generator(self.transform, seed)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        result: torch.Tensor = self.transform({self.key: value})[self.key]
        return result
