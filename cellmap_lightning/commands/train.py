"""The job of ``cellmap-train``: one training, from an empty or earlier run folder to its results."""

import logging
import os
import sys
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.callbacks.preemption import PreemptionCheckpoint
from cellmap_lightning.checkpointing.checkpoint_config import CheckpointConfig
from cellmap_lightning.commands.epoch_lines import EpochLines
from cellmap_lightning.commands.finished_run import finished_text, finished_value
from cellmap_lightning.commands.messages import quieten
from cellmap_lightning.commands.monitors import MonitorCheck, best_of, describe_best
from cellmap_lightning.commands.pictures import attempt, draw_samples, picture_title, scores_of
from cellmap_lightning.commands.private_run import without_secrets
from cellmap_lightning.commands.run_folder import how_to_continue, remove_run, results_in
from cellmap_lightning.commands.signals import ExitOnSignal
from cellmap_lightning.commands.sweep_table import write_scores
from cellmap_lightning.commands.time_limit import describe_time_limit
from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.splits.proposed_validation import no_validation, override
from cellmap_lightning.training import report
from cellmap_lightning.training.checkpoints import (
    check_checkpoint,
    check_exists,
    check_hyperparameters,
    saved_checkpoints,
)
from cellmap_lightning.training.module_errors import BatchShapes, short_errors
from cellmap_lightning.training.weight_files import load_weights, read_weights, rename_weights
from cellmap_lightning.validation import did_you_mean, whole_number
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)


@dataclass
class _Progress:
    """The progress of a run, for the message when it is interrupted."""

    folder: Path
    trainer: L.Trainer | None = None
    trained: bool = False

    def advice(self) -> str | None:
        """Return how to continue the run; None where another process prints it."""
        if self.trainer is None:
            return how_to_continue(self.folder, False)
        if not self.trainer.is_global_zero:
            return None
        saved = [c.saved for c in self.trainer.callbacks if isinstance(c, PreemptionCheckpoint)]  # type: ignore[attr-defined]
        return how_to_continue(self.folder, self.trained, next(filter(None, saved), None))


def run(cfg: DictConfig) -> float | None:
    """Train and validate, and draw the results.

    Args:
        cfg: ``train.yaml`` with all overrides.

    Returns:
        The monitored metric, for sweepers; None where nothing was validated.

    Raises:
        CellMapError: the configuration does not fit the data, the checkpoint or the way of starting processes.
        SystemExit: it was interrupted; see `ExitOnSignal`.
    """
    _check_launch(cfg)
    progress = _Progress(Path(HydraConfig.get().runtime.output_dir))
    with ExitOnSignal(progress.advice) as ending:
        return _run(cfg, progress, ending)


def _run(cfg: DictConfig, progress: _Progress, ending: ExitOnSignal) -> float | None:
    """Create data, task and Trainer, and run all phases."""
    checkpoint, start = _checkpoint(cfg.resume, progress.folder)
    finished = finished_text(cfg, checkpoint, progress.folder) if cfg.resume == "auto" else None
    if finished is not None:
        log.info("%s", finished)
        return finished_value(progress.folder)
    stored: Any = without_secrets(OmegaConf.to_container(cfg, resolve=True))
    L.seed_everything(whole_number("seed", cfg.seed), verbose=False)
    quieten()
    unresolved = deepcopy(cfg)  # instantiate resolves in place what a part refers to
    data = instantiate(cfg.data, _convert_="all")
    try:
        task = instantiate(cfg.task, _convert_="all")
        check_hyperparameters(task)
        if checkpoint is not None:
            check_checkpoint(checkpoint, data, task, "resume", "resume")
        elif cfg.init_from is not None:  # a resumed run has weights
            _initialize_weights(unresolved, data, task)
        _log_size(task)
        trainer = progress.trainer = _trainer(cfg, CheckpointConfig(stored, start))
        validates = _validates(trainer, data)
        if trainer.is_global_zero:
            _prepare_folder(cfg, progress.folder, stored, data)
        untrained = None
        if cfg.compare_untrained and validates and not trainer.fast_dev_run:
            untrained = _untrained_scores(trainer, task, data, ending)
        _fit(trainer, task, data, checkpoint)
        measured = dict(trainer.callback_metrics)
        progress.trained = True
        ended = describe_time_limit(trainer, progress.folder)
        if ended is not None and trainer.is_global_zero:
            log.info("%s", ended)
        ending.check()
        if validates and cfg.final_validation and not trainer.fast_dev_run:
            _validate_best(cfg, trainer, task, data)
            ending.check()
        metric = _monitored(cfg.monitor, trainer, measured)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.finalize("success")
            others = _other_results(cfg, progress.folder, trainer, task, data, validates)
            _report(cfg, progress.folder, metric, task, untrained, others, validates)
        _check_measured(cfg.monitor, {*trainer.callback_metrics, *measured})
        return metric
    finally:
        data.close()


