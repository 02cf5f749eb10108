"""The errors about missing extras name an extra that exists, in the form that works in a clone."""

import re
import tomllib
from pathlib import Path

import pytest

from cellmap_lightning.errors import CellMapError, install_command, missing_extra

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TEXTS = [
    path
    for folder in ("cellmap_lightning", "configs", "docs", "benchmarks", "notebooks", ".github")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".yaml", ".yml", ".ipynb")
] + sorted(ROOT.glob("*.md"))


def test_message_of_a_missing_extra():
    error = missing_extra("targets", "surface distances need scipy", "set metric=voxels")
    assert isinstance(error, CellMapError)
    assert isinstance(error, ImportError)
    assert str(error) == (
        "surface distances need scipy, which is not installed; in a clone: "
        'pip install -e ".[targets]", or set metric=voxels'
    )
    assert str(missing_extra("fast", "it needs TensorStore")).endswith(install_command("fast"))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_extras_in_texts(path):
    text = path.read_text(encoding="utf-8").replace("\\", "")
    assert "cellmap-lightning[" not in text, "the package is on no index: errors.install_command has the form"
    named = re.findall(r'pip install[^\n]*?-e "?\.\[([\w,-]+)\]', text)
    named += re.findall(r'(?:missing_extra|install_command)\(\s*["\'](\w+)["\']', text)
    assert {name for names in named for name in names.split(",")} <= set(EXTRAS)
