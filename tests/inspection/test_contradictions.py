"""Crops for training that overlap and contradict each other are a problem of the report."""

import numpy as np
import pytest

from cellmap_lightning.inspection import report as report_module
from cellmap_lightning.inspection.report import inspect
from tests.foreign import SEMANTIC, annotated, cube, ramp, write_image

ARRAY = {"shape": [16] * 3, "scale": [8] * 3}


@pytest.fixture(autouse=True)
def large_labels(monkeypatch):
    """Labels count as too large to be read without ``deep``."""
    monkeypatch.setattr(report_module, "COUNTED_AT_ONCE", 0)


def problems(folder, first, second, shift=(0, 0, 0), usages=("train", "train"), deep=True, attributes=None):
    write_image(folder / "v.zarr" / "em", ramp((48, 48, 48)))
    entries = {}
    for number, (labels, place) in enumerate(((first, (0, 0, 0)), (second, shift))):
        translation = [8 * n for n in place]
        path = folder / "v.zarr" / f"crop{number}" / "mito"
        write_image(path, labels, levels={"s0": ([8] * 3, translation)}, attributes=attributes)
        entry = {"raw": str(folder / "v.zarr" / "em"), "gt": str(path.parent / "[mito]")}
        entries.setdefault(usages[number], []).append(entry)
    settings = {"datasets": entries, "classes": ["mito"], "leakage": "ignore"}
    found = inspect(settings, ARRAY, None, deep=deep).problems
    return [problem for problem in found if problem.kind == "contradiction"]


@pytest.mark.parametrize("shift", [(0, 0, 0), (4, 0, 0), (8, -2, 3)])
def test_overlapping_crops_that_differ(tmp_path, shift):
    rng = np.random.default_rng(0)
    whole = (rng.random((64, 64, 64)) < 0.3).astype(np.uint8)
    first = whole[8:40, 8:40, 8:40]
    z, y, x = (8 + n for n in shift)
    second = whole[z : z + 32, y : y + 32, x : x + 32].copy()
    assert problems(tmp_path / "same", first, second, shift) == []
    second[10:12, 10, 10:15] ^= 1
    (problem,) = problems(tmp_path / "other", first, second, shift)
    shared = int(np.prod([32 - abs(n) for n in shift]))
    assert problem.where == "v/crop0"
    assert problem.text == (
        f"overlaps v/crop1, also for training: mito differs in 10 of the {shared:,} voxels known in both"
    )


def test_only_trained_crops_are_compared_and_only_deep(tmp_path):
    assert problems(tmp_path / "val", cube(1), 1 - cube(1), usages=("train", "val")) == []
    assert problems(tmp_path / "shallow", cube(1), 1 - cube(1), deep=False) == []
    assert problems(tmp_path / "apart", cube(1), 1 - cube(1), shift=(32, 0, 0)) == []
    assert len(problems(tmp_path / "deep", cube(1), 1 - cube(1))) == 1


def test_unknown_voxels_contradict_nothing(tmp_path):
    second = cube(1)
    second[:4] = 255
    second[20, 20, 20] ^= 1
    (problem,) = problems(tmp_path, cube(1), second, attributes=annotated(SEMANTIC))
    assert f"differs in 1 of the {28 * 32**2:,} voxels" in problem.text
