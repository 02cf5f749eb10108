"""Ctrl-C and SIGTERM in every phase: exit status, advice, and checkpoints only in training."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import lightning as L
import pytest

from cellmap_lightning.training.task import SegmentationTask
from tests.commands.test_cli import COMMAND, run_forked, small
from tests.commands.test_predict_command import COMMAND as PREDICT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="these signals are not known here")


def hold(trainer=None):
    """Wait for a signal; a Trainer in its loop handles it after the batch."""
    print("reached", flush=True)
    end = time.monotonic() + 300
    while time.monotonic() < end and not (trainer is not None and trainer.received_sigterm):
        time.sleep(0.01)


class Phases(L.Callback):
    """Waits for a signal when a phase of a training is reached."""

    def __init__(self, phase):
        self.phase, self.fitted, self.reached = phase, False, False

    def at(self, phase, trainer):
        if phase == self.phase and not self.reached:
            self.reached = True
            hold(trainer)

    def setup(self, trainer, pl_module, stage):
        self.at("setup", trainer)

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 4:
            self.at("fit", trainer)

    def on_train_end(self, *_):
        self.fitted = True

    def on_validation_batch_start(self, trainer, *_):
        if trainer.state.fn == "validate":
            self.at("final validation" if self.fitted else "compare_untrained", trainer)
        else:
            self.at("sanity check" if trainer.sanity_checking else "validation in fit", trainer)


class Drawn(SegmentationTask):
    """A task that draws its pictures itself."""

    def write_samples(self, *_, **__):
        hold()


def started(command, cwd):
    """Start a command; return its process, its lines on stderr and the thread that reads them."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    errors = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr))
    reader.start()
    return process, errors, reader


def ended(process, errors, reader, number):
    """Send a signal to a command; return its exit status and stderr."""
    process.send_signal(number)
    try:
        process.wait(timeout=300)
    finally:
        process.kill()
        reader.join()
        process.stdout.close()
        process.stderr.close()
    return process.returncode, "".join(errors)


SIGNALS = {"interrupted": (signal.SIGINT, 130), "terminated": (signal.SIGTERM, 143)}
ALWAYS = {("compare_untrained", "terminated"), ("final validation", "interrupted")}
PHASES = {
    "setup": ("no checkpoint was saved yet; the same command starts again", []),
    "compare_untrained": ("no checkpoint was saved yet; the same command starts again", []),
    "sanity check": ("no checkpoint was saved yet; the same command with overwrite=true starts again", []),
    "fit": ("the same command with run.name=mine resume=auto continues from", ["best", "last"]),
    "validation in fit": ("no checkpoint was saved yet; the same command with overwrite=true starts again", []),
    "final validation": ("the training is complete (", ["best", "last"]),
    "drawing": ("the training is complete (", ["best", "last"]),
}


@pytest.mark.parametrize(
    ("phase", "word"),
    [
        pytest.param(phase, word, marks=[] if (phase, word) in ALWAYS else pytest.mark.slow)
        for phase in PHASES
        for word in SIGNALS
    ],
)
def test_signals_in_every_phase_of_training(volume, tmp_path, phase, word):
    number, status = SIGNALS[word]
    arguments = small(
        volume, "run.name=mine", "compare_untrained=true", f"+callbacks.phases.phase={phase}",
        "+callbacks.phases._target_=tests.commands.test_signals.Phases",
    )  # fmt: skip
    if phase == "drawing":
        arguments.append("task._target_=tests.commands.test_signals.Drawn")
    process, *reading = started([COMMAND, *arguments], tmp_path)
    lines = iter(process.stdout)
    assert "reached\n" in lines, reading
    code, errors = ended(process, *reading, number)
    assert code == status, errors
    advice, names = PHASES[phase]
    if word == "terminated" and phase in ("fit", "validation in fit"):
        names = [*names, "preempted"]
        advice = f"saved {tmp_path}/runs/mine/checkpoints/preempted.ckpt; the same command with run.name=mine resume="
    last = errors.splitlines()[-1]
    assert last.startswith(f"{word}; {advice}"), errors
    assert "Traceback" not in errors
    checkpoints = tmp_path / "runs/mine/checkpoints"
    assert sorted(p.stem for p in checkpoints.glob("*.ckpt")) == sorted(names)
    if phase in ("final validation", "drawing"):  # what is left is done, and nothing is trained again
        before = (checkpoints / "last.ckpt").read_bytes()
        code, output = run_forked(*small(volume, "run.name=mine", "resume=auto"), cwd=tmp_path)
        assert code == 0, output
        assert "results in" in output
        assert (checkpoints / "last.ckpt").read_bytes() == before


@pytest.fixture(scope="module")
def checkpoint(volume, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    code, output = run_forked(*small(volume, "trainer.max_epochs=1", "hydra.run.dir=out"), cwd=folder)
    assert code == 0, output
    return folder / "out" / "checkpoints" / "best.ckpt"


@pytest.mark.parametrize("word", [pytest.param("interrupted", marks=pytest.mark.slow), "terminated"])
def test_signals_in_prediction(checkpoint, volume, tmp_path, word):
    number, status = SIGNALS[word]
    arguments = [
        f"ckpt={checkpoint}", f"data.input_path={volume.raw_path}", f"out={tmp_path / 'out.zarr'}", "trainer=cpu",
        "writer.block_size_mb=0.01", "writer.chunks=[8,16,16]", "writer.overlap=0.75", "data.batch_size=1",
    ]  # fmt: skip
    process, *reading = started([*PREDICT, *arguments], tmp_path)
    end = time.monotonic() + 300
    while not any((tmp_path / "out.zarr").glob("*/s0/[0-9]*")):  # the first chunk
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    code, errors = ended(process, *reading, number)
    assert code == status, errors
    last = errors.splitlines()[-1]
    assert last.startswith(f"{word}; ")
    assert last.endswith("the same command continues from there")
    assert "Traceback" not in errors
