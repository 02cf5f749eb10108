"""Histogram matching: the quantiles of a patch become those of another volume."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.missing_paths import similar_path
from cellmap_lightning.io.statistics import statistics
from cellmap_lightning.transforms.effect_options import Span, option, span
from cellmap_lightning.transforms.effects import PatchGrid, SampleEffect, within
from cellmap_lightning.transforms.normalization import Normalize, is_finite

Quantiles: TypeAlias = tuple[float, ...]
#: Voxels of a patch from which its quantiles are computed, at least; they are evenly spaced.
_VOXELS = 1 << 14
#: Steps of the table of a map, many more than the 256 values of most volumes.
_STEPS = 1 << 12
_NARROW = 1e-30


def measure_quantiles(path: str, normalize: Any = "dtype", invert: bool = False, count: int = 33) -> list[float]:
    """Return the quantiles of a volume in normalized units, for ``match_histogram``.

    Voxels with the stored value 0 are ignored, see `io.statistics`.

    Args:
        path: the raw multiscale group.
        normalize: the rule by which the volume would be normalized; see docs/transforms.md.
        invert: exchange dark and bright.
        count: quantiles, from the 0th to the 100th percentile in equal steps.

    Raises:
        CellMapError: the volume cannot be read, or an invalid rule.

    Example:
        >>> json.dump([measure_quantiles(path) for path in volumes], open("quantiles.json", "w"))  # doctest: +SKIP
    """
    image = read_image(path)
    measured = statistics(image)
    offset, factor = Normalize.parse(normalize, invert).affine(image.finest.array.dtype, measured, str(path))
    return sorted((measured.percentile(p) - offset) * factor for p in np.linspace(0, 100, count).tolist())


def _quantiles(where: str, value: Any) -> tuple[Quantiles, ...]:
    """Return lists of quantiles, given as such or as the path of a JSON file with them."""
    if isinstance(value, str):
        path, where = Path(value), f"{where} ({value})"
        if not path.is_file():
            raise CellMapFileNotFoundError(f"{where}: there is no such file{similar_path(path)}")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CellMapValueError(f"{where}: the file is not valid JSON: {error}") from None
    rows = [value] if _is_list(value) and value and not any(map(_is_list, value)) else value
    if not _is_list(rows) or not rows or not all(map(_is_ascending, rows)):
        raise CellMapValueError(
            f"{where} must be lists of ascending quantiles in equal steps, two or more from the lowest to the highest "
            f"value of a volume, or a JSON file of these; got {_shortened(value)}"
        )
    return tuple(tuple(map(float, row)) for row in rows)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_ascending(row: Any) -> bool:
    if not _is_list(row) or len(row) < 2 or not all(map(is_finite, row)):
        return False
    return all(a <= b for a, b in pairwise(row)) and row[0] < row[-1]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True, kw_only=True)
class MatchHistogram(SampleEffect):
    """A monotone, piecewise linear map from the quantiles of a patch to those of another volume.

    Values beyond the lowest and the highest quantile become the lowest and the highest of the other volume. A patch
    of one value is unchanged.

    Attributes:
        quantiles: those of one or more volumes; each sample is matched to one of them at random; in equal steps, in
            normalized units. A path names a JSON file with them; see `measure_quantiles`.
        amount: 0 leaves the values, 1 matches them fully.

    Example:
        >>> MatchHistogram(probability=0.5, quantiles=[[0.1, 0.5, 0.6, 0.9]]).amount
        (1.0, 1.0)
    """

    name = "match_histogram"
    stream = 10
    quantiles: tuple[Quantiles, ...] = option(_quantiles)
    amount: Span = option(span(least=0, most=1), (1.0, 1.0))

    def numbers(self, grid: PatchGrid) -> int:
        """Return 2: the volume and the amount."""
        return 2

    def change(
        self, values: torch.Tensor, numbers: FloatArray, grid: PatchGrid, generator: Callable[[], torch.Generator]
    ) -> torch.Tensor:
        """Map the values."""
        wanted = self.quantiles[int(numbers[0] * len(self.quantiles))]
        reference = torch.tensor(wanted, dtype=torch.float32, device=values.device)
        step = max(1, values.numel() // _VOXELS)
        # An odd step, so that the voxels do not all lie in the same column of a patch with even lengths.
        ordered = values.flatten()[:: step + 1 - step % 2].sort().values
        own = _at(ordered, np.linspace(0, 1, len(wanted), dtype=np.float32))
        matched = _piecewise_linear(values, own, reference)
        amount = within(self.amount, float(numbers[1]))
        changed = matched.mul_(amount).add_(values * (1 - amount))
        return torch.where(own[-1] > own[0], changed, values)


def _at(ordered: torch.Tensor, fractions: npt.NDArray[np.float32]) -> torch.Tensor:
    """Return quantiles of sorted values, interpolated linearly."""
    place = fractions * np.float32(len(ordered) - 1)
    lower = np.minimum(place.astype(np.int64), max(0, len(ordered) - 2))
    upper = np.minimum(lower + 1, len(ordered) - 1)
    below, above = (ordered[torch.from_numpy(index).to(ordered.device)] for index in (lower, upper))
    part = torch.from_numpy(place - lower.astype(np.float32)).to(ordered.device)
    return below * (1 - part) + above * part


def _piecewise_linear(values: torch.Tensor, knots: torch.Tensor, results: torch.Tensor) -> torch.Tensor:
    """Return the piecewise linear function through points; constant beyond them.

    It is tabulated in equal steps, since on the CPU a search for the interval of each voxel takes four times as long.
    """
    low, step = knots[0], (knots[-1] - knots[0]).clamp(min=_NARROW) / _STEPS
    grid = low + torch.arange(_STEPS + 1, dtype=torch.float32, device=values.device) * step
    interval = torch.bucketize(grid, knots[1:-1].contiguous(), right=True)
    widths = knots[1:] - knots[:-1]
    # A quantile that repeats has an interval without width, in which the quotient would be NaN or infinite.
    slopes = torch.where(widths > _NARROW, (results[1:] - results[:-1]) / widths, 0.0)
    inside = torch.minimum(grid, knots[interval + 1]) - knots[interval]
    table = results[interval] + inside * slopes[interval]
    place = ((values - low) / step).clamp_(0, _STEPS)
    index = place.to(torch.int64).clamp_(0, _STEPS - 1)
    part = place.sub_(index)
    rise = table[1:] - table[:-1]
    return part.mul_(rise[index]).add_(table[index])
