"""The job of ``cellmap-predict``: predictions with the model of a checkpoint, one after the other."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.callbacks.stream_prefetch import StreamPrefetch
from cellmap_lightning.commands.crop_progress import CropProgress
from cellmap_lightning.commands.prediction_context import predicted_voxels, reach_of_task, set_contexts
from cellmap_lightning.commands.prediction_report import check_files, csc_scores, describe_prediction
from cellmap_lightning.commands.signals import ExitOnSignal
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.prediction.blocks import parse_region
from cellmap_lightning.prediction.raw_gaps import NamedBox
from cellmap_lightning.training.checkpoints import check_checkpoint
from cellmap_lightning.training.model_forward import no_predict_step
from cellmap_lightning.wording import plural


def run(cfg: DictConfig, task: Any, progress: CropProgress | None = None) -> str | None:
    """Predict one volume or crop.

    Args:
        cfg: see `effective_config` and `set_contexts`.
        task: the model; its weights are replaced by those of the checkpoint.
        progress: the progress of several predictions, to which this one is added.

    Returns:
        On the first process, the files and scores as text; None on others.

    Raises:
        SystemExit: it was interrupted; see `ExitOnSignal`.
    """
    began = time.perf_counter()
    data = instantiate(cfg.data, _convert_="all")
    if cfg.ckpt is not None:  # an exported model holds its weights
        check_checkpoint(Path(cfg.ckpt), data, task, "evaluate", "ckpt")
    writer = instantiate(cfg.writer, _convert_="all")
    if cfg.get("crop_box") is not None:
        named = OmegaConf.to_container(cfg.crop_box)
        writer.named = NamedBox(named["name"], parse_region(named["box"]))  # type: ignore[index,call-overload]
    cfg.trainer.enable_progress_bar = False  # the writer has a bar that counts blocks
    cfg.trainer.enable_model_summary = cfg.trainer.enable_checkpointing = False
    callbacks = [writer, StreamPrefetch()]
    trainer: L.Trainer = instantiate(cfg.trainer, _convert_="all", callbacks=callbacks, logger=False)

    def advice() -> str | None:
        if not trainer.is_global_zero:
            return None
        done = f"this run wrote {plural(writer.summary.written, 'block')}; " if writer.summary.blocks else ""
        return f"{done}the same command continues from there"

    with ExitOnSignal(advice) as ending:
        try:
            _predict(trainer, task, data, cfg.ckpt)
            ending.check()
        finally:
            data.close()
    if not trainer.is_global_zero:
        return None
    report = str(writer.output)  # the counts of blocks are in the log, which the command shows
    if writer.summary.complete:
        report += describe_prediction(cfg, writer, data.classes or writer.names)
    if progress is not None:
        progress.add(writer.summary.voxels, time.perf_counter() - began, trainer.world_size)
    return report


def _predict(trainer: L.Trainer, task: L.LightningModule, data: L.LightningDataModule, ckpt: str | None) -> None:
    """Predict all blocks.

    Raises:
        CellMapTypeError: see `no_predict_step`.
    """
    try:
        trainer.predict(task, datamodule=data, ckpt_path=ckpt, return_predictions=False, weights_only=True)
    except CellMapError:
        raise
    except Exception as error:
        unusable = no_predict_step(task, error)
        if unusable is None:
            raise
        raise unusable from error


def run_all(configs: list[DictConfig], write_line: Callable[[str], None]) -> None:
    """Run predictions one after the other with one model; finished blocks are not computed again.

    Args:
        configs: see `effective_config`.
        write_line: prints a text.

    Raises:
        CellMapFileExistsError: see `check_files`.
        SystemExit: see `run`.
    """
    check_files(configs)
    with ExitOnSignal(lambda: "the same command continues"):
        task = instantiate(configs[0].task, _convert_="all")
        reach = reach_of_task(configs[0], task)
        set_contexts(configs, reach)
        progress = CropProgress([predicted_voxels(config) for config in configs]) if len(configs) > 1 else None
        report = None
        for config in configs:
            report = run(config, task, progress)
            if report is not None:
                write_line(f"\n{report}")
                if progress is not None:
                    progress.log_left()
        if report is not None and configs[0].evaluate and configs[0].metric == "csc":
            write_line(f"\n{csc_scores(configs)}")
