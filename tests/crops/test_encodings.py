"""Encodings of labels: from metadata, from values without metadata, or from a setting."""

import json
import logging

import numpy as np
import pytest
import torch

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.errors import CellMapError, CellMapTypeError, CellMapValueError, MetadataError
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.io import label_values as values_of
from cellmap_lightning.io.label_values import LabelValues, label_values
from cellmap_lightning.io.ngff import read_multiscale
from tests.foreign import (
    INSTANCE,
    SEMANTIC,
    annotated,
    cube,
    dataset,
    ramp,
    sample,
    write_image,
    write_pair,
)

FORMATS = [2, 3]
READERS = ["zarr", "tensorstore"]

CUBE = 16**3


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))


def objects(most, dtype="u2", size=32):
    """Objects of two voxels with the ids 1 to ``most``."""
    labels = np.zeros((size,) * 3, dtype)
    flat = labels.reshape(-1)
    ids = np.arange(1, most + 1)
    flat[4 * ids], flat[4 * ids + 1] = ids, ids
    return labels


def counted(found):
    labels = found["labels"]
    return int((labels == 1).sum()), int((labels == 0).sum()), int(np.isnan(labels).sum())


# ------------------------------------------------------------------------------------------ without an encoding


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize(
    ("stored", "read_as"),
    [
        (cube(255), "values 0 and 255, a mask in which 255 is present"),
        (cube(255, "u2"), "values 0 and 255, a mask"),
        (cube(255, "f4"), "values 0 and 255, a mask"),
        (cube(1), "values 0 and 1, 1 is present"),
        (cube(1, "i4"), "values 0 and 1, 1 is present"),
        (cube(7), "values 0 and other ids, ids"),
        (cube(65535, "u2"), "values 0 and other ids, ids"),
        (cube(2**40, "u8"), "values 0 and other ids, ids"),
        (cube(True, bool), None),
    ],
)
def test_masks_and_ids(tmp_path, caplog, stored, read_as, zarr_format, reader):
    raw, target = write_pair(tmp_path, stored, zarr_format=zarr_format)
    with caplog.at_level(logging.INFO, "cellmap_lightning"):
        assert counted(sample(raw, target, reader=reader)) == (CUBE, 32**3 - CUBE, 0)
    lines = [r.message for r in caplog.records if "have no encoding" in r.message]
    assert len(lines) == (read_as is not None)
    assert all(line.startswith("v/crop1: ") and read_as in line for line in lines)


@pytest.mark.parametrize("most", [254, 400])
def test_ids_without_255(tmp_path, most):
    stored = objects(most)
    stored[stored == 255] = 0
    raw, target = write_pair(tmp_path, stored)
    assert counted(sample(raw, target)) == (int((stored > 0).sum()), int((stored == 0).sum()), 0)


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize(
    ("stored", "values"),
    [
        (objects(255, "u1"), "0 and 1 and other ids and 255"),
        (objects(400), "0 and 1 and other ids and 255"),
        (np.where(ramp() < 9, 255, cube()).astype("u1"), "0 and 1 and 255"),
        (np.where(ramp() < 9, 255, cube(3)).astype("i2"), "0 and other ids and 255"),
    ],
)
def test_255_among_ids_is_ambiguous(tmp_path, stored, values, zarr_format):
    raw, target = write_pair(tmp_path, stored, zarr_format=zarr_format)
    with pytest.raises(MetadataError, match=f"^v/crop1/mito: .*s0 holds {values}, .*no metadata say whether") as e:
        dataset(raw, target)
    assert "set unknown=255 or unknown=null" in str(e.value)
    present, absent, code = int((stored > 0).sum()), int((stored == 0).sum()), int((stored == 255).sum())
    assert counted(sample(raw, target, unknown=255)) == (present - code, absent, code)
    assert counted(sample(raw, target, unknown=None)) == (present, absent, 0)
    assert counted(sample(raw, target, unknown={"mito": 255})) == (present - code, absent, code)
    assert counted(sample(raw, target, unknown={"*": None})) == (present, absent, 0)
    with pytest.raises(MetadataError, match="no metadata say"):
        dataset(raw, target, unknown={"er": 255})


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_255_alone_is_ambiguous(tmp_path, dtype, zarr_format):
    """Present in a mask whose crop lies inside an object, and unknown in CellMap's encoding."""
    stored = np.full((32,) * 3, 255, dtype)
    raw, target = write_pair(tmp_path, stored, zarr_format=zarr_format)
    with pytest.raises(MetadataError, match=r"^v/crop1/mito: .*s0: all voxels are 255, and no metadata") as e:
        dataset(raw, target)
    assert "set unknown=null (present) or unknown=255" in str(e.value)
    assert counted(sample(raw, target, unknown=255)) == (0, 0, 32**3)
    assert counted(sample(raw, target, unknown=None)) == (32**3, 0, 0)
    declared, target = write_pair(tmp_path / "declared", stored, attributes=annotated(SEMANTIC))
    assert counted(sample(declared, target)) == (0, 0, 32**3)


