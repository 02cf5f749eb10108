"""The skips of macOS and Windows, computed here for the tests of this folder."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.platforms import importable, missing_facilities, unmet, used

TESTS = Path(__file__).parent


def write(tmp_path, text):
    path = tmp_path / "test_written.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("body", "facility"),
    [
        ("os.fork()", "os.fork"),
        ("path.symlink_to('there')", ".symlink_to"),
        ("Path('/proc/self/fd').iterdir()", "/proc"),
        ("DataLoader(multiprocessing_context='fork')", "'fork'"),
        ("import fcntl", "fcntl"),
        ("processes.started([])", "processes.started"),
        ("open('/dev/zero')", "/dev/zero"),
    ],
)
def test_a_facility_is_found(tmp_path, body, facility):
    path = write(tmp_path, f"def test_it(path):\n    {body}\n\ndef test_other(path):\n    path.exists()\n")
    assert used(path, "test_it") == {facility}
    assert used(path, "test_other") == set()


@pytest.mark.parametrize(
    "text",
    [
        "def helper():\n    os.mkfifo('a')\n\ndef test_it():\n    helper()\n",
        "@pytest.fixture\ndef pipe():\n    os.mkfifo('a')\n\ndef test_it(pipe):\n    pass\n",
        "class Pipe:\n    def make(self):\n        os.mkfifo('a')\n\ndef test_it():\n    Pipe().make()\n",
        "def a():\n    os.mkfifo('a')\n\nKINDS = {'pipe': a}\n\n@parametrize('k', KINDS)\ndef test_it(k):\n    1\n",
        "def a():\n    os.mkfifo('a')\n    b()\n\ndef b():\n    a()\n\ndef test_it():\n    b()\n",
    ],
    ids=["helper", "fixture", "class", "table", "recursive"],
)
def test_helpers_count(tmp_path, text):
    assert used(write(tmp_path, text), "test_it") == {"os.mkfifo"}


@pytest.mark.parametrize(
    "text",
    [
        "from tests.io.changes import as_links\n\ndef test_it():\n    as_links(1)\n",
        "from tests.io import changes\n\ndef test_it():\n    changes.as_links(1)\n",
        "from tests.io import changes as c\n\n@parametrize('f', [c.as_links])\ndef test_it(f):\n    f(1)\n",
    ],
)
def test_helpers_of_other_modules_count(tmp_path, text):
    assert ".symlink_to" in used(write(tmp_path, text), "test_it")


def test_pytest_skips_with_the_reason(tmp_path):
    module = "tests/runtime/test_shared_context.py"
    code = (
        "import pytest, sys; from tests import platforms; platforms.PLATFORM = 'darwin'\n"
        f"sys.exit(pytest.main(['-n', '0', '-p', 'no:cacheprovider', '-rs', '-q', '{module}']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert (
        "needs 'fork', os.fork, os.waitpid, which this system (darwin) does not have or cannot use safely"
        in done.stdout
    )
    assert re.search(r"\d passed, \d skipped", done.stdout)


@pytest.mark.parametrize(
    ("platform", "lost"), [("linux", set()), ("darwin", {"os.fork"}), ("win32", {"os.fork", "os.mkfifo"})]
)
def test_systems(tmp_path, platform, lost):
    path = write(tmp_path, "def test_it():\n    os.fork()\n    os.mkfifo('a')\n")
    assert unmet(path, "test_it", platform) == sorted(lost)
    assert missing_facilities(platform) >= lost


@pytest.mark.parametrize(
    "text", ["import fcntl\n", "from resource import getrlimit\n", "@mark(os.getuid())\ndef test_a(): 1\n"]
)
def test_modules_that_windows_cannot_import(tmp_path, text):
    path = write(tmp_path, text)
    assert importable(path, "linux")
    assert importable(path, "darwin")
    assert not importable(path, "win32")


def test_most_tests_run_everywhere():
    tests = [
        (path, node.name)
        for path in sorted(TESTS.rglob("test_*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert len(tests) > 1500
    for platform, least in (("darwin", 0.85), ("win32", 0.75)):
        running = [t for t in tests if importable(t[0], platform) and not unmet(*t, platform)]
        assert least < len(running) / len(tests) < 1
