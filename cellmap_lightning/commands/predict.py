"""What ``cellmap-predict`` does: the configuration of a checkpoint, with overrides, run on a volume."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.checkpointing.checkpoint_config import CONFIG_KEY
from cellmap_lightning.checkpointing.trust import check_trusted
from cellmap_lightning.commands.ending import Ending
from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapKeyError, CellMapValueError, MissingExtraError
from cellmap_lightning.evaluation.challenge import listed_crops
from cellmap_lightning.evaluation.csc_evaluation import Predicted, Scoring, csc_table, evaluate_csc, write_csc_csv
from cellmap_lightning.evaluation.evaluate import draw, evaluate, table, write_csv
from cellmap_lightning.evaluation.overview import draw_prediction
from cellmap_lightning.geometry.lattice import Box
from cellmap_lightning.io.ngff import read_attributes, read_multiscale
from cellmap_lightning.io.store import StorePath, children, exists, parse_location
from cellmap_lightning.redaction import HIDDEN
from cellmap_lightning.splits.manifests import GROUNDTRUTH, RAW, raw_of
from cellmap_lightning.training.checkpoints import check_checkpoint

log = logging.getLogger(__name__)

#: ``voxels``: Dice, IoU, precision and recall of each crop. ``csc``: the challenge's score, pooled over crops.
METRICS = ("voxels", "csc")
NOT_CSC = "These are scores of voxels, crop by crop, not the challenge's score; metric=csc gives that."
#: Settings of the data that say which crops a training has, or what is random in it.
_OF_TRAINING = (
    "csv_path", "search_path", "manifest", "only_datasets", "only_crops", "spatial_transforms", "intensity_transforms",
    "samples_per_epoch", "batches_per_epoch",
)  # fmt: skip


def saved_config(path: Path) -> dict[str, Any]:
    """The configuration that a checkpoint carries.

    Raises:
        CellMapFileNotFoundError: there is no such checkpoint.
        CellMapValueError: it cannot be read without running code from it, or carries none.
    """
    if not path.is_file():
        there = ", ".join(map(str, sorted(path.parent.glob("*.ckpt")))) or "none"
        raise CellMapFileNotFoundError(f"ckpt={path}: there is no such checkpoint; checkpoints beside it: {there}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises what its readers raise
        raise CellMapValueError(f"ckpt={path} cannot be read: {str(e).splitlines()[0]}") from e
    found = content.get(CONFIG_KEY) if isinstance(content, dict) else None
    if not isinstance(found, dict) or not {"data", "task"} <= set(found):
        raise CellMapValueError(
            f"ckpt={path} carries no configuration ({CONFIG_KEY!r}), as those of cellmap-train do; predict with it "
            "from Python: Trainer(callbacks=[PredictionWriter(...)]).predict(model, datamodule=...)"
        )
    return found


def _check_saved(saved: Mapping[str, Any], data: Mapping[str, Any], cfg: DictConfig) -> None:
    """Check what is taken from the configuration of a checkpoint; `check_trusted` says what may be in it."""
    used = {name: saved.get(name) for name in ("patch", "model", "task")}
    precision = (saved.get("trainer") or {}).get("precision")
    trust = OmegaConf.select(cfg, "trust")
    check_trusted(
        used | {"data": data, "trainer": {"precision": precision}},
        f"ckpt={cfg.ckpt}",
        OmegaConf.to_container(trust) if OmegaConf.is_config(trust) else trust,
        OmegaConf.select(cfg, "trust_checkpoint", default=False),
    )


def effective_config(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration of a prediction: that of the checkpoint, with what was said on the command line on top.

    Args:
        cfg: ``predict.yaml`` with all overrides.
        overrides: the overrides, as they were given.

    Raises:
        CellMapError: see `saved_config`; or the region is none.
    """
    if cfg.metric not in METRICS:
        raise CellMapValueError(f"metric must be one of {', '.join(METRICS)}, got {cfg.metric!r}")
    missing = [key for key in ("ckpt", "data.input_path", "out") if OmegaConf.select(cfg, key, default=None) is None]
    if missing:
        raise CellMapValueError("\n".join(f"{key} is required: set it with {key}=..." for key in missing))
    saved = saved_config(Path(cfg.ckpt))
    data = {name: None if name in _OF_TRAINING else value for name, value in saved["data"].items()}
    data.pop("datasets", None)
    given_options = OmegaConf.select(cfg, "data.storage_options")
    if given_options is not None or isinstance(parse_location(cfg.data.input_path), Path):
        data["storage_options"] = OmegaConf.to_container(given_options, resolve=True) if given_options else None
    _check_saved(saved, data if given_options is None else data | {"storage_options": None}, cfg)
    given: Any = OmegaConf.to_container(cfg.metadata, resolve=True)
    metadata = {key: value for key, value in given.items() if value is not None}
    data |= {"datasets": {"predict": [{"raw": cfg.data.input_path, **metadata}]}, "split": "csv"}
    patch = dict(saved.get("patch") or {})
    for name in ("shape", "scale"):
        wanted = OmegaConf.to_container(cfg.patch)[name]  # type: ignore[call-overload, index]
        if wanted is not None:
            for array in [*(data.get("input_arrays") or {}).values(), *(data.get("target_arrays") or {}).values()]:
                if array.get(name) == patch.get(name):
                    array[name] = wanted
            patch[name] = wanted
    trainer: Any = OmegaConf.to_container(cfg.trainer, resolve=True)
    if trainer.get("precision") is None:
        trainer["precision"] = (saved.get("trainer") or {}).get("precision")
    if HIDDEN in str(data.get("storage_options")):
        raise CellMapValueError(
            f"ckpt={cfg.ckpt} does not hold the secrets of its storage_options: give data.storage_options={{...}}, or "
            "have them in the environment or a profile"
        )
    writer: Any = OmegaConf.to_container(cfg.writer, resolve=True)
    box: Any = OmegaConf.to_container(cfg.region) if OmegaConf.is_config(cfg.region) else cfg.region
    writer["region"] = writer["region"] or region(box, str(cfg.data.input_path), data.get("storage_options"))
    found = OmegaConf.create(
        {
            "ckpt": cfg.ckpt, "patch": patch, "data": data, "model": saved.get("model"), "task": saved["task"],
            "trainer": trainer, "writer": writer, "evaluate": bool(cfg.evaluate), "metric": cfg.metric,
            "picture": bool(cfg.picture), "input_path": cfg.data.input_path, "metadata": metadata,
        }
    )  # fmt: skip
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key == "data":
            raise CellMapValueError(f"{override}: the data are those of the checkpoint; give data.input_path")
        if key.startswith("data.") and key != "data.input_path":
            OmegaConf.update(found, key, OmegaConf.select(cfg, key), force_add=True)
    return found


