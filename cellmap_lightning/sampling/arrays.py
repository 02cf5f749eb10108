"""What a batch is made of: the arrays that are asked for, its compact form, its finished form."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

from cellmap_lightning.draws import VALUES, hashes
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.transforms.intensity import AUTO, to_unit_range
from cellmap_lightning.transforms.targets import packed_bytes, unpack
from cellmap_lightning.volumes.placement import Window

#: ``{name: {"shape": [z, y, x] voxels, "scale": [z, y, x] nm}}``, or one such description by itself.
ArraySpecs: TypeAlias = Mapping[str, Any]

_RESERVED = ("idx", "sample")


def parse_arrays(specs: ArraySpecs, what: str, default_name: str) -> dict[str, Window]:
    """Read array specifications.

    Args:
        specs: ``{name: {"shape": .., "scale": ..}}``, or one bare ``{"shape": .., "scale": ..}``.
        what: the argument, for messages.
        default_name: name of a bare one.

    Raises:
        CellMapKeyError: a key is missing, unknown or reserved.
        CellMapValueError: a shape or scale that cannot be one.
    """
    if not isinstance(specs, Mapping) or not specs:
        raise CellMapTypeError(f"{what} must be {{name: {{shape: [z, y, x], scale: [z, y, x]}}}}, got {specs!r}")
    if not all(isinstance(v, Mapping) for v in specs.values()):
        specs = {default_name: specs}
    windows = {}
    for name, spec in specs.items():
        where = f"{what}.{name}"
        if name in _RESERVED:
            raise CellMapKeyError(f"{where}: the name {name!r} is taken; call the array something else")
        for key in spec:
            if key not in ("shape", "scale"):
                close = difflib.get_close_matches(str(key), ["shape", "scale"], 1)
                hint = f"; did you mean {close[0]!r}?" if close else "; it has shape and scale"
                raise CellMapKeyError(f"{where} has no {key!r}{hint}")
        missing = [key for key in ("shape", "scale") if spec.get(key) is None]
        if missing:
            raise CellMapKeyError(f"{where} needs {' and '.join(missing)}: {{shape: voxels, scale: nm}}, both z, y, x")
        for key in ("shape", "scale"):
            if isinstance(spec[key], str) or not isinstance(spec[key], Sequence | np.ndarray):
                raise CellMapTypeError(f"{where}.{key} must be three numbers (z, y, x), got {spec[key]!r}")
            if not all(isinstance(n, int | float | np.number) and not isinstance(n, bool) for n in spec[key]):
                raise CellMapTypeError(f"{where}.{key} must be three numbers (z, y, x), got {list(spec[key])}")
        try:
            window = Window(list(spec["shape"]), list(spec["scale"]))
        except CellMapValueError as e:
            raise CellMapValueError(f"{where}: {e}") from None
        if sum(n == 1 for n in window.shape) > 1:
            raise CellMapValueError(f"{where}: at most one axis may have length 1, got the shape {list(window.shape)}")
        windows[name] = window
    return windows


def parse_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Names of classes, each once.

    Raises:
        CellMapTypeError: not a sequence of names.
        CellMapValueError: none, or a name twice.
    """
    if isinstance(classes, str) or not all(isinstance(c, str) for c in classes):
        raise CellMapTypeError(f"classes must be a list of names, got {classes!r}")
    twice = sorted({c for c in classes if list(classes).count(c) > 1})
    if twice or not classes:
        raise CellMapValueError(f"classes must be named once each, got {list(classes)}")
    return tuple(classes)


