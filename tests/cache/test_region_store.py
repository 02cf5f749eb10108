"""The cache budget, eviction, and the privacy of region files."""

import logging
import os
import sys

import numpy as np
import pytest

from cellmap_lightning.cache.region_store import RegionStore
from cellmap_lightning.errors import CacheError
from cellmap_lightning.wording import size_text
from tests.cache.regions import (
    GRID,
    Array,
    opened,
    region_of,
    store_file,
    values,
    whole,
)

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes share voxels so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


# -- the budget


def three(store, ordered, sizes=(16, 32, 48)):
    regions = []
    for number, z in enumerate(sizes):
        data = values("uint8", (z, 64, 65), seed=number)
        regions.append(region_of(Array(data), data, f"array {number}", (16, 32, 65)))
    store.plan(regions, ordered, "some crops")
    return regions


@pytest.mark.parametrize("mode", ["disk", "memory"])
@pytest.mark.parametrize("ordered", [True, False])
def test_arrays_beyond_the_budget_are_not_cached_and_correct(mode, ordered, caplog):
    first = three(RegionStore("none"), True)
    budget = first[0].layout.nbytes + first[2].layout.nbytes
    store = RegionStore(mode, budget)
    with caplog.at_level(logging.WARNING, logger="cellmap_lightning"):
        regions = three(store, ordered)
    assert store.mapped.sum() == 2
    (record,) = caplog.records
    kept = sum(r.layout.nbytes for r, k in zip(regions, store.mapped, strict=True) if k)
    rest = sum(r.layout.nbytes for r in regions) - kept
    assert kept <= budget
    for part in ("some crops: 1 of 3 arrays", size_text(rest), size_text(budget), "raise cache_bytes"):
        assert part in record.getMessage()
    for _ in range(2):
        for region in regions:
            np.testing.assert_array_equal(whole(region), region.decode.data)
    for region, keeps in zip(regions, store.mapped, strict=True):
        assert region.is_cached == keeps
        assert len(region.decode.boxes) == len(set(region.decode.boxes)) or not keeps
    store.close()


def test_an_array_of_several_crops_is_cached_once():
    data = values("uint8")
    regions = [region_of(Array(data), data) for _ in range(3)]
    store = RegionStore("memory", regions[0].layout.nbytes)
    store.plan(regions, False, "test")
    assert store.mapped.all()
    for region in regions:
        np.testing.assert_array_equal(whole(region), data)
    assert store.decoded == np.prod(GRID)
    store.close()


def test_regions_of_earlier_runs_make_room(cache_dir):
    """Least recently used first, only as much as needed, and neither planned regions nor those in use."""
    data = values("uint8", (40, 64, 65))

    def run(keys, budget=None, close=True):
        regions = [region_of(Array(data), data, key, (16, 32, 65)) for key in keys]
        store = RegionStore("disk", budget)
        store.plan(regions, False, "test")
        for region in regions:
            np.testing.assert_array_equal(whole(region), data)
        if close:
            store.close()
        return regions, store

    one = run("a")[0][0].layout.nbytes
    names = {}
    for age, key in enumerate("abcde"):
        (region,), _ = run(key)
        names[region.digest()] = key
        (file,) = cache_dir.rglob(f"{region.digest()}.region")
        os.utime(file, (1000 + age, 1000 + age))

    def there():
        return "".join(sorted(names[file.stem] for file in cache_dir.rglob("*.region")))

    _, using = run("a", close=False)  # the longest unused until now
    assert there() == "abcde"
    (region,), store = run("f", 4 * one + 3 * 4096, close=False)
    names[region.digest()] = "f"
    assert "f" in there()
    assert "a" in there(), "in use"
    assert "b" not in there()
    assert "e" in there()
    store.close()
    using.close()
    (region,), _ = run("c" if "c" in there() else "d", one)
    assert there() == names[region.digest()], "everything else had to go"


def test_nothing_is_evicted_below_the_budget(cache_dir):
    data = values("uint8")
    for key in "abc":
        store = RegionStore("disk")
        region = region_of(Array(data), data, key)
        store.plan([region], False, "test")
        whole(region)
        store.close()
    assert len(list(cache_dir.rglob("*.region"))) == 3


def test_regions_of_other_collections_are_not_evicted(cache_dir):
    """Two collections of one process; the first has planned, and not read yet, what an earlier run left."""
    data = values("uint8", (40, 64, 65))

    def planned_for(key, budget):
        region = region_of(Array(data), data, key, (16, 32, 65))
        store = RegionStore("disk", budget)
        store.plan([region], False, "test")
        return region, store

    region, store = planned_for("a", None)
    whole(region)
    store.close()
    one = region.layout.nbytes
    region, train = planned_for("a", 2 * one)
    (file,) = cache_dir.rglob("*.region")
    os.utime(file, (1000, 1000))
    earlier, store = planned_for("b", None)
    whole(earlier)
    store.close()
    _, val = planned_for("c", 2 * one)
    np.testing.assert_array_equal(whole(region), data)
    assert train.decoded == 0
    train.close()
    val.close()


def test_a_folder_of_another_user_is_no_obstacle(cache_dir, caplog):
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    (cache_dir / f"regions-{os.getuid()}").mkdir(parents=True)
    os.chown(cache_dir / f"regions-{os.getuid()}", 12345, 12345)
    data = values("uint8")
    region = region_of(Array(data), data)
    store = RegionStore("disk")
    with caplog.at_level(logging.WARNING, logger="cellmap_lightning"):
        store.plan([region], False, "test")
    (record,) = caplog.records
    assert "belongs to another user" in record.getMessage()
    np.testing.assert_array_equal(whole(region), data)
    assert store.decoded == np.prod(GRID), "in memory"
    store.close()


def test_a_file_that_others_can_read_is_refused_with_advice(stored):
    path, _ = stored
    region, store = opened(path)
    whole(region)
    store.close()
    store_file(region, path).chmod(0o644)
    region, store = opened(path)
    with pytest.raises(CacheError, match=r"others may read or write it; remove it, or set CELLMAP_CACHE_DIR"):
        whole(region)
    store.close()
