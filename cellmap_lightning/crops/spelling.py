"""Other spellings of the names of classes: ``Mito``, ``mito-mem`` for ``mito_mem``."""

import re
from collections.abc import Collection, Iterable

_SEPARATORS = re.compile(r"[\s_-]+")


def other_spellings(classes: Iterable[str], stored: Iterable[str], known: Collection[str] = ()) -> dict[str, str]:
    """Return the classes that a crop lacks, and whose name it has in another spelling, with that spelling.

    Args:
        classes: the requested classes.
        stored: the names that the crop annotates.
        known: names that are classes of their own, besides ``classes``.

    Spellings differ by case, and by blanks, underscores and hyphens.

    Example:
        >>> other_spellings(["mito", "er"], ["Mito", "er"])
        {'mito': 'Mito'}
    """
    classes, stored = list(classes), set(stored)
    others = {_plain(name): name for name in sorted(stored) if name not in classes and name not in known}
    return {name: others[_plain(name)] for name in classes if name not in stored and _plain(name) in others}


def _plain(name: str) -> str:
    return _SEPARATORS.sub("", name).casefold()
