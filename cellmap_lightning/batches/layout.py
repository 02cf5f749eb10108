"""The layout of a batch: its compact form, its finished form, and the bytes of both."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cellmap_lightning.batches.arrays import (
    ArraySpecs,
    InputArray,
    TargetArray,
    parse_classes,
    parse_inputs,
    parse_targets,
)
from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.batches.memory import BatchMemory, FormMemory
from cellmap_lightning.errors import CellMapError, CellMapValueError
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.runtime.buffers import BUFFERS
from cellmap_lightning.runtime.rng import VALUES, hashes
from cellmap_lightning.transforms.intensity import IntensityTransforms
from cellmap_lightning.transforms.kinds.kind import signed
from cellmap_lightning.transforms.normalization import AUTO, Scaling, seed_own_generator
from cellmap_lightning.validation import int_at_least


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """The layout of a batch, and the conversion from its compact to its finished form; see docs/batches.md.

    Attributes:
        inputs: the inputs.
        targets: the targets; empty when nothing is annotated.
        classes: names of the classes.
        raw_dtype: type of inputs in the compact form.
        id_dtype: type of instance ids in the compact form.
        raw_transforms: per input ``"auto"`` (normalize), None (stored values), or a callable.
        target_transforms: for the position of a class, a callable on its channel of binary targets.
        scaling: normalization of stored values.
        nan_targets: NaN where a target is unknown; otherwise 0, with a boolean ``<name>_mask`` beside the target.
        seed: seed of random value transforms.
        augment: random intensity augmentation of inputs.
    """

    inputs: Mapping[str, InputArray]
    targets: Mapping[str, TargetArray]
    classes: tuple[str, ...]
    raw_dtype: np.dtype[Any]
    id_dtype: np.dtype[Any]
    raw_transforms: Mapping[str, Any]
    target_transforms: Mapping[int, Any]
    scaling: Scaling
    nan_targets: bool = True
    seed: int = 0
    augment: IntensityTransforms | None = None

    def compact(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Return the shape of one sample and the type of each array of a compact batch."""
        arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            name: ((1, *spec.window.shape), self.raw_dtype) for name, spec in self.inputs.items()
        }
        return arrays | {name: target.kind.compact(self.id_dtype) for name, target in self.targets.items()}

    def empty(self, count: int, pin: bool = False) -> CompactBatch:
        """Return an uninitialized compact batch of ``count`` samples, in page-locked memory with ``pin``."""
        tensors: dict[str, torch.Tensor] = {}
        for name, (shape, dtype) in self.compact().items():
            if pin:
                torch_dtype = getattr(torch, dtype.name)
                tensors[name] = torch.empty((count, *shape), dtype=torch_dtype, device="cpu", pin_memory=True)
            else:
                tensors[name] = torch.from_numpy(BUFFERS.empty((count, *shape), dtype))
        return CompactBatch(tensors, self)

    @property
    def custom(self) -> bool:
        """True if finishing a batch calls functions of user code."""
        return bool(self.target_transforms) or any(callable(t) for t in self.raw_transforms.values())

    def memory(self, count: int) -> BatchMemory:
        """Return the bytes of a batch of ``count`` samples, in both forms."""
        finished, compact = {}, {}
        for name, spec in self.inputs.items():
            voxels = count * math.prod(spec.window.shape)
            finished[name], compact[name] = voxels * torch.float32.itemsize, voxels * self.raw_dtype.itemsize
        for name, target in self.targets.items():
            shape, dtype = target.kind.compact(self.id_dtype)
            compact[name] = count * math.prod(shape) * dtype.itemsize
            voxels = count * math.prod(target.window.shape) * target.kind.channels
            finished[name] = voxels * target.kind.dtype.itemsize
            if not self.nan_targets and target.kind.dtype.is_floating_point:
                finished[f"{name}_mask"] = voxels
        return BatchMemory(finished, FormMemory(compact))

    def finish(self, batch: CompactBatch | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the finished form of a batch, on its device; a finished batch is returned unchanged.

        Returns:
            Each input float32 ``[N, 1, z, y, x]`` without NaN; each binary target float32 ``[N, C, z, y, x]`` with NaN
            where unannotated; ``idx`` int64 ``[N]``. A spatial axis of length 1 is dropped.

        Raises:
            CellMapValueError: a value transform changed the shape.
        """
        if not isinstance(batch, CompactBatch):
            return dict(batch)
        stored = batch.gathered().tensors
        samples = stored["sample"]
        reference = next(iter(self.inputs.values())).window
        out: dict[str, torch.Tensor] = {}
        for name, spec in self.inputs.items():
            value = self._finish_input(name, stored[name], stored["idx"], samples, len(out))
            if self.augment:
                scale = spec.window.scale.tolist()
                value = self.augment(value, self.seed, samples.tolist(), len(out), scale, reference)
                # Only floating-point raw can be infinite, from which effects may make NaN.
                value = _without_nan(value) if stored[name].is_floating_point() else value
            out[name] = value.squeeze(1) if spec.slices_as_channels else _drop_thin(value, spec.window)
        for name, target in self.targets.items():
            value = target.kind.finish(self._hide(target, stored[name], samples, reference))
            # Value transforms apply per class, which only these kinds have as channels.
            if target.kind.name in ("binary", "ids"):
                for index, transform in self.target_transforms.items():
                    what = f"target value transform of {self.classes[index]!r}"
                    value[:, index] = self._each(transform, value[:, index], samples, what, len(out) + index)
            value = _drop_thin(value, target.window)
            if not self.nan_targets and value.is_floating_point():
                out[f"{name}_mask"] = ~value.isnan()
                value = torch.nan_to_num(value, nan=0.0)
            out[name] = value
        out["idx"] = stored["idx"]
        return out

    def _hide(
        self, target: TargetArray, compact: torch.Tensor, samples: torch.Tensor, reference: Window
    ) -> torch.Tensor:
        """Return the compact form of a target, unknown in missing sections if the augmentation asks for it."""
        if not self.augment:
            return compact
        hidden = self.augment.hidden(self.seed, samples.tolist(), target.window, reference, compact.device)
        if hidden is None:
            return compact
        if not target.kind.channels_first:
            hidden = hidden.movedim(1, -1)
        return compact.masked_fill(hidden, target.kind.unknown)

    def _finish_input(
        self, name: str, raw: torch.Tensor, positions: torch.Tensor, samples: torch.Tensor, number: int
    ) -> torch.Tensor:
        """Return an input as float32 without NaN, before augmentation.

        Args:
            name: the input.
            raw: its stored values.
            positions: position of each sample, from which the crop's normalization follows.
            samples: number of each sample, which seeds random value transforms.
            number: number of the input.
        """
        transform = self.raw_transforms.get(name, AUTO)
        if transform == AUTO:
            value = self.scaling(raw, positions)
        elif transform is None:
            value = raw.to(torch.float32)
        else:
            if raw.is_floating_point():
                raw = _without_nan(raw)
            value = self._each(transform, raw, samples, f"raw value transform of {name!r}", number)
        return _without_nan(value) if raw.is_floating_point() or callable(transform) else value

    def _each(
        self, transform: Any, values: torch.Tensor, samples: torch.Tensor, what: str, number: int
    ) -> torch.Tensor:
        """Apply a callable sample by sample, with random generators seeded by the sample.

        The global generators are restored afterwards. A generator that the callable holds is seeded if possible, see
        `seed_own_generator`.
        """
        seeds = hashes(self.seed, VALUES, samples.tolist(), number + 1)[:, number]
        accelerator = [values.device] if values.device.type == "cuda" else []
        results = []
        with torch.random.fork_rng(devices=accelerator), _global_generators_restored():
            for value, seed in zip(values, seeds.tolist(), strict=True):
                # Not torch.manual_seed, which would seed every other device as well.
                generator = (
                    torch.cuda.default_generators[values.device.index] if accelerator else torch.default_generator
                )
                generator.manual_seed(seed >> 1)
                np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  user code may use the global generator
                random.seed(seed)
                seed_own_generator(transform, seed)
                try:
                    result = transform(value.clone())
                except StopIteration as error:  # would end the epoch silently
                    raise CellMapError(f"{what}: it raised StopIteration") from error
                except Exception as error:
                    error.add_note(f"in the {what}, a {list(value.shape)} tensor")
                    raise
                if not isinstance(result, torch.Tensor) or result.shape != value.shape:
                    got = list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
                    raise CellMapValueError(f"{what}: it must keep the shape {list(value.shape)}, it gave {got}")
                results.append(result.as_subclass(torch.Tensor).to(torch.float32))  # not MONAI's MetaTensor
        return torch.stack(results)


@contextmanager
def _global_generators_restored() -> Iterator[None]:
    """Restore the global random generators of Python and NumPy on exit."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _without_nan(values: torch.Tensor) -> torch.Tensor:
    """Replace NaN by 0; infinities stay."""
    return torch.nan_to_num(values, nan=0.0, posinf=float("inf"), neginf=float("-inf"))


def _drop_thin(value: torch.Tensor, window: Window) -> torch.Tensor:
    """Drop the spatial axis of length 1, so that two-dimensional models get ``[N, C, y, x]``."""
    thin = [i for i, n in enumerate(window.shape) if n == 1]
    return value.squeeze(2 + thin[0]) if thin else value


def batch_memory(
    input_arrays: ArraySpecs,
    target_arrays: ArraySpecs | None = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 1,
    *,
    raw_dtype: npt.DTypeLike = np.uint8,
    label_dtype: npt.DTypeLike = np.uint8,
    nan_targets: bool = True,
) -> BatchMemory:
    """Compute the bytes of a batch.

    With binary targets every finished array is float32, a target with one channel per class: for ``n`` samples,
    ``4 n (sum of input voxels + sum of target voxels x classes)``, the formula of cellmap-data 2025.7. In the compact
    form inputs have their stored type, and a binary target has two bits per class and voxel, in whole bytes.

    Args:
        input_arrays: ``{name: {"shape": voxels, "scale": nm}}``.
        target_arrays: the same for the targets, with their kinds; None without targets.
        classes: names of the classes; None without targets.
        batch_size: samples.
        raw_dtype: the stored type of the inputs.
        label_dtype: the widest stored type of the labels, from which the type of instance ids follows.
        nan_targets: see `LabelOptions`.

    Returns:
        Bytes per array and in total, exactly those of the tensors.

    Example:
        >>> patch = {"shape": [64, 64, 64], "scale": [8, 8, 8]}
        >>> batch_memory({"raw": patch}, {"labels": patch}, ["mito", "er"], batch_size=8).total_mb
        24.0
    """
    int_at_least("batch_size", batch_size, 1)
    names = parse_classes(classes) if classes else ()
    targets = parse_targets(target_arrays, len(names)) if target_arrays and names else {}
    layout = BatchLayout(
        parse_inputs(input_arrays), targets, names, np.dtype(raw_dtype), signed(np.dtype(label_dtype)),
        {}, {}, Scaling.none(), nan_targets,
    )  # fmt: skip
    return layout.memory(batch_size)
