"""An existing run folder is resumed or replaced only on request."""

import hashlib
import os
import shutil

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from cellmap_lightning.commands.finished_run import finished_text
from cellmap_lightning.commands.messages import Stopped
from cellmap_lightning.commands.resolvers import CONFIGS, register_resolvers
from cellmap_lightning.commands.run_folder import KeepRuns
from tests.commands.test_cli import run, run_forked, small


def files(folder):
    """Return the files below a folder with their contents."""
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in folder.rglob("*") if p.is_file()
    }  # fmt: skip


def epochs(folder, name="last"):
    return torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)["epoch"]


@pytest.fixture(scope="module")
def trained(volume, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    code, output = run_forked(*small(volume, "run.name=mine", "trainer.max_epochs=1"), cwd=folder)
    assert code == 0, output
    return folder / "runs" / "mine"


@pytest.fixture
def finished(trained, tmp_path):
    """A run of one epoch with the name ``mine``."""
    return shutil.copytree(trained, tmp_path / "runs" / "mine")


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["seed=5", "trainer.max_epochs=3"],
        ["resume={other}"],
        ["trainer.fast_dev_run=true"],
        ["+callbacks.mine._target_=lightning.Callback"],
    ],
    ids=["the same command", "other settings", "a checkpoint of another run", "fast_dev_run", "a new key"],
)
def test_finished_run_is_not_replaced(volume, tmp_path, finished, more):
    before = files(finished)
    other = tmp_path / "other.ckpt"
    other.write_bytes((finished / "checkpoints/last.ckpt").read_bytes())
    more = [argument.format(other=other) for argument in more]
    code, output = run_forked(*small(volume, "run.name=mine", *more), cwd=tmp_path)
    assert code == 1, output
    assert output == (
        "Error: runs/mine already holds a run (checkpoints/best.ckpt, checkpoints/last.ckpt, metrics.csv); resume=auto "
        "continues it, overwrite=true replaces it, and another run.name=... keeps it\n"
    )
    assert files(finished) == before


@pytest.mark.parametrize("more", [[], ["seed=5"], ["trainer.max_epochs=-1", "trainer.max_steps=3"]])
def test_a_finished_run_that_is_started_again_stays_as_it_is(volume, tmp_path, finished, more):
    results = [name for name in files(finished) if not name.startswith((".hydra", "train.log"))]
    before = files(finished)
    arguments = small(volume, "run.name=mine", "trainer.max_epochs=1", "resume=auto", *more)
    code, output = run_forked(*arguments, cwd=tmp_path)
    assert code == 0, output
    done, key = ("3 of 3 steps", "max_steps") if more[1:] else ("1 of 1 epoch", "max_epochs")
    assert f"already finished: {done}; to continue, raise trainer.{key}, with " in output
    after = files(finished)
    assert {name: after[name] for name in results} == {name: before[name] for name in results}
    assert "metrics.1.csv" not in after


@pytest.mark.parametrize("change", ["no scores", "older scores", "more epochs"])
def test_a_run_with_something_left_is_not_finished(finished, change):
    """The final validation of a run that was interrupted in it is left to do."""
    scores, last = finished / "scores.json", finished / "checkpoints/last.ckpt"
    cfg = OmegaConf.create({"trainer": {"max_epochs": 2 if change == "more epochs" else 1}})
    assert (finished_text(cfg, last, finished) is None) == (change == "more epochs")
    if change == "no scores":
        scores.unlink()
    elif change == "older scores":
        os.utime(scores, ns=(0, 0))
    assert finished_text(cfg, last, finished) is None


