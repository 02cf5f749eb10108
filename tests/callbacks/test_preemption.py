"""Jobs that are killed, terminated or requeued resume with the same samples."""

import json
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import hydra
import lightning as L
import pytest
import torch
from omegaconf import OmegaConf

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.checkpointing.checkpoint_config import START_KEY
from cellmap_lightning.commands.resolvers import CONFIGS, register_resolvers
from cellmap_lightning.training.checkpoints import saved_checkpoints
from tests import processes
from tests.commands.test_cli import COMMAND, small

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="these signals are not known here")

EPOCHS, BATCHES = 3, 6


class Journal(L.Callback):
    """A journal with a line for each finished step: its number and the positions of its samples.

    The step after number ``hold`` begins when there is a file ``go`` beside the journal.
    """

    def __init__(self, path, seconds=0.0, validation=0.0, hold=None):
        self.path, self.seconds, self.validation, self.hold = path, seconds, validation, hold

    def on_train_batch_start(self, run, pl_module, batch, batch_idx):
        time.sleep(self.seconds)
        while run.global_step == self.hold and not Path(self.path).with_name("go").exists():
            time.sleep(0.01)

    def on_train_batch_end(self, run, pl_module, outputs, batch, batch_idx):
        with Path(self.path).open("a") as file:
            file.write(json.dumps([run.global_step, run.current_epoch, batch["idx"].tolist()]) + "\n")

    def on_validation_batch_start(self, run, pl_module, batch, batch_idx, dataloader_idx=0):
        with Path(self.path).open("a") as file:
            file.write(json.dumps(["validation", run.current_epoch, batch_idx]) + "\n")
        time.sleep(self.validation)


def arguments(volume, folder, *more, seconds=0.05, validation=0.0):
    return small(
        volume,
        "run.name=mine",
        "resume=auto",
        f"trainer.max_epochs={EPOCHS}",
        f"data.batches_per_epoch={BATCHES}",
        "trainer.num_sanity_val_steps=0",
        "+callbacks.journal._target_=tests.callbacks.test_preemption.Journal",
        f"+callbacks.journal.path={folder / 'journal'}",
        f"+callbacks.journal.seconds={seconds}",
        f"+callbacks.journal.validation={validation}",
        *more,
    )


@pytest.fixture
def expected(volume, tmp_path):
    """The positions of the samples of each step, computed from the data alone."""
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("train", overrides=arguments(volume, tmp_path))
    settings = OmegaConf.to_container(cfg.data, resolve=True)
    settings.pop("_target_")
    with CellMapDataModule(**settings) as data:
        data.setup("fit")
        loader = data.train_dataloader()
        return [(epoch, batch["idx"].tolist()) for epoch in range(EPOCHS) for batch in loader]


class Job:
    """A running command."""

    def __init__(self, *arguments, cwd, **env):
        self.journal = cwd / "journal"
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [COMMAND, *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env},
        )  # fmt: skip

    def until(self, line, seconds=120):
        """Wait for a line of the journal."""
        end = time.monotonic() + seconds
        while not any(line(entry) for entry in read(self.journal)):
            assert self.process.poll() is None, self.process.communicate()[1][-3000:]
            assert time.monotonic() < end
            time.sleep(0.01)

    def end(self, signal_=None, seconds=240):
        """Return the exit status and what was printed."""
        if signal_ is not None:
            self.process.send_signal(signal_)
        try:
            out, err = self.process.communicate(timeout=seconds)
        finally:
            processes.end(self.process)
        return self.process.returncode, out + err


def read(journal):
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def check(journal, expected):
    """Check that every step was done with the samples of an uninterrupted run."""
    steps = [entry for entry in read(journal) if entry[0] != "validation"]
    assert {step for step, _, _ in steps} == set(range(1, EPOCHS * BATCHES + 1))
    for step, epoch, positions in steps:
        assert (epoch, positions) == expected[step - 1], step
    return [step for step, _, _ in steps]


@pytest.mark.slow
def test_sigterm_in_the_middle_of_an_epoch(volume, tmp_path, expected):
    job = Job(*arguments(volume, tmp_path, "data.num_workers=1", "+callbacks.journal.hold=8"), cwd=tmp_path)
    job.until(lambda entry: entry[0] == 8)
    job.process.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    code, output = job.end()
    assert code == 143, output
    preempted = tmp_path / "runs/mine/checkpoints/preempted.ckpt"
    assert f"terminated; saved {preempted}; the same command with run.name=mine resume=auto continues from it" in output
    stopped = read(tmp_path / "journal")[-1][0]
    code, output = Job(*arguments(volume, tmp_path, seconds=0), cwd=tmp_path).end()
    assert code == 0, output
    assert f"resume=auto: {preempted}" in output
    steps = check(tmp_path / "journal", expected)
    assert steps == list(range(1, EPOCHS * BATCHES + 1))  # none twice
    assert stopped in (8, 9), "no step begins after the signal"
    assert (tmp_path / "runs/mine/metrics.1.csv").exists()


@pytest.mark.slow
def test_sigterm_during_validation(volume, tmp_path, expected):
    job = Job(*arguments(volume, tmp_path, seconds=0, validation=1), cwd=tmp_path)
    job.until(lambda entry: entry[:2] == ["validation", 1])
    code, output = job.end(signal.SIGTERM)
    assert code == 143, output
    code, output = Job(*arguments(volume, tmp_path, seconds=0), cwd=tmp_path).end()
    assert code == 0, output
    assert check(tmp_path / "journal", expected) == list(range(1, EPOCHS * BATCHES + 1))


