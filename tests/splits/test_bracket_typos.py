"""A name in the bracket of a target path that the crop does not have: an error that blames the bracket."""

import numpy as np
import pytest

from cellmap_lightning import CellMapDataModule, CellMapError
from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale

SPEC = {"shape": [8] * 3, "scale": [8] * 3}


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    root = tmp_path_factory.mktemp("v") / "a.zarr"
    write_group(root)
    values = np.random.default_rng(0).integers(0, 2, (48, 32, 32), dtype=np.uint8)
    common = {"scale": (8, 8, 8), "storage": ArrayOptions(chunks=(32, 32, 32))}
    write_multiscale(root / "raw", np.tile(values, (5, 1, 1)), translation=(4, 4, 4), **common)
    for number in (1, 2, 3):
        for name in ("mito", "nuc"):
            write_multiscale(root / f"crop{number}" / name, values, translation=(4 + 400 * number, 4, 4), **common)
    return root


@pytest.mark.parametrize("split", ["blocks", "csv", "kfold", "stratified"])
@pytest.mark.parametrize(
    ("bracket", "end"),
    [
        ("mitos", "has no 'mitos', which the bracket [mitos] names; did you mean 'mito'?"),
        ("mito,nucl", "has no 'nucl', which the bracket [mito,nucl] names; did you mean 'nuc'?"),
        ("xyz", "has no 'xyz', which the bracket [xyz] names; it has mito, nuc"),
    ],
)
def test_the_crop_and_its_classes_are_named(volume, tmp_path, split, bracket, end):
    usages = ["train", "train", "validate" if split == "csv" else "train"]
    rows = [f'{usage},{volume},raw,{volume},"crop{n}/[{bracket}]"' for n, usage in enumerate(usages, 1)]
    (tmp_path / "crops.csv").write_text("\n".join(rows) + "\n")
    options = {"n_folds": 3} if split == "kfold" else {}
    arrays = {"raw": SPEC}, {"labels": SPEC}
    with (
        CellMapDataModule(["mito"], *arrays, csv_path=tmp_path / "crops.csv", split=split, **options) as data,
        pytest.raises(CellMapError) as caught,
    ):
        data.setup("fit")
    lines = [line for line in str(caught.value).splitlines() if "crops.csv, line " in line]
    assert lines, str(caught.value)
    for line in lines:  # a split has some of the crops
        number = line.partition("crops.csv, line ")[2][0]
        assert f"a/crop{number} " in line
        assert line.endswith(end)