def of_crops(cfg: DictConfig, overrides: list[str]) -> list[DictConfig]:
    """The configuration of each prediction: one, or with ``crops`` one for each of these crops of a manifest.

    A crop's is written to ``<out>/<dataset>.zarr/<crop>``, with the classes that the manifest lists for it, and a voxel
    around it, so that the manifest's own voxels can be interpolated up to the edge.

    Raises:
        CellMapError: see `effective_config`; or the manifest or the data cannot be found, or the model knows no class
            of any crop.
    """
    if cfg.crops is None:
        return [effective_config(cfg, overrides)]
    missing = [key for key in ("ckpt", "manifest", "search_path") if OmegaConf.select(cfg, key, default=None) is None]
    if missing:
        raise CellMapValueError("\n".join(f"crops need {key} too: set it with {key}=..." for key in missing))
    given = [key for key in ("region", "data.input_path") if OmegaConf.select(cfg, key, default=None) is not None]
    if given or cfg.writer.region is not None or cfg.writer.only is not None:
        raise CellMapValueError(
            "crops say region, raw volume and classes themselves: leave out region, writer.region, "
            "writer.only and data.input_path"
        )
    wanted: Any = cfg.crops if isinstance(cfg.crops, str | int) else OmegaConf.to_container(cfg.crops)
    crops = listed_crops(cfg.manifest, wanted)
    raw = raw_of(cfg.search_path, dict.fromkeys(crop.dataset for crop in crops))
    folder = "predictions" if OmegaConf.is_missing(cfg, "out") else cfg.out
    found = []
    for crop in crops:
        one = cfg.copy()
        one.data.input_path, one.out = raw[crop.dataset], str(crop.within(folder))
        config = effective_config(one, overrides)
        known = list(config.writer.classes or config.data.classes or ())
        only = [name for name in crop.classes if name in known]
        if not only:
            log.warning("%s/%s: the model knows none of its classes, so it is not predicted", crop.dataset, crop.name)
            continue
        scale = next(iter((config.data.target_arrays or config.data.input_arrays).values())).scale
        if not any(override.startswith("picture=") for override in overrides):
            config.picture = False  # it would lie among the groups of the predictions
        config.writer.only, config.writer.region = only, crop.box(list(scale)).as_dict()
        config.crop, config.listed, config.folder = crop.name, list(crop.classes), str(folder)
        found.append(config)
    if not found:
        raise CellMapValueError(f"the model knows no class that {cfg.manifest} lists for these crops; it knows {known}")
    return found


