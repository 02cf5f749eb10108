"""``cellmap-predict`` from the command line, with a checkpoint of ``cellmap-train``."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile
import torch
import zarr

from cellmap_lightning.commands.predict_config import region_box, saved_config
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.writer import write_multiscale
from tests import processes
from tests.commands.test_cli import run_forked, small

COMMAND = [sys.executable, "-c", "from cellmap_lightning.commands.predict_command import main; main()"]


@pytest.fixture(scope="module")
def checkpoint(volume, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    code, text = run_forked(*small(volume, "trainer.max_epochs=1", "hydra.run.dir=out"), cwd=folder)
    assert code == 0, text
    return folder / "out" / "checkpoints" / "best.ckpt"


def start(checkpoint, volume, out, *arguments):
    overrides = [f"ckpt={checkpoint}", f"data.input_path={volume.raw_path}", f"out={out}", "trainer=cpu", *arguments]
    return processes.started(
        [*COMMAND, *overrides], cwd=out.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def predict(*overrides):
    with start(*overrides) as process:
        out, errors = process.communicate(timeout=400)
    return process.returncode, out, errors


def test_predict_crop_from_the_command_line(checkpoint, volume, tmp_path):
    overrides = ["region=crop2", "writer.blend=gaussian", "patch.shape=[8,32,32]", "data.batch_size=4"]
    code, text, errors = predict(checkpoint, volume, tmp_path / "out.zarr", *overrides, "evaluate=true")
    assert code == 0, errors
    assert re.search(r"of \d+ blocks? done", text)
    assert re.search(r"voxels in \S+ s, [\d.,]+( million)? per second", text)
    assert "% of the voxels" in text
    assert "not the challenge's score; metric=csc gives that" in text
    assert "block/s" not in errors, "no progress bar without a terminal"
    box = read_multiscale(f"{volume.path}/recon-1/labels/groundtruth/crop2/mito").finest.lattice.box
    for name in ("mito", "er"):
        lattice = read_multiscale(tmp_path / "out.zarr" / name).finest.lattice
        assert (np.asarray(lattice.box.lower) <= np.asarray(box.lower) + 1e-6).all()
        assert (np.asarray(lattice.box.upper) >= np.asarray(box.upper) - 1e-6).all()
        assert zarr.open_array(str(tmp_path / "out.zarr" / name / "s0"), mode="r")[...].any()
    with (tmp_path / "out-scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["crop"], row["class"]) for row in rows} >= {("crop2", "mito"), ("crop2", "er")}
    assert (tmp_path / "out-scores.png").stat().st_size > 5000
    assert (tmp_path / "out.png").stat().st_size > 50_000
    code, text, errors = predict(checkpoint, volume, tmp_path / "out.zarr", *overrides, "writer.overlap=0.25")
    assert code == 1
    assert "overlap: [4, 16, 16] is there, now [6, 24, 24]" in errors
    assert "Traceback" not in errors


def test_scores_without_crops_are_refused_before_predicting(checkpoint, volume, tmp_path):
    shutil.copytree(volume.raw_path, tmp_path / "vol.zarr" / "em")
    raw = f"data.input_path={tmp_path}/vol.zarr/em"
    code, _, errors = predict(checkpoint, volume, tmp_path / "out.zarr", raw, "evaluate=true")
    assert code == 1
    assert "evaluate=true: there is no folder" in errors
    assert f"cellmap-evaluate prediction={tmp_path}/out.zarr truth=" in errors
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.slow
def test_raw_of_another_format(checkpoint, volume, tmp_path):
    """A TIFF stack with the voxels of a level of raw gives the prediction of an image of that level alone."""
    level = read_multiscale(volume.raw_path).finest
    voxels = zarr.open_array(f"{volume.raw_path}/{level.name}", mode="r")[:24, :64, :64]
    tifffile.imwrite(tmp_path / "raw.tif", voxels, compression="zlib", photometric="minisblack")
    size = list(level.scale)
    write_multiscale(tmp_path / "raw.zarr", voxels, scale=size, translation=[0, 0, 0])
    metadata = [f"metadata.voxel_size={size}".replace(" ", ""), "metadata.translation=[0,0,0]", "picture=false"]
    for name in ("tif", "zarr"):
        out = tmp_path / f"{name}.zarr"
        code, _, errors = predict(checkpoint, volume, out, f"data.input_path={tmp_path / 'raw'}.{name}", *metadata)
        assert code == 0, errors
    stored = [zarr.open_array(f"{tmp_path}/{name}.zarr/mito/s0", mode="r")[...] for name in ("tif", "zarr")]
    np.testing.assert_array_equal(*stored)
    assert stored[0].any()


@pytest.mark.slow
def test_prediction_resumes_after_ctrl_c(checkpoint, volume, tmp_path):
    overrides = ["writer.block_size_mb=0.01", "writer.chunks=[8,32,32]", "writer.overlap=0.5", "data.batch_size=1"]
    out = tmp_path / "out.zarr"
    with start(checkpoint, volume, out, *overrides) as process:
        deadline = time.monotonic() + 120
        while not list(out.glob(".cellmap-prediction/blocks-*")) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command continues from there" in errors
    assert "Traceback" not in errors
    code, text, errors = predict(checkpoint, volume, out, *overrides)
    assert code == 0, errors
    assert "of them by this run" in text
    lattice = read_multiscale(out / "mito").finest.lattice
    assert lattice.matches(next(m for m in read_multiscale(volume.raw_path).levels if m.lattice.step[1] == 8).lattice)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["ckpt=nowhere.ckpt"], "there is no such checkpoint"),
        (["ckpt=plain.ckpt"], "has no configuration ('cellmap_config')"),
        (["writer.blend=max"], "blend must be one of trim, average, gaussian, got 'max'"),
        (["data.batchsize=3"], "did you mean 'data.batch_size'?"),
        (["out=???"], "out is required: set it with out=..."),
        (["data=demo"], "the data are those of the checkpoint"),
        (["region=crop99"], "region=crop99: there is no crop of that name"),
        (["region={z: [0, 200], y: [0, 500], x: [0, 5000000]}"], "lies partly outside the volume"),
        (["region={z: [0, 200], y: [-500, -100], x: [0, 500]}"], "lies outside the volume"),
        (["patch.shape=[8,15,16]"], "15 is not a multiple of 2"),
        (["data.input_path=nowhere.zarr/em"], "nowhere.zarr/em"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_invalid_prediction_settings(checkpoint, volume, tmp_path, arguments, match):
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    overrides = [f"ckpt={checkpoint}", f"data.input_path={volume.raw_path}", "out=out.zarr", "trainer=cpu"]
    overrides = [g for g in overrides if g.split("=")[0] not in {a.split("=")[0] for a in arguments}]
    code, errors = run_forked(*overrides, *arguments, cwd=tmp_path, command="predict")
    assert code == 1
    assert match in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out.zarr").exists()


def test_tuned_thresholds_are_those_of_the_classes(checkpoint, volume, tmp_path):
    small_box = ["region={z: [0, 200], y: [0, 500], x: [0, 500]}", "writer.dtype=labels", "picture=false"]
    overrides = [f"ckpt={checkpoint}", f"data.input_path={volume.raw_path}", "trainer=cpu", *small_box]
    (tmp_path / "t.yaml").write_text("mito: {method: watershed, threshold: 0.52, min_volume: 1000.0}\n")

    def predicted(name, *arguments):
        code, text = run_forked(*overrides, f"out={name}", *arguments, cwd=tmp_path, command="predict")
        assert code == 0, text
        return [zarr.open_array(str(tmp_path / name / c / "s0"), mode="r")[...] for c in ("mito", "er")], text

    (mito, er), text = predicted("t.zarr", "tuned=t.yaml")
    assert "a prediction does not use method, min_volume" in text
    assert "threshold 0.52 of mito; 0.5 of er, which it does not have" in text
    values, _ = predicted("f.zarr", "writer.dtype=float32")
    np.testing.assert_array_equal(mito, values[0] >= np.float32(0.52))
    np.testing.assert_array_equal(er, values[1] >= np.float32(0.5))
    assert 0 < mito.mean() != (values[0] >= 0.5).mean()
    both, text = predicted("c.zarr", "tuned=t.yaml", "writer.threshold=0.45")
    assert "writer.threshold=0.45 replaces the thresholds of tuned=t.yaml" in text
    np.testing.assert_array_equal(both, np.stack(values) >= np.float32(0.45))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tuned=t.yaml: there is no such file"),
        (
            "mitos: {threshold: 0.5}\n",
            "tuned=t.yaml: a class must be one of mito, er, got 'mitos'; did you mean 'mito'?",
        ),
        ("mito: {tresholds: 0.5}\n", "did you mean 'threshold'?"),
        ("threshold: 0.5\n", "cellmap-tune writes a mapping of classes"),
    ],
)
def test_invalid_files_of_thresholds(checkpoint, volume, tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.yaml").write_text(content)
    overrides = [f"ckpt={checkpoint}", f"data.input_path={volume.raw_path}", "out=out.zarr", "tuned=t.yaml"]
    code, errors = run_forked(*overrides, "trainer=cpu", cwd=tmp_path, command="predict")
    assert code == 1
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out.zarr").exists()


def test_pickled_code_in_checkpoint_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    torch.save({"state_dict": Harmful()}, tmp_path / "harmful.ckpt")
    with pytest.raises(CellMapError, match="could run code"):
        saved_config(tmp_path / "harmful.ckpt")
    assert not (tmp_path / "harmed").exists()


def test_region_box(volume):
    box = {"z": [0, 1], "y": [0, 1], "x": [0, 1]}
    assert region_box(box, volume.raw_path) == box
    assert region_box(None, volume.raw_path) is None