class CompactBatch(dict[str, torch.Tensor]):
    """A batch as it travels: inputs in their stored type, targets as bits.

    Keys: each input ``[N, 1, z, y, x]``, each target uint8 ``[N, z, y, x, 2 * ceil(classes / 8)]``, ``idx`` int64
        ``[N]``
    (positions) and ``sample`` int64 ``[N]`` (numbers of the samples, from which random value transforms follow).
    """


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """How a batch is laid out, and how it is finished.

    Attributes:
        inputs: window of each input.
        targets: window of each target; empty when nothing is annotated.
        classes: names of the targets' channels.
        raw_dtype: type in which inputs travel.
        raw_transforms: per input ``"auto"``, None, or a callable.
        target_transforms: for the position of a class, a callable.
        seed: seed of random value transforms.
    """

    inputs: Mapping[str, Window]
    targets: Mapping[str, Window]
    classes: tuple[str, ...]
    raw_dtype: np.dtype[Any]
    raw_transforms: Mapping[str, Any] = field(default_factory=dict)
    target_transforms: Mapping[int, Any] = field(default_factory=dict)
    seed: int = 0

    def empty(self, count: int, pin: bool = False) -> CompactBatch:
        """A compact batch of ``count`` samples whose voxels are not set; in page-locked memory with ``pin``."""
        kind = getattr(torch, self.raw_dtype.name)
        batch = CompactBatch()
        for name, window in self.inputs.items():
            batch[name] = torch.empty((count, 1, *window.shape), dtype=kind, pin_memory=pin)
        depth = packed_bytes(len(self.classes))
        for name, window in self.targets.items():
            batch[name] = torch.empty((count, *window.shape, depth), dtype=torch.uint8, pin_memory=pin)
        return batch

    def finish(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The finished form of a batch, on the device where it is; a finished batch is handed back as it is.

        Returns:
            Each input float32 ``[N, 1, z, y, x]`` without NaN; each target float32 ``[N, C, z, y, x]`` with NaN where
            nothing is known; ``idx`` int64 ``[N]``. A spatial axis of length 1 is dropped.

        Raises:
            CellMapValueError: a value transform changed the shape.
        """
        if not isinstance(batch, CompactBatch):
            return dict(batch)
        samples = batch["sample"].tolist()
        out = {}
        for name, window in self.inputs.items():
            transform = self.raw_transforms.get(name, AUTO)
            raw = batch[name]
            if transform == AUTO:
                value = to_unit_range(raw)
            elif transform is None:
                value = raw.to(torch.float32)
            else:
                value = self._each(transform, raw, samples, f"raw value transform of {name!r}")
            if value.is_floating_point() and (raw.is_floating_point() or callable(transform)):
                value = torch.nan_to_num(value, nan=0.0, posinf=float("inf"), neginf=float("-inf"))
            out[name] = _drop_thin(value, window)
        for name, window in self.targets.items():
            value = unpack(batch[name], len(self.classes))
            for index, transform in self.target_transforms.items():
                what = f"target value transform of {self.classes[index]!r}"
                value[:, index] = self._each(transform, value[:, index], samples, what)
            out[name] = _drop_thin(value, window)
        out["idx"] = batch["idx"]
        return out

    def _each(self, transform: Any, values: torch.Tensor, samples: Sequence[int], what: str) -> torch.Tensor:
        """Apply a callable sample by sample, with torch's generator seeded by the sample and put back afterwards."""
        seeds = hashes(self.seed, VALUES, samples, 1)[:, 0]
        accelerator = [values.device] if values.device.type == "cuda" else []
        done = []
        with torch.random.fork_rng(devices=accelerator):
            for value, seed in zip(values, seeds.tolist(), strict=True):
                torch.manual_seed(seed >> 1)
                result = transform(value)
                if not isinstance(result, torch.Tensor) or result.shape != value.shape:
                    got = list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
                    raise CellMapValueError(f"{what}: it must keep the shape {list(value.shape)}, it gave {got}")
                done.append(result.to(torch.float32))
        return torch.stack(done)


def _drop_thin(value: torch.Tensor, window: Window) -> torch.Tensor:
    """Without the spatial axis of length 1, so that two-dimensional models get ``[N, C, y, x]``."""
    thin = [i for i, n in enumerate(window.shape) if n == 1]
    return value.squeeze(2 + thin[0]) if thin else value
