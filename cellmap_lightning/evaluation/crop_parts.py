"""Parts of crops that are scored: whole crops, or the boxes that a training was restricted to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cellmap_lightning.crops.crop_box import CropBox, restricted
from cellmap_lightning.geometry.lattice import Box
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.splits.entries import CropRecord, read_csv


@dataclass(frozen=True)
class CropPart:
    """A part of a crop.

    Attributes:
        box: the part in nm; None for the whole crop.
        trained: True if it was trained on; None if unknown.

    Example:
        >>> trained_crops(Path("run"))[Path("jrc_a.zarr/recon-1/labels/groundtruth/crop1").resolve()]
        [CropPart(box=None, trained=True)]
    """

    box: CropBox | None = None
    trained: bool | None = None


def trained_crops(path: Path) -> dict[Path, list[CropPart]]:
    """Return the parts of crops that a training used, by the folders of the crops; a crop without a part was not used.

    Args:
        path: the folder of a run, which has a ``split.csv``, or a CSV of crops, see docs/data.md.

    Raises:
        CellMapError: there is no such file, or it cannot be read.
    """
    entries = read_csv(path / "split.csv" if path.is_dir() else path)
    crops: dict[Path, list[CropPart]] = {}
    for split, of_split in entries.items():
        for entry in of_split:
            # A crop that validates as a whole is scored as a whole, like one that was not used.
            if entry.target_path and (split == "train" or entry.crop_box is not None):
                folder = Path(entry.target_path).parent.resolve()
                crops.setdefault(folder, []).append(CropPart(physical_box(entry), split == "train"))
    whole = CropPart(None, True)
    return {folder: [whole] if whole in parts else parts for folder, parts in crops.items()}


def run_crops(path: Path, raw: Path) -> list[tuple[str, CropRecord]]:
    """Return split and entry of the crops of a run that annotate a raw volume, those for validation first.

    Args:
        path: the folder of the run, which has a ``split.csv``.
        raw: the raw volume.

    Raises:
        CellMapError: the file cannot be read.
    """
    entries = read_csv(path / "split.csv")
    order = ("val", "test", "train")
    listed = [(split, entry) for split in order for entry in entries.get(split, []) if entry.target_path]
    return [(split, entry) for split, entry in listed if Path(entry.input_path).resolve() == raw.resolve()]


def physical_box(entry: CropRecord) -> CropBox | None:
    """Return the box of an entry in nm; None without a box."""
    box, target = entry.crop_box, entry.target
    if box is None or target is None or box.unit == "nm":
        return box
    images = {name: target.read(name, entry.overrides[1]) for name in target.names}
    return CropBox.of(restricted(target.label, images, box)[2])


def parts_of(
    crop: Path, classes: Sequence[str], trained: Mapping[Path, Sequence[CropPart]] | None, box: CropBox | None
) -> list[CropPart]:
    """Return the parts of a crop to score.

    Args:
        crop: folder of the crop.
        classes: the annotated classes that are scored.
        trained: see `trained_crops`; None if unknown.
        box: the only part to score; None for the parts that a training used, or else the whole crop.

    Raises:
        CellMapValueError: the box reaches outside the crop.
    """
    used = None if trained is None else trained.get(crop.resolve(), [])
    if box is None:
        return list(used or [CropPart(None, None if used is None else False)])
    images = {name: read_multiscale(crop / name) for name in classes}
    place = restricted(crop.name, images, box)[2]
    overlaps = None if used is None else any(part.trained and _intersects(part.box, place) for part in used)
    return [CropPart(CropBox.of(place), overlaps)]


def _intersects(box: CropBox | None, place: Box) -> bool:
    return box is None or Box(box.lower, box.upper).intersects(place)
