"""The job of ``cellmap-train``."""

import difflib
import logging
import os
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from cellmap_lightning import report
from cellmap_lightning.callbacks.run_config import RunConfig
from cellmap_lightning.checkpoints import load_weights, newest_checkpoint, saved_classes
from cellmap_lightning.commands.common import quieten, stop
from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapKeyError, CellMapValueError
from cellmap_lightning.masked import probabilities
from cellmap_lightning.volumes.store import redacted, without_secrets

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float | None:
    """Fit, and say what came of it. Returns the monitored metric, for sweepers."""
    _check_launch(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    _hide_secrets(cfg, folder)
    checkpoint = _checkpoint(cfg.resume, folder)
    plain: Any = redacted(OmegaConf.to_container(cfg, resolve=True))  # what stays on disk
    L.seed_everything(cfg.seed, verbose=False)
    quieten()
    unresolved = deepcopy(cfg)  # instantiate resolves in place what a part refers to
    data = instantiate(cfg.data, _convert_="all")
    task = instantiate(cfg.task, _convert_="all")
    if cfg.init_from is not None and checkpoint is None:  # what goes on has weights of its own
        _begin_from(unresolved, task)
    callbacks = [instantiate(c, _convert_="all") for c in (cfg.callbacks or {}).values() if c is not None]
    loggers = [instantiate(c, _convert_="all") for c in (cfg.logger or {}).values() if c is not None]
    if cfg.trainer.enable_progress_bar is None and not sys.stdout.isatty():
        cfg.trainer.enable_progress_bar = False  # in a file it would be noise
    trainer = instantiate(
        cfg.trainer, _convert_="all", callbacks=[*callbacks, RunConfig(plain)], logger=loggers or False
    )
    validates = data.crops.given("val") and trainer.limit_val_batches != 0
    if trainer.is_global_zero:
        metrics = folder / "metrics.csv"
        if checkpoint is not None and metrics.exists():  # Lightning's logger would delete it
            metrics.rename(folder / f"metrics.{len(list(folder.glob('metrics.*.csv'))) + 1}.csv")
        OmegaConf.save(OmegaConf.create(plain), folder / "config.yaml")
        data.crops.write_csv(folder / "split.csv")
        if data.crops.rule != "csv":
            print(f"\ncrops that hold each class, and its voxels in them\n{data.crops.table()}\n", flush=True)
    untrained = None
    try:
        if cfg.compare_untrained and validates and not trainer.fast_dev_run:
            trainer.validate(task, datamodule=data, verbose=False)
            untrained = dict(getattr(task, "scores", {}).get("val", {}))
        try:
            trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as e:
            _ended(e, trainer, folder)
            raise
        except MisconfigurationException as e:
            if "could not find the monitored key" in str(e):
                raise _not_measured(cfg.monitor, trainer) from e
            raise
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if validates and cfg.final_validation and not trainer.fast_dev_run:
            if any(word in str(cfg.trainer.strategy) for word in ("spawn", "fork")):
                trainer.loggers = []  # in the new processes they would begin their files anew
            # A run that ended before its first validation has no best weights: the last ones are judged.
            trainer.validate(task, datamodule=data, ckpt_path=best or None, weights_only=True, verbose=False)
        metric = trainer.callback_metrics.get(cfg.monitor)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.finalize("success")
            if validates:
                task.eval()

                def predict(*inputs: torch.Tensor) -> torch.Tensor:
                    with torch.inference_mode():
                        return probabilities(task(*(x.to(task.device) for x in inputs)), len(data.classes or ()))

                if hasattr(task, "write_samples"):  # a task that does not mark classes has pictures of its own
                    task.write_samples(data.val_dataset, folder / "samples.png", title=cfg.name)
                else:
                    report.write_samples(
                        data.val_dataset,
                        predict,
                        folder / "samples.png",
                        title=cfg.name,
                        input_name=getattr(task, "input_name", None),
                        target_name=getattr(task, "target_name", None),
                    )
            report.write_curves(folder)
            scores = getattr(task, "scores", {}).get("val")
            if scores is not None:
                print("\nvalidation\n" + report.score_table(scores, untrained, list(cfg.data.classes)))
            elif metric is not None:  # the scores of each class stayed in the processes of ddp_spawn and ddp_fork
                print(f"\nvalidation\n{cfg.monitor} {float(metric):.3f}")
            print(f"\nresults in {folder}\n" + "\n".join(report.describe_run(folder)))
        if metric is None and any(key.startswith("val/") for key in trainer.callback_metrics):
            raise _not_measured(cfg.monitor, trainer)
        return float(metric) if metric is not None else None
    finally:
        data.close()


def _not_measured(monitor: str, trainer: Any) -> CellMapKeyError:
    """The error for a ``monitor`` that nobody logs."""
    there = sorted(trainer.callback_metrics)
    close = difflib.get_close_matches(str(monitor), there, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return CellMapKeyError(f"monitor={monitor} was not measured{hint} Measured were {', '.join(there)}")


def _checkpoint(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint that a run goes on from.

    Raises:
        CellMapFileNotFoundError: one was named that is not there.
    """
    if resume is None:
        return None
    if resume != "auto":
        path = Path(resume)
        if not path.is_file():
            there = ", ".join(map(str, sorted(path.parent.glob("*.ckpt")))) or "none"
            raise CellMapFileNotFoundError(
                f"resume={resume}: there is no such checkpoint; checkpoints beside it: {there}; resume=auto takes the "
                "newest of the run's folder"
            )
        return path
    path_or_none = newest_checkpoint(folder)
    log.info("resume=auto: %s", path_or_none or f"nothing to go on from in {folder}, so this is the beginning")
    return path_or_none


def _begin_from(cfg: DictConfig, task: Any) -> None:
    """Load the weights of another training. With other classes, layers whose size is that of the classes begin anew.

    Args:
        cfg: the configuration, not resolved yet; it is changed.
        task: what gets the weights.
    """
    own = isinstance(getattr(task, "network", None), torch.nn.Module)
    network = task.network if own else task
    before, now = saved_classes(Path(cfg.init_from)), list(cfg.data.classes or [])
    head: set[str] = set()
    if own and before != now:
        cfg.data.classes = [*now, "one more"]
        with torch.device("meta"):
            larger = instantiate(cfg.model, _convert_="all").state_dict()
        head = {name for name, value in network.state_dict().items() if larger[name].shape != value.shape}
        if not head:
            log.warning(
                "init_from: the classes of the checkpoint, %s, are not those of this run, %s, and no layer of the "
                "model has their size: every layer is kept, the last one too", before, now,
            )  # fmt: skip
    said = load_weights(network, Path(cfg.init_from), "network." if own else "", head)
    log.info("init_from=%s: %s", cfg.init_from, said)


def _ended(end: SystemExit, trainer: Any, folder: Path) -> None:
    """Say how to go on with a run that Ctrl-C or a signal has ended; Lightning exits on both."""
    if isinstance(end, SIGTERMException):
        saved = next((path for c in trainer.callbacks if (path := getattr(c, "saved", None))), None)
        how = f"saved {saved}; the same command with resume=auto and run.name={folder.name} goes on"
        stop(f"told to end: {how if saved else 'nothing was saved, since there is no callback Preemption'}", 143)
    if isinstance(end.__context__, KeyboardInterrupt):
        last = folder / "checkpoints" / "last.ckpt"
        stop(f"interrupted{f'; go on with resume={last}' if last.exists() else ', before anything was saved'}", 130)


def _hide_secrets(cfg: DictConfig, folder: Path) -> None:
    """Take secrets out of the files in which Hydra has noted what was said on the command line."""
    options = OmegaConf.select(cfg, "data.storage_options")
    if options is None:
        return
    plain = OmegaConf.to_container(options, resolve=True)
    for file in [*(folder / ".hydra").glob("*.yaml"), folder.parent / "multirun.yaml"]:
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            file.write_text(without_secrets(text, plain), encoding="utf-8")


def _check_launch(cfg: DictConfig) -> None:
    """A sweep whose jobs start processes of their own would start the sweep again in each of them."""
    if os.environ.get("TORCHELASTIC_RUN_ID") == "none" and cfg.run.name is None:
        raise CellMapValueError(
            "torchrun starts several processes, which would make a folder each; give it with run.name=..., or start "
            "them with torchrun --standalone or --rdzv-id"
        )
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    strategy, devices = str(cfg.trainer.strategy), cfg.trainer.devices
    submitted = "submitit" in str(HydraConfig.get().launcher.get("_target_"))  # Slurm starts the processes of a job
    alone = devices == 1 or submitted or "spawn" in strategy or "fork" in strategy
    if sweeping and strategy.startswith("ddp") and not alone:
        raise CellMapValueError(
            f"-m with trainer.strategy={strategy} on {devices} devices: each process would start the whole sweep "
            "again. Use trainer.strategy=ddp_spawn, or hydra/launcher=submitit_slurm, or one job per command"
        )
