"""Soft and external links of HDF5 files."""

from pathlib import Path
from typing import Any

from cellmap_lightning.errors import CellMapFileNotFoundError, MetadataError

#: Links that are followed from one path at most; more are a loop.
_MOST_LINKS = 32


def resolved(file: Any, container: Path, inside: str) -> str:
    """Return the path of a dataset or group with its soft links replaced; as it is if it does not exist.

    Args:
        file: the open file.
        container: its path, for messages.
        inside: the path in it.

    Raises:
        CellMapFileNotFoundError: a soft link, or the file of an external link, leads to nothing.
        MetadataError: soft links lead back to themselves, or an external link leads to another file, whose changes
            would not be noticed.
    """
    import h5py

    done: list[str] = []
    parts, followed = inside.split("/"), ""
    for _ in range(_MOST_LINKS + inside.count("/") * _MOST_LINKS):
        parts = [part for part in parts if part not in ("", ".")]
        if not parts:
            return "/".join(done)
        here = "/".join([*done, parts[0]])
        link = file.get(here, getlink=True)
        if link is None:
            if followed:
                raise CellMapFileNotFoundError(
                    f"{container}: {followed}, and the file has no {here!r}; correct the link, or give another dataset"
                )
            return inside
        if isinstance(link, h5py.ExternalLink):
            raise _external(container, here, link, "/".join(parts[1:]))
        if isinstance(link, h5py.SoftLink):
            followed = f"{here} is a soft link to {link.path}"
            done = [] if link.path.startswith("/") else done
            parts = [*link.path.split("/"), *parts[1:]]
        else:
            done, parts = [*done, parts[0]], parts[1:]
    raise MetadataError(f"{container}: {followed}, and the links lead back to themselves; correct one of them")


def link_names(file: Any) -> list[str]:
    """Return the paths of all soft and external links."""
    import h5py

    names: list[str] = []

    def visit(name: str, link: Any) -> None:
        if isinstance(link, h5py.SoftLink | h5py.ExternalLink):
            names.append(name)

    file.visititems_links(visit)
    return names


def _external(container: Path, here: str, link: Any, rest: str) -> MetadataError | CellMapFileNotFoundError:
    """Return the error for an external link; links are relative to the folder of their file."""
    file = container.parent / link.filename
    text = f"{container}: {here} is an external link to {link.path} in {file}"
    if not file.is_file():
        return CellMapFileNotFoundError(f"{text}, which does not exist; restore the file, or correct the link")
    inside = "/".join(part for part in (link.path.strip("/"), rest) if part)
    return MetadataError(f"{text}; external links are not followed: give {file}/{inside}")
