"""Crops that a manifest lists and that are not on disk, as after a partial download."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cellmap_lightning.errors import CellMapFileNotFoundError
from cellmap_lightning.io.store import exists
from cellmap_lightning.splits.crop_names import crop_names
from cellmap_lightning.splits.entries import CropRecord
from cellmap_lightning.splits.manifests import GROUNDTRUTH, RAW, similar_dataset
from cellmap_lightning.validation import first_few
from cellmap_lightning.wording import plural

#: Datasets, and crops, up to which a hint lists all that are there.
_LISTED = 12


def check_on_disk(entries: Sequence[CropRecord], manifest: str | Path, root: str | Path) -> None:
    """Check that the crops of a manifest exist; those at an address are checked when they are opened.

    Args:
        entries: the crops that are left by the filters.
        manifest: the manifest.
        root: the folder of the datasets.

    Raises:
        CellMapFileNotFoundError: some do not; one line for each dataset, with the number of its crops.
    """
    if "://" in str(root) or "::" in str(root):
        return
    crops: dict[str, dict[str, bool]] = {}
    volumes: dict[str, bool] = {}
    for entry, name in zip(entries, crop_names(entries), strict=True):
        volume = Path(entry.input_path.removesuffix(f"/{RAW}"))
        if name.dataset not in volumes:
            volumes[name.dataset] = exists(volume)
        is_there = volumes[name.dataset] and exists(volume / GROUNDTRUTH / name.crop)
        crops.setdefault(name.dataset, {})[name.crop] = is_there
    absent = {dataset: [name for name, there in of.items() if not there] for dataset, of in crops.items()}
    others = [name for name in _datasets(Path(root)) if name not in crops]
    lines = [
        f"  {dataset}: {_line(names, len(crops[dataset]), volumes[dataset], similar_dataset(dataset, others))}"
        for dataset, names in absent.items()
        if names
    ]
    if not lines:
        return
    number = sum(map(len, absent.values()))
    raise CellMapFileNotFoundError(
        f"{number} of the {plural(len(entries), 'crop')} that {Path(manifest).name} lists are not in "
        f"search_path {root}:" + "\n".join(["", *lines, _hint(crops, absent)])
    )


def _datasets(root: Path) -> list[str]:
    """Return the names of the datasets on disk."""
    names = sorted(folder.name for folder in root.iterdir() if folder.is_dir()) if root.is_dir() else []
    return [name for name in names if exists(root / name / f"{name}.zarr")]


def _line(names: Sequence[str], count: int, has_volume: bool, similar: str) -> str:
    if not has_volume:
        return f"the dataset is not there, {plural(count, 'crop')}{similar}"
    return f"{len(names)} of its {plural(count, 'crop')}: {first_few(names, 4)}"


def _hint(crops: Mapping[str, Mapping[str, bool]], absent: Mapping[str, Sequence[str]]) -> str:
    """Return the settings that restrict the crops to those that are there."""
    whole = [dataset for dataset, names in absent.items() if not names]
    partial = any(names and len(names) < len(crops[dataset]) for dataset, names in absent.items())
    there = [f"{dataset}/{name}" for dataset, of in crops.items() for name, is_there in of.items() if is_there]
    if not there:
        return "none is there: is search_path the folder of <dataset>/<dataset>.zarr?"
    if not partial:
        return f"data.only_datasets=[{','.join(whole)}] takes the datasets that are there"
    if len(there) <= _LISTED:
        return f"data.only_crops=[{','.join(there)}] takes the crops that are there"
    return (
        f"{len(there)} crops are there, {first_few(there)}; choose them with data.only_datasets=[...] or "
        "data.only_crops=[...]"
    )
