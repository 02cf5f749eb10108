"""Crops that are predicted and annotated, matched by dataset and name, or by position in one prediction.

``cellmap-predict crops=[...]`` writes a prediction per crop, ``<folder>/<dataset>.zarr/<crop>/<class>``. Annotations
are in the folders of the challenge, ``<dataset>.zarr/recon-1/labels/groundtruth/<crop>/<class>``.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapKeyError, CellMapValueError
from cellmap_lightning.evaluation.crop_names import crop_names
from cellmap_lightning.evaluation.evaluate import covers, crop_folders, is_group
from cellmap_lightning.instances.options import InputKind
from cellmap_lightning.instances.source import SegmentationSource, open_source
from cellmap_lightning.io.meanings import ValuesSetting
from cellmap_lightning.io.missing_paths import similar_path
from cellmap_lightning.io.ngff import read_array, read_attributes, read_multiscale
from cellmap_lightning.io.store import children
from cellmap_lightning.prediction.journal import journal_folder
from cellmap_lightning.prediction.output_checks import check_finished
from cellmap_lightning.splits.manifests import GROUNDTRUTH, find_crops
from cellmap_lightning.validation import did_you_mean, first_few

log = logging.getLogger(__name__)

#: Dataset and name of a crop; the dataset is empty where no folder above the crop is named ``<dataset>.zarr``.
Key = tuple[str, str]
#: Crops that a line of the log names, at most.
_NAMED = 20
_TRUTH = f"; truth must be the folder of the datasets, as data.search_path, or <dataset>.zarr/{GROUNDTRUTH}"


@dataclass(frozen=True, eq=False)
class PredictedCrop:
    """A crop that a prediction covers and an annotation describes.

    Attributes:
        name: ``<dataset>.zarr/<crop>`` of a prediction per crop, of one prediction of several crops see `crop_names`.
        annotation: folder of the annotated crop.
        source: the prediction of the class.

    Example:
        >>> [crop.name for crop in predicted_crops("predictions", "data", "mito")]  # doctest: +SKIP
        ['jrc_hela-2.zarr/crop113', 'jrc_hela-2.zarr/crop155']
    """

    name: str
    annotation: Path
    source: SegmentationSource


def predicted_crops(
    prediction: str | Sequence[str],
    truth: str | Sequence[str],
    name: str,
    kind: InputKind | None = None,
    values: ValuesSetting = "auto",
) -> list[PredictedCrop]:
    """Return the crops that are predicted and annotate a class, sorted by name; the others are logged.

    Args:
        prediction: the group of one prediction; or the folder of ``<dataset>.zarr/<crop>/<class>``, or one of its
            ``<dataset>.zarr``; or several of them.
        truth: the folder of annotated crops, or of one crop; or the folder of the datasets, as ``search_path`` of a
            training; or one of its ``<dataset>.zarr``; or several of them.
        name: the class.
        kind: see `open_source`.
        values: see `meaning_of`.

    Raises:
        CellMapFileNotFoundError: a folder does not exist.
        CellMapKeyError: no crop is predicted and annotated.
        CellMapValueError: a crop is predicted or annotated twice, or its prediction is not finished.
    """
    locations = [prediction] if isinstance(prediction, str) else [str(place) for place in prediction]
    folders = [Path(truth)] if isinstance(truth, str) else [Path(place) for place in truth]
    if not locations or not folders:
        raise CellMapValueError(f"prediction and truth must name a folder each, got {prediction!r} and {truth!r}")
    for folder in folders:
        if not folder.is_dir():
            raise CellMapFileNotFoundError(
                f"truth={folder} does not exist{similar_path(folder)}; give the folder of the annotated crops"
            )
    if len(locations) == 1 and not crop_groups(locations[0]) and not any(map(_holds_datasets, folders)):
        return _covered(open_source(locations[0], name, kind, values=values), folders, name)
    groups: dict[Key, str] = {}
    for location in locations:
        _add(groups, crop_groups(location) or _single(location), "prediction")
    annotated: dict[Key, Path] = {}
    for folder in folders:
        _add(annotated, _annotated(folder, name), "truth")
    crops = _matched(groups, annotated, folders, name, kind, values)
    if not crops:
        classes = sorted({child for group in groups.values() for child in children(Path(group))} - {name})
        raise CellMapKeyError(
            f"prediction={_listed(locations)}, truth={_listed(folders)}: no crop is both predicted and annotated with "
            f"{name!r}; predicted are {_crops(groups)}, and annotated with it {_crops(annotated)}"
            + did_you_mean(name, classes, "" if annotated else _TRUTH)
        )
    return crops


def _covered(source: SegmentationSource, folders: Sequence[Path], name: str) -> list[PredictedCrop]:
    """Return the annotated crops that lie in one prediction."""
    annotated = [crop for folder in folders for crop in _annotated(folder, name).values()]
    names = crop_names(annotated)
    annotated.sort(key=lambda crop: names[crop])
    inside = [c for c in annotated if covers(source.lattice, read_multiscale(c / name).finest.lattice)]
    _report("annotated, not covered by the prediction", [names[crop] for crop in annotated if crop not in inside])
    if not inside:
        raise CellMapKeyError(
            f"truth={_listed(folders)}: no crop in it annotates {name!r} and lies in the prediction; give the folder "
            "of the annotated crops of the volume that was predicted"
        )
    return [PredictedCrop(names[crop], crop, source) for crop in inside]


def _matched(
    groups: Mapping[Key, str],
    annotated: Mapping[Key, Path],
    folders: Sequence[Path],
    name: str,
    kind: InputKind | None,
    values: ValuesSetting,
) -> list[PredictedCrop]:
    """Return the crops that are among both, and log the others."""
    pairs = _pairs(groups, annotated, folders)
    _report(f"annotated with {name}, not predicted", [_label(k) for k in annotated if k not in pairs.values()])
    _report(f"predicted, not annotated with {name}", [_label(key) for key in groups if key not in pairs])
    crops, lacking, outside = [], [], []
    error: CellMapKeyError | None = None
    for key in sorted(pairs, key=_label):
        folder = annotated[pairs[key]]
        check_finished(Path(groups[key]))  # before a class that is not written yet is taken for one not predicted
        try:
            source = open_source(groups[key], name, kind, values=values)
        except CellMapKeyError as e:
            error = error or e
            lacking.append(_label(key))
            continue
        if covers(source.lattice, read_multiscale(folder / name).finest.lattice):
            crops.append(PredictedCrop(_label(key), folder, source))
        else:
            outside.append(_label(key))
    if error is not None and len(lacking) == len(pairs):
        raise error
    _report(f"annotated with {name}, predicted without it", lacking)
    _report("annotated, not covered by the prediction", outside)
    return crops


def _pairs(groups: Mapping[Key, str], annotated: Mapping[Key, Path], folders: Sequence[Path]) -> dict[Key, Key]:
    """Return the annotated crop of each predicted one.

    Raises:
        CellMapValueError: an annotation names no dataset, and crops of several datasets have its name.
    """
    pairs: dict[Key, Key] = {}
    for dataset, crop in annotated:
        same = [key for key in groups if key[1] == crop and dataset in ("", key[0])]
        if len(same) > 1:
            raise CellMapValueError(
                f"truth={_listed(folders)}: {crop} may be any of {', '.join(map(_label, same))}; give the folder of "
                f"the datasets, which holds <dataset>.zarr/{GROUNDTRUTH}"
            )
        for key in same:
            if key in pairs:
                raise CellMapValueError(
                    f"truth={_listed(folders)}: {_label(key)} is annotated in {annotated[pairs[key]]} and "
                    f"{annotated[dataset, crop]}; give one of them"
                )
            pairs[key] = dataset, crop
    return pairs


def crop_groups(location: str) -> dict[Key, str]:
    """Return the predictions of crops in a folder; none in a prediction, and none of a store on another machine."""
    folder = Path(location)
    if "://" in location or not folder.is_dir():
        return {}
    volumes = [path for path in sorted(folder.glob("*.zarr")) if path.is_dir()]
    if not volumes and folder.suffix == ".zarr":
        volumes = [folder]
    return {(v.stem, crop): str(v / crop) for v in volumes for crop in children(v) if _is_prediction(v / crop)}


def _is_prediction(path: Path) -> bool:
    """Return whether a folder is a group of classes, and neither an image nor an array; also if it is not finished."""
    if (path / journal_folder("prediction")).exists():
        return True
    if read_array(path) is not None or _is_image(path):
        return False
    return any(_is_image(path / child) for child in children(path))


def _is_image(path: Path) -> bool:
    attributes = read_attributes(path)
    content: Any = attributes[0] if attributes is not None else {}
    return "multiscales" in content or "multiscales" in content.get("ome", {})


def _single(location: str) -> dict[Key, str]:
    """Return the prediction of one crop, ``<dataset>.zarr/<crop>``.

    Raises:
        CellMapFileNotFoundError: there is none.
        CellMapValueError: its folder names no dataset.
    """
    path = Path(location).absolute()
    if "://" not in location and not path.is_dir():
        raise CellMapFileNotFoundError(
            f"prediction={location} does not exist{similar_path(path)}; give the output of cellmap-predict"
        )
    if "://" in location or path.parent.suffix != ".zarr" or not _is_prediction(path):
        raise CellMapValueError(
            f"prediction={location}: it holds no <dataset>.zarr/<crop>/<class>, as cellmap-predict crops=[...] writes "
            "it, by which crops of several datasets are found; of a prediction of one volume, give as truth the folder "
            f"of its annotated crops, <dataset>.zarr/{GROUNDTRUTH}"
        )
    return {(path.parent.stem, path.name): location}


def _holds_datasets(folder: Path) -> bool:
    """Return whether a folder holds volumes in the challenge's layout, in ``<dataset>/`` or itself."""
    return any((volume / GROUNDTRUTH).is_dir() for volume in (*folder.glob("*.zarr"), *folder.glob("*/*.zarr")))


