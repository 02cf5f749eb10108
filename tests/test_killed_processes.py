"""Worker processes and programs that are killed, stopped or interrupted."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.errors import CellMapValueError, WorkerError
from cellmap_lightning.loading.dataloader import CellMapDataLoader
from cellmap_lightning.loading.options import WORKER_TIMEOUT
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from tests import processes, small_volume
from tests.small_volume import RAW, SPEC, dataset, position

root, own_regions = small_volume.root, small_volume.own_regions


def loader(data, **kwargs):
    given = {"num_workers": 1, "batch_size": 2, "samples_per_epoch": 8, "persistent_workers": False} | kwargs
    return CellMapDataLoader(data, **given)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_or_stopped_is_an_error_with_its_crop(root, how):
    """SIGKILL is what the system sends when memory runs out."""
    with dataset(root, is_train=True) as data:
        timeout = 20 if how == signal.SIGSTOP else WORKER_TIMEOUT
        batches = loader(data, samples_per_epoch=10**6, timeout=timeout)
        passing = iter(batches)
        next(passing)
        children = [int(p) for t in Path("/proc/self/task").iterdir() for p in (t / "children").read_text().split()]
        workers = [p for p in children if "resource_tracker" not in Path(f"/proc/{p}/cmdline").read_text()]
        # From another thread, while this one waits: torch's handler of signals raises wherever this one is.
        timers = [threading.Timer(0.3, os.kill, (worker, how)) for worker in workers]
        for timer in timers:
            timer.start()
        try:
            with pytest.raises(WorkerError, match=r"a worker process .* with samples of volume/crop1; ") as caught:
                for _ in passing:
                    pass
        finally:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGCONT)
        expected = "delivered nothing for 20 s" if how == signal.SIGSTOP else "killed, perhaps for memory"
        assert expected in str(caught.value)
        assert isinstance(caught.value, RuntimeError)
        passing.close()
        assert len(next(iter(loader(data)))["idx"]) == 2, "and the data can be read again"


def test_a_killed_worker_is_noticed_without_a_signal(root, monkeypatch):
    """The exception of torch's handler of SIGCHLD is lost while Python runs a finalizer."""
    monkeypatch.setattr("cellmap_lightning.loading.workers.CHECK_INTERVAL", 0.5)
    with dataset(root, is_train=True) as data:
        passing = iter(loader(data, samples_per_epoch=10**6))
        next(passing)
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            children = [int(p) for t in Path("/proc/self/task").iterdir() for p in (t / "children").read_text().split()]
            for worker in children:
                if "resource_tracker" not in Path(f"/proc/{worker}/cmdline").read_text():
                    os.kill(worker, signal.SIGKILL)
            with pytest.raises(WorkerError, match="killed, perhaps for memory"):
                for _ in passing:
                    pass
        finally:
            signal.signal(signal.SIGCHLD, before)


class TimesOut:
    """A dataset whose items fail with a text like that of torch's own timeout."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 2:
            raise RuntimeError("the server timed out after 30 s; DataLoader timed out after it")
        return {"index": index}


def test_an_error_about_a_timeout_is_not_a_timeout():
    """It is raised at its place, and no batch is left out."""
    seen = []
    with pytest.raises(RuntimeError, match="the server timed out after 30 s"):
        seen.extend(b["index"].tolist() for b in CellMapDataLoader(TimesOut(), 2, 1, is_train=False))
    assert seen == [[0, 1]]


def test_the_timeout_is_on_by_default(root):
    with dataset(root, is_train=True) as data:
        assert loader(data).timeout == WORKER_TIMEOUT > 0
        assert loader(data, num_workers=0).timeout == 0, "where no process is waited for"


def test_a_fork_with_an_unsafe_reader_is_refused_with_advice(root):
    with (
        dataset(root, is_train=True, reader="tensorstore") as data,
        pytest.raises(CellMapValueError, match="leave multiprocessing_context out, or use 'forkserver' or 'spawn'"),
    ):
        loader(data, multiprocessing_context="fork")


PROGRAM = """
import itertools, os, sys
import numpy as np
from pathlib import Path
from tests.small_volume import dataset
from tests.test_killed_processes import loader, split_of
phase, root = sys.argv[1], Path(sys.argv[2])
if __name__ == "__main__":
    print("ready", flush=True)
    if phase == "setup":
        for number in itertools.count():
            split_of(root)["train"].close()
            if number == 0:
                print("reading", flush=True)
    with dataset(root, cache="disk", is_train=True) as data:
        if phase == "fill":
            for number in itertools.count():
                data.read(data.draw(range(number * 8, number * 8 + 8), True, 0))
                if number == 0:
                    print("reading", flush=True)
                if number % 8 == 7:
                    for file in (root / "raw" / "s0").rglob("[0-9]"):
                        if file.is_file():
                            os.utime(file)  # it is decoded again
                    data.close()
        batches = loader(data, num_workers=2, samples_per_epoch=10**6)
        for number, _ in enumerate(batches):
            if number == 2:
                print("reading", flush=True)
