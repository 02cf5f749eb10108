"""The pictures that a training leaves: none of them can fail the run."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.training import report
from cellmap_lightning.training.model_forward import class_probabilities, first_line, names_in

log = logging.getLogger(__name__)


def attempt(what: str, work: Callable[[], None]) -> None:
    """Do what a finished training can do without; an error is one line of the log.

    Args:
        what: begins that line, such as "samples.png is not drawn".
        work: called without arguments.
    """
    try:
        work()
    except Exception as error:  # the weights are saved, and the metric is measured
        log.warning("%s: %s", what, first_line(error))


def draw_samples(task: Any, data: CellMapDataModule, path: Path, title: str) -> None:
    """Draw validation samples with predictions; without them where the task gives none.

    Args:
        task: the LightningModule; one with ``write_samples(source, path, title=...)`` draws its own picture.
        data: where the samples come from.
        path: the PNG to write.
        title: a line at the top.
    """
    task.eval()
    if hasattr(task, "write_samples"):  # a task that does not mark classes has pictures of its own
        attempt(f"{path.name} is not drawn", lambda: task.write_samples(data.val_dataset, path, title=title))
        return
    classes = len(data.classes or ())
    names = names_in(data.input_arrays, getattr(task, "input_name", None))
    target = next(iter(names_in(data.target_arrays, getattr(task, "target_name", None))), None)
    failed = classes == 0

    def predict(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        nonlocal failed
        if not failed:
            try:
                return class_probabilities(task, batch, names, classes)
            except Exception as error:
                failed = True
                log.warning("%s shows no predictions: %s", path.name, first_line(error))
        return None

    attempt(
        f"{path.name} is not drawn",
        lambda: report.write_samples(
            data.val_dataset, predict, path, title=title, input_name=names[0], target_name=target
        ),
    )


def scores_of(task: Any) -> Mapping[str, Mapping[str, float]] | None:
    """Return the scores of each class that a task measured in its last validation, as `SegmentationTask` keeps them."""
    scores = getattr(task, "scores", None)
    found = scores.get("val") if isinstance(scores, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    whole = all(isinstance(score, Mapping) and {"dice", "constant"} <= set(score) for score in found.values())
    return found if whole else None
