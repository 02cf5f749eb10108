"""Hooks, subclasses, wrappers and loaders of user code get finished batches, on any device."""

import logging

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from cellmap_lightning import (
    CellMapDataLoader,
    CellMapDataModule,
    CellMapDataset,
    CellMapError,
    CellMapMultiDataset,
    ReadOptions,
)
from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.callbacks import StreamPrefetch
from cellmap_lightning.loading.options import LoaderOptions
from cellmap_lightning.loading.samples import permuted
from cellmap_lightning.training.task import SegmentationTask
from tests.conftest import CLASSES, INPUTS, TARGETS
from tests.runs import module, task, trainer
from tests.test_lifecycle import engine  # noqa: F401  a fixture

pytestmark = [
    pytest.mark.usefixtures("quiet_lightning", "no_threads_left"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

TURNS = {"mirror": {"axes": {"x": 0.5, "y": 0.5}}, "rotate": {"axes": {"z": [-9, 9]}}}


class Kept(L.Callback):
    """Keeps the batches that the steps saw."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append({n: t.clone() for n, t in batch.items()})


def fit(volume, tmp_path, model, **kwargs):
    kept = Kept()
    with module(volume, **kwargs) as data:
        run = trainer(
            tmp_path, callbacks=[kept, StreamPrefetch(min_batch_mb=0)], num_sanity_val_steps=0, limit_val_batches=0
        )
        run.fit(model, data)
    return kept.batches


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n].nan_to_num(-1), other[n].nan_to_num(-1)) for n in one)


class Before(SegmentationTask):
    """Flips y in the hook before the transfer, and adds to raw."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return changed(batch)


class After(SegmentationTask):
    """Does the same behind it."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return changed(batch)


def changed(batch):
    assert batch["raw"].is_floating_point()
    return {**batch, "labels": batch["labels"].flip(3), "raw": batch["raw"] + 0.25}


@pytest.mark.parametrize("kind", [Before, After])
@pytest.mark.parametrize("workers", [0, 2])
def test_hooks_around_the_transfer_see_finished_batches(volume, tmp_path, engine, kind, workers, caplog):  # noqa: F811
    with caplog.at_level(logging.INFO, "cellmap_lightning"):
        plain = fit(volume, tmp_path, task(), num_workers=workers)
        seen = fit(volume, tmp_path, kind(nn.Conv3d(1, 3, 3, padding=1), CLASSES), num_workers=workers)
    assert engine.begun == (1 if kind is Before else 2)
    assert len(plain) == len(seen) == 3
    assert all(same(changed(a), b) for a, b in zip(plain, seen, strict=True))
    assert ("on_before_batch_transfer is overridden" in caplog.text) == (kind is Before)


def test_hooks_of_the_data_module_count_too(volume, tmp_path, engine):  # noqa: F811
    class Data(CellMapDataModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return changed(batch)

    plain = fit(volume, tmp_path, task())
    kept = Kept()
    with module(volume) as data:
        data.__class__ = Data
        trainer(tmp_path, callbacks=[kept], num_sanity_val_steps=0, limit_val_batches=0).fit(task(), data)
    assert all(same(changed(a), b) for a, b in zip(plain, kept.batches, strict=True))


def test_access_to_a_compact_batch_names_the_finished_one(volume):
    with module(volume) as data:
        data.setup("fit")
        loader = CellMapDataLoader(data.train_dataset, 2, samples_per_epoch=4, finish=False)
        batch = next(iter(loader))
        for use in (
            lambda b: b["raw"],
            lambda b: b.items(),
            lambda b: {**b},
            list,
            len,
            lambda b: "raw" in b,
            lambda b: b.get("labels"),
            lambda b: b.update(raw=1),
            lambda b: b.__setitem__("raw", 1),
        ):
            with pytest.raises(CellMapError, match="on_after_batch_transfer"):
                use(batch)
        assert set(batch.finish()) == {"raw", "labels", "idx"}
        loader.close()


def test_a_loader_in_a_hook_yields_finished_batches(volume, tmp_path, engine):  # noqa: F811
    """Those of the loop travel compact at the same time."""
    found, crossed = [], []

    class Data(CellMapDataModule):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            crossed.append(type(batch))
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    class Look(SegmentationTask):
        def on_train_epoch_start(self):
            for kind in ("train", "val"):
                loader = getattr(self.trainer.datamodule, f"{kind}_dataloader")()
                found.extend(batch["raw"] for batch in loader)
                loader.close()

    with module(volume) as data:
        data.__class__ = Data
        model = Look(nn.Conv3d(1, 3, 3, padding=1), CLASSES)
        trainer(tmp_path, callbacks=[StreamPrefetch(min_batch_mb=0)], num_sanity_val_steps=0).fit(model, data)
    assert len(found) > 4
    assert all(batch.dtype == torch.float32 and batch.max() <= 1 for batch in found)
    assert set(crossed) == {CompactBatch}


def test_loaders_that_the_model_takes_from_a_module(volume, tmp_path, engine):  # noqa: F811
    """There is no data module whose transfer could finish a compact batch."""
    kept = Kept()

    class Model(SegmentationTask):
        validation_step = None

        def train_dataloader(self):
            self.data.trainer = self.trainer
            return self.data.train_dataloader()

    plain = fit(volume, tmp_path, task())
    with module(volume) as data:
        model = Model(nn.Conv3d(1, 3, 3, padding=1), CLASSES, input_name="raw", target_name="labels")
        model.data = data
        trainer(tmp_path, callbacks=[kept], limit_val_batches=0).fit(model)
    assert all(same(a, b) for a, b in zip(plain, kept.batches, strict=True))


# -- datasets of user code


class Doubled(CellMapDataset):
    """Changes what the stock dataset gives, and adds something."""

    def __getitem__(self, position):
        sample = super().__getitem__(position)
        return sample | {"raw": sample["raw"] * 2, "position": torch.tensor(position)}


class DoubledTogether(CellMapMultiDataset):
    def __getitem__(self, position):
        sample = super().__getitem__(position)
        return sample | {"raw": sample["raw"] * 2, "position": torch.tensor(position)}


def crops(volume, kind=CellMapDataset, numbers=(2, 3, 4)):
    return [
        kind(
            volume.raw_path, f"{volume.path}/recon-1/labels/groundtruth/crop{n}/[mito,er]", CLASSES, INPUTS, TARGETS,
            spatial_transforms=TURNS, is_train=True, read=ReadOptions(pad=True),
        )
        for n in numbers
    ]  # fmt: skip


DATASETS = {
    "one crop": lambda volume: (crops(volume, Doubled)[0], crops(volume)[0]),
    "crops of many": lambda volume: (CellMapMultiDataset(crops(volume, Doubled)), CellMapMultiDataset(crops(volume))),
    "many": lambda volume: (DoubledTogether(crops(volume)), CellMapMultiDataset(crops(volume))),
}


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize(("workers", "is_train"), [(0, True), (2, True), (0, False)])
def test_an_overridden_getitem_is_honoured(volume, kind, workers, is_train, caplog):
    """Each sample is the stock sample of its number, augmentation included, changed by the subclass."""
    own, stock = DATASETS[kind](volume)
    with own, stock:
        options = {"samples_per_epoch": 6, "is_train": is_train, "seed": 5}
        loaders = [CellMapDataLoader(source, 2, workers, **options) for source in (own, stock)]
        for _ in range(2):  # epochs
            for a, b in zip(*loaders, strict=True):
                assert torch.equal(a.pop("raw"), b.pop("raw") * 2)
                position = a.pop("position")
                assert torch.equal(a["idx"], b["idx"])
                assert kind == "crops of many" or torch.equal(position, b["idx"])
                assert same(a, b)
        for loader in loaders:
            loader.close()


def test_an_overridden_getitem_under_a_trainer(volume, tmp_path, engine):  # noqa: F811
    plain = fit(volume, tmp_path, task(), spatial_transforms=TURNS)
    seen = fit(
        volume, tmp_path, task(), spatial_transforms=TURNS,
        datasets={"train": _module_crops(volume, Doubled)},
    )  # fmt: skip
    for a, b in zip(plain, seen, strict=True):
        assert torch.equal(a["raw"] * 2, b["raw"])
        assert torch.equal(a["labels"].nan_to_num(-1), b["labels"].nan_to_num(-1))


def _module_crops(volume, kind):
    return [
        kind(
            volume.raw_path, f"{volume.path}/recon-1/labels/groundtruth/crop{n}/[mito,er,pm]", CLASSES, INPUTS, TARGETS,
            spatial_transforms=TURNS, is_train=True, read=ReadOptions(pad=True),
        )
        for n in (2, 3)
    ]  # fmt: skip


class Mixed(Dataset):
    """The mean of two samples."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return 10

    def __getitem__(self, index):
        a, b = self.source[index], self.source[index + 100]
        return {"raw": (a["raw"] + b["raw"]) / 2, "index": index}


class Duck:
    """No `Dataset` of torch's, with the source in a list."""

    def __init__(self, source):
        self.parts = [source]

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return self.parts[0][index]


WRAPPERS = {
    "duck": Duck,
    "subset": lambda source: Subset(source, range(5, 15)),
    "concat": lambda source: ConcatDataset([Subset(source, range(4)), Subset(source, range(50, 56))]),
    "mixed": Mixed,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_wrapper_datasets_work(volume, wrapper, workers):
    with CellMapMultiDataset(crops(volume)) as source:
        wrapped = WRAPPERS[wrapper](source)
        loader = CellMapDataLoader(wrapped, 2, workers, seed=3)
        assert set(loader.dataset.sources) == {source}
        key = "index" if wrapper == "mixed" else "idx"
        epochs = [list(loader) for _ in range(2)]
        orders = [[i for batch in epoch for i in batch[key].tolist()] for epoch in epochs]
        assert orders[0] != orders[1]
        assert sorted(orders[0]) == sorted(orders[1])  # each item once in an epoch
        assert len(set(orders[0])) == 10
        raws = [
            {i: raw for batch in e for i, raw in zip(batch[key].tolist(), batch["raw"], strict=True)} for e in epochs
        ]
        assert any(not torch.equal(raws[0][i], raws[1][i]) for i in raws[0])  # augmented by the number of the sample
        again = CellMapDataLoader(wrapped, 5, 0, seed=3)
        assert torch.equal(torch.cat([b["raw"] for b in again]), torch.cat([b["raw"] for b in epochs[0]]))
        ranks = [CellMapDataLoader(wrapped, 1, seed=3, options=LoaderOptions(rank=rank, world=2)) for rank in (0, 1)]
        pairs = [[i for b in rank for i in b[key].tolist()] for rank in ranks]
        assert [i for pair in zip(*pairs, strict=True) for i in pair] == orders[0]
        ordered = CellMapDataLoader(wrapped, 2, is_train=False)
        assert [i for b in ordered for i in b[key].tolist()] == [s[key] for s in (wrapped[i] for i in range(10))]
        resumed = CellMapDataLoader(wrapped, 2, seed=3)
        stopped = CellMapDataLoader(wrapped, 2, seed=3)
        for _, batch in zip(range(3), stopped, strict=False):
            del batch
        resumed.load_state_dict(stopped.state_dict())
        assert [i for b in resumed for i in b[key].tolist()] == orders[0][6:]
        loader.close()
        stopped.close()


def test_a_wrapper_under_a_trainer(volume, tmp_path):
    seen = []

    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv3d(1, 1, 1)

        def training_step(self, batch, batch_idx):
            seen.extend(batch["idx"].tolist())
            return self.net(batch["raw"]).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with CellMapMultiDataset(crops(volume)) as source:
        loader = CellMapDataLoader(Subset(source, range(8)), 2)
        trainer(tmp_path, max_epochs=2).fit(Model(), loader)
    assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8))
    assert seen[:8] != seen[8:]


def test_non_dataset_is_an_error(volume):
    for wrong in ([1, 2], "crops.csv", {"train": []}, 7, iter(())):
        with pytest.raises(CellMapError, match="must be a CellMapDataset, or a dataset with __len__"):
            CellMapDataLoader(wrong)
    with CellMapMultiDataset(crops(volume)) as source:
        with pytest.raises(CellMapError, match="is empty"):
            CellMapDataLoader(Subset(source, []))
        with pytest.raises(CellMapError, match="the size of batches of a Subset are unknown"):
            CellMapDataLoader(Subset(source, [1])).batch_memory()


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 1000])
def test_the_shuffle_is_a_permutation(length):
    orders = [[permuted(n, length, 3, cycle) for n in range(length)] for cycle in range(3)]
    assert all(sorted(order) == list(range(length)) for order in orders)
    assert length < 7 or len({tuple(order) for order in orders}) == 3
    if length == 1000:  # as far from its place as at random: a third of the length
        assert abs(np.mean([abs(a - b) for a, b in enumerate(orders[0])]) - length / 3) < 40


