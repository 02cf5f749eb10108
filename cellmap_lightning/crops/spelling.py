"""Other spellings of the names of classes, such as ``mito-mem`` for ``mito_mem``, and names that are close to them."""

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence

from cellmap_lightning.validation import other_form

#: Similarity of names from which one is a typing error of the other.
_VERY_SIMILAR = 0.75
_SEPARATORS = re.compile(r"[\s_-]+")


def other_spellings(classes: Iterable[str], stored: Iterable[str], known: Collection[str] = ()) -> dict[str, str]:
    """Return the classes that a crop lacks, and whose name it has in another spelling, with that spelling.

    Args:
        classes: the requested classes.
        stored: the names that the crop annotates.
        known: names that are classes of their own, besides ``classes``.

    Spellings differ by case, by blanks, underscores and hyphens, and by the form of Unicode.

    Example:
        >>> other_spellings(["mito", "er"], ["Mito", "er"])
        {'mito': 'Mito'}
    """
    classes, stored = list(classes), set(stored)
    others = {_plain(name): name for name in sorted(stored) if name not in classes and name not in known}
    return {name: others[_plain(name)] for name in classes if name not in stored and _plain(name) in others}


def closest_class(name: str, stored: Sequence[str]) -> str | None:
    """Return the class of some data that a name probably means; None where none is close.

    Args:
        name: a class that the data do not have.
        stored: their classes.

    Another spelling comes first, then a very similar name, the beginning of the name, a similar name, and last a longer
    name that begins with it.

    Example:
        >>> closest_class("mitochondria", ["er", "mito", "mito_mem"])
        'mito'
    """
    plain = _plain(name)
    if not plain:
        return None
    shorter = [other for other in stored if _plain(other) and plain.startswith(_plain(other))]
    longer = [other for other in stored if _plain(other).startswith(plain)]
    ordered = [
        *other_spellings([name], stored).values(),
        *difflib.get_close_matches(name, stored, 1, _VERY_SIMILAR),
        *sorted(shorter, key=len, reverse=True),
        *difflib.get_close_matches(name, stored, 1),
        *sorted(longer, key=len),
    ]
    return ordered[0] if ordered else None


def meant(names: Iterable[str], stored: Sequence[str]) -> str:
    """Return the end of a message with the classes that unknown names probably mean; empty where none is close."""
    pairs = [(name, closest_class(name, stored)) for name in names if name not in stored]
    found = [(name, other) for name, other in pairs if other is not None]
    if not found:
        return ""
    same = next(filter(None, (other_form(name, stored) for name, _ in found)), "")
    if same:
        return f"; {same}"
    if len(pairs) == 1:
        return f"; did you mean {found[0][1]!r}?"
    return "; did you mean " + ", ".join(f"{other!r} for {name!r}" for name, other in found) + "?"


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", _SEPARATORS.sub("", name)).casefold()
