import hashlib
import itertools
import weakref

import pytest
import torch
from torch.utils.data import SequentialSampler

from cellmap_lightning import CellMapDataLoader, CellMapDataset, CellMapError, CellMapMultiDataset
from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.errors import CellMapTypeError
from cellmap_lightning.loading.options import LoaderOptions
from cellmap_lightning.loading.prefetch import PrefetchDecision
from cellmap_lightning.loading.sampler import StreamSampler
from tests.conftest import CLASSES, INPUTS, TARGETS, reading_threads
from tests.make import make_dataset

TURNS = {
    "mirror": {"axes": {"x": 0.5, "y": 0.5}},
    "transpose": {"axes": ["x", "y"]},
    "rotate": {"axes": {"z": [-9, 9]}},
}


def make(volume, is_train=True, **kwargs):
    return CellMapMultiDataset(
        [
            make_dataset(
                volume.raw_path,
                f"{volume.path}/recon-1/labels/groundtruth/crop{n}/[mito,er]",
                CLASSES,
                INPUTS,
                TARGETS,
                spatial_transforms=TURNS,
                is_train=is_train,
                read=ReadOptions(pad=True),
                **kwargs,
            )
            for n in (1, 2, 3)
        ]
    )


@pytest.fixture
def dataset(volume):
    with make(volume) as dataset:
        yield dataset


def digest(batch):
    """One number for the bits of a batch, NaN included."""
    parts = [batch[name].contiguous().view(torch.uint8).numpy().tobytes() for name in sorted(batch)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_batches_keys_and_length(dataset):
    loader = CellMapDataLoader(dataset, 4, samples_per_epoch=10)
    assert loader.dataset.dataset is dataset
    assert len(loader.dataset) == 10
    assert len(loader) == 2  # the incomplete last batch of an epoch is dropped while training
    batches = list(loader)
    assert len(batches) == 2
    assert all(list(b) == ["raw", "labels", "idx"] for b in batches)
    assert all(b["raw"].shape == (4, 1, 8, 16, 24) for b in batches)


def test_a_sample_depends_on_seed_and_number_alone(volume):
    """Not on worker processes, threads, what was read before, or the number of ranks."""
    with make(volume, max_workers=1) as one, make(volume, max_workers=4) as four:
        reference = [digest(b) for b in CellMapDataLoader(one, 2, samples_per_epoch=8, seed=5)]
        assert len(set(reference)) == 4
        assert [digest(b) for b in CellMapDataLoader(four, 2, samples_per_epoch=8, seed=5)] == reference
        assert [digest(b) for b in CellMapDataLoader(four, 2, samples_per_epoch=8, seed=6)] != reference
        singles = CellMapDataLoader(four, 1, samples_per_epoch=8, seed=5)
        rows = [row["raw"] for row in singles]
        for start, batch in zip(range(0, 8, 2), CellMapDataLoader(one, 2, samples_per_epoch=8, seed=5), strict=True):
            assert torch.equal(batch["raw"], torch.cat(rows[start : start + 2]))


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_worker_processes_deliver_the_same_bits(dataset, method):
    reference = [digest(b) for b in CellMapDataLoader(dataset, 2, samples_per_epoch=8)]
    dataset.close()
    loader = CellMapDataLoader(dataset, 2, 2, samples_per_epoch=8, multiprocessing_context=method)
    assert [digest(b) for b in loader] == reference
    assert [digest(b) for b in loader] != reference  # the next epoch
    del loader


def test_ranks_share_the_global_stream(dataset):
    whole = [b["idx"].tolist() for b in CellMapDataLoader(dataset, 4, samples_per_epoch=16)]
    ranks = [
        [
            b["idx"].tolist()
            for b in CellMapDataLoader(dataset, 2, samples_per_epoch=16, options=LoaderOptions(rank=rank, world=2))
        ]
        for rank in (0, 1)
    ]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in whole]


