"""What a batch is made of: the arrays that are asked for, its compact form, its finished form."""

import difflib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.batches.memory import BatchMemory, FormMemory
from cellmap_lightning.errors import CellMapError, CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.runtime.buffers import BUFFERS
from cellmap_lightning.runtime.rng import VALUES, hashes
from cellmap_lightning.transforms.augment import IntensityTransforms
from cellmap_lightning.transforms.intensity import AUTO, Scaling, seed_own_generator
from cellmap_lightning.transforms.kinds import KINDS, TargetKind, make_kind, signed

#: ``{name: {"shape": [z, y, x] voxels, "scale": [z, y, x] nm}}``, or one such description by itself.
ArraySpecs: TypeAlias = Mapping[str, Any]

_RESERVED = ("idx", "sample")


@dataclass(frozen=True, eq=False)
class InputArray:
    """What is asked for of an input.

    Attributes:
        window: its patch. Of a flat one the first scale is a placeholder: a slice is as thick as the volume's voxels.
        flat: it was given by two lengths, so that it can lie in any plane.
        slices_as_channels: its slices along z become the channels of a two-dimensional input.
    """

    window: Window
    flat: bool = False
    slices_as_channels: bool = False

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells it from another one."""
        return self.window.shape, tuple(self.window.scale.tolist()), self.flat, self.slices_as_channels


@dataclass(frozen=True, eq=False)
class TargetArray:
    """What is asked for of a target.

    Attributes:
        window: its patch; see `InputArray`.
        kind: what it holds.
        flat: see `InputArray`.
    """

    window: Window
    kind: TargetKind
    flat: bool = False

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells it from another one."""
        return self.window.shape, tuple(self.window.scale.tolist()), self.flat, self.kind.identity


def parse_inputs(specs: ArraySpecs, what: str = "input_arrays", default_name: str = "input") -> dict[str, InputArray]:
    """Read the specifications of the inputs: ``{name: {"shape": .., "scale": ..}}``, or one of them by itself.

    ``voxel_size`` is another name of ``scale``. A shape and a scale of two numbers (y, x) ask for slices.
    ``slices_as: channels`` makes the slices of a patch the channels of a two-dimensional input.

    Args:
        specs: the specifications.
        what: the argument, for messages.
        default_name: name of one by itself.

    Raises:
        CellMapKeyError: a key is missing, unknown or reserved.
        CellMapTypeError: something that is no specification.
        CellMapValueError: a shape or scale that cannot be one.
    """
    inputs = {}
    for name, window, flat, rest in _windows(specs, what, default_name, ("slices_as",)):
        slices_as = rest.get("slices_as")
        if slices_as not in (None, "channels"):
            raise CellMapValueError(f"{what}.{name}.slices_as must be 'channels', got {slices_as!r}")
        if slices_as and (flat or 1 in window.shape[1:]):
            raise CellMapValueError(f"{what}.{name}.slices_as: slices are along z, got the shape {list(window.shape)}")
        inputs[name] = InputArray(window, flat, slices_as == "channels")
    return inputs


def parse_targets(specs: ArraySpecs, classes: int, what: str = "target_arrays") -> dict[str, TargetArray]:
    """Read the specifications of the targets: as for inputs, with ``kind`` and its options.

    Args:
        specs: the specifications.
        classes: number of classes.
        what: the argument, for messages.

    Raises:
        CellMapError: as `parse_inputs`, and for kinds.
    """
    options = sorted({"kind", *(option for kind in KINDS.values() for option in kind.options)})
    return {
        name: TargetArray(window, make_kind(f"{what}.{name}", window, classes, rest), flat)
        for name, window, flat, rest in _windows(specs, what, "output", options)
    }


