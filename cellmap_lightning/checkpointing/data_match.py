"""Comparison of a data module with the data that a checkpoint was trained with.

The state of a `CellMapDataModule` records the meaning of the channels and values of its batches. Weights that are
loaded for other channels or values would still run, and give wrong results.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from cellmap_lightning.batches.arrays import InputArray, TargetArray, parse_inputs, parse_targets
from cellmap_lightning.errors import CellMapError, CellMapValueError
from cellmap_lightning.redaction import hide_address
from cellmap_lightning.splits.entries import CropRecord
from cellmap_lightning.transforms.normalization import Normalize, input_transforms
from cellmap_lightning.validation import first_few

log = logging.getLogger(__name__)

#: Key of the record in the state of a data module.
RECORD = "trained_on"

#: Purpose of loading a checkpoint: to continue its training; to validate, test or predict; for its weights alone.
Purpose: TypeAlias = Literal["resume", "evaluate", "begin"]


def data_record(data: Any) -> dict[str, Any]:
    """Return the record of a `CellMapDataModule`, as plain values.

    Keys: ``classes``; ``inputs`` and ``targets``, ``{name: {"shape": voxels, "scale": nm, ...}}``; ``normalize``, the
    rule of the volumes without a rule in their entry, None if all entries have one; ``boxes``, the crops that are
    restricted to a box, ``{split: [[crop, box], ...]}``.
    """
    intensity = data.splits.intensity
    default = any(
        entry.dataset is None and (entry.normalize is None or entry.invert is None)
        for entries in data.splits.entries.values()
        for entry in entries
    )
    transforms = input_transforms(intensity.raw_value_transforms, list(data.input_arrays), "raw_value_transforms")
    record = _record(
        data.classes,
        data.input_arrays,
        data.target_arrays,
        intensity.rule if default else None,
        transforms,
    )
    return record | {"boxes": _boxes(data.splits.entries)}


def _boxes(entries: Mapping[str, Sequence[CropRecord]]) -> dict[str, list[list[str]]]:
    """Return the name and the box of each crop of each split that is restricted to one."""
    boxes = {
        split: [
            [entry.target.label if entry.target is not None else hide_address(entry.input_path), str(entry.crop_box)]
            for entry in of_split
            if entry.crop_box is not None
        ]
        for split, of_split in entries.items()
    }
    return {split: crops for split, crops in boxes.items() if crops}


def _record(
    classes: Sequence[str] | None,
    inputs: Mapping[str, InputArray],
    targets: Mapping[str, TargetArray],
    normalize: Normalize | None,
    transforms: Mapping[str, Any],
) -> dict[str, Any]:
    def patch(spec: InputArray | TargetArray) -> dict[str, Any]:
        return {"shape": list(spec.window.shape), "scale": [float(s) for s in spec.window.scale]}

    def values(name: str) -> dict[str, str]:
        if name not in transforms:
            return {}
        transform = transforms[name]
        return {"values": "function" if callable(transform) else "stored" if transform is None else "normalized"}

    return {
        "classes": list(classes) if classes is not None else None,
        "inputs": {name: patch(spec) | values(name) for name, spec in inputs.items()},
        "targets": {
            name: patch(spec) | {"kind": spec.kind.name, "channels": spec.kind.channels}
            for name, spec in targets.items()
        },
        "normalize": asdict(normalize) if normalize is not None else None,
    }


def recorded(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record in a checkpoint; None if it has no record.

    Checkpoints of ``cellmap-train`` by earlier versions of this package have it in their configuration.
    """
    for state in checkpoint.values():
        if isinstance(state, Mapping) and isinstance(state.get(RECORD), Mapping):
            return dict(state[RECORD])
    from cellmap_lightning.checkpointing.checkpoint_config import CONFIG_KEY

    config = checkpoint.get(CONFIG_KEY)
    data = config.get("data") if isinstance(config, Mapping) else None
    if not isinstance(data, Mapping):
        return None
    try:
        classes, targets = data.get("classes"), data.get("target_arrays")
        return _record(
            classes,
            parse_inputs(data["input_arrays"]) if data.get("input_arrays") else {},
            parse_targets(targets, len(classes)) if targets and classes else {},
            Normalize.parse(data["normalize"], data.get("invert", False)) if "normalize" in data else None,
            {},
        )
    except (CellMapError, TypeError):  # the data module of another package
        return None


