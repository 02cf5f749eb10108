"""The job of ``cellmap-predict``: predictions with the model of a checkpoint, one after the other."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig

from cellmap_lightning.callbacks.stream_prefetch import StreamPrefetch
from cellmap_lightning.commands.prediction_context import reach_of_task, set_context
from cellmap_lightning.commands.prediction_report import check_files, csc_scores, describe_prediction
from cellmap_lightning.commands.signals import ExitOnSignal
from cellmap_lightning.errors import CellMapError, CellMapTypeError
from cellmap_lightning.training.checkpoints import check_checkpoint
from cellmap_lightning.training.model_forward import first_line
from cellmap_lightning.wording import plural


def run(cfg: DictConfig, task: Any) -> str | None:
    """Predict one volume or crop.

    Args:
        cfg: see `effective_config` and `set_context`.
        task: the model; its weights are replaced by those of the checkpoint.

    Returns:
        On the first process, the files and scores as text; None on others.

    Raises:
        SystemExit: it was interrupted; see `ExitOnSignal`.
    """
    data = instantiate(cfg.data, _convert_="all")
    if cfg.ckpt is not None:  # an exported model holds its weights
        check_checkpoint(Path(cfg.ckpt), data, task, "evaluate", "ckpt")
    writer = instantiate(cfg.writer, _convert_="all")
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
    return report


def _predict(trainer: L.Trainer, task: L.LightningModule, data: L.LightningDataModule, ckpt: str | None) -> None:
    """Predict all blocks.

    Raises:
        CellMapTypeError: the module has neither ``predict_step`` nor ``forward``; only a ``forward`` that does not take
            a batch, as Lightning calls it; or a ``predict_step`` that calls a module without ``forward``.
    """
    name = type(task).__name__
    try:
        trainer.predict(task, datamodule=data, ckpt_path=ckpt, return_predictions=False, weights_only=True)
    except CellMapError:
        raise
    except Exception as error:
        if isinstance(error, NotImplementedError) and 'required "forward" function' in str(error):  # of torch
            raise CellMapTypeError(
                f"{name}: predict_step calls a module without forward ({error}); define forward, or call the network "
                "instead of the module"
            ) from error
        if type(task).predict_step is not L.LightningModule.predict_step or not _raised_in_forward(error, task):
            raise
        raise CellMapTypeError(
            f"{name} has no predict_step, so its forward was called with the batch, a dict, and failed "
            f"({first_line(error)}); define predict_step(self, batch, batch_idx), which returns [N, C, z, y, x]"
        ) from error


def _raised_in_forward(error: BaseException, task: L.LightningModule) -> bool:
    """Return True if an error was raised in the ``forward`` of a module, or in what it calls."""
    code = getattr(type(task).forward, "__code__", None)
    return any(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))


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
        report = None
        for config in configs:
            set_context(config, reach)
            report = run(config, task)
            if report is not None:
                write_line(f"\n{report}")
        if report is not None and configs[0].evaluate and configs[0].metric == "csc":
            write_line(f"\n{csc_scores(configs)}")