@pytest.mark.parametrize(
    ("stored", "values"),
    [
        (cube(1) + 1, "1 and other ids"),
        (np.ones((32,) * 3, "u1"), "1"),
        (np.full((32,) * 3, 7, "u2"), "other ids"),
        (cube(1), None),
        (cube(255), None),
    ],
)
def test_a_class_that_fills_its_crop(tmp_path, caplog, stored, values):
    raw, target = write_pair(tmp_path, stored)
    _, second = write_pair(tmp_path, stored, crop="crop2")
    array = {"shape": [16] * 3, "scale": [8] * 3}
    entries = [{"raw": raw, "gt": target}, {"raw": raw, "gt": second}]
    with CellMapDataModule(["mito"], array, array, datasets={"train": entries, "val": []}) as data:
        data.setup("fit")
    lines = [r.message for r in caplog.records if "present in the whole crop" in r.message]
    assert len(lines) == (values is not None)
    assert all(f": no voxel of mito is 0 (values {values})" in line for line in lines)
    for deep in (False, True):  # so few voxels are counted without it
        report = inspect({"datasets": {"train": entries}, "classes": ["mito"]}, array, None, deep=deep)
        found = [problem.where for problem in report.problems if problem.kind == "filled"]
        assert found == (["v/crop1", "v/crop2"] if values is not None else [])


def test_declared_classes_may_fill_their_crop(tmp_path, caplog):
    raw, target = write_pair(tmp_path, np.ones((32,) * 3, "u1"), attributes=annotated(SEMANTIC))
    assert counted(sample(raw, target)) == (32**3, 0, 0)
    array = {"shape": [16] * 3, "scale": [8] * 3}
    settings = {"datasets": {"train": [{"raw": raw, "gt": target}]}, "classes": ["mito"]}
    assert "filled" not in {problem.kind for problem in inspect(settings, array, None, deep=True).problems}
    assert "present in the whole crop" not in caplog.text


def test_ambiguous_labels_are_an_error_of_setup_in_one_table(tmp_path):
    raw, target = write_pair(tmp_path, objects(255, "u1"))
    write_pair(tmp_path, cube(255), crop="crop2")
    array = {"shape": [16] * 3, "scale": [8] * 3}
    entries = [{"raw": raw, "gt": target}, {"raw": raw, "gt": target.replace("crop1", "crop2")}]
    data = CellMapDataModule(["mito"], array, array, datasets={"train": entries})
    with pytest.raises(CellMapValueError, match=r"1 of the 2 crops(.|\n)*datasets.train\[0\]  v/crop1/mito"):
        data.setup("fit")
    entries[0]["unknown"] = None
    with CellMapDataModule(["mito"], array, array, datasets={"train": entries}) as data:
        data.setup("fit")


