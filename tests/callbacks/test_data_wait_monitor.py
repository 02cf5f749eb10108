"""Wait times are measured, logged per step, and explained once."""

import csv
import logging
import re
import time

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from cellmap_lightning import CellMapDataLoader, datamodule
from cellmap_lightning.batches.layout import BatchLayout
from cellmap_lightning.callbacks import DataWaitMonitor, StreamPrefetch, data_wait_monitor
from cellmap_lightning.loading import dataloader, waiting
from cellmap_lightning.loading.options import LoaderOptions
from cellmap_lightning.training.task import SegmentationTask
from tests.conftest import CLASSES
from tests.runs import module, task, trainer

pytestmark = [pytest.mark.usefixtures("quiet_lightning", "no_threads_left")]


class Clock:
    """A simulated clock, so that the load of the machine does not matter."""

    def __init__(self):
        self.now = 0.0

    def __getattr__(self, name):
        return getattr(time, name)

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    simulated = Clock()
    for module_ in (waiting, data_wait_monitor, dataloader, datamodule):
        monkeypatch.setattr(module_, "time", simulated)
    return simulated


class Slow:
    """A wrapper of a source that adds time to every read."""

    def __init__(self, source, seconds, clock):
        self.read, self.seconds, self.clock = source.read, seconds, clock
        source.read = self

    def __call__(self, draws, pin=False):
        self.clock.sleep(self.seconds)
        return self.read(draws, pin)


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_wait_is_logged_per_step(volume, tmp_path, clock, monkeypatch):
    with module(volume, batches_per_epoch=6) as data:
        data.setup("fit")
        Slow(data.train_dataset, 0.02, clock)
        finish = BatchLayout.finish
        monkeypatch.setattr(BatchLayout, "finish", lambda *given: clock.sleep(0.005) or finish(*given))
        logger = CSVLogger(tmp_path, "", "")
        run = trainer(tmp_path, logger=logger, callbacks=[DataWaitMonitor()], log_every_n_steps=1, limit_val_batches=0)
        run.fit(task(), data)
        assert {"data/wait_s", "data/copy_s"} <= set(run.logged_metrics)
        waits = [float(row["data/wait_s"]) for row in rows(tmp_path) if row["data/wait_s"]]
        copies = [float(row["data/copy_s"]) for row in rows(tmp_path) if row["data/copy_s"]]
    assert len(waits) == len(copies) == 6
    assert waits == pytest.approx([0.02] * 6)
    assert copies == pytest.approx([0.005] * 6)


def test_wait_of_validation_is_excluded(volume, tmp_path, clock):
    with module(volume, batches_per_epoch=4) as data:
        data.setup("fit")
        Slow(data.train_dataset, 0.02, clock)
        Slow(data.val_dataset, 0.3, clock)
        logger = CSVLogger(tmp_path, "", "")
        options = {"val_check_interval": 1, "num_sanity_val_steps": 0, "limit_val_batches": 1, "log_every_n_steps": 1}
        trainer(tmp_path, logger=logger, callbacks=[DataWaitMonitor()], **options).fit(task(), data)
        assert data.waiting.waited == pytest.approx(4 * (0.02 + 0.3))
        waits = [float(row["data/wait_s"]) for row in rows(tmp_path) if row["data/wait_s"]]
    assert waits == pytest.approx([0.02] * 4)


@pytest.mark.parametrize("starving", [True, False])
def test_one_hint_if_the_device_starves(volume, tmp_path, caplog, starving, clock):
    class Steps(L.Callback):
        def on_train_batch_start(self, *_):
            clock.sleep(0.01 if starving else 0.2)

    watch = DataWaitMonitor(hint_after=4)
    with module(volume, batches_per_epoch=12, cache="none") as data:
        data.setup("fit")
        Slow(data.train_dataset, 0.05, clock)
        with caplog.at_level(logging.WARNING, "cellmap_lightning.callbacks.data_wait_monitor"):
            trainer(tmp_path, callbacks=[watch, Steps(), StreamPrefetch()], limit_val_batches=0).fit(task(), data)
    if not starving:
        assert watch.hint is None
        assert not caplog.records
        return
    assert len(caplog.records) == 1
    assert watch.hint == caplog.records[0].getMessage()
    assert "83% of a training step is waiting for data (0.05 of 0.06 s" in watch.hint
    assert "mean of 4 steps" in watch.hint
    assert "cache=auto keeps what was decoded" in watch.hint
    assert "StreamPrefetch does not read ahead (a cpu device has no copies to overlap" in watch.hint
    assert "reader=tensorstore decodes faster" in watch.hint


def test_advice_depends_on_settings(volume, tmp_path):
    hints = {}
    for name, callbacks, options in (
        ("nothing", [], {}),
        ("ahead", [StreamPrefetch(enabled=True, depth=1)], {}),
        ("small", [], {"cache": "memory", "cache_bytes": 20_000}),
        ("tensorstore", [], {"reader": "tensorstore"}),
    ):
        watch = DataWaitMonitor(hint_after=2, hint_above=1e-6)
        with module(volume, batches_per_epoch=6, **options) as data:
            data.setup("fit")
            Slow(data.train_dataset, 0.01, time)
            trainer(tmp_path, callbacks=[watch, *callbacks], limit_val_batches=0).fit(task(), data)
        hints[name] = watch.hint
    assert "StreamPrefetch(enabled=True) reads ahead" in hints["nothing"]
    assert "later epochs wait less" in hints["nothing"]
    assert "a depth above 1 evens out" in hints["ahead"]
    assert "the cache is too small for these crops" in hints["small"]
    assert "tensorstore" in hints["nothing"]
    assert "reader=tensorstore" not in hints["tensorstore"]


