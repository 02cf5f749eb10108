"""Locations of data: addresses, public buckets, and paths."""

import sys
from pathlib import Path

import pytest

from cellmap_lightning.errors import CellMapError, CellMapValueError, MissingExtraError
from cellmap_lightning.io.store import Remote, parse_location
from tests.io.test_remote import samples_of


def test_addresses_that_nothing_reads(monkeypatch):
    with pytest.raises(CellMapValueError, match=r"begin with s3, .* not ftp"):
        samples_of("ftp://somewhere/v.zarr")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingExtraError, match=r"-e \"\.\[gcs\]\""):
        samples_of("gs://bucket/v.zarr")
    with pytest.raises(CellMapError, match="storage_options"):
        samples_of("s3://bucket/v.zarr", storage_options={"anno": True})


def test_open_buckets_need_no_options():
    assert parse_location("s3://janelia-cosem-datasets/jrc_hela-2/jrc_hela-2.zarr").is_open
    assert not parse_location("s3://janelia-cosem-datasets/x", {"profile": "lab"}).is_open
    assert not parse_location("s3://mine/x").is_open


def test_places():
    place = parse_location("s3://bucket/a/b.zarr/", {"anon": True})
    assert (place / "c/d").url == "s3://bucket/a/b.zarr/c/d"
    assert [p.url for p in place.parents] == ["s3://bucket/a", "s3://bucket"]
    assert (place.name, place.stem, place.suffix) == ("b.zarr", "b", ".zarr")
    inside = parse_location("zip://a/b::s3://bucket/x.zip")
    assert (inside / "c").url == "zip://a/b/c::s3://bucket/x.zip"
    assert parse_location("file:///data/x") == Path("/data/x")
    assert parse_location("~/x") == Path.home() / "x"
    assert isinstance(place, Remote)
    assert hash(place) == hash(parse_location("s3://bucket/a/b.zarr", {"anon": True}))
