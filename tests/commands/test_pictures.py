"""Trainings succeed with models whose predictions cannot be drawn."""

import re
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from cellmap_lightning.callbacks import BatchPreview
from cellmap_lightning.commands.pictures import attempt, draw_samples, picture_title
from cellmap_lightning.training.model_forward import class_probabilities, inputs_of
from cellmap_lightning.training.report import write_curves
from tests.commands.test_cli import run_forked, small
from tests.runs import module, trainer

pytestmark = [
    pytest.mark.usefixtures("quiet_lightning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


class Plain(L.LightningModule):
    """A task of user code, independent of this package."""

    def __init__(self, classes=("mito", "er"), **kwargs):
        super().__init__()
        self.classes = list(classes)
        self.conv = nn.Conv3d(1, len(self.classes), 3, padding=1)

    def logits(self, batch):
        return self.conv(batch["raw"])

    def training_step(self, batch, batch_idx):
        loss = self.logits(batch).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/dice", self.logits(batch).float().mean(), batch_size=len(batch["idx"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class WithoutForward(Plain):
    pass


class OfTheBatch(Plain):
    def forward(self, batch):
        return self.logits(batch)


class OfTheInput(Plain):
    def forward(self, raw):
        return self.conv(raw)


class Pairs(Plain):
    def forward(self, raw):
        return raw.mean(), self.conv(raw)


class Mapped(Plain):
    def forward(self, raw):
        return {"features": raw, "logits": self.conv(raw)}


class Halves(Plain):
    def forward(self, raw):
        return self.conv(raw)[..., ::2]


class Channels(Plain):
    def forward(self, raw):
        return self.conv(raw).repeat(1, 3, 1, 1, 1)


class Raises(Plain):
    def forward(self, raw):
        raise RuntimeError("not for pictures\nnor for anything else")


class OtherScores(OfTheInput):
    """A task whose attributes have the same names with other meanings."""

    input_name = "image"
    scores = (1, 2, 3)


#: What is logged of each, if anything.
KINDS = {
    WithoutForward: "samples.png shows no predictions: WithoutForward has no forward",
    OfTheBatch: None,
    OfTheInput: None,
    Pairs: None,
    Mapped: None,
    Halves: r"samples.png shows no predictions: Halves: forward .* \[1, 2, 8, 16, 16\].*\[1, 2, 8, 16, 8\]",
    Channels: r"samples.png shows no predictions: Channels: forward must return .* got \[1, 6, 8, 16, 16\]",
    Raises: "samples.png shows no predictions: RuntimeError: not for pictures$",
    OtherScores: None,
}


def train(volume, tmp_path, *more):
    code, output = run_forked(*small(volume, "trainer.max_epochs=1", "hydra.run.dir=out", *more), cwd=tmp_path)
    assert code == 0, output
    assert "Traceback" not in output
    for name in ("samples.png", "curves.png", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (tmp_path / "out" / name).exists(), (name, output)
    assert "results in" in output
    return output


ALWAYS = (WithoutForward, OfTheBatch, Mapped, Halves)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in ALWAYS else pytest.mark.slow, id=kind.__name__) for kind in KINDS],
)
def test_training_succeeds_with_any_module(volume, tmp_path, kind):
    """The picture has at least raw and targets, and the sweeper receives the metric."""
    output = train(
        volume, tmp_path, f"task._target_={__name__}.{kind.__name__}", "callbacks.batch_preview.every_n_epochs=1"
    )
    lines = [line for line in output.splitlines() if "samples.png shows" in line or "is not drawn" in line]
    assert ("raw, target and prediction" in output) == (KINDS[kind] is None)
    if KINDS[kind] is None:
        assert lines == []
    else:
        assert re.search(r"samples.png +raw and target$", output, re.MULTILINE)
        assert len(lines) == 1
        assert re.search(KINDS[kind], lines[0]), lines
    assert len(re.findall("BatchPreview: the pictures show no predictions", output)) == (KINDS[kind] is not None)
    assert (tmp_path / "out/previews/train-epoch0000.png").exists()


@pytest.mark.cover(1)
@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed", pytest.param("16-true")])
@pytest.mark.parametrize("task", ["segmentation", "reconstruction"])
def test_samples_are_drawn_at_every_precision(volume, tmp_path, precision, task):
    more = ["task=reconstruction", "monitor=val/loss", "callbacks.checkpoint.mode=min", "model.out_channels=1"]
    output = train(
        volume, tmp_path, f"trainer.precision={precision}", "callbacks.batch_preview.every_n_epochs=1",
        *(more if task == "reconstruction" else []),
        # In float16 the default of 1e-8 is 0, and divides by 0.
        *(["+task.optimizer.eps=1e-4"] if precision == "16-true" else []),
    )  # fmt: skip
    assert "is not drawn" not in output
    assert "samples.png shows no" not in output


def test_class_probabilities_select_the_matching_output(volume):
    batch = {"raw": torch.rand(2, 1, 4, 4, 4)}
    expected = None
    for kind in (OfTheInput, OfTheBatch, Pairs, Mapped):
        torch.manual_seed(0)
        result = class_probabilities(kind(), batch, ["raw"], 2)
        expected = result if expected is None else expected
        assert result.shape == (2, 2, 4, 4, 4)
        assert torch.equal(result, expected)


class TwoInputs(Plain):
    """A network with a context, whose voxels it shifts the logits by."""

    def two(self, raw, context):
        return self.conv(raw) + context.mean()

    def logits(self, batch):
        return self.two(batch["raw"], batch["context"])

    def forward(self, raw, context):
        return self.two(raw, context)


class OtherOrder(TwoInputs):
    def forward(self, context, raw):
        return self.two(raw, context)


