import pytest

from cellmap_lightning.commands.resolvers import run_folder_name


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
