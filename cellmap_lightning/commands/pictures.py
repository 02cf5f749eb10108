"""Pictures of a finished training, whose errors are logged and do not fail the run."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.training import report
from cellmap_lightning.training.model_forward import first_line, inputs_of, names_in, predicted_values

log = logging.getLogger(__name__)


def attempt(message: str, work: Callable[[], None]) -> None:
    """Run an optional step of a finished training; an error is logged in one line.

    Args:
        message: start of that line, such as "samples.png is not drawn".
        work: the step, called without arguments.
    """
    try:
        work()
    except Exception as error:  # weights and metric of the run are saved already
        log.warning("%s: %s", message, first_line(error))


def picture_title(name: str | None, folder: Path, source: str) -> str:
    """Return the title of the validation samples of a run.

    Args:
        name: the setting ``name``; None for the name of the folder, within ``runs`` or ``multirun``.
        folder: of the run.
        source: the CSV, folder or setting that lists the crops.
    """
    parts = folder.parts
    roots = [number for number, part in enumerate(parts[:-1]) if part in ("runs", "multirun")]
    within = "/".join(parts[roots[-1] + 1 :]) if roots else folder.name
    return f"{name or within}: validation samples of {PurePath(source).name}"


def draw_samples(task: Any, data: CellMapDataModule, path: Path, title: str) -> dict[str, str]:
    """Draw validation samples, with predictions if the task has a forward that returns them.

    Args:
        task: the LightningModule; its method ``write_samples(source, path, title=...)`` is used if it has one.
        data: the data module with the validation samples.
        path: the PNG to write.
        title: a line at the top.

    Returns:
        The description of the picture, for the list of results, where it has no predictions.
    """
    task.eval()
    if hasattr(task, "write_samples"):  # a task without classes, such as a reconstruction
        attempt(f"{path.name} is not drawn", lambda: task.write_samples(data.val_dataset, path, title=title))
        return {}
    classes = len(data.classes or ())
    names = inputs_of(task, data.input_arrays)
    target = next(iter(names_in(data.target_arrays, getattr(task, "target_name", None))), None)
    failed = classes == 0

    # After the first failure the remaining samples are drawn without predictions, and the error is logged once.
    def predict(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        nonlocal failed
        if not failed:
            try:
                return predicted_values(task, batch, names, classes, target)
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
    return {path.name: "raw and target" if target else "raw"} if failed else {}


def scores_of(task: Any) -> Mapping[str, Mapping[str, float]] | None:
    """Return the scores of each class that a task measured in its last validation, as `SegmentationTask` stores them.

    None for a task without such scores: an attribute ``scores`` of user code may be anything.
    """
    stages = getattr(task, "scores", None)
    scores = stages.get("val") if isinstance(stages, Mapping) else None
    if not isinstance(scores, Mapping):
        return None
    complete = all(isinstance(score, Mapping) and {"dice", "constant"} <= set(score) for score in scores.values())
    return scores if complete else None
