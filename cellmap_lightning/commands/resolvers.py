"""Location of the configurations, and the OmegaConf resolvers that they use."""

import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import ListConfig, OmegaConf

_PACKAGE = Path(__file__).parents[1]
#: Parts of the names of metrics for which lower is better.
_LOWER_IS_BETTER = {"loss", "error", "mae", "mse", "rmse"}
#: Folder of the configurations: inside the package in a wheel, beside it in a checkout.
CONFIGS = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())


def register_resolvers() -> None:
    """Register ``${channels:...}``, ``${run_folder:...}``, ``${classes:...}`` and ``${best_mode:...}``."""
    OmegaConf.register_new_resolver("channels", _channels, replace=True)
    OmegaConf.register_new_resolver("run_folder", run_folder_name, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("classes", _classes, replace=True)
    OmegaConf.register_new_resolver("best_mode", best_mode, replace=True)


def run_folder_name(name: Any) -> str:
    """Return the folder of a run below ``runs``, the same in all processes of the run and in a requeued job."""
    if name is not None:
        return str(name)
    if "SLURM_JOB_ID" in os.environ:
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ["SLURM_JOB_ID"]
        return f"slurm-{job}"
    torchrun = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"torchrun-{torchrun}" if torchrun != "none" else f"{datetime.now():%Y-%m-%d/%H-%M-%S}"


def best_mode(monitor: Any) -> str:
    """Return ``min`` for a metric whose name has a part such as ``loss`` or ``mae``, and ``max`` for any other."""
    return "min" if _LOWER_IS_BETTER & set(re.split(r"[^a-z0-9]+", str(monitor).lower())) else "max"


def _channels(targets: Any, classes: Any, name: Any = None) -> int:
    """Return the number of output channels of a network for one or several targets, by default the first target."""
    from cellmap_lightning.batches.arrays import parse_targets
    from cellmap_lightning.errors import CellMapError

    specs: Any = OmegaConf.to_container(targets, resolve=True) if OmegaConf.is_config(targets) else targets or {}
    count = len(classes or [None])  # without classes the network maps raw to raw: one channel
    names = list(name) if OmegaConf.is_list(name) or isinstance(name, list) else [name]
    if not specs or not classes:
        return count
    try:
        arrays = parse_targets(specs, count)
    except CellMapError:  # the data module raises it, with the name of the setting
        return count
    return sum((arrays.get(n) or next(iter(arrays.values()))).kind.outputs for n in names)


def _classes(path: str, group: str | None = None) -> ListConfig:
    """Return the classes in a file of the challenge, or the parts of one of them."""
    from cellmap_lightning.evaluation.challenge import class_names

    return OmegaConf.create(class_names(path, group))  # of a plain list, OmegaConf.resolve makes an error
