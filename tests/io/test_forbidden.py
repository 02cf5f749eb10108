"""Stores that answer "forbidden" for what does not exist: it is missing, unless nothing may be read."""

import logging
import threading

import numpy as np
import pytest
import zarr
from zarr.codecs import ZstdCodec

from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.errors import CellMapError, CellMapFileNotFoundError, ChunkError, MetadataError
from cellmap_lightning.io import store
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import Level, read_multiscale
from cellmap_lightning.io.retrying import RetryPolicy, is_forbidden
from cellmap_lightning.io.store import parse_location
from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from tests.io.faults import forbidding
from tests.make import make_dataset

SCALE = (8.0, 8.0, 8.0)
SPEC = {"raw": {"shape": [32, 32, 32], "scale": list(SCALE)}}
TARGETS = {"labels": SPEC["raw"]}
RAW = np.random.default_rng(0).integers(1, 255, (32, 32, 32)).astype(np.uint8)
LABELS = (np.indices((32, 32, 32)).sum(axis=0) // 16 % 2).astype(np.uint8)
READERS = ["zarr", "tensorstore"]
CODE = {"cellmap": {"annotation": {"annotation_type": {
    "type": "semantic_segmentation", "encoding": {"absent": 0, "unknown": 255},
}}}}  # fmt: skip
ONCE = RetryPolicy(1, 20.0)


@pytest.fixture(autouse=True)
def nothing_remembered():
    store._readable.clear()


@pytest.fixture(params=[2, 3], ids=["v2", "v3"])
def root(request, tmp_path):
    """Raw, and a crop with two classes, in chunks of 16³."""
    path = tmp_path / "bucket" / "volume.zarr"
    storage = ArrayOptions(chunks=(16, 16, 16), zarr_format=request.param)
    how = {"scale": SCALE, "translation": (4.0, 4.0, 4.0), "storage": storage}
    write_group(path, zarr_format=request.param)
    write_group(path / "crop1", zarr_format=request.param)
    write_multiscale(path / "raw", RAW, **how)
    for name in ("mito", "er"):
        write_multiscale(path / "crop1" / name, LABELS, mode="mode", array_attributes=lambda _, data: CODE, **how)
    return path


def chunk(root, image, index="0/0/0", level="s0"):
    """The file of a chunk, in whichever version."""
    folder = root / image / level
    return folder / index if (folder / ".zarray").exists() else folder / "c" / index


def dataset(url, classes="mito,er", **more):
    given = {"cache": "none", "raw_value_transforms": None, "read_attempts": 1} | more
    return make_dataset(
        f"{url}/volume.zarr/raw", f"{url}/volume.zarr/crop1/[{classes}]", classes.split(","), SPEC, TARGETS, **given
    )


def sample(url, **more):
    with dataset(url, **more) as data:
        return {name: value.numpy() for name, value in data[0].items() if name in ("raw", "labels")}


def right(value):
    return np.stack([LABELS, LABELS]) if value == "labels" else RAW[None]


@pytest.mark.parametrize("reader", READERS)
def test_a_volume_is_read(root, reader):
    with forbidding(root.parent) as (url, _):
        found = sample(url, reader=reader)
    assert all((found[name] == right(name)).all() for name in found)


@pytest.mark.parametrize("reader", READERS)
def test_by_s3(root, reader):
    pytest.importorskip("s3fs")
    with forbidding(root.parents[1]) as (url, _):
        options = {"anon": True, "endpoint_url": url}
        assert (sample("s3://bucket", storage_options=options, reader=reader)["labels"] == right("labels")).all()
        chunk(root, "crop1/mito").unlink()
        found = sample("s3://bucket", storage_options=options, reader=reader)["labels"]
        assert (found[0, :16, :16, :16] == 0).all()
        assert (found[1] == LABELS).all()
        with pytest.raises(CellMapFileNotFoundError, match=r"class 'pm' is in the bracket .* does not exist"):
            dataset("s3://bucket", "mito,pm", storage_options=options)
        for name in (".zgroup", ".zattrs", "zarr.json"):
            (root / "crop1" / name).unlink(missing_ok=True)
        with pytest.raises(CellMapFileNotFoundError, match=r"crop1 does not exist: .* and nothing may be listed there"):
            dataset("s3://bucket", "mito,pm", storage_options=options)
        with pytest.raises(
            MetadataError, match=r"PermissionError: (Access Denied|Forbidden); .*credentials are missing, wrong"
        ):
            read_multiscale(parse_location("s3://elsewhere/volume.zarr/raw", options))


def test_without_any_metadata_above(root):
    """Folders between the volume and its images need not be groups."""
    for folder in (root, root / "crop1"):
        for name in (".zgroup", ".zattrs", "zarr.json"):
            (folder / name).unlink(missing_ok=True)
    with forbidding(root.parent) as (url, _):
        assert (sample(url)["labels"] == right("labels")).all()


def test_a_level_that_is_listed_and_not_there(root, caplog):
    """The next finer one is read, as with any other store."""
    write_multiscale(
        root / "deep", RAW, scale=SCALE, translation=(4.0, 4.0, 4.0),
        storage=ArrayOptions(chunks=(16, 16, 16), zarr_format=2 if (root / ".zgroup").exists() else 3), levels=2,
    )  # fmt: skip
    for file in (root / "deep" / "s1").glob("*"):
        file.rename(root / file.name) if file.is_file() else None
    for name in (".zarray", ".zattrs"):
        (root / name).unlink(missing_ok=True)
    spec = {"raw": {"shape": [16, 16, 16], "scale": [16, 16, 16]}}
    with (
        forbidding(root.parent) as (url, _),
        CellMapDataset(f"{url}/volume.zarr/deep", input_arrays=spec, read=ReadOptions(cache="none")) as data,
    ):
        assert "lists level s1, which is not on disk; the finer level s0 is read instead" in caplog.text
        assert data[0]["raw"].shape == (1, 16, 16, 16)
    with forbidding(root.parent) as (url, control):
        control.refused = lambda path: "/deep/s0/" in path
        with pytest.raises(CellMapFileNotFoundError, match="none of its levels is on disk"):
            _ = read_multiscale(parse_location(f"{url}/volume.zarr/deep")).finest


@pytest.mark.parametrize("path", ["crop1/[mito,pm]", "crop2/[mito]", "crop1/[mito,mit]"])
def test_missing_objects_are_not_found(root, path):
    with forbidding(root.parent) as (url, _), pytest.raises(CellMapFileNotFoundError, match="does not exist"):
        CellMapDataset(
            f"{url}/volume.zarr/raw",
            f"{url}/volume.zarr/{path}",
            ["mito", "pm", "mit"],
            SPEC,
            TARGETS,
            read=ReadOptions(cache="none"),
        )
    with forbidding(root.parent) as (url, _), pytest.raises(CellMapFileNotFoundError, match="does not exist"):
        CellMapDataset(f"{url}/volume.zarr/rwa", input_arrays=SPEC, read=ReadOptions(cache="none"))


@pytest.mark.parametrize("reader", READERS)
def test_missing_chunks_of_labels_are_background(root, reader):
    chunk(root, "crop1/mito", "1/0/1").unlink()
    with forbidding(root.parent) as (url, _):
        found = sample(url, reader=reader)["labels"]
    expected = right("labels").astype(float)
    expected[0, 16:, :16, 16:] = 0
    assert (found == expected).all()


@pytest.mark.parametrize("reader", READERS)
def test_missing_chunks_of_raw_follow_missing_raw(root, reader, caplog):
    chunk(root, "raw", "1/0/1").unlink()
    hole = np.zeros((32, 32, 32), bool)
    hole[16:, :16, 16:] = True
    with forbidding(root.parent) as (url, _):
        with pytest.raises(ChunkError, match=r"voxels z\[16:32\], y\[0:16\], x\[16:32\] are not stored.*missing_raw=w"):
            sample(url, reader=reader)
        for policy in ("warn", "mask"):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                found = sample(url, reader=reader, missing_raw=policy)
            assert (found["raw"][0] == np.where(hole, 0, RAW)).all()
            assert "1/0/1 is missing" in caplog.text
            assert (np.isnan(found["labels"][0]) == (hole if policy == "mask" else np.zeros_like(hole))).all()


@pytest.mark.parametrize("reader", READERS)
def test_missing_chunks_of_raw_are_noticed_where_the_server_reports_them(root, reader):
    """A server that answers "not found", and TensorStore, which then fills without a word."""
    from tests.io.faults import serving

    chunk(root, "raw", "1/0/1").unlink()
    with serving(root.parent) as (url, _), pytest.raises(ChunkError, match=r"x\[16:32\] are not stored.*missing_raw=w"):
        sample(url, reader=reader)


def test_everything_forbidden_is_an_error_that_blames_credentials(root):
    with forbidding(root.parent) as (url, control):
        control.refused = lambda path: True
        for make in (
            lambda: dataset(url),
            lambda: CellMapDataset(f"{url}/volume.zarr/raw", input_arrays=SPEC),
            lambda: read_multiscale(parse_location(f"{url}/volume.zarr/raw")),
        ):
            with pytest.raises(CellMapError, match=r"403.*credentials are missing, wrong or expired.*beside it or abo"):
                make()
        split = CellMapDataSplit(
            datasets={"train": [{"raw": f"{url}/volume.zarr/raw", "gt": f"{url}/volume.zarr/crop1/[mito]"}] * 2},
            classes=["mito"],
            input_arrays=SPEC,
            target_arrays=TARGETS,
            read=ReadOptions(cache="none"),
        )
        with pytest.raises(CellMapError, match="credentials are missing, wrong or expired"):
            split["train"]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("image", ["raw", "crop1/mito"])
def test_credentials_that_expire_are_an_error_and_never_background(root, reader, image):
    """Also right after a chunk was missing, and for a chunk that is missing itself."""
    chunk(root, image, "1/1/1").unlink()
    chunk(root, image, "1/1/0").unlink()
    with forbidding(root.parent) as (url, control):
        found = ChunkReader(read_multiscale(parse_location(f"{url}/volume.zarr/{image}")).finest, "crop1", reader, ONCE)
        expected = (RAW if image == "raw" else LABELS).copy()
        expected[16:, 16:] = 0
        assert (found.read((0, 0, 0), (16, 32, 32)) == expected[:16]).all()
        assert (found.read((16, 16, 16), (16, 16, 16)) == 0).all()
        control.refused = lambda path: True
        for start in ((16, 0, 0), (16, 16, 0), (0, 0, 16)):
            with pytest.raises(ChunkError, match=r"credentials are missing, wrong or expired|PERMISSION_DENIED") as e:
                found.read(start, (16, 16, 16))
            assert "crop1: " in str(e.value)
        with pytest.raises(ChunkError, match="credentials"):
            found.has_chunk((0, 0, 0))
        control.refused = lambda path: False
        assert (found.read((0, 0, 0), (32, 32, 32)) == expected).all(), "and they can be renewed"


def test_existence_of_chunks_is_requested_from_the_store(root):
    chunk(root, "raw", "0/1/0").unlink()
    with forbidding(root.parent) as (url, _):
        reader = ChunkReader(read_multiscale(parse_location(f"{url}/volume.zarr/raw")).finest, "raw", retry_policy=ONCE)
        there = {index: reader.has_chunk(index) for index in np.ndindex(2, 2, 2)}
    assert [index for index, stored in there.items() if not stored] == [(0, 1, 0)]


def test_few_requests_tell_missing_chunks_from_refused_ones(root):
    """One for all chunks of a box, and none for a chunk that was missing before."""
    for index in np.ndindex(2, 2, 2):
        chunk(root, "raw", "/".join(map(str, index))).unlink()
    with forbidding(root.parent) as (url, control):
        level = read_multiscale(parse_location(f"{url}/volume.zarr/raw")).finest
        reader = ChunkReader(level, "raw", retry_policy=ONCE)
        file = f"/volume.zarr/raw/s0/{level.array.metadata.name}"
        reader.read((0, 0, 0), (1, 1, 1))
        before = control.asked[file]
        assert (reader.read((0, 0, 0), (32, 32, 32)) == 0).all()
        assert 1 <= control.asked[file] - before <= 7
        before = control.asked[file]
        for _ in range(3):
            reader.read((0, 0, 0), (32, 32, 32))
        assert control.asked[file] == before


def test_setup_requests_little_more(root):
    """No more than twice as many requests as where missing files are not found."""
    from tests.io.faults import serving

    with serving(root.parent) as (url, asked), dataset(url):
        plain = sum(asked.values())
    with forbidding(root.parent) as (url, control), dataset(url):
        assert sum(control.asked.values()) <= 2 * plain


def test_sharded_arrays(tmp_path):
    data = np.arange(32**3).reshape(32, 32, 32).astype("u2") + 1
    array = zarr.create_array(
        tmp_path / "a", shape=data.shape, chunks=(8, 8, 8), shards=(16, 16, 16), dtype="u2", zarr_format=3,
        compressors=ZstdCodec(level=1), fill_value=7,
    )  # fmt: skip
    array[...] = data
    (tmp_path / "a" / "c/1/1/1").unlink()
    data[16:, 16:, 16:] = 7
    with forbidding(tmp_path) as (url, control):
        level = Level(parse_location(f"{url}/a"), "s0", SCALE, SCALE, (0, 1, 2), 3)
        for reader in READERS:
            found = ChunkReader(level, "raw", reader, ONCE)
            assert (found.read((0, 0, 0), (32, 32, 32)) == data).all()
            assert (found.read((15, 15, 15), (9, 9, 9)) == data[15:24, 15:24, 15:24]).all()
            assert found.missing_chunks((0, 0, 0), (32, 32, 32), found.read((0, 0, 0), (32, 32, 32))) == [(1, 1, 1)]
        control.refused = lambda path: "/c/" in path
        assert (ChunkReader(level, "raw", "zarr", ONCE).read((0, 0, 0), (8, 8, 8)) == 7).all(), "only chunks: missing"
        control.refused = lambda path: True
        with pytest.raises(ChunkError, match="credentials"):
            found.read((0, 0, 0), (8, 8, 8))


def test_files_of_this_machine_that_may_not_be_read_are_not_missing(tmp_path, monkeypatch):
    from zarr.storage import LocalStore

    from cellmap_lightning.io import chunks
    from tests.io.faults import FaultyStore

    zarr.create_array(tmp_path / "a", data=RAW, chunks=(16, 16, 16), zarr_format=2)
    denied = PermissionError(13, "Permission denied")
    monkeypatch.setattr(chunks, "open_store", lambda path, most: FaultyStore(
        LocalStore(path, read_only=True), lambda key, n: denied if key == "0.0.0" else None
    ))  # fmt: skip
    level = Level(tmp_path / "a", "s0", SCALE, SCALE, (0, 1, 2), 3)
    with pytest.raises(ChunkError, match="reading is not allowed"):
        ChunkReader(level, retry_policy=ONCE).read((0, 0, 0), (32, 32, 32))


class RefusalError(Exception):
    def __init__(self, text, status=None, code=None):
        super().__init__(text)
        self.status = status
        if code is not None:
            self.response = {"Error": {"Code": code}}


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (PermissionError("Access Denied"), True),
        (PermissionError("Forbidden"), True),
        (RefusalError("Forbidden", 403), True),
        (RefusalError("x", code="AccessDenied"), True),
        (OSError("Forbidden: https://storage.googleapis.com/b/o\nPermission denied (or it may not exist)"), True),
        (PermissionError("The provided token has expired."), False),
        (PermissionError("The AWS Access Key Id you provided does not exist in our records."), False),
        (PermissionError("The request signature we calculated does not match the signature you provided."), False),
        (RefusalError("x", code="ExpiredToken"), False),
        (RefusalError("x", code="InvalidAccessKeyId"), False),
        (RefusalError("Unauthorized", 401), False),
        (RefusalError("Not Found", 404), False),
        (OSError("Input/output error"), False),
    ],
)
def test_refusals_that_may_stand_for_missing_objects(error, answer):
    assert is_forbidden(error) == answer


def test_threads_that_read_while_credentials_expire(root):
    """Each read of a thread is right, or an error."""
    for index in ("0/0/0", "0/1/1", "1/1/0"):
        chunk(root, "crop1/mito", index).unlink()
    expected = LABELS.copy()
    expected[:16, :16, :16] = expected[:16, 16:, 16:] = expected[16:, 16:, :16] = 0
    wrong, errors = [], []
    with forbidding(root.parent) as (url, control):
        level = read_multiscale(parse_location(f"{url}/volume.zarr/crop1/mito")).finest
        control.refused = lambda path: sum(control.asked.values()) > 80

        def read(number):
            reader = ChunkReader(level, "crop1", retry_policy=ONCE)
            for at in range(40):
                start = tuple(16 * ((at + number) >> bit & 1) for bit in range(3))
                box = tuple(slice(s, s + 16) for s in start)
                try:
                    voxels = reader.read(start, (16, 16, 16))
                except ChunkError as e:
                    errors.append(e)
                    continue
                if not (voxels == expected[box]).all():
                    wrong.append(start)

        threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert not wrong
    assert errors
