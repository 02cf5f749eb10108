"""The command that an inspection proposes, for crops of which none or one is for validation."""

import csv
import re
import shlex

import hydra
import numpy as np
import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cellmap_lightning.commands.config_values import check_model_shape
from cellmap_lightning.commands.inspect_command import training_command
from cellmap_lightning.commands.resolvers import CONFIGS, register_resolvers
from cellmap_lightning.inspection import report as report_module
from cellmap_lightning.inspection.proposal import override_text
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.io.writer import write_multiscale
from tests.commands.test_cli import run_forked

#: Of each case the voxel size in nm, and usage, classes, voxels and first voxel of each crop.
CASES = {
    "one": ((8, 8, 8), [("train", ["mito", "er"], (24, 32, 40), (0, 0, 0))]),
    "two": (
        (8, 8, 8),
        [("train", ["mito"], (24, 24, 24), (0, 0, 0)), ("validate", ["mito"], (24, 24, 24), (0, 40, 40))],
    ),
    "one per class": (
        (8, 8, 8),
        [("train", ["mito"], (32, 32, 32), (0, 0, 0)), ("train", ["er"], (32, 32, 32), (0, 40, 40))],
    ),
    "flat": ((50, 8, 8), [("train", ["mito"], (8, 48, 48), (0, 0, 0))]),
    "tiny": ((8, 8, 8), [("train", ["mito"], (20, 10, 10), (0, 0, 0))]),
    "too small": ((8, 8, 8), [("train", ["mito"], (10, 10, 10), (0, 0, 0))]),
}
#: The split that is proposed where the longest axis has too few voxels.
SPLITS = {"flat": "{blocks:{axis:y}}"}


