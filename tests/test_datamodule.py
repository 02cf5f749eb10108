import csv
import gc
import logging
import pickle
import threading
import warnings
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from cellmap_lightning import CellMapError
from cellmap_lightning.callbacks import CheckpointConfig
from cellmap_lightning.training.task import SegmentationTask
from tests.conftest import CLASSES, INPUTS, TARGETS, reading_threads
from tests.runs import GT, Watch, module, task, trainer

pytestmark = pytest.mark.usefixtures("quiet_lightning")


@pytest.fixture
def data(volume):
    with module(volume) as data:
        yield data
    assert reading_threads() == []


def test_fit_validate_test_predict_fit_on_one_module(volume, tmp_path):
    """The same datasets and the same executor objects through every stage; nothing left after close."""
    data = module(volume)
    run = trainer(tmp_path)
    model = task()
    run.fit(model, data)
    train, val = data.train_dataset, data.val_dataset
    executors = train.executor, val.executor
    assert any(name.startswith("cellmap") for name in reading_threads())
    run.validate(model, data, verbose=False)
    run.test(model, data, verbose=False)
    predictions = trainer(tmp_path, limit_predict_batches=2).predict(model, data)
    run.fit_loop.max_epochs = 2
    run.fit(model, data)
    assert (data.train_dataset, data.val_dataset) == (train, val)
    assert (data.train_dataset.executor, data.val_dataset.executor) == executors
    assert predictions[0].shape == (2, 3, 8, 16, 24)
    assert 0 <= predictions[0].min() <= predictions[0].max() <= 1
    data.close()
    assert reading_threads() == []
    assert model.scores["val"].keys() <= set(CLASSES)
    assert model.scores["test"]


def test_failing_step_leaves_no_thread(volume, tmp_path):
    class Fails(SegmentationTask):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("the step failed")

    data = module(volume)
    with pytest.raises(RuntimeError, match="the step failed"):
        trainer(tmp_path).fit(Fails(nn.Conv3d(1, 3, 1), CLASSES), data)
    assert reading_threads() == []
    train = data.train_dataset
    trainer(tmp_path).fit(task(), data)  # and it continues
    assert data.train_dataset is train
    data.close()
    assert reading_threads() == []


def test_ctrl_c_cancels_queued_reads(volume, tmp_path, monkeypatch):
    """Lightning ends the process without calling teardown; `on_exception` is what is left."""

    class Interrupted(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            hold.acquire()
            pool = trainer.datamodule.train_dataset._pool
            # Both reading threads are busy and more is queued when Ctrl-C comes.
            self.futures = [pool.executor.submit(hold.acquire) for _ in range(2)]
            self.futures += [pool.executor.submit(print, "never") for _ in range(3)]
            pool._queued.update(dict.fromkeys(self.futures, threading.get_ident()))
            raise KeyboardInterrupt

    monkeypatch.setattr("cellmap_lightning.runtime.thread_pool.PATIENCE", 0.2)  # running reads cannot be interrupted
    hold = threading.Semaphore(1)
    callback = Interrupted()
    data = module(volume, max_workers=2)
    with pytest.raises(SystemExit):
        trainer(tmp_path, callbacks=[callback]).fit(task(), data)
    assert all(f.cancelled() for f in callback.futures[2:])
    hold.release(2)
    data.close()
    assert reading_threads() == []


def test_garbage_collection_ends_the_threads(volume, tmp_path):
    data = module(volume)
    trainer(tmp_path).fit(task(), data)
    assert reading_threads()
    del data
    for _ in range(3):
        gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("cellmap"):
            thread.join(120)
    assert reading_threads() == []


def test_two_modules_at_once(volume, tmp_path):
    with module(volume) as one, module(volume) as two:
        trainer(tmp_path).fit(task(), one)
        trainer(tmp_path).fit(task(), two)
        assert one.train_dataset.executor is not two.train_dataset.executor


def test_worker_processes_under_a_trainer(volume, tmp_path):
    watch, direct = Watch(), Watch()
    with module(volume, num_workers=1, multiprocessing_context="fork") as data:
        trainer(tmp_path, callbacks=[watch], limit_val_batches=0).fit(task(), data)
    with module(volume) as data:
        trainer(tmp_path, callbacks=[direct], limit_val_batches=0).fit(task(), data)
    assert len(watch.batches) == 3
    for a, b in zip(watch.batches, direct.batches, strict=True):
        assert all(torch.equal(a[n].nan_to_num(-1), b[n].nan_to_num(-1)) for n in a)


def test_lightning_does_not_recommend_workers(data, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path).fit(task(), data)
        trainer(tmp_path).validate(task(), data)
        trainer(tmp_path).predict(task(), data)
    assert not [w.message for w in caught if "does not have many workers" in str(w.message)]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"overfit_batches": 2},
        {"limit_train_batches": 1, "limit_val_batches": 1},
        {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2},
        {"accumulate_grad_batches": 2},
        {"val_check_interval": 1},
        {"fast_dev_run": True},
    ],
    ids=lambda k: next(iter(k)),
)
def test_trainer_options(data, tmp_path, kwargs):
    trainer(tmp_path, **kwargs).fit(task(), data)


