"""Checks of the numbers that describe a patch: its shape in voxels, and its voxel size in nm."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES

#: Examples of both, for messages.
_SHAPE, _SCALE = [64, 64, 64], [8, 8, 8]


def check_shape(where: str, value: Any) -> list[int]:
    """Check the shape of a patch and return it.

    Args:
        where: its key, for messages, such as ``patch.shape``.
        value: three lengths in voxels (z, y, x), or two (y, x) for slices.

    Raises:
        CellMapTypeError: not a list of numbers.
        CellMapValueError: other than two or three whole numbers of at least 1.
    """
    advice = "give three lengths in voxels (z, y, x)"
    numbers = _numbers(where, value, advice, _SHAPE)
    if len(numbers) not in (2, 3):
        example = _three(numbers, _SHAPE, lambda n: _is_finite(n) and n >= 1 and int(n) == n)
        raise CellMapValueError(
            f"{where}={numbers} has {_count(numbers)}; {advice}, such as {example}, or two (y, x) for slices"
        )
    wrong = [(axis, n) for axis, n in _by_axis(numbers) if not _is_finite(n) or int(n) != n or n < 1]
    if wrong:
        raise CellMapValueError(
            f"{where}={numbers}: the length along {_listed(wrong)}; lengths are whole numbers of voxels of at least 1"
        )
    return [int(n) for n in numbers]


def check_scale(where: str, value: Any, lengths: int = 3) -> list[float]:
    """Check the voxel size of a patch and return it.

    Args:
        where: its key, for messages, such as ``patch.scale``.
        value: three numbers in nm (z, y, x), or two (y, x) for slices.
        lengths: number of lengths of the patch's shape.

    Raises:
        CellMapTypeError: not a list of numbers.
        CellMapValueError: not as many positive numbers as are needed.
    """
    advice = "give three numbers in nm (z, y, x)"
    numbers = _numbers(where, value, advice, _SCALE)
    if len(numbers) not in ((2, 3) if lengths == 2 else (3,)):
        example = _three(numbers, _SCALE, lambda n: _is_finite(n) and n > 0)
        text = f"{where}={numbers} has {_count(numbers)}; {advice}, such as {example}"
        raise CellMapValueError(text + (", or two (y, x), as the shape has" if lengths == 2 else ""))
    wrong = [(axis, n) for axis, n in _by_axis(numbers) if not _is_finite(n) or n <= 0]
    if wrong:
        raise CellMapValueError(
            f"{where}={numbers}: the voxel size along {_listed(wrong)}; voxel sizes are positive numbers of nm"
        )
    return numbers


def _numbers(where: str, value: Any, advice: str, example: Sequence[int]) -> list[Any]:
    """Return a value as a list of numbers."""
    if _is_number(value):
        cube = [value] * 3 if _is_finite(value) and value > 0 else list(example)
        raise CellMapTypeError(f"{where}={value!r} is a single number; {advice}, such as {cube}")
    is_list = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)
    if not is_list or not all(_is_number(n) for n in value):
        shown = list(value) if is_list else value
        raise CellMapTypeError(f"{where}={shown!r} is not a list of numbers; {advice}, such as {list(example)}")
    return [n.item() if isinstance(n, np.generic) else n for n in value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return math.isfinite(value)


def _by_axis(numbers: Sequence[Any]) -> list[tuple[str, Any]]:
    return list(zip(AXES[-len(numbers) :], numbers, strict=True))


def _three(numbers: Sequence[Any], example: Sequence[int], is_valid: Any) -> list[Any]:
    """Return three numbers that were probably meant: without axes of length 1 for batch or channels, or repeated."""
    rest = list(numbers)
    if not rest or not all(is_valid(n) for n in rest):
        return list(example)
    if len(rest) == 2:
        rest = [rest[0], rest[1], rest[1]] if rest[0] != rest[1] else rest[:1]
    while len(rest) > 3 and 1 in (rest[0], rest[-1]):
        rest = rest[1:] if rest[0] == 1 else rest[:-1]
    return rest * 3 if len(rest) == 1 else rest if len(rest) == 3 else list(example)


def _count(numbers: Sequence[Any]) -> str:
    return "1 number" if len(numbers) == 1 else f"{len(numbers)} numbers"


def _listed(wrong: Sequence[tuple[str, Any]]) -> str:
    return " and ".join(f"{axis} is {n}" for axis, n in wrong)
