"""A cache folder for each test, and arrays that the tests of the cache share."""

import pytest
import zarr

from tests.cache.annotated_volume import STORAGE, Volume, fill_up
from tests.cache.regions import V2, values


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stored(tmp_path):
    """A Zarr array, and its voxels."""
    data = values("uint8", (100, 130, 150))
    zarr.create_array(tmp_path / "a", data=data, chunks=(32, 64, 64), zarr_format=2, chunk_key_encoding=V2)
    return tmp_path / "a", data


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """The same voxels in each kind of store; the first also with more classes."""
    root = tmp_path_factory.mktemp("stores")
    made = {name: fill_up(Volume(root / f"{n}.zarr", **how), 3) for n, (name, how) in enumerate(STORAGE.items())}
    return made | {n: fill_up(Volume(root / f"classes{n}.zarr"), n) for n in (1, 8, 11, 24)}
