"""Classes of a manifest that are neither used nor classes of the challenge are named once."""

import logging
import shutil

import numpy as np
import pytest

from cellmap_lightning.splits.datasplit import CellMapDataSplit
from cellmap_lightning.splits.manifest_classes import report_lacking_classes, report_unknown_classes
from cellmap_lightning.splits.options import SplitOptions
from tests.commands.test_cli import run_forked
from tests.commands.test_predict_command import checkpoint  # noqa: F401
from tests.splits.test_manifest_geometry import ORIGIN, SHAPE, STEP, data, listed  # noqa: F401


@pytest.mark.parametrize(
    ("names", "used", "text"),
    [
        (["mito", "mitto"], ["mito", "er"], "'mitto' (did you mean 'mito'?)"),
        (["mito", "nucleuss", "qqqqq"], ["mito"], "'qqqqq'"),
        (
            ["mitto", "erx", "mitto"],
            ["mito", "er_mem", "er"],
            "'mitto' (did you mean 'mito'?), 'erx' (did you mean 'er'?)",
        ),
        (["mito", "ves", "nuc"], ["mito"], None),
        (["my_class"], ["my_class"], None),
    ],
)
def test_unknown_names_are_reported_once(tmp_path, caplog, names, used, text):
    for _ in range(2):
        report_unknown_classes(tmp_path / "train.csv", names, used)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (text is not None)
    if text is not None:
        assert lines[0].startswith("train.csv lists classes that are not used here")
        assert lines[0].endswith(text)


def test_a_training_names_them(data, caplog):  # noqa: F811
    path = listed(data, (7, "mito", STEP, ORIGIN, SHAPE), (8, "mitto", STEP, (200, *ORIGIN[1:]), SHAPE))
    with caplog.at_level(logging.WARNING):
        CellMapDataSplit(
            classes=["mito"], search_path=str(data / "data"), options=SplitOptions(manifest=str(path), split="random")
        )
    assert "'mitto' (did you mean 'mito'?)" in caplog.text
    assert np.shape(caplog.records) == (1,)


def test_a_prediction_names_them(checkpoint, volume, tmp_path):  # noqa: F811
    (tmp_path / "data" / "jrc_a").mkdir(parents=True)
    shutil.copytree(volume.path, tmp_path / "data" / "jrc_a" / "jrc_a.zarr")
    box = (5.24, 4.0, 4.0), (201.3, 402.0, 402.0), (4, 8, 8)
    path = listed(tmp_path, (97, "mitto", *box), (97, "mito", *box))
    settings = [f"ckpt={checkpoint}", "crops=test", f"manifest={path}", "search_path=data", "trainer=cpu"]
    code, text = run_forked(*settings, cwd=tmp_path, command="predict")
    assert code == 0, text
    assert " ".join(text.split()).count("'mitto' (did you mean 'mito'?)") == 1
    assert " ".join(text.split()).count("lists 1 class that the model does not predict: mitto") == 1


@pytest.mark.parametrize(
    ("names", "known", "text"),
    [
        (["mito", "nuc", "mito", "nuc"], ["mito"], "1 class that the model does not predict: nuc"),
        (["er", "nuc", "ves"], ["mito"], "3 classes that the model does not predict: er, nuc, ves"),
        ([f"c{n}" for n in range(67)], ["c0"], "c11, c12 and 54 more"),
        (["mito"], ["mito", "er"], None),
    ],
)
def test_classes_that_the_model_lacks(caplog, names, known, text):
    report_lacking_classes("folder/test_crop_manifest.csv", names, known)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.startswith("test_crop_manifest.csv lists ") for line in lines] == [True] * (text is not None)
    assert all(line.endswith(text) for line in lines)
