"""The claims of docs/migration.md: each row names tests that exist, and here are those that stood nowhere else."""

import ast
import re
import tracemalloc
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import zarr

from cellmap_lightning import CellMapDataLoader, CellMapDataModule, CellMapDataset, ReadOptions
from cellmap_lightning.io.writer import write_multiscale
from tests.conftest import CLASSES, INPUTS, TARGETS

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "migration.md"


def rows():
    """Cells of every row of every table, headings left out."""
    lines = [line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "what" and set(row[0]) != {"-"}]


@cache
def names_of_tests(file):
    return {
        node.name
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_row_is_shown_by_tests_that_exist(row):
    assert len(row) == 4
    assert all(row)
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[3])
    assert named
    assert re.sub(r"`[^`]*`", "", row[3]).strip(" ,") == "", "the last column holds tests and nothing else"
    for file, name in named:
        assert name in names_of_tests(file), f"{file} has no {name}"


def test_the_tables_are_found():
    assert len(rows()) > 30
    assert len({row[0] for row in rows()}) == len(rows())


def test_links_between_the_documents_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_an_edge_is_at_the_same_place_in_raw_and_labels(tmp_path):
    """Everything below 22 nm along x is bright in raw (4 nm) and present in the labels (2 nm, in the middle of raw)."""
    raw = np.zeros((16, 16, 16), np.uint8)
    raw[:, :, :6] = 255  # voxel i covers [4 i - 2, 4 i + 2]
    write_multiscale(tmp_path / "v.zarr" / "raw", raw, scale=(4, 4, 4), translation=(0, 0, 0))
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[:, :, :8] = 1  # voxel j covers [6 + 2 j, 8 + 2 j]
    write_multiscale(tmp_path / "v.zarr" / "crop" / "a", labels, scale=(2, 2, 2), translation=(7, 7, 7))
    for scale, count in ((4.0, 8), (2.0, 16)):
        spec = {"shape": [count] * 3, "scale": [scale] * 3}
        with CellMapDataset(
            tmp_path / "v.zarr" / "raw", f"{tmp_path}/v.zarr/crop/[a]", ["a"], {"raw": spec}, {"labels": spec}
        ) as dataset:
            assert len(dataset) == 1
            assert dataset.get_center(0) == {"z": 22.0, "y": 22.0, "x": 22.0}
            sample = dataset[0]
        np.testing.assert_array_equal(sample["labels"][0, 0, 0], np.arange(count) < count // 2)
        row = sample["raw"][0, 0, 0].numpy()
        if scale == 4.0:
            np.testing.assert_array_equal(row, np.arange(count) < count // 2)
        else:  # between the voxels of raw it is linear: as bright on one side as it is dark on the other
            np.testing.assert_allclose(row + row[::-1], 1, atol=1e-2)
            assert row[count // 2 - 1] > 0.5 > row[count // 2]


def test_unknown_is_neither_foreground_nor_background(tmp_path):
    raw = np.full((8, 8, 8), 100, np.uint8)
    write_multiscale(tmp_path / "v.zarr" / "raw", raw, scale=(8, 8, 8), translation=(0, 0, 0))
    labels = np.full((8, 8, 8), 255, np.uint8)
    labels[0], labels[1] = 0, 1
    encoding = {"absent": 0, "present": 1, "unknown": 255}
    annotation = {"annotation_type": {"type": "semantic_segmentation", "encoding": encoding}}
    write_multiscale(
        tmp_path / "v.zarr" / "crop" / "a", labels, scale=(8, 8, 8), translation=(0, 0, 0),
        attributes={"cellmap": {"annotation": annotation}},
    )  # fmt: skip
    spec = {"shape": [8, 8, 8], "scale": [8, 8, 8]}
    with CellMapDataset(
        tmp_path / "v.zarr" / "raw", f"{tmp_path}/v.zarr/crop/[a]", ["a"], {"raw": spec}, {"labels": spec}
    ) as dataset:
        found = dataset[0]["labels"][0]
    assert (found[0] == 0).all()
    assert (found[1] == 1).all()
    assert found[2:].isnan().all()


def test_spaces_in_a_bracket_mean_nothing(volume):
    samples = []
    for bracket in ("[mito,er]", "[ mito , er ]"):
        target = f"{volume.path}/recon-1/labels/groundtruth/crop2/{bracket}"
        with CellMapDataset(volume.raw_path, target, CLASSES, INPUTS, TARGETS) as dataset:
            assert dataset.annotated == ("mito", "er")
            samples.append(dataset[0]["labels"].numpy())
    np.testing.assert_array_equal(*samples)


def test_samples_and_batches_of_an_epoch(volume):
    common = {
        "classes": CLASSES, "input_arrays": INPUTS, "target_arrays": TARGETS, "csv_path": str(volume.csv_path),
        "batch_size": 4,
    }  # fmt: skip
    with CellMapDataModule(**common, samples_per_epoch=12) as data:
        loader = data.train_dataloader()
        assert (len(loader.dataset), len(loader)) == (12, 3)
        assert sum(len(batch["idx"]) for batch in loader) == 12
    with CellMapDataModule(**common, batches_per_epoch=12) as data:
        loader = data.train_dataloader()
        assert (len(loader.dataset), len(loader)) == (48, 12)


def test_shuffling_costs_nothing_however_large_the_volume(tmp_path):
    """A volume of 1.25e14 voxels without a chunk: it has metadata alone."""
    group = zarr.open_group(tmp_path / "v.zarr", mode="w", zarr_format=2)
    group.create_array("s0", shape=(50_000,) * 3, chunks=(64,) * 3, dtype="uint8")
    scale = {"type": "scale", "scale": [8.0, 8.0, 8.0]}
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    group.attrs["multiscales"] = [
        {"version": "0.4", "axes": axes, "datasets": [{"path": "s0", "coordinateTransformations": [scale]}]}
    ]
    arrays = {"shape": [8, 8, 8], "scale": [8, 8, 8]}
    with CellMapDataset(tmp_path / "v.zarr", input_arrays=arrays, read=ReadOptions(missing_raw="warn")) as dataset:
        loader = CellMapDataLoader(dataset, 2, samples_per_epoch=6)
        assert len(dataset) == 49_993**3
        tracemalloc.start()
        try:
            seen = [i for batch in loader for i in batch["idx"].tolist()]
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert len(set(seen)) == 6
    assert max(seen) > 10**12
    assert peak < 16 * 2**20
