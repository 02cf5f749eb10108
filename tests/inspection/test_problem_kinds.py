"""Every kind of note that reading an image can leave has a heading in the report."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest

import cellmap_lightning
from cellmap_lightning.inspection.problems import KINDS
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.io.formats import hdf5

PACKAGE = Path(cellmap_lightning.__file__).parent


def test_notes_have_headings():
    kinds = {
        k for path in PACKAGE.rglob("*.py") for k in re.findall(r'\bNote\(\s*"(\w[\w ]*)"', path.read_text("utf-8"))
    }
    assert {"scale", "unit", "access", "systems"} <= kinds <= set(KINDS)


@pytest.mark.parametrize("deep", [False, True])
def test_a_file_that_is_read_slowly_is_reported(tmp_path, monkeypatch, deep):
    monkeypatch.setattr(hdf5, "_LARGE", 1000)
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file["raw"] = np.random.default_rng(0).integers(0, 255, (16, 16, 16)).astype(np.uint8)
        file["raw"].attrs["resolution"] = [8.0, 8.0, 8.0]
    (tmp_path / "crops.csv").write_text(f"predict,{tmp_path}/raw.h5/raw\n", encoding="utf-8")
    found = inspect({"csv_path": str(tmp_path / "crops.csv")}, {}, None, deep=deep)
    (problem,) = [problem for problem in found.problems if problem.kind == "access"]
    assert "has no chunks" in problem.text
