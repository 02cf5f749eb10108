"""Local paths as they are given in configurations, CSV files and on the command line."""

import errno
import os
import re
from pathlib import Path

from cellmap_lightning.errors import CellMapValueError

#: A part of a path that begins with an environment variable, as shells write it.
_VARIABLE = re.compile(r"(?:^|/)(\$(?:\{(\w+)\}|(\w+))[^/]*)")


def expanded(text: str) -> Path:
    """Return a path with ``~`` expanded.

    Environment variables are not: a value that is read from a CSV file or a checkpoint would depend on them.

    Args:
        text: the path; a folder whose name begins with ``$`` is one if it exists.

    Raises:
        CellMapValueError: a part is an environment variable, or the home folder of a user who does not exist.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        user = Path(text).parts[0]
        raise CellMapValueError(
            f"{text}: {user} is the home folder of no user of this machine; write the folder itself"
        ) from None
    match = _VARIABLE.search(text)
    if match is not None and not os.path.lexists(text[: match.end(1)]):
        name = match[2] or match[3]
        unset = "" if name in os.environ else " (and has no value here)"
        raise CellMapValueError(
            f"{text}: ${name} is not expanded in paths{unset}; write the folder itself, or ${{oc.env:{name}}} in a "
            "configuration and on the command line"
        )
    return path


def dead_link(path: Path) -> str:
    """Return a sentence on the first symbolic link on a path that leads nowhere; empty without one.

    Args:
        path: a path that does not exist.
    """
    for place in (*reversed(path.parents), path):
        if place.is_symlink() and not place.exists():
            target = place.readlink()
            return f"{place} is a symbolic link to {target}, which does not exist; restore it, or correct the link"
    return ""


def reason(error: OSError) -> str:
    """Return why a file cannot be read, with the remedy where links lead back to themselves."""
    text = str(error.strerror)
    return f"{text}: a link on its path leads back to itself; correct the link" if error.errno == errno.ELOOP else text


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder, or a link to one that is lost, so that opening it is an error."""
    return path.is_dir() or (path.is_symlink() and not path.suffix and not path.exists())
