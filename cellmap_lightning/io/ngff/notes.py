"""Assumptions that reading an image's metadata makes, reported once per volume."""

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from cellmap_lightning.io.store import StorePath

log = logging.getLogger(__name__)

#: Suffixes of folders and archives that hold one volume.
CONTAINERS = (".zarr", ".n5", ".zip", ".ozx")

#: (place, kind) of what was reported so far, inside `reported_once`; None outside.
_reported: set[tuple[str, str]] | None = None
_lock = threading.Lock()


@dataclass(frozen=True)
class Note:
    """One assumption about an image.

    Attributes:
        kind: ``unit``, ``scale``, ``levels``, ``boxes`` or ``multiscales``; each kind is reported once per volume.
        text: the value in the file, how it is read, and the setting that changes it.
    """

    kind: str
    text: str


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """Report each kind of note once per volume while the context is open; contexts nest."""
    global _reported
    with _lock:
        outer, _reported = _reported, set() if _reported is None else _reported
    try:
        yield
    finally:
        with _lock:
            _reported = outer


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
    """Return whether something was not reported of a place before, inside `reported_once`; always true outside."""
    with _lock:
        if _reported is None:
            return True
        new = (place, kind) not in _reported
        _reported.add((place, kind))
        return new


def volume_of(path: StorePath) -> str:
    """Return the container that an image lies in, such as ``/data/jrc_a.zarr``; without one the image itself."""
    head, chain, tail = str(path).partition("::")
    parts = PurePosixPath(head).parts
    for number, part in enumerate(parts):
        if PurePosixPath(part).suffix in CONTAINERS:
            if "://" in head:
                return head[: head.index(part) + len(part)] + chain + tail
            return str(PurePosixPath(*parts[: number + 1]))
    return chain.removeprefix("::") + tail or head
