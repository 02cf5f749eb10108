"""Any order of a Trainer's steps, and any end of a run: the same datasets, and nothing left behind."""

import gc
import pickle
import sys
import threading
import warnings
import weakref
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.callbacks import StreamPrefetch
from cellmap_lightning.loading.prefetch import ReadAhead
from cellmap_lightning.training.task import SegmentationTask
from tests.conftest import CLASSES, reading_threads
from tests.runs import GT, Watch, module, task, trainer

pytestmark = [
    pytest.mark.usefixtures("quiet_lightning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


#: Copied tensors that are still referenced.
ALIVE: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()


class Engine(ReadAhead):
    """Stands where a device's copy engine stands: copies to the same place, and keeps count.

    Every pass of a loader has one; the counts are those of all.
    """

    most = begun = 0
    alive = ALIVE

    def __init__(self, device):
        super().__init__()
        Engine.begun += 1

    def copy(self, batch):
        assert threading.current_thread().name.startswith("cellmap-copy")
        if isinstance(batch, CompactBatch):
            copied = batch.map(torch.Tensor.clone)
            Engine.alive.update(copied.tensors.values())
        else:
            copied = {name: tensor.clone() for name, tensor in batch.items()}
        self.waits = getattr(self, "waits", 0) + 1
        Engine.most = max(Engine.most, self.waits)
        return (copied,)

    def acquire(self, batch):
        assert threading.current_thread() is threading.main_thread()
        self.waits -= 1
        return batch


@pytest.fixture
def engine(monkeypatch):
    """The roads of a device, on a CPU: compact batches that one thread copies ahead."""
    Engine.most = Engine.begun = 0
    Engine.alive.clear()
    for place in ("loading.delivery", "loading.prefetch", "loading.dataloader"):
        monkeypatch.setattr(f"cellmap_lightning.{place}.STREAM_DEVICES", ("cpu",))
    monkeypatch.setattr("cellmap_lightning.loading.dataloader.NoPrefetch", lambda device: ReadAhead())
    monkeypatch.setattr("cellmap_lightning.loading.dataloader.SideStream", Engine)
    return Engine


def settled():
    """Check that no thread or pass of the package runs; called while Trainer and module still exist."""
    gc.collect()
    return [t.name for t in threading.enumerate() if t.name.startswith("cellmap-copy")]


OPTIONS = {
    "plain": {},
    "sanity check": {"num_sanity_val_steps": 1},
    "limits": {"limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1, "limit_predict_batches": 1},
    "reload": {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2},
    "overfit": {"overfit_batches": 1, "max_epochs": 2},
    "accumulate": {"accumulate_grad_batches": 2},
    "validation in the middle": {"val_check_interval": 1},
    "fast_dev_run": {"fast_dev_run": True},
    "bf16-true": {"precision": "bf16-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-true": {"precision": "16-true"},
    "64-true": {"precision": "64-true"},
    "32-true": {"precision": "32-true"},
}
#: What takes the same path as another option.
RARE = ("overfit", "fast_dev_run", "validation in the middle", "16-true", "64-true", "32-true")


@pytest.mark.parametrize(
    ("option", "workers", "depth"),
    [
        *(pytest.param(option, 0, 1, marks=pytest.mark.slow if option in RARE else []) for option in OPTIONS),
        ("plain", 1, 1),
        ("limits", 1, 3),
        *(pytest.param(option, 0, 3, marks=pytest.mark.slow) for option in ("plain", "reload")),
    ],
)
def test_batches_ahead_under_a_trainer(volume, tmp_path, engine, option, workers, depth):
    """The same batches as without, never more ahead than set, none referenced when a stage ends or is interrupted."""
    seen = []
    for callbacks in ([StreamPrefetch(min_batch_mb=0, depth=depth)], []):
        watch = Watch()
        with module(volume, num_workers=workers) as data:
            few = {f"limit_{stage}_batches": 3 for stage in ("test", "predict")}
            run = trainer(tmp_path, callbacks=[watch, *callbacks], **few | OPTIONS[option])
            model = task()
            run.fit(model, data)
            assert settled() == []
            run.test(model, data, verbose=False)
            if option in ("plain", "limits"):
                run.validate(model, data, verbose=False)
                watch.batches += [{"predicted": p} for p in run.predict(model, data)]
            assert settled() == []
            if callbacks:
                decided = {split: decision.enabled for split, decision in callbacks[0].decisions.items()}
                assert decided == dict.fromkeys(decided, True)
                assert {"train", "val", "test"} <= set(decided)
                assert 0 < engine.most <= depth
                assert len(engine.alive) == 0
                begun = engine.begun
        seen.append(watch.batches)
    assert engine.begun == begun
    ahead, plain = seen
    assert len(ahead) == len(plain) >= 2
    for a, b in zip(ahead, plain, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name].nan_to_num(-1), b[name].nan_to_num(-1)) for name in a)
    assert reading_threads() == []


class Several(CellMapDataModule):
    """Two loaders to validate on, of other classes and shapes than each other, and two to train on."""

    def val_dataloader(self):
        return [super().val_dataloader(), self.other.val_dataloader()]

    def train_dataloader(self):
        return {"a": super().train_dataloader(), "b": self.other.train_dataloader()}


@pytest.mark.parametrize("ahead", [True, False])
def test_several_loaders_at_once(volume, tmp_path, engine, ahead):
    """Each batch is finished by the layout that it came from, also inside the mapping that several loaders make."""
    shapes = []

    class Look(SegmentationTask):
        def training_step(self, batch, batch_idx):
            shapes.append({key: tuple(part["labels"].shape) for key, part in batch.items()})
            return super().training_step(batch["a"], batch_idx)

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            shapes.append((dataloader_idx, tuple(batch["labels"].shape)))

        def on_validation_epoch_end(self):
            pass

    small = {"shape": [4, 8, 8], "scale": [10.48, 8, 8]}
    entries = module(volume)
    given = {
        "datasets": {
            s: [{"raw": volume.raw_path, "gt": f"{volume.path}/{GT}/crop2/[mito,er,pm]"}] for s in ("train", "val")
        },
        "batch_size": 2,
        "batches_per_epoch": 2,
        "val_samples": 2,
        "leakage": "ignore",
    }
    arrays = ({"raw": {"shape": [8, 16, 24], "scale": [10.48, 8, 8]}}, {"labels": small})
    with (
        entries,
        Several(CLASSES, {"raw": small}, {"labels": small}, **given) as data,
        CellMapDataModule(["er"], *arrays, **given) as other,
    ):
        data.other = other
        callbacks = [StreamPrefetch(min_batch_mb=0)] if ahead else []
        run = trainer(tmp_path, callbacks=callbacks, num_sanity_val_steps=0)
        other.trainer = run
        other.prefetch = callbacks[0]._decide if callbacks else None
        run.fit(Look(nn.Conv3d(1, 3, 3, padding=1), CLASSES, input_name="raw", target_name="labels"), data)
    assert shapes == [
        {"a": (2, 3, 4, 8, 8), "b": (2, 1, 4, 8, 8)},
        {"a": (2, 3, 4, 8, 8), "b": (2, 1, 4, 8, 8)},
        (0, (2, 3, 4, 8, 8)),
        (1, (2, 1, 4, 8, 8)),
    ]
    assert settled() == []


def test_tuner_changes_prefetched_batches(volume, tmp_path, engine):
    callback = StreamPrefetch(min_batch_mb=0)
    finder = L.pytorch.callbacks.BatchSizeFinder("power", steps_per_trial=1, init_val=2, max_trials=2)
    with module(volume) as data, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, callbacks=[finder, callback], limit_val_batches=0).fit(task(), data)
        assert data.batch_size == 4
        finished = f"{data.batch_memory().total_mb:.1f} MiB"
        assert finished in callback.decisions["train"].reason
        assert settled() == []


def test_the_tuner_stops_where_nothing_fits(volume, tmp_path, monkeypatch):
    """A batch that cannot fit is refused before it is read, and the tuner takes that as an answer."""
    finder = L.pytorch.callbacks.BatchSizeFinder("power", steps_per_trial=1, init_val=2, max_trials=8)
    with module(volume) as data, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.setup("fit")
        one = data.train_dataset.batch_memory(1)
        room = 5 * (one.total_bytes + one.compact.total_bytes)
        monkeypatch.setattr("cellmap_lightning.loading.dataloader.device_memory", lambda device: room)
        trainer(tmp_path, callbacks=[finder], limit_val_batches=0).fit(task(), data)
        assert data.batch_size == 4
        data.batch_size = 6
        with pytest.raises(MemoryError, match=r"\(2 crops, .*\): a batch of 6 takes .* at most batch_size=5 fits"):
            trainer(tmp_path, limit_val_batches=0).fit(task(), data)


def test_a_read_error_is_raised_in_the_step_that_it_belongs_to(volume, tmp_path, engine):
    steps = []

    class Count(SegmentationTask):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    with module(volume, batches_per_epoch=6) as data:
        data.setup("fit")
        source, read = data.train_dataset, type(data.train_dataset).read

        def failing(draws, pin=False):
            if draws[0].sample >= 8:
                raise OSError("chunk 3/0/7 unreadable")
            return read(source, draws, pin)

        source.read = failing
        run = trainer(tmp_path, callbacks=[StreamPrefetch(min_batch_mb=0)], num_sanity_val_steps=0)
        with pytest.raises(OSError, match="chunk 3/0/7 unreadable"):
            run.fit(Count(nn.Conv3d(1, 3, 3, padding=1), CLASSES), data)
        assert steps == [0, 1, 2, 3]
        assert reading_threads() == []  # `on_exception` has ended them all
        assert len(engine.alive) == 0
        del source.read
        trainer(tmp_path).fit(task(), data)


@pytest.mark.parametrize("where", ["training_step", "validation_step", "on_train_batch_start", "on_train_epoch_end"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_however_a_run_ends_early(volume, tmp_path, engine, error, where):
    def fails(*_, **__):
        raise error("enough")

    kind = type("Fails", (SegmentationTask,), {where: fails})
    with module(volume) as data:
        run = trainer(tmp_path, callbacks=[StreamPrefetch(min_batch_mb=0)], num_sanity_val_steps=0)
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            run.fit(kind(nn.Conv3d(1, 3, 3, padding=1), CLASSES), data)
        assert reading_threads() == []
        train = data.train_dataset
        trainer(tmp_path).fit(task(), data)
        assert data.train_dataset is train
    assert reading_threads() == []


def test_two_fits_on_one_trainer(volume, tmp_path, engine):
    data = module(volume)
    run = trainer(tmp_path, callbacks=[StreamPrefetch(min_batch_mb=0)])
    model = task()
    run.fit(model, data)
    datasets = data.train_dataset, data.val_dataset
    executors = [d.executor for d in datasets]
    run.fit_loop.max_epochs = 3
    run.fit(model, data)
    assert run.current_epoch == 3
    assert (data.train_dataset, data.val_dataset) == datasets
    assert [d.executor for d in datasets] == executors
    assert settled() == []
    data.close()
    assert reading_threads() == []


def test_a_module_that_ran_can_be_pickled(volume, tmp_path):
    """Threads, running passes and the Trainer are not pickled; the copy delivers the same."""
    with module(volume) as data:
        run = trainer(tmp_path, callbacks=[StreamPrefetch(enabled=True)])
        run.fit(task(), data)
        under_way = iter(data.train_dataloader())
        batch = next(under_way)
        with pickle.loads(pickle.dumps(data)) as copy:
            assert copy.trainer is None
            assert copy.train_dataset is not data.train_dataset
            assert torch.equal(next(iter(copy.train_dataloader()))["raw"], batch["raw"])
        assert data.trainer is run
        next(under_way)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_with_a_running_pass_can_be_pickled(volume, tmp_path, workers):
    with module(volume, num_workers=workers) as data:
        loader = data.train_dataloader()
        under_way = iter(loader)
        first = next(under_way)
        with pickle.loads(pickle.dumps(loader)).source as source:
            assert source is not loader.source
        copy = pickle.loads(pickle.dumps(loader))
        copy.set_epoch(0)
        assert torch.equal(next(iter(copy))["raw"], first["raw"])
        copy.close()
        copy.source.close()
        assert len(list(under_way)) == 2


def test_two_modules_in_turns(volume, tmp_path, engine):
    """Each has separate threads, and the end of one does not affect the other."""
    with module(volume) as one:
        with module(volume) as two:
            a, b = iter(one.train_dataloader()), iter(two.train_dataloader())
            first = next(a)
            assert torch.equal(first["raw"], next(b)["raw"])
            trainer(tmp_path, callbacks=[StreamPrefetch(min_batch_mb=0)]).fit(task(), two)
        assert torch.equal(next(a)["raw"], list(one.train_dataloader())[1]["raw"])
        assert reading_threads()
    assert reading_threads() == []


def test_running_pass_ends_with_the_data(volume):
    with module(volume) as data:
        under_way = iter(data.train_dataloader())
        next(under_way)
        data.close()
        assert list(under_way) == []
        assert len(list(data.train_dataloader())) == 3


def test_reading_ahead_on_a_cpu(volume, tmp_path):
    """A thread reads and finishes; nothing else changes, and without being asked for it is not there."""
    threads, seen = set(), []

    class Look(Watch):
        def on_train_batch_start(self, *args):
            super().on_train_batch_start(*args)
            threads.update(t.name for t in threading.enumerate() if t.name.startswith("cellmap-copy"))

    for callback in (StreamPrefetch(enabled=True, depth=2), StreamPrefetch()):
        look = Look()
        with module(volume) as data:
            trainer(tmp_path, callbacks=[look, callback]).fit(task(), data)
            assert settled() == []
        assert callback.decisions["train"].enabled is (threads == {"cellmap-copy_0"})
        assert callback.decisions["train"].streams == 0
        seen.append(look.batches)
        threads.clear()
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a["raw"], b["raw"])


def _resources():
    maps = Path("/proc/self/maps").read_text().count("\n")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "threads": threading.active_count(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "maps": maps,
        "resident MB": int(status["VmRSS"].split()[0]) / 1000,
    }


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_soak(volume, tmp_path, engine):
    """200 rounds of setup, fit, teardown, close, each with a new module: no resource grows."""
    found = []
    for number in range(200):
        with module(volume, batches_per_epoch=2, num_workers=1 if number % 20 == 19 else 0) as data:
            run = trainer(tmp_path, callbacks=[StreamPrefetch(min_batch_mb=0)], limit_val_batches=1)
            run.fit(task(), data)
            run.validate(task(), data, verbose=False)
        del data, run
        gc.collect()
        found.append(_resources())
    for what in found[0]:
        early = sorted(row[what] for row in found[20:60])[20]
        late = sorted(row[what] for row in found[160:])[20]
        assert late <= early * (1.02 if what == "resident MB" else 1) + (5 if what == "maps" else 0), (
            what,
            early,
            late,
        )
