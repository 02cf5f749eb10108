"""Parts of crops that are scored: whole crops, or the boxes that a training was restricted to."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellmap_lightning.crops.crop_box import CropBox, restricted
from cellmap_lightning.errors import CellMapFileNotFoundError
from cellmap_lightning.geometry.lattice import Box
from cellmap_lightning.io.missing_paths import similar_path
from cellmap_lightning.io.ngff import read_attributes, read_multiscale
from cellmap_lightning.splits.entries import CropRecord, read_csv
from cellmap_lightning.validation import first_few

#: The usage of a crop or of a part, in files, by `CropPart.trained`.
USAGE = {True: "train", False: "held out", None: ""}


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

    A folder that is reached over links is there twice, with the links and without.

    Args:
        path: the folder of a run, which has a ``split.csv``; a checkpoint in it; or a CSV of crops, see docs/data.md.

    Raises:
        CellMapError: there is no such file, or it cannot be read.
    """
    entries = read_csv(_csv_of(path))
    crops: dict[Path, list[CropPart]] = {}
    for split, of_split in entries.items():
        for entry in of_split:
            # A crop that validates as a whole is scored as a whole, like one that was not used.
            if entry.target_path and (split == "train" or entry.crop_box is not None):
                folder, part = Path(entry.target_path).parent, CropPart(physical_box(entry), split == "train")
                # Both, where links lead to the crop: data at another path are matched by the names in either.
                for place in dict.fromkeys((folder.resolve(), folder.absolute())):
                    crops.setdefault(place, []).append(part)
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


def _csv_of(path: Path) -> Path:
    """Return the CSV of crops of a run or of a checkpoint.

    Raises:
        CellMapFileNotFoundError: the folder of the checkpoint has none.
    """
    if path.is_dir():
        return path / "split.csv"
    if path.suffix != ".ckpt":
        return path
    files = [folder / "split.csv" for folder in path.absolute().parents[:2]]
    for file in files:
        if file.is_file():
            return file
    raise CellMapFileNotFoundError(
        f"trained={path}: no {files[-1]}{similar_path(path)}; give the folder of a run, or a CSV of crops"
    )


def physical_box(entry: CropRecord) -> CropBox | None:
    """Return the box of an entry in nm; None without a box."""
    box, target = entry.crop_box, entry.target
    if box is None or target is None or box.unit == "nm":
        return box
    images = {name: target.read(name, entry.overrides[1]) for name in target.names}
    return CropBox.of(restricted(target.label, images, box)[2])


def used_parts(trained: Mapping[Path, Sequence[CropPart]], crop: Path) -> Sequence[CropPart]:
    """Return the parts of a crop that a training used; none if it did not use the crop.

    The crop is that of the same folder, with links resolved; or else, since data are copied and mounted at other paths,
    that of the same dataset and name: the same path from ``<dataset>.zarr`` on. Objects that ``cellmap-segment`` has
    numbered count as the crop that they were numbered from.

    Args:
        trained: see `trained_crops`.
        crop: folder of the crop.
    """
    parts = trained.get(crop.resolve()) or next(iter(_same_name(trained, crop)), [])
    source = None if parts else numbered_from(crop)
    return parts if source is None else trained.get(source.resolve()) or next(iter(_same_name(trained, source)), [])


def numbered_from(crop: Path) -> Path | None:
    """Return the folder of the annotated crop whose objects ``cellmap-segment`` has numbered; None of any other."""
    attributes = read_attributes(crop)
    block: Any = attributes[0].get("cellmap") if attributes is not None else None
    source = block.get("numbered_from") if isinstance(block, Mapping) else None
    return Path(source).parent if isinstance(source, str) else None


def is_trained(trained: Mapping[Path, Sequence[CropPart]] | None, crop: Path) -> bool | None:
    """Return whether a crop, or a part of it, was trained on; None if unknown.

    Args:
        trained: see `trained_crops`.
        crop: folder of the crop.
    """
    return None if trained is None else any(part.trained for part in used_parts(trained, crop))