def test_epoch_increments_at_the_first_batch(dataset):
    loader = CellMapDataLoader(dataset, 2, samples_per_epoch=4)
    first = [digest(b) for b in loader]
    iter(loader)  # abandoned before its first batch: no epoch
    second = [digest(b) for b in loader]
    assert first != second
    loader.set_epoch(0)
    assert [digest(b) for b in loader] == first
    assert [digest(b) for b in loader] == second
    assert [digest(b) for b in CellMapDataLoader(dataset, 2, samples_per_epoch=4)] == first


def test_sample_numbers_continue_through_epochs(dataset):
    """Epoch 1 of 4 samples is the second half of an epoch of 8."""
    long = [digest(b) for b in CellMapDataLoader(dataset, 2, samples_per_epoch=8)]
    loader = CellMapDataLoader(dataset, 2, samples_per_epoch=4)
    assert [digest(b) for b in loader] + [digest(b) for b in loader] == long


def test_tiles_cover_every_crop_the_same_each_time(volume):
    with make(volume, is_train=False) as dataset:
        loader = CellMapDataLoader(dataset, 4, is_train=False)
        seen = [i for b in loader for i in b["idx"].tolist()]
        assert seen == [i for b in loader for i in b["idx"].tolist()]
        assert len(seen) == len(set(seen)) == dataset.tile_count
        for crop in dataset.crops:
            lower, upper = crop.box.lower, crop.box.upper
            centers = [dataset.get_center(i) for i in seen if dataset.locate(i)[0] is crop]
            for axis, name in enumerate("zyx"):
                half = INPUTS["raw"]["shape"][axis] * INPUTS["raw"]["scale"][axis] / 2
                assert min(c[name] for c in centers) - half <= lower[axis] + 1e-6
                assert max(c[name] for c in centers) + half >= upper[axis] - 1e-6


def test_compact_and_finished_batches_agree(dataset):
    finished = [digest(b) for b in CellMapDataLoader(dataset, 2, samples_per_epoch=4)]
    loader = CellMapDataLoader(dataset, 2, samples_per_epoch=4, finish=False)
    compact = list(loader)
    assert all(isinstance(b, CompactBatch) for b in compact)
    assert [digest(loader.layout.finish(b)) for b in compact] == finished


def test_memory_is_that_of_the_real_batch(dataset):
    loader = CellMapDataLoader(dataset, 3, samples_per_epoch=3)
    batch = next(iter(loader))
    assert loader.batch_memory().total_bytes == batch["raw"].nbytes + batch["labels"].nbytes


def test_foreign_sampler_defines_the_order(dataset):
    """Lightning replaces the sampler for overfit_batches."""
    loader = CellMapDataLoader(dataset, 2, samples_per_epoch=4)
    again = CellMapDataLoader(loader.dataset, 2, sampler=SequentialSampler(loader.dataset))
    assert [digest(b) for b in again] == [digest(b) for b in again]
    assert [digest(b) for b in again] == [digest(b) for b in loader]


def test_read_error_is_raised_and_leaves_nothing_queued(volume, tmp_path):
    import shutil

    copy = tmp_path / "broken.zarr"
    shutil.copytree(volume.path, copy)
    for chunk in (copy / "recon-1/em/fibsem-uint8/s1").rglob("*"):
        if chunk.is_file() and not chunk.name.startswith("."):
            chunk.write_bytes(b"not a chunk")
    target = f"{copy}/recon-1/labels/groundtruth/crop2/[mito]"
    dataset = CellMapDataset(f"{copy}/recon-1/em/fibsem-uint8", target, ["mito"], INPUTS, TARGETS)
    loader = CellMapDataLoader(dataset, 4, samples_per_epoch=8)
    with pytest.raises(CellMapError, match=r"broken/crop2: raw: .*fibsem-uint8/s1: voxels z\[") as caught:
        next(iter(loader))
    assert isinstance(caught.value, OSError)
    assert not dataset._pool._queued
    dataset.close()
    assert reading_threads() == []


