"""The lines of a training without a progress bar, and the final validation, which is no point of the curves."""

import csv
import logging
import re

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from cellmap_lightning.commands.epoch_lines import WIDTH, EpochLines, epoch_line
from cellmap_lightning.visualization.figures.metrics import Metrics
from tests.commands.test_cli import run_forked, small
from tests.runs import module, task, trainer

pytestmark = pytest.mark.usefixtures("quiet_lightning")


class Losses(L.Callback):
    """Collects the losses of each epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append([])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.epochs[-1].append(float(outputs["loss"]))


def lines(volume, tmp_path, caplog, monitor="val/loss", **kwargs):
    """Train two epochs of three batches; return the lines, and the losses of each epoch."""
    losses = Losses()
    given = {"max_epochs": 2, "limit_val_batches": 1, "callbacks": [losses, EpochLines(monitor)]}
    with module(volume) as data, caplog.at_level(logging.INFO, "cellmap_lightning.commands.epoch_lines"):
        given["callbacks"] += kwargs.pop("more", [])
        trainer(tmp_path, **(given | kwargs)).fit(task(), data)
    texts = [r.getMessage() for r in caplog.records if r.name == "cellmap_lightning.commands.epoch_lines"]
    return texts, [sum(epoch) / len(epoch) for epoch in losses.epochs]


@pytest.mark.parametrize(
    ("kwargs", "epochs", "scored"),
    [
        ({}, ["1/2", "2/2"], [True, True]),
        ({"max_epochs": 3, "check_val_every_n_epoch": 2}, ["1/3", "2/3", "3/3"], [False, True, False]),
        ({"limit_val_batches": 0}, ["1/2", "2/2"], [False, False]),
        ({"max_epochs": -1, "max_steps": 6}, ["1", "2"], [True, True]),
        ({"monitor": "val/none"}, ["1/2", "2/2"], [False, False]),
    ],
    ids=["each epoch", "second epoch", "never", "steps", "another metric"],
)
def test_each_epoch_has_a_line(volume, tmp_path, caplog, kwargs, epochs, scored):
    texts, losses = lines(volume, tmp_path, caplog, **kwargs)
    assert len(texts) == len(losses) == len(epochs)
    for number, text in enumerate(texts):
        score = r", val/loss [\d.e-]+" if scored[number] else ""
        start = f"epoch {epochs[number]} (step {3 * number + 3}): loss {losses[number]:.3g}"
        assert re.fullmatch(rf"{re.escape(start)}{score}, \d+ s", text)


@pytest.mark.parametrize(("enabled", "count"), [(True, 0), (False, 2)])
def test_a_progress_bar_takes_their_place(volume, tmp_path, caplog, enabled, count):
    bar = TQDMProgressBar()
    if not enabled:
        bar.disable()
    texts, _ = lines(volume, tmp_path, caplog, enable_progress_bar=True, more=[bar])
    assert len(texts) == count


@pytest.mark.parametrize(
    "monitor", ["val/dice", "val/dice_endoplasmic_reticulum_membrane_and_lumen", "val/iou_" + 50 * "a"]
)
@pytest.mark.parametrize("steps", [7, 12_345_678])
def test_lines_are_short(monitor, steps):
    line = epoch_line("1000/1000", steps, 1.234e-05, monitor, torch.tensor(0.98765), 9000)
    assert len(line) <= WIDTH
    assert line.endswith(f"{monitor[-2:]} 0.988, 9000 s")
    assert (monitor in line) == (monitor == "val/dice" and steps == 7)


@pytest.mark.parametrize(
    ("more", "points"),
    [
        (["monitor=val/loss", "callbacks.checkpoint.mode=max"], [2, 5]),
        (["callbacks=none_of_them", "trainer.enable_checkpointing=false"], [2, 5]),
        (["trainer.check_val_every_n_epoch=3"], [6]),
    ],
    ids=["best weights", "last weights", "no validation before"],
)
def test_the_final_validation_is_no_second_point_of_the_curves(volume, tmp_path, more, points):
    (tmp_path / "mine" / "callbacks").mkdir(parents=True)
    (tmp_path / "mine" / "callbacks" / "none_of_them.yaml").write_text("nothing: null\n")
    command = ["--config-dir", "mine", *small(volume, "hydra.run.dir=out", "compare_untrained=false", *more)]
    code, text = run_forked(*command, cwd=tmp_path)
    assert code == 0, text
    assert len(re.findall(r"^\d\d:\d\d:\d\d INFO epoch [12]/2 \(step [36]\): loss .*$", text, re.MULTILINE)) == 2
    with (tmp_path / "out" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    metrics = Metrics(tmp_path / "out" / "metrics.csv")
    assert metrics.series("val/loss").steps.tolist() == metrics.series("val/dice").steps.tolist() == points
    final = [float(row["final_val/loss"]) for row in rows if row.get("final_val/loss")]
    assert len(final) == (points == [2, 5])
    assert np.isfinite(final).all()
