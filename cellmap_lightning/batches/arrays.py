"""The arrays of a sample: parsing and checking of their specifications."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.patch_numbers import check_scale, check_shape
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.kinds.kind import TargetKind
from cellmap_lightning.transforms.kinds.registry import KINDS, make_kind
from cellmap_lightning.validation import did_you_mean

#: ``{name: {"shape": [z, y, x] voxels, "scale": [z, y, x] nm}}``, or a single bare specification.
ArraySpecs: TypeAlias = Mapping[str, Any]

_RESERVED = ("idx", "sample")


@dataclass(frozen=True, eq=False)
class InputArray:
    """An input of a model; see docs/batches.md.

    Attributes:
        window: shape and scale of its patch. The first scale of a flat patch is a placeholder: a slice is as thick as
            the volume's voxels.
        flat: True if its shape has two lengths, so that it can lie in any plane.
        slices_as_channels: True if its slices along z become the channels of a two-dimensional input.
    """

    window: Window
    flat: bool = False
    slices_as_channels: bool = False

    @property
    def identity(self) -> tuple[Any, ...]:
        """All that it depends on, for comparison."""
        return self.window.shape, tuple(self.window.scale.tolist()), self.flat, self.slices_as_channels


@dataclass(frozen=True, eq=False)
class TargetArray:
    """A target of a model; see docs/batches.md.

    Attributes:
        window: shape and scale of its patch; see `InputArray`.
        kind: content and encoding.
        flat: see `InputArray`.
    """

    window: Window
    kind: TargetKind
    flat: bool = False

    @property
    def identity(self) -> tuple[Any, ...]:
        """All that it depends on, for comparison."""
        return self.window.shape, tuple(self.window.scale.tolist()), self.flat, self.kind.identity


def parse_inputs(specs: ArraySpecs, what: str = "input_arrays", default_name: str = "input") -> dict[str, InputArray]:
    """Parse the specifications of the inputs: ``{name: {"shape": .., "scale": ..}}``, or a single bare specification.

    ``voxel_size`` is an alias of ``scale``. A shape and a scale of two numbers (y, x) request slices.
    ``slices_as: channels`` makes the slices of a patch the channels of a two-dimensional input.

    Args:
        specs: the specifications.
        what: the argument, for messages.
        default_name: name of a bare specification.

    Raises:
        CellMapKeyError: a key is missing, unknown or reserved.
        CellMapTypeError: a value that is not a specification.
        CellMapValueError: an invalid shape or scale.
    """
    inputs = {}
    for name, window, flat, options in _windows(specs, what, default_name, ("slices_as",)):
        slices_as = options.get("slices_as")
        if slices_as not in (None, "channels"):
            raise CellMapValueError(f"{what}.{name}.slices_as must be 'channels', got {slices_as!r}")
        if slices_as and (flat or 1 in window.shape[1:]):
            raise CellMapValueError(f"{what}.{name}.slices_as: slices are along z, got the shape {list(window.shape)}")
        inputs[name] = InputArray(window, flat, slices_as == "channels")
    return inputs


def parse_targets(specs: ArraySpecs, classes: int, what: str = "target_arrays") -> dict[str, TargetArray]:
    """Parse the specifications of the targets: as for inputs, with ``kind`` and its options.

    Args:
        specs: the specifications.
        classes: number of classes.
        what: the argument, for messages.

    Raises:
        CellMapError: see `parse_inputs` and `make_kind`.
    """
    keys = sorted({"kind", *(option for kind in KINDS.values() for option in kind.options)})
    return {
        name: TargetArray(window, make_kind(f"{what}.{name}", window, classes, options), flat)
        for name, window, flat, options in _windows(specs, what, "output", keys)
    }


def _windows(
    specs: ArraySpecs, what: str, default_name: str, option_keys: Sequence[str]
) -> Iterator[tuple[str, Window, bool, dict[str, Any]]]:
    """Yield name, window, True if flat, and the other keys of each array."""
    if not isinstance(specs, Mapping) or not specs:
        raise CellMapTypeError(f"{what} must be {{name: {{shape: [z, y, x], scale: [z, y, x]}}}}, got {specs!r}")
    if not any(isinstance(v, Mapping) for v in specs.values()):
        specs = {default_name: specs}
    for name, value in specs.items():
        where = f"{what}.{name}"
        if name in _RESERVED or str(name).endswith("_mask"):
            raise CellMapKeyError(f"{where}: the name {name!r} is taken; call the array something else")
        spec = _with_scale(where, value, ["shape", "scale", "voxel_size", *option_keys])
        window, flat = _window(where, spec)
        yield name, window, flat, {k: v for k, v in spec.items() if k not in ("shape", "scale") and v is not None}


def _with_scale(where: str, value: Any, keys: Sequence[str]) -> dict[str, Any]:
    """Return a specification with ``scale`` in place of its alias ``voxel_size``, after a check of its keys."""
    if not isinstance(value, Mapping):
        raise CellMapTypeError(f"{where} must be {{shape: [z, y, x], scale: [z, y, x]}}, got {value!r}")
    for key in value:
        if key not in keys:
            hint = did_you_mean(key, keys, f"; it has {', '.join(keys)}")
            raise CellMapKeyError(f"{where} has no {key!r}{hint}")
    spec: dict[str, Any] = dict(value)
    voxel_size = spec.pop("voxel_size", None)
    if voxel_size is not None:
        if spec.get("scale") is not None:
            raise CellMapKeyError(f"{where} has scale and voxel_size, which are the same; give one of them")
        spec["scale"] = voxel_size
    missing = [key for key in ("shape", "scale") if spec.get(key) is None]
    if missing:
        raise CellMapKeyError(f"{where} needs {' and '.join(missing)}: {{shape: voxels, scale: nm}}, both z, y, x")
    return spec


def _window(where: str, spec: Mapping[str, Any]) -> tuple[Window, bool]:
    """Return the patch of a specification, and True if it is flat."""
    shape = check_shape(f"{where}.shape", spec["shape"])
    scale = check_scale(f"{where}.scale", spec["scale"], len(shape))
    flat = len(shape) == 2
    if flat:
        shape, scale = [1, *shape], [min(scale[-2:]), *scale[-2:]]
    window = Window(shape, scale)
    if sum(n == 1 for n in window.shape) > 1:
        raise CellMapValueError(f"{where}: at most one axis may have length 1, got the shape {list(window.shape)}")
    return window, flat


def parse_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names of classes as a tuple.

    Raises:
        CellMapTypeError: the value is not a sequence of names.
        CellMapValueError: it is empty or has a duplicate.
    """
    if isinstance(classes, str) or not all(isinstance(c, str) for c in classes):
        names = [name.strip() for name in classes.split(",") if name.strip()] if isinstance(classes, str) else []
        hint = f"; give classes={names}" if names else ""
        if isinstance(classes, str) and not names:  # as a shell leaves it
            hint = "; ${...} needs single quotes in a shell: 'data.classes=${classes:tested_classes.csv}'"
        raise CellMapTypeError(f"classes must be a list of names, got {classes!r}{hint}")
    twice = sorted({c for c in classes if list(classes).count(c) > 1})
    if twice or not classes:
        raise CellMapValueError(f"classes must be named once each, got {list(classes)}")
    return tuple(classes)


@dataclass(frozen=True, eq=False)
class ArraySet:
    """The arrays of each sample; see docs/batches.md.

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
        """Parse and check the specifications of a dataset's arrays.

        Args:
            input_arrays: see `parse_inputs`.
            target_arrays: see `parse_targets`.
            classes: names of the classes; None for raw only.
            annotated: False without labels: targets are left out.

        Raises:
            CellMapError: specifications are missing, invalid, or share a name.
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
