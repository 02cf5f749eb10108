import logging

import numpy as np
import pytest

from cellmap_lightning import CellMapDataset, CellMapMultiDataset
from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale

SHAPE, SCALE = (16, 16, 16), (4.0, 4.0, 4.0)
SPEC = {"shape": [4, 4, 4], "scale": [8.0, 8.0, 8.0]}


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "kept"))

    def make(name, counts, kind="semantic_segmentation"):
        root = tmp_path / f"{name}.zarr"
        rng = np.random.default_rng(1)
        stored = rng.choice([0, 1, 255], SHAPE).astype(np.uint8)
        block = {"annotation_type": {"type": kind, "encoding": {"absent": 0, "unknown": 255}}}
        if counts:
            block["complement_counts"] = {"absent": int((stored == 0).sum()), "unknown": int((stored == 255).sum())}
        write_group(root)
        write_multiscale(
            root / "raw", stored, scale=SCALE, translation=(0, 0, 0), levels=2, storage=ArrayOptions(chunks=(8, 8, 8))
        )
        write_multiscale(
            root / "crop1" / "a", stored, scale=SCALE, translation=(0, 0, 0), levels=2, mode="mode",
            storage=ArrayOptions(chunks=(8, 8, 8)),
            array_attributes=lambda level, array: {"cellmap": {"annotation": block}},
        )  # fmt: skip
        dataset = CellMapDataset(root / "raw", f"{root}/crop1/[a]", ["a", "b"], {"raw": SPEC}, {"labels": SPEC})
        return dataset, int((stored == 1).sum())

    return make


def test_from_the_metadata_scaled_to_the_resolution_asked_for(make, tmp_path):
    dataset, foreground = make("with", True)
    assert dataset.class_counts == {"a": foreground / 8}
    assert not (tmp_path / "kept").exists()


def test_counts_are_cached_outside_the_data(make, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "cellmap_lightning.crops.counts"):
        dataset, foreground = make("without", False)
        with dataset:
            assert dataset.class_counts == {"a": foreground / 8}
        assert len(caplog.records) == 1
        (kept,) = (tmp_path / "kept").glob("*.json")
        again = CellMapDataset(
            dataset.input_path, f"{tmp_path}/without.zarr/crop1/[a]", ["a"], {"raw": SPEC}, {"labels": SPEC}
        )
        assert again.class_counts == {"a": foreground / 8}
        assert len(caplog.records) == 1
    kept.unlink()


def test_summed_over_crops(make):
    one, n = make("one", True)
    two, m = make("two", True)
    with CellMapMultiDataset([one, two]) as both:
        assert both.class_counts == {"a": (n + m) / 8, "b": 0.0}
