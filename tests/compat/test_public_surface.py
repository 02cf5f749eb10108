"""`cellmap_lightning.compat` has the public names of cellmap-data, but for those that docs/migration.md lists.

Opt-in: ``CELLMAP_DATA_PYTHON`` names a Python with cellmap-data.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compat.public_surface import surface

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("public_surface.py")
GUIDE = ROOT / "docs" / "migration.md"


def missing(theirs, ours):
    """Return what a surface lacks of another one, as lines."""
    lines = []
    for module, names in theirs.items():
        if module not in ours:
            lines.append(f"module {module}")
            continue
        for name, value in names.items():
            where = f"{module}.{name}".lstrip(".")
            mine = ours[module].get(name)
            if mine is None:
                lines.append(where)
                continue
            if "parameters" in value:
                lines += lacking(where, value["parameters"], mine.get("parameters", {}))
            for member, given in value.get("members", {}).items():
                if member not in mine.get("members", {}):
                    lines.append(f"{where}.{member}")
                elif given is not None and mine["members"][member] is not None:
                    lines += lacking(f"{where}.{member}", given, mine["members"][member])
    return shortest(lines)


def lacking(where, theirs, ours):
    """Return parameters that are missing or have another default."""
    lines = [f"{where}({name})" for name in theirs if name not in ours and name != "kwargs"]
    changed = {name: (default, ours[name]) for name, default in theirs.items() if default and name in ours}
    return lines + [f"{where}({n}={a}), here {b or 'no default'}" for n, (a, b) in changed.items() if a != b]


def shortest(lines):
    """Return lines once, by the name without the module, as classes are found in several modules."""
    found = {}
    for line in lines:
        key = re.sub(r"^(?:[a-z_]+\.)*(?=[A-Z])", "", line)
        found.setdefault(key, key)
    return sorted(found)


def documented():
    """Return the names in the table of what is missing."""
    text = GUIDE.read_text(encoding="utf-8").partition("## Not provided")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    return sorted(name for row in rows for name in re.findall(r"`([^`]+)`", row[0]))


def test_the_comparison_finds_what_is_missing():
    theirs = {
        "": {"A": {"members": {"__init__": {"x": "1", "y": ""}, "f": {"z": "2"}, "size": None}}},
        "utils": {"g": {"parameters": {"n": ""}}},
        "gone": {},
    }
    ours = {
        "": {"A": {"members": {"__init__": {"x": "3"}, "f": {"z": "2"}}}},
        "utils": {"g": {"parameters": {"n": ""}}},
    }
    assert missing(theirs, ours) == ["A.__init__(x=1), here 3", "A.__init__(y)", "A.size", "module gone"]
    assert missing(theirs, theirs) == []


@pytest.fixture(scope="module")
def own():
    return surface("cellmap_lightning.compat", inherited=True)[""]


@pytest.mark.parametrize(
    "name",
    [
        "ImageWriter.offset",
        "CellMapDataset.force_has_data",
        "CellMapMultiDataset.cumulative_sizes",
        "CellMapDataLoader.num_workers",
    ],
)
def test_attributes_are_found(own, name):
    cls, attribute = name.split(".")
    assert attribute in own[cls]["members"]


@pytest.mark.skipif("CELLMAP_DATA_PYTHON" not in os.environ, reason="CELLMAP_DATA_PYTHON names no Python with it")
def test_what_is_missing_is_documented():
    command = [os.environ["CELLMAP_DATA_PYTHON"], str(SCRIPT), "cellmap_data"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    theirs = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout
    own = subprocess.run(
        [sys.executable, str(SCRIPT), "cellmap_lightning.compat", "inherited"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True, timeout=300,
    ).stdout  # fmt: skip
    found = missing(json.loads(theirs), json.loads(own))
    print("\n".join(found))
    assert found == documented()
