"""Tests that fail or hang: they are named, and what they have started ends with them."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import processes

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
ROOT = Path(__file__).parents[1]

LEAVING = """
    import os, subprocess, sys, time

    PROGRAM = "import os, subprocess, sys; print(os.getpid(), subprocess.Popen(['sleep', '600']).pid, flush=True)"

    def test_leaving():
        program = [sys.executable, "-c", PROGRAM + "; import time; time.sleep(600)"]
        alive = subprocess.Popen(program, stdout=subprocess.PIPE, start_new_session=True)
        orphan = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, start_new_session=True)
        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
        pids = alive.stdout.readline().split() + orphan.stdout.readline().split() + [b"%d" % child]
        with open("pids.txt", "wb") as file:
            file.write(b" ".join(pids))
        raise OSError("enough")
"""


def inner(tmp_path, text, *arguments):
    file = tmp_path / "test_inner.py"
    file.write_text(textwrap.dedent(text))
    program = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml"]
    options = ["-n", "0", "-p", "tests.conftest", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", tmp_path]
    with (tmp_path / "output.txt").open("w") as output:  # a pipe would wait for those that are left behind
        processes.run(
            [*program, *options, *arguments, file], 200, cwd=tmp_path, stdout=output, stderr=output,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    return (tmp_path / "output.txt").read_text()


@pytest.mark.slow
def test_a_failed_test_leaves_no_process(tmp_path):
    """Neither a program, nor its child, nor the child of a program that has ended, nor a fork."""
    done = inner(tmp_path, LEAVING)
    pids = [int(pid) for pid in (tmp_path / "pids.txt").read_text().split()]
    try:
        assert "1 failed" in done, done
        assert len(pids) == 5
        assert processes.alive(pids) == []
    finally:
        for pid in processes.alive(pids):
            os.kill(pid, signal.SIGKILL)


def test_a_test_that_hangs_is_named_and_shows_where(tmp_path):
    text = """
        import threading, time

        def elsewhere(): time.sleep(600)

        def test_the_one_that_hangs():
            threading.Thread(target=elsewhere, daemon=True).start()
            time.sleep(600)

        def test_the_next(): pass
    """
    done = inner(tmp_path, text, "-o", "timeout=3")
    assert "1 failed, 1 passed" in done, done
    assert "FAILED test_inner.py::test_the_one_that_hangs - Failed: Timeout" in done
    assert "in elsewhere" in done


def test_a_program_ends_with_the_block_that_started_it():
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    with processes.started([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        pids = [process.pid, int(process.stdout.readline())]
        assert processes.alive(pids) == pids
    assert processes.alive(pids) == []
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([sys.executable, "-c", code], 1)