@pytest.mark.parametrize("kind", ["binary", "labels", "sdt", "instances", "affinities"])
def test_masks_in_every_kind_of_target(tmp_path, kind):
    """The same as of a mask that says 1 and has an encoding."""
    more = {"sdt": {"nm": 16}, "affinities": {"offsets": [[0, 0, 1]]}}.get(kind, {})
    found = []
    for number, (stored, attributes) in enumerate(((cube(255), None), (cube(1), annotated(SEMANTIC)))):
        raw, target = write_pair(tmp_path / str(number), stored, attributes=attributes)
        array = {"shape": [32] * 3, "scale": [8] * 3}
        from cellmap_lightning import CellMapDataset

        targets = {"t": {**array, "kind": kind, **more}}
        with CellMapDataset(raw, target, ["mito"], {"raw": array}, targets, read=ReadOptions(cache="none")) as data:
            found.append(data[0]["t"])
    if kind == "instances":
        found = [(part != 0).long() for part in found]
    assert torch.equal(torch.nan_to_num(found[0], nan=9), torch.nan_to_num(found[1], nan=9))
    assert bool((found[0] != 0).any())


def test_an_averaged_level_of_a_mask(tmp_path):
    """Its values between 0 and 255 are no ids; the finest level can be read instead."""
    fine = cube(255)
    fine[7] = 255
    coarse = fine.reshape(16, 2, 16, 2, 16, 2).mean((1, 3, 5)).astype("u1")
    levels = {"s0": ([8] * 3, [0] * 3), "s1": ([16] * 3, [4] * 3)}
    raw, target = write_pair(tmp_path, {"s0": fine, "s1": coarse}, levels=levels)
    options = {"scale": (16, 16, 16), "size": 16}
    with pytest.raises(MetadataError, match=r"s1 holds .*255.* was made by averaging .* label_downsample=majority"):
        dataset(raw, target, **options)
    found = sample(raw, target, label_downsample="majority", **options)["labels"]
    assert np.array_equal(found == 1, coarse > 127)


@pytest.mark.parametrize("stored", [np.where(ramp() < 9, -1, cube(1, "i2")), np.where(ramp() < 9, -7, cube(3, "i4"))])
def test_negative_labels_need_a_setting(tmp_path, stored):
    raw, target = write_pair(tmp_path, stored)
    code = int(stored.min())
    with pytest.raises(MetadataError, match=f"negative label {code} .* set unknown={code}"):
        dataset(raw, target)
    assert counted(sample(raw, target, unknown=code))[2] == int((stored < 0).sum())


@pytest.mark.parametrize(
    "block", [None, {"class_name": "mito"}, {"annotation_type": {"type": "semantic_segmentation"}}]
)
def test_only_an_encoding_gives_255_a_meaning(tmp_path, block):
    attributes = {"cellmap": {"annotation": block}} if block else None
    raw, target = write_pair(tmp_path, cube(255), attributes=attributes)
    assert counted(sample(raw, target)) == (CUBE, 32**3 - CUBE, 0)


@pytest.mark.parametrize("where", ["group", "array"])
@pytest.mark.parametrize("zarr_format", FORMATS)
def test_cellmaps_encoding_is_used_where_it_is(tmp_path, where, zarr_format):
    stored = np.where(ramp() < 9, 255, cube()).astype("u1")
    options = {"attributes" if where == "group" else "array_attributes": annotated(SEMANTIC)}
    raw, target = write_pair(tmp_path, stored, zarr_format=zarr_format, **options)
    code = int((stored == 255).sum())
    assert counted(sample(raw, target)) == (int((stored == 1).sum()), int((stored == 0).sum()), code)


