"""Batches that are gathered on the device, under a Trainer and in plain loops, and what is left when they end."""

import gc
import logging
import pickle
import shutil
import signal
import threading
import weakref

import lightning as L
import pytest
import torch

from cellmap_lightning import CellMapDataLoader
from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.callbacks import StreamPrefetch
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.demo.synthetic import SyntheticVolume
from cellmap_lightning.errors import CellMapError, CellMapValueError
from cellmap_lightning.loading.options import LoaderOptions
from cellmap_lightning.loading.prefetch import ReadAhead
from cellmap_lightning.resident.batch import ResidentBatch
from cellmap_lightning.resident.device_cache import DeviceCache
from tests.resident.datasets import open_set
from tests.runs import GT, Watch, module, task, trainer

pytestmark = [pytest.mark.usefixtures("quiet_lightning"), pytest.mark.usefixtures("no_threads_left")]
ROTATED = {"mirror": {"axes": {"x": 0.5}}, "rotate": {"axes": {axis: [-180, 180] for axis in "zyx"}}}
VALUES = {"contrast": [0.7, 1.3], "noise": [0, 0.1]}


def same(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert set(a) == set(b)
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert torch.equal(torch.nan_to_num(a[name], -7), torch.nan_to_num(b[name], -7)), name


def seen(volume, tmp_path, cache, fit=(), data=(), run=None):
    """The batches of the training and validation steps, and the device cache."""
    watch = Watch()
    options = {"cache": cache, "spatial_transforms": ROTATED, "intensity_transforms": VALUES} | dict(data)
    with module(volume, **options) as data:
        how = {"callbacks": [watch, *(run or [])], "max_epochs": 2} | dict(fit)
        trainer(tmp_path, **how).fit(task(), data)
        held = data.residents.cache
        nbytes = held.nbytes if held is not None else 0
    if held is not None:
        assert held.nbytes == 0, "the memory is released with the data module"
    return watch.batches, nbytes


@pytest.fixture(scope="module")
def references():
    return []


@pytest.fixture
def reference(volume, tmp_path, references, quiet_lightning):
    """The batches that the host reads, once."""
    if not references:
        references.extend(seen(volume, tmp_path, "memory")[0])
    return references


@pytest.mark.parametrize(
    ("fit", "data", "ahead"),
    [
        ({}, {}, False),
        ({}, {}, True),
        ({"precision": "bf16-mixed"}, {}, False),
        ({"accumulate_grad_batches": 2}, {}, True),
        ({"reload_dataloaders_every_n_epochs": 1}, {}, False),
        ({}, {"device_cache_bytes": 2_000_000}, False),
    ],
)
def test_steps_see_the_same_batches(volume, tmp_path, reference, fit, data, ahead):
    """Both splits; ``device_cache_bytes`` has room for some of the crops."""
    callbacks = [StreamPrefetch(enabled=ahead)]
    batches, nbytes = seen(volume, tmp_path, "device", fit, data, callbacks)
    same(batches, reference)
    assert 0 < nbytes <= data.get("device_cache_bytes", 1 << 40)
    resident = callbacks[0].decisions["train"].resident
    assert resident.enabled
    assert callbacks[0].decisions["val"].resident.budget == resident.budget


def test_without_the_callback(volume, tmp_path, reference, caplog):
    with caplog.at_level(logging.INFO, "cellmap_lightning.loading.split_residents"):
        batches, nbytes = seen(volume, tmp_path, "device")
    same(batches, reference)
    assert nbytes > 0
    assert caplog.text.count("device cache for train: on, at most") == 1
    assert caplog.text.count("device cache for val: on, at most") == 1


@pytest.mark.parametrize("cache", ["auto", "disk", "none"])
def test_other_modes_use_no_device(volume, tmp_path, reference, cache, caplog):
    """``auto`` means on a CPU what it always has; only what was asked for is news."""
    callback = StreamPrefetch()
    with caplog.at_level(logging.DEBUG, "cellmap_lightning.callbacks.stream_prefetch"):
        batches, nbytes = seen(volume, tmp_path, cache, run=[callback])
    same(batches, reference)
    assert nbytes == 0
    assert not callback.decisions["train"].resident.enabled
    expected = "a cpu device has no memory of another kind" if cache == "auto" else f"cache={cache}"
    (line,) = [r for r in caplog.records if f"device cache for train: off, {expected}" in r.getMessage()]
    assert line.levelno == (logging.DEBUG if cache == "auto" else logging.INFO)


def test_worker_processes_are_an_obstacle_and_change_nothing(volume, tmp_path, reference, caplog):
    with caplog.at_level(logging.INFO):
        batches, nbytes = seen(volume, tmp_path, "device", data={"num_workers": 1}, run=[StreamPrefetch()])
    same(batches, reference)
    assert nbytes == 0
    assert (
        "device cache for train: off, num_workers=1, and one process uses the device; set num_workers=0" in caplog.text
    )


def test_test_and_validation_without_fit(volume, tmp_path):
    def batches(cache):
        found = []

        class Noted(L.Callback):
            def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
                found.append({n: t.clone() for n, t in batch.items()})

            on_validation_batch_start = on_test_batch_start

        with module(volume, cache=cache) as data:
            run = trainer(tmp_path, callbacks=[Noted()])
            run.test(task(), data, verbose=False)
            run.validate(task(), data, verbose=False)
            assert (data.residents.cache is not None) == (cache == "device")
        return found

    same(batches("device"), batches("memory"))


def test_several_loaders(volume, tmp_path):
    """A Trainer that takes a list of loaders finishes each batch of each."""

    def batches(cache):
        found = []

        class Noted(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                found.extend({n: t.clone() for n, t in part.items()} for part in batch)

        class Both(type(task())):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch[0], batch_idx)

        with module(volume, cache=cache) as data:
            first = data.train_dataloader
            data.train_dataloader = lambda: [first(), first()]
            both = Both(torch.nn.Conv3d(1, 3, 3, padding=1), ["mito", "er", "pm"])
            trainer(tmp_path, callbacks=[Noted()], limit_val_batches=0).fit(both, data)
        return found

    same(batches("device"), batches("memory"))


def test_resuming_continues_with_the_next_sample(volume, tmp_path):
    def batches(cache):
        found = []

        class Stop(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                found.append(batch["idx"].tolist())
                if len(found) == 2:
                    trainer.save_checkpoint(tmp_path / f"{cache}.ckpt")
                    trainer.should_stop = True

        how = {"callbacks": [Stop()], "limit_val_batches": 0, "max_epochs": 2, "min_epochs": 0}
        with module(volume, cache=cache, batches_per_epoch=5) as data:
            trainer(tmp_path, **how, max_steps=2).fit(task(), data)
        with module(volume, cache=cache, batches_per_epoch=5) as data:
            trainer(tmp_path, **how).fit(task(), data, ckpt_path=tmp_path / f"{cache}.ckpt")
        return found

    resident = batches("device")
    assert resident == batches("memory")
    assert len(resident) == 10


# -- under a device whose batches are finished in the transfer


def test_batches_are_gathered_by_the_copying_thread(volume, tmp_path, monkeypatch, reference):
    """A stand-in for a device with streams: the batch travels as a description, and the step gets it finished."""
    copied = []

    class Engine(ReadAhead):
        def __init__(self, device):
            super().__init__()

        def copy(self, batch):
            copied.append((type(batch), threading.current_thread().name))
            return (batch.to("cpu"),)

        def acquire(self, batch):
            assert type(batch) is CompactBatch
            return batch

    for name in ("loading.delivery", "loading.prefetch", "loading.dataloader"):
        monkeypatch.setattr(f"cellmap_lightning.{name}.STREAM_DEVICES", ("cpu",))
    monkeypatch.setattr("cellmap_lightning.loading.dataloader.NoPrefetch", lambda device: ReadAhead())
    monkeypatch.setattr("cellmap_lightning.loading.dataloader.SideStream", Engine)
    for ahead in (True, False):
        batches, nbytes = seen(volume, tmp_path, "device", run=[StreamPrefetch(enabled=ahead)])
        same(batches, reference)
        assert nbytes > 0
    assert {kind for kind, _ in copied} == {ResidentBatch}
    assert all(name.startswith("cellmap-copy") for _, name in copied)


# -- plain loops


def loop(volume, **more):
    dataset = open_set(volume, "rotated by any angle", kinds={"binary": {}})
    return dataset, CellMapDataLoader(dataset, 4, samples_per_epoch=16, **more)


def test_a_plain_loop_gets_finished_batches(volume):
    found = {}
    for resident in (None, DeviceCache("cpu", 1 << 30)):
        dataset, loader = loop(volume, options=LoaderOptions(resident=resident))
        with dataset:
            found[resident is None] = list(loader)
            # Other loaders around the same samples read them on the host.
            assert all(isinstance(batch, dict) for batch in torch.utils.data.DataLoader(loader.dataset, 4))
            loader.__dict__["__pl_saved_kwargs"] = {
                "options": LoaderOptions(resident=resident)
            }  # as Lightning records it
            copy = pickle.loads(pickle.dumps(loader))
            assert copy.dataset.resident is None
    same(found[False], found[True])


def test_a_batch_is_opaque_and_is_finished_once(volume):
    dataset, loader = loop(volume, options=LoaderOptions(resident=DeviceCache("cpu", 1 << 30)), finish=False)
    with dataset:
        batch = next(iter(loader))
        assert repr(batch) == "ResidentBatch({'raw': [4, 1, 6, 15, 17], 'binary': [4, 6, 15, 17, 2]})"
        for access in (lambda: batch["raw"], lambda: list(batch), lambda: len(batch), lambda: "raw" in batch):
            with pytest.raises(CellMapError, match="this batch is compact"):
                access()
        with pytest.raises(CellMapError, match="cannot be sent to another process; use num_workers=0"):
            pickle.dumps(batch)
        assert batch.pin_memory() is batch
        found = [loader.layout.finish(batch), batch.finish(), batch.to("cpu").finish()]
        same(found, [dataset.read(loader.dataset.draws(range(4))).finish()] * 3)
        assert "CompactBatch" in repr(batch)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_worker_processes_cannot_use_it(volume, workers):
    with pytest.raises(CellMapValueError, match=f"resident needs num_workers=0, .*, got num_workers={workers}"):
        loop(volume, options=LoaderOptions(resident=DeviceCache("cpu", 1)), num_workers=workers)


def test_datasets_of_user_code_are_read_as_ever(volume):
    class Own(CellMapDataset):
        def __getitem__(self, position):
            return super().__getitem__(position) | {"own": torch.ones(())}

    array = {"shape": [4, 4, 4], "scale": [10.48, 8, 8]}
    path = f"{volume.path}/{GT}/crop2/[mito]"
    cache = DeviceCache("cpu", 1 << 30)
    with Own(volume.raw_path, path, ["mito"], {"raw": array}, {"label": array}) as dataset:
        for items in (dataset, torch.utils.data.Subset(dataset, range(4))):
            (batch,) = CellMapDataLoader(items, 4, samples_per_epoch=4, options=LoaderOptions(resident=cache))
            assert batch["own"].sum() == 4
    assert cache.nbytes == 0


# -- the end


def held_voxels(data):
    return [weakref.ref(held.voxels) for held in data.residents.cache._regions.values()]


class StopError(Exception):
    pass


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("ending", ["an error in a step", "Ctrl-C", "an error in the gather", "close"])
def test_however_it_ends_the_memory_is_freed(volume, tmp_path, monkeypatch, ending, ahead):
    voxels = []

    class End(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            voxels.extend(held_voxels(data))
            if batch_idx == 1 and ending == "an error in a step":
                raise StopError
            if batch_idx == 1 and ending == "Ctrl-C":
                signal.raise_signal(signal.SIGINT)
            if batch_idx == 0 and ending == "an error in the gather":
                monkeypatch.setattr("cellmap_lightning.resident.batch.gather", fail)

    def fail(*_):
        raise StopError("no kernel")

    data = module(volume, cache="device", batches_per_epoch=8)
    run = trainer(tmp_path, callbacks=[End(), StreamPrefetch(enabled=ahead)], limit_val_batches=0)
    if ending == "close":
        run.fit(task(), data)
        data.close()
    else:
        expected = (KeyboardInterrupt, SystemExit) if ending == "Ctrl-C" else StopError
        with pytest.raises(expected):
            run.fit(task(), data)
    monkeypatch.undo()
    assert voxels
    assert data.residents.cache.nbytes == 0
    gc.collect()
    assert all(reference() is None for reference in voxels)
    # And the module can be used again.
    watch = Watch()
    trainer(tmp_path, callbacks=[watch], limit_val_batches=0).fit(task(), data)
    assert len(watch.batches) == 8
    data.close()


def test_voxels_that_change_on_disk_while_they_are_resident(volume, tmp_path):
    """As in the cache of the host, a chunk is compared when it is first used; later samples stay consistent."""
    shutil.copytree(volume.path, tmp_path / "v.zarr")
    shutil.copy(volume.csv_path, tmp_path / "v.csv")
    copied = SyntheticVolume.at(tmp_path / "v.zarr")
    with module(copied, cache="device") as data:
        run = trainer(tmp_path, limit_val_batches=0)
        watches = []
        for _ in range(2):
            watches.append(Watch())
            run = trainer(tmp_path, limit_val_batches=0, callbacks=[watches[-1]])
            run.fit(task(), data)
            for file in (tmp_path / "v.zarr/recon-1/em").rglob("[0-9]*"):
                if file.is_file():
                    content = bytearray(file.read_bytes())
                    content[-1] ^= 1
                    file.write_bytes(content)
        same(watches[1].batches, watches[0].batches)
