"""Reports of incomplete configurations: crops that are left out, and proposals that fit every crop."""

import csv

import numpy as np
import pytest
import yaml

from cellmap_lightning.datamodule import CellMapDataModule
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.inspection.proposal import MULTIPLE
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.splits.manifests import GROUNDTRUTH, RAW
from tests.geometries import write_image, write_label

#: Voxel size in nm and shape of the labels of each crop.
CROPS = {
    "crop1": (8, [48, 48, 48]),
    "crop2": (8, [40, 48, 56]),
    "crop3": (8, [32, 48, 48]),
    "coarse": (32, [16, 16, 16]),
    "thin": (8, [12, 48, 48]),
}
WITH_LD = ("crop2", "crop3")
EVEN = ["crop1", "crop2", "crop3"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Write a volume with levels of 8 and 16 nm, and its crops, beside each other along x."""
    base = tmp_path_factory.mktemp("volumes") / "jrc_a.zarr"
    write_image(base / RAW, [8, 8, 8], [0, 0, 0], [64, 64, 320], levels=2)
    for number, (name, (scale, shape)) in enumerate(CROPS.items()):
        for label in ("mito", "er", *(["ld"] if name in WITH_LD else [])):
            origin = [(scale - 8) / 2, (scale - 8) / 2, 512 * number + (scale - 8) / 2]
            write_label(base / GROUNDTRUTH / name / label, [scale] * 3, origin, shape, int(np.prod(shape)) // 4)
    return base


@pytest.fixture
def look(base, tmp_path):
    """Return the report of some crops, of which the first validates."""

    def look(names, patch=None, cut=False, **settings):
        rows = []
        for name in names:
            usage = "validate" if name == names[0] and not cut else "train"
            classes = "mito,er,ld" if name in WITH_LD else "mito,er"
            rows.append([usage, base, RAW, base, f"{GROUNDTRUTH}/{name}/[{classes}]"])
        with (tmp_path / "crops.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        return inspect({"csv_path": str(tmp_path / "crops.csv"), **settings}, patch or {}, None)

    return look


def kinds(report):
    return {(problem.kind, problem.where.removeprefix("jrc_a/")) for problem in report.problems}


def section(report, heading):
    return next(part for part in str(report).split("\n\n") if part.startswith(heading))


# -- crops that are left out


@pytest.mark.parametrize(
    ("patch", "settings", "names", "reason"),
    [
        ({"scale": [8, 8, 8]}, {}, ["coarse"], "labels coarser than the scale of 8 x 8 x 8 nm"),
        ({}, {}, ["coarse"], "labels coarser than the proposed scale of 8 x 8 x 8 nm"),
        ({"scale": [32, 32, 32], "shape": [8, 8, 8]}, {}, [], ""),
        ({}, {"classes": ["ld"]}, ["crop1", "coarse"], "annotated for none of the classes"),
        ({"scale": [8, 8, 8]}, {"too_coarse": "upsample"}, [], ""),
    ],
    ids=["given", "proposed", "fits", "classes", "upsampled"],
)
def test_the_table_and_the_costs_agree_on_crops_that_are_left_out(look, patch, settings, names, reason):
    report = look(["crop3", "crop1", "crop2", "coarse"], patch, **settings)
    assert report.refused is None
    left_out = [crop.name.removeprefix("jrc_a/") for crop in report.crops if crop.left_out is not None]
    assert sorted(left_out) == sorted(names)
    assert {crop.left_out for crop in report.crops} - {None} == ({reason} if names else set())
    in_use = [crop.usage for crop in report.crops if crop.left_out is None]
    assert report.costs.crops == {split: in_use.count(split) for split in ("train", "val") if split in in_use}
    text = str(report)
    assert (f"Crops (4, {len(names)} left out)" in text) == bool(names)
    assert (f"left out: {reason}: jrc_a/" in " ".join(text.split())) == bool(names)
    rows = [line.split() for line in text.splitlines() if line.startswith("jrc_a/")]
    assert sorted(row[0].removeprefix("jrc_a/") for row in rows if row[1:3] == ["left", "out"]) == sorted(names)


def test_coarse_labels_are_a_problem_only_at_the_scale_of_the_user(look):
    names = ["crop1", "crop2", "coarse"]
    assert ("labels coarse", "coarse") not in kinds(look(names))
    assert ("labels coarse", "coarse") in kinds(look(names, {"scale": [8, 8, 8]}))
    assert "labels are coarser in jrc_a/coarse" in " ".join(look(names).proposal.reasons["scale"].split())


# -- the patch of a proposal


@pytest.mark.parametrize(
    ("names", "settings", "shape", "smaller"),
    [
        (EVEN, {}, (32, 48, 48), None),
        ([*EVEN, "thin"], {}, (32, 48, 48), "targets are unknown outside of smaller crops: jrc_a/thin (12x48x48)"),
        ([*EVEN, "thin"], {"pad": False}, (8, 48, 48), None),
        ([*EVEN, "coarse"], {}, (32, 48, 48), None),
    ],
    ids=["even", "thin", "refused", "coarse"],
)
def test_a_proposed_patch_fits_the_crops_or_names_the_smaller_ones(look, names, settings, shape, smaller):
    report = look(names, **settings)
    assert report.proposal.shape == shape
    assert report.refused is None
    assert not [problem for problem in report.problems if problem.kind == "small"]
    assert ("smaller crops" in report.proposal.reasons["shape"]) == (smaller is not None)
    assert report.proposal.reasons["shape"].endswith(smaller or "voxels)")


@pytest.mark.parametrize(
    ("patch", "is_problem"),
    [
        ({"shape": [16, 48, 48], "scale": [8, 8, 8]}, True),
        ({"shape": [8, 48, 48], "scale": [8, 8, 8]}, False),
        ({"shape": [16, 48, 48]}, False),  # the voxel size, and so the size of the crops, is the proposal's
    ],
)
def test_crops_smaller_than_a_given_patch_are_problems(look, patch, is_problem):
    report = look([*EVEN, "thin"], patch)
    assert (("small", "thin") in kinds(report)) == is_problem
    if "scale" not in patch:
        assert report.proposal.reasons["shape"] == (
            "as given; targets are unknown outside of smaller crops: jrc_a/thin (12x48x48)"
        )


# -- crops that are cut


@pytest.mark.parametrize(
    "settings",
    [
        {"split": "blocks"},
        {"split": {"blocks": {"axis": "z"}}},
        {"split": {"blocks": {"count": 2, "axis": "x"}}},
        {"split": {"blocks": {"crops": ["crop1", "crop2"], "position": "random"}}},
        {"split": "blocks", "spatial_transforms": {"rotate": {"axes": {"z": [-180, 180]}}}},
        {"split": "blocks", "pad": False},
    ],
    ids=str,
)
def test_a_proposal_for_cut_crops_is_one_that_cuts_them(look, settings):
    report = look(EVEN, cut=True, **settings)
    assert report.refused is None
    assert not [problem for problem in report.problems if problem.kind in ("config", "small", "labels coarse")]
    # The parts are those of the proposed patch, each at least as large as it.
    scale, shape = np.array(report.proposal.scale), np.array(report.proposal.shape)
    assert all((np.array(crop.extent) >= shape * scale - 1e-6).all() for crop in report.crops)
    assert {crop.usage for crop in report.crops} == {"train", "val"}
    config = yaml.safe_load(report.proposal.yaml)
    array = {"shape": config["patch"]["shape"], "scale": config["patch"]["scale"]}
    with CellMapDataModule(
        **{**config["data"], **settings}, input_arrays={"raw": array}, target_arrays={"labels": array}
    ) as data:
        used = {split: len(data.splits[split].crops) for split in ("train", "val")}
    assert (
        used
        == report.costs.crops
        == {split: sum(crop.usage == split for crop in report.crops) for split in ("train", "val")}
    )
    # With one multiple more along each axis the crops cannot be cut.
    larger = array | {"shape": (shape + MULTIPLE).tolist()}
    with (
        CellMapDataModule(
            **{**config["data"], **settings}, input_arrays={"raw": larger}, target_arrays={"labels": larger}
        ) as data,
        pytest.raises(CellMapValueError, match="split=blocks cannot cut"),
    ):
        data.setup("fit")


def test_crops_that_no_patch_can_cut_are_named(look):
    report = look(["crop1", "thin"], cut=True, split={"blocks": {"axis": "z"}})
    assert "split=blocks cannot cut 1 of the 2 crops" in report.refused
    assert "jrc_a/thin" in report.refused
    assert "split.blocks.crops" in report.proposal.reasons["shape"]