def groundtruth(input_path: str, options: Mapping[str, Any] | None = None) -> StorePath:
    """Where the crops of a raw volume are in the layout of the challenge."""
    raw = parse_location(input_path, options)
    above: Sequence[StorePath] = raw.absolute().parents if isinstance(raw, Path) else raw.parents
    return above[min(len(Path(RAW).parts), len(above)) - 1] / GROUNDTRUTH


def region(given: Any, input_path: str, options: Mapping[str, Any] | None = None) -> dict[str, list[float]] | None:
    """The box of what was asked for, nm; None for the whole volume.

    Args:
        given: a box, the name of a crop, or None.
        input_path: the raw volume, in the layout of the challenge where a crop is named.
        options: ``storage_options`` of an address.

    Raises:
        CellMapKeyError: there is no such crop.
    """
    if not isinstance(given, str):
        return given  # type: ignore[no-any-return]
    folder = groundtruth(input_path, options)
    crop = folder / given
    if not exists(crop):
        there = ", ".join(name for name in children(folder) if name.startswith("crop")) or "none"
        raise CellMapKeyError(f"region={given}: there is no crop of that name in {folder}; there are {there}")
    box: Box | None = None
    for path in (crop / name for name in children(crop)):
        if read_attributes(path) is None:
            continue
        found = read_multiscale(path).finest.lattice.box
        box = found if box is None else box.union(found)
    if box is None:
        raise CellMapKeyError(f"region={given}: {crop} holds no multiscale group")
    return box.as_dict()


def run(cfg: DictConfig, task: Any = None) -> str | None:
    """Predict. Returns what was done, on the first process; None on others.

    Args:
        cfg: see `effective_config`.
        task: the model, where it was made before; its weights are those of the checkpoint afterwards.

    Raises:
        SystemExit: it was interrupted; see `Ending`.
    """
    import lightning as L
    from hydra.utils import instantiate

    from cellmap_lightning.callbacks.stream_prefetch import StreamPrefetch

    data = instantiate(cfg.data, _convert_="all")
    task = task if task is not None else instantiate(cfg.task, _convert_="all")
    check_checkpoint(Path(cfg.ckpt), data, task, "evaluate", "ckpt")
    writer = instantiate(cfg.writer, _convert_="all")
    cfg.trainer.enable_progress_bar = False  # the writer's own counts blocks
    cfg.trainer.enable_model_summary = cfg.trainer.enable_checkpointing = False
    trainer: L.Trainer = instantiate(
        cfg.trainer, _convert_="all", callbacks=[writer, StreamPrefetch()], logger=False
    )  # fmt: skip

    def advice() -> str | None:
        if not trainer.is_global_zero:
            return None
        done = f"{writer.summary.written} blocks were written by this run; " if writer.summary.blocks else ""
        return f"{done}the same command continues from there"

    with Ending(advice) as ending:
        try:
            trainer.predict(task, datamodule=data, ckpt_path=cfg.ckpt, return_predictions=False, weights_only=True)
            ending.check()
        finally:
            data.close()
    if not trainer.is_global_zero:
        return None
    said = str(writer.output)  # the summary is in the log, which the command shows
    if writer.summary.complete:
        said += _judged(cfg, writer, writer.only or writer.classes or data.classes or ())
    return said