def test_the_shuffle_of_a_huge_dataset_costs_nothing():
    assert len({permuted(n, 10**15, 0, 0) for n in range(100)}) == 100


# -- other loaders


@pytest.mark.filterwarnings("ignore:.*set_vital")
def test_other_loaders_get_finished_samples(volume):
    """`loader.dataset` in a plain DataLoader, and in one that is rebuilt from all parts of ours."""
    with CellMapMultiDataset(crops(volume)) as source:
        ours = CellMapDataLoader(source, 2, samples_per_epoch=6, seed=5)
        expected = list(ours)
        for other in (
            DataLoader(ours.dataset, batch_size=2),
            DataLoader(ours.dataset, batch_size=2, num_workers=2),
            DataLoader(ours.dataset, batch_size=2, collate_fn=ours.collate_fn),
            DataLoader(CellMapDataLoader(source, 2, samples_per_epoch=6, seed=5, num_workers=2).dataset, batch_size=2),
        ):
            assert all(same(a, b) for a, b in zip(other, expected, strict=True))
        fresh = CellMapDataLoader(source, 2, samples_per_epoch=6, seed=5)
        rebuilt = DataLoader(fresh.dataset, batch_sampler=fresh.batch_sampler, collate_fn=fresh.collate_fn)
        assert all(same(a, b) for a, b in zip(rebuilt, expected, strict=True))
        second = list(rebuilt)
        assert not any(same(a, b) for a, b in zip(second, expected, strict=True))  # the next epoch
        assert all(same(a, b) for a, b in zip(second, ours, strict=True))
        stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
        assert all(same(a, b) for a, b in zip(stateful(ours.dataset, batch_size=2), expected, strict=True))