def _log_size(task: L.LightningModule) -> None:
    count = sum(p.numel() for p in task.parameters())
    log.info("%s: %s", type(getattr(task, "network", task)).__name__, plural(count, "parameter"))


def _validates(trainer: Any, data: CellMapDataModule) -> bool:
    """Return True if a run validates, False if ``trainer.limit_val_batches`` is 0.

    Raises:
        CellMapValueError: it is to validate, and no crop is for validation.
    """
    has_crops = data.splits.has_crops("val")  # reads the crops: their errors do not depend on the Trainer
    if trainer.limit_val_batches == 0:
        return False
    if not has_crops:
        raise CellMapValueError(no_validation(data.splits, override, "trainer.limit_val_batches=0"))
    return True


def _untrained_scores(trainer: Any, task: Any, data: CellMapDataModule, ending: ExitOnSignal) -> dict[str, Any]:
    """Validate the untrained network, and return its scores; empty where another process has them."""
    log.info("validation of the untrained network, for comparison")
    with short_errors(task, trainer, data):
        trainer.validate(task, datamodule=data, verbose=False)
    ending.check()
    return dict(scores_of(task) or {})


def _fit(trainer: Any, task: Any, data: CellMapDataModule, checkpoint: Path | None) -> None:
    try:
        with short_errors(task, trainer, data):
            trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except (MisconfigurationException, RuntimeError) as e:
        error = next((c.error for c in trainer.callbacks if isinstance(c, MonitorCheck)), None)
        if error is None:
            raise
        raise error from e


def _validate_best(cfg: DictConfig, trainer: Any, task: Any, data: CellMapDataModule) -> None:
    """Validate the best weights; the last ones, if the run ended before its first validation.

    After other validations, loggers get these scores as ``final_val/...``: as ``val/...`` at the last step they would
    be taken for those of the last weights, and curves would end in two points.
    """
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if any(method in str(cfg.trainer.strategy) for method in ("spawn", "fork")):
        trainer.loggers = []  # new processes would overwrite their files
    loggers = trainer.loggers
    is_point = not best and cfg.monitor not in trainer.callback_metrics  # nothing was validated before
    if not is_point:
        trainer.loggers = []
    log.info("validation of the %s weights", "best" if best else "last")
    scores = trainer.validate(task, datamodule=data, ckpt_path=best or None, weights_only=True, verbose=False)
    trainer.loggers = loggers
    if scores and not is_point:
        for logger in loggers:
            logger.log_metrics({f"final_{name}": value for name, value in scores[0].items()}, trainer.global_step)


def _report(
    cfg: DictConfig,
    folder: Path,
    metric: float | None,
    task: Any,
    untrained: Mapping[str, Any] | None,
    others: Mapping[str, str],
    validates: bool,
) -> None:
    """Draw the curves, and print the scores and the files of a run."""
    attempt("curves.png is not drawn", partial(report.write_curves, folder, list(cfg.data.classes or ())))
    scores = scores_of(task)
    if scores is not None:
        print("\nvalidation\n" + report.score_table(scores, untrained, list(cfg.data.classes or ())))
    elif metric is not None:  # of training, or the scores of each class stayed in the processes of ddp_spawn
        print(f"\n{'validation' if validates else 'training'}\n{cfg.monitor} {metric:.3f}")
    write_scores(folder, cfg.monitor, metric, scores or {})
    print(f"\nresults in {folder}\n" + "\n".join(report.describe_run(folder, others)))


