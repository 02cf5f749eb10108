"""A warning where targets separate objects, and the annotations are masks without ids."""

import csv
import logging

import numpy as np
import pytest

from cellmap_lightning.datamodule import CellMapDataModule
from cellmap_lightning.io.writer import write_multiscale

SHAPE = (8, 24, 24)
OFFSETS = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def annotation(kind, **codes):
    return {"cellmap": {"annotation": {"annotation_type": {"type": f"{kind}_segmentation", "encoding": codes}}}}


SEMANTIC = annotation("semantic", absent=0, present=1, unknown=255)
INSTANCE = annotation("instance", absent=0)


def labels(*values):
    voxels = np.zeros(SHAPE, np.uint8)
    for number, value in enumerate(values):
        voxels[2:6, 2:10, 2 + 6 * number : 8 + 6 * number] = value
    return voxels


@pytest.fixture
def warnings_of(tmp_path, caplog):
    """Open the train and val crops of a volume with these labels, and return the warnings about masks."""

    def warnings_of(crops, **target):
        rows = []
        write_multiscale(tmp_path / "v.zarr" / "em", np.zeros(SHAPE, np.uint8), scale=(8, 8, 8), translation=(0, 0, 0))
        for number, classes in enumerate(crops):
            for name, (voxels, attributes) in classes.items():
                write_multiscale(
                    tmp_path / "v.zarr" / f"crop{number}" / name, voxels, scale=(8, 8, 8), translation=(0, 0, 0),
                    levels=1, attributes=attributes,
                )  # fmt: skip
            base = tmp_path / "v.zarr"
            usage = "train" if number < 2 else "validate"
            rows.append([usage, base, "em", base, f"crop{number}/[{','.join(classes)}]"])
        with (tmp_path / "crops.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        patch = {"shape": [4, 16, 16], "scale": [8, 8, 8]}
        arguments = {
            "csv_path": str(tmp_path / "crops.csv"), "classes": sorted({name for crop in crops for name in crop}),
            "input_arrays": {"raw": patch}, "target_arrays": {"labels": patch | target}, "leakage": "ignore",
        }  # fmt: skip
        with caplog.at_level(logging.WARNING, "cellmap_lightning"), CellMapDataModule(**arguments) as module:
            module.setup("fit")
        return [text for text in caplog.messages if "masks without ids" in text]

    return warnings_of


KINDS = [("affinities", {"offsets": OFFSETS}), ("instances", {}), ("boundary", {"nm": 16})]


@pytest.mark.parametrize(
    "mask",
    [(labels(255, 255), None), (labels(1, 1), None), (labels(1, 1), SEMANTIC), (labels(1, 1).astype(bool), None)],
    ids=["0 and 255", "0 and 1", "declared", "bool"],
)
@pytest.mark.parametrize(("kind", "more"), KINDS)
def test_masks_are_warned_of_once_per_class(warnings_of, mask, kind, more):
    texts = warnings_of([{"mito": mask, "er": mask}] * 3, kind=kind, **more)
    assert sorted(text.split(":")[0] for text in texts) == ["er", "mito"]
    assert all(f"kind '{kind}'; number them with cellmap-segment method=components" in text for text in texts)


@pytest.mark.parametrize(
    ("crops", "target"),
    [
        ([{"mito": (labels(1, 2), INSTANCE)}] * 3, {"kind": "affinities", "offsets": OFFSETS}),
        ([{"mito": (labels(1, 1), INSTANCE)}] * 3, {"kind": "affinities", "offsets": OFFSETS}),  # one object
        ([{"mito": (labels(1, 2), None)}] * 3, {"kind": "instances"}),
        # In one crop a single object has the id 1, which looks like a mask.
        ([{"mito": (labels(1), None)}, {"mito": (labels(1, 2, 3), None)}], {"kind": "boundary", "nm": 16}),
        ([{"mito": (labels(255, 255), None)}] * 3, {"kind": "binary"}),
        ([{"mito": (labels(255, 255), None)}] * 3, {"kind": "sdt", "nm": 40}),
    ],
)
def test_ids_and_targets_of_presence_are_not_warned_of(warnings_of, crops, target):
    assert warnings_of(crops, **target) == []
