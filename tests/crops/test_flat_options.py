import pytest

from cellmap_lightning import CellMapDataset, CellMapDataSplit
from cellmap_lightning.errors import CellMapTypeError


@pytest.mark.parametrize(
    ("owner", "given", "match"),
    [
        (CellMapDataset, {"cache": "disk"}, r"CellMapDataset: .*'cache'; use read=ReadOptions\(cache=\.\.\.\)"),
        (CellMapDataset, {"nan_targets": False}, r"use labels=LabelOptions\(nan_targets=\.\.\.\)"),
        (CellMapDataset, {"normalize": "zscore"}, r"use intensity=IntensityOptions\(normalize=\.\.\.\)"),
        (CellMapDataset, {"clases": ["mito"]}, r"no argument 'clases'; did you mean 'classes'\?"),
        (CellMapDataset, {"cach": "disk"}, r"no argument 'cach'; did you mean 'cache'\?"),
        (CellMapDataset, {"qqq": 1}, r"no argument 'qqq'; it has input_path, .*, intensity$"),
        (CellMapDataSplit, {"pad": True}, r"CellMapDataSplit: .*'pad'; use read=ReadOptions\(pad=\.\.\.\)"),
        (CellMapDataSplit, {"fold": 1}, r"use options=SplitOptions\(fold=\.\.\.\)"),
        (CellMapDataSplit, {"infer": ["er"]}, r"use labels=LabelOptions\(infer=\.\.\.\)"),
    ],
)
def test_flat_option(owner, given, match):
    with pytest.raises(CellMapTypeError, match=match):
        owner("raw", **given)