"""


def split_of(root):
    return CellMapDataSplit(
        datasets={"train": [{"raw": str(root / "raw"), "gt": f"{root}/crop1/[mito,er]"}]},
        classes=["mito", "er"],
        input_arrays={"raw": SPEC},
        target_arrays={"labels": SPEC},
        read=ReadOptions(cache="disk"),
    )


@contextlib.contextmanager
def started(tmp_path, root, phase):
    """The program, at the beginning of a phase."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, tmp_path / "program.py", phase, root]
    with processes.started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout.readline().strip() == "ready"
        yield process


def gone(pids, seconds=120):
    end = time.monotonic() + seconds
    while alive := [p for p in pids if Path(f"/proc/{p}").exists()]:
        assert time.monotonic() < end, alive
        time.sleep(0.05)


def interrupt(process, tmp_path, root):
    """Press Ctrl-C: no process, thread or temporary file is left, and voxels that are marked as cached are right."""
    below = processes.descendants(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode not in (0, -signal.SIGKILL), errors
    assert "KeyboardInterrupt" in errors
    gone(below)
    assert list((tmp_path / "tmp").iterdir()) == []
    with dataset(root, cache="disk", is_train=True) as data:
        for number in range(0, 64, 8):
            at = position(data, (number // 2, number // 4, number % 33))
            z, y, x = number // 2, number // 4, number % 33
            found = data.read([type(data.draw([0], True, 0)[0])(0, at, None)]).tensors
            assert (np.asarray(found["raw"])[0, 0] == RAW[z : z + 32, y : y + 32, x : x + 32]).all()


@pytest.mark.parametrize(
    "phase", ["fill", pytest.param("setup", marks=pytest.mark.slow), pytest.param("workers", marks=pytest.mark.slow)]
)
def test_ctrl_c_at_every_phase_leaves_nothing(root, tmp_path, phase):
    with started(tmp_path, root, phase) as process:
        assert process.stdout.readline().strip() == "reading"
        interrupt(process, tmp_path, root)


@pytest.mark.parametrize("count", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_ctrl_c_at_random_moments_leaves_nothing(root, tmp_path, count):
    """Also inside finalizers and while worker processes are started; each moment is drawn from a fixed seed."""
    generator = np.random.default_rng(count)
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        phase, moment = str(generator.choice(["fill", "setup", "workers"])), float(generator.uniform(0, 1.5))
        with started(folder, root, phase) as process:
            time.sleep(moment)
            try:
                interrupt(process, folder, root)
            except BaseException as e:
                e.add_note(f"repetition {number}: {phase}, {moment} s")
                raise
        shutil.rmtree(folder)


@pytest.mark.slow
def test_workers_end_with_a_parent_that_was_killed(root, tmp_path):
    with started(tmp_path, root, "workers") as process:
        assert process.stdout.readline().strip() == "reading"
        below = processes.children(process.pid)
        assert len(below) >= 2
        process.kill()
        process.communicate(timeout=120)
        gone(below)