def test_values_are_read_once(tmp_path, monkeypatch):
    """Cached outside the data, until a chunk changes."""
    raw, target = write_pair(tmp_path, cube(255))
    reads = []
    original = values_of._read
    monkeypatch.setattr(values_of, "_read", lambda *given: reads.append(1) or original(*given))
    for _ in range(3):
        dataset(raw, target).close()
    assert len(reads) == 1
    (tmp_path / "v.zarr" / "crop1" / "mito" / "s0" / "0" / "0" / "0").unlink()
    dataset(raw, target).close()
    assert len(reads) == 2
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "v.zarr").rglob("*")}
    dataset(raw, target).close()
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "v.zarr").rglob("*")}, "data is never written to"


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize(
    "stored", [cube(255), cube(7, "i4"), objects(300, "u4"), np.zeros((32,) * 3, "u1"), cube(300, "u2") - 1 + 1]
)
def test_summary_of_label_values(tmp_path, stored, zarr_format):
    path = write_image(tmp_path / "labels", stored, zarr_format=zarr_format)
    seen = set(np.unique(stored).tolist())
    found = label_values(read_multiscale(path).finest, "")
    expected = LabelValues(0 in seen, 1 in seen, 255 in seen, bool(seen - {0, 1, 255}), max(seen) > 255)
    assert found == expected


def test_a_large_array_is_read_in_part_and_checked_later(tmp_path, monkeypatch):
    """Values that contradict what was assumed are an error when they are read, not something else in silence."""
    monkeypatch.setattr(values_of, "MOST_VOXELS", 2 * 16**3)
    stored = np.zeros((16, 16, 96), "u1")
    stored[:, :, :8], stored[:, :, 40:44] = 255, 3
    raw, target = write_pair(tmp_path, stored, raw=ramp((16, 16, 96)), config={"write_empty_chunks": True})
    with dataset(raw, target, size=16) as data:
        assert data[0]["labels"][0, :, :, :8].min() == 1
        with pytest.raises(MetadataError, match="255 beside other ids"):
            data.read(data.draw(range(data.tile_count), False, 0))
    assert not label_values(read_multiscale(f"{tmp_path}/v.zarr/crop1/mito").finest, "").complete


def test_inspect_has_a_row(tmp_path):
    raw, target = write_pair(tmp_path, cube(255))
    write_pair(tmp_path, objects(255, "u1"), crop="crop2")
    write_pair(tmp_path, cube(), crop="crop3", attributes=annotated(SEMANTIC))
    entries = [{"raw": raw, "gt": target.replace("crop1", f"crop{n}")} for n in (1, 2, 3)]
    found = inspect({"datasets": {"train": entries}}, {"shape": [16] * 3, "scale": [8] * 3}, None, deep=True)
    text = str(found)
    assert "Labels without an encoding in their metadata (1)" in text
    assert "v/crop1  mito   values 0 and 255, a mask in which 255 is present" in text
    assert "v/crop2/mito" in text
    assert "set unknown=255 or unknown=null" in text
    assert found.crops[0].classes["mito"].voxels == CUBE
    assert json.loads(found.json())["crops"][0]["classes"]["mito"]["read_as"].startswith("values 0 and 255")


# ------------------------------------------------------------------------------------------- the setting unknown


def crops_of_both_kinds(root):
    """One with more than 255 instances and no counts, one with unknown voxels that its metadata name."""
    many = objects(400)
    raw, target = write_pair(root, many, attributes=annotated(INSTANCE))
    known = cube()
    known[:4] = 255
    write_pair(root, known, crop="crop2", attributes=annotated(SEMANTIC))
    return raw, target, target.replace("crop1", "crop2"), many, known


@pytest.mark.parametrize("unknown", [None, 255, {"mito": None}, {"*": None}])
def test_a_setting_never_overrules_metadata(tmp_path, unknown, caplog):
    raw, first, second, many, _ = crops_of_both_kinds(tmp_path)
    with pytest.raises(MetadataError, match=r"ids above 255, and nothing says .* Set unknown=255 or unknown=null"):
        dataset(raw, first)
    code = 255 if unknown == 255 else None
    lost = int((many == 255).sum()) if code else 0
    assert counted(sample(raw, first, unknown=unknown)) == (
        int((many > 0).sum()) - lost, int((many == 0).sum()), lost
    )  # fmt: skip
    with caplog.at_level(logging.INFO, "cellmap_lightning"):
        assert counted(sample(raw, second, unknown=unknown)) == (CUBE, 32**3 - CUBE - 4096, 4096)
    text = [r.message for r in caplog.records if "does not apply" in r.message]
    assert len(text) == (unknown != 255)
    assert all("mito 255" in line for line in text)


