"""Classes without an encoding that fill nearly all of a crop beside others may be inverted masks."""

import numpy as np
import pytest

from cellmap_lightning.inspection import report
from cellmap_lightning.inspection.report import inspect
from tests.foreign import SEMANTIC, annotated, cube, ramp, write_image

ARRAY = {"shape": [16] * 3, "scale": [8] * 3}


def reported(folder, deep=True, of_mito=None, **labels):
    write_image(folder / "v.zarr" / "em", ramp())
    for name, stored in labels.items():
        write_image(folder / "v.zarr" / "crop1" / name, stored, attributes=of_mito if name == "mito" else None)
    gt = f"{folder}/v.zarr/crop1/[{','.join(labels)}]"
    settings = {"datasets": {"train": [{"raw": str(folder / "v.zarr" / "em"), "gt": gt}]}, "classes": list(labels)}
    problems = inspect(settings, ARRAY, None, deep=deep).problems
    return [problem.text for problem in problems if problem.kind == "mostly"]


def filled(share):
    stored = np.zeros(32**3, np.uint8)
    stored[: round(share * 32**3)] = 1
    return stored.reshape(32, 32, 32)


@pytest.mark.parametrize("stored", [1 - cube()[::, ::, ::-1] * (ramp() % 2 == 0), filled(0.91), filled(0.999)])
def test_an_inverted_mask_beside_another_class(tmp_path, stored):
    (text,) = reported(tmp_path, mito=stored, er=cube())
    assert text.startswith(f"mito: {(stored == 1).mean():.1%} of the known voxels, read as values")


@pytest.mark.parametrize("share", [0.5, 0.89])
def test_less_is_not_reported(tmp_path, share):
    assert reported(tmp_path, mito=filled(share), er=cube()) == []


def test_alone_with_an_encoding_or_wholly_filled(tmp_path, monkeypatch):
    assert reported(tmp_path / "alone", mito=filled(0.95)) == []
    assert reported(tmp_path / "encoded", mito=filled(0.95), er=cube(), of_mito=annotated(SEMANTIC)) == []
    assert reported(tmp_path / "filled", mito=filled(1), er=cube()) == []  # another problem
    monkeypatch.setattr(report, "COUNTED_AT_ONCE", 0)
    assert reported(tmp_path / "shallow", deep=False, mito=filled(0.95), er=cube()) == []
