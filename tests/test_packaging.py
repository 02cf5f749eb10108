"""The wheel, installed without a checkout."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import cellmap_lightning

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_contents_of_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"cellmap_lightning/configs/{path.relative_to(ROOT / 'configs')}" in names
    for path in (ROOT / "cellmap_lightning").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    assert "cellmap_lightning/py.typed" in names
    assert not any(name.startswith(("tests/", "notebooks/", "benchmarks/")) for name in names)


@pytest.mark.slow
def test_the_wheel_works_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(command, check=True, timeout=120)
    # The unpacked wheel comes before the checkout.
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    code = (
        "import cellmap_lightning; print(cellmap_lightning.__file__)\n"
        "from cellmap_lightning.commands.train_command import main; main()"
    )
    command = [sys.executable, "-c", code, "experiment=fast_dev_run", "hydra.run.dir=out"]
    done = subprocess.run(command, cwd=empty, env=env, check=False, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert (empty / "demo_data" / "demo.csv").exists()


def test_one_version_and_lower_bounds_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    assert cellmap_lightning.__version__ in (ROOT / "CHANGELOG.md").read_text()
    everything = project["dependencies"] + [
        line for extra in project["optional-dependencies"].values() for line in extra
    ]
    assert all(">=" in line or line.startswith("cellmap-lightning") for line in everything)
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()
