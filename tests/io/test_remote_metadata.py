"""Metadata on a server that fails at first: requests are retried a bounded number of times."""

from pathlib import Path

import pytest

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io import retrying as guard
from cellmap_lightning.io.ngff import read_array, read_multiscale
from cellmap_lightning.io.store import parse_location
from tests.io.faults import serving

METADATA = (".zattrs", ".zgroup", ".zarray", "zarr.json")
IMAGE = "recon-1/em/fibsem-uint8"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(guard, "FIRST_PAUSE", 0.001)


def opened(folder, fault="", times=0, only=METADATA):
    """Open an image and its arrays behind a server: the lattices and shapes, and the requests for each file."""
    with serving(folder, fault, times=times, only=only) as (url, asked):
        image = read_multiscale(parse_location(f"{url}/{IMAGE}"))
        arrays = [read_array(level.path) for level in image.levels]
        return [level.lattice for level in image.levels], [array.shape for array in arrays], dict(asked)


@pytest.mark.parametrize("stored", ["volume", "volume_v3"])
@pytest.mark.parametrize(("fault", "times"), [("503", 1), ("503", 4), ("429", 2), ("truncated", 1), ("reset", 2)])
def test_metadata_requests_are_retried(request, stored, fault, times):
    """Each file once more than it fails; aiohttp itself asks again once after a reset."""
    folder = Path(request.getfixturevalue(stored).path)
    *expected, plain = opened(folder)
    assert len(plain) >= 4
    guard.COUNTS.reset()
    *found, asked = opened(folder, fault, times)
    assert found == expected
    fails = [path for path in plain if fault != "truncated" or (folder / path[1:]).exists()]
    assert {path: count - plain[path] for path, count in asked.items() if path in fails} == dict.fromkeys(fails, times)
    assert guard.COUNTS.retries > 0
    assert guard.COUNTS.failures == 0


@pytest.mark.parametrize("fault", ["503", "truncated"])
def test_metadata_that_keeps_failing_is_an_error_after_a_bounded_number_of_requests(volume, fault):
    with serving(Path(volume.path), fault, only=f"{IMAGE}/.zattrs") as (url, asked):
        with pytest.raises(MetadataError, match=rf"{IMAGE}.*cannot be read .*{guard.DEFAULT_RETRY.attempts} attempts"):
            read_multiscale(parse_location(f"{url}/{IMAGE}"))
        assert asked[f"/{IMAGE}/.zattrs"] == guard.DEFAULT_RETRY.attempts


def test_metadata_is_asked_for_once_where_one_attempt_is_allowed(volume, monkeypatch):
    monkeypatch.setattr(guard, "DEFAULT_RETRY", guard.RetryPolicy(attempts=1))
    with serving(Path(volume.path), "503", times=1, only=f"{IMAGE}/.zattrs") as (url, asked):
        with pytest.raises(MetadataError, match="1 attempt in"):
            read_multiscale(parse_location(f"{url}/{IMAGE}"))
        assert asked[f"/{IMAGE}/.zattrs"] == 1


def test_metadata_that_is_refused_is_not_asked_for_again(volume):
    with serving(Path(volume.path), "401", only=f"{IMAGE}/.zattrs") as (url, asked):
        with pytest.raises(MetadataError, match="401"):
            read_multiscale(parse_location(f"{url}/{IMAGE}"))
        assert asked[f"/{IMAGE}/.zattrs"] == 1


def test_only_the_file_that_failed_is_asked_for_again(volume):
    one = f"/{IMAGE}/s1/.zarray"
    *_, plain = opened(Path(volume.path))
    *_, asked = opened(Path(volume.path), "503", 1, one)
    assert asked == plain | {one: plain[one] + 1}
