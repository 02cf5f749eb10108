"""Coarser levels of labels whose values the finest level does not hold, since they were averaged."""

import logging

import numpy as np
import pytest

from cellmap_lightning.crops.encodings import LabelEncodings
from cellmap_lightning.errors import MetadataError
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.splits.manifests import GROUNDTRUTH, RAW


def levels(values, dtype, average):
    """Blocks of voxels with these values, off the blocks of a coarser level, and that level."""
    fine = np.roll(np.resize(np.repeat(values, 2), (4, 4, 16)), 1, axis=2).astype(dtype)
    parts = fine.astype("f8").reshape(2, 2, 2, 2, 8, 2)
    coarse = parts.mean((1, 3, 5)).round() if average else parts[:, 0, :, 0, :, 0]
    return {"s0": (fine, [8] * 3, [96] * 3), "s1": (coarse.astype(dtype), [16] * 3, [100] * 3)}


def encoded(**codes):
    kind = {"type": "semantic_segmentation", "encoding": codes}
    return {"cellmap": {"annotation": {"annotation_type": kind}}}


@pytest.mark.parametrize(
    ("values", "dtype", "codes"),
    [
        ((0, 255), "u1", {"absent": 0, "present": 255}),
        ((0, 200, 255), "u1", {"absent": 0, "present": 200, "unknown": 255}),
        ((0, 1000), "u2", {"absent": 0, "present": 1000}),
        ((255, 0), "u1", {"absent": 255, "present": 0}),
    ],
)
def test_values_that_no_encoding_explains(write, values, dtype, codes):
    image = read_multiscale(write(levels(values, dtype, True), attributes=encoded(**codes)))
    encodings = LabelEncodings("v/crop1")
    present = codes["present"]
    with pytest.raises(MetadataError, match=rf"^v/crop1/mito: .*s1 holds .*present {present}\), and s0 holds no") as e:
        encodings.of("mito", image, image.levels[1])
    assert "label_downsample=majority" in str(e.value)
    # The finest level, that is label_downsample=majority, is read.
    assert encodings.of("mito", image, image.finest).absent == codes["absent"]


@pytest.mark.parametrize(
    ("values", "codes", "average"),
    [
        ((0, 255), {"absent": 0, "present": 255}, False),
        ((0, 1), {"absent": 0, "present": 1, "unknown": 255}, True),
        ((0, 3, 9), {"absent": 0, "present": 10}, False),  # ids between them in the finest level too
        ((0, 2, 255), {"absent": 0, "present": 1, "unknown": 255}, False),
    ],
)
def test_levels_that_are_read_as_before(write, caplog, values, codes, average):
    image = read_multiscale(write(levels(values, "u1", average), attributes=encoded(**codes)))
    assert LabelEncodings("v/crop1").of("mito", image, image.levels[1]).absent == 0
    assert not caplog.records


@pytest.mark.parametrize(("values", "dtype"), [((0, 1000), "u2"), ((0, 7, 90), "u1"), ((0, 70000), "i4")])
def test_without_an_encoding_it_is_a_warning(write, caplog, values, dtype):
    image = read_multiscale(write(levels(values, dtype, True)))
    encodings = LabelEncodings("v/crop1")
    encodings.of("mito", image, image.finest)
    assert not caplog.records
    encodings.of("mito", image, image.levels[1])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "v/crop1/mito: " in record.getMessage()
    assert "which s0 does not" in encodings.averaged["mito", "s1"]
    chosen = read_multiscale(write(levels(values, dtype, False), name="chosen"))
    encodings = LabelEncodings("v/crop1")
    encodings.of("mito", chosen, chosen.levels[1])
    assert encodings.averaged == {}


@pytest.mark.parametrize("deep", [False, True])
def test_inspect_reports_both(write, tmp_path, deep):
    base = tmp_path / "jrc_a" / "jrc_a.zarr"
    raw = np.arange(32**3, dtype="u2").reshape(32, 32, 32)
    write({"s0": (raw, [8] * 3, [0] * 3)}, name=str((base / RAW).relative_to(tmp_path)))
    folder = (base / GROUNDTRUTH / "crop1").relative_to(tmp_path)
    write(levels((0, 1000), "u2", True), name=str(folder / "mito"))
    write(levels((0, 255), "u1", True), name=str(folder / "er"), attributes=encoded(absent=0, present=255))
    entry = {"raw": str(base / RAW), "gt": f"{tmp_path / folder}/[mito,er]"}
    data = {"datasets": {"train": [entry]}, "classes": ["mito", "er"]}
    report = inspect(data, {"scale": [16] * 3, "shape": [2, 2, 4]}, None, deep)
    (found,) = [p for p in report.problems if p.kind == "averaged"]
    assert found.text.startswith("mito: s1 holds 500")
    assert any("er: " in p.text or "/er" in p.text for p in report.problems if p.kind == "unreadable")
