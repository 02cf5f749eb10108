"""Paths of checkpoints that do not exist: the message has the one that is meant."""

import re

import pytest

from cellmap_lightning.errors import CellMapFileNotFoundError
from cellmap_lightning.training.checkpoints import check_exists


@pytest.fixture
def run(tmp_path):
    (tmp_path / "mito" / "checkpoints").mkdir(parents=True)
    for name in ("best", "last"):
        (tmp_path / "mito" / "checkpoints" / f"{name}.ckpt").touch()
    return tmp_path / "mito"


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt"])
@pytest.mark.parametrize("setting", ["ckpt", "init_from", "resume"])
def test_the_folder_checkpoints_is_missing_in_the_path(run, name, setting):
    text = f"{setting}={run}/{name}: there is no such checkpoint; did you mean {run}/checkpoints/{name}?"
    with pytest.raises(CellMapFileNotFoundError, match=f"^{re.escape(text)}$"):
        check_exists(run / name, setting)


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("epoch3.ckpt", "; checkpoints beside it: {run}/checkpoints/best.ckpt, {run}/checkpoints/last.ckpt"),
        (
            "checkpoints/epoch3.ckpt",
            "; checkpoints beside it: {run}/checkpoints/best.ckpt, {run}/checkpoints/last.ckpt",
        ),
        ("", " is a folder; did you mean {run}/checkpoints/best.ckpt or {run}/checkpoints/last.ckpt?"),
        ("checkpoints", " is a folder; did you mean {run}/checkpoints/best.ckpt or {run}/checkpoints/last.ckpt?"),
    ],
)
def test_other_paths_list_the_checkpoints(run, path, end):
    with pytest.raises(CellMapFileNotFoundError) as caught:
        check_exists(run / path, "ckpt")
    assert str(caught.value).endswith(end.format(run=run))
