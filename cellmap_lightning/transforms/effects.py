"""Base classes of random intensity effects, their random numbers, and the geometry of the patch that they change."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from cellmap_lightning.geometry.lattice import AXES, FloatArray
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.runtime.rng import EFFECT, hashes, uniforms
from cellmap_lightning.transforms.effect_options import Span, check_options, option, probability

IntArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """The voxels of a patch, and those of the first input, about their common centre.

    Attributes:
        window: shape and voxel size of the patch.
        reference: the same of the first input. Sections, boxes and stripes are placed in it, so that all inputs and
            targets of a sample show them at the same place in nm.
    """

    window: Window
    reference: Window

    def centers(self, axis: int) -> FloatArray:
        """Return the centres of the voxels along an axis, nm from the centre of the patch."""
        return _centers(self.window, axis)

    def sections(self, axis: int, thickness: float | None = None) -> tuple[IntArray, IntArray]:
        """Return the first and the last section that each voxel along an axis overlaps.

        Section 0 begins where the first input begins; sections beyond it have negative or larger numbers.

        Args:
            axis: the axis that crosses the sections.
            thickness: of a section, nm; None for the voxel size of the first input.
        """
        reference = self.reference
        pitch = float(reference.scale[axis]) if thickness is None else thickness
        centers = self.centers(axis) + reference.extent[axis] / 2
        # Edges of voxels lie on edges of sections up to rounding, which must not count as an overlap.
        half = self.window.scale[axis] * (0.5 - 1e-6)
        low, high = (np.floor((centers + side) / pitch).astype(np.int64) for side in (-half, half))
        return low, high

    def nearest_section(self, axis: int, thickness: float | None = None) -> IntArray:
        """Return the section that holds the centre of each voxel along an axis; see `sections`."""
        pitch = float(self.reference.scale[axis]) if thickness is None else thickness
        sections: IntArray = np.floor((self.centers(axis) + self.reference.extent[axis] / 2) / pitch).astype(np.int64)
        return sections


def _centers(window: Window, axis: int) -> FloatArray:
    count = window.shape[axis]
    centers: FloatArray = (np.arange(count, dtype=np.float64) - (count - 1) / 2) * float(window.scale[axis])
    return centers


@dataclass(frozen=True)
class Draws:
    """The random numbers of one effect for a batch, a function of seed, effect and number of each sample alone.

    Attributes:
        seed: random seed.
        stream: the effect's stream.
        samples: numbers of the samples.
        number: number of the input, so that each input has different noise.
    """

    seed: int
    stream: int
    samples: Sequence[int]
    number: int

    def uniforms(self, count: int) -> FloatArray:
        """Return ``[N, count]`` numbers in [0, 1), the same for all inputs; with more of them, the first stay."""
        return uniforms(self.seed, EFFECT + 2 * self.stream, self.samples, count)

    def generator(self, row: int, device: torch.device) -> torch.Generator:
        """Return a generator for the voxels of a sample of this input."""
        seeds = hashes(self.seed, EFFECT + 2 * self.stream + 1, self.samples[row : row + 1], self.number + 1)
        return torch.Generator(device).manual_seed(int(seeds[0, -1]) >> 1)


def column(index: IntArray) -> IntArray:
    """Return a column for each whole number, negative ones included: 0, -1, 1, -2, 2 ... are 0, 1, 2, 3, 4 ..."""
    columns: IntArray = np.where(index >= 0, 2 * index, -2 * index - 1)
    return columns


def within(span: Span, uniform: Any) -> Any:
    """Return the value of a uniform distribution over a range for a number in [0, 1)."""
    return span[0] + (span[1] - span[0]) * uniform


def broadcast(values: npt.NDArray[Any], axis: int, device: torch.device) -> torch.Tensor:
    """Return ``[N, n]`` values along an axis as a tensor that broadcasts with ``[N, 1, z, y, x]``."""
    shape = [len(values), 1, 1, 1, 1]
    shape[2 + axis] = values.shape[1]
    return torch.from_numpy(values.reshape(shape)).to(device)


@dataclass(frozen=True, kw_only=True)
class Effect(ABC):
    """A random change of normalized raw.

    Attributes:
        name: key in ``intensity_transforms``.
        stream: number of its random numbers; a change of it changes the samples of published seeds.
        probability: of each sample, or of each section.
    """

    name: ClassVar[str]
    stream: ClassVar[int]
    probability: float = option(probability)

    def __post_init__(self) -> None:
        check_options(self, f"intensity_transforms.{self.name}")

    @abstractmethod
    def apply(self, raw: torch.Tensor, draws: Draws, grid: PatchGrid) -> None:
        """Change a batch in place, on its device.

        Args:
            raw: float32 ``[N, 1, z, y, x]``.
            draws: the random numbers.
            grid: the voxels.
        """


class SampleEffect(Effect):
    """An effect that changes a sample as a whole, with a probability per sample."""

    def apply(self, raw: torch.Tensor, draws: Draws, grid: PatchGrid) -> None:
        """Change the samples that are drawn, in place."""
        numbers = draws.uniforms(1 + self.numbers(grid))
        for row in np.flatnonzero(numbers[:, 0] < self.probability).tolist():

            def generator(row: int = row) -> torch.Generator:
                return draws.generator(row, raw.device)

            raw[row, 0] = self.change(raw[row, 0], numbers[row, 1:], grid, generator)

    @abstractmethod
    def numbers(self, grid: PatchGrid) -> int:
        """Return the count of random numbers that `change` uses."""

    @abstractmethod
    def change(
        self, values: torch.Tensor, numbers: FloatArray, grid: PatchGrid, generator: Callable[[], torch.Generator]
    ) -> torch.Tensor:
        """Return the changed voxels of one sample.

        Args:
            values: float32 ``[z, y, x]``, which is not changed.
            numbers: random numbers in [0, 1), the same for all inputs of the sample.
            grid: the voxels.
            generator: creates the generator of the sample's voxels.
        """


def axis_number(name: str) -> int:
    """Return the number of an axis in the order z, y, x."""
    return AXES.index(name)