@pytest.mark.slow
def test_sigkill_at_any_step(volume, tmp_path, expected):
    """kill -9, twice: what was done since the last checkpoint is done again, with the same samples."""
    often = ["callbacks.recent.train_time_interval=null", "+callbacks.recent.every_n_train_steps=2"]
    for step in (5, 11):
        job = Job(*arguments(volume, tmp_path, *often, f"+callbacks.journal.hold={step}"), cwd=tmp_path)
        job.until(lambda entry, step=step: entry[0] == step)
        assert job.end(signal.SIGKILL)[0] == -signal.SIGKILL
    code, output = Job(*arguments(volume, tmp_path, *often, seconds=0), cwd=tmp_path).end()
    assert code == 0, output
    steps = check(tmp_path / "journal", expected)
    assert len(steps) <= EPOCHS * BATCHES + 2 * 3


@pytest.mark.slow
def test_requeue_by_slurm(volume, tmp_path, expected):
    """SIGUSR1 comes some time before the end of a job: Lightning saves, and has Slurm requeue it.

    Slurm itself is not here: its command is a script that notes how it was called.
    """
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    slurm = {
        "SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
        "PATH": os.pathsep.join([str(scontrol.parent), os.environ["PATH"]]),
    }  # fmt: skip
    unnamed = [a for a in arguments(volume, tmp_path) if a != "run.name=mine"]
    job = Job(*unnamed, "+callbacks.journal.hold=8", cwd=tmp_path, **slurm)
    job.until(lambda entry: entry[0] == 8)
    job.process.send_signal(signal.SIGUSR1)
    folder = tmp_path / "runs/slurm-77"
    end = time.monotonic() + 120
    while not (tmp_path / "scontrol").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
    assert list(folder.glob("hpc_ckpt_*.ckpt"))
    job.end(signal.SIGKILL)  # the job's time is over
    before = len(read(tmp_path / "journal"))
    code, output = Job(*[a.replace("seconds=0.05", "seconds=0") for a in unnamed], cwd=tmp_path, **slurm).end()
    assert code == 0, output
    assert f"resume=auto: {folder / 'hpc_ckpt_1.ckpt'}" in output
    check(tmp_path / "journal", expected)
    assert read(tmp_path / "journal")[before][0] <= before + 1


def test_newest_readable_checkpoint_is_selected(tmp_path, caplog):
    """By the progress of the training: copies of a folder have other times of modification."""

    def newest():
        return saved_checkpoints(tmp_path)[-1].path

    assert saved_checkpoints(tmp_path) == []
    whole = {"state_dict": {}, "loops": {}, "optimizer_states": []}
    (tmp_path / "checkpoints").mkdir()
    paths = {n: tmp_path / "checkpoints" / f"{n}.ckpt" for n in ("best", "last", "same", "torn", "weights", "resumed")}
    for number, (name, step) in enumerate({"last": 9, "same": 9, "best": 6, "torn": 20, "weights": 20}.items()):
        torch.save({"state_dict": {}} if name == "weights" else whole | {"global_step": step}, paths[name])
        if name == "torn":
            paths[name].write_bytes(paths[name].read_bytes()[:100])
        os.utime(paths[name], (number + 1, number + 1))
    assert newest() == paths["same"]
    assert "torn.ckpt cannot be read and is skipped" in caplog.text
    os.utime(paths["last"], (9, 9))
    assert newest() == paths["last"]
    # A run that was resumed from an earlier step is newer than what had been reached before.
    torch.save(whole | {"global_step": 7, START_KEY: 2}, paths["resumed"])
    os.utime(paths["resumed"], (1, 1))
    assert newest() == paths["resumed"]


def test_resume_from_missing_checkpoint(volume, tmp_path):
    from tests.commands.test_cli import run_forked

    (tmp_path / "there.ckpt").write_text("x")
    code, output = run_forked(*small(volume, f"resume={tmp_path / 'here.ckpt'}"), cwd=tmp_path)
    assert code == 1
    assert "here.ckpt: there is no such checkpoint (did you mean 'there.ckpt'?); checkpoints beside it:" in output
    assert "there.ckpt; resume=auto takes the newest of the run's folder" in output


def test_torchrun_without_id_needs_run_name(volume, tmp_path, monkeypatch):
    from tests.commands.test_cli import run_forked

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    code, output = run_forked(*small(volume), cwd=tmp_path)
    assert code == 1
    assert "torchrun starts several processes, which would create a folder each; give it with run.name=..." in output


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
def test_sigkill_in_validations_of_consecutive_epochs(volume, tmp_path, expected, first):
    """With a checkpoint of the last step of each epoch; none is trained twice."""
    often = ["callbacks.recent.train_time_interval=null", "+callbacks.recent.every_n_train_steps=2"]
    for epoch in range(first, 2):
        job = Job(*arguments(volume, tmp_path, *often, validation=5), cwd=tmp_path)
        job.until(lambda entry, epoch=epoch: entry[:2] == ["validation", epoch])
        job.end(signal.SIGKILL)
    code, output = Job(*arguments(volume, tmp_path, *often, seconds=0), cwd=tmp_path).end()
    assert code == 0, output
    check(tmp_path / "journal", expected)