def _judged(cfg: DictConfig, writer: Any, names: Sequence[str]) -> str:
    """Draw what was predicted, and compare it with the crops, as far as that is wanted; what there is then to say."""
    said, output = "", writer.output
    raw = parse_location(str(cfg.input_path), OmegaConf.to_container(cfg.data, resolve=True).get("storage_options"))  # type: ignore[union-attr]
    if not isinstance(raw, Path):
        return f"\n\nno picture{' and no scores' * bool(cfg.evaluate)}: raw and its crops are not on this machine"
    crops = Path(str(groundtruth(str(raw))))
    package = logging.getLogger("cellmap_lightning")
    level = package.level
    package.setLevel(logging.ERROR)  # each crop and class would be announced as in a training
    try:
        if cfg.picture:
            picture = output.with_name(f"{output.stem}.png")
            try:
                given: Any = OmegaConf.to_container(cfg.metadata, resolve=True)
                metadata = {key: value for key, value in given.items() if key not in ("normalize", "invert")}
                metadata["level_translations"] = cfg.data.get("level_translations", "auto")
                draw_prediction(output, str(cfg.input_path), names, picture, crops, writer.threshold, metadata)
                said += f"\n\n{picture}"
            except MissingExtraError as e:
                said += f"\n\nno picture: {e}"
        if cfg.evaluate and cfg.metric == "voxels":
            unknown = OmegaConf.to_container(cfg.data).get("unknown", "metadata")  # type: ignore[union-attr]
            scores = evaluate(output, crops, names, writer.threshold, unknown)
            table_file, matrix = (output.with_name(f"{output.stem}-scores{end}") for end in (".csv", ".png"))
            write_csv(scores, table_file)
            draw(scores, matrix)
            said += f"\n\n{table(scores)}\n\n{table_file}\n{matrix}\n{NOT_CSC}"
    finally:
        package.setLevel(level)
    return said


def csc_scores(configs: Sequence[DictConfig]) -> str:
    """Return the challenge's score over the crops of all predictions, as a table, and write it beside them.

    Raises:
        CellMapError: no crop can be compared, or something cannot be read.
    """
    predictions = []
    for cfg in configs:
        raw = parse_location(str(cfg.input_path), OmegaConf.to_container(cfg.data, resolve=True).get("storage_options"))  # type: ignore[union-attr]
        if not isinstance(raw, Path):
            return f"no scores: {cfg.input_path} and its crops are not on this machine"
        names = OmegaConf.select(cfg, "listed") or cfg.writer.only or cfg.writer.classes or cfg.data.classes
        crops = Path(str(groundtruth(str(raw))))
        predictions.append(Predicted(Path(cfg.writer.output), crops, tuple(names), OmegaConf.select(cfg, "crop")))
    data: Any = OmegaConf.to_container(configs[0].data, resolve=True)
    scoring = Scoring(configs[0].writer.threshold, unknown=data.get("unknown", "metadata"))
    score = evaluate_csc(predictions, scoring)
    out = Path(OmegaConf.select(configs[0], "folder") or configs[0].writer.output)
    file = out.with_name(f"{out.stem}-challenge.csv")
    write_csc_csv(score, file)
    return f"{csc_table(score)}\n\n{file}"


def run_all(configs: list[DictConfig], say: Callable[[str], None]) -> None:
    """Predict one after the other, with one model; what is finished is not computed again.

    Raises:
        SystemExit: see `run`.
    """
    from hydra.utils import instantiate

    with Ending(lambda: "the same command continues"):
        task = instantiate(configs[0].task, _convert_="all")
        for config in configs:
            said = run(config, task)
            if said is not None:
                say(f"\n{said}")
        if said is not None and configs[0].evaluate and configs[0].metric == "csc":
            say(f"\n{csc_scores(configs)}")
