"""Runs the tests of a release of cellmap-data against `cellmap_lightning.compat`, changed in their imports alone."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLUGIN = Path(__file__).with_name("upstream_plugin.py")
#: A private name that a file imports: without it, only the tests that use it fail.
PRIVATE = re.compile(r"^from (cellmap_lightning\.compat[\w.]*) import (_\w+)$", re.MULTILINE)


def prepare(source: str | Path, revision: str, folder: Path) -> None:
    """Copy the tests of a release to a folder, with the imports changed.

    Args:
        source: a repository of cellmap-data, which may be bare.
        revision: tag or commit.
        folder: the folder.
    """
    command = ["git", "-C", str(source), "archive", revision, "tests"]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    for path in (folder / "tests").rglob("*.py"):
        text = re.sub(r"\bcellmap_data\b", "cellmap_lightning.compat", path.read_text(encoding="utf-8"))
        text = PRIVATE.sub(r"import \1 as _module\n\2 = getattr(_module, '\2', None)", text)
        path.write_text(text, encoding="utf-8")
    shutil.copy(PLUGIN, folder / "libraries.py")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")


def run(folder: Path, *arguments: str) -> dict[str, tuple[str, str]]:
    """Run prepared tests, and return ``{test: (outcome, message)}``.

    The environment variable ``CELLMAP_DATA_SITE`` names folders with torchvision and tensorstore, where they are not
    installed.
    """
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("CELLMAP_DATA_SITE", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "libraries", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "--continue-on-collection-errors", "--tb=line", *arguments, "tests"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    outcomes = folder / "outcomes.json"
    assert outcomes.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(outcomes.read_text(encoding="utf-8"))
    return {name.removeprefix("tests/"): (outcome, text) for name, (outcome, text) in found.items()}
