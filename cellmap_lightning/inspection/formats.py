"""Tables, lengths and boxes as text."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

#: A blank at which lines are not broken.
_FIXED = "\u00a0"


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
    return " ".join(f"{axis} {low:.5g}..{high:.5g}" for axis, (low, high) in box.items()) if box else "-"


def together(text: str) -> str:
    """Return a text that `wrapped` does not break."""
    return text.replace(" ", _FIXED)


def wrapped(text: str, indent: int = 0, hanging: int = 4) -> str:
    """Return lines that fit the terminal.

    Args:
        text: one or several lines.
        indent: spaces before each line.
        hanging: further spaces before continued lines.
    """
    width = shutil.get_terminal_size().columns
    first, later = " " * indent, " " * (indent + hanging)
    options: Any = {"initial_indent": first, "subsequent_indent": later, "break_on_hyphens": False}
    # Columns of spaces stay, and paths are not broken.
    lines = (textwrap.wrap(line, width, break_long_words=False, **options) or [first] for line in text.split("\n"))
    return "\n".join(line for wrapped_lines in lines for line in wrapped_lines).replace(_FIXED, " ")
