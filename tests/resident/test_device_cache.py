"""The limit of the device cache, which crops make room, uploads of single chunks, and the release of memory."""

import gc
import logging
import multiprocessing
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch

from cellmap_lightning.errors import CellMapError, CellMapValueError
from cellmap_lightning.resident.device_cache import DeviceCache
from cellmap_lightning.resident.region import DeviceRegion
from tests.cache.regions import CHUNKS, SHAPE, Array, region_of, values

NBYTES = int(np.prod(SHAPE))


def region(key, shape=SHAPE, dtype="uint8", depth=0):
    data = values(dtype, shape, depth)
    return region_of(Array(data), data, key)


def cache_of(regions, **more):
    """A cache with room for so many regions of bytes."""
    return DeviceCache("cpu", regions * NBYTES, **more)


def admitted(cache, *crops):
    return [held is not None for held in cache.admit(crops)]


def test_crops_fill_the_budget_to_the_byte():
    crops = [[region("a"), region("b", dtype="uint16")], [region("c", depth=2)], [region("d")]]
    cache = cache_of(5)
    assert admitted(cache, *crops) == [True, True, False]
    assert cache.nbytes == 5 * NBYTES == cache.budget
    exact = cache_of(6)
    assert admitted(exact, *crops) == [True] * 3
    assert cache_of(0).admit(crops) == [None] * 3


def test_what_is_held_is_what_torch_allocated():
    cache, regions = cache_of(100), [region("a"), region("b", dtype="uint16"), region("c", depth=6)]
    (held,) = cache.admit([regions])
    assert cache.nbytes == sum(r.voxels.nbytes for r in held.values()) == sum(r.extent_bytes for r in regions)


def test_the_least_recently_used_crop_makes_room():
    a, b, c, d = ([region(key)] for key in "abcd")
    cache = cache_of(3, idle_batches=0)
    for crop in (a, b, c, a):
        assert admitted(cache, crop) == [True]
    assert admitted(cache, d) == [True]  # in place of b
    assert set(cache._regions) == {crop[0].digest() for crop in (a, c, d)}
    assert admitted(cache, b) == [True]  # in place of c
    assert set(cache._regions) == {crop[0].digest() for crop in (a, b, d)}
    assert cache.nbytes == 3 * NBYTES


def test_several_crops_make_room_for_a_large_one():
    cache = cache_of(4, idle_batches=0)
    for key in "abcd":
        assert admitted(cache, [region(key)]) == [True]
    assert admitted(cache, [region("e"), region("f", dtype="uint16")]) == [True]
    assert cache.nbytes == 4 * NBYTES
    assert len(cache._crops) == 2
    assert admitted(cache, [region("g", dtype="uint64")]) == [False]  # larger than all of it: nothing is removed
    assert cache.nbytes == 4 * NBYTES


@pytest.mark.parametrize("idle", [1, 3, 10])
def test_crops_in_use_stay(idle):
    """With crops picked at random, one that does not fit is read on the host instead of replacing one in use."""
    a, b = [region("a")], [region("b")]
    cache = cache_of(1, idle_batches=idle)
    assert admitted(cache, a) == [True]
    assert [admitted(cache, b)[0] for _ in range(idle + 1)] == [False] * idle + [True]


def test_crops_of_one_batch_do_not_replace_each_other():
    cache = cache_of(1, idle_batches=0)
    assert admitted(cache, [region("a")], [region("b")]) == [True, False]
    assert admitted(cache, [region("b")], [region("a")]) == [True, False]


def test_regions_that_crops_share_are_held_once():
    raw = region("raw")
    cache = cache_of(3, idle_batches=0)
    assert admitted(cache, [raw, region("a")], [region("raw"), region("b")]) == [True, True]
    assert cache.nbytes == 3 * NBYTES
    first, second = cache.admit([[raw], [other := region("raw")]])
    assert first[id(raw)] is second[id(other)]
    # A crop that is removed leaves what another one uses.
    assert admitted(cache, [raw, region("a")]) == [True]
    assert admitted(cache, [region("c")]) == [True]
    assert raw.digest() in cache._regions
    assert region("b").digest() not in cache._regions


def test_a_removed_crop_is_uploaded_again():
    a, b = region("a"), region("b")
    cache = cache_of(1, idle_batches=0)
    for _ in range(2):
        for one in (a, b):
            (held,) = cache.admit([[one]])
            assert held[id(one)].missing((0, 0, 0), SHAPE)
            upload(cache, held[id(one)], (0, 0, 0), SHAPE)
            assert np.array_equal(held[id(one)].voxels.numpy(), one.decode.data)
    assert cache.uploaded == 4 * NBYTES


def upload(cache, held, start, shape):
    chunks = held.missing(start, shape)
    with cache.queueing():
        cache.upload([(held, chunk, held.stage(chunk, False)) for chunk in chunks])
    return len(chunks)


