"""Errors for paths that do not exist, with the part that does and similar names in it."""

import difflib
from collections.abc import Sequence

from cellmap_lightning.errors import CellMapFileNotFoundError
from cellmap_lightning.io.store import NODE_FILES, Remote, StorePath, children, exists
from cellmap_lightning.validation import first_few


def missing(path: StorePath, name: str) -> CellMapFileNotFoundError:
    """Return the error for a path that does not exist; it names the part that exists, and similar names in it.

    Args:
        path: the path.
        name: what it should be, such as ``image``.
    """
    if isinstance(path, Remote):
        return _missing_remote(path, name)
    existing = path
    while not exists(existing) and existing != existing.parent:
        existing = existing.parent
    text = f"{name} {path} does not exist"
    if existing != path:
        part = path.relative_to(existing).parts[0]
        text += f": {existing} has no {part!r}{_alternatives(part, children(existing))}"
    return CellMapFileNotFoundError(text)


def _missing_remote(path: Remote, name: str) -> CellMapFileNotFoundError:
    text = f"{name} {path} does not exist"
    if not path.lists:
        return CellMapFileNotFoundError(f"{text}: the server has none of {', '.join(NODE_FILES)} there")
    protocol, inside, tail = path.url_parts
    above = path.parents
    if tail and inside:  # the archive itself
        above.append(Remote(f"{protocol}://{tail}", path.options))
    for place in above:
        names = children(place)
        if names:
            part = inside.removeprefix(place.url_parts[1]).strip("/").partition("/")[0]
            return CellMapFileNotFoundError(f"{text}: {place.title} has no {part!r}{_alternatives(part, names)}")
    return CellMapFileNotFoundError(
        f"{text}: the store has none of {', '.join(NODE_FILES)} there, and nothing may be listed there or above"
    )


def _alternatives(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, 3, 0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; it has {first_few(names, 12)}" if names else ""
