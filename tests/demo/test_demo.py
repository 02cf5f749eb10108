"""The demo experiment from end to end; its parts are tested in `test_cli`."""

import re

import pytest

from tests.commands.test_cli import run


@pytest.mark.slow
def test_demo_learns(tmp_path):
    done = run("experiment=demo", "hydra.run.dir=out", cwd=tmp_path, timeout=600, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(\w+) +([\d. nan]+)$", done.stdout, re.MULTILINE))
    assert set(rows) == {"mito", "er", "pm", "mean"}
    trained, untrained, constant = map(float, rows["mean"].split())
    assert trained > 0.7
    assert max(untrained, constant) < 0.35
