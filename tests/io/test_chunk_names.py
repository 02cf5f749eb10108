"""Chunk files under other names than the metadata say are an error at setup, and nothing else is."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.crops.image import CellMapImage
from cellmap_lightning.errors import CellMapValueError, MetadataError
from cellmap_lightning.io.chunk_names import check_chunk_names, has_objects
from cellmap_lightning.io.ngff import read_array
from cellmap_lightning.io.store import parse_location
from tests.foreign import SEMANTIC as KIND
from tests.foreign import annotated, cube, edit, metadata_file, ramp, sample, write_image, write_pair
from tests.io.faults import serving as slow
from tests.io.test_remote import serving

READERS = ["zarr", "tensorstore"]


def keys(name, separator):
    return lambda c: c.update(chunk_key_encoding={"name": name, "configuration": {"separator": separator}})


#: What is declared, from what is stored: format, nested, change of the metadata, a chunk as stored, what would fit.
# fmt: off
CASES = {
    "v2, nested, no separator": (
        2, True, lambda c: c.pop("dimension_separator"), "0/0/0", '"dimension_separator": "/"'
    ),
    "v2, nested, dot": (2, True, lambda c: c.update(dimension_separator="."), "0/0/0", '"dimension_separator": "/"'),
    "v2, flat, slash": (2, False, lambda c: c.update(dimension_separator="/"), "0.0.0", '"dimension_separator": "."'),
    "v3, nested, default dot": (3, True, keys("default", "."), "c/0/0/0", '{"name": "default", "configuration": {"se'),
    "v3, nested, v2 slash": (3, True, keys("v2", "/"), "c/0/0/0", '"separator": "/"}}'),
    "v3, nested, v2 dot": (3, True, keys("v2", "."), "c/0/0/0", '"name": "default"'),
    "v3, flat, default slash": (3, False, keys("default", "/"), "c.0.0.0", '{"name": "default", "configuration": {"se'),
    "v3, flat, v2 dot": (3, False, keys("v2", "."), "c.0.0.0", '"separator": "."'),
}
# fmt: on


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", CASES)
def test_labels_under_other_names(tmp_path, case, reader):
    zarr_format, nested, change, stored, fit = CASES[case]
    raw, target = write_pair(
        tmp_path, cube(), zarr_format=zarr_format, nested=nested, attributes=annotated(KIND)
    )  # fmt: skip
    assert sample(raw, target, reader=reader)["labels"].sum() == 16**3
    edit(metadata_file(tmp_path / "v.zarr" / "crop1" / "mito", zarr_format), change)
    with pytest.raises(MetadataError) as caught:
        sample(raw, target, reader=reader)
    text = str(caught.value)
    assert text.startswith("v/crop1/mito: ")
    assert f"chunks are named as {stored}" in re.sub(r"\d+([./]\d+)+,", lambda m: re.sub(r"\d+", "0", m[0]), text)
    assert fit in text


@pytest.mark.parametrize("case", CASES)
def test_raw_under_other_names(tmp_path, case):
    """Not advised to be read as zeros, as other chunks of raw that are missing."""
    zarr_format, nested, change, stored, fit = CASES[case]
    path = write_image(tmp_path / "em", ramp(), zarr_format=zarr_format, nested=nested)
    CellMapImage(str(path), "raw", (8, 8, 8), (8, 8, 8))
    edit(metadata_file(path, zarr_format), change)
    with pytest.raises(
        MetadataError, match="raw: .*named as " + stored.replace(".", r"\.").replace("0", r"\d")
    ) as caught:
        CellMapImage(str(path), "raw", (8, 8, 8), (8, 8, 8))
    assert fit in str(caught.value)
    assert "missing_raw" not in str(caught.value)


def test_it_is_in_the_table_of_setup(tmp_path):
    raw, target = write_pair(tmp_path, cube(), attributes=annotated(KIND))
    edit(metadata_file(tmp_path / "v.zarr" / "crop1" / "mito"), lambda c: c.pop("dimension_separator"))
    array = {"shape": [32] * 3, "scale": [8] * 3}
    data = CellMapDataModule(["mito"], array, array, datasets={"train": [{"raw": raw, "gt": target}]})
    with pytest.raises(CellMapValueError, match=r"datasets.train\[0\]  v/crop1/mito: .* named as 0/0/0"):
        data.setup("fit")


@pytest.mark.parametrize("nested", [True, False])
def test_axes_that_were_dropped_from_the_metadata(tmp_path, nested):
    """Five indices in the name of a chunk of three axes."""
    path = write_image(tmp_path / "em", ramp()[None, None], nested=nested, levels={"s0": ([8] * 5, None)})
    edit(metadata_file(path), lambda c: c.update(shape=c["shape"][2:], chunks=c["chunks"][2:]))
    with pytest.raises(MetadataError, match=r"chunk \d.\d.\d.\d.\d has 5 indices and the array 3 axes"):
        check_chunk_names(read_array(path / "s0"))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("data", [ramp(), np.zeros((32, 32, 32), "u1"), ramp((8, 8, 8)), ramp((16, 40, 200))])
def test_chunks_named_as_declared_are_read(tmp_path, zarr_format, nested, data):
    """Full arrays, empty ones, ones of one chunk; with files beside the chunks that are none."""
    path = write_image(tmp_path / "em", data, zarr_format=zarr_format, nested=nested) / "s0"
    (path / ".DS_Store").write_text("x")
    (path / "notes.txt").write_text("x")
    (path / "1.backup").write_text("x")
    (path / "7").mkdir(exist_ok=True)  # a folder without chunks
    check_chunk_names(read_array(path))


def test_both_versions_in_one_folder(tmp_path):
    """Each with its own files: what the other version's metadata name is no chunk of this one."""
    path = write_image(tmp_path / "em", ramp(), zarr_format=2)
    other = write_image(tmp_path / "em3", ramp(), zarr_format=3)
    shutil.copytree(other, path, dirs_exist_ok=True)
    info = read_array(path / "s0")
    assert info.zarr_format == 3
    check_chunk_names(info)
    shutil.rmtree(path / "s0" / "c")
    check_chunk_names(info)


