"""Configurations of predictions: that of a checkpoint, with the overrides of the command line."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.checkpointing.checkpoint_config import CONFIG_KEY
from cellmap_lightning.checkpointing.trust import check_trusted
from cellmap_lightning.commands.config_values import refuse_csv
from cellmap_lightning.commands.exported_config import exported_config, is_exported
from cellmap_lightning.commands.prediction_truth import groundtruth, truth_folders
from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.evaluation.challenge import listed_crops
from cellmap_lightning.geometry.lattice import Box
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides, read_attributes
from cellmap_lightning.io.store import children, exists, parse_location
from cellmap_lightning.redaction import HIDDEN
from cellmap_lightning.splits.manifest_classes import report_lacking_classes, report_unknown_classes
from cellmap_lightning.splits.manifest_geometry import check_geometry
from cellmap_lightning.splits.manifests import RAW, ManifestCrop, raw_of
from cellmap_lightning.training.checkpoints import read_checkpoint
from cellmap_lightning.validation import one_of, positive_number

log = logging.getLogger(__name__)

#: ``voxels``: Dice, IoU, precision and recall of each crop. ``csc``: the challenge's score, pooled over crops.
METRICS = ("voxels", "csc")
#: Settings of the data that a prediction does not take from the training: its crops, and what is random in it.
_TRAINING_ONLY = (
    "csv_path", "search_path", "manifest", "only_datasets", "only_crops", "spatial_transforms", "intensity_transforms",
    "samples_per_epoch", "batches_per_epoch",
)  # fmt: skip


def saved_config(path: Path) -> dict[str, Any]:
    """Return the configuration in a checkpoint.

    Raises:
        CellMapFileNotFoundError: there is no such checkpoint.
        CellMapValueError: it cannot be read without running code from it, or has no configuration.
    """
    checkpoint = read_checkpoint(path, "ckpt")
    config = checkpoint.get(CONFIG_KEY)
    if not isinstance(config, dict) or not {"data", "task"} <= set(config):
        raise CellMapValueError(
            f"ckpt={path} has no configuration ({CONFIG_KEY!r}), as those of cellmap-train do; predict with it "
            "from Python: Trainer(callbacks=[PredictionWriter(...)]).predict(model, datamodule=...)"
        )
    return config


def effective_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of a prediction: that of the checkpoint, changed by the command line.

    Args:
        cfg: ``predict.yaml`` with all overrides.
        overrides: the overrides as given on the command line.

    Raises:
        CellMapError: see `saved_config` and `exported_config`; or the configuration is not trusted, or the region
            does not exist.
    """
    one_of("metric", cfg.metric, METRICS)
    missing = _missing(cfg, ("ckpt", "data.input_path", "out"))
    if missing:
        raise CellMapValueError("\n".join(f"{key} is required: set it with {key}=..." for key in missing))
    refuse_csv(cfg.data.input_path)
    if (cfg.evaluate or cfg.truth is not None) and "://" in str(cfg.out):
        raise CellMapValueError(
            f"out={cfg.out}: evaluate=true and truth=... compare predictions on this machine; leave them out, and "
            "compare a copy with cellmap-evaluate"
        )
    if is_exported(cfg.ckpt):
        options = OmegaConf.select(cfg, "data.storage_options")
        plain: Any = OmegaConf.to_container(options, resolve=True) if options else None
        config = exported_config(cfg, writer_config(cfg, plain))
    else:
        config = _checkpoint_config(cfg)
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key == "data":
            raise CellMapValueError(f"{override}: the data are those of the checkpoint; give data.input_path")
        if key.startswith("data.") and key != "data.input_path":
            OmegaConf.update(config, key, OmegaConf.select(cfg, key), force_add=True)
    # What the context may change: see `set_context`.
    given = {override.partition("=")[0].lstrip("+~") for override in overrides}
    config.adjustable = {"patch": cfg.patch.shape is None, "batch_size": "data.batch_size" not in given}
    config.patch.memory_mb = positive_number("patch.memory_mb", cfg.patch.memory_mb)
    config.truth = cfg.truth
    config.evaluate = bool(cfg.evaluate) or cfg.truth is not None
    if config.evaluate and (cfg.crops is None or cfg.metric == "voxels"):
        truth_folders(config)  # an error before anything is predicted
    return config