def matching_notes(trained: Mapping[Path, Sequence[CropPart]] | None, crops: Iterable[Path]) -> list[str]:
    """Return what a reader of scores must know about the crops that are marked as trained on, in lines.

    Args:
        trained: see `trained_crops`; None if unknown, which needs no note.
        crops: folders of the crops that were scored.
    """
    folders = list(dict.fromkeys(crops))
    if trained is None or not folders:
        return []
    if any(used_parts(trained, folder) for folder in folders):
        return [*_numbering_notes(trained, folders), *_renaming_notes(trained, folders)]
    used = [folder for folder, parts in trained.items() if any(part.trained for part in parts)]
    if _is_any_beside(folders, used):
        return ["none of the crops that were scored was trained on"]
    return [_no_match_note(folders, used)]


def _is_any_beside(folders: Iterable[Path], used: Iterable[Path]) -> bool:
    """Return True if a scored crop lies beside one that was trained on, by path or by dataset and name.

    Args:
        folders: folders of the scored crops.
        used: folders of the crops that were trained on.
    """
    beside = {place for folder in used for place in (folder.parent, *_name(folder.parent))}
    return any(beside & {f.resolve().parent, *_name(f.absolute().parent), *_name(f.resolve().parent)} for f in folders)


def _no_match_note(folders: Sequence[Path], used: Sequence[Path]) -> str:
    """Return a note that no scored crop was matched to the training, with examples of both.

    Args:
        folders: folders of the scored crops, at least one.
        used: folders of the crops that were trained on.
    """
    listed = first_few(list(map(str, used)), 1) if used else "none"
    scored = folders[0].parent if folders[0].parent.name else first_few([str(folder) for folder in folders])
    note = f"none of the crops that were scored ({scored}) is among those trained on ({listed}), by path "
    return note + "or by dataset and name: all count as held out"


def _numbering_notes(trained: Mapping[Path, Sequence[CropPart]], folders: Iterable[Path]) -> list[str]:
    """Return a note for each scored crop whose objects were numbered from a crop of the training."""
    numbered = {f.name: numbered_from(f) for f in folders if not _matches(trained, f) and used_parts(trained, f)}
    return [f"{name}: objects numbered from {source}, which was trained on" for name, source in numbered.items()]


def _renaming_notes(trained: Mapping[Path, Sequence[CropPart]], folders: Iterable[Path]) -> list[str]:
    """Return a note that lists the scored crops at another path than in the training; none without such crops."""
    renamed = [f.name for f in folders if not trained.get(f.resolve()) and _matches(trained, f)]
    if not renamed:
        return []
    return [f"at another path than in the training, and matched by dataset and name: {first_few(renamed, 12)}"]


def _matches(trained: Mapping[Path, Sequence[CropPart]], crop: Path) -> bool:
    """Return True for a crop that is known by its own path, or its dataset and name."""
    return bool(trained.get(crop.resolve()) or next(iter(_same_name(trained, crop)), []))


def _same_name(trained: Mapping[Path, Sequence[CropPart]], crop: Path) -> Iterator[Sequence[CropPart]]:
    # A crop is more than a name: two files objects.zarr are not the same.
    names = {name for name in (*_name(crop.absolute()), *_name(crop.resolve())) if len(name) > 1}
    return (parts for folder, parts in trained.items() if names & _name(folder))


def _name(folder: Path) -> set[tuple[str, ...]]:
    """Return the path of a folder from its dataset on; nothing if no folder of it is named ``<dataset>.zarr``."""
    parts = folder.parts
    return {parts[n:] for n in range(len(parts)) if parts[n].endswith(".zarr")}


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
    used = None if trained is None else used_parts(trained, crop)
    if box is None:
        return list(used or [CropPart(None, None if used is None else False)])
    images = {name: read_multiscale(crop / name) for name in classes}
    place = restricted(crop.name, images, box)[2]
    overlaps = None if used is None else any(part.trained and _intersects(part.box, place) for part in used)
    return [CropPart(CropBox.of(place), overlaps)]


def _intersects(box: CropBox | None, place: Box) -> bool:
    return box is None or Box(box.lower, box.upper).intersects(place)
