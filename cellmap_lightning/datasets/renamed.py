"""Older names of arguments, which keep working."""

import warnings
from typing import Any

from cellmap_lightning.errors import CellMapTypeError


def renamed(name: str, value: Any, **older: Any) -> Any:
    """The value of an argument that may have been given under an older name.

    Raises:
        CellMapTypeError: it was given under two names.
    """
    for old, given in older.items():
        if given is None:
            continue
        if value is not None:
            raise CellMapTypeError(f"{name} and {old} are the same argument; give {name} alone")
        warnings.warn(f"{old} is called {name} now", DeprecationWarning, stacklevel=3)
        value = given
    return value