def check_data(
    saved: Mapping[str, Any], now: Mapping[str, Any], purpose: Purpose, where: str, command: bool = False
) -> list[str]:
    """Compare the record of a checkpoint with that of a data module.

    Args:
        saved: the record of the checkpoint, see `recorded`.
        now: the record of the data module, see `data_record`.
        purpose: purpose of loading the checkpoint.
        where: the checkpoint, for messages.
        command: name settings as on the command line.

    Returns:
        Differences that may be intended, one sentence each, for warnings.

    Raises:
        CellMapValueError: the classes are in another order; to resume or to evaluate, also other classes, inputs,
            targets or normalization; to resume, also other voxel sizes.
    """
    errors: list[str] = []
    warnings: list[str] = []
    for kind, text in _differences(saved, now, purpose, command):
        (errors if _is_error(kind, purpose) else warnings).append(text)
    if errors:
        raise CellMapValueError("\n".join(f"{where}: {text}" for text in errors))
    return warnings


def _is_error(kind: str, purpose: Purpose) -> bool:
    if kind == "boxes":
        return False
    if purpose == "begin":
        return kind == "order"
    return kind != "scale" or purpose == "resume"


def _differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], purpose: Purpose, command: bool
) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of each difference."""
    yield from _class_differences(saved.get("classes"), now.get("classes"), purpose, command)
    before, after = saved.get("inputs") or {}, now.get("inputs") or {}
    if before and after and set(before) != set(after):
        yield "inputs", f"trained with the inputs {list(before)}, got {list(after)}; give input_arrays of these names"
    targets_before, targets_after = saved.get("targets") or {}, now.get("targets") or {}
    for role, old, new in (("input", before, after), ("target", targets_before, targets_after)):
        for name in [name for name in old if name in new]:
            yield from _array_differences(f"{role} {name!r}", old[name], new[name])
    if purpose == "resume":
        yield from _box_differences(saved.get("boxes"), now.get("boxes"))
    old_rule, new_rule = saved.get("normalize"), now.get("normalize")
    # The rule is irrelevant if all inputs are stored values or come from user functions.
    normalized = any(spec.get("values", "normalized") == "normalized" for spec in after.values())
    if old_rule is not None and new_rule is not None and old_rule != new_rule and normalized:
        place = "with metadata.normalize=... and metadata.invert=..." if command else "in its entry of datasets"
        text = f"trained with {_setting(old_rule, command)}, got {_setting(new_rule, command)}"
        yield "values", f"{text}; give those of the checkpoint, or normalize and invert for a single volume {place}"


def _box_differences(before: Any, after: Any) -> Iterator[tuple[str, str]]:
    if None not in (before, after) and before != after:
        text = f"trained with the boxes {before}, got {after}"
        yield "boxes", f"{text}; give those of the checkpoint, or validation may show what was trained on"


def _class_differences(
    before: Sequence[str] | None, after: Sequence[str] | None, purpose: Purpose, command: bool
) -> Iterator[tuple[str, str]]:
    if not before or not after or list(before) == list(after):
        return
    old, new = _classes(before, command), _classes(after, command)
    if sorted(before) == sorted(after):
        yield "order", f"trained with {old}, got {new}: channels would be exchanged; give the classes in that order"
    elif purpose == "evaluate":
        option = ", and writer.only" if command else "; only=[...] of PredictionWriter"
        yield "classes", f"trained with {old}, got {new}; give those of the checkpoint{option} writes some of them"
    elif purpose == "resume":
        begin = "init_from=... begins a training of" if command else "a new task begins with"
        yield "classes", f"trained with {old}, got {new}; give those of the checkpoint, or {begin} other classes"


def _array_differences(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("kind", "channels", "values"):
        if key in before and key in after and before[key] != after[key]:
            yield key, f"{name}: trained with {key} {before[key]!r}, got {after[key]!r}; give that of the checkpoint"
            return
    old, new = before.get("scale"), after.get("scale")
    if old and new and (len(old) != len(new) or not np.allclose(old, new, rtol=1e-6, atol=0)):
        yield "scale", f"{name}: trained with a voxel size of {_plain(old)} nm, got {_plain(new)} nm"


def _plain(numbers: Sequence[float]) -> list[float]:
    return [int(n) if float(n).is_integer() else n for n in numbers]


def _classes(names: Sequence[str], command: bool) -> str:
    return f"data.classes=[{','.join(names)}]" if command else f"classes={list(names)}"


def _setting(rule: Mapping[str, Any], command: bool) -> str:
    """Return a normalization rule in the syntax of the settings."""
    name, invert = rule["rule"], rule["invert"]
    prefix = "data." if command else ""
    span = f"{name}: {_plain([rule['low'], rule['high']])}"
    value = name if name in ("dtype", "zscore") else f"{{{span}}}"
    return f"{prefix}normalize={value} {prefix}invert={str(invert).lower() if command else invert}"


def volume_differences(saved: Mapping[str, Any], now: Mapping[str, Any], intended: Collection[str] = ()) -> list[str]:
    """Return the volumes that a checkpoint normalized by another rule, one sentence each.

    Args:
        saved: ``{normalization_key: ...}`` of the checkpoint, see `RawInputs`.
        now: the same of the datasets that are open.
        intended: paths of volumes that are not compared.
    """
    # A volume may be opened several times by different rules: one in common is enough.
    rules_now = _rules(now)
    return [
        f"the values of {path} were normalized by ({before[0]}), got ({after[0]}); give normalize and invert of "
        "its entry as they were"
        for path, before in _rules(saved).items()
        if (after := rules_now.get(path)) and path not in intended and not set(before) & set(after)
    ]


def _rules(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return the normalization rules of each volume, by its path."""
    rules: dict[str, list[str]] = {}
    for key in keys:
        path, _, rule = key.rpartition(" Normalize(")
        rules.setdefault(path, []).append(rule.rstrip(")"))
    return rules


