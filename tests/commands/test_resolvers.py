import pytest
from omegaconf import OmegaConf

from cellmap_lightning.commands.resolvers import register_resolvers, run_folder_name


@pytest.mark.parametrize(
    ("env", "name", "folder"),
    [
        ({}, "mine", "mine"),
        ({"SLURM_JOB_ID": "12"}, None, "slurm-12"),
        ({"SLURM_JOB_ID": "12"}, "mine", "mine"),
        ({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}, None, "slurm-9_3"),
        ({"TORCHELASTIC_RUN_ID": "abc"}, None, "torchrun-abc"),
    ],
)
def test_run_folder_name(monkeypatch, env, name, folder):
    for key in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    assert run_folder_name(name) == folder


@pytest.mark.parametrize(
    ("name", "channels"),
    [(None, 4), ("a", 4), ("b", 20), ("c", 3), (["c", "a"], 7), (["a", "b", "c"], 27)],
)
def test_channels_are_those_of_the_targets(name, channels):
    register_resolvers()
    patch = {"shape": [8, 8, 8], "scale": [8, 8, 8]}
    targets = {
        "a": {**patch, "kind": "affinities", "offsets": [[1, 0, 0], [0, 1, 0]]},
        "b": {**patch, "kind": "lsd", "sigma": 10},
        "c": {**patch, "kind": "labels"},
    }
    config = {"targets": targets, "classes": ["x", "y"], "name": name, "n": "${channels:${targets},${classes},${name}}"}
    assert OmegaConf.create(config).n == channels