def _windows(
    specs: ArraySpecs, what: str, default_name: str, options: Sequence[str]
) -> Iterator[tuple[str, Window, bool, dict[str, Any]]]:
    """Name, window, whether it is flat, and the other keys of each array."""
    if not isinstance(specs, Mapping) or not specs:
        raise CellMapTypeError(f"{what} must be {{name: {{shape: [z, y, x], scale: [z, y, x]}}}}, got {specs!r}")
    if not any(isinstance(v, Mapping) for v in specs.values()):
        specs = {default_name: specs}
    keys = ["shape", "scale", "voxel_size", *options]
    for name, spec in specs.items():
        where = f"{what}.{name}"
        if not isinstance(spec, Mapping):
            raise CellMapTypeError(f"{where} must be {{shape: [z, y, x], scale: [z, y, x]}}, got {spec!r}")
        if name in _RESERVED or str(name).endswith("_mask"):
            raise CellMapKeyError(f"{where}: the name {name!r} is taken; call the array something else")
        for key in spec:
            if key not in keys:
                close = difflib.get_close_matches(str(key), keys, 1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(keys)}"
                raise CellMapKeyError(f"{where} has no {key!r}{hint}")
        if spec.get("voxel_size") is not None:
            if spec.get("scale") is not None:
                raise CellMapKeyError(f"{where} has scale and voxel_size, which are the same; give one of them")
            spec = {**spec, "scale": spec["voxel_size"], "voxel_size": None}
        missing = [key for key in ("shape", "scale") if spec.get(key) is None]
        if missing:
            raise CellMapKeyError(f"{where} needs {' and '.join(missing)}: {{shape: voxels, scale: nm}}, both z, y, x")
        shape, scale = (_numbers(where, key, spec[key]) for key in ("shape", "scale"))
        flat = len(shape) == 2
        if flat:
            if len(scale) == 3:
                scale = scale[1:]
            if len(scale) != 2:
                raise CellMapValueError(f"{where}: a shape of two lengths needs a scale of two numbers, got {scale}")
            shape, scale = [1, *shape], [min(scale), *scale]
        try:
            window = Window(shape, scale)
        except CellMapValueError as e:
            raise CellMapValueError(f"{where}: {e}") from None
        if sum(n == 1 for n in window.shape) > 1:
            raise CellMapValueError(f"{where}: at most one axis may have length 1, got the shape {list(window.shape)}")
        yield name, window, flat, {k: v for k, v in spec.items() if k not in ("shape", "scale") and v is not None}


def _numbers(where: str, key: str, value: Any) -> list[Any]:
    numbers = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    if not numbers or not all(isinstance(n, int | float | np.number) and not isinstance(n, bool) for n in value):
        raise CellMapTypeError(f"{where}.{key} must be three numbers (z, y, x), got {value!r}")
    return list(value)


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


