"""The first names in a folder of chunks, local or in an archive."""

import itertools
import os

from cellmap_lightning.io.store import Remote

#: Entries of a folder that are compared: all names of one writer follow the same convention.
MOST_ENTRIES = 256
#: Protocols whose folders are listed besides local ones: in other stores a folder may have many pages of names.
LISTED = ("zip", "memory")

#: Name of an entry of a folder, and whether it is a folder.
Entry = tuple[str, bool]


def local_entries(root: str, folder: str = "") -> list[Entry]:
    """Return the first entries of a local folder; none if it cannot be listed.

    Args:
        root: the folder of an array.
        folder: path of a folder in it; empty for ``root`` itself.
    """
    # Tens of thousands of arrays are checked, and a Path costs more than the call.
    try:
        with os.scandir(f"{root}/{folder}" if folder else root) as entries:
            return [(entry.name, entry.is_dir()) for entry in itertools.islice(entries, MOST_ENTRIES)]
    except OSError:  # reading reports the error
        return []


def archive_entries(root: Remote, folder: str = "") -> list[Entry]:
    """Return the first entries of a folder in an archive; none if it cannot be listed.

    Args:
        root: the folder of an array.
        folder: path of a folder in it; empty for ``root`` itself.
    """
    try:
        place = root / folder if folder else root
        entries = place.filesystem().ls(place.key, detail=True)
        return [
            (entry["name"].rstrip("/").rpartition("/")[2], entry["type"] == "directory")
            for entry in entries[:MOST_ENTRIES]
        ]
    except Exception:  # stores raise any type; reading reports the error
        return []