def test_fewer_than_all_tiles_are_spread_over_the_crops(volume):
    with make(volume, is_train=False) as dataset:
        loader = CellMapDataLoader(dataset, 2, samples_per_epoch=6, is_train=False)
        seen = [i for b in loader for i in b["idx"].tolist()]
        assert len(set(seen)) == 6
        assert {dataset.locate(i)[0].label for i in seen} == {d.label for d in dataset.datasets}
        with pytest.raises(CellMapError, match="the number of tiles, without is_train=True"):
            CellMapDataLoader(dataset, samples_per_epoch=dataset.tile_count + 1, is_train=False)


def test_seed_defaults_to_the_datasets(volume):
    with make(volume, seed=7) as seven, make(volume) as zero:
        first = digest(next(iter(CellMapDataLoader(seven, 2))))
        assert first == digest(next(iter(CellMapDataLoader(zero, 2, seed=7))))
        assert first != digest(next(iter(CellMapDataLoader(zero, 2))))


def test_arguments(dataset):
    for kwargs, match in (
        ({"shuffle": False}, "shuffle=False contradicts is_train=True"),
        ({"batch_size": None}, "batch_size must be a whole number"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"samples_per_epoch": 2.9}, "samples_per_epoch must be a whole number"),
        ({"options": LoaderOptions(rank=5, world=2)}, r"rank must be in \[0, 2\), got 5"),
    ):
        with pytest.raises(CellMapError, match=match):
            CellMapDataLoader(dataset, **kwargs)
    with pytest.raises(CellMapError, match="at least 1, got 0"):
        CellMapDataLoader(dataset, samples_per_epoch=0)
    with pytest.raises(CellMapError, match="cannot be distributed over 4 ranks"):
        CellMapDataLoader(dataset, samples_per_epoch=2, options=LoaderOptions(rank=0, world=4))
    with pytest.raises(
        TypeError, match="must be a CellMapDataset, or a dataset with __len__ and __getitem__ that wraps one, got list"
    ):
        CellMapDataLoader([1, 2])
    for kwargs, match in (
        ({"rank": 0}, r"no argument 'rank'; use options=LoaderOptions\(rank=\.\.\.\)"),
        ({"pin_memry": True}, r"no argument 'pin_memry'; did you mean 'pin_memory'\?"),
        ({"collate_fn": list}, r"no argument 'collate_fn'"),
    ):
        with pytest.raises(CellMapTypeError, match=match):
            CellMapDataLoader(dataset, **kwargs)


def test_ranks_are_read_late(dataset, monkeypatch):
    """A loader that was built before the processes found each other."""
    loader = CellMapDataLoader(dataset, 2, samples_per_epoch=8)
    assert list(loader.sampler.numbers()) == list(range(8))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert list(loader.sampler.numbers()) == [1, 3, 5, 7]
    assert len(loader) == 2


def test_stream_sampler_distributes_evenly():
    def share(is_train, rank):
        sampler = StreamSampler(10, is_train, rank, 4)
        sampler.start()
        return list(sampler)

    shares = [share(True, rank) for rank in range(4)]
    assert sorted(itertools.chain(*shares)) == list(range(8))
    shares = [share(False, rank) for rank in range(4)]
    assert sorted(itertools.chain(*shares)) == list(range(10))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_loader_keeps_no_reference_to_a_yielded_batch(dataset, workers):
    loader = CellMapDataLoader(dataset, 2, workers, samples_per_epoch=6, finish=False)
    batches = iter(loader)
    for _ in range(2):
        batch = next(batches)
        held = [weakref.ref(batch), *(weakref.ref(tensor) for tensor in batch.tensors.values())]
        del batch
        assert [ref() for ref in held if ref() is not None] == []
    loader.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_transform_cannot_end_an_epoch(volume, ahead):
    """StopIteration means the end wherever Python iterates; from a function of the user's it is an error."""
    emptied = iter([1.0])

    def transform(raw):
        return raw.float() * next(emptied)

    with make(volume, raw_value_transforms=transform) as dataset:
        loader = CellMapDataLoader(
            dataset, 1, samples_per_epoch=4, options=LoaderOptions(decision=PrefetchDecision(ahead, 1, 0, ""))
        )
        with pytest.raises(CellMapError, match="raw value transform of 'raw': it raised StopIteration"):
            list(loader)
