"""Folder of a run, which is resumed or replaced only if the user asks for it."""

import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.commands.file_errors import file_error_message, is_file_error
from cellmap_lightning.commands.messages import stop
from cellmap_lightning.validation import first_few

#: Files that show that a run has started; its configuration and its log alone do not.
_RESULTS = ("*.ckpt", "checkpoints/*.ckpt", "metrics.csv", "metrics.*.csv")
#: Pictures and scores, which a later run may not write again.
_PICTURES = ("curves.png", "samples.png", "scores.json")


def results_in(folder: Path) -> list[Path]:
    """Return the checkpoints and metrics of a run; none if it has not started."""
    return sorted(path for pattern in _RESULTS for path in folder.glob(pattern))


def requeued() -> bool:
    """Return whether Slurm has started this job before."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def remove_run(folder: Path) -> None:
    """Delete checkpoints, metrics and pictures of a run; a requeued job keeps those of its first start."""
    if not requeued():
        for path in [*results_in(folder), *(folder / name for name in _PICTURES)]:
            path.unlink(missing_ok=True)


class KeepRuns(Callback):
    """A callback of Hydra that refuses to start a run in the folder of another, before Hydra writes anything there.

    Every process of a distributed run checks the folder: none writes results before all of them have started.
    ``configs/train.yaml`` uses it; see ``docs/runs.md``.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the folder of a single run."""
        folder = hydra_folder(config, "hydra.run.dir")
        _check(config, folder, results_in(folder))
        _make(folder)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the folders of the jobs of a sweep."""
        folder = hydra_folder(config, "hydra.sweep.dir")
        jobs = sorted(path for path in folder.glob("*") if path.is_dir())
        _check(config, folder, [result for job in jobs for result in results_in(job)])
        _make(folder)


def hydra_folder(config: DictConfig, key: str) -> Path:
    """Return the folder in a key of Hydra's configuration."""
    hydra = HydraConfig.instance()
    previous = hydra.cfg
    hydra.set_config(config)  # the folder may refer to the configuration of Hydra
    try:
        return Path(str(OmegaConf.select(config, key)))
    finally:
        hydra.cfg = previous


def _make(folder: Path) -> None:
    """Make the folder, or exit with an error; Hydra would print a traceback."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if not is_file_error(error):
            raise
        stop(file_error_message(error, folder))


def _check(config: DictConfig, folder: Path, results: list[Path]) -> None:
    """Exit with an error if there are results that the run would neither resume nor replace."""
    resume, overwrite = config.get("resume"), config.get("overwrite")
    if not isinstance(overwrite, bool):
        stop(f"overwrite must be true or false, got {overwrite!r}")
    if overwrite and resume is not None:
        stop(f"overwrite=true and resume={resume} exclude each other: overwrite=true needs resume=null")
    if not results or overwrite or resume == "auto":
        return
    if resume is not None and folder.absolute() in Path(resume).absolute().parents:
        return
    if "SLURM_JOB_ID" in os.environ and any(path.name.startswith("hpc_ckpt_") for path in results):
        return  # Lightning itself resumes from it
    names = first_few([str(path.relative_to(folder)) for path in results])
    stop(
        f"{folder} already holds a run ({names}); resume=auto continues it, overwrite=true replaces it, and another "
        "run.name=... keeps it"
    )


def overrides_of_run(folder: Path) -> str:
    """Return the override by which a command writes to the folder of a run."""
    runs = Path.cwd() / "runs"
    if runs in folder.parents:
        return f"run.name={folder.relative_to(runs)}"
    return f"hydra.run.dir={folder.relative_to(Path.cwd()) if Path.cwd() in folder.parents else folder}"


def how_to_continue(folder: Path, trained: bool, saved: Path | None = None) -> str:
    """Return how to continue a run that was interrupted, for a message.

    Args:
        folder: the run's folder.
        trained: the training is complete.
        saved: a checkpoint that was saved on the interrupt.
    """
    checkpoints = [path for path in results_in(folder) if path.suffix == ".ckpt"]
    name = overrides_of_run(folder)
    if trained:
        final = ", ".join(str(path) for path in checkpoints if path.stem in ("best", "last")) or "no checkpoint"
        return f"the training is complete ({final}); the same command with {name} resume=auto validates and draws"
    if saved is not None:
        return f"saved {saved}; the same command with {name} resume=auto continues from it"
    if checkpoints:
        return f"the same command with {name} resume=auto continues from the newest checkpoint"
    # Metrics of the first steps may be there, which a start without it refuses to replace.
    again = " with overwrite=true" if results_in(folder) else ""
    return f"no checkpoint was saved yet; the same command{again} starts again"
