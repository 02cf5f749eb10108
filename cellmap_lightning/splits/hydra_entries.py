"""Entries of ``datasets`` that Hydra creates: those with a ``_target_``."""

from collections.abc import Mapping, Sequence
from typing import Any


def instantiate_entries(datasets: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the datasets with every entry that has a ``_target_`` instantiated, as Hydra itself does.

    Args:
        datasets: ``{split: [entry, ...]}``, see `CellMapDataSplit`; anything else is returned as it is.
    """
    if not isinstance(datasets, Mapping):
        return datasets
    return {
        split: [_instance(entry) for entry in entries]
        if isinstance(entries, Sequence) and not isinstance(entries, str)
        else entries
        for split, entries in datasets.items()
    }


def _instance(entry: Any) -> Any:
    if isinstance(entry, Mapping) and "_target_" in entry:
        from hydra.utils import instantiate

        return instantiate(entry, _convert_="all")
    return entry