@pytest.mark.parametrize("case", ["v2, nested, no separator", "v2, flat, slash", "v3, nested, default dot"])
def test_over_http(tmp_path, case):
    zarr_format, nested, change, stored, fit = CASES[case]
    raw, target = write_pair(tmp_path, cube(), zarr_format=zarr_format, nested=nested, attributes=annotated(KIND))
    with serving(tmp_path) as (url, _):
        given = raw.replace(str(tmp_path), url), target.replace(str(tmp_path), url)
        assert sample(*given)["labels"].sum() == 16**3
        edit(metadata_file(tmp_path / "v.zarr" / "crop1" / "mito", zarr_format), change)
        with pytest.raises(MetadataError) as caught:
            sample(*given)
    assert f"named as {stored}" in str(caught.value)
    assert json.loads(fit.partition(": ")[2]) if fit.startswith('"') and fit.endswith('"') else True


def test_the_check_reads_a_bounded_number_of_names(tmp_path):
    """A flat array of many chunks costs no more than a small one."""
    path = write_image(tmp_path / "em", ramp((64, 64, 64)), nested=False, chunks=4) / "s0"
    check_chunk_names(read_array(path))
    edit(path / ".zarray", lambda c: c.update(dimension_separator="/"))
    with pytest.raises(MetadataError, match=r"named as \d+\.\d+\.\d+, but"):
        check_chunk_names(read_array(path))


def renamed(level, change):
    """Move every chunk file of an array, by its key."""
    files = [p for p in level.rglob("*") if p.is_file() and p.name not in (".zarray", ".zattrs", "zarr.json")]
    for file in files:
        key = str(file.relative_to(level))
        content = file.read_bytes()
        file.unlink()
        target = level / change(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda key: key.replace("/", "\\"), "no version of Zarr names them so"),
        (lambda key: f"s0/{key}", "copied into itself"),
        (lambda key: str(Path(key).parent / f".{Path(key).name}.Ab12Cd"), "a copy that was interrupted"),
        (lambda key: f"{key}.filepart", "a copy that was interrupted"),
        (lambda key: re.sub(r"\d", lambda m: f"0{m[0]}", key), "no version of Zarr names them so"),
        (lambda key: re.sub(r"\d", lambda m: str(int(m[0]) + 1), key), "lies beyond the array"),
        (
            lambda key: key.replace("c/", "C/") if key.startswith("c/") else f"C/{key}",
            "no version of Zarr names them so",
        ),
    ],
)
def test_names_that_copies_leave(tmp_path, change, text, zarr_format):
    raw, target = write_pair(tmp_path, cube(), zarr_format=zarr_format, attributes=annotated(KIND))
    renamed(tmp_path / "v.zarr" / "crop1" / "mito" / "s0", change)
    with pytest.raises(MetadataError, match=text):
        sample(raw, target)
    renamed(tmp_path / "v.zarr" / "em" / "s0", change)
    with pytest.raises(MetadataError, match=text):
        CellMapImage(raw, "raw", (8, 8, 8), (8, 8, 8))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("nested", [True, False])
def test_chunks_beyond_the_array(tmp_path, zarr_format, nested):
    """As of axes in another order, or of a shape that became smaller."""
    data = ramp((64, 16, 16))
    path = write_image(tmp_path / "em", data, zarr_format=zarr_format, nested=nested)
    check_chunk_names(read_array(path / "s0"))
    edit(metadata_file(path, zarr_format), lambda c: c.update(shape=[16, 16, 64]))
    with pytest.raises(MetadataError, match=r"chunk \S+ lies beyond the array, whose shape \[16, 16, 64\]"):
        check_chunk_names(read_array(path / "s0"))
    edit(metadata_file(path, zarr_format), lambda c: c.update(shape=[32, 16, 16]))
    with pytest.raises(MetadataError, match="lies beyond the array"):
        check_chunk_names(read_array(path / "s0"))


@pytest.mark.parametrize("case", ["v2, nested, no separator", "v3, nested, default dot", "v2, flat, slash"])
def test_in_an_archive(tmp_path, case):
    """Also where the first and the middle chunk are background."""
    zarr_format, nested, change, _, _ = CASES[case]
    stored = np.zeros((48,) * 3, "u1")
    stored[32:, :8, :8] = 1
    path = write_image(tmp_path / "mito", stored, zarr_format=zarr_format, nested=nested, attributes=annotated(KIND))
    edit(metadata_file(path, zarr_format), change)
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        for file in path.rglob("*"):
            archive.write(file, f"[2024] mito/{file.relative_to(path)}")
    with pytest.raises(MetadataError, match="chunks are named as"):
        CellMapImage(f"zip://[2024] mito::{tmp_path}/v.zip", "mito", (8, 8, 8), (8, 8, 8))


def test_a_server_that_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "0").write_bytes(b"1")
    monkeypatch.setattr("cellmap_lightning.io.chunk_names.LOOK_TIMEOUT", 0.5)
    with slow(tmp_path) as (address, _):
        assert has_objects(parse_location(address), ["0", "1"]) == [True, False]
    with slow(tmp_path, latency=20.0) as (address, _):
        assert has_objects(parse_location(address), ["0", "1"]) == [False, False]
