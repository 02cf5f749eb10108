"""Checks of arguments, and hints for their messages."""

import difflib
import math
import operator
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from cellmap_lightning.errors import CellMapError, CellMapValueError

T = TypeVar("T")


def one_of(name: str, value: T, options: Iterable[T], error: type[CellMapError] = CellMapValueError) -> T:
    """Return a value if it is one of the options.

    Raises:
        CellMapValueError: it is not; the message lists the options and the most similar one.
    """
    options = list(options)
    if value not in options:
        hint = did_you_mean(value, [str(option) for option in options])
        raise error(f"{name} must be one of {', '.join(map(str, options))}, got {value!r}{hint}")
    return value


def int_at_least(name: str, value: Any, least: int, error: type[CellMapError] = CellMapValueError) -> int:
    """Return a value if it is a whole number (no bool) of at least ``least``.

    Raises:
        CellMapValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise error(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def whole_number(name: str, value: Any) -> int:
    """Return a whole number (no bool) of any type as Python's.

    Raises:
        CellMapValueError: it is something else, as a text with digits.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise CellMapValueError(f"{name} must be a whole number, got {value!r}")


def mapping_or_none(name: str, value: Any) -> Mapping[str, Any] | None:
    """Return a value if it is None or a mapping with texts as keys.

    Raises:
        CellMapValueError: it is something else.
    """
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise CellMapValueError(f"{name} must be a mapping such as {{anon: true}}, or null, got {value!r}")
    return value


def not_negative(name: str, value: Any) -> float:
    """Return a value if it is a finite number (no bool) of at least 0.

    Raises:
        CellMapValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise CellMapValueError(f"{name} must be a number of at least 0, got {value!r}")
    return value


def yes_or_no(name: str, value: Any) -> bool:
    """Return a value if it is True or False: a text such as ``"no"`` would count as True.

    Raises:
        CellMapValueError: it is something else.
    """
    if not isinstance(value, bool):
        raise CellMapValueError(f"{name} must be true or false, got {value!r}")
    return value


def positive_number(name: str, value: Any, error: type[CellMapError] = CellMapValueError) -> float:
    """Return a value if it is a finite number (no bool) above 0.

    Raises:
        CellMapValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise error(f"{name} must be a number above 0, got {value!r}")
    return float(value)


def did_you_mean(value: Any, options: Iterable[str], otherwise: str = "") -> str:
    """Return the end of a message with the option closest to a value, or ``otherwise`` where none is close."""
    options = list(options)
    same = other_form(str(value), options)
    if same:
        return f"; {same}"
    close = difflib.get_close_matches(str(value), options, 1)
    return f"; did you mean {close[0]!r}?" if close else otherwise


def other_form(name: str, names: Iterable[str]) -> str:
    """Return a sentence on the same name in another Unicode form, which looks alike; empty without one."""
    form = next(filter(None, (_form(other, name) for other in names)), "")
    return f"the name there differs in its Unicode form ({form}): rename it, or copy the name from the folder" * bool(
        form
    )


def with_form(name: str, other: str) -> str:
    """Return a name in quotes, with its Unicode form if it differs from another name in that alone.

    Example:
        >>> with_form("mito", "Mito")
        "'mito'"
    """
    form = _form(name, other)
    return f"{name!r} (in the Unicode form {form}, which looks alike)" if form else repr(name)


def _form(name: str, other: str) -> str:
    """Return the Unicode form of a name; empty unless it differs from another name in the form alone."""
    if name == other or unicodedata.normalize("NFC", name) != unicodedata.normalize("NFC", other):
        return ""
    return next((form for form in ("NFC", "NFD") if unicodedata.is_normalized(form, name)), "neither NFC nor NFD")


def first_few(items: Sequence[Any], count: int = 3) -> str:
    """Return a list as text with the first ``count`` items and the number of the others."""
    named = ", ".join(map(str, items[:count]))
    return named if len(items) <= count else f"{named} and {len(items) - count} more"