def _other_results(
    cfg: DictConfig, folder: Path, trainer: Any, task: Any, data: CellMapDataModule, validates: bool
) -> dict[str, str]:
    """Draw the samples if the run validates, and return the descriptions of files that depend on the run."""
    others = _other_scores(cfg, trainer, validates)
    if validates:
        title = picture_title(cfg.name, folder, data.splits.source)
        others |= draw_samples(task, data, folder / "samples.png", title)
    return others


def _other_scores(cfg: DictConfig, trainer: Any, validates: bool) -> dict[str, str]:
    """Return the descriptions of best.ckpt and scores.json where they are not those of a run that validates."""
    if validates:
        return {} if cfg.final_validation else {"scores.json": "the scores of the last validation"}
    if cfg.monitor not in trainer.callback_metrics:
        return {"scores.json": "no scores: nothing was validated"}
    others = {"scores.json": f"{cfg.monitor} of the last epoch; no scores, as nothing was validated"}
    best = trainer.checkpoint_callback
    if getattr(best, "monitor", None) == cfg.monitor:
        others["checkpoints/best.ckpt"] = f"weights of the {best_of(best)}"
    return others


def _monitored(monitor: str, trainer: Any, measured: Mapping[str, Any]) -> float | None:
    """Return the monitored metric; None where it was not measured.

    Args:
        monitor: the setting.
        trainer: after the final validation, whose metrics replace those of the epochs.
        measured: the metrics of the last epoch: one that training alone logs is that of the best weights, or else this.
    """
    metric = trainer.callback_metrics.get(monitor)
    best = trainer.checkpoint_callback
    if metric is None and getattr(best, "monitor", None) == monitor:
        metric = best.best_model_score
    if metric is None:
        metric = measured.get(monitor)
    return None if metric is None else float(metric)


def _check_measured(monitor: str, names: Collection[str]) -> None:
    """Check that a run that has validated has measured the monitored metric.

    Raises:
        CellMapKeyError: it has not; the message has the closest name that it has.
    """
    if monitor not in names and any(name.startswith("val/") for name in names):
        hint = did_you_mean(monitor, names)
        raise CellMapKeyError(f"monitor={monitor} was not measured{hint}; measured were {', '.join(sorted(names))}")


def _trainer(cfg: DictConfig, checkpoint_config: CheckpointConfig) -> Any:
    """Return the Trainer of a run, with its callbacks and loggers."""
    named = {key: c for key, c in (cfg.get("callbacks") or {}).items() if c is not None}
    callbacks = {str(key): instantiate(c, _convert_="all") for key, c in named.items()}
    loggers = [instantiate(c, _convert_="all") for c in (cfg.get("logger") or {}).values() if c is not None]
    if cfg.trainer.enable_progress_bar is None and not sys.stdout.isatty():
        cfg.trainer.enable_progress_bar = False
    own = [*callbacks.values(), checkpoint_config, MonitorCheck(cfg.monitor, callbacks), BatchShapes()]
    own.append(EpochLines(cfg.monitor))
    trainer = instantiate(cfg.trainer, _convert_="all", callbacks=own, logger=loggers or False)
    for line in describe_best([*callbacks.values()], trainer.limit_val_batches != 0):
        log.info("%s", line)
    return trainer


