"""Volumes elsewhere that are rewritten: noticed by the versions that servers give, at one request per array."""

import os
import pickle
import time

import numpy as np
import pytest

from cellmap_lightning import CellMapDataset, CellMapMultiDataset
from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io import retrying as guard
from cellmap_lightning.io import statistics
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import fetch_versions, read_array, read_multiscale
from cellmap_lightning.io.store import parse_location
from cellmap_lightning.io.versions import versions
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from tests.io.changes import edit_in_place, packed
from tests.io.faults import describing
from tests.io.test_measurements import EXPECTED, MEASUREMENTS, contents

pytestmark = pytest.mark.usefixtures("no_threads_left")
SPEC = {"raw": {"shape": [8, 8, 8], "scale": [8, 8, 8]}}
ARRAY = "/a/raw/s0/.zarray"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(statistics, "_known", {})
    monkeypatch.setattr(guard, "FIRST_PAUSE", 0.001)


def written(path, data):
    write_multiscale(
        path, data, scale=(8, 8, 8), translation=(0, 0, 0), storage=ArrayOptions(chunks=(8, 8, 8), compressor=None)
    )
    return path


@pytest.fixture
def pair(tmp_path):
    """Two volumes of value 1 and 2 that differ in the bytes of their chunks alone."""
    return [written(tmp_path / name / "raw", np.full((8, 8, 32), n, np.uint8)) for n, name in enumerate("ab", 1)]


@pytest.fixture
def server(tmp_path):
    with describing(tmp_path) as (url, control):
        yield url, control


def rewrite(path, other):
    """Write the chunks of another volume, and the same metadata again, one second later."""
    edit_in_place(path / "s0", other / "s0")
    file = path / "s0" / ".zarray"
    seconds = file.stat().st_mtime_ns + 10**9
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(seconds, seconds))


