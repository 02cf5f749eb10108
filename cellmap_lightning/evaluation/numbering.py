"""Objects as numbers: connected components, the user's own function, and the minimum size."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError, MissingExtraError

Labels = npt.NDArray[Any]
#: From a boolean volume ``[z, y, x]`` to numbers of the same shape.
Numbering = Callable[[Labels], Labels]
#: Least volume of an object, nm³, of all classes or ``{class: nm³}`` with ``"*"`` for the others.
LeastVolume = float | Mapping[str, float]


def components(present: Labels) -> Labels:
    """Number connected components of voxels that share a face, an edge or a corner, as the challenge's scorer does.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    try:
        from scipy import ndimage
    except ImportError as e:
        raise MissingExtraError('components need scipy: pip install "cellmap-lightning[targets]"') from e
    numbers: Labels = ndimage.label(present, structure=np.ones((3, 3, 3), bool))[0]
    return numbers


def numbering(given: str | Numbering | None) -> Numbering:
    """Return a function that numbers objects.

    Args:
        given: the function, its name as ``package.module.function``, or None for `components`.

    Raises:
        CellMapTypeError: there is no such function.
    """
    if given is None:
        return components
    if callable(given):
        return given
    module, _, name = given.rpartition(".")
    try:
        found: Numbering = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as e:
        raise CellMapTypeError(f"instances={given}: there is no such function ({e})") from None
    return found


def check_least_volume(value: Any) -> LeastVolume:
    """Return the setting ``min_volume`` if it is one.

    Raises:
        CellMapValueError: it is none.
    """
    volumes = dict(value) if isinstance(value, Mapping) else {"*": value}
    for name, volume in volumes.items():
        number = isinstance(volume, int | float) and not isinstance(volume, bool)
        if not number or not 0 <= volume < np.inf:
            where = f" for {name!r}" if name != "*" else ""
            raise CellMapValueError(f"min_volume must be at least 0 nm³, got {volume!r}{where}")
    return volumes


def least_voxels(volume: LeastVolume, name: str, voxel: float) -> int:
    """Return the least number of voxels of an object of a class.

    Args:
        volume: see `LeastVolume`.
        name: the class.
        voxel: volume of a voxel, nm³.
    """
    least = volume.get(name, volume.get("*", 0)) if isinstance(volume, Mapping) else volume
    return int(np.ceil(least / voxel - 1e-9))


def without_small(numbers: Labels, least: int) -> Labels:
    """Return numbers without those of fewer voxels; the others keep theirs."""
    if least <= 1 or not numbers.size:
        return numbers
    found, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    kept = np.where(counts >= least, found, 0).astype(numbers.dtype)
    return kept[inverse].reshape(numbers.shape)