def test_finished_run_is_resumed(volume, tmp_path, finished):
    arguments = small(volume, "run.name=mine", "trainer.max_epochs=2")
    code, output = run_forked(*arguments, "resume=auto", cwd=tmp_path)
    assert code == 0, output
    assert epochs(finished) == 1
    assert (finished / "metrics.1.csv").exists()
    # By its name too, where it is a checkpoint of the run.
    code, output = run_forked(*arguments, f"resume={finished}/checkpoints/last.ckpt", cwd=tmp_path)
    assert code == 0, output
    assert torch.load(finished / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 1


def test_overwrite_replaces_finished_run(volume, tmp_path, finished):
    for name in ("recent", "preempted"):
        (finished / f"checkpoints/{name}.ckpt").write_bytes((finished / "checkpoints/last.ckpt").read_bytes())
    (finished / "notes.txt").write_text("mine")
    before = files(finished / "checkpoints")
    csv = tmp_path / "crops.csv"
    csv.write_text(f"train,{tmp_path}/nowhere.zarr/raw,{tmp_path}/nowhere.zarr/crop1/[mito]\n")
    arguments = [a for a in small(volume, "run.name=mine", "overwrite=true") if not a.startswith("data.csv_path")]
    code, output = run_forked(*arguments, f"data.csv_path={csv}", cwd=tmp_path)
    assert code == 1
    assert "nowhere.zarr" in output
    assert files(finished / "checkpoints") == before, "a run that cannot begin replaces nothing"
    code, output = run_forked(*small(volume, "run.name=mine", "overwrite=true"), cwd=tmp_path)
    assert code == 0, output
    assert epochs(finished) == 1
    assert sorted(p.stem for p in (finished / "checkpoints").iterdir()) == ["best", "last"]
    assert not list(finished.glob("metrics.*.csv"))
    assert (finished / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("failure", ["data.csv_path=nowhere.csv", "+data.batchsize=4"])
def test_run_that_failed_before_training_restarts(volume, tmp_path, failure):
    arguments = small(volume, "run.name=mine", "trainer.max_epochs=1")
    code, output = run_forked(
        *[a for a in arguments if a.split("=")[0] != failure.split("=")[0]], failure, cwd=tmp_path
    )
    assert code == 1, output
    code, output = run_forked(*arguments, cwd=tmp_path)
    assert code == 0, output


@pytest.mark.slow
def test_sweep_is_not_replaced(volume, tmp_path):
    arguments = ["-m", *small(volume, "trainer.max_epochs=1", "seed=1,2", "run.name=two", "final_validation=false")]
    code, output = run_forked(*arguments, cwd=tmp_path)
    assert code == 0, output
    before = files(tmp_path / "multirun" / "two")
    code, output = run_forked(*arguments, cwd=tmp_path)
    assert code == 1
    assert "Error: multirun/two already holds a run (0/checkpoints/best.ckpt, " in output
    assert files(tmp_path / "multirun" / "two") == before
    code, output = run_forked(*arguments, "resume=auto", cwd=tmp_path)
    assert code == 0, output


@pytest.mark.slow
def test_distributed_processes_share_the_run_folder(volume, tmp_path):
    """Further processes start with the same command while the first one is running."""
    arguments = small(
        volume, "run.name=both", "compare_untrained=true", "trainer.max_epochs=1", "trainer.strategy=ddp",
        "trainer.devices=2",
    )  # fmt: skip
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = run(*arguments, cwd=tmp_path)
    assert again.returncode == 1
    assert "runs/both already holds a run" in again.stderr


def check(folder, *overrides):
    """Run the check of Hydra's callback at the start of a run."""
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("train", overrides=[f"hydra.run.dir={folder}", *overrides], return_hydra_config=True)
    KeepRuns().on_run_start(config)


def test_requeued_slurm_job_resumes(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.csv").write_text("step\n1\n")
    check(tmp_path, "resume=auto")
    with pytest.raises(Stopped):
        check(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(Stopped):
        check(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").write_text("x")  # Lightning continues from it without being asked
    check(tmp_path)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["overwrite=true", "resume=auto"], "Error: overwrite=true and resume=auto exclude each other"),
        (["overwrite=yes please"], "Error: overwrite must be true or false, got 'yes please'"),
    ],
)
def test_invalid_overwrite(tmp_path, capsys, arguments, output):
    with pytest.raises(Stopped):
        check(tmp_path, *arguments)
    assert output in capsys.readouterr().err
