"""The line about a training that ended at its time limit."""

from datetime import timedelta

import lightning as L
import pytest
from lightning.pytorch.callbacks import Timer

from cellmap_lightning.callbacks import LastCheckpoint
from cellmap_lightning.commands.time_limit import describe_time_limit
from tests.commands.test_cli import run_forked, small
from tests.runs import module, task, trainer

pytestmark = pytest.mark.usefixtures("quiet_lightning")


class Ends(L.Callback):
    """Lets the time of a training be over after some steps."""

    def __init__(self, timer, steps):
        self.timer, self.steps = timer, steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step + 1 == self.steps:
            self.timer._duration = 0.0


def line_after(volume, tmp_path, steps, timer=None, **kwargs):
    """Train epochs of three batches, at most three of them, until the limit is reached in a step."""
    timer = timer or Timer(timedelta(days=1))
    with module(volume) as data:
        given = {"max_epochs": 3, "limit_val_batches": 0, "callbacks": [Ends(timer, steps), timer]}
        run = trainer(tmp_path, **(given | kwargs))
        run.fit(task(), data)
    return describe_time_limit(run, tmp_path / "runs" / "mine")


@pytest.mark.parametrize(
    ("steps", "progress"),
    [
        (1, "1 step (0 of 3 epochs, and 1 of 3 batches of the next)"),
        (3, "3 steps (1 of 3 epochs)"),
        (5, "5 steps (1 of 3 epochs, and 2 of 3 batches of the next)"),
    ],
)
def test_steps_and_epochs_are_counted(volume, tmp_path, monkeypatch, steps, progress):
    monkeypatch.chdir(tmp_path)
    assert line_after(volume, tmp_path, steps) == (
        f"training ended at the time limit, trainer.max_time, after {progress}; to continue, repeat the command with "
        "run.name=mine resume=auto and a larger trainer.max_time, which counts the time until now too"
    )


@pytest.mark.parametrize(
    ("steps", "progress"), [(3, "(1 of 3 epochs)"), (5, "(1 of 3 epochs, and 2 of 3 batches of the next)")]
)
def test_a_limit_that_earlier_starts_have_used_up(volume, tmp_path, steps, progress):
    timer = Timer(timedelta(days=1))
    more = {"callbacks": [Ends(timer, steps), timer, LastCheckpoint(str(tmp_path))], "enable_checkpointing": True}
    assert progress in line_after(volume, tmp_path, steps, timer, **more)
    later = Timer(timedelta(seconds=0))
    with module(volume) as data:
        run = trainer(tmp_path, max_epochs=3, limit_val_batches=0, callbacks=[later])
        run.fit(task(), data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert f"after {steps} steps {progress};" in describe_time_limit(run, tmp_path)


def test_epochs_without_an_end(volume, tmp_path):
    assert "after 4 steps (1 epoch, and 1 of 3 batches of the next)" in line_after(volume, tmp_path, 4, max_epochs=-1)


@pytest.mark.parametrize(
    ("steps", "kwargs"),
    [(9, {}), (4, {"max_steps": 4}), (100, {})],
    ids=["in the last step of the last epoch", "in the last step", "never"],
)
def test_a_training_that_is_complete_has_no_such_line(volume, tmp_path, steps, kwargs):
    assert line_after(volume, tmp_path, steps, **kwargs) is None


def test_the_command_prints_it_once_and_when_it_is_resumed(volume, tmp_path):
    """A limit of no time ends a training before its first step, and so does a limit that an earlier run has used up."""
    given = small(volume, "hydra.run.dir=out", "trainer.max_time=00:00:00:00", "final_validation=false")
    for more in ([], ["resume=auto"]):
        code, text = run_forked(*given, *more, cwd=tmp_path)
        assert code == 0, text
        assert text.count("training ended at the time limit, trainer.max_time, after 0 steps (0 of 2 epochs)") == 1
        assert "repeat the command with hydra.run.dir=out resume=auto" in text
