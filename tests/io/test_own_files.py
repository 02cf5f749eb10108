"""Files that commands write beside an output are replaced; files of another source are not."""

import shutil

import numpy as np
import pytest
from omegaconf import OmegaConf

from cellmap_lightning.commands.prediction_report import check_files
from cellmap_lightning.errors import CellMapFileExistsError
from cellmap_lightning.evaluation.csc_evaluation import Predicted, evaluate_csc, write_csc_csv
from cellmap_lightning.evaluation.evaluate import evaluate
from cellmap_lightning.evaluation.score_files import draw, write_csv
from cellmap_lightning.io.own_files import check_replaceable
from cellmap_lightning.io.writer import write_multiscale
from cellmap_lightning.visualization.figures.canvas import save
from tests.commands.test_cli import run_forked


def predicted(folder):
    values = np.zeros((8, 8, 8), np.uint8)
    values[:4] = 1
    about = {"cellmap": {"prediction": {"class_name": "er", "values": "mask"}}}
    write_multiscale(folder / "p.zarr" / "er", values, scale=(8, 8, 8), translation=(0, 0, 0), attributes=about)
    write_multiscale(folder / "truth" / "crop1" / "er", values, scale=(8, 8, 8), translation=(0, 0, 0))
    return folder / "p.zarr", folder / "truth"


def test_files_of_this_package_are_replaced(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    files = [tmp_path / name for name in ("a.png", "a.svg", "a.pdf", "a.PNG")]
    for file in files:
        save(figure, file)
    prediction, truth = predicted(tmp_path)
    scores = evaluate(prediction, truth, ["er"])
    more = [tmp_path / name for name in ("s.csv", "s.png", "c.csv", "absent.png")]
    write_csv(scores, more[0])
    draw(scores, more[1])
    write_csc_csv(evaluate_csc([Predicted(prediction, truth, ("er",))]), more[2])
    check_replaceable(files + more, "out=a", "")


@pytest.mark.parametrize(
    "name", ["a.png", "a.svg", "a.pdf", "a.csv", "a.html", "a-links.txt", "empty.png", "folder.png"]
)
def test_files_of_another_source_are_not_replaced(tmp_path, name):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    file = tmp_path / name
    if name == "folder.png":
        file.mkdir()
    elif file.suffix in (".png", ".svg", ".pdf") and name != "empty.png":
        figure.savefig(file)
    else:
        file.write_text("crop,notes\n" * (name != "empty.png"))
    with pytest.raises(CellMapFileExistsError, match=rf"^out=a: .*{name} exists already.*: move it$"):
        check_replaceable([file], "out=a", "move it")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"picture": True}, "p.png"),
        ({"evaluate": True, "metric": "voxels"}, "p-scores.csv"),
        ({"evaluate": True, "metric": "voxels"}, "p-scores.png"),
        ({"evaluate": True, "metric": "csc"}, "p-challenge.csv"),
        ({"evaluate": True, "metric": "csc", "folder": "all"}, "all-challenge.csv"),
    ],
)
def test_files_beside_a_prediction_are_checked(tmp_path, settings, name):
    base = {"writer": {"output": str(tmp_path / "p.zarr"), "overwrite": False}, "picture": False, "evaluate": False}
    if "folder" in settings:
        settings = settings | {"folder": str(tmp_path / settings["folder"])}
    cfg = OmegaConf.create(base | settings)
    check_files([cfg])
    (tmp_path / name).write_text("mine")
    with pytest.raises(CellMapFileExistsError, match="overwrite=true"):
        check_files([cfg])
    cfg.writer.overwrite = True
    check_files([cfg])


def test_the_preview_keeps_other_files(volume, tmp_path):
    settings = [
        f"data.csv_path={volume.csv_path}", "data.classes=[mito,er]", "patch.shape=[8,16,16]",
        "patch.scale=[10.48,8,8]", "samples=1",
    ]  # fmt: skip
    for _ in range(2):  # its own files are replaced
        code, text = run_forked(*settings, "html=true", cwd=tmp_path, command="preview")
        assert code == 0, text
    for name in ("preview.png", "preview.html", "preview-links.txt"):
        folder = tmp_path / name.partition(".")[2]
        shutil.copytree(tmp_path, folder, ignore=lambda *_: ["png", "html", "txt"])
        (folder / name).write_text("mine")
        code, text = run_forked(*settings, "html=true", cwd=folder, command="preview")
        assert code == 1
        assert f"{name} exists already" in text.replace("\n", " ")
        assert (folder / name).read_text() == "mine"
