"""A prediction that fails leaves nothing that refuses the corrected one, and removes nothing that was there before."""

import contextlib
import logging
import shutil

import pytest
import torch
import zarr

from cellmap_lightning.errors import CellMapError, CellMapFileExistsError, CellMapValueError
from cellmap_lightning.prediction.journal import Journal, journal_folder
from cellmap_lightning.prediction.output import PredictionOutput
from tests.checkpointing.test_data_match import command, trained  # noqa: F401
from tests.conftest import without_remarks
from tests.prediction.predictions import Convolution, Identity, contents, predict, raw_volume, read

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")

PATCH = (12, 16, 20)


class Failing(Identity):
    """Gives its input back until a batch at which it fails."""

    def __init__(self, error, at=0, channels=1):
        super().__init__(channels)
        self.error, self.at = error, at

    def predict_step(self, batch, batch_idx):
        if batch_idx >= self.at:
            raise self.error
        return super().predict_step(batch, batch_idx)


class Outside(Identity):
    """Gives values that uint8 cannot store, which the writing thread finds."""

    def predict_step(self, batch, batch_idx):
        return super().predict_step(batch, batch_idx) + 2


FAULTS = {
    "model": ({"model": Failing(ValueError("no"))}, ValueError),
    "memory": ({"model": Failing(torch.OutOfMemoryError("no"))}, torch.OutOfMemoryError),
    "Ctrl-C": ({"model": Failing(KeyboardInterrupt())}, SystemExit),
    "channels": ({"model": Identity(3)}, CellMapValueError),
    "values": ({"model": Outside(), "dtype": "uint8"}, CellMapValueError),
    "mask": ({"mask": "nowhere.zarr/mask"}, CellMapError),
    "key": ({"model": Convolution(1), "key": "other"}, CellMapError),
    "room": ({"check_space": True}, CellMapError),
}


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """Raw, an earlier prediction of it, and what the corrected command predicts."""
    folder = tmp_path_factory.mktemp("predicted")
    path, _ = raw_volume(folder, (17, 25, 34))
    with without_remarks():
        predict(path, PATCH, folder / "earlier.zarr", Identity(2), classes=("a", "b"), zarr_format=2)
        predict(path, PATCH, folder / "whole.zarr", Identity(2), classes=("x", "y"), dtype="float16")
    return path, folder / "earlier.zarr", contents(folder / "whole.zarr", root=False)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("before", ["nothing", "a folder", "a prediction"])
def test_the_corrected_prediction_is_not_refused(tmp_path, monkeypatch, predicted, fault, before):
    path, earlier, whole = predicted
    out = tmp_path / "some" / "folder" / "out.zarr"
    more = {"zarr_format": 3 if before == "a folder" else 2}
    if before == "a folder":
        out.mkdir(parents=True)
    if before == "a prediction":
        shutil.copytree(earlier, out)
        (out / "notes.txt").write_text("mine")
        more["overwrite"] = True
    given, error = FAULTS[fault]
    there = contents(out) if before == "a prediction" else {}
    with monkeypatch.context() as patch:
        if fault == "room":
            usage = shutil.disk_usage(tmp_path)
            patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(error):
            predict(path, PATCH, out, check_context=False, **given | more)
    if fault == "mask" and before == "a prediction":  # known before anything is replaced
        assert contents(out) == there
        return
    left = sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "some").rglob("*")) if before != "nothing" else []
    assert (
        left
        == {
            "nothing": [],
            "a folder": ["some/folder", "some/folder/out.zarr"],
            "a prediction": ["some/folder", "some/folder/out.zarr", "some/folder/out.zarr/notes.txt"],
        }[before]
    )
    assert (tmp_path / "some").exists() == (before != "nothing")
    if before == "a prediction":
        (out / "notes.txt").unlink()
    predict(path, PATCH, out, Identity(2), classes=("x", "y"), dtype="float16")
    assert contents(out, root=False) == whole


def test_raw_that_cannot_be_read(tmp_path):
    path, _ = raw_volume(tmp_path, (33, 41, 50))
    out = tmp_path / "out.zarr"
    for chunk in (path / "s0").rglob("*"):
        if chunk.is_file() and not chunk.name.startswith("."):
            chunk.write_bytes(b"no chunk")
    with pytest.raises(CellMapError):
        predict(path, PATCH, out, data={"read_attempts": 1})
    assert not out.exists()


def test_finished_blocks_remain(tmp_path):
    path, _ = raw_volume(tmp_path, (33, 41, 50))
    out = tmp_path / "out.zarr"
    with pytest.raises(ValueError, match="late"):
        predict(path, PATCH, out, Failing(ValueError("late"), at=9), model_id="m")
    assert Journal(out).finished
    there = contents(out)
    text = r"dtype: 'float32' is there, now 'float16'\n(.*\n)*choose another output, or replace it with overwrite=True"
    with pytest.raises(CellMapFileExistsError, match=text):
        predict(path, PATCH, out, model_id="m", dtype="float16")
    with pytest.raises(ValueError, match="early"):  # a later run that finishes nothing
        predict(path, PATCH, out, Failing(ValueError("early")), model_id="m")
    assert contents(out) == there
    assert 0 < predict(path, PATCH, out, model_id="m").summary.written < 12 * 8
    predict(path, PATCH, tmp_path / "whole.zarr", model_id="m")
    assert contents(out) == contents(tmp_path / "whole.zarr")