def _checkpoint_config(cfg: DictConfig) -> DictConfig:
    """Return the configuration of a prediction with the model of a checkpoint."""
    saved = saved_config(Path(cfg.ckpt))
    replaced: Any = OmegaConf.to_container(cfg.metadata, resolve=True)
    metadata = {key: value for key, value in replaced.items() if value is not None}
    data = _data(saved, cfg) | {"datasets": {"predict": [{"raw": cfg.data.input_path, **metadata}]}, "split": "csv"}
    patch = _patch(saved, data, cfg)
    trainer: Any = OmegaConf.to_container(cfg.trainer, resolve=True)
    if trainer.get("precision") is None:
        trainer["precision"] = (saved.get("trainer") or {}).get("precision")
    writer = writer_config(cfg, data.get("storage_options"))
    return OmegaConf.create(
        {
            "ckpt": cfg.ckpt, "patch": patch, "data": data, "model": saved.get("model"), "task": saved["task"],
            "trainer": trainer, "writer": writer, "evaluate": bool(cfg.evaluate), "metric": cfg.metric,
            "picture": bool(cfg.picture), "input_path": cfg.data.input_path, "metadata": metadata,
        }
    )  # fmt: skip


def _missing(cfg: DictConfig, keys: Sequence[str]) -> list[str]:
    return [key for key in keys if OmegaConf.select(cfg, key, default=None) is None]


