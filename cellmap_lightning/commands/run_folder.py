"""The folder of a run: it is continued or replaced only where that was asked for."""

import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.commands.common import stop

#: Files that show that a run has begun; its configuration and its log alone do not.
_RESULTS = ("*.ckpt", "checkpoints/*.ckpt", "metrics.csv", "metrics.*.csv")
#: Files of a run that a later one may not write again.
_DRAWN = ("curves.png", "samples.png")


def results_in(folder: Path) -> list[Path]:
    """Return the checkpoints and metrics of a run; none where it has not begun."""
    return sorted(path for pattern in _RESULTS for path in folder.glob(pattern))


def requeued() -> bool:
    """Return whether Slurm has started this job before."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def remove_run(folder: Path) -> None:
    """Delete checkpoints, metrics and pictures of a run; a job that is requeued leaves those of its own first start."""
    if not requeued():
        for path in [*results_in(folder), *(folder / name for name in _DRAWN)]:
            path.unlink(missing_ok=True)


class KeepRuns(Callback):
    """A callback of Hydra that refuses to begin a run in the folder of another, before Hydra writes anything there.

    Every process of a distributed run checks for itself: none writes results before all of them have begun.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the folder of a single run."""
        folder = _folder(config, "hydra.run.dir")
        _check(config, folder, results_in(folder))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the folders of the jobs of a sweep."""
        folder = _folder(config, "hydra.sweep.dir")
        jobs = sorted(path for path in folder.glob("*") if path.is_dir())
        _check(config, folder, [result for job in jobs for result in results_in(job)])


def _folder(config: DictConfig, key: str) -> Path:
    hydra = HydraConfig.instance()
    before = hydra.cfg
    hydra.set_config(config)  # the folder may refer to it
    try:
        return Path(str(OmegaConf.select(config, key)))
    finally:
        hydra.cfg = before


def _check(config: DictConfig, folder: Path, results: list[Path]) -> None:
    resume, overwrite = config.get("resume"), config.get("overwrite")
    if not isinstance(overwrite, bool):
        stop(f"overwrite is true or false, got {overwrite!r}")
    if overwrite and resume is not None:
        stop(f"overwrite=true and resume={resume} exclude each other: overwrite=true needs resume=null")
    if not results or overwrite or resume == "auto":
        return
    if resume is not None and folder.absolute() in Path(resume).absolute().parents:
        return
    if "SLURM_JOB_ID" in os.environ and any(path.name.startswith("hpc_ckpt_") for path in results):
        return  # Lightning itself continues from it
    names = [str(path.relative_to(folder)) for path in results]
    found = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    stop(
        f"{folder} already holds a run ({found}); resume=auto continues it, overwrite=true replaces it, and another "
        "run.name=... keeps it"
    )


def how_to_continue(folder: Path, trained: bool, saved: Path | None = None) -> str:
    """Return how a run that was ended is continued, for a message.

    Args:
        folder: the run's folder.
        trained: the training is complete.
        saved: a checkpoint that was saved when it ended.
    """
    checkpoints = [path for path in results_in(folder) if path.suffix == ".ckpt"]
    runs = Path.cwd() / "runs"
    if runs in folder.parents:
        name = f"run.name={folder.relative_to(runs)}"
    else:
        name = f"hydra.run.dir={folder.relative_to(Path.cwd()) if Path.cwd() in folder.parents else folder}"
    if trained:
        there = ", ".join(str(path) for path in checkpoints if path.stem in ("best", "last")) or "no checkpoint"
        return f"the training is complete ({there}); the same command with {name} resume=auto validates and draws"
    if saved is not None:
        return f"saved {saved}; the same command with {name} resume=auto continues from it"
    if checkpoints:
        return f"the same command with {name} resume=auto continues from the newest checkpoint"
    return "no checkpoint was saved yet; the same command starts again"
