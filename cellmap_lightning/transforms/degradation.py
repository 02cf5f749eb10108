"""Effects of imaging: coarse sampling, motion and stripes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.transforms.effect_options import Span, axes, axis, option, span
from cellmap_lightning.transforms.effects import PatchGrid, SampleEffect, axis_number, column, within


@dataclass(frozen=True, kw_only=True)
class LowResolution(SampleEffect):
    """Simulated coarser sampling: means over larger voxels, interpolated linearly at the voxels of the patch.

    Attributes:
        voxel_size: edge of the larger voxels, nm, the same along all axes; at most that of the patch changes nothing.
        axes: the axes that are sampled coarsely.

    Example:
        >>> LowResolution(probability=0.2, voxel_size=[16, 40]).axes
        ('z',)
    """

    name = "low_resolution"
    stream = 3
    voxel_size: Span = option(span("nm", least=0))
    axes: tuple[str, ...] = option(axes(), ("z",))

    def numbers(self, grid: PatchGrid) -> int:
        """Return 1: the voxel size."""
        return 1

    def change(
        self, values: torch.Tensor, numbers: FloatArray, grid: PatchGrid, generator: Callable[[], torch.Generator]
    ) -> torch.Tensor:
        """Sample along one axis after the other."""
        coarse = within(self.voxel_size, numbers[0])
        for number in map(axis_number, self.axes):
            ratio = coarse / float(grid.window.scale[number])
            if ratio > 1 and values.shape[number] > 1:
                values = _interpolated(_means(values, number, ratio), number, values.shape[number], ratio)
        return values


def _means(values: torch.Tensor, axis: int, ratio: float) -> torch.Tensor:
    """Return means over larger voxels, which are symmetric about the centre of the patch.

    Args:
        values: ``[z, y, x]``.
        axis: the axis.
        ratio: edge of the larger voxels in voxels; the outermost ones end at the border of the patch.
    """
    size = values.shape[axis]
    count = max(1, math.ceil(size / ratio))
    edges = (np.arange(count + 1) - count / 2) * ratio + size / 2
    low, high = np.clip(edges[:-1], 0, size), np.clip(edges[1:], 0, size)
    first = np.floor(low + 1e-9).astype(np.int64)
    total = None
    # Explicit sums, since the last bits of a matrix product depend on the number of threads.
    for step in range(int((np.ceil(high - 1e-9) - first).max())):
        voxel = first + step
        weight = np.clip(np.minimum(high, voxel + 1) - np.maximum(low, voxel), 0, 1) / (high - low)
        part = values.index_select(axis, _on(np.minimum(voxel, size - 1), values))
        part = part.mul_(_along(weight, axis, values))
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _interpolated(means: torch.Tensor, axis: int, size: int, ratio: float) -> torch.Tensor:
    """Interpolate means over larger voxels linearly at ``size`` voxel centres, constant beyond the outermost."""
    count = means.shape[axis]
    position = np.clip((np.arange(size) - (size - 1) / 2) / ratio + (count - 1) / 2, 0, count - 1)
    lower = np.floor(position).astype(np.int64)
    weight = position - lower
    out = means.index_select(axis, _on(lower, means)).mul_(_along(1 - weight, axis, means))
    upper = means.index_select(axis, _on(np.minimum(lower + 1, count - 1), means))
    return out.add_(upper.mul_(_along(weight, axis, means)))


@dataclass(frozen=True, kw_only=True)
class MotionBlur(SampleEffect):
    """A mean along a line in a plane, at a random angle; the patch is padded with its border voxels.

    Attributes:
        length: of the line, nm.
        axes: the two axes of the plane.

    Example:
        >>> MotionBlur(probability=0.2, length=[0, 40]).axes
        ('y', 'x')
    """

    name = "motion_blur"
    stream = 4
    length: Span = option(span("nm", least=0))
    axes: tuple[str, ...] = option(axes(2, 2), ("y", "x"))

    def numbers(self, grid: PatchGrid) -> int:
        """Return 2: the length and the angle."""
        return 2

    def change(
        self, values: torch.Tensor, numbers: FloatArray, grid: PatchGrid, generator: Callable[[], torch.Generator]
    ) -> torch.Tensor:
        """Return the mean of shifted copies."""
        planes = [axis_number(name) for name in self.axes]
        angle = math.pi * numbers[1]
        voxels = [
            within(self.length, numbers[0]) * part / float(grid.window.scale[number])
            for part, number in zip((math.sin(angle), math.cos(angle)), planes, strict=True)
        ]
        weights = _line(*voxels)
        padded, radii = values, [max(abs(offset[i]) for offset in weights) for i in range(2)]
        for number, radius in zip(planes, radii, strict=True):
            if radius:
                size = values.shape[number]
                padded = padded.index_select(
                    number, _on(np.clip(np.arange(-radius, size + radius), 0, size - 1), values)
                )
        out, part = torch.zeros_like(values), torch.empty_like(values)
        for offset, weight in sorted(weights.items()):
            shifted = padded
            for number, radius, step in zip(planes, radii, offset, strict=True):
                shifted = shifted.narrow(number, radius + step, values.shape[number])
            out.add_(torch.mul(shifted, weight, out=part))
        return out


def _line(first: float, second: float) -> dict[tuple[int, int], float]:
    """Return the weights of voxels, by their offsets, of a line through the origin: bilinear shares of its points.

    Args:
        first: extent of the line along the first axis, voxels.
        second: the same along the second axis.
    """
    half = math.ceil(max(abs(first), abs(second)))  # at least two points per voxel
    weights: dict[tuple[int, int], float] = {}
    for point in np.linspace(-0.5, 0.5, 2 * half + 1) if half else [0.0]:
        corners = [(math.floor(point * extent), point * extent % 1) for extent in (first, second)]
        for offset in np.ndindex(2, 2):
            share = math.prod(part if i else 1 - part for i, (_, part) in zip(offset, corners, strict=True))
            if share > 0:
                at = (corners[0][0] + offset[0], corners[1][0] + offset[1])
                weights[at] = weights.get(at, 0.0) + share / (2 * half + 1)
    return weights


@dataclass(frozen=True, kw_only=True)
class Stripes(SampleEffect):
    """Stripes of varying brightness, as curtaining of FIB-SEM: an offset that varies along one axis only.

    The offset is a random number in [-amplitude, amplitude] at every multiple of ``width`` from the centre of the
    patch, interpolated linearly.

    Attributes:
        amplitude: largest offset, in normalized units.
        width: distance of the points, nm.
        axis: the axis along which the offset varies.

    Example:
        >>> Stripes(probability=0.3, amplitude=[0, 0.1], width=[16, 64]).axis
        'x'
    """

    name = "stripes"
    stream = 5
    amplitude: Span = option(span(least=0))
    width: Span = option(span("nm", least=1))
    axis: str = option(axis, "x")

    def numbers(self, grid: PatchGrid) -> int:
        """Return those of width, amplitude and every point."""
        reach = float(max(grid.window.extent[axis_number(self.axis)] / 2 / self.width[0], 1))
        return 2 + 2 * (math.ceil(reach) + 2)

    def change(
        self, values: torch.Tensor, numbers: FloatArray, grid: PatchGrid, generator: Callable[[], torch.Generator]
    ) -> torch.Tensor:
        """Add the offsets."""
        number = axis_number(self.axis)
        width, amplitude = within(self.width, numbers[0]), within(self.amplitude, numbers[1])
        positions = grid.centers(number) / width
        reach = math.ceil(np.abs(positions).max())
        points = np.arange(-reach, reach + 1)
        offsets = amplitude * (2 * numbers[2 + column(points)] - 1)
        return values + _along(np.interp(positions, points, offsets), number, values)


def _on(index: np.ndarray, values: torch.Tensor) -> torch.Tensor:
    """Return indices on the device of a tensor."""
    return torch.from_numpy(index).to(values.device)


def _along(weights: FloatArray, axis: int, values: torch.Tensor) -> torch.Tensor:
    """Return weights along an axis of ``[z, y, x]`` as float32, on the device of a tensor."""
    shape = [1, 1, 1]
    shape[axis] = -1
    return torch.from_numpy(weights.astype(np.float32).reshape(shape)).to(values.device)
