"""The volume formats: those of this package, and those that other packages add by an entry point."""

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from cellmap_lightning.io.formats.volume import VolumeFormat
from cellmap_lightning.io.store import Remote, StorePath, exists

#: Group of the entry points of other packages.
ENTRY_POINTS = "cellmap_lightning.formats"
#: Module and class of each format of this package, in the order in which they are probed.
_CLASSES = {
    "npy": "NpyFormat",
    "hdf5": "Hdf5Format",
    "tiff": "TiffFormat",
    "mrc": "MrcFormat",
    "n5": "N5Format",
    "precomputed": "PrecomputedFormat",
    "slices": "SlicesFormat",
}


@cache
def formats() -> tuple[VolumeFormat, ...]:
    """Return all formats in the order in which they are probed, those of other packages first."""
    others = [entry.load()() for entry in entry_points(group=ENTRY_POINTS)]
    own = (getattr(import_module(f"{__package__}.{module}"), name)() for module, name in _CLASSES.items())
    return (*others, *own)


def find_format(path: StorePath) -> tuple[VolumeFormat, StorePath] | None:
    """Return the format of a location and the location itself, or None.

    A class or an image may be named without the suffix of its file: ``crop1/mito`` also finds ``crop1/mito.tif``.
    """
    for place in _candidates(path):
        for volume_format in formats():
            if volume_format.matches(place):
                return volume_format, place
    return None


def _candidates(path: StorePath) -> Iterator[StorePath]:
    """Yield a location and, where it does not exist, the files beside it with the same name and a known suffix."""
    yield path
    if isinstance(path, Remote) or exists(path):
        return
    for suffix in dict.fromkeys(suffix for volume_format in formats() for suffix in volume_format.suffixes):
        file = path.parent / f"{path.name}{suffix}"
        if exists(file):
            yield file


def format_children(path: StorePath) -> list[str]:
    """Return the names of the arrays in a container of any format; empty without one."""
    found = find_format(path)
    return found[0].children(found[1]) if found is not None else []
