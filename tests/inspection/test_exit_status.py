"""Configurations for which cellmap-inspect exits with an error after its report."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.inspection.report import inspect, refuse
from cellmap_lightning.splits.manifests import GROUNDTRUTH, RAW
from tests.foreign import write_pair

PATCH = {"shape": [8, 8, 8], "scale": [8, 8, 8]}


@pytest.fixture
def crops(tmp_path):
    """Two crops of a volume, and the rows of a CSV that name them."""
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[4:12] = 1
    pairs = [write_pair(tmp_path, labels, labels * 100, crop=f"crop{n}") for n in (1, 2)]
    return tmp_path / "v.zarr", [f'train,{raw},"{target}"' for raw, target in pairs]


def spoil(group: Path) -> None:
    (group / ".zattrs").write_text("{")


@pytest.mark.parametrize("patch", [{}, PATCH], ids=["free", "patch"])
@pytest.mark.parametrize("classes", [None, ["mito"]])
@pytest.mark.parametrize(
    ("spoiled", "rows", "message"),
    [
        ("em", 1, r"none of the 1 raw volumes can be read: .*: .*em/.zattrs: not valid JSON"),
        ("crop1/mito", 1, r"crop1/mito/.zattrs: not valid JSON"),
        ("crop1/mito", 2, r"crop1/mito/.zattrs: not valid JSON"),
        (None, 2, None),
    ],
    ids=["raw", "only crop", "one of two crops", "none"],
)
def test_status_follows_the_training(crops, spoiled, rows, message, classes, patch):
    folder, lines = crops
    (folder.parent / "crops.csv").write_text("\n".join(lines[:rows]))
    if spoiled is not None:
        spoil(folder / spoiled)
    arrays = {"input_arrays": {"raw": dict(patch)}, "target_arrays": {"labels": dict(patch)}}
    report = inspect({"csv_path": str(folder.parent / "crops.csv"), "classes": classes, **arrays}, patch, None)
    if message is None:
        refuse(report)
        return
    assert [problem.kind for problem in report.problems if problem.kind == "config"] == ["config"]
    assert "the configuration is refused" in str(report)
    with pytest.raises(CellMapValueError, match=f"(?s){message}"):
        refuse(report)


def test_a_volume_alone_may_have_unreadable_crops(crops):
    folder, _ = crops
    container = folder.parent / "jrc_a.zarr"
    for stored, name in (("em", RAW), ("crop1", f"{GROUNDTRUTH}/crop1")):
        shutil.copytree(folder / stored, container / name)
    spoil(container / GROUNDTRUTH / "crop1" / "mito")
    report = inspect({}, {}, str(container / RAW))
    assert [problem.kind for problem in report.problems][:1] == ["unreadable"]
    refuse(report)
