"""The tests of cellmap-data itself, run against `cellmap_lightning.compat`: those that fail are listed with a reason.

Opt-in: ``CELLMAP_DATA_SOURCE`` names a repository of cellmap-data with its tags; see `upstream_suite`.
"""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.compat.upstream_suite import prepare, run

GUIDE = Path(__file__).parents[2] / "docs" / "migration.md"
RELEASES = {"2026.3": "2026.3.20.1935", "2025.12": "2025.12.24.539"}
#: The first words of a reason.
KINDS = ("difference", "private name", "gone")


def table():
    """Return the rows about the tests of cellmap-data: reason, tests, and release with kind."""
    text = GUIDE.read_text(encoding="utf-8").partition("## The tests of cellmap-data\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0] != "what" and set(row[0]) != {"-"}]


def documented(release):
    """Return ``{test: kind}`` of a release."""
    found = {}
    for _, tests, reason, _ in table():
        version, _, kind = reason.partition(": ")
        if version == release:
            for test in re.findall(r"`([^`]+)`", tests):
                assert test not in found, f"{test} is listed twice"
                found[test] = kind.partition(",")[0]
    return found


def total(release):
    """Return the numbers in the row of a release."""
    cells = next(row for row in table() if row[0] == f"cellmap-data {RELEASES[release]}")
    return [int(n) for n in re.findall(r"\d+", cells[1] + cells[2])]


def by_short_name(outcomes):
    """Return outcomes by file and test, with the class where several have a test of that name."""
    short = {name: re.sub(r"::Test\w+::", "::", name) for name in outcomes}
    count = Counter(short.values())
    return {name if count[short[name]] > 1 else short[name]: found for name, found in outcomes.items()}


@pytest.mark.parametrize("release", RELEASES)
def test_every_listed_test_has_a_kind_and_a_row_that_explains_it(release):
    explained = {line.strip("|").split("|")[0].strip() for line in GUIDE.read_text(encoding="utf-8").splitlines()}
    for what, _, reason, _ in table():
        version, _, kind = reason.partition(": ")
        if version not in RELEASES:
            assert what in {f"cellmap-data {tag}" for tag in RELEASES.values()}
            continue
        assert kind.partition(",")[0] in KINDS, reason
        if kind.startswith("difference"):
            row = re.fullmatch(r"difference, see (.+)", kind)
            assert row is not None, reason
            assert row[1] in explained, f"no row {row[1]!r}"
    kinds = Counter(documented(release).values())
    tests, passed, *failed = total(release)
    assert tests - passed == sum(failed) == sum(kinds.values())
    assert failed == [kinds[kind] for kind in KINDS if kinds[kind]]


def test_a_copy_differs_in_its_imports_alone(tmp_path):
    repository = tmp_path / "repository"
    (repository / "tests").mkdir(parents=True)
    text = (
        "from cellmap_data.a import _private\nfrom cellmap_data import compat\nimport json\n\n\n"
        "def test_one():\n    assert compat\n\n\ndef test_two():\n    assert _private is None\n\n\n"
        "def test_three():\n    assert json.loads('1') == 2\n"
    )
    (repository / "tests" / "test_it.py").write_text(text)
    (repository / "tests" / "test_broken.py").write_text("import nothing_of_this_name\n")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"], ["tag", "1.0"]):
        subprocess.run([*git, *command], check=True)
    prepare(repository, "1.0", tmp_path / "copy")
    copied = (tmp_path / "copy" / "tests" / "test_it.py").read_text()
    assert "from cellmap_lightning.compat import compat" in copied
    assert "_private = getattr(_module, '_private', None)" in copied
    assert copied.partition("def test_one")[2] == text.partition("def test_one")[2]


@pytest.mark.slow
@pytest.mark.skipif("CELLMAP_DATA_SOURCE" not in os.environ, reason="CELLMAP_DATA_SOURCE names no repository")
@pytest.mark.parametrize("release", RELEASES)
def test_the_tests_that_fail_are_those_that_are_listed(tmp_path, release):
    prepare(os.environ["CELLMAP_DATA_SOURCE"], RELEASES[release], tmp_path)
    outcomes = by_short_name(run(tmp_path))
    failed = {name: text for name, (outcome, text) in outcomes.items() if outcome != "passed"}
    listed = documented(release)
    unexplained = {name: text for name, text in failed.items() if name not in listed}
    assert unexplained == {}
    assert set(listed) - set(failed) == set()
    assert (len(outcomes), len(outcomes) - len(failed)) == tuple(total(release)[:2])
