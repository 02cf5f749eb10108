"""The annotated crops that a prediction is compared with."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.evaluation.crop_parts import run_crops
from cellmap_lightning.evaluation.evaluate import is_group
from cellmap_lightning.io.store import StorePath, parse_location
from cellmap_lightning.splits.entries import CropRecord
from cellmap_lightning.splits.manifests import GROUNDTRUTH, RAW
from cellmap_lightning.validation import first_few

log = logging.getLogger(__name__)


def groundtruth(input_path: str, options: Any = None) -> StorePath:
    """Return the folder of the annotated crops of a raw volume in the layout of the challenge."""
    raw = parse_location(input_path, options)
    above: Sequence[StorePath] = raw.absolute().parents if isinstance(raw, Path) else raw.parents
    return above[min(len(Path(RAW).parts), len(above)) - 1] / GROUNDTRUTH


def truth_folders(cfg: DictConfig) -> list[Path] | None:
    """Return the folders of annotated crops, or of one crop each, that a prediction is compared with.

    They are those of the setting ``truth``; without it the groundtruth beside raw in the layout of the challenge, or
    else the crops of the training of the checkpoint that annotate this raw volume.

    Args:
        cfg: the configuration of a prediction; see `effective_config`.

    Returns:
        The folders; None where raw is not on this machine and ``truth`` is not set.

    Raises:
        CellMapFileNotFoundError: there are none; the message has the command that evaluates with crops elsewhere.
        CellMapValueError: ``truth`` holds no crop.
    """
    truth = OmegaConf.select(cfg, "truth")
    if truth is not None:
        given = [truth] if isinstance(truth, str) else OmegaConf.to_container(truth)
        return [_given(str(folder)) for folder in given]  # type: ignore[union-attr]
    raw = parse_location(str(cfg.input_path))
    if not isinstance(raw, Path):
        return None
    beside = Path(str(groundtruth(str(raw))))
    if beside.is_dir():
        return [beside]
    folders = _of_training(cfg.get("ckpt"), raw)
    if not folders:
        raise CellMapFileNotFoundError(
            f"evaluate=true: there is no folder {beside}, where the annotated crops of {cfg.input_path} are in the "
            "layout of the challenge, and the training of the checkpoint lists no crop of this volume with a group per "
            "class; give the folder of the crops, or of one crop, with truth=..., or predict without evaluate=true and "
            f"run cellmap-evaluate prediction={cfg.writer.output} truth=<folder of the crops, or of one crop>"
        )
    return folders


def _given(folder: str) -> Path:
    """Return a folder of the setting ``truth`` after a check.

    Raises:
        CellMapFileNotFoundError: it does not exist.
        CellMapValueError: it holds no crop.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CellMapFileNotFoundError(
            f"truth={folder} does not exist; give the folder of the annotated crops, or of one crop, as "
            "vol.zarr/crop1 with a group per class in it"
        )
    inside = [entry for entry in path.iterdir() if entry.is_dir()]
    if not any(is_group(entry) for group in (path, *inside) for entry in group.iterdir() if entry.is_dir()):
        raise CellMapValueError(
            f"truth={folder} holds no crop; give the folder of the annotated crops, or of one crop, as vol.zarr/crop1 "
            "with a group per class in it"
        )
    return path


def run_folder(checkpoint: Any) -> Path | None:
    """Return the folder of the run of a checkpoint; None where no file there lists its crops."""
    if checkpoint is None:
        return None
    path = Path(str(checkpoint))
    return next((f for f in (path, *path.parents[:2]) if (f / "split.csv").is_file()), None)


def _of_training(checkpoint: Any, raw: Path) -> list[Path]:
    """Return the folders of the crops of a training that annotate a raw volume, those for validation first."""
    run = run_folder(checkpoint)
    folders: dict[Path, None] = {}
    others: dict[str, None] = {}
    for _, entry in [] if run is None else run_crops(run, raw):
        folder = _group_folder(entry)
        if folder is not None:
            folders[folder] = None
        else:
            others[str(entry.target_path)] = None
    if folders and others:
        log.warning("not compared with the prediction, as they are no group per class: %s", first_few([*others]))
    return list(folders)


def _group_folder(entry: CropRecord) -> Path | None:
    """Return the folder of a crop with a group per class; None where other metadata than the stored ones apply."""
    target = entry.target
    if target is None or target.label_map or target.after or not set(entry.metadata) <= {"box"}:
        return None
    folder = target.crop
    return folder if isinstance(folder, Path) and any(is_group(folder / name) for name in target.names) else None