def _annotated(folder: Path, name: str) -> dict[Key, Path]:
    """Return the crops in a folder that annotate a class."""
    if _holds_datasets(folder):
        crops = [Path(crop.folder) for crop in find_crops(folder)]
    elif (folder / GROUNDTRUTH).is_dir():
        crops = crop_folders(folder / GROUNDTRUTH, [name])
    else:
        crops = crop_folders(folder, [name])
    return {(_dataset(crop), crop.name): crop for crop in crops if is_group(crop / name)}


def _dataset(crop: Path) -> str:
    """Return the name of the dataset of a crop, by the folders above it; empty if they do not tell."""
    return next((parent.stem for parent in crop.absolute().parents if parent.suffix == ".zarr"), "")


def _add(known: dict[Key, Any], more: Mapping[Key, Any], setting: str) -> None:
    """Add crops to others.

    Raises:
        CellMapValueError: one of them is there already, in another folder.
    """
    for key, path in more.items():
        if key in known and Path(known[key]).resolve() != Path(path).resolve():
            raise CellMapValueError(f"{setting}: {_label(key)} exists twice, {known[key]} and {path}; give one of them")
        known[key] = path


def _label(key: Key) -> str:
    return f"{key[0]}.zarr/{key[1]}" if key[0] else key[1]


def _crops(keys: Mapping[Key, Any]) -> str:
    return first_few(sorted(map(_label, keys)), _NAMED) if keys else "none"


def _listed(places: Sequence[Any]) -> str:
    return str(places[0]) if len(places) == 1 else f"[{', '.join(map(str, places))}]"


def _report(what: str, names: Sequence[str]) -> None:
    """Log the crops that are left out, in one line."""
    if names:
        log.info("left out (%s): %s", what, first_few(sorted(names), _NAMED))