def check_state(state: Mapping[str, Any], data: Any) -> None:
    """Compare the state of a data module in a checkpoint with the module that loads it.

    Raises:
        CellMapValueError: see `check_data`; or a volume was normalized by another rule.
    """
    purpose, where = loading(data.trainer)
    if state.get(RECORD) is None:  # saved by an earlier version
        return
    for warning in check_data(state[RECORD], data_record(data), purpose, where):
        log.warning("%s: %s", where, warning)
    entries = [entry for entries in data.splits.entries.values() for entry in entries]
    with_rule = {e.input_path for e in entries if e.normalize is not None or e.invert is not None}
    intended = with_rule if purpose == "evaluate" else set()
    differences = volume_differences(state.get("normalization", {}), data.splits.normalization, intended)
    if differences:
        raise CellMapValueError("\n".join(f"{where}: {text}" for text in differences))


def loading(trainer: Any) -> tuple[Purpose, str]:
    """Return the purpose for which a Trainer loads its checkpoint, and the name of the checkpoint for messages."""
    stage = getattr(getattr(trainer, "state", None), "fn", None)
    path = getattr(trainer, "ckpt_path", None)
    return "resume" if stage in (None, "fit") else "evaluate", f"checkpoint {path}" if path else "the checkpoint"


def check_weights(saved: Mapping[str, Any], module: torch.nn.Module, where: str) -> None:
    """Compare the shapes of weights in a checkpoint with those of a module.

    Raises:
        CellMapValueError: they differ, as for another number of classes or another network.
    """
    weights = module.state_dict()
    differences = [
        f"{name} is {list(value.shape)}, and {list(weights[name].shape)} in the model"
        for name, value in saved.items()
        if isinstance(value, torch.Tensor) and name in weights and not _fits(value, weights[name])
    ]
    if differences:
        raise CellMapValueError(
            f"{where}: the weights do not fit the model, whose classes and network must be those of the checkpoint: "
            f"{first_few(differences)}"
        )


def _fits(saved: torch.Tensor, weight: Any) -> bool:
    return torch.nn.parameter.is_lazy(weight) or saved.shape == weight.shape
