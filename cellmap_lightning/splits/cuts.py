"""Intervals of an axis for training and validation, with a gap between them; pure functions of lengths."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import EDGE_TOLERANCE
from cellmap_lightning.splits.block_options import FRACTION, BlockOptions

#: First and last edge of an interval, in steps from the lower edge of the crop.
Interval = tuple[int, int]


@dataclass(frozen=True)
class Line:
    """An axis of a crop that is cut.

    Attributes:
        length: its steps.
        step: length of a step in nm, a voxel of the annotation.
        patch: length of a training patch in nm, which each part must hold.
        reach: distance in nm by which a training patch shows raw beyond its part.

    Example:
        >>> cut(Line(length=100, step=8, patch=128, reach=0), BlockOptions(), 0, "crop1")
        ([(0, 80)], [(80, 100)])
    """

    length: int
    step: float
    patch: float
    reach: float

    def steps(self, length: float) -> int:
        """Return the steps that hold a length in nm."""
        return math.ceil(length / self.step - EDGE_TOLERANCE)


def cut(line: Line, options: BlockOptions, seed: int, name: str) -> tuple[list[Interval], list[Interval]]:
    """Return the intervals for training and for validation.

    Args:
        line: the axis.
        options: the options.
        seed: random seed.
        name: name of the crop, on which a random position depends.

    Raises:
        CellMapValueError: a part is smaller than a patch, or nothing is left for training.
    """
    patch, gap = line.steps(line.patch), gap_steps(line, options)
    edges = [round(number * line.length / options.count) for number in range(options.count + 1)]
    validated = []
    for number, (start, end) in enumerate(pairwise(edges)):
        size = _validation_steps(line, options, end - start, patch)
        first = _first(options, start, end - start, size, gap + patch, f"{seed}/{name}/{number}")
        validated.append((first, first + size))
    return _trained(line, options, validated, gap, patch), validated


def gap_steps(line: Line, options: BlockOptions) -> int:
    """Return the steps between training and validation."""
    return line.steps(line.reach if options.gap_nm is None else options.gap_nm)


def _validation_steps(line: Line, options: BlockOptions, room: int, patch: int) -> int:
    """Return the steps of a validation box in a part of the axis."""
    wanted = max(1, round((FRACTION if options.fraction is None else options.fraction) * room))
    if options.fraction is None:
        wanted = max(wanted, patch)
    if wanted < patch:
        raise CellMapValueError(
            f"the part for validation is {_nm(line, wanted)} long, and a patch needs {_nm(line, patch)}; use a "
            f"fraction of at least {math.ceil(100 * patch / room) / 100:g}, or a smaller patch"
        )
    return wanted


def _first(options: BlockOptions, start: int, room: int, size: int, least: int, key: str) -> int:
    """Return the first step of a validation box in a part of the axis.

    Args:
        options: the options.
        start: first step of the part.
        room: steps of the part.
        size: steps of the box.
        least: steps of a gap and a patch: beside the box is either so much room or none.
        key: seed of a random position.
    """
    spare = room - size
    if options.position == "start" or spare <= 0:
        return start
    if options.position == "end":
        return start + spare
    if options.position == "middle":
        return start + spare // 2
    places = [n for n in range(spare + 1) if (n == 0 or n >= least) and (n == spare or spare - n >= least)]
    places = places or [spare]
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return start + places[int.from_bytes(digest, "big") % len(places)]


def _trained(line: Line, options: BlockOptions, validated: Sequence[Interval], gap: int, patch: int) -> list[Interval]:
    """Return the intervals for training beside those for validation."""
    starts = [0, *(end + gap for _, end in validated)]
    ends = [*(start - gap for start, _ in validated), line.length]
    # Without a step between two validation boxes, or between one and the end of the crop, there is no part to train on.
    bounds = [0, *(edge for interval in validated for edge in interval), line.length]
    rooms = [b - a for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    trained = [(a, b) for a, b, room in zip(starts, ends, rooms, strict=True) if room > 0]
    short = [b - a for a, b in trained if b - a < max(patch, 1)]
    if short or not trained:
        taken = sum(b - a for a, b in validated)
        gaps = gap * sum((a > 0) + (b < line.length) for a, b in trained)
        needed = taken + gaps + max(1, len(trained)) * max(patch, 1)
        raise CellMapValueError(
            f"a part for training is {_nm(line, max(0, min(short, default=0)))} long, and a patch needs "
            f"{_nm(line, patch)}: with {_nm(line, taken)} for validation and gaps of {_nm(line, gap)}, "
            f"{_nm(line, needed)} are needed, and the crop has {_nm(line, line.length)}; use a smaller patch, less "
            f"augmentation, another axis, or another position or count (now {options.position} and {options.count})"
        )
    return trained


def _nm(line: Line, steps: int) -> str:
    return f"{steps * line.step:g} nm"