def test_a_setting_for_each_crop(tmp_path):
    """In entries, by class, and as a column of a CSV that a run writes out again."""
    raw, first, second, many, _ = crops_of_both_kinds(tmp_path)
    write_pair(tmp_path, many, crop="crop3", attributes=annotated(INSTANCE))
    third = first.replace("crop1", "crop3")
    array = {"labels": {"shape": [32] * 3, "scale": [8] * 3}}
    entries = [
        {"raw": raw, "gt": first, "unknown": None},
        {"raw": raw, "gt": second},
        {"raw": raw, "gt": third, "unknown": {"mito": 255}},
    ]
    csv = tmp_path / "crops.csv"
    csv.write_text(
        f"usage,raw,target,unknown,weight\ntrain,{raw},{first},null,\n"
        f"train,{raw},{second},,2\ntrain,{raw},{third},{{mito: 255}},\n"
    )
    common = {"classes": ["mito"], "input_arrays": {"raw": array["labels"]}, "target_arrays": array, "cache": "none"}
    again = tmp_path / "again.csv"
    seen = int((many > 0).sum())
    for given in ({"datasets": {"train": entries}}, {"csv_path": str(csv)}, {"csv_path": str(again)}):
        with CellMapDataModule(**common, **given) as data:
            data.setup("fit")
            found = [int(np.nansum(d[0]["labels"])) for d in data.splits["train"].datasets]
            assert found == [seen, CUBE, seen - int((many == 255).sum())]
            data.splits.write_csv(again)
    assert "unknown" in again.read_text().splitlines()[0]
    with CellMapDataModule(**common, unknown=None, datasets={"train": entries}) as data:
        data.setup("fit")  # an entry's own comes before that of all
        assert int(np.nansum(data.splits["train"].datasets[2][0]["labels"])) == seen - 2


@pytest.mark.parametrize(
    ("unknown", "error"),
    [("none", CellMapValueError), (2.5, CellMapValueError), (True, CellMapValueError), ({3: 255}, CellMapTypeError),
     ({"mito": "x"}, CellMapValueError)],
)  # fmt: skip
def test_values_of_unknown(tmp_path, unknown, error):
    raw, target = write_pair(tmp_path, cube())
    with pytest.raises(error, match="unknown must be"):
        dataset(raw, target, unknown=unknown)
    with pytest.raises(CellMapError, match=r"datasets.train\[0\]: unknown must be"):
        CellMapDataModule(["mito"], {"shape": [8] * 3, "scale": [8] * 3}, datasets={
            "train": [{"raw": raw, "gt": target, "unknown": unknown}]
        })  # fmt: skip


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize("number", [0, 17])
def test_counts_of_unknown_voxels_decide_instances(tmp_path, number, zarr_format):
    """With 0 the code is an instance, with more it is unknown, ids above it or not."""
    stored = objects(400)
    stored[0, 0, :17] = 255 if number else 0
    counts = {"absent": int((stored == 0).sum()), "unknown": number + 2 if number else 0}
    raw, target = write_pair(
        tmp_path, stored, zarr_format=zarr_format, array_attributes=annotated(INSTANCE, counts)
    )  # fmt: skip
    code = int((stored == 255).sum()) if number else 0
    assert counted(sample(raw, target)) == (int((stored > 0).sum()) - code, int((stored == 0).sum()), code)


@pytest.mark.parametrize("most", [100, 254])
def test_instances_within_the_code_are_not_ambiguous(tmp_path, most):
    """In a type that could hold more: unknown voxels stay unknown regardless of the setting."""
    stored = objects(most)
    stored[31] = 255
    raw, target = write_pair(tmp_path, stored, attributes=annotated(INSTANCE))
    expected = (int(((stored > 0) & (stored < 255)).sum()), int((stored == 0).sum()), 1024)
    for unknown in ("metadata", None, 255):
        assert counted(sample(raw, target, unknown=unknown)) == expected
