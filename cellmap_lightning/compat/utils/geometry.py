"""`cellmap_data.utils.geometry`: boxes as ``{axis: (lower, upper)}`` in nm."""

from collections.abc import Mapping, Sequence

BoxDict = Mapping[str, Sequence[float]]


def box_intersection(a: BoxDict, b: BoxDict) -> dict[str, tuple[float, float]] | None:
    """Return the intersection of two boxes along their common axes; None if it is empty."""
    shared = {axis: (max(a[axis][0], b[axis][0]), min(a[axis][1], b[axis][1])) for axis in a if axis in b}
    return shared if shared and all(lower < upper for lower, upper in shared.values()) else None


def box_union(a: BoxDict, b: BoxDict) -> dict[str, tuple[float, float]]:
    """The smallest box that holds two."""
    ends = {axis: [*a.get(axis, ()), *b.get(axis, ())] for axis in {**a, **b}}
    return {axis: (min(values), max(values)) for axis, values in ends.items()}


def box_shape(box: BoxDict, scale: Mapping[str, float]) -> dict[str, int]:
    """Voxels of a box along each axis, at least one."""
    return {axis: max(1, round((upper - lower) / scale[axis])) for axis, (lower, upper) in box.items()}
