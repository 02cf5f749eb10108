"""Processes under a Trainer, and of programs that end early: none is left behind."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import lightning as L
import pytest

from tests import processes
from tests.conftest import reading_threads
from tests.runs import module, task, trainer

pytestmark = [
    pytest.mark.usefixtures("quiet_lightning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


def test_persistent_workers_live_through_epochs_and_end_with_the_module(volume, tmp_path):
    pids = []

    class Look(L.Callback):
        def on_train_epoch_end(self, run, pl_module):
            pids.append({w.pid for w in run.train_dataloader._iterator._workers})

    data = module(volume, num_workers=2, persistent_workers=True)
    trainer(tmp_path, callbacks=[Look()], max_epochs=3, limit_val_batches=0).fit(task(), data)
    assert len(pids) == 3
    assert pids[0] == pids[1] == pids[2]
    _gone(pids[0], "of the fit")
    # In a plain loop the workers are the loader's, and end with the data.
    loader = data.train_dataloader()
    next(iter(loader))
    # Also if they are referenced, as by Lightning after an error in a hook that makes loaders.
    held = loader._iterator
    workers = [w.pid for w in held._workers]
    data.close()
    _gone(workers, "of the loop")
    assert reading_threads() == []
    next(iter(loader))  # and it can be iterated again
    loader.close()
    data.close()


def _alive(pids):
    """Return the states of the processes that have not ended, from /proc."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text()
            if stat.rpartition(")")[2].split()[0] != "Z":
                found[pid] = stat
    return found


def _gone(pids, which, seconds=120):
    end = time.monotonic() + seconds
    while alive := _alive(pids):
        assert time.monotonic() < end, (which, alive)
        time.sleep(0.01)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize(
    ("workers", "ahead", "end"),
    [(0, True, "a pass is left"), (0, True, "an error"), (2, False, "an error"), (2, True, "a pass is left")],
)
def test_program_ends_with_a_running_pass(volume, tmp_path, workers, ahead, end):
    """In silence but for its own error, and the worker processes end too."""
    (tmp_path / "volume.pkl").write_bytes(pickle.dumps(volume))
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import pickle, time, warnings
            warnings.filterwarnings("ignore", ".*fork.*")
            from cellmap_lightning import CellMapDataLoader, CellMapDataset, LoaderOptions
            from cellmap_lightning.loading.prefetch import PrefetchDecision
            from tests.conftest import CLASSES, INPUTS, TARGETS

            volume = pickle.load(open({str(tmp_path / "volume.pkl")!r}, "rb"))
            path = volume.label_path(volume.crops[1], "[mito,er]")
            dataset = CellMapDataset(volume.raw_path, path, CLASSES, INPUTS, TARGETS, is_train=True)
            options = LoaderOptions(decision=PrefetchDecision({ahead}, 2, 0, ""))
            loader = CellMapDataLoader(dataset, 2, {workers}, samples_per_epoch=10000, options=options)
            passes = iter(loader)
            for batch in passes:
                break
            workers = loader._iterator._workers if {workers} else []
            print(*(w.pid for w in workers), flush=True)
            if {end!r} == "an error":
                raise OSError("enough")
            """
        )
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = processes.run([sys.executable, program], 120, env=env)
    pids = done.stdout.split()
    assert len(pids) == workers
    assert _alive(pids) == {}
    errors = done.stderr.splitlines()
    assert errors[-1:] == (["OSError: enough"] if end == "an error" else [])
    assert done.stderr.count("Traceback") == len(errors[-1:])
    assert done.returncode == len(errors[-1:])


class Report(L.Callback):
    """A callback that writes the samples of each rank to a file."""

    def on_train_batch_start(self, run, pl_module, batch, batch_idx):
        with (Path(run.default_root_dir) / f"rank{run.global_rank}").open("a") as file:
            print(*batch["idx"].tolist(), file=file)


@pytest.mark.parametrize("strategies", [pytest.param(["ddp_fork", "ddp_spawn"], marks=pytest.mark.slow), ["ddp"]])
def test_processes_of_a_trainer(volume, tmp_path, strategies):
    """The module has read before the processes begin; each makes its own threads, and together they see one stream.

    One program does several one after the other with one module, since to import everything takes longest.
    """
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import sys, warnings
            warnings.filterwarnings("ignore")
            import torch
            torch.set_num_threads(1)
            from cellmap_lightning.callbacks import StreamPrefetch
            from tests.runs import module, task, trainer
            from tests.test_processes_end import Report
            from cellmap_lightning.demo.synthetic import SyntheticVolume
            import pickle
            if __name__ == "__main__":
                volume = pickle.load(open({str(tmp_path / "volume.pkl")!r}, "rb"))
                data = module(volume, batches_per_epoch=4)
                data.setup("fit")
                executor = data.train_dataset.executor
                for strategy in {strategies!r}:
                    if strategy != "ddp":
                        next(iter(data.train_dataloader()))  # threads are there before the processes begin
                    run = trainer({str(tmp_path)!r} + "/" + strategy, strategy=strategy, devices=2,
                                  limit_val_batches=1, callbacks=[Report(), StreamPrefetch(enabled=True)])
                    run.fit(task(), data)
                    assert strategy == "ddp" or data.train_dataset.executor is executor
                data.close()
                print("ended well", flush=True)
            """
        )
    )
    (tmp_path / "volume.pkl").write_bytes(pickle.dumps(volume))
    for strategy in strategies:
        (tmp_path / strategy).mkdir()
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = processes.run([sys.executable, program], 300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ended well") == (2 if strategies == ["ddp"] else 1)
    with module(volume, batches_per_epoch=4) as data:
        expected = sorted(i for batch in data.train_dataloader() for i in batch["idx"].tolist())
    for strategy in strategies:
        ranks = [(tmp_path / strategy / f"rank{rank}").read_text().splitlines() for rank in (0, 1)]
        assert [len(batches) for batches in ranks] == [2, 2]
        assert sorted(int(i) for batches in ranks for batch in batches for i in batch.split()) == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_in_a_real_process(volume, tmp_path, workers):
    """SIGINT while it trains, with batches ahead: the process ends, and so do its workers."""
    (tmp_path / "volume.pkl").write_bytes(pickle.dumps(volume))
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import pickle, time, warnings
            warnings.filterwarnings("ignore")
            from cellmap_lightning.callbacks import StreamPrefetch
            from cellmap_lightning.training.task import SegmentationTask
            from tests.runs import module, task, trainer
            import lightning as L
            class Slow(L.Callback):
                def on_train_batch_end(self, *args):
                    print("step", flush=True)
                    time.sleep(0.05)
            if __name__ == "__main__":
                volume = pickle.load(open({str(tmp_path / "volume.pkl")!r}, "rb"))
                data = module(volume, batches_per_epoch=100000, num_workers={workers})
                trainer({str(tmp_path)!r}, limit_val_batches=0,
                        callbacks=[Slow(), StreamPrefetch(enabled=True)]).fit(task(), data)
            """
        )
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, program]
    with processes.started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        for _ in range(3):
            assert process.stdout.readline().strip() == "step"
        children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(children) >= workers
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 1, err
        assert "Traceback" not in err.replace('Traceback (most recent call last):\n  File "<string>"', ""), err[-2000:]
        _gone(children, "of the run")
