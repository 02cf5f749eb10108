"""The code blocks of README.md and docs/: Python is run, commands and configurations are composed, tables are read.

A block that cannot run here has a line ``<!-- not run: <reason> -->`` before it, and is parsed only. Python blocks of a
page run one after the other in one namespace, in a folder with the demo's volume as ``demo_data/demo.zarr``,
``jrc_a.zarr`` and ``jrc_b.zarr``. A block that begins with the name of a file, ``# my_package/models.py``, is that file
for all commands and blocks. YAML blocks are composed as experiments if their keys are those of a training, and as
an entry of ``data.target_arrays`` otherwise.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cellmap_lightning.splits.entries import read_csv
from tests.command_lines import composed, shell_commands

ROOT = Path(__file__).parents[1]
#: docs/configuration.md is written from configs/, and tested there.
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.name != "configuration.md")]
LANGUAGES = {"python", "bash", "yaml", "csv", "toml", ""}
#: Programs in shell blocks beside cellmap-*.
PROGRAMS = {"cat", "csc", "docker", "echo", "export", "git", "pip", "pytest", "python", "srun"}
KEYS = {"data", "patch", "task", "model", "trainer", "callbacks", "logger", "name", "defaults", "run", "seed"}
REQUIRED = {"csv_path": "crops.csv", "classes": ["mito", "er"]}
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)

#: The name of a block that is a file of the user.
FILE = re.compile(r"(?:# @package \S+\n)?# (?P<path>my_\w+/[\w/]+\.(?:py|yaml))\n")


def blocks(language):
    """Yield a parameter (reason, code) for each block of a language, with its page and line as the name."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match["language"] == language:
                line = text.count("\n", 0, match.start("code"))
                yield pytest.param(match["reason"], match["code"], id=f"{page.relative_to(ROOT)}:{line}")


@pytest.fixture(scope="module")
def folder(volume, tmp_path_factory):
    """The working directory of a reader: the volume, and the README's CSV and experiment."""
    path = tmp_path_factory.mktemp("docs")
    (path / "demo_data").mkdir()
    for name in ("demo_data/demo.zarr", "jrc_a.zarr", "jrc_b.zarr"):
        (path / name).symlink_to(volume.path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (experiment := path / "my_configs" / "experiment").mkdir(parents=True)
    code = {match["language"]: match["code"] for match in FENCE.finditer(readme)}
    (experiment / "mito.yaml").write_text(code["yaml"], encoding="utf-8")
    (path / "crops.csv").write_text(code["csv"], encoding="utf-8")
    for page in PAGES:
        for match in FENCE.finditer(page.read_text(encoding="utf-8")):
            if (name := FILE.match(match["code"])) is not None:
                (file := path / name["path"]).parent.mkdir(parents=True, exist_ok=True)
                assert not file.exists(), f"{file} is in the docs twice"
                file.write_text(match["code"], encoding="utf-8")
    shutil.copy(ROOT / "cellmap_lightning" / "transforms" / "classes.csv", path / "tested_classes.csv")
    return path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_languages_of_blocks(page):
    text = page.read_text(encoding="utf-8")
    assert {match["language"] for match in FENCE.finditer(text)} <= LANGUAGES
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(FENCE.findall(text))
    assert text.count("<!-- not run:") == sum(match["reason"] is not None for match in FENCE.finditer(text))


def programs():
    """Yield a parameter for each page with Python blocks: its blocks that run, in their order."""
    for page in PAGES[1:]:  # tests/test_readme.py runs the README's
        found = [m for m in FENCE.finditer(page.read_text(encoding="utf-8")) if m["language"] == "python"]
        code = "\n".join(m["code"] for m in found if m["reason"] is None)
        if code:
            yield pytest.param(code, id=str(page.relative_to(ROOT)))


@pytest.mark.parametrize("code", [*programs()])
def test_python_runs(code, folder, tmp_path):
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    (tmp_path / "program.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:cellmap_lightning", "program.py"], cwd=tmp_path, check=False,
        capture_output=True, text=True, timeout=590,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("reason", "code"), [*blocks("python")])
def test_python_compiles(reason, code):
    compile(code, "<docs>", "exec")


@pytest.mark.parametrize(("reason", "code"), [*blocks("bash")])
def test_commands_compose(reason, code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    commands = shell_commands(code)
    assert commands
    for command in commands:
        if command[0].startswith("cellmap-"):
            assert (ROOT / "cellmap_lightning" / "commands" / f"{command[0][8:]}_command.py").exists()
            if reason is None:
                composed(command, folder)
        else:
            assert command[0] in PROGRAMS, f"{command[0]} is no program of tests/test_docs.py"
            for word in command[1:]:
                assert not word.endswith(".py") or (ROOT / word).exists() or reason, word


@pytest.mark.parametrize(("reason", "code"), [*blocks("yaml")])
def test_configurations_compose(reason, code, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    content = yaml.safe_load(code)
    assert isinstance(content, dict)
    name = FILE.match(code)
    if reason is not None or (name is not None and not name["path"].startswith("my_configs/experiment/")):
        return  # commands of the page compose an option of a group
    if not set(content) & KEYS:
        content, code = {}, yaml.safe_dump({"data": {"target_arrays": content}})
    missing = {k: v for k, v in REQUIRED.items() if k not in (content.get("data") or {})}
    header = "" if code.startswith("# @package") else "# @package _global_\n"
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "block.yaml").write_text(header + code, encoding="utf-8")
    values = [f"data.{key}={str(value).replace(' ', '')}" for key, value in missing.items()]
    composed(["cellmap-train", "--config-dir", str(tmp_path / "mine"), "experiment=block", *values], tmp_path)


@pytest.mark.parametrize(("reason", "code"), [*blocks("csv")])
def test_tables_are_read(reason, code, tmp_path):
    (tmp_path / "crops.csv").write_text(code, encoding="utf-8")
    assert read_csv(tmp_path / "crops.csv")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_exist(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s#]+)", text):
        assert target.startswith(("https://", "http://")) or (page.parent / target).exists(), target