def shown(address, cache="disk"):
    with CellMapDataset(
        address,
        input_arrays=SPEC,
        is_train=False,
        read=ReadOptions(cache=cache),
        intensity=IntensityOptions(normalize={"range": [0, 1]}),
    ) as dataset:
        values = {value for n in (0, len(dataset) // 2, -1) for value in dataset[n]["raw"].unique().tolist()}
    assert len(values) == 1
    return values.pop()


@pytest.mark.parametrize("sends", [("ETag",), ("Last-Modified",), ("ETag", "Last-Modified")])
def test_a_rewritten_volume_is_noticed(pair, server, sends):
    url, control = server
    control.sends = sends
    assert shown(f"{url}/a/raw") == 1
    control.asked.clear()
    assert shown(f"{url}/a/raw") == 1
    assert ("GET", "/a/raw/s0/0/0/3") not in control.asked, "its voxels are cached"
    rewrite(*pair)
    assert shown(f"{url}/a/raw") == 2


@pytest.mark.parametrize("name", list(MEASUREMENTS))
def test_a_rewritten_volume_is_measured_again(server, name, tmp_path):
    url, control = server
    paths = [written(tmp_path / n / "raw", data) for n, data in zip("ab", contents(), strict=True)]
    for _ in range(2):
        assert MEASUREMENTS[name](read_multiscale(parse_location(f"{url}/a/raw"))) == EXPECTED[name][0]
    assert control.heads() == [ARRAY, ARRAY], "one for each time that the image was opened"
    rewrite(*paths)
    assert MEASUREMENTS[name](read_multiscale(parse_location(f"{url}/a/raw"))) == EXPECTED[name][1]


@pytest.mark.parametrize("sends", [("ETag",), ("Last-Modified",), ()])
def test_one_request_for_each_array_that_is_read(pair, server, sends):
    """Also of servers that send no version, and of no other level."""
    url, control = server
    control.sends = sends
    write_multiscale(
        pair[0].parent / "deep", np.ones((16, 16, 32), np.uint8), scale=(8, 8, 8), translation=(0, 0, 0), levels=3,
        storage=ArrayOptions(chunks=(8, 8, 8)),
    )  # fmt: skip
    assert shown(f"{url}/a/deep") == 1
    assert control.heads() == ["/a/deep/s0/.zarray"]
    assert shown(f"{url}/a/deep") == 1
    assert control.heads() == ["/a/deep/s0/.zarray"]
    assert shown(f"{url}/a/deep", "none") == 1
    assert control.heads() == [], "nothing is found again"


@pytest.mark.parametrize("status", [403, 404, 405, 400, 401, 501])
def test_servers_that_do_not_answer_head(pair, server, status):
    """As without versions: the metadata alone identify the array."""
    url, control = server
    control.status = status
    assert read_array(parse_location(f"{url}/a/raw/s0")).version == ""
    assert shown(f"{url}/a/raw") == shown(f"{url}/a/raw") == 1
    assert control.heads() == [ARRAY] * 3


def test_a_server_that_sends_no_version(pair, server):
    url, control = server
    control.sends = ()
    assert read_array(parse_location(f"{url}/a/raw/s0")).version == ""
    assert ChunkReader(read_multiscale(parse_location(f"{url}/a/raw")).finest).stamp((0, 0, 0), (8, 8, 8)) == 1


@pytest.mark.parametrize(("status", "times"), [(503, 1), (503, 4), (429, 2), (500, 3)])
def test_transient_errors_are_retried(pair, server, status, times):
    url, control = server
    expected = read_array(parse_location(f"{url}/a/raw/s0")).version
    control.heads()
    control.status, control.times = status, times
    assert read_array(parse_location(f"{url}/a/raw/s0")).version == expected
    assert expected
    assert control.heads() == [ARRAY] * (times + 1)


def test_a_server_that_keeps_failing_is_an_error(pair, server):
    url, control = server
    control.status = 503
    info = read_array(parse_location(f"{url}/a/raw/s0"))
    with pytest.raises(
        MetadataError, match=rf"{url}{ARRAY}: cannot be read .*503.*{guard.DEFAULT_RETRY.attempts} attempts"
    ):
        _ = info.version
    assert control.heads() == [ARRAY] * guard.DEFAULT_RETRY.attempts
    control.status = 200
    assert info.version


@pytest.mark.parametrize("count", [1, 3, 40])
def test_many_arrays_are_asked_for_together(pair, server, count):
    url, control = server
    arrays = [read_array(parse_location(f"{url}/{name}/raw/s0")) for name in "ab" for _ in range(count)]
    control.latency = 0.05
    control.heads()
    fetch_versions(arrays)
    assert control.heads() == [ARRAY, ARRAY.replace("/a/", "/b/")], "each once, however often it was opened"
    assert control.most == 2
    fetch_versions(arrays)
    assert len({array.version for array in arrays}) == 2
    assert control.heads() == []


def test_crops_are_asked_for_together(server, tmp_path):
    url, control = server
    count = 24
    for number in range(count):
        written(tmp_path / f"v{number}" / "raw", np.full((8, 8, 8), number + 1, np.uint8))
    control.latency = 0.05
    datasets = [
        CellMapDataset(f"{url}/v{n}/raw", input_arrays=SPEC, is_train=False, read=ReadOptions(cache="memory"))
        for n in range(count)
    ]
    control.heads()
    with CellMapMultiDataset(datasets) as dataset:
        dataset.prepare()
        assert control.most >= 8
        assert len(control.heads()) == count
        _ = [dataset[n] for n in range(len(dataset))]
        assert control.heads() == []


def test_labels_that_are_counted_are_asked_for_together(server, tmp_path):
    url, control = server
    count = 8
    written(tmp_path / "raw", np.ones((8, 8, 16), np.uint8))
    for number in range(count):
        written(tmp_path / f"crop{number}" / "mito", contents()[1])

    def opened():
        return CellMapMultiDataset(
            [
                CellMapDataset(
                    f"{url}/raw",
                    f"{url}/crop{n}/[mito]",
                    ["mito"],
                    SPEC,
                    {"labels": SPEC["raw"]},
                    read=ReadOptions(cache="memory"),
                    labels=LabelOptions(unknown=None),
                )
                for n in range(count)
            ]
        )

    with opened() as dataset:
        assert dataset.class_counts == {"mito": 3 * count}
    with opened() as dataset:
        control.heads()
        control.latency, control.most = 0.05, 0
        assert dataset.class_counts == {"mito": 3 * count}
        assert [path for path in control.heads() if "mito" in path]
        assert control.most >= 4
        dataset.prepare()
        assert control.heads() == ["/raw/s0/.zarray"]


@pytest.mark.parametrize("known", [True, False])
def test_a_version_travels_to_other_processes(pair, server, known):
    url, control = server
    info = read_array(parse_location(f"{url}/a/raw/s0"))
    expected = info.version if known else read_array(parse_location(f"{url}/a/raw/s0")).version
    control.heads()
    again = pickle.loads(pickle.dumps(info))
    assert again.version == expected
    assert control.heads() == ([] if known else [ARRAY])
    assert again.path == info.path


def test_an_archive_elsewhere_has_a_version(pair, server, tmp_path):
    url, _ = server
    for folder in pair:
        packed(folder, tmp_path / f"{folder.parent.name}.zip")
    address = parse_location(f"zip://raw::{url}/a.zip")
    levels = [address / "s0", address / "s1"]
    before = read_array(levels[0]).version
    assert before
    assert read_array(levels[0]).version == before
    (tmp_path / "b.zip").replace(tmp_path / "a.zip")
    assert read_multiscale(address).finest.array.version != before


@pytest.mark.parametrize("cache", ["disk", "memory", "none"])
def test_an_archive_elsewhere_that_was_rewritten_is_noticed(pair, server, tmp_path, cache):
    """Also its listing, which has other places of chunks."""
    url, _ = server
    for folder in pair:
        packed(folder, tmp_path / f"{folder.parent.name}.zip")
    (pair[1] / "README").write_text("moves what comes after it")
    packed(pair[1], tmp_path / "c.zip")
    address = f"zip://raw::{url}/given.zip"
    for name, expected in (("a", 1), ("b", 2), ("c", 2), ("a", 1)):
        (tmp_path / "given.zip").write_bytes((tmp_path / f"{name}.zip").read_bytes())
        assert shown(address, cache) == shown(address, cache) == expected


def test_paths_of_this_machine_have_no_version(pair, tmp_path):
    packed(pair[0], tmp_path / "v.zip")
    assert read_array(parse_location(pair[0] / "s0")).version == ""
    assert read_array(parse_location(f"zip://raw/s0::{tmp_path}/v.zip")).version == ""


def test_objects_in_memory_have_the_time_of_their_creation():
    from fsspec.implementations.memory import MemoryFileSystem

    fs = MemoryFileSystem()
    fs.pipe("/versions/s0/.zarray", b"{}")
    place = parse_location("memory://versions/s0/.zarray")
    (before,) = versions([place])
    assert versions([place, place]) == [before, before]
    assert before
    time.sleep(0.002)
    fs.pipe("/versions/s0/.zarray", b"[]")
    assert versions([place]) != [before]
    fs.rm("/versions", recursive=True)