@pytest.fixture
def write(tmp_path):
    """A function that writes the volume and the CSV of a case, in the working directory of the test."""

    def write(name):
        scale, crops = CASES[name]
        rng = np.random.default_rng(0)
        base, rows = tmp_path / "jrc_a.zarr", []
        half = np.divide(scale, 2)
        write_multiscale(base / "em", rng.integers(0, 255, (32, 80, 80), np.uint8), scale=scale, translation=half)
        for number, (usage, classes, shape, first) in enumerate(crops):
            for label in classes:
                voxels = (rng.random(shape) < 0.3).astype(np.uint8)
                path, translation = base / f"crop{number}" / label, np.multiply(first, scale) + half
                write_multiscale(path, voxels, scale=scale, translation=translation)
            rows.append([usage, base / "em", f"{base}/crop{number}/[{','.join(classes)}]"])
        with (tmp_path / "crops.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        return {"csv_path": str(tmp_path / "crops.csv")}

    return write


def problems(report, kind):
    return [problem.text for problem in report.problems if problem.kind == kind]


@pytest.mark.parametrize("name", ["one", "two", "one per class", "flat", "tiny"])
def test_the_proposed_command_trains(write, name):
    settings = write(name)
    report = inspect(settings, {}, None)
    assert report.refused is None
    cuts = name != "two"
    assert report.proposal.cuts == cuts
    assert report.proposal.overrides.get("data.split") == (SPLITS.get(name, "blocks") if cuts else None)
    assert set(report.costs.crops) == {"train", "val"}
    assert set(report.proposal.classes) == {label for _, labels, _, _ in CASES[name][1] for label in labels}
    # The report shows the crops as they are listed.
    assert [crop.usage for crop in report.crops] == (
        ["train", "val"] if name == "two" else ["train"] * len(report.crops)
    )
    command = training_command([f"data.csv_path={settings['csv_path']}", "deep=true"], report.proposal.overrides)
    first, *overrides = shlex.split(command)
    assert first == "cellmap-train"
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("train", overrides=overrides)
    check_model_shape(cfg)
    # The text to be pasted has the same settings.
    pasted = yaml.safe_load(report.proposal.yaml)
    for group in ("patch", "data"):
        assert pasted[group] == {key: OmegaConf.to_container(cfg[group]).get(key) for key in pasted[group]}
    with instantiate(OmegaConf.to_container(cfg.data, resolve=True), _convert_="all") as data:
        data.setup("fit")
        network = instantiate(cfg.model, _convert_="all")
        for loader in (data.train_dataloader(), data.val_dataloader()):
            batch = next(iter(loader))
            assert network(batch["raw"][:2]).shape == batch["labels"][:2].shape


def test_it_is_printed_and_runs_word_for_word(write, tmp_path):
    write("flat")
    code, text = run_forked("data.csv_path=crops.csv", "data.seed=3", cwd=tmp_path, command="inspect")
    assert code == 0, text
    command = text.strip().splitlines()[-1]
    assert command.startswith("cellmap-train data.csv_path=crops.csv data.seed=3 'data.split={blocks:{axis:y}}' ")
    limits = ["trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=2"]
    code, text = run_forked(*shlex.split(command)[1:], *limits, "final_validation=false", cwd=tmp_path)
    assert code == 0, text
    assert "checkpoints/best.ckpt" in text


@pytest.mark.parametrize(
    ("name", "patch", "cuts"),
    [
        ("one", {}, True),
        ("one", {"shape": [8, 8, 16]}, True),
        ("one", {"shape": [24, 32, 40]}, False),
        ("too small", {}, False),
        ("two", {}, False),
    ],
)
def test_crops_are_only_cut_where_the_patch_fits(write, name, patch, cuts):
    report = inspect(write(name), patch, None)
    assert report.refused is None
    assert report.proposal.cuts == cuts
    (text,) = problems(report, "validation") or [""]
    assert ("the proposal sets data.split to blocks" in text) == cuts
    assert ("list some for validation, or set data.split=blocks, with a patch" in text) == (not cuts and name != "two")
    assert ("the proposed data.split cuts a part of each" in " ".join(str(report).split())) == cuts


@pytest.mark.parametrize("split", ["blocks", {"blocks": {"axis": "x"}}, "csv"])
def test_a_split_that_is_given_stays(write, split):
    report = inspect(write("one") | {"split": split}, {}, None)
    assert report.refused is None
    assert report.proposal.cuts == (split == "csv")
    assert set(report.costs.crops) == {"train", "val"}


@pytest.mark.parametrize("deep", [False, True])
def test_a_class_in_no_two_crops_is_refused_with_the_way_out(write, tmp_path, monkeypatch, deep):
    monkeypatch.setattr(report_module, "COUNTED_AT_ONCE", 0)
    settings = write("one per class")
    path = tmp_path / "crops.csv"
    second = path.read_text().splitlines()[1]
    path.write_text(path.read_text().replace(second, second.replace("train", "validate", 1)))
    report = inspect(settings, {}, None, deep)
    assert "mito only in jrc_a/crop0 (train), er only in jrc_a/crop1 (val)" in report.refused
    assert "list the crops for training and set data.split=blocks" in report.refused
    assert (re.search(r"\?($|\s)", str(report).partition("Proposal")[0]) is None) == deep


@pytest.mark.parametrize("crops", [1, 2])
def test_a_single_crop_of_a_folder_is_cut(tmp_path, crops):
    from tests.geometries import write_image, write_label

    base = tmp_path / "jrc_a" / "jrc_a.zarr" / "recon-1"
    write_image(base / "em/fibsem-uint8", [8, 8, 8], [0, 0, 0], [64, 64, 64])
    for number in range(crops):
        path = base / "labels/groundtruth" / f"crop{number}" / "mito"
        write_label(path, [8, 8, 8], [0, 0, 256 * number], [32, 32, 32], 5000)
    report = inspect({"search_path": str(tmp_path)}, {}, None)
    assert report.refused is None
    assert report.split == ("blocks" if crops == 1 else "stratified")
    assert report.proposal.cuts == (crops == 1)
    assert report.costs.crops == {"train": 1, "val": 1}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([8, 5.24, 4], "[8,5.24,4]"),
        (["mito", "er mem", "it's"], r"[mito,'er mem','it\'s']"),
        ({"percentile": [0.5, 99.5]}, "{percentile:[0.5,99.5]}"),
        ("my data/a,b=c.csv", "'my data/a,b=c.csv'"),
        ("null", "'null'"),
        ("2024/crops.csv", "'2024/crops.csv'"),
        (True, "true"),
    ],
)
def test_values_as_overrides(value, text):
    assert override_text(value) == text
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("train", overrides=[f"+x={text}"])
    assert OmegaConf.to_container(OmegaConf.create({"x": cfg.x}))["x"] == value


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["data.csv_path=a.csv", "deep=true", "device_gb=8"], "cellmap-train data.csv_path=a.csv data.x=1"),
        (["data.csv_path=a b.csv", "data.x=2"], "cellmap-train 'data.csv_path=a b.csv' data.x=2"),
        (["data.csv_path=a.csv", "experiment=mine"], None),
        (["data.input_path=a.zarr"], None),
    ],
)  # fmt: skip
def test_the_command_has_what_was_given(arguments, command):
    assert training_command(arguments, {"data.x": "1"}) == command
