"""Batches of the data module on their way to the step: compact, copied ahead, finished."""

import gc
import logging
import threading

import lightning as L
import pytest
import torch
from torch import nn

from cellmap_lightning import CellMapDataModule, CellMapError
from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.callbacks import StreamPrefetch
from cellmap_lightning.loading.prefetch import ReadAhead
from cellmap_lightning.training.task import SegmentationTask
from tests.conftest import CLASSES, reading_threads
from tests.runs import Watch, module, task, trainer

pytestmark = pytest.mark.usefixtures("quiet_lightning")


@pytest.fixture
def data(volume):
    with module(volume) as data:
        yield data
    assert reading_threads() == []


def test_steps_see_finished_batches(data, tmp_path):
    watch = Watch()
    trainer(tmp_path, callbacks=[watch, StreamPrefetch()]).fit(task(), data)
    assert len(watch.batches) == 2 + 3 + 2  # sanity check, training, validation
    for batch in watch.batches:
        assert list(batch) == ["raw", "labels", "idx"]
        assert batch["raw"].dtype == batch["labels"].dtype == torch.float32
        assert not batch["raw"].isnan().any()
        assert data.batch_memory().total_bytes == batch["raw"].nbytes + batch["labels"].nbytes


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_compact_batches_are_finished_in_the_transfer(volume, tmp_path, precision, monkeypatch):
    """To an accelerator batches are transferred compact; the same path is taken on a CPU declared as one."""
    monkeypatch.setattr("cellmap_lightning.loading.delivery.STREAM_DEVICES", ("cpu",))
    delivered, seen = [], []

    transfer = CellMapDataModule.transfer_batch_to_device

    def watched(data, batch, device, dataloader_idx):
        delivered.append(type(batch))
        return transfer(data, batch, device, dataloader_idx)

    monkeypatch.setattr(CellMapDataModule, "transfer_batch_to_device", watched)

    class Own(SegmentationTask):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            seen.append({n: (t.dtype, tuple(t.shape)) for n, t in batch.items()})
            return batch

    with module(volume) as data:
        model = Own(nn.Conv3d(1, 3, 3, padding=1), CLASSES)
        trainer(tmp_path, precision=precision).fit(model, data)
    assert set(delivered) == {CompactBatch}
    expected = {"bf16-true": torch.bfloat16, "64-true": torch.float64, "bf16-mixed": torch.float32}[precision]
    assert seen[0] == {
        "raw": (expected, (2, 1, 8, 16, 24)),
        "labels": (expected, (2, 3, 8, 16, 24)),
        "idx": (torch.int64, (2,)),
    }


def test_the_stream_decision_is_made_for_each_loader(data, tmp_path, caplog):
    callback = StreamPrefetch()
    with caplog.at_level(logging.DEBUG, "cellmap_lightning.callbacks.stream_prefetch"):  # off on a CPU is no news
        trainer(tmp_path, callbacks=[callback]).fit(task(), data)
    assert set(callback.decisions) == {"train", "val"}
    assert not any(d.enabled for d in callback.decisions.values())
    assert caplog.text.count("stream prefetch for train: off, a cpu device has no copies to overlap") == 1


def test_the_thresholds_come_from_arguments_or_the_environment(monkeypatch):
    assert StreamPrefetch().settings.min_batch_mb == 100
    assert StreamPrefetch().settings.max_streams == 8
    monkeypatch.setenv("MIN_BATCH_MEMORY_FOR_STREAMS_MB", "50")
    monkeypatch.setenv("MAX_CONCURRENT_CUDA_STREAMS", "2")
    assert (StreamPrefetch().settings.min_batch_mb, StreamPrefetch().settings.max_streams) == (50, 2)
    assert StreamPrefetch(min_batch_mb=10).settings.min_batch_mb == 10
    monkeypatch.setenv("MIN_BATCH_MEMORY_FOR_STREAMS_MB", "much")
    with pytest.raises(CellMapError, match="MIN_BATCH_MEMORY_FOR_STREAMS_MB must be a number, got 'much'"):
        StreamPrefetch()


def test_batches_are_copied_ahead_by_the_decision(volume, tmp_path, monkeypatch):
    """A stand-in for the device's copy engine under a real Trainer: order, threads, and what the steps see."""
    log = []

    class Engine(ReadAhead):
        def __init__(self, device):
            super().__init__()

        def bind(self):
            log.append(("bind", threading.current_thread().name))

        def copy(self, batch):
            log.append(("copy", threading.current_thread().name))
            return (batch,)

        def acquire(self, batch):
            log.append(("acquire", threading.current_thread().name))
            return batch

    for module_ in ("loading.delivery", "loading.prefetch", "loading.dataloader"):
        monkeypatch.setattr(f"cellmap_lightning.{module_}.STREAM_DEVICES", ("cpu",))
    monkeypatch.setattr("cellmap_lightning.loading.dataloader.NoPrefetch", lambda device: ReadAhead())
    monkeypatch.setattr("cellmap_lightning.loading.dataloader.SideStream", Engine)
    ahead, plain = Watch(), Watch()
    with module(volume) as data:
        callback = StreamPrefetch(min_batch_mb=0)
        run = trainer(tmp_path, callbacks=[ahead, callback])
        run.fit(task(), data)
        run.test(task(), data, verbose=False)
        assert callback.decisions["train"].enabled
    with module(volume) as data:
        trainer(tmp_path, callbacks=[plain]).fit(task(), data)
    assert {thread for what, thread in log if what != "acquire"} == {"cellmap-copy_0"}
    assert {thread for what, thread in log if what == "acquire"} == {"MainThread"}
    for a, b in zip(ahead.batches, plain.batches, strict=True):
        assert torch.equal(a["raw"], b["raw"])
    gc.collect()
    assert reading_threads() == []


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_float_raw_is_finished_before_it_is_rounded(tmp_path, precision, monkeypatch):
    """Lightning converts floats to the model's precision before the transfer: 70,000 would be infinite in float16."""
    import numpy as np

    from cellmap_lightning.io.writer import write_multiscale

    raw = (70_000 + 1000 * np.random.default_rng(0).random((8, 8, 8))).astype(np.float32)
    write_multiscale(tmp_path / "raw", raw, scale=(8, 8, 8), translation=(0, 0, 0), levels=1)
    monkeypatch.setattr("cellmap_lightning.loading.delivery.STREAM_DEVICES", ("cpu",))
    seen = []

    class Look(L.LightningModule):
        def predict_step(self, batch, batch_idx):
            seen.append(batch["raw"].float())
            return batch["idx"]

    spec = {"raw": {"shape": [8, 8, 8], "scale": [8, 8, 8]}}
    with CellMapDataModule(
        None, spec, datasets={"predict": [{"raw": str(tmp_path / "raw")}]}, normalize={"range": [70_000, 71_000]}
    ) as data:
        trainer(tmp_path, precision=precision).predict(Look(), data)
    torch.testing.assert_close(seen[0][0, 0], torch.from_numpy((raw - 70_000) / 1000), atol=4e-3, rtol=0)


def test_loaders_outside_a_running_trainer_finish_their_batches(data, tmp_path, monkeypatch):
    monkeypatch.setattr("cellmap_lightning.loading.delivery.STREAM_DEVICES", ("cpu",))
    trainer(tmp_path, callbacks=[StreamPrefetch()]).fit(task(), data)
    assert not isinstance(next(iter(data.val_dataloader())), CompactBatch)
    assert data.prefetch is None  # another Trainer may come without the callback
