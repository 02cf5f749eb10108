"""Errors for paths that do not exist, with the part that does and similar names in it."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path, PurePath

from cellmap_lightning.errors import CellMapFileNotFoundError
from cellmap_lightning.io.local_paths import dead_link, expanded
from cellmap_lightning.io.store import NODE_FILES, Remote, StorePath, children, exists
from cellmap_lightning.validation import first_few, other_form

#: Similarity from which on a name may be the one that was meant: of whole names, and of names without suffixes.
_CLOSE = 0.7
#: Names that a message suggests, and lists.
_SUGGESTED, _LISTED = 3, 12
#: Suffixes of archives, which are read by their address.
ARCHIVES = (".zip", ".ozx")


def missing(path: StorePath, name: str) -> CellMapFileNotFoundError:
    """Return the error for a path that does not exist; it names the part that exists, and similar names in it.

    Args:
        path: the path, of a file or a folder.
        name: what it should be, such as ``image``.
    """
    if isinstance(path, Remote):
        return _missing_remote(path, name)
    existing, part = _existing(path)
    text = f"{name} {path} does not exist"
    link = dead_link(path)
    if link:
        return CellMapFileNotFoundError(f"{text}: {link}")
    if existing.suffix.lower() in ARCHIVES and existing.is_file():
        inside = path.relative_to(existing).as_posix()
        return CellMapFileNotFoundError(f"{text}: {existing} is an archive; give zip://{inside}::{existing}")
    if "\\" in str(path) and os.sep == "/":
        other = Path(str(path).replace("\\", "/"))
        end = ", which exists" if exists(other) else ""
        return CellMapFileNotFoundError(f"{text}: a backslash separates no folders on this system; write {other}{end}")
    if part:
        text += f": {_title(existing)} has no {part!r}{_alternatives(part, _names(existing))}"
    return CellMapFileNotFoundError(text)


def similar_path(path: Path | str) -> str:
    """Return a hint for the message about a missing local file or folder, in brackets and with a leading space.

    Args:
        path: the path that does not exist.

    Returns:
        A link that leads nowhere, or the similar names in the folder that exists, such as
            ``" (did you mean 'crops.csv'?)"``; empty without any.

    Example:
        >>> similar_path("data/crop.csv")  # doctest: +SKIP
        " (did you mean 'crops.csv'?)"
    """
    place = expanded(str(path))
    existing, part = _existing(place)
    link = dead_link(place)
    if link:
        return f" ({link})"
    where = "" if existing == place.parent else f"{_title(existing)} has no {part!r}; "
    names = _names(existing) if part else []
    if same := other_form(part, names):
        return f" ({where}{same})"
    close = _close(part, names) if part else []
    if not close:
        return ""
    return f" ({where}did you mean {_either(close)}?)"


def _existing(path: Path) -> tuple[Path, str]:
    """Return the part of a path that exists, and the first name behind it; an empty name if all of it exists."""
    existing = path
    while not exists(existing) and existing != existing.parent:
        existing = existing.parent
    return existing, path.relative_to(existing).parts[0] if existing != path else ""


def _title(folder: Path) -> str:
    return "the working directory" if folder == Path() else str(folder)


def _names(folder: Path) -> list[str]:
    """Return the names of the files and folders in a folder, without hidden ones and metadata; empty if unreadable."""
    try:
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        return []
    return [name for name in names if name not in NODE_FILES]


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
            rest = inside.removeprefix(place.url_parts[1]).strip("/")
            part = rest.partition("/")[0]
            below = [place / f"{other}/{rest}" for other in names[:_LISTED] if exists(place / f"{other}/{rest}")]
            if below and part not in names:
                return CellMapFileNotFoundError(f"{text}: {place.title} has no {part!r}; did you mean {below[0]}?")
            return CellMapFileNotFoundError(f"{text}: {place.title} has no {part!r}{_alternatives(part, names)}")
    return CellMapFileNotFoundError(
        f"{text}: the store has none of {', '.join(NODE_FILES)} there, and nothing may be listed there or above"
    )


def _alternatives(name: str, names: Sequence[str]) -> str:
    same = other_form(name, names)
    if same:
        return f"; {same}"
    close = _close(name, names)
    if close:
        return f"; did you mean {_either(close)}?"
    return f"; it has {first_few(names, _LISTED)}" if names else ""


def _either(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))


def _close(name: str, names: Sequence[str]) -> list[str]:
    """Return the most similar names, without regard to case; a suffix alone makes no names similar."""
    lowered: dict[str, list[str]] = {}
    for other in names:
        lowered.setdefault(other.lower(), []).append(other)
    stem = PurePath(name.lower()).stem
    similar = difflib.get_close_matches(name.lower(), lowered, _LISTED, _CLOSE)
    close = [n for n in similar if difflib.get_close_matches(stem, [PurePath(n).stem], 1, _CLOSE)]
    return [original for n in close for original in lowered[n]][:_SUGGESTED]
