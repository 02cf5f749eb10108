"""Batches from a device, hunted for wrong voxels, and the memory that is held there.

On a CUDA device where there is one. On the CPU, where nothing is asynchronous, they show that the hunt is right.
"""

import gc

import pytest
import torch

from cellmap_lightning import CellMapDataLoader
from cellmap_lightning.loading.options import LoaderOptions
from cellmap_lightning.loading.prefetch import PrefetchDecision
from cellmap_lightning.loading.resident_decision import resident_bytes
from cellmap_lightning.loading.resident_reader import ResidentReader
from cellmap_lightning.resident.device_cache import DeviceCache
from cellmap_lightning.resident.gather import GATHER_BYTES
from tests.resident.datasets import open_set

CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
pytestmark = pytest.mark.usefixtures("no_threads_left")
SIZE, COUNT = 4, 96
MB = 2**20


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=CUDA)])
def device(request):
    return torch.device(request.param, 0 if request.param == "cuda" else None)


def loader(dataset, device, cache, depth=0, **more):
    decision = PrefetchDecision(True, depth, 1, "") if depth else None
    return CellMapDataLoader(
        dataset, SIZE, samples_per_epoch=COUNT, finish=False,
        options=LoaderOptions(resident=cache, device=device, decision=decision),
        pin_memory=device.type == "cuda", **more,
    )  # fmt: skip


def hunt(dataset, device, batches):
    """The samples that differ from those of the host: labels at all, raw by more than one of 255 steps."""
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    numbers = iter(range(COUNT))
    for batch in batches:
        found = (batch.to(device) if not isinstance(batch, dict) else batch).finish()
        draws = dataset.draw([next(numbers) for _ in range(SIZE)], True, dataset.seed)
        expected = {name: tensor.to(device) for name, tensor in dataset.read(draws).finish().items()}
        wrong += ((found["raw"] - expected["raw"]).abs() > 1.01 / 255).sum()
        for name in set(expected) - {"raw"}:
            same = (found[name] == expected[name]) | (found[name].isnan() & expected[name].isnan())
            # A point half-way between two voxels may round to either.
            wrong += (~same).sum() if device.type == "cpu" else ((~same).float().mean() > 1e-4)
    return int(wrong)


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("name", ["boxes of a level", "rotated by any angle", "elastic"])
def test_no_batch_is_corrupted(volume, device, name, depth):
    with open_set(volume, name, threads=2) as dataset:
        assert hunt(dataset, device, loader(dataset, device, DeviceCache(device, 1 << 30), depth)) == 0


def test_crops_that_make_room_for_others_corrupt_nothing(volume, device):
    """Each batch removes crops that the batch before has used, perhaps still uses."""
    with open_set(volume, "boxes of a level", threads=2) as dataset:
        reader = ResidentReader(dataset, DeviceCache("cpu", 0))
        largest = max(sum(r.extent_bytes for r in reader.regions(number)) for number in range(3))
        for depth in (0, 2):
            cache = DeviceCache(device, largest, idle_batches=0)
            assert hunt(dataset, device, loader(dataset, device, cache, depth)) == 0
            assert cache.uploaded > 2 * largest


def test_two_loaders_on_two_streams(volume, device):
    """One with a side stream and one without, in turns, on one cache."""
    with open_set(volume, "rotated by any angle", threads=2) as dataset:
        cache = DeviceCache(device, 1 << 30)
        pairs = zip(loader(dataset, device, cache, 2), loader(dataset, device, cache), strict=True)
        first, second = [], []
        for ahead, here in pairs:
            first.append(ahead.to(device))
            second.append(here.to(device))
        assert hunt(dataset, device, first) == hunt(dataset, device, second) == 0


def test_a_hunt_finds_wrong_voxels(volume, device):
    """Without it, the tests above would prove nothing."""
    with open_set(volume, "boxes of a level") as dataset:
        cache = DeviceCache(device, 1 << 30)
        assert hunt(dataset, device, loader(dataset, device, cache)) == 0
        next(iter(cache._regions.values())).voxels.zero_()
        assert hunt(dataset, device, loader(dataset, device, cache)) > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["boxes of a level", "rotated by any angle"])
def test_memory_is_within_the_prediction_and_is_freed(volume, name):
    device = torch.device("cuda", 0)
    with open_set(volume, name, shape=(24, 96, 96)) as dataset:
        predicted, sizes = resident_bytes(dataset), dataset.batch_memory(SIZE)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        cache = DeviceCache(device, predicted)
        for batch in loader(dataset, device, cache):
            batch.to(device).finish()
        del batch
        torch.cuda.synchronize()
        # torch rounds blocks up to 512 bytes, and large ones to 2 MiB.
        rounding = 2 * MB * len(cache._regions)
        assert predicted - MB <= torch.cuda.memory_allocated(device) - before <= predicted + rounding
        limit = predicted + rounding + sizes.total_bytes + sizes.compact.total_bytes + GATHER_BYTES
        assert torch.cuda.max_memory_allocated(device) - before <= limit
        cache.close()
        gc.collect()
        assert torch.cuda.memory_allocated(device) - before <= MB
