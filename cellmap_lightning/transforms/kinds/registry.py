"""The kinds of targets by name, and their creation from a specification."""

from collections.abc import Mapping
from typing import Any

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.kinds.affinities import Affinities
from cellmap_lightning.transforms.kinds.boundary import Boundary
from cellmap_lightning.transforms.kinds.descriptors import ShapeDescriptors
from cellmap_lightning.transforms.kinds.distance import SignedDistance
from cellmap_lightning.transforms.kinds.flow import Flow
from cellmap_lightning.transforms.kinds.ids import Instances, StoredIds
from cellmap_lightning.transforms.kinds.kind import TargetKind
from cellmap_lightning.transforms.kinds.presence import Binary, Labels
from cellmap_lightning.transforms.kinds.skeleton import SkeletonDistance

KINDS: Mapping[str, type[TargetKind]] = {
    k.name: k
    for k in (
        Binary, Labels, Instances, StoredIds, Affinities, SignedDistance, Boundary, ShapeDescriptors, Flow,
        SkeletonDistance,
    )
}  # fmt: skip


def make_kind(where: str, window: Window, classes: int, spec: Mapping[str, Any]) -> TargetKind:
    """Create the kind of a target from its specification.

    Args:
        where: the argument, for messages.
        window: its patch.
        classes: number of classes.
        spec: the specification, without shape and scale.

    Raises:
        CellMapKeyError: an unknown kind, or a key that this kind does not have.
        CellMapValueError: an invalid value of an option.
    """
    name = spec.get("kind", "binary")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise CellMapKeyError(f"{where}.kind must be one of {', '.join(KINDS)}, got {name!r}")
    options = {key: value for key, value in spec.items() if key != "kind"}
    for key in options:
        if key not in kind.options:
            options_text = f"it has {', '.join(kind.options)}" if kind.options else "it has no options"
            raise CellMapKeyError(f"{where} has no {key!r}: for kind {name!r} {options_text}")
    try:
        return kind(window, classes, **options)
    except CellMapValueError as e:
        raise CellMapValueError(f"{where}: {e}") from None
