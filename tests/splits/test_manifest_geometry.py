"""The voxels that a manifest lists are compared with labels and raw on disk."""

import logging
import shutil

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.io.writer import write_multiscale
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from cellmap_lightning.splits.manifest_geometry import check_geometry
from cellmap_lightning.splits.manifests import GROUNDTRUTH, RAW, manifest_crops
from cellmap_lightning.splits.options import SplitOptions

HEADER = "crop_name,dataset,class_label,voxel_size,translation,shape"
STEP, ORIGIN, SHAPE = (8, 4, 2), (80, 20, 11), (10, 20, 30)


def listed(folder, *rows):
    """Write a manifest of rows (crop, class, voxel size, translation, shape)."""
    lines = [HEADER]
    for crop, name, *lists in rows:
        lines.append(",".join([str(crop), "jrc_a", name, *("[" + ";".join(map(str, v)) + "]" for v in lists)]))
    path = folder / "manifest.csv"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def data(tmp_path):
    """Raw of 8 x 4 x 2 nm in z 0 to 320, y 0 to 240, x 0 to 200, and two annotated crops in it."""
    volume = tmp_path / "data" / "jrc_a" / "jrc_a.zarr"
    values = np.arange(40 * 60 * 100, dtype=np.uint32).reshape(40, 60, 100).astype(np.uint8)
    write_multiscale(volume / RAW, values, scale=STEP, translation=(4, 2, 1), levels=2)
    label = np.zeros(SHAPE, np.uint8)
    label[:5] = 1
    for crop, z in (("crop7", 80), ("crop8", 200)):
        write_multiscale(volume / GROUNDTRUTH / crop / "mito", label, scale=STEP, translation=(z, *ORIGIN[1:]))
    return tmp_path


def check(data, *row):
    (crop,) = manifest_crops(listed(data, row))
    check_geometry(crop, str(data / "data" / "jrc_a" / "jrc_a.zarr" / RAW), STEP)


def warnings_of_training(data, caplog, manifest, scale):
    """The warnings about the geometry when the crops of a manifest are opened at a voxel size."""
    arrays = {"shape": [2, 2, 2], "scale": list(scale)}
    split = CellMapDataSplit(
        classes=["mito"], input_arrays={"raw": arrays}, target_arrays={"labels": arrays},
        search_path=str(data / "data"), options=SplitOptions(manifest=str(manifest), split="random", leakage="warn"),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        _ = split["train"], split["val"]
    return [r.getMessage() for r in caplog.records if r.name.endswith("manifest_geometry")]


@pytest.mark.parametrize(
    "row",
    [
        (7, "mito", STEP, ORIGIN, SHAPE),
        (9, "mito", STEP, ORIGIN, SHAPE),
        (9, "mito", STEP, (4, 2, 1), (40, 60, 100)),
        (9, "mito", (16, 8, 4), (8, 4, 2), (20, 30, 50)),
        (9, "mito", (7, 5, 3), (8, 4, 2), (20, 30, 50)),  # no voxel size of raw, in either order
    ],
)
def test_voxels_inside_raw_pass(data, row):
    check(data, *row)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ((9, "mito", STEP, (200, 20, 11), (30, 20, 30)), ["z [196, 436]", "z [0, 320]", "leave crop9 out"]),
        ((9, "mito", STEP, (-20, 20, 11), SHAPE), ["z [-24, 56]", "partly outside raw"]),
        ((9, "er", STEP, (80, 20, 1000), SHAPE), ["jrc_a/crop9/er", "partly outside raw"]),
        ((9, "mito", STEP, (80, 20, 161), (10, 20, 40)), ["in x y z order?"]),
        ((9, "mito", STEP[::-1], (11, 20, 80), SHAPE[::-1]), ["[2.0, 4.0, 8.0]", "in x y z order?"]),
        ((7, "mito", STEP[::-1], ORIGIN[::-1], SHAPE[::-1]), ["the labels on disk", "in x y z order?"]),
        ((7, "mito", STEP, (96, 20, 11), SHAPE), ["the labels on disk have voxels of [8.0, 4.0, 2.0] nm"]),
        ((7, "mito", (16, 8, 4), (84, 22, 12), (5, 10, 15)), ["the manifest lists voxels of [16.0, 8.0, 4.0] nm"]),
        ((7, "mito", STEP, ORIGIN, (12, 20, 30)), ["the labels on disk"]),
    ],
)
def test_other_voxels_are_refused_before_a_prediction(data, row, words):
    with pytest.raises(CellMapValueError) as caught:
        check(data, *row)
    for word in [f"jrc_a/crop{row[0]}/{row[1]}: ", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ((STEP, ORIGIN, SHAPE), []),
        ((STEP[::-1], ORIGIN[::-1], SHAPE[::-1]), ["in x y z order?", "jrc_a/crop7 (mito)"]),
        ((STEP, (96, 20, 11), SHAPE), ["the labels are used", "z [92, 172]", "z [76, 156]"]),
        (((4, 4, 2), ORIGIN, (20, 20, 30)), ["voxels of [4.0, 4.0, 2.0] nm"]),
    ],
)
def test_a_training_warns_of_other_voxels(data, caplog, lists, words):
    path = listed(data, (7, "mito", *lists), (8, "mito", STEP, (200, *ORIGIN[1:]), SHAPE))
    lines = warnings_of_training(data, caplog, path, STEP)
    assert len(lines) == bool(words)
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(("absent", "warned"), [("s1", False), ("s0", False), ("s1", True)])
def test_levels_that_are_not_on_disk_are_not_compared(data, caplog, absent, warned):
    """A training reads the other level, with a warning of its own."""
    group = data / "data" / "jrc_a" / "jrc_a.zarr" / GROUNDTRUTH / "crop7" / "mito"
    shutil.rmtree(group)
    write_multiscale(group, np.ones(SHAPE, np.uint8), scale=STEP, translation=ORIGIN, levels=2)
    shutil.rmtree(group / absent)
    # The manifest lists the finest level; where it is gone, the voxels of the other differ.
    lists = (STEP, (96, 20, 11), SHAPE) if warned else ((16, 8, 4), (84, 22, 12), (5, 10, 15))
    if absent == "s1" and not warned:
        lists = (STEP, ORIGIN, SHAPE)
    path = listed(data, (7, "mito", *lists), (8, "mito", STEP, (200, *ORIGIN[1:]), SHAPE))
    lines = warnings_of_training(data, caplog, path, [n * 2 for n in STEP])
    assert len(lines) == warned
