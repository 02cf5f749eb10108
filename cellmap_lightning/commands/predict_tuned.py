"""Thresholds of a prediction from a file of ``cellmap-tune``."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.commands.config_keys import given_keys
from cellmap_lightning.errors import CellMapKeyError
from cellmap_lightning.instances.tuned import read_tuned
from cellmap_lightning.prediction.quantize import DEFAULT_THRESHOLD
from cellmap_lightning.validation import one_of

log = logging.getLogger(__name__)

#: Kinds of targets that are predicted as the probabilities of classes.
_PROBABILITIES = ("binary", "labels", "multiclass")


def use_tuned(configs: Sequence[DictConfig], path: str) -> None:
    """Set the threshold of each class to that of a file, unless the command line sets ``writer.threshold``.

    A prediction has no use for the other parameters, and none for thresholds of affinities, distances and boundaries,
    which is logged.

    Args:
        configs: the configurations of predictions with one model, which are changed.
        path: the file.

    Raises:
        CellMapKeyError: the model does not predict a class of the file.
        CellMapValueError: see `read_tuned`.
    """
    tuned, config = read_tuned(path), configs[0]
    known = [str(name) for name in config.writer.classes or config.data.classes or ()]
    for name in tuned:
        one_of(f"tuned={path}: a class", name, known, CellMapKeyError)
    thresholds = {name: p["threshold"] for name, p in tuned.items() if _of_probabilities(p) and "threshold" in p}
    if not _predicts_probabilities(config):
        thresholds = {}
    _report_unused(path, tuned, thresholds)
    if "writer.threshold" in given_keys():
        log.info("writer.threshold=%s replaces the thresholds of tuned=%s", config.writer.threshold, path)
    elif thresholds:
        for one in configs:
            one.writer.threshold = thresholds
        others = [name for name in known if name not in thresholds]
        log.info(
            "tuned=%s: threshold %s%s", path, ", ".join(f"{value:g} of {name}" for name, value in thresholds.items()),
            f"; {DEFAULT_THRESHOLD:g} of {', '.join(others)}, which it does not have" if others else "",
        )  # fmt: skip


def _report_unused(path: str, tuned: Mapping[str, Mapping[str, Any]], thresholds: Mapping[str, float]) -> None:
    """Log the parameters of a file that a prediction does not use."""
    unused = list(dict.fromkeys(key for parameters in tuned.values() for key in parameters if key != "threshold"))
    unused += [f"threshold of {name}" for name in tuned if name not in thresholds and "threshold" in tuned[name]]
    if unused:
        log.info(
            "tuned=%s: a prediction does not use %s; cellmap-segment and cellmap-submit do", path, ", ".join(unused)
        )


def _predicts_probabilities(config: DictConfig) -> bool:
    data: Any = OmegaConf.to_container(config.data, resolve=True)
    arrays = (data.get("target_arrays") or {"": {}}).values()
    return any(((array or {}).get("kind") or "binary") in _PROBABILITIES for array in arrays)


def _of_probabilities(parameters: Mapping[str, Any]) -> bool:
    """Return whether the threshold among some parameters is that of a probability."""
    affinities = ("mutex_watershed", "agglomeration")
    return parameters.get("kind", "probability") == "probability" and parameters.get("method") not in affinities
