"""The split of crops into those of a search of parameters and those held out."""

from collections.abc import Sequence
from typing import Any

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.validation import did_you_mean, first_few


def split_crops(
    names: Sequence[str], crops: Any, held_out: Any, trained: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Return the crops to search on, and those held out: by name, or the last ones of a number.

    Args:
        names: the crops, as `PredictedCrop.name`.
        crops: names of the crops of the search; None for all but those held out. A crop of a dataset may be named
            ``<dataset>.zarr/<crop>``, ``<dataset>/<crop>``, or ``<crop>`` or its number where one crop has it.
        held_out: such names, or a number of crops; None for none.
        trained: names of crops that the network was trained on. Where ``crops`` names none, they are searched only
            if there are no others, and held out by number only if no others are left.

    Raises:
        CellMapKeyError: there is no such crop.
        CellMapValueError: a name is that of several crops, no crop is left for the search, or a value is invalid.
    """
    _check_settings(crops, held_out)
    searched = [_named(crop, names) for crop in crops or []]
    if isinstance(held_out, list):
        named = [_named(crop, names) for crop in held_out]
        others = [name for name in names if name in named]
    else:
        others = _last_crops(names, searched, int(held_out or 0), trained)
    chosen = _crops_of_search(names, searched, others, trained)
    if not chosen:
        raise CellMapValueError("held_out: no crop is left for the search; hold out fewer of them")
    return chosen, others


def _check_settings(crops: Any, held_out: Any) -> None:
    """Check the types of both settings.

    Raises:
        CellMapValueError: one of them is invalid.
    """
    number = isinstance(held_out, int) and not isinstance(held_out, bool) and held_out >= 0
    if not (held_out is None or number or isinstance(held_out, list)):
        raise CellMapValueError(f"held_out must be names of crops or a number of them, got {held_out!r}")
    if not (crops is None or isinstance(crops, list)):
        raise CellMapValueError(f"crops must be a list of names of crops, got {crops!r}")


def _crops_of_search(
    names: Sequence[str], searched: Sequence[str], others: Sequence[str], trained: Sequence[str]
) -> list[str]:
    """Return the crops of the search that are not held out; where none are named, those not trained on if any."""
    # In the order of all crops, so that sums over them do not depend on the order of a setting.
    chosen = [name for name in names if name in (searched or names) and name not in others]
    untrained = [name for name in chosen if name not in trained]
    return untrained if untrained and not searched else chosen


def _named(crop: Any, names: Sequence[str]) -> str:
    """Return the name of the crop that a setting names.

    Raises:
        CellMapKeyError: there is none.
        CellMapValueError: there are several.
    """
    text = str(crop)
    same = [name for name in names if text in _aliases(name)]
    if len(same) > 1:
        raise CellMapValueError(f"{text!r} is the name of several crops; give one of {', '.join(same)}")
    if not same:
        raise CellMapKeyError(
            f"no crop {text!r} is both predicted and annotated; there are {first_few(names, 12)}"
            + did_you_mean(text, names)
        )
    return same[0]


def _aliases(name: str) -> list[str]:
    """Return the names by which a crop may be chosen."""
    volume, _, crop = name.rpartition("/")
    number = crop.removeprefix("crop")
    short = [crop, *([number] if number.isdigit() else [])]
    dataset = volume.removesuffix(".zarr")
    return [*short, name, f"{dataset}/{crop}", f"{dataset}.zarr/{crop}"] if volume else short


def _last_crops(names: Sequence[str], searched: Sequence[str], number: int, trained: Sequence[str]) -> list[str]:
    """Return the last crops outside of the search, up to a number; one is left where the search names none.

    The one that is left was not trained on, if there is such a crop; of the others, those not trained on come first.
    """
    pool = [name for name in names if name not in searched]
    if not searched and pool:
        pool.remove(next((name for name in pool if name not in trained), pool[0]))
    pool.sort(key=lambda name: name not in trained)  # stable: by name within both
    last = pool[len(pool) - min(number, len(pool)) :]
    return [name for name in names if name in last]
