"""Classes that no crop of the training annotates: recorded in the checkpoint, and marked in predictions."""

import json
import logging

import lightning as L
import pytest

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.callbacks import make_prediction_writer
from cellmap_lightning.io.ngff import read_attributes
from tests.conftest import INPUTS, TARGETS
from tests.crops.test_unannotated import entries, module
from tests.prediction.predictions import Identity

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")


@pytest.mark.parametrize("dtype", ["uint8", "labels"])
@pytest.mark.parametrize(
    ("bracket", "classes", "untrained"),
    [
        ("mito,er", ["mito", "golgi", "er"], ["golgi"]),
        ("golgi,mito", ["lyso", "mito", "golgi"], ["lyso", "golgi"]),
        ("mito,er", ["mito", "er"], []),
    ],
)
def test_predictions_are_marked(volume, tmp_path, caplog, bracket, classes, untrained, dtype):
    with module(volume, bracket, classes) as data:
        data.setup("fit")
        state = json.loads(json.dumps(data.state_dict()))
    assert state["unannotated"] == untrained
    writer = make_prediction_writer(str(tmp_path / "out.zarr"), dtype=dtype, check_context=False)
    run = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[writer], default_root_dir=tmp_path,
    )  # fmt: skip
    given = {"input_arrays": INPUTS, "target_arrays": TARGETS, "unannotated_classes": "unknown"}
    with CellMapDataModule(classes, datasets={"predict": [{"raw": str(volume.raw_path)}]}, **given) as data:
        data.load_state_dict(state)
        caplog.clear()
        run.predict(Identity(len(classes)), datamodule=data)
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "training" in r.getMessage()]
    text = (
        f"{tmp_path}/out.zarr: no crop of the training annotated {', '.join(untrained)}: the model has learnt nothing"
    )
    assert [line.startswith(text) for line in lines] == [True] * bool(untrained)
    for name in classes:
        block = read_attributes(tmp_path / "out.zarr" / name)[0]["cellmap"]
        assert block.get("untrained", False) == (name in untrained)


def test_a_checkpoint_with_all_classes_marks_nothing(volume):
    with module(volume, "mito,er", ["mito", "er"], datasets=entries(volume, "mito,er")) as data:
        data.load_state_dict({})
        assert data.unannotated == ()