def test_overfit_batches_repeat(data, tmp_path):
    class Trained(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append(batch["idx"].tolist())

    trained = Trained()
    trainer(tmp_path, callbacks=[trained], overfit_batches=1, max_epochs=3).fit(task(), data)
    assert len(trained.seen) == 3
    assert trained.seen[0] == trained.seen[1] == trained.seen[2]


def test_epochs_differ_and_are_reproducible(volume, tmp_path):
    seen = []
    for _ in range(2):
        watch = Watch()
        with module(volume) as data:
            trainer(tmp_path, callbacks=[watch], max_epochs=2, limit_val_batches=0).fit(task(), data)
        seen.append([b["idx"].tolist() for b in watch.batches])
    assert seen[0] == seen[1]
    assert len(seen[0]) == 6
    assert seen[0][:3] != seen[0][3:]


def test_validation_is_the_same_each_time(data, tmp_path):
    watch = Watch()
    run = trainer(tmp_path, callbacks=[watch])
    run.validate(task(), data, verbose=False)
    run.validate(task(), data, verbose=False)
    half = len(watch.batches) // 2
    assert sum(len(b["idx"]) for b in watch.batches[:half]) == data.val_dataset.tile_count
    for a, b in zip(watch.batches[:half], watch.batches[half:], strict=True):
        assert torch.equal(a["raw"], b["raw"])


def test_the_batch_size_finder_changes_the_loaders(data, tmp_path):
    watch = Watch()
    finder = L.pytorch.callbacks.BatchSizeFinder("power", steps_per_trial=1, init_val=2, max_trials=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, callbacks=[finder, watch], limit_val_batches=0).fit(task(), data)
    assert data.batch_size == 4
    assert len(watch.batches[-1]["idx"]) == 4


def test_the_learning_rate_finder_tries_rates(volume, data, tmp_path):
    class Rate(SegmentationTask):
        lr = 1e-3

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    model = Rate(nn.Conv3d(1, 3, 1), CLASSES)
    finder = L.pytorch.callbacks.LearningRateFinder(num_training_steps=4, early_stop_threshold=None)
    watch = Watch()
    run = trainer(tmp_path, callbacks=[finder, watch], limit_val_batches=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(model, data)
    assert finder.optimal_lr.results["lr"] == pytest.approx([1e-8, 1e-4, 1e-2])
    assert run.optimizers[0].param_groups[0]["lr"] == model.lr
    # The training sees what it sees without the search.
    plain = Watch()
    with module(volume) as again:
        trainer(tmp_path, callbacks=[plain], limit_val_batches=0).fit(task(), again)
    assert [b["idx"].tolist() for b in watch.batches[-3:]] == [b["idx"].tolist() for b in plain.batches]


def test_the_csv_logger_has_the_metrics(data, tmp_path):
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    trainer(tmp_path, logger=logger, log_every_n_steps=1).fit(task(), data)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        assert {"step", "epoch", "train/loss", "val/loss", "val/dice"} <= set(next(csv.reader(file)))


def test_the_tensorboard_logger_has_the_metrics(data, tmp_path):
    if not (find_spec("tensorboard") or find_spec("tensorboardX")):
        pytest.skip("neither tensorboard nor tensorboardX is installed")
    logger = L.pytorch.loggers.TensorBoardLogger(tmp_path)
    trainer(tmp_path, logger=logger, log_every_n_steps=1).fit(task(), data)
    (events,) = Path(logger.log_dir).glob("events.out.tfevents.*")
    assert b"val/dice" in events.read_bytes()


def test_compiled_network_learns_the_same(volume, tmp_path):
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("dynamo does not know this Python")
    compiled, plain = task(), task()
    start = plain.network.weight.detach().clone()
    graphs = []
    compiled.network = torch.compile(compiled.network, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for model in (compiled, plain):
        with module(volume) as data:
            trainer(tmp_path, limit_val_batches=1).fit(model, data)
    assert graphs
    assert not torch.equal(plain.network.weight, start)
    torch.testing.assert_close(compiled.network.weight, plain.network.weight)


def test_split_without_crops(volume):
    entry = {"raw": volume.raw_path, "gt": f"{volume.path}/{GT}/crop2/[mito,er,pm]"}
    with module(volume, datasets={"train": [entry]}) as data:
        data.setup("fit")
        data.setup("test")
        with pytest.raises(KeyError, match="has no crops for validation; list some; or split="):
            data.val_dataloader()


@pytest.mark.parametrize(("stage", "message"), [("train", "got 'train'"), ("Fit", "did you mean 'fit'"), (1, "got 1")])
def test_an_unknown_stage_is_an_error(volume, stage, message):
    with module(volume) as data, pytest.raises(CellMapError, match=rf"stage must be one of fit, .*{message}"):
        data.setup(stage)


def test_an_entry_can_name_a_target(volume):
    entry = {
        "_target_": "cellmap_lightning.CellMapDataset",
        "input_path": volume.raw_path,
        "target_path": f"{volume.path}/{GT}/crop2/[mito,er,pm]",
        "classes": CLASSES,
        "input_arrays": INPUTS,
        "target_arrays": TARGETS,
        "is_train": True,
    }
    with module(volume, datasets={"train": [entry]}) as data:
        data.setup("fit")
        assert data.train_dataset.datasets[0].label == "volume/crop2"


def test_two_modules_can_be_pickled(volume):
    with module(volume) as data:
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        with pickle.loads(pickle.dumps(data)) as copy:
            assert torch.equal(next(iter(copy.train_dataloader()))["raw"], batch["raw"])


def test_arguments(volume):
    for match, kwargs in (
        ("give one", {"samples_per_epoch": 4, "batches_per_epoch": 2}),
        ("batch_size must be a whole number of at least 1, got 0", {"batch_size": 0}),
        ("num_workers must be", {"num_workers": -1}),
        ("input_arrays is missing", {"input_arrays": None}),
        ("either as csv_path or as datasets", {"csv_path": "x.csv"}),
        ("too_coarse must be", {"too_coarse": "ignore"}),
    ):
        with pytest.raises(CellMapError, match=match):
            module(volume, **kwargs)
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        module(volume, batchsize=3)


def test_checkpoints_are_plain(data, tmp_path):
    """Loadable with weights_only=True, configuration included."""
    keep = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "best", monitor="val/dice", mode="max", save_last=True)
    config = {"data": {"classes": CLASSES}, "seed": 0}
    run = trainer(tmp_path, callbacks=[keep, CheckpointConfig(config)], enable_checkpointing=True)
    model = task()
    run.fit(model, data)
    checkpoint = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert checkpoint["cellmap_config"] == config
    torch.testing.assert_close(checkpoint["state_dict"]["network.weight"], model.network.weight.detach())
    assert (tmp_path / "last.ckpt").exists()
    run.validate(task(), data, ckpt_path=str(tmp_path / "best.ckpt"), verbose=False, weights_only=True)


def test_targets_for_a_softmax_train(volume, tmp_path):
    target = {"labels": {**TARGETS["labels"], "kind": "labels"}}
    with module(volume, target_arrays=target) as data:
        model = SegmentationTask(nn.Conv3d(1, 4, 3, padding=1), CLASSES)
        run = trainer(tmp_path, limit_predict_batches=1)
        run.fit(model, data)
        assert model.scores["val"]
        assert run.predict(model, data)[0].shape == (2, 3, 8, 16, 24)


def test_normalization_is_saved_in_the_checkpoint(volume, tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "kept"))
    with module(volume, normalize="zscore") as data:
        run = trainer(tmp_path)
        run.fit(task(), data)
        run.save_checkpoint(tmp_path / "x.ckpt")
        ((key, (mean, factor)),) = data.splits.normalization.items()
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert tuple(saved["CellMapDataModule"]["normalization"][key]) == (mean, factor)
    # A run that would measure something else normalizes as the checkpoint says, if the rule is the same.
    saved["CellMapDataModule"]["normalization"][key] = [mean - 7, factor]
    del saved["CellMapDataModule"]["trained_on"]  # which refuses another rule
    torch.save(saved, tmp_path / "y.ckpt")
    for rule, expected in (("zscore", {(mean - 7, factor)}), ("dtype", {(0.0, 1 / 255)})):
        watch = Watch()
        with module(volume, normalize=rule) as data:
            trainer(tmp_path, callbacks=[watch]).validate(task(), data, ckpt_path=tmp_path / "y.ckpt", verbose=False)
            assert set(data.splits.normalization.values()) == expected
            torch.testing.assert_close(next(iter(data.val_dataloader()))["raw"], watch.batches[0]["raw"])


def test_entries_of_one_volume_may_differ_in_normalization(volume):
    entry = {"raw": volume.raw_path, "gt": f"{volume.path}/{GT}/crop2/[mito,er,pm]"}
    entries = [{**entry, "normalize": {"range": [0, 100]}}, {**entry, "invert": True}]
    with module(volume, datasets={"train": entries}) as data:
        data.setup("fit")
        before = [d.affine for d in data.train_dataset.datasets]
        data.load_state_dict(data.state_dict())
        assert [d.affine for d in data.train_dataset.datasets] == before
        assert before[0] != before[1]


def test_fit_without_validation_crops_is_an_error_with_advice(volume, tmp_path):
    entry = {"raw": volume.raw_path, "gt": f"{volume.path}/{GT}/crop2/[mito,er,pm]"}
    with module(volume, datasets={"train": [entry]}) as data:
        with pytest.raises(KeyError, match=r"Trainer\(limit_val_batches=0\) trains without validation"):
            trainer(tmp_path).fit(task(), data)
        trainer(tmp_path, limit_val_batches=0).fit(task(), data)


@pytest.mark.parametrize("kind", ["instances", "ids"])
def test_the_example_task_refuses_what_it_cannot_train(volume, tmp_path, kind):
    match = f"the target 'labels' has the kind {kind}, which SegmentationTask does not train; use one of binary, labels"
    target = {"labels": {**TARGETS["labels"], "kind": kind}}
    with module(volume, target_arrays=target) as data, pytest.raises(CellMapError, match=match):
        trainer(tmp_path).fit(task(), data)


def test_a_ready_made_dataset_must_fit_the_module(volume):
    from cellmap_lightning import CellMapDataset

    other = CellMapDataset(
        volume.raw_path, f"{volume.path}/{GT}/crop2/[mito,er]", ["er", "mito"], INPUTS, TARGETS, is_train=True
    )
    match = r"was made for the classes \['er', 'mito'\], not"
    with module(volume, datasets={"train": [other]}) as data, pytest.raises(CellMapError, match=match):
        data.setup("fit")


def test_class_weights(data, tmp_path, caplog):
    for rule in ("pos_weight", "inverse_sqrt", {"er": 1000.0}):
        model = task(class_weights=rule, weight_batches=2)
        with caplog.at_level(logging.INFO, "cellmap_lightning.training.task"):
            trainer(tmp_path, limit_val_batches=0).fit(model, data)
        weights = model.pos_weight.tolist()
        assert all(0.1 <= w <= 50 for w in weights)
        if rule == "pos_weight":
            ratios = weights
        elif rule == "inverse_sqrt":
            unbounded = [r for r in ratios if r < 50]
            assert [w for r, w in zip(ratios, weights, strict=True) if r < 50] == pytest.approx(
                [r**0.5 for r in unbounded]
            )
        else:
            assert weights == [1, 50, 1]
    assert "class weights (pos_weight): mito" in caplog.text
    with pytest.raises(KeyError, match="golgi"):
        task(class_weights={"golgi": 1})
    with pytest.raises(ValueError, match="class_weights must be"):
        task(class_weights="balanced")


def test_the_crop_of_a_sample_follows_from_its_idx(volume):
    with module(volume) as data:
        data.setup("fit")
        train, val = data.train_dataset, data.val_dataset
        assert {train.get_crop(idx) for idx in (0, len(train) - 1, -1)} == {crop.label for crop in train.crops}
        assert [train.get_crop(i) for i in (0, -len(train))] == [train.crops[0].label] * 2
        assert val.get_crop(val.tile(0)).endswith("crop4")
        batch = next(iter(data.train_dataloader()))
        for idx in batch["idx"]:
            assert train.get_crop(idx) == train.locate(idx)[0].label
        with pytest.raises(IndexError, match="is outside its"):
            train.get_crop(len(train))


def test_log_lines_name_the_use_of_crops(volume, caplog):
    with caplog.at_level("INFO", "cellmap_lightning"), module(volume) as data:
        data.setup("fit")
        data.setup("test")
        next(iter(data.val_dataloader()))
    for text in ("2 crops for training, ", "1 crop for validation, ", "1 crop for testing, "):
        assert text in caplog.text
    cached = [r.getMessage() for r in caplog.records if "decoded voxels are" in r.getMessage()]
    assert cached
    assert all("crop for validation" in line and "CellMapMultiDataset" not in line for line in cached)
