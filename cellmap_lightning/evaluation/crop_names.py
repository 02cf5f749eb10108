"""Names of crops that tell them apart, of folders that may hold crops of the same name."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from cellmap_lightning.errors import CellMapValueError


def crop_names(folders: Iterable[Path]) -> dict[Path, str]:
    """Return the name of each crop: that of its folder, and where several share it, as much more as tells them apart.

    Crops of one name are named ``<dataset>/<crop>`` by the folder ``<dataset>.zarr`` that they are in; if that is not
    enough, by the end of their paths.

    Args:
        folders: folders of crops.

    Raises:
        CellMapValueError: two of the folders are the same crop, which would be scored twice.

    Example:
        >>> list(crop_names([Path("a.zarr/crop1"), Path("b.zarr/crop1"), Path("a.zarr/crop2")]).values())
        ['a/crop1', 'b/crop1', 'crop2']
    """
    crops = list(dict.fromkeys(folders))
    places: dict[Path, Path] = {}
    for crop in crops:
        other = places.setdefault(crop.resolve(), crop)
        if other is not crop:
            raise CellMapValueError(f"truth: the crop {crop.name} is given twice, as {other} and {crop}; give it once")
    names = {crop: crop.name for crop in crops}
    _tell_apart(names, {crop: _with_dataset(crop) for crop in crops})
    for length in range(2, max((len(crop.absolute().parts) for crop in crops), default=0) + 1):
        _tell_apart(names, {crop: "/".join(crop.absolute().parts[-length:]) for crop in crops})
    return names


def _tell_apart(names: dict[Path, str], longer: dict[Path, str]) -> None:
    """Replace the names that several crops have by longer ones."""
    counts = Counter(names.values())
    names.update({crop: longer[crop] for crop, name in names.items() if counts[name] > 1})


def _with_dataset(crop: Path) -> str:
    """Return ``<dataset>/<crop>``; the name alone if no folder above is named ``<dataset>.zarr``."""
    volume = next((parent for parent in crop.absolute().parents if parent.suffix == ".zarr"), None)
    return crop.name if volume is None else f"{volume.stem}/{crop.name}"
