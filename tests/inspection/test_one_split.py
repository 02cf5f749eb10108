"""Classes without foreground in validation, or in training, are problems of the report."""

import pytest

from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.splits.manifests import GROUNDTRUTH, RAW
from tests.geometries import write_image, write_label


def reported(folder, crops):
    """Return the classes that the report names, for crops {name: (usage, {class: voxels})}."""
    base = folder / "jrc_a" / "jrc_a.zarr"
    write_image(base / RAW, [8, 8, 8], [0, 0, 0], [64, 64, 128], levels=2)
    lines = []
    for number, (name, (usage, voxels)) in enumerate(crops.items()):
        for of, count in voxels.items():
            write_label(base / GROUNDTRUTH / name / of, [8, 8, 8], [0, 0, 256 * number], [16, 16, 16], count)
        lines.append(f'{usage},{base / RAW},"{base / GROUNDTRUTH / name}/[{",".join(voxels)}]"')
    (folder / "crops.csv").write_text("\n".join(lines))
    found = inspect({"csv_path": str(folder / "crops.csv")}, {}, None)
    return {problem.where: problem.text for problem in found.problems if problem.kind == "one split"}


@pytest.mark.parametrize(
    ("voxels", "expected"),
    [
        ([("train", 9), ("train", 9), ("validate", 0)], "validation"),
        ([("train", 9), ("train", 9), ("validate", None)], "validation"),
        ([("train", 0), ("validate", 9), ("validate", 9)], "training"),
        ([("train", 9), ("train", 0), ("validate", 9)], None),
        ([("train", 9), ("train", 0), ("validate", 0)], None),  # in a single crop: another problem
        ([("train", 9), ("train", 9)], None),  # nothing validates: another problem
    ],
)
def test_classes_in_one_split_only(tmp_path, voxels, expected):
    crops = {
        f"crop{number}": (usage, {"er": 50} | ({} if count is None else {"mito": count}))
        for number, (usage, count) in enumerate(voxels)
    }
    found = reported(tmp_path, crops)
    assert list(found) == (["mito"] if expected else [])
    if expected:
        assert f"no crop for {expected} holds it" in found["mito"]
        assert "data.split" in found["mito"]