def _prepare_folder(cfg: DictConfig, folder: Path, stored: Any, data: CellMapDataModule) -> None:
    """Remove or rename files of an earlier start, and write the configuration and the crops."""
    if cfg.overwrite and results_in(folder):
        data.prepare_data()
        data.setup("fit")  # before anything is removed: a run that cannot start replaces nothing
        remove_run(folder)
    metrics = folder / "metrics.csv"
    if metrics.exists():  # Lightning's logger would delete it
        metrics.rename(folder / f"metrics.{len(list(folder.glob('metrics.*.csv'))) + 1}.csv")
    OmegaConf.save(OmegaConf.create(stored), folder / "config.yaml")
    data.splits.write_csv(folder / "split.csv")
    if data.splits.options.rule != "csv":
        table = data.splits.table()
        dash = " (-: the metadata have no number of them)" if "-" in table.split() else ""
        print(f"\ncrops that hold each class, and its voxels in them{dash}\n{table}\n", flush=True)


def _checkpoint(resume: str | None, folder: Path) -> tuple[Path | None, int]:
    """Return the checkpoint from which a run resumes, if any, and the number of this start.

    Raises:
        CellMapFileNotFoundError: the named checkpoint does not exist.
    """
    if resume is None:
        return None, 1
    if resume != "auto":
        check_exists(Path(resume), "resume", "; resume=auto takes the newest of the run's folder")
    saved = saved_checkpoints(folder)
    start = saved[-1].start + 1 if saved else 1
    if resume != "auto":
        return Path(resume), start
    path = saved[-1].path if saved else None
    log.info("resume=auto: %s", path or f"no checkpoint in {folder}, so training starts")
    return path, start


def _initialize_weights(cfg: DictConfig, data: Any, task: Any) -> None:
    """Load the weights of another training; layers that depend on the classes only from one with the same classes.

    Args:
        cfg: the configuration, not resolved yet; it is changed.
        data: the data of this run.
        task: the module that gets the weights.
    """
    has_network = isinstance(getattr(task, "network", None), torch.nn.Module)
    network = task.network if has_network else task
    file, where = read_weights(Path(cfg.init_from), "init_from"), f"init_from={cfg.init_from}"
    weights = file.weights
    if cfg.init_from_map is not None:
        weights = rename_weights(weights, OmegaConf.to_container(cfg.init_from_map), where)
    old_classes: list[str] = []
    if file.kind == "checkpoint":
        old_classes = check_checkpoint(Path(cfg.init_from), data, task, "begin", "init_from")
    classes = list(cfg.data.classes or [])
    head: set[str] = set()
    if has_network and old_classes != classes:
        # Layers that change their shape with the number of classes are the head. On the meta device no memory is used.
        cfg.data.classes = [*classes, "one more"]
        with torch.device("meta"):
            larger = instantiate(cfg.model, _convert_="all").state_dict()
        head = {name for name, value in network.state_dict().items() if larger[name].shape != value.shape}
        if not head:
            log.warning(
                "init_from: the classes of the checkpoint, %s, are not those of this run, %s, and no layer of the "
                "model has their size: every layer is loaded, the last one too", old_classes, classes,
            )  # fmt: skip
    log.info("%s: %s", where, load_weights(network, weights, where, "network." if has_network else "", head))


def _check_launch(cfg: DictConfig) -> None:
    """Check that the processes of a run share a folder, and that a sweep is not started again by each of them.

    Raises:
        CellMapValueError: torchrun gives no id for the folder, or ``ddp`` processes would repeat a sweep.
    """
    if os.environ.get("TORCHELASTIC_RUN_ID") == "none" and cfg.run.name is None:
        raise CellMapValueError(
            "torchrun starts several processes, which would create a folder each; give it with run.name=..., or start "
            "them with torchrun --standalone or --rdzv-id"
        )
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    strategy, devices = str(cfg.trainer.strategy), cfg.trainer.devices
    submitted = "submitit" in str(HydraConfig.get().launcher.get("_target_"))  # Slurm starts the processes of a job
    alone = devices == 1 or submitted or "spawn" in strategy or "fork" in strategy
    if sweeping and strategy.startswith("ddp") and not alone:
        raise CellMapValueError(
            f"-m with trainer.strategy={strategy} on {devices} devices: each process would start the whole sweep "
            "again; use trainer.strategy=ddp_spawn, or hydra/launcher=submitit_slurm, or one job per command"
        )