def test_finished_volumes_remain(tmp_path):
    path, _ = raw_volume(tmp_path, (16, 16, 16))
    other, _ = raw_volume(tmp_path / "more", (16, 16, 16))
    other = other.parent.rename(tmp_path / "raw2.zarr") / "em"
    volumes = {"datasets": {"predict": [{"raw": str(path)}, {"raw": str(other)}]}}
    given = {"data": volumes, "model_id": "m", "check_context": False}
    counting = Identity()
    writer = predict(path, PATCH, tmp_path / "whole.zarr", counting, **given)
    names = sorted(p.name for p in (tmp_path / "whole.zarr").iterdir())
    assert len(names) == len(writer._jobs) == 2
    out = tmp_path / "out.zarr"
    with pytest.raises(ValueError, match="late"):
        predict(path, PATCH, out, Failing(ValueError("late"), at=counting.batches // 2), **given)
    assert len([p.name for p in out.iterdir()]) == 1
    predict(path, PATCH, out, **given)
    assert contents(out) == contents(tmp_path / "whole.zarr")


def test_several_processes(tmp_path):
    """The second process still writes when the first has removed the output: the next prediction replaces that too."""
    path, _ = raw_volume(tmp_path, (33, 41, 50))
    whole = predict(path, PATCH, tmp_path / "whole.zarr", Identity(2), classes=("a", "b"))._jobs[0].output
    out = tmp_path / "out.zarr"
    first, second = (
        PredictionOutput(out, ("a", "b"), whole.grid, whole.values, whole.chunks, rank=rank) for rank in (0, 1)
    )
    first.open({"made by": "hand"})
    first.discard(alone=False)
    assert (out / journal_folder("prediction")).is_dir()
    (out / "a" / "s0" / "0" / "0").mkdir(parents=True)
    (out / "a" / "s0" / "0" / "0" / "0").write_bytes(b"a chunk")
    with pytest.raises(CellMapFileExistsError, match=r"its journal .* was removed"):
        second.journal.write("done", 0, [0, 0])
    first.close()
    predict(path, PATCH, out, Identity(2), classes=("a", "b"))
    assert contents(out) == contents(tmp_path / "whole.zarr")


def test_block_of_another_process_remains(tmp_path):
    path, _ = raw_volume(tmp_path, (33, 41, 50))
    whole = predict(path, PATCH, tmp_path / "whole.zarr")._jobs[0].output
    first, second = (
        PredictionOutput(tmp_path / "out.zarr", "a", whole.grid, whole.values, whole.chunks, rank=rank)
        for rank in (0, 1)
    )
    first.open({"made by": "hand"})
    second.skip(0)
    for output in (first, second):
        output.discard(alone=False)
        assert output.journal.finished == {0: [0]}
        assert output.journal.settings == {"made by": "hand"}


def test_lines_of_a_removed_output_are_ignored(tmp_path):
    """A kill in the middle of replacing a prediction: its settings are gone, and its blocks are still noted."""
    path, _ = raw_volume(tmp_path, (33, 41, 50))
    out = tmp_path / "out.zarr"
    with contextlib.suppress(ValueError):
        predict(path, PATCH, out, Failing(ValueError("no"), at=9), model_id="m")
    assert Journal(out).finished
    (out / journal_folder("prediction") / "settings.json").unlink()
    predict(path, PATCH, out, model_id="m")
    predict(path, PATCH, tmp_path / "whole.zarr", model_id="m")
    assert contents(out) == contents(tmp_path / "whole.zarr")
    assert read(out).any()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("writer.mask=nowhere.zarr/mask", "writer.blend=gaussian"),
        ("writer.classes=[a,b,c]", "writer.dtype=float16"),
        (
            "data.raw_value_transforms={_target_: tests.prediction.test_failed_prediction.broken, _partial_: true}",
            "patch.shape=[8,32,32]",
        ),
    ],
)
def test_a_command_that_failed_and_is_corrected(volume, trained, tmp_path, wrong, right):  # noqa: F811
    code, text = command(volume, tmp_path, "predict", trained, wrong)
    assert code != 0, text
    assert not (tmp_path / "out.zarr").exists()
    code, text = command(volume, tmp_path, "predict", trained, right)
    assert code == 0, text
    assert zarr.open_array(str(tmp_path / "out.zarr" / "mito" / "s0"), mode="r")[...].any()


def broken(raw):
    raise RuntimeError("a transform that fails")


def test_removal_is_logged(tmp_path, caplog):
    path, _ = raw_volume(tmp_path, (16, 16, 16))
    caplog.set_level(logging.INFO, "cellmap_lightning")
    with pytest.raises(ValueError, match="no"):
        predict(path, PATCH, tmp_path / "out.zarr", Failing(ValueError("no")))
    assert "out.zarr: no block was finished, so the output is removed" in caplog.text
