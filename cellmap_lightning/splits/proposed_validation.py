"""The message for a training without crops for validation, with the settings that divide the crops for training."""

from collections.abc import Callable
from typing import Any

from cellmap_lightning.errors import CellMapError
from cellmap_lightning.geometry.lattice import AXES
from cellmap_lightning.splits.block_options import BlockOptions
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from cellmap_lightning.wording import plural

#: Part of the crops that is proposed for validation.
_FRACTION = 0.2


def no_validation(splits: CellMapDataSplit, setting: Callable[[str, Any], str], limit: str) -> str:
    """Return the message for crops of which none is for validation, with what these crops allow.

    Args:
        splits: crops, none of them for validation.
        setting: writes a setting of the data and its value, as `python_setting` and `override` do.
        limit: the setting of the Trainer without validation.
    """
    start = f"{splits.source} has no crops for validation"
    if not splits.has_crops("train"):
        return f"{start}, and none for training; list some with the usages train and validate"
    without = f"{limit} trains without validation"
    ways = [*_random(splits, setting)]
    cut, text = _blocks(splits, setting)
    ways += [f"{cut} cuts those for training ({text})"] if cut else []
    if not ways:
        return f"{start}; list some, for those for training can neither be divided nor cut; {without}. {text}"
    return f"{start}; list some; or {'; or '.join(ways)}; {without}"


def python_setting(name: str, value: Any) -> str:
    """Return a setting as an argument of `CellMapDataModule`."""
    return f"{name}={value!r}"


def override(name: str, value: Any) -> str:
    """Return a setting as an override of a command."""
    if isinstance(value, dict):
        text = str(value).replace("'", "")
        return f"'data.{name}={text}'"
    return f"data.{name}={value}"


def _random(splits: CellMapDataSplit, setting: Callable[[str, Any], str]) -> list[str]:
    """Return the proposal to divide whole crops; empty where these cannot be divided."""
    try:
        divided = splits.divided_by(split="random", val_fraction=_FRACTION)
    except CellMapError:
        return []
    train, val = len(divided.get("train", [])), len(divided.get("val", []))
    if not train or not val:
        return []
    settings = f"{setting('split', 'random')} {setting('val_fraction', _FRACTION)}"
    return [f"{settings} takes {val} of the {plural(train + val, 'crop')} for training"]


def _blocks(splits: CellMapDataSplit, setting: Callable[[str, Any], str]) -> tuple[str, str]:
    """Return the setting that cuts the crops for training, and the first cut; "" and the reason where none is possible.

    The defaults are tried first, then each axis.
    """
    choices: dict[str, BlockOptions] = {setting("split", "blocks"): BlockOptions()}
    choices |= {setting("split", {"blocks": {"axis": axis}}): BlockOptions(axis=axis) for axis in AXES}
    reason = ""
    for text, options in choices.items():
        rule = splits.inside(options)
        try:
            rule.divide(splits.entries)
        except CellMapError as e:
            reason = reason or str(e)
        else:
            cuts = [*rule.cuts.values()]
            others = f", and the other {len(cuts) - 1} like it" if len(cuts) > 1 else ""
            return text, f"{cuts[0]}{others}"
    return "", reason
