"""Classes that lie elsewhere than the other classes of their crop: one warning at setup, and a problem of inspect."""

import logging

import pytest

from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.splits.manifests import GROUNDTRUTH, RAW
from tests.geometries import write_image, write_label
from tests.make import make_split

PATCH = {"shape": [8, 8, 8], "scale": [8, 8, 8]}
#: Scale, translation and shape of the class mito, with its box in the messages. Those of er are 8, 96, (24, 20, 16).
APART = {
    "lost": (8, [0, 0, 0], [24, 20, 16], "z [-4, 188], y [-4, 156], x [-4, 124] nm"),
    "voxels": (8, [12, 12, 12], [24, 20, 16], "z [8, 200], y [8, 168], x [8, 136] nm"),
    "scale": (4, [96, 96, 96], [24, 20, 16], "z [94, 190], y [94, 174], x [94, 158] nm"),
    "transposed": (8, [96, 96, 96], [16, 20, 24], "z [92, 220], y [92, 252], x [92, 284] nm"),
}
#: The same where boxes differ by a voxel of the coarser class at most.
TOGETHER = {
    "equal": (8, [96, 96, 96], [24, 20, 16]),
    "half-voxel": (8, [92, 96, 100], [24, 20, 16]),
    "voxel": (8, [88, 96, 104], [24, 20, 16]),
    "finer": (4, [94, 94, 94], [48, 40, 32]),
    "finer-and-shifted": (4, [100, 94, 94], [48, 40, 30]),
}


@pytest.fixture
def crop(tmp_path):
    """Write a crop; returns a function of scale, translation and shape of mito."""

    def write(scale, origin, shape, others=("er",)):
        base = tmp_path / "jrc_a" / "jrc_a.zarr"
        write_image(base / RAW, [8, 8, 8], [0, 0, 0], [48, 48, 48])
        write_label(base / GROUNDTRUTH / "crop1/mito", [scale] * 3, origin, shape, 20, levels=1)
        for name in others:
            write_label(base / GROUNDTRUTH / f"crop1/{name}", [8] * 3, [96] * 3, [24, 20, 16], 20, levels=1)
        target = f"{base / GROUNDTRUTH}/crop1/[mito,{','.join(others)}]"
        return {"datasets": {"train": [{"raw": str(base / RAW), "gt": target}]}}

    return write


def warned(caplog, source, classes=("mito", "er"), **options):
    splits = make_split(
        classes=list(classes), input_arrays={"raw": PATCH}, target_arrays={"labels": PATCH}, leakage="ignore",
        **source, **options,
    )  # fmt: skip
    for split in ("train", "val"):
        if splits.has_crops(split):
            _ = splits[split]
    return [r.getMessage() for r in caplog.records if "lie elsewhere" in r.getMessage()]


def problems(source, classes=("mito", "er")):
    report = inspect({**source, "classes": list(classes)}, {}, None)
    return [p for p in report.problems if p.kind == "class boxes"], str(report)


@pytest.mark.parametrize(("scale", "origin", "shape", "box"), APART.values(), ids=APART)
def test_a_class_that_lies_elsewhere(crop, caplog, scale, origin, shape, box):
    source = crop(scale, origin, shape)
    (message,) = warned(caplog, source)
    # Of two boxes, the first is that of the others.
    usual = "z [92, 284], y [92, 252], x [92, 220] nm"
    assert f"jrc_a/crop1: er {usual}, mito {box}" in message
    (problem,), text = problems(source)
    assert problem.where == "jrc_a/crop1"
    assert problem.text == f"er {usual}, mito {box}"
    assert "by class" in text


def test_most_classes_decide(crop, caplog):
    names = ("er", "nuc", "ves", "pm", "lyso")
    source = crop(8, [0, 0, 0], [24, 20, 16], names)
    (message,) = warned(caplog, source, ("mito", *names))
    assert "jrc_a/crop1: mito z [-4, 188]" in message
    assert "nm, er, nuc, ves and 2 more z [92, 284]" in message
    assert message.count("\n") == 1


def test_parts_of_a_cut_crop_are_reported_once(crop, caplog):
    blocks = {"split": "blocks"}
    source = crop(8, [88, 96, 200], [24, 20, 16])
    assert len(warned(caplog, source, **blocks)) == 1


@pytest.mark.parametrize(("scale", "origin", "shape"), TOGETHER.values(), ids=TOGETHER)
def test_a_voxel_is_no_difference(crop, caplog, scale, origin, shape):
    source = crop(scale, origin, shape)
    caplog.set_level(logging.WARNING)
    assert warned(caplog, source) == []
    found, text = problems(source)
    assert found == []
    assert "by class" not in text
