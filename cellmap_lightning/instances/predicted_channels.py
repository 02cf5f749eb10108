"""The channels of a class in a prediction, as ``cellmap-predict`` describes them in the attributes of their groups."""

from collections.abc import Mapping
from typing import Any

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.io.ngff import read_attributes
from cellmap_lightning.io.store import StorePath, children
from cellmap_lightning.validation import first_few


def described_groups(root: StorePath) -> dict[str, Mapping[str, Any]]:
    """Return the description of each group of a prediction that has one; see docs/prediction.md.

    Args:
        root: the prediction, with a group per channel.
    """
    described: dict[str, Mapping[str, Any]] = {}
    for name in sorted(children(root)):
        attributes = read_attributes(root / name) if not name.startswith(".") and name != "OME" else None
        target = target_of(attributes[0]) if attributes is not None else {}
        if target:
            described[name] = target
    return described


def target_of(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the description of a channel in the attributes of its group; empty without one."""
    part: Any = attributes
    for key in ("cellmap", "prediction", "target"):
        part = part.get(key) if isinstance(part, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def channels_of(root: StorePath, name: str, kind: str | None, same_kind: Mapping[str, str]) -> list[str]:
    """Return the groups that are the channels of a class, in their order; empty where none describes the class.

    Args:
        root: the prediction.
        name: the class.
        kind: the kind of the values; None if the class has one kind alone.
        same_kind: the kind by each name that attributes may have for it.

    Raises:
        CellMapValueError: the class was predicted in several kinds, and ``kind`` is None.
    """
    groups: dict[str, list[str]] = {}
    for group, target in described_groups(root).items():
        if target.get("class") == name:
            recorded = str(target.get("kind"))
            groups.setdefault(same_kind.get(recorded, recorded), []).append(group)
    if kind is not None:
        return groups.get(kind, [])
    if len(groups) > 1:
        choices = " or ".join(f"kind={one} ({first_few(names, 3)})" for one, names in groups.items())
        raise CellMapValueError(f"{root}: {name!r} was predicted in several kinds; choose {choices}")
    return next(iter(groups.values()), [])