def _data(saved: Mapping[str, Any], cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments of the data module of a checkpoint, without those that only a training has."""
    data = {name: None if name in _TRAINING_ONLY else value for name, value in saved["data"].items()}
    data.pop("datasets", None)
    options = OmegaConf.select(cfg, "data.storage_options")
    if options is not None or isinstance(parse_location(cfg.data.input_path), Path):
        data["storage_options"] = OmegaConf.to_container(options, resolve=True) if options else None
    # Options of the command line are the user's own and need no trust.
    _check_trust(saved, data if options is None else data | {"storage_options": None}, cfg)
    if HIDDEN in str(data.get("storage_options")):
        raise CellMapValueError(
            f"ckpt={cfg.ckpt} does not hold the secrets of its storage_options: give data.storage_options={{...}}, or "
            "have them in the environment or a profile"
        )
    return data


def _check_trust(saved: Mapping[str, Any], data: Mapping[str, Any], cfg: DictConfig) -> None:
    """Check the parts of a checkpoint's configuration that are used here; see `check_trusted`."""
    used = {name: saved.get(name) for name in ("patch", "model", "task")}
    precision = (saved.get("trainer") or {}).get("precision")
    trust = OmegaConf.select(cfg, "trust")
    check_trusted(
        used | {"data": data, "trainer": {"precision": precision}},
        f"ckpt={cfg.ckpt}",
        OmegaConf.to_container(trust) if OmegaConf.is_config(trust) else trust,
        OmegaConf.select(cfg, "trust_checkpoint", default=False),
    )


def _patch(saved: Mapping[str, Any], data: Mapping[str, Any], cfg: DictConfig) -> dict[str, Any]:
    """Return the patch of a prediction; arrays of the data that have the saved shape or scale are changed with it."""
    patch = dict(saved.get("patch") or {})
    overrides: Any = OmegaConf.to_container(cfg.patch)
    for name in ("shape", "scale"):
        if overrides[name] is None:
            continue
        for array in [*(data.get("input_arrays") or {}).values(), *(data.get("target_arrays") or {}).values()]:
            if array.get(name) == patch.get(name):
                array[name] = overrides[name]
        patch[name] = overrides[name]
    return patch


def prediction_configs(cfg: DictConfig, overrides: Sequence[str]) -> list[DictConfig]:
    """Return the configuration of each prediction: a single one, or with ``crops`` one per crop of the manifest.

    A crop is written to ``<out>/<dataset>.zarr/<crop>``, with the classes that the manifest lists for it and a margin
    of one voxel, so that the manifest's own voxels can be interpolated up to the edge.

    Raises:
        CellMapError: see `effective_config`; or the manifest or the data cannot be found, or the model predicts no
            class of any crop.
    """
    if cfg.crops is None:
        return [effective_config(cfg, overrides)]
    _check_crop_settings(cfg)
    selection: Any = cfg.crops if isinstance(cfg.crops, str | int) else OmegaConf.to_container(cfg.crops)
    crops = listed_crops(cfg.manifest, selection)
    raw = raw_of(cfg.search_path, [crop.name for crop in crops])
    folder = "predictions" if OmegaConf.is_missing(cfg, "out") else cfg.out
    configs: list[DictConfig] = []
    known: list[str] = []
    for crop in crops:
        crop_cfg = cfg.copy()
        crop_cfg.data.input_path, crop_cfg.out = raw[crop.name.dataset], str(crop.within(folder))
        config = effective_config(crop_cfg, overrides)
        known = list(config.writer.classes or config.data.classes or ())
        only = [name for name in crop.classes if name in known]
        if not only:
            log.warning("%s: skipped; the model predicts none of its classes", crop.name)
            continue
        if not any(override.startswith("picture=") for override in overrides):
            config.picture = False  # it would lie among the groups of the predictions
        scale = _restrict_to_crop(config, crop, only, str(folder))
        volume = check_geometry(crop, raw[crop.name.dataset], scale, _raw_overrides(config))
        box = crop.box(scale)  # the crop lies in raw, and its margin may not
        config.writer.region = (box.intersection(volume) if box.intersects(volume) else box).as_dict()
        configs.append(config)
    report_unknown_classes(cfg.manifest, [name for crop in crops for name in crop.classes], known)
    if configs:
        report_lacking_classes(cfg.manifest, [name for crop in crops for name in crop.classes], known)
    if not configs:
        raise CellMapValueError(
            f"the model predicts no class that {cfg.manifest} lists for these crops; it predicts {known}"
        )
    return configs


def _check_crop_settings(cfg: DictConfig) -> None:
    missing = _missing(cfg, ("ckpt", "manifest", "search_path"))
    if missing:
        raise CellMapValueError("\n".join(f"crops need {key} too: set it with {key}=..." for key in missing))
    if not OmegaConf.is_missing(cfg, "out") and "://" in str(cfg.out):
        raise CellMapValueError(f"out={cfg.out}: predictions of crops are written to a folder; choose a path")
    if len(_missing(cfg, ("region", "data.input_path", "writer.region", "writer.only", "truth"))) < 5:
        raise CellMapValueError(
            "crops define region, raw volume, ground truth and classes themselves: leave out region, writer.region, "
            "writer.only, truth and data.input_path"
        )


def _raw_overrides(config: DictConfig) -> Overrides:
    """Return the settings of a prediction that replace the metadata of raw."""
    metadata: Any = OmegaConf.to_container(config.metadata, resolve=True)
    return Overrides.parse(**{key: value for key, value in metadata.items() if key not in ("normalize", "invert")})


def _restrict_to_crop(config: DictConfig, crop: ManifestCrop, classes: Sequence[str], folder: str) -> list[float]:
    """Restrict a prediction to the classes of a crop; return its voxel size, nm."""
    scale: list[float] = list(next(iter((config.data.target_arrays or config.data.input_arrays).values())).scale)
    config.writer.only = list(classes)
    config.crop, config.listed, config.folder = crop.name.crop, list(crop.classes), folder
    config.crop_box = {"name": str(crop.name), "box": crop.box().as_dict()}  # without the margin, for messages
    return scale


def writer_config(cfg: DictConfig, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of the writer, with the box of the setting ``region``."""
    writer: Any = OmegaConf.to_container(cfg.writer, resolve=True)
    region: Any = OmegaConf.to_container(cfg.region) if OmegaConf.is_config(cfg.region) else cfg.region
    if not writer["region"]:
        writer["region"] = region_box(region, str(cfg.data.input_path), options)
    return writer  # type: ignore[no-any-return]


def region_box(region: Any, input_path: str, options: Mapping[str, Any] | None = None) -> dict[str, list[float]] | None:
    """Return the box of the setting ``region``, nm; None for the whole volume.

    Args:
        region: a box, the name of a crop, or None.
        input_path: the raw volume, in the layout of the challenge where a crop is named.
        options: ``storage_options`` of an address.

    Raises:
        CellMapKeyError: there is no such crop.
    """
    if not isinstance(region, str):
        return region  # type: ignore[no-any-return]
    folder = groundtruth(input_path, options)
    crop = folder / region
    if not exists(crop):
        names = ", ".join(name for name in children(folder) if name.startswith("crop"))
        advice = (
            f"there are {names}"
            if names
            else (
                f"data.input_path={input_path} must be the group of raw, as jrc_a.zarr/{RAW}, not one of its levels; "
                "or give the region as a box, {z: [lower, upper], y: .., x: ..} in nm"
            )
        )
        raise CellMapKeyError(f"region={region}: there is no crop of that name in {folder}; {advice}")
    box: Box | None = None
    for group in (crop / name for name in children(crop)):
        if read_attributes(group) is None:
            continue
        class_box = read_image(group).finest.lattice.box
        box = class_box if box is None else box.union(class_box)
    if box is None:
        raise CellMapKeyError(f"region={region}: {crop} holds no multiscale group")
    return box.as_dict()
