"""The scripts of `.ci` and the jobs that use them: what they install exists, and no test is skipped in all of them."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
JOBS = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
#: Modules whose distribution has another name.
DISTRIBUTIONS = {
    "bioimageio": "bioimageio.core",
    "ome_zarr_models": "ome-zarr-models",
    "cc3d": "connected-components-3d",
    "PIL": "pillow",
    "pytorch_lightning": "lightning",
}


def distributions(*extras):
    """Return the distributions of some extras, with those of the extras that they name."""
    found = set()
    for requirement in (Requirement(line) for extra in extras for line in EXTRAS[extra]):
        found |= distributions(*requirement.extras) if requirement.name == "cellmap-lightning" else {requirement.name}
    return found


def commands():
    return [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]


def test_jobs_install_extras_that_exist():
    named = [re.findall(r'-e "\.\[([\w,]+)\]"', command) for command in commands()]
    extras = {extra for found in named for group in found for extra in group.split(",")}
    assert extras == {"integrations", "test"}
    assert extras <= set(EXTRAS)


def test_jobs_run_files_that_exist():
    scripts = [command for command in commands() if command.startswith(".ci/")]
    assert len(scripts) == 3
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o111, script
    (folders,) = [command.split()[1:] for command in commands() if command.startswith("pytest tests/")]
    for folder in folders:
        assert list((ROOT / folder).glob("test_*.py")), folder


def test_newest_and_lowest_versions_are_tried():
    tried = {(entry["python"], entry["resolution"]) for entry in JOBS["versions"]["strategy"]["matrix"]["include"]}
    assert {("3.11", "lowest-direct"), ("3.14", "highest")} <= tried
    assert "3.14" in JOBS["tests"]["strategy"]["matrix"]["python"]


def test_every_optional_library_is_installed_by_a_job():
    installed = distributions("integrations", "test") | {"lightning"}
    named = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for module in re.findall(
            r'^\s[^"\']*importorskip\("(\w+)|^pytest.importorskip\("(\w+)', path.read_text(), re.MULTILINE
        ):
            named["".join(module)] = path.name
    assert {"kornia", "mlflow", "tensorstore", "cc3d"} <= set(named)
    for module, path in named.items():
        assert DISTRIBUTIONS.get(module, module) in installed, f"{module} ({path})"


def test_integrations_are_those_of_the_extra():
    listed = re.search(r"^libraries='(.*)'$", (ROOT / ".ci" / "integrations").read_text(), re.MULTILINE)[1].split("|")
    extra = distributions("integrations")
    assert {name for name in extra if name.startswith(tuple(listed))} == extra
    assert set(listed) <= {name.split(".")[0] for name in extra}


def totals(lines, of_lines, branches=3, of_branches=4):
    return {
        "covered_lines": lines, "num_statements": of_lines, "covered_branches": branches, "num_branches": of_branches
    }  # fmt: skip


@pytest.mark.parametrize(
    ("measured", "status", "text"),
    [
        (totals(90, 100), 0, "90.00 % of the lines (at least 90 %) and 75.00 % of the branches"),
        (totals(8999, 10000), 1, "89.99 %"),
        (totals(100, 100, 0, 0), 0, "0.00 % of the branches"),
        (totals(0, 0), 1, "0.00 % of the lines"),
    ],
)
def test_the_floor_of_lines(measured, status, text):
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "line_floor.py"],
        input=json.dumps({"totals": measured}), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert text in done.stdout
