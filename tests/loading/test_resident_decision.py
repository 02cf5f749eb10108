"""The decision about regions on the device, from numbers alone."""

import pickle

import pytest
import torch

from cellmap_lightning.batches.memory import BatchMemory, FormMemory
from cellmap_lightning.loading.prefetch import PrefetchSettings, decide
from cellmap_lightning.loading.resident_decision import ResidentRequest, resident_bytes, resident_text
from cellmap_lightning.loading.resident_reader import ResidentReader
from cellmap_lightning.loading.split_residents import SplitResidents
from cellmap_lightning.resident.device_cache import DeviceCache
from cellmap_lightning.resident.gather import GATHER_BYTES
from tests.resident.datasets import SETS, open_set

GB = 10**9
#: 0.9 GB finished and 0.1 GB compact: on a CUDA device two batches are prefetched.
BATCH = BatchMemory({"raw": 9 * GB // 10}, FormMemory({"raw": GB // 10}))


def resident(device="cuda", total=80 * GB, settings=None, **request):
    given = {"cache": "auto", "needed": 5 * GB}
    return decide(BATCH, device, total, settings or PrefetchSettings(), ResidentRequest(**(given | request))).resident


@pytest.mark.parametrize(
    ("how", "enabled", "reason"),
    [
        ({}, True, "5 GB of voxels, and 38.3 GB are free (half of the memory without batches)"),
        ({"cache": "device"}, True, "5 GB of voxels, and 38.3 GB are free"),
        ({"cache": "disk"}, False, "cache=disk"),
        ({"cache": "memory"}, False, "cache=memory"),
        ({"cache": "chunks"}, False, "cache=chunks"),
        ({"cache": "none"}, False, "cache=none"),
        ({"device": "cpu"}, False, "a cpu device has no memory of another kind"),
        ({"device": "mps"}, False, "a mps device has no memory of another kind"),
        ({"device": "xpu"}, True, "5 GB of voxels"),
        ({"device": "cpu", "cache": "device"}, True, "5 GB of voxels, and 38.5 GB are free"),
        ({"needed": 39 * GB}, False, "too little for all; cache=device holds the crops that fit"),
        ({"needed": 39 * GB, "cache": "device"}, True, "crops that do not fit are read on the host"),
        ({"needed": 35 * GB, "others": 5 * GB}, False, "35 GB of voxels, and 33.3 GB are free"),
        ({"limit": 4 * GB}, False, "5 GB of voxels, and 4 GB are free (device_cache_bytes)"),
        ({"limit": 5 * GB}, True, "(device_cache_bytes)"),
        ({"limit": 4 * GB, "cache": "device"}, True, "4 GB are free (device_cache_bytes): crops that do not fit"),
        ({"total": None}, False, "the memory of a cuda device is unknown; set device_cache_bytes"),
        ({"total": None, "limit": 5 * GB}, True, "5 GB are free"),
        ({"total": 2 * GB, "cache": "device"}, False, "0 GB are free (half of the memory without batches): set"),
        ({"obstacle": "num_workers=2", "cache": "device"}, False, "num_workers=2"),
    ],
)  # fmt: skip
def test_each_decision_has_a_reason(how, enabled, reason):
    decision = resident(**how)
    assert decision.enabled == enabled
    assert reason in decision.reason
    assert (decision.budget > 0) == enabled
    text = resident_text("train", decision)
    assert text.startswith(f"device cache for train: {'on, at most' if enabled else 'off'}")
    assert decision.reason in text


def test_the_default_budget_leaves_room_for_batches():
    """Half of the memory, without ``depth + 2`` compact batches, a finished one, and what a gather needs."""
    for depth in (0, 1, 2, 4):
        settings = PrefetchSettings(depth=depth, enabled=True)
        assert resident(settings=settings).budget == 40 * GB - (depth + 2) * GB // 10 - 9 * GB // 10 - GATHER_BYTES


def test_without_a_request_there_is_none():
    assert not decide(BATCH, "cuda", 80 * GB, PrefetchSettings()).resident.enabled


@pytest.mark.parametrize("name", SETS)
def test_the_bytes_are_those_that_are_held(volume, name):
    """Computed before anything is read, and equal to what is allocated once every crop was shown."""
    with open_set(volume, name) as dataset:
        predicted = resident_bytes(dataset)
        assert not dataset._store.planned
        cache = DeviceCache("cpu", predicted)
        batch = ResidentReader(dataset, cache).read(dataset.draw(range(64), True, 0))
        assert predicted == cache.nbytes == sum(held.voxels.nbytes for held in cache._regions.values())
        assert all(rows.described for rows in batch._arrays.values()) or name in (
            "rotated and averaged", "averaged about z", "elastic and averaged", "deformed", "quarter turns",
        )  # fmt: skip


def test_splits_share_the_budget(volume):
    """Memory that one split needs is not free for another, and is free again when it no longer uses the device."""
    device, cpu = torch.device("cpu"), "cpu"
    with (
        open_set(volume, "boxes of a level", cache="device") as first,
        open_set(volume, "boxes of a level", train=False, cache="device") as second,
    ):
        residents = SplitResidents(10_000_000)
        request = residents.request("val", second, 0, False)
        assert (request.others, request.needed) == (0, resident_bytes(second))
        cache = residents.of("val", second, 2, device, request, None)
        assert cache.device.type == cpu
        request = residents.request("train", first, 0, False)
        assert request.others == resident_bytes(second)
        assert residents.of("train", first, 2, device, request, None) is cache
        assert residents.request("val", second, 0, False).others == resident_bytes(first)
        off = residents.request("train", first, 2, False)
        assert off.obstacle == "num_workers=2, and one process uses the device; set num_workers=0"
        assert residents.of("train", first, 2, device, off, None) is None
        assert residents.request("val", second, 0, False).others == 0
        assert "on_before_batch_transfer" in residents.request("train", first, 0, True).obstacle
        assert "predicted" in residents.request("predict", first, 0, False).obstacle
        copy = pickle.loads(pickle.dumps(residents))
        assert (copy.cache, copy.limit) == (None, 10_000_000)
        residents.close()
        assert cache.nbytes == 0
