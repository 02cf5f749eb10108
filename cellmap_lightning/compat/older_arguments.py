"""Arguments that cellmap-data had in 2025 and has no more in 2026."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError

#: Arguments that have no effect, since what they set is gone.
_WITHOUT_EFFECT = ("context", "force_has_data")

#: Arguments of another object, and how it is given to that.
_ELSEWHERE = {
    "use_cuda_streams": "give StreamPrefetch(enabled=True or False) to the Trainer's callbacks",
    "max_streams": "give StreamPrefetch(max_streams=...) to the Trainer's callbacks",
    "stream_timeout": "leave it out: a copy on a side stream is waited for on the device, without a limit",
    "executor": "leave it out: each dataset has its own, dataset.executor, with max_workers threads",
    "max_workers": "give max_workers to CellMapDataset",
    "empty_value": "give empty_value to CellMapDatasetWriter, which fills what is not written with it",
    "axis_order": "give axis_order to CellMapImage",
}


def without_older(where: str, given: Mapping[str, Any], axes: str = "zyx") -> dict[str, Any]:
    """Return arguments without those of 2025 that change nothing here.

    Args:
        where: the class, for messages.
        given: arguments by name.
        axes: the only order of axes.

    Raises:
        CellMapTypeError: an argument of 2025 that belongs to another object.
        CellMapValueError: a value of an argument of 2025 that is not possible any more.
    """
    found = {name: value for name, value in given.items() if name not in _WITHOUT_EFFECT}
    order = found.pop("axis_order", None)
    if order is not None and "".join(order) != axes:
        raise CellMapValueError(
            f"{where}: axis_order must be {axes!r}, got {order!r}; give shapes and scales in the order z, y, x"
        )
    empty = found.pop("empty_value", None)
    if empty is not None and not math.isnan(empty):
        raise CellMapValueError(
            f"{where}: empty_value must be NaN, got {empty!r}; unannotated voxels are NaN in targets, which a loss "
            "masks by target.isnan()"
        )
    for name in found:
        if name in _ELSEWHERE and name != "max_workers":
            raise misplaced(where, name)
    return found


def misplaced(where: str, name: str) -> CellMapTypeError:
    """Return the error about an argument that belongs to another object."""
    return CellMapTypeError(f"{where}: {name} is not an argument of it; {_ELSEWHERE[name]}")


def check_loader_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a loader without those of 2025 that have no effect.

    Raises:
        CellMapTypeError: an argument that belongs to another object.
    """
    for name in given:
        if name in _ELSEWHERE:
            raise misplaced("CellMapDataLoader", name)
    return {name: value for name, value in given.items() if name not in _WITHOUT_EFFECT}


def seed_of(rng: torch.Generator | None, seed: int | None) -> int:
    """Return the seed that a generator or a number gives; by default 0.

    Raises:
        CellMapTypeError: both are given.
    """
    if rng is not None and seed is not None:
        raise CellMapTypeError("CellMapDataset: rng and seed both give the seed; give seed alone")
    return rng.initial_seed() if rng is not None else seed or 0