@pytest.mark.parametrize(
    ("dtype", "depth"), [("uint8", 0), ("uint16", 0), ("int32", 0), ("float64", 0), ("uint8", 4), ("uint8", 6)]
)
@pytest.mark.parametrize("limits", [((0, 0, 0), SHAPE), ((3, 5, 17), (20, 26, 40)), ((8, 16, 16), (16, 17, 39))])
def test_chunks_are_uploaded_once_and_only_those_of_the_box(dtype, depth, limits):
    data = values(dtype, depth=depth)
    one = region_of(Array(data), data)
    one.limit(*limits)
    cache = DeviceCache("cpu", 1 << 30)
    (held,) = cache.admit([[one]])
    held = held[id(one)]
    lo, hi = limits
    corner = tuple(n - 1 for n in hi)
    assert upload(cache, held, corner, (1, 1, 1)) == 1
    assert len(one.decode.boxes) == 1
    shape = tuple(b - a for a, b in zip(lo, hi, strict=True))
    grid = np.prod([-(-b // c) - a // c for a, b, c in zip(lo, hi, CHUNKS, strict=True)])
    assert upload(cache, held, lo, shape) == grid - 1
    assert upload(cache, held, lo, shape) == 0
    part = data[tuple(slice(a, b) for a, b in zip(lo, hi, strict=True))]
    assert held.voxels.numpy().tobytes() == np.ascontiguousarray(part).tobytes()
    assert cache.uploaded == part.nbytes == cache.nbytes


def test_a_device_with_less_memory_than_the_budget(caplog):
    small, edge = region("a"), 1 << 17
    huge = region_of(None, np.broadcast_to(np.uint8(0), (edge,) * 3), "huge", chunks=(edge,) * 3)
    cache = DeviceCache("cpu", 1 << 62)
    with caplog.at_level(logging.WARNING):
        assert admitted(cache, [small], [region("b"), huge], [region("c")]) == [True, False, False]
    assert cache.nbytes == cache.budget == NBYTES
    assert "cpu has no memory left for decoded voxels" in caplog.text
    assert "set device_cache_bytes to less" in caplog.text


def test_a_crop_that_does_not_fit_is_reported_once(caplog):
    cache = cache_of(1)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            admitted(cache, [region("a")], [region("b")])
    assert [r.message for r in caplog.records if "no room for b" in r.message].__len__() == 1


def test_close_frees_all_and_the_cache_can_be_used_again():
    cache, one = cache_of(2), region("a")
    (held,) = cache.admit([[one]])
    upload(cache, held[id(one)], (0, 0, 0), SHAPE)
    voxels = weakref.ref(held[id(one)].voxels)
    cache.close()
    gc.collect()
    assert voxels() is None
    assert cache.nbytes == 0
    with pytest.raises(CellMapError, match="described before the device cache was closed; begin a new pass"):
        held[id(one)].voxels  # noqa: B018  a property
    (again,) = cache.admit([[one]])
    assert upload(cache, again[id(one)], (0, 0, 0), SHAPE) == 18
    assert cache.nbytes == NBYTES


@pytest.mark.parametrize("budget", [-1, 1.5, "1GB", None, True])
def test_budgets_that_are_none(budget):
    with pytest.raises(CellMapError, match="device_cache_bytes must be"):
        DeviceCache("cpu", budget)
    with pytest.raises(CellMapError, match="idle_batches must be"):
        DeviceCache("cpu", 1, idle_batches=budget)


def test_it_stays_in_its_process():
    cache = cache_of(1)
    with pytest.raises(CellMapError, match="cannot be sent to another process; use num_workers=0"):
        pickle.dumps(cache)

    def refused(results):
        try:
            cache.admit([[region("a")]])
        except CellMapError as error:
            results.put(str(error))
        cache.close()  # does nothing

    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    child = fork.Process(target=refused, args=(results,))
    child.start()
    assert "cannot be used in a forked process" in results.get(timeout=60)
    child.join()


def test_threads_share_it():
    """Each of four threads reads crops at random; what it finds on the device is always what is stored."""
    regions = [region(str(n), shape=(16, 16, 16 + n)) for n in range(6)]
    cache = DeviceCache("cpu", sum(r.extent_bytes for r in regions) // 2, idle_batches=40)
    wrong, hits = [], []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(150):
            one = regions[rng.integers(6)]
            (held,) = cache.admit([[one]])
            hits.append(held is not None)
            if held is not None:
                upload(cache, held[id(one)], (0, 0, 0), one.shape)
                if not np.array_equal(held[id(one)].voxels.numpy(), one.decode.data):
                    wrong.append(one)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 0.2 < np.mean(hits) < 1
    assert cache.nbytes <= cache.budget


def test_a_box_outside_of_the_limits_is_not_held():
    one = region("a")
    one.limit((3, 5, 17), (20, 26, 40))
    held = DeviceRegion(one, torch.device("cpu"))
    assert held.holds((3, 5, 17), (17, 21, 23))
    assert not held.holds((2, 5, 17), (1, 1, 1))
    assert not held.holds((3, 5, 17), (18, 1, 1))
    with pytest.raises(CellMapValueError):
        DeviceCache("cpu", -1)