def test_samples_are_not_distributed_twice(volume, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with CellMapMultiDataset(crops(volume)) as source:
        loader = CellMapDataLoader(source, 2, samples_per_epoch=8)
        assert len(list(loader)) == 2
        rebuilt = DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn)
        with pytest.raises(
            CellMapError, match=r"over 2 ranks itself \(this is rank 1\).*with options=LoaderOptions\(rank=0, world=1\)"
        ):
            next(iter(rebuilt))
        alone = CellMapDataLoader(source, 2, samples_per_epoch=8, options=LoaderOptions(rank=0, world=1))
        rebuilt = DataLoader(alone.dataset, batch_sampler=alone.batch_sampler, collate_fn=alone.collate_fn)
        assert len(list(rebuilt)) == 4


@pytest.mark.filterwarnings("ignore")
def test_monai_loaders(volume):
    """Their worker initialisation walks through every attribute of a dataset for random states."""
    monai = pytest.importorskip("monai.data")
    with CellMapMultiDataset(crops(volume)) as source:
        ours = CellMapDataLoader(source, 2, samples_per_epoch=6, seed=5)
        expected = list(ours)
        monai.set_rnd(source, 3)
        monai.set_rnd(ours.dataset, 3)
        monai.set_rnd(source.datasets[0], 3)
        assert all(
            same(a, b) for a, b in zip(monai.ThreadDataLoader(ours.dataset, batch_size=2), expected, strict=True)
        )
        for workers in (0, 2):
            loader = monai.DataLoader(ours.dataset, batch_size=2, num_workers=workers)
            assert all(same(a, b) for a, b in zip(loader, expected, strict=True))
        cached = monai.CacheDataset(Subset(source, range(4)), transform=lambda s: s, progress=False, num_workers=2)
        batch = next(iter(monai.DataLoader(cached, batch_size=4)))
        assert batch["idx"].tolist() == list(range(4))
        assert torch.equal(batch["raw"], torch.stack([source[i]["raw"] for i in range(4)]))
        items = [batch["idx"].tolist() for batch in CellMapDataLoader(cached, 2, is_train=False)]
        assert items == [[0, 1], [2, 3]]


