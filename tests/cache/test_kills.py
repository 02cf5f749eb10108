"""A process is killed at each step of writing a region file; the next one reads what is stored."""

import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from cellmap_lightning.cache import locks, mapped
from cellmap_lightning.cache import shared_memory as shared
from cellmap_lightning.cache.mapped import EMPTY, FILLED
from cellmap_lightning.cache.shared_memory import RegionFolder
from tests.io.sources import PAGE, Source, edit, flipped, part_of, reboot

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes share voxels so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
TRACED = {module.__file__ for module in (locks, mapped, shared)}
#: From one step that is tried to the next one: all of them are tried by the slow tests.
STRIDES = [61, pytest.param(1, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def plane_by_plane(monkeypatch):
    """Voxels are written plane by plane, so that a chunk can be half written."""
    monkeypatch.setattr(mapped, "_SLAB", 1)


def killed(work, step, only=None):
    """Run a function in another process that is killed before its line of a number; False if it came to its end.

    Args:
        work: the function.
        step: the number, among the lines of the package's functions.
        only: names of the functions whose lines count.
    """
    pid = os.fork()
    if pid == 0:
        left = step

        def counts(code):
            return code.co_filename in TRACED and (only is None or code.co_name in only)

        def line(frame, event, arg):
            nonlocal left
            if event == "line":
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
            return line

        try:
            sys.settrace(lambda frame, event, arg: line if counts(frame.f_code) else None)
            work()
        finally:
            sys.settrace(None)
            os._exit(17)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 17
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL
    return True


def fill_and_sync(source):
    source.run()


def fill(source):
    region, _ = source.open()
    assert source.right(region)


def evict(source):
    folder = RegionFolder(Path(os.environ["CELLMAP_CACHE_DIR"]) / f"regions-{os.getuid()}")
    folder.evict(1 << 40, set())
    source.run()


def nothing(source):
    """No folder."""


def another_version(source):
    source.run()
    source.change((0, 0, 0))
    source.change((1, 0, 0))


def damage(source):
    source.run()
    at, _ = part_of(source.layout, "voxels")
    edit(source.file, lambda content: flipped(content, at, 10))


def restart(source):
    """Of a machine that had not written everything to disk."""
    fill(source)
    edit(source.file, reboot)


def cut(source):
    source.run()
    os.truncate(source.file, 3 * PAGE + 5)


def another_region(source):
    source.run()
    content = bytearray(source.file.read_bytes())
    head = json.loads(content[:PAGE].rstrip(b"\0")) | {"key": "0" * 40}
    content[:PAGE] = json.dumps(head).encode().ljust(PAGE, b"\0")
    source.file.write_bytes(content)


CASES = [
    (nothing, fill_and_sync), (another_version, fill_and_sync), (damage, fill_and_sync), (restart, fill_and_sync),
    (cut, fill), (another_region, fill), (fill, evict),
]  # fmt: skip


def prepared(before, cache_dir, tmp_path):
    """A source, and the cache folder that a process finds."""
    source = Source((4, 4, 8), (2, 4, 4), "uint16")
    cache_dir.mkdir()
    before(source)
    cache_dir.rename(tmp_path / "found")
    return source


def found_again(cache_dir, tmp_path):
    shutil.rmtree(cache_dir, ignore_errors=True)
    shutil.copytree(tmp_path / "found", cache_dir)
    for file in cache_dir.rglob("*.region"):  # a copy has another number
        content = bytearray(file.read_bytes())
        try:
            head = json.loads(content[:PAGE].rstrip(b"\0"))
        except ValueError:
            continue
        content[:PAGE] = json.dumps(head | {"inode": file.stat().st_ino}).encode().ljust(PAGE, b"\0")
        with file.open("r+b") as out:
            out.write(content)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize(("before", "work"), CASES, ids=[f"{b.__name__}-{w.__name__}" for b, w in CASES])
def test_killed_at_any_step(before, work, stride, cache_dir, tmp_path, caplog):
    source = prepared(before, cache_dir, tmp_path)
    step = 0
    while True:
        found_again(cache_dir, tmp_path)
        if not killed(lambda: work(source), step):
            break
        caplog.clear()
        with caplog.at_level(logging.WARNING, "cellmap_lightning"):
            source.run()
        damaged = [record for record in caplog.records if "damaged" in record.getMessage()]
        assert not damaged or before is damage, f"a kill at step {step} left something that looks like damage"
        assert source.run() == 0
        step += stride
    assert step > 100, "the lines of the package were traced"


@pytest.mark.parametrize(
    "before", [nothing, *(pytest.param(state, marks=pytest.mark.slow) for state in (another_version, damage))]
)
def test_killed_at_each_step_of_writing_a_chunk(before, cache_dir, tmp_path, caplog):
    """A flag is never set beside voxels, a stamp or a checksum that are not complete."""
    source = prepared(before, cache_dir, tmp_path)
    flags = set()
    for step in range(40):
        found_again(cache_dir, tmp_path)
        if not killed(lambda: fill(source), step, {"fill", "_write"}):
            assert step > 15
            break
        region, store = source.open()
        flags |= set(region.attached().flags.ravel().tolist())
        store.close()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "cellmap_lightning"):
            source.run()
        assert not caplog.records or before is damage, f"a kill at step {step} left something that looks like damage"
    assert {EMPTY, FILLED} <= flags, "before and after the flag was set"


@pytest.mark.parametrize("stride", STRIDES)
def test_killed_at_any_step_while_another_process_writes(stride, cache_dir, tmp_path):
    """The other process waits for it, takes over its work, and reads correct voxels."""
    source = prepared(another_version, cache_dir, tmp_path)
    step = 0
    while True:
        found_again(cache_dir, tmp_path)
        other = os.fork()
        if other == 0:
            try:
                fill(source)
                os._exit(0)
            finally:
                os._exit(1)
        ended = not killed(lambda: fill(source), step)
        assert os.waitpid(other, 0)[1] == 0
        assert source.run() == 0
        if ended:
            break
        step += stride
    assert step > 100
