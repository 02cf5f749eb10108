"""Deprecated names of arguments, which are still accepted."""

import warnings
from typing import Any

from cellmap_lightning.errors import CellMapTypeError


def renamed(name: str, value: Any, **older: Any) -> Any:
    """Return the value of an argument that may be passed by a deprecated name.

    Args:
        name: current name.
        value: value passed by the current name, or None.
        older: values passed by deprecated names, or None.

    Raises:
        CellMapTypeError: it was passed by two names.
    """
    for old, old_value in older.items():
        if old_value is None:
            continue
        if value is not None:
            raise CellMapTypeError(f"{name} and {old} are the same argument; give {name} alone")
        warnings.warn(f"{old} is called {name} now", DeprecationWarning, stacklevel=3)
        value = old_value
    return value