class OtherNames(TwoInputs):
    def forward(self, x, wide):
        return self.two(x, wide)


class KeywordOnly(TwoInputs):
    def forward(self, raw, *, context=None):
        return self.two(raw, context)


class Any(TwoInputs):
    def forward(self, *inputs):
        return self.two(*inputs)


class Default(TwoInputs):
    def forward(self, raw, scale=1.0):
        return self.conv(raw) * scale


class ContextAlone(TwoInputs):
    def forward(self, context):
        return self.conv(context)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (TwoInputs, ["raw", "context"]), (OtherOrder, ["raw", "context"]), (OtherNames, ["raw", "context"]),
        (KeywordOnly, ["raw", "context"]), (Any, ["raw", "context"]), (Default, ["raw"]), (ContextAlone, ["context"]),
        (OfTheInput, ["raw"]), (OfTheBatch, ["raw"]),
    ],
)  # fmt: skip
def test_forward_gets_the_inputs_that_it_takes(kind, names):
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.rand(2, 1, 4, 4, 4, generator=generator) * size for name, size in [("raw", 1), ("context", 9)]}
    torch.manual_seed(0)
    task = kind()
    assert inputs_of(task, ["raw", "context"]) == names
    logits = {Default: task.conv(batch["raw"]), ContextAlone: task.conv(batch["context"])}.get(kind)
    if logits is None:
        logits = task.logits(batch) if isinstance(task, TwoInputs) else task.conv(batch["raw"])
    torch.testing.assert_close(class_probabilities(task, batch, names, 2), logits.sigmoid())


def test_names_of_a_task_come_first():
    task = TwoInputs()
    task.input_name = "context"
    assert inputs_of(task, ["raw", "context"]) == ["context"]
    assert inputs_of(task, ["raw", "context"], ["raw"]) == ["raw"]
    task.input_name = "other"  # another meaning
    assert inputs_of(task, ["raw", "context"]) == ["raw", "context"]


@pytest.mark.parametrize("kind", [TwoInputs, pytest.param(OtherOrder, marks=pytest.mark.slow)])
def test_samples_of_two_inputs_have_predictions(volume, tmp_path, kind):
    output = train(
        volume, tmp_path, f"task._target_={__name__}.{kind.__name__}", "callbacks.batch_preview.every_n_epochs=1",
        "+data.input_arrays.context={shape: [8, 16, 16], scale: [16, 16, 16]}",
    )  # fmt: skip
    assert "no predictions" not in output
    assert "raw, target and prediction" in output
    assert "the scores of the final validation" in output


class Unwritable(Plain):
    """A task that draws its pictures itself, and cannot."""

    def write_samples(self, source, path, title):
        raise OSError(f"no room for {path.name}\nat all")


def test_a_run_whose_pictures_fail_has_its_results(volume, tmp_path):
    given = small(volume, "trainer.max_epochs=1", "hydra.run.dir=out", f"task._target_={__name__}.Unwritable")
    code, output = run_forked(*given, cwd=tmp_path)
    assert code == 0, output
    lines = [line for line in output.splitlines() if "is not drawn" in line]
    assert len(lines) == 1
    assert lines[0].endswith("samples.png is not drawn: OSError: no room for samples.png")
    assert (tmp_path / "out/curves.png").exists()
    assert "val/dice" in (tmp_path / "out/scores.json").read_text()


@pytest.mark.parametrize("kind", [Unwritable, OfTheInput, WithoutForward])
def test_pictures_that_cannot_be_written_are_one_line(volume, tmp_path, caplog, kind):
    """Of a task's own method, and of a file in whose place a folder is, with predictions and without."""
    (tmp_path / "samples.png").mkdir()
    with module(volume) as data:
        data.setup("fit")
        draw_samples(kind(["mito", "er", "pm"]), data, tmp_path / "samples.png", "title")
    lines = [r.message for r in caplog.records if "is not drawn" in r.message]
    assert len(lines) == 1
    assert lines[0].startswith("samples.png is not drawn: ")
    assert [*(tmp_path / "samples.png").iterdir()] == []


def test_damaged_metrics_do_not_fail_a_run(tmp_path, caplog):
    (tmp_path / "metrics.csv").write_bytes(b"\xff\xfe\x00 no table")
    attempt("curves.png is not drawn", lambda: write_curves(tmp_path, ["mito"]))
    assert [r.message.partition(":")[0] for r in caplog.records] == ["curves.png is not drawn"]


def test_failing_picture_does_not_fail_training(volume, tmp_path, caplog, monkeypatch):
    def fails(*_, **__):
        raise OSError("no room\nat all")

    monkeypatch.setattr("cellmap_lightning.callbacks.preview.contact_sheet", fails)
    with module(volume) as data:
        trainer(tmp_path, max_epochs=3, callbacks=[BatchPreview()], limit_val_batches=0).fit(
            OfTheInput(["mito", "er", "pm"]), data
        )
    assert [r.message for r in caplog.records if "BatchPreview" in r.message] == [
        "BatchPreview: a batch is not drawn: OSError: no room"
    ]


@pytest.mark.parametrize(
    ("name", "folder", "source", "title"),
    [
        (None, "w/runs/2026-01-31/10-00-00", "data/crops.csv", "2026-01-31/10-00-00: validation samples of crops.csv"),
        (None, "w/multirun/first/3", "crops.csv", "first/3: validation samples of crops.csv"),
        (None, "out", "crops.csv", "out: validation samples of crops.csv"),
        ("mito", "w/runs/first", "/somewhere/challenge", "mito: validation samples of challenge"),
        ("mito", "w/runs/first", "datasets", "mito: validation samples of datasets"),
    ],
)
def test_the_title_names_the_run_and_the_data(name, folder, source, title):
    assert picture_title(name, Path(folder), source) == title
