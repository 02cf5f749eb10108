"""Tables, lengths and boxes as text."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Sequence[str]], indent: int = 0) -> str:
    """Return left-aligned columns; the first row is their heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{n}}" for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(" " * indent + line for line in lines)


def by_axis(values: Any) -> str:
    """Return one number per axis, such as ``8 x 4 x 4``."""
    return " x ".join(f"{float(v):.4g}" for v in values)


def voxel_count(values: Sequence[float] | None) -> str:
    """Return a shape, such as ``64^3`` or ``32x64x64``; ``-`` for None."""
    if values is None:
        return "-"
    if len(set(values)) == 1:
        return f"{values[0]:g}^3"
    return "x".join(f"{v:g}" for v in values)


def voxel_size(values: Sequence[float]) -> str:
    """Return a voxel size in nm, one number if it is isotropic."""
    rounded = [float(f"{v:.5g}") for v in values]
    return f"{rounded[0]:g}" if len(set(rounded)) == 1 else " ".join(f"{v:g}" for v in rounded)


def box_text(box: Mapping[str, Sequence[float]] | None) -> str:
    """Return a box, such as ``z 0..512 y 0..512 x 0..512``; ``-`` for None."""
    return " ".join(f"{axis} {low:g}..{high:g}" for axis, (low, high) in box.items()) if box else "-"