@dataclass(frozen=True, eq=False)
class ArraySet:
    """The arrays that are asked for of each sample.

    Attributes:
        inputs: the inputs.
        targets: the targets; empty for raw only.
        classes: names of the classes.
    """

    inputs: Mapping[str, InputArray]
    targets: Mapping[str, TargetArray]
    classes: tuple[str, ...]

    @classmethod
    def parse(
        cls,
        input_arrays: ArraySpecs | None,
        target_arrays: ArraySpecs | None,
        classes: Sequence[str] | None,
        annotated: bool = True,
    ) -> "ArraySet":
        """Check the specifications of a dataset's arrays.

        Args:
            input_arrays: see `parse_inputs`.
            target_arrays: see `parse_targets`.
            classes: names of the classes; None for raw only.
            annotated: False where there are no labels: targets are left out.

        Raises:
            CellMapError: specifications are missing, cannot be read, or share a name.
        """
        if input_arrays is None:
            raise CellMapTypeError("input_arrays is needed: {name: {shape: voxels, scale: nm}}")
        names = parse_classes(classes) if classes is not None else ()
        inputs = parse_inputs(input_arrays)
        annotated = annotated and classes is not None
        targets = parse_targets(target_arrays, len(names)) if annotated and target_arrays else {}
        if annotated and not targets:
            raise CellMapTypeError("target_arrays is needed when there are classes: {name: {shape: voxels, scale: nm}}")
        both = sorted(set(inputs) & set(targets))
        if both:
            raise CellMapValueError(f"inputs and targets share the names {both}; give the targets others")
        return cls(inputs, targets, names)

    @property
    def specs(self) -> dict[str, InputArray | TargetArray]:
        """All arrays."""
        return {**self.inputs, **self.targets}


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """How a batch is laid out, and how it is finished.

    Attributes:
        inputs: the inputs.
        targets: the targets; empty when nothing is annotated.
        classes: names of the classes.
        raw_dtype: type in which inputs travel.
        id_dtype: type in which instance ids travel.
        raw_transforms: per input ``"auto"`` (normalize), None (stored values), or a callable.
        target_transforms: for the position of a class, a callable on its channel of binary targets.
        scaling: how stored values are normalized.
        nan_targets: say NaN where nothing is known; otherwise 0, with a boolean ``<name>_mask`` beside it.
        seed: seed of random value transforms.
        augment: random changes of the values of inputs.
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
        """Shape of one sample and type of each array of a compact batch."""
        arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            name: ((1, *spec.window.shape), self.raw_dtype) for name, spec in self.inputs.items()
        }
        return arrays | {name: target.kind.compact(self.id_dtype) for name, target in self.targets.items()}

    def empty(self, count: int, pin: bool = False) -> CompactBatch:
        """A compact batch of ``count`` samples whose voxels are not set; in page-locked memory with ``pin``."""
        tensors: dict[str, torch.Tensor] = {}
        for name, (shape, dtype) in self.compact().items():
            if pin:
                kind = getattr(torch, dtype.name)
                tensors[name] = torch.empty((count, *shape), dtype=kind, device="cpu", pin_memory=True)
            else:
                tensors[name] = torch.from_numpy(BUFFERS.empty((count, *shape), dtype))
        return CompactBatch(tensors, self)

    @property
    def custom(self) -> bool:
        """Whether somebody's own functions are called to finish a batch."""
        return bool(self.target_transforms) or any(callable(t) for t in self.raw_transforms.values())

    def memory(self, count: int) -> BatchMemory:
        """The bytes of a batch of ``count`` samples, in both forms."""
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
        """The finished form of a batch, on the device where it is; a finished batch is handed back as it is.

        Returns:
            Each input float32 ``[N, 1, z, y, x]`` without NaN; each binary target float32 ``[N, C, z, y, x]`` with NaN
            where nothing is known; ``idx`` int64 ``[N]``. A spatial axis of length 1 is dropped.

        Raises:
            CellMapValueError: a value transform changed the shape.
        """
        if not isinstance(batch, CompactBatch):
            return dict(batch)
        stored = batch.tensors
        samples = stored["sample"]
        out: dict[str, torch.Tensor] = {}
        for name, spec in self.inputs.items():
            transform = self.raw_transforms.get(name, AUTO)
            raw = stored[name]
            if transform == AUTO:
                value = self.scaling(raw, stored["idx"])
            elif transform is None:
                value = raw.to(torch.float32)
            else:
                if raw.is_floating_point():
                    raw = torch.nan_to_num(raw, nan=0.0, posinf=float("inf"), neginf=float("-inf"))
                value = self._each(transform, raw, samples, f"raw value transform of {name!r}", len(out))
            if raw.is_floating_point() or callable(transform):
                value = torch.nan_to_num(value, nan=0.0, posinf=float("inf"), neginf=float("-inf"))
            if self.augment:
                value = self.augment(value, self.seed, samples.tolist(), len(out), spec.window.scale.tolist())
            out[name] = value.squeeze(1) if spec.slices_as_channels else _drop_thin(value, spec.window)
        for name, target in self.targets.items():
            value = target.kind.finish(stored[name])
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

    def _each(
        self, transform: Any, values: torch.Tensor, samples: torch.Tensor, what: str, number: int
    ) -> torch.Tensor:
        """Apply a callable sample by sample, its generators seeded by the sample.

        The global ones are put back afterwards. One that the callable keeps for itself is seeded where it can be, see
        `seed_own_generator`.
        """
        seeds = hashes(self.seed, VALUES, samples.tolist(), number + 1)[:, number]
        accelerator = [values.device] if values.device.type == "cuda" else []
        done = []
        with torch.random.fork_rng(devices=accelerator), _others_kept():
            for value, seed in zip(values, seeds.tolist(), strict=True):
                # Not torch.manual_seed, which would seed every other device as well.
                generator = (
                    torch.cuda.default_generators[values.device.index] if accelerator else torch.default_generator
                )
                generator.manual_seed(seed >> 1)
                np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  somebody's function may use it
                random.seed(seed)
                seed_own_generator(transform, seed)
                try:
                    result = transform(value.clone())
                except StopIteration as error:  # which would end the epoch here, and nobody would know
                    raise CellMapError(f"{what}: it raised StopIteration") from error
                except Exception as error:
                    error.add_note(f"in the {what}, a {list(value.shape)} tensor")
                    raise
                if not isinstance(result, torch.Tensor) or result.shape != value.shape:
                    got = list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
                    raise CellMapValueError(f"{what}: it must keep the shape {list(value.shape)}, it gave {got}")
                done.append(result.as_subclass(torch.Tensor).to(torch.float32))  # not MONAI's MetaTensor
        return torch.stack(done)


@contextmanager
def _others_kept() -> Iterator[None]:
    """Put the global generators of Python and NumPy back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _drop_thin(value: torch.Tensor, window: Window) -> torch.Tensor:
    """Without the spatial axis of length 1, so that two-dimensional models get ``[N, C, y, x]``."""
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
    """The bytes of a batch.

    With binary targets every finished array is float32, a target with one channel per class: for ``n`` samples,
    ``4 n (sum of input voxels + sum of target voxels x classes)``, the formula of cellmap-data 2025.7. Compact, inputs
    have the stored type and a binary target has two bits per class and voxel, in whole bytes.

    Args:
        input_arrays: ``{name: {"shape": voxels, "scale": nm}}``.
        target_arrays: the same for the targets, with their kinds; None when there are none.
        classes: names of the classes; None when there are no targets.
        batch_size: samples.
        raw_dtype: the stored type of the inputs.
        label_dtype: the widest stored type of the labels, which instance ids travel in.
        nan_targets: see `CellMapDataset`.

    Returns:
        Bytes per array and in total, exactly those of the real tensors.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise CellMapValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    names = parse_classes(classes) if classes else ()
    targets = parse_targets(target_arrays, len(names)) if target_arrays and names else {}
    layout = BatchLayout(
        parse_inputs(input_arrays), targets, names, np.dtype(raw_dtype), signed(np.dtype(label_dtype)),
        {}, {}, Scaling.none(), nan_targets,
    )  # fmt: skip
    return layout.memory(batch_size)