def test_pytorch_lightning_trainer_error_names_the_import(volume, tmp_path):
    pl = pytest.importorskip("pytorch_lightning")

    class Model(pl.LightningModule):
        def training_step(self, batch, batch_idx): ...

        def configure_optimizers(self): ...

    with module(volume) as data, pytest.raises(CellMapError, match="import lightning as L"):
        pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path
        ).fit(Model(), datamodule=data)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with an accelerator memory is pinned")
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_memory_without_an_accelerator(volume, tmp_path, workers):
    """As with torch's own loader: a warning, and the batches."""
    with CellMapMultiDataset(crops(volume)) as source:
        expected = list(CellMapDataLoader(source, 2, samples_per_epoch=4))
        with pytest.warns(UserWarning, match="pin_memory=True, and no accelerator is found"):
            loader = CellMapDataLoader(source, 2, workers, samples_per_epoch=4, pin_memory=True)
        assert all(same(a, b) for a, b in zip(loader, expected, strict=True))
        with pytest.warns(UserWarning, match="no accelerator is found"):
            wrapped = CellMapDataLoader(Subset(source, range(4)), 2, workers, pin_memory=True)
        assert len(list(wrapped)) == 2
        loader.close()
        wrapped.close()
    with pytest.warns(UserWarning, match="no accelerator is found"):
        assert len(fit(volume, tmp_path, task(), pin_memory=True, num_workers=workers)) == 3
