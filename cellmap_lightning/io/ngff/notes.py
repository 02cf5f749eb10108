"""Assumptions made when reading the metadata of images, logged once per volume."""

import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from cellmap_lightning.io.store import StorePath
from cellmap_lightning.runtime.shared_context import SharedContext

log = logging.getLogger(__name__)

#: Suffixes of folders and archives that hold one volume.
CONTAINERS = (".zarr", ".n5", ".zip", ".ozx")

#: (location, kind) of the notes reported so far, inside `reported_once`.
_reported = SharedContext(dict[tuple[str, str], object])

#: Ends of messages that say where a setting is given.
FOR_ENTRY, FOR_ENTRIES = " for its entry", " for its entries"
OF_PREDICT = " (for cellmap-predict: metadata.voxel_size)"


def without_entry(text: str) -> str:
    """Return a message about metadata as a command says it that takes the settings themselves, without entries."""
    for end in (FOR_ENTRIES, FOR_ENTRY, OF_PREDICT):
        text = text.replace(end, "")
    return text


@dataclass(frozen=True)
class Note:
    """One assumption about an image.

    Attributes:
        kind: ``unit``, ``scale``, ``levels``, ``boxes``, ``multiscales``, ``versions`` or ``order``; each is reported
            once per volume.
        text: the value in the file, its interpretation, and the setting that changes it.

    Example:
        >>> report(image.path, image.notes)
    """

    kind: str
    text: str


def reported_once() -> contextlib.AbstractContextManager[None]:
    """Report each kind of note once per volume while the context is open; contexts nest."""
    return _reported.open()


def report(path: StorePath, notes: Iterable[Note]) -> None:
    """Log the notes of an image, one warning per volume and kind.

    Args:
        path: the image's group.
        notes: its notes.
    """
    for note in notes:
        volume = volume_of(path)
        if first_time(volume, note.kind):
            log.warning("%s: %s (first image with it: %s)", volume, note.text, path)


def first_time(place: str, kind: str) -> bool:
    """Return whether a kind of note is new for a location, inside `reported_once`; always True outside."""
    reported = _reported.value
    if reported is None:
        return True
    token = object()
    return reported.setdefault((place, kind), token) is token  # atomic: only one of several threads reports it


def volume_of(path: StorePath) -> str:
    """Return the container of an image, such as ``/data/jrc_a.zarr``; without one the image itself."""
    head, chain, tail = str(path).partition("::")
    parts = PurePosixPath(head).parts
    for number, part in enumerate(parts):
        if PurePosixPath(part).suffix in CONTAINERS:
            if "://" in head:
                return head[: head.index(part) + len(part)] + chain + tail
            return str(PurePosixPath(*parts[: number + 1]))
    return chain.removeprefix("::") + tail or head
