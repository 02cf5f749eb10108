"""The volume formats: those of this package, and those that other packages add by an entry point."""

from collections.abc import Collection, Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

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


def images_named(folder: Path, names: Collection[str]) -> dict[str, list[str]]:
    """Return the files and folders that may each be the image of a name, sorted, of names with several of them.

    Args:
        folder: the folder that is listed; one that cannot be has none.
        names: names of images without suffixes, such as those of classes.

    Example:
        >>> images_named(Path("crop1"), ["mito"])  # doctest: +SKIP
        {'mito': ['mito', 'mito.tif']}
    """
    suffixes = {suffix for volume_format in formats() for suffix in volume_format.suffixes}
    found: dict[str, list[str]] = {}
    try:
        entries = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return {}
    for entry in entries:
        stem, dot, suffix = entry.rpartition(".")
        for name in {entry, stem} & set(names):
            if name == entry or dot + suffix.lower() in suffixes:
                found.setdefault(name, []).append(entry)
    return {name: images for name, images in found.items() if len(images) > 1}


def format_children(path: StorePath) -> list[str]:
    """Return the names of the arrays in a container of any format; empty without one."""
    found = find_format(path)
    return found[0].children(found[1]) if found is not None else []
