"""Raw of 96³ voxels with a crop of 64³, small enough to be damaged by each test."""

import numpy as np
import pytest

from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale
from tests.make import make_dataset

SCALE = (8.0, 8.0, 8.0)
SHAPE = [32, 32, 32]
SPEC = {"shape": SHAPE, "scale": list(SCALE)}
RAW = np.random.default_rng(0).integers(1, 255, (96, 96, 96)).astype(np.uint8)
LABELS = (np.indices((64, 64, 64)).sum(axis=0) // 16 % 2).astype(np.uint8)


@pytest.fixture(autouse=True)
def own_regions(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    """Raw of 96³ in chunks of 32³, and a crop of 64³ at its corner."""
    path = tmp_path / "volume.zarr"
    write_group(path)
    write_multiscale(
        path / "raw", RAW, scale=SCALE, translation=(4.0, 4.0, 4.0), storage=ArrayOptions(chunks=(32, 32, 32))
    )
    for name in ("mito", "er"):
        write_multiscale(
            path / "crop1" / name, LABELS, scale=SCALE, translation=(4.0, 4.0, 4.0),
            storage=ArrayOptions(chunks=(32, 32, 32)), mode="mode",
            array_attributes=lambda _, data: {
                "cellmap": {"annotation": {
                    "annotation_type": {"type": "semantic_segmentation", "encoding": {"absent": 0, "unknown": 255}},
                    "complement_counts": {"absent": int((data == 0).sum()), "unknown": int((data == 255).sum())},
                }}
            },
        )  # fmt: skip
    return path


def dataset(root, classes=("mito", "er"), **kwargs):
    given = {"read_attempts": 1, "max_workers": 2, "cache": "memory", "raw_value_transforms": None} | kwargs
    return make_dataset(
        root / "raw", f"{root}/crop1/[{','.join(classes)}]", list(classes), {"raw": SPEC}, {"labels": SPEC}, **given
    )


def position(data, start):
    """The position whose patch begins at a voxel."""
    center = [(s + n / 2) * 8.0 for s, n in zip(start, SHAPE, strict=True)]
    place = np.rint((np.asarray(center) - data.placement.first) / data.placement.step).astype(int)
    found = int(np.ravel_multi_index(place, data.placement.counts))
    assert list(data.get_center(found).values()) == pytest.approx(center)
    return found


def chunk(root, index="0/0/0", image="raw"):
    return root / image / "s0" / index
