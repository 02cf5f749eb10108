"""Effects on whole sections: missing, dark, and of varying contrast, as in serial-section volumes."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.transforms.effect_options import Span, axis, boolean, length, option, span
from cellmap_lightning.transforms.effects import (
    Draws,
    Effect,
    IntArray,
    PatchGrid,
    axis_number,
    broadcast,
    column,
    within,
)
from cellmap_lightning.transforms.normalization import is_finite

BoolArray = npt.NDArray[np.bool_]


def _fill(where: str, value: Any) -> float | str:
    if value != "nearest" and not is_finite(value):
        raise CellMapValueError(f"{where} must be a number in normalized units or 'nearest', got {value!r}")
    return value if isinstance(value, str) else float(value)


@dataclass(frozen=True, kw_only=True)
class SectionEffect(Effect):
    """An effect that changes sections, each with ``probability`` and separately from the others.

    Attributes:
        axis: axis of the patch that crosses the sections.
        thickness: of a section, nm; None for the voxel size of the first input.
    """

    columns: ClassVar[int]
    axis: str = option(axis, "z")
    thickness: float | None = option(length, None)

    def _numbers(self, draws: Draws, sections: IntArray) -> FloatArray:
        """Return ``[N, len(sections), columns]`` random numbers of sections."""
        columns = column(sections)
        numbers = draws.uniforms(self.columns * int(columns.max() + 1))
        return numbers.reshape(len(numbers), -1, self.columns)[:, columns]


@dataclass(frozen=True, kw_only=True)
class MissingSection(SectionEffect):
    """Sections without content; a patch with a single section is left as it is.

    Attributes:
        fill: their value in normalized units, or ``"nearest"`` for a copy of the nearest section that is present, the
            lower one of two.
        unknown: mark targets as unknown in the voxels that overlap a missing section.

    Example:
        >>> MissingSection(probability=0.05).fill
        0.0
    """

    name = "missing_section"
    stream = 0
    columns = 1
    fill: float | str = option(_fill, 0.0)
    unknown: bool = option(boolean, False)

    def apply(self, raw: torch.Tensor, draws: Draws, grid: PatchGrid) -> None:
        """Fill missing sections, in place."""
        number = axis_number(self.axis)
        if grid.reference.shape[number] == 1:
            return
        missing = self._numbers(draws, grid.nearest_section(number, self.thickness))[..., 0] < self.probability
        if isinstance(self.fill, float):
            raw.masked_fill_(broadcast(missing, number, raw.device), self.fill)
            return
        for row in np.flatnonzero(missing.any(1) & ~missing.all(1)).tolist():
            source = torch.from_numpy(_nearest(missing[row])).to(raw.device)
            raw[row, 0] = raw[row, 0].index_select(number, source)

    def hidden(self, draws: Draws, grid: PatchGrid) -> BoolArray:
        """Return which voxels along the axis overlap a missing section, bool ``[N, n]``."""
        number = axis_number(self.axis)
        first, last = grid.sections(number, self.thickness)
        if grid.reference.shape[number] == 1:
            return np.zeros((len(draws.samples), len(first)), np.bool_)
        sections = np.arange(first[0], last[-1] + 1)
        missing = self._numbers(draws, sections)[..., 0] < self.probability
        before = np.concatenate([np.zeros((len(missing), 1), np.int64), missing.cumsum(1)], 1)
        overlaps: BoolArray = before[:, last + 1 - first[0]] > before[:, first - first[0]]
        return overlaps


def _nearest(missing: BoolArray) -> IntArray:
    """Return the index of the nearest section that is present for each section, the lower one of two."""
    present = np.flatnonzero(~missing)
    distances = np.abs(np.arange(len(missing))[:, None] - present)
    nearest: IntArray = present[distances.argmin(1)]
    return nearest


class _LinearSections(SectionEffect):
    """An effect that maps the values of each section linearly."""

    def apply(self, raw: torch.Tensor, draws: Draws, grid: PatchGrid) -> None:
        """Change the sections that are drawn, in place."""
        number = axis_number(self.axis)
        numbers = self._numbers(draws, grid.nearest_section(number, self.thickness))
        unchanged = numbers[..., 0] >= self.probability
        factor, shift = self.linear(numbers[..., 1:])
        factor, shift = np.where(unchanged, 1, factor), np.where(unchanged, 0, shift)
        raw.mul_(broadcast(factor.astype(np.float32), number, raw.device))
        raw.add_(broadcast(shift.astype(np.float32), number, raw.device))

    @abstractmethod
    def linear(self, numbers: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return factor and offset of each section ``[N, n]`` from its random numbers ``[N, n, columns - 1]``."""


@dataclass(frozen=True, kw_only=True)
class DarkSection(_LinearSections):
    """Sections whose values are multiplied by a factor.

    Attributes:
        factor: of normalized values; 0 is black.

    Example:
        >>> DarkSection(probability=0.05, factor=[0.3, 0.7]).factor
        (0.3, 0.7)
    """

    name = "dark_section"
    stream = 1
    columns = 2
    factor: Span = option(span(least=0), (0.3, 0.7))

    def linear(self, numbers: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the factor of each section, and no offset."""
        return within(self.factor, numbers[..., 0]), np.zeros(numbers.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class SectionContrast(_LinearSections):
    """Contrast and brightness that vary from section to section.

    Attributes:
        contrast: factor about 0.5.
        brightness: offset.

    Example:
        >>> SectionContrast(probability=1.0, contrast=[0.8, 1.2]).brightness
        (-0.05, 0.05)
    """

    name = "section_contrast"
    stream = 2
    columns = 3
    contrast: Span = option(span(least=0), (0.9, 1.1))
    brightness: Span = option(span(), (-0.05, 0.05))

    def linear(self, numbers: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return factor and offset of each section."""
        factor = within(self.contrast, numbers[..., 0])
        return factor, 0.5 * (1 - factor) + within(self.brightness, numbers[..., 1])