@pytest.mark.parametrize("ahead", [False, True])
def test_prefetching_reduces_wait_of_the_step(volume, ahead):
    """While a step computes, the batch after it is read, or nothing is."""
    read = []

    with module(volume, batches_per_epoch=8) as data:
        data.setup("fit")
        real = data.train_dataset.read
        data.train_dataset.read = lambda *given, **named: (real(*given, **named), read.append(1))[0]
        counted = waiting.WaitTimes()
        decision = StreamPrefetch(enabled=True)._decide("train", data.batch_memory(), torch.device("cpu"))
        loader = CellMapDataLoader(
            data.train_dataset,
            2,
            samples_per_epoch=16,
            options=LoaderOptions(decision=decision if ahead else None, waiting=counted),
        )
        end = time.monotonic() + 120
        for number, _ in enumerate(loader):
            while ahead and len(read) < min(number + 2, 8):
                assert time.monotonic() < end
                time.sleep(0.001)
            assert ahead or len(read) == number + 1
        assert len(read) == counted.batches == 8
        assert counted.starved == counted.waited  # a CPU computes nothing while it waits


def test_other_data_modules_are_ignored(tmp_path):
    """Data that counts nothing is left alone."""
    from torch.utils.data import DataLoader

    class Line(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    run = trainer(tmp_path, callbacks=[DataWaitMonitor(), StreamPrefetch()])
    run.fit(Line(), DataLoader(torch.zeros(4, 1), 2))
    assert "data/wait_s" not in run.logged_metrics


class Refuses(CSVLogger):
    """Refuse changed hyperparameters, like MLflow."""

    def __init__(self, *args):
        super().__init__(*args)
        self.logged, self.calls = {}, []

    def log_hyperparams(self, params):
        self.calls.append([*dict(params)])
        for name, value in dict(params).items():
            assert self.logged.setdefault(name, value) == value, name
        super().log_hyperparams(params)


def test_prefetch_settings_are_hyperparameters(volume, tmp_path, caplog):
    """Decisions, which may change between two runs, are in the log."""
    callback = StreamPrefetch(enabled=True)
    logger = Refuses(tmp_path, "", "")
    with module(volume) as data, caplog.at_level(logging.INFO, "cellmap_lightning"):
        run = trainer(tmp_path, logger=logger, callbacks=[callback])
        run.fit(task(), data)
        run.test(task(), data, verbose=False)
        data.batch_size = 1
        run.fit(task(), data)
    logger.save()
    stored = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert {name.partition("/")[2] for name in stored} == {
        "min_batch_mb", "max_streams", "depth", "memory_fraction", "enabled", "max_depth",
    }  # fmt: skip
    assert stored["stream_prefetch/enabled"] is True
    for split in ("train", "val", "test"):
        assert f"stream prefetch for {split}: on, 2 ahead in a thread" in caplog.text


@pytest.mark.parametrize(
    ("stages", "calls"), [(["fit"], 1), (["fit", "validate", "test"], 1), (["validate"], 0), (["fit", "fit"], 2)]
)
def test_prefetch_settings_are_logged_once_per_training_after_the_task(volume, tmp_path, stages, calls):
    logger, model = Refuses(tmp_path, "", ""), task()
    model.save_hyperparameters({"width": 8})
    with module(volume) as data:
        for stage in stages:
            run = trainer(tmp_path, logger=logger, callbacks=[StreamPrefetch()])
            getattr(run, stage)(model, data)
    of_prefetch = [n for n, names in enumerate(logger.calls) if any("stream_prefetch" in name for name in names)]
    assert len(of_prefetch) == calls
    assert all(n > 0 and "width" in logger.calls[n - 1] for n in of_prefetch)


NAMES = ["mito", "er (smooth)", "pm.x"]


def colliding(names):
    """Names that are a folder of others."""
    return [one for one in names if any(other.startswith(f"{one}/") for other in names)]


def test_metric_names_are_valid_for_loggers(volume, tmp_path):
    model = SegmentationTask(nn.Conv3d(1, 3, 3, padding=1), CLASSES)
    model.classes = tuple(NAMES)  # as of other data
    logger = CSVLogger(tmp_path, "", "")
    with module(volume) as data:
        run = trainer(tmp_path, logger=logger, callbacks=[DataWaitMonitor(), StreamPrefetch()], log_every_n_steps=1)
        run.fit(model, data)
        run.test(model, data, verbose=False)
    names = {name for row in rows(tmp_path) for name in row}
    assert {"val/dice", "val/dice_mito", "val/dice_er _smooth_", "val/dice_pm.x", "test/dice"} <= names
    assert colliding(names) == []
    assert colliding(["val/dice", "val/dice/mito"]) == ["val/dice"]
    assert all(re.fullmatch(r"[/\w.\- :]+", name) for name in names)  # MLflow's rule


@pytest.mark.filterwarnings("ignore")
def test_mlflow(volume, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger("cellmap", tracking_uri=f"file:{tmp_path}/mlruns")
    with module(volume) as data:
        run = trainer(
            tmp_path, logger=logger, callbacks=[DataWaitMonitor(), StreamPrefetch(enabled=True)], log_every_n_steps=1
        )
        run.fit(task(), data)
        data.batch_size = 1
        run.fit(task(), data)
    written = {str(p.relative_to(p.parents[1])) for p in (tmp_path / "mlruns").rglob("metrics/*/*")}
    assert {"val/dice", "val/dice_mito", "val/dice_er", "val/loss"} <= written
