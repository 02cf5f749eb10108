"""Hints after Hydra's errors: the keys that were probably meant, of the user's own files too."""

import pytest

from cellmap_lightning.commands.override_hints import override_hints
from tests.commands.test_cli import run_forked

FILES = {
    "task/mine.yaml": "_target_: own_hints.Task\nnetwork: ${model}\nlr: 0.001\n",
    "task/derived.yaml": "defaults: [mine]\ndecay: 0.1\n",
    "callbacks/mine.yaml": "defaults: [default]\ngrad:\n  _target_: own_hints.Gradients\n  every: 10\n",
    "experiment/mine.yaml": "# @package _global_\ndefaults:\n  - override /task: mine\n  - override /callbacks: mine\n",
}
MODULE = """
class Task:
    def __init__(self, network, lr=0.001, warmup_steps=10):
        pass


class Gradients:
    def __init__(self, every=10):
        pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Change to a folder with the files of a user, ``my_configs`` and ``own_hints.py``."""
    for name, text in FILES.items():
        (tmp_path / "my_configs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my_configs" / name).write_text(text)
    (tmp_path / "own_hints.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return tmp_path


@pytest.mark.parametrize("given", [["--config-dir", "my_configs"], ["--config-dir=my_configs"], ["-cd", "my_configs"]])
@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["task=mine", "task.lrr=3"], "task.lr"),
        (["task=derived", "task.dekay=3"], "task.decay"),
        (["task=mine", "task.warmup_step=3"], "task.warmup_steps"),  # an argument that no file sets
        (["callbacks=mine", "callbacks.grad.evry=3"], "callbacks.grad.every"),
        (["experiment=mine", "task.lrr=3"], "task.lr"),
        (["experiment=mine", "callbacks.grad.evry=3"], "callbacks.grad.every"),
        (["experiment=mine", "trainer.max_epoch=4"], "trainer.max_epochs"),
    ],
)
def test_keys_of_the_files_of_the_user(own, given, arguments, key):
    (hint,) = override_hints("train", [*given, *arguments])
    assert hint.endswith(f"; did you mean {key!r}?")


def test_arguments_of_a_shipped_class(own):
    (hint,) = override_hints("train", ["--config-dir", "my_configs", "task.dice_wieght=1"])
    assert "did you mean 'task.dice_weight'?" in hint


@pytest.mark.parametrize(
    "arguments",
    [["--config-dir", "nowhere", "data.batchsize=4"], ["data.batchsize=4"], ["data.batchsize=4", "--config-dir"]],
)
def test_a_folder_that_is_not_there_hides_no_hint(own, arguments):
    assert override_hints("train", arguments) == ["There is no 'data.batchsize'; did you mean 'data.batch_size'?"]


def test_a_class_that_cannot_be_imported_hides_no_hint(own):
    (own / "my_configs/task/mine.yaml").write_text("_target_: not_there.Task\nlr: 0.001\n")
    (hint,) = override_hints("train", ["--config-dir", "my_configs", "task=mine", "task.lrr=3"])
    assert "did you mean 'task.lr'?" in hint


def test_the_command_prints_it(own):
    code, text = run_forked(
        "--config-dir", "my_configs", "experiment=mine", "callbacks.grad.evry=3", "data.csv_path=x.csv", cwd=own
    )
    assert code == 1
    assert "did you mean 'callbacks.grad.every'?" in text
