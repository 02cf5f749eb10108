"""Worker processes that write to slots of shared memory, and forks among threads that read."""

import contextlib
import gc
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from cellmap_lightning import CellMapDataLoader, CellMapError
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.loading.options import LoaderOptions
from cellmap_lightning.loading.prefetch import PrefetchDecision
from cellmap_lightning.loading.slots import Slots
from cellmap_lightning.runtime.thread_pool import ForkGate
from tests.conftest import CLASSES, INPUTS, TARGETS
from tests.make import make_dataset

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="slots are shared so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # where there are two cores
]


class Brighter:
    """A value transform of user code: random, and in Python."""

    def __call__(self, raw):
        return raw + torch.rand(())


@pytest.fixture(params=["compact", "finished", "transformed"])
def given(request):
    """The options of batches that are left compact, finished in the main process, or finished in the worker."""
    transforms = {"raw_value_transforms": Brighter()} if request.param == "transformed" else {}
    return {"dataset": transforms, "loader": {"finish": request.param != "compact"}}


def make(volume, **kwargs):
    path = volume.label_path(volume.crops[1], "[mito,er]")
    return make_dataset(
        volume.raw_path, path, CLASSES, INPUTS, TARGETS, is_train=True, read=ReadOptions(max_workers=2), **kwargs
    )


def bits(batch):
    batch = getattr(batch, "tensors", batch)
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in batch.items()}


def slots_in_memory():
    """Files in memory that belong to this package."""
    gc.collect()
    names = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(str(descriptor.readlink()))
    return sum(name.startswith("/memfd:cellmap") for name in names)


@pytest.mark.parametrize(("workers", "factor"), [(1, 1), (3, 2)])
def test_slots_deliver_the_batches_of_threads(volume, given, workers, factor):
    with make(volume, **given["dataset"]) as dataset:
        options = {"samples_per_epoch": 22, "drop_last": False, **given["loader"]}
        reference = CellMapDataLoader(dataset, 4, **options)
        expected = [[bits(b) for b in reference] for _ in range(2)]
        assert len(expected[0]) == 6
        loader = CellMapDataLoader(dataset, 4, workers, prefetch_factor=factor, **options)
        epochs = [list(loader) for _ in range(2)]  # batches that are referenced are not overwritten
        assert [[bits(b) for b in epoch] for epoch in epochs] == expected
        last = epochs[0][-1]
        assert len(getattr(last, "tensors", last)["idx"]) == 2


def test_abandoned_and_concurrent_passes(volume):
    with make(volume) as dataset:
        expected = [bits(b) for b in CellMapDataLoader(dataset, 2, samples_per_epoch=16)]
        for persistent in (False, True):
            loader = CellMapDataLoader(dataset, 2, 2, samples_per_epoch=16, persistent_workers=persistent)
            first = iter(loader)
            assert bits(next(first)) == expected[0]
            del first
            loader.set_epoch(0)
            assert [bits(b) for b in loader] == expected
        loader = CellMapDataLoader(dataset, 2, 2, samples_per_epoch=16, persistent_workers=False)
        one = iter(loader)
        a = [bits(next(one)) for _ in range(3)]
        loader.set_epoch(0)
        two = iter(loader)
        b = [bits(next(two)) for _ in range(3)]
        a += [bits(batch) for batch in one]
        b += [bits(batch) for batch in two]
        assert a == b == expected


@pytest.mark.parametrize("ahead", [False, True])
def test_two_passes_do_not_share_workers(volume, ahead):
    """The later pass has them, and is complete; continuing the earlier one is an error."""
    with make(volume) as dataset:
        expected = [bits(b) for b in CellMapDataLoader(dataset, 2, samples_per_epoch=16)]
        decision = PrefetchDecision(ahead, 2, 0, "")
        loader = CellMapDataLoader(dataset, 2, 2, samples_per_epoch=16, options=LoaderOptions(decision=decision))
        one = iter(loader)
        next(one)
        loader.set_epoch(0)
        assert [bits(b) for b in loader] == expected
        with pytest.raises(CellMapError, match="a second pass was begun before this one ended"):
            next(one)
        loader.close()


class Unreadable:
    """Raises where the batch is finished."""

    def __call__(self, raw):
        raise OSError("enough")


@pytest.mark.parametrize("ahead", [False, True])
def test_workers_end_with_their_pass_despite_a_held_traceback(volume, ahead):
    with make(volume, raw_value_transforms=Unreadable()) as dataset:
        decision = PrefetchDecision(ahead, 2, 0, "")
        loader = CellMapDataLoader(
            dataset, 2, 2, samples_per_epoch=16, options=LoaderOptions(decision=decision), persistent_workers=False
        )
        others = set(multiprocessing.active_children())
        with pytest.raises(OSError, match="enough") as caught:
            next(iter(loader))
        assert caught.value.__traceback__ is not None
        assert set(multiprocessing.active_children()) <= others


@pytest.mark.slow
def test_slots_are_released(volume):
    with make(volume) as dataset:
        left = []
        for _ in range(3):
            loader = CellMapDataLoader(dataset, 2, 2, samples_per_epoch=8)
            list(loader)
            used = slots_in_memory()
            del loader
            wait_for(lambda used=used: slots_in_memory() < used)
            left.append(slots_in_memory())
        assert left == left[:1] * 3


def test_overwritten_slot_is_an_error(volume):
    with make(volume) as dataset:
        slots = Slots(dataset.layout, 2, workers=1, prefetch_factor=2, finished=True)
        batches = [{"raw": torch.full((2, 1, 8, 16, 24), float(n))} for n in range(5)]
        handles = [slots.put(0, batch) for batch in batches]
        for handle, batch in zip(handles[1:], batches[1:], strict=True):
            assert torch.equal(slots.take(handle, pin=False)["raw"], batch["raw"])
        with pytest.raises(CellMapError, match="worker 0 wrote batch 4 over batch 0 before it was used"):
            slots.take(handles[0], pin=False)
        slots.close()


def test_error_in_a_worker_names_the_transform(volume):
    def refuse(raw):
        raise ValueError("nothing of the kind")

    with make(volume, raw_value_transforms=refuse) as dataset:
        loader = CellMapDataLoader(dataset, 2, 1, samples_per_epoch=4, multiprocessing_context="fork")
        with pytest.raises(ValueError, match=r"(?s)nothing of the kind.*in the raw value tr.* of 'raw'"):
            list(loader)


SCRIPT = """
    import sys
    import torch
    from cellmap_lightning import CellMapDataLoader, CellMapDataset, IntensityOptions

    class Imported:
        def __call__(self, raw):
            found = [name for name in ("lightning", "hydra", "monai", "matplotlib") if name in sys.modules]
            return torch.full_like(raw, len(found))

    if __name__ == "__main__":
        raw, labels, method = sys.argv[1:]
        spec = {"shape": [8, 16, 24], "scale": [10.48, 8, 8]}
        intensity = IntensityOptions(raw_value_transforms=Imported())
        arrays = {"raw": spec}, {"labels": spec}
        with CellMapDataset(raw, labels, ["mito"], *arrays, is_train=True, intensity=intensity) as dataset:
            loader = CellMapDataLoader(dataset, 2, 2, samples_per_epoch=4, multiprocessing_context=method)
            print(sum(float(b["raw"].sum()) for b in loader))
"""


@pytest.mark.parametrize(
    "method", ["spawn", *(pytest.param(method, marks=pytest.mark.slow) for method in ("fork", "forkserver"))]
)
def test_a_worker_imports_neither_lightning_nor_hydra(volume, tmp_path, method):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(SCRIPT))
    paths = [volume.raw_path, volume.label_path(volume.crops[1], "[mito]")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program, *map(str, paths), method],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout.strip(), done.stderr) == ("0.0", "")


# -- forks


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_fork_waits_for_reads_and_reads_wait_for_a_fork():
    gate, happened = ForkGate(), []
    reading, read_on = threading.Event(), threading.Event()

    def read():
        with gate:
            reading.set()
            read_on.wait(120)
            with gate:  # a read within a read continues while a fork waits
                happened.append("read")

    def fork():
        gate.before_fork()
        happened.append("fork")

    def read_later():
        with gate:
            happened.append("read later")

    threads = [threading.Thread(target=target) for target in (read, fork, read_later)]
    threads[0].start()
    assert reading.wait(120)
    threads[1].start()
    wait_for(lambda: gate._forking)
    threads[2].start()
    time.sleep(0.05)
    assert happened == []
    read_on.set()
    threads[0].join(120)
    threads[1].join(120)
    time.sleep(0.05)
    assert happened == ["read", "fork"]
    gate.after_fork()
    threads[2].join(120)
    assert happened == ["read", "fork", "read later"]


def test_a_thread_that_reads_may_fork():
    gate = ForkGate()
    with gate, gate:
        gate.before_fork()
        gate.after_fork()
    with gate:
        pass


def test_fork_has_a_timeout():
    gate = ForkGate()
    gate.PATIENCE = 0.05
    inside, done = threading.Event(), threading.Event()

    def read():
        with gate:
            inside.set()
            done.wait(120)

    thread = threading.Thread(target=read)
    thread.start()
    assert inside.wait(120)
    gate.before_fork()
    gate.after_fork()
    done.set()
    thread.join(120)


def test_forks_while_threads_read(volume):
    """Each child reads what the parent reads; with the locks of a thread that it does not have, it would hang."""
    with make(volume, cache="none") as dataset:
        expected = bits(dataset.read(dataset.draw(range(4), True, 0)))
        stop = threading.Event()

        def read():
            while not stop.is_set():
                dataset.read(dataset.draw(range(4), True, 0))

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(6):
                child = os.fork()
                if child == 0:
                    try:
                        same = bits(dataset.read(dataset.draw(range(4), True, 0))) == expected
                    finally:
                        os._exit(0 if same else 1)
                end, status = time.monotonic() + 120, None
                while time.monotonic() < end:
                    pid, status = os.waitpid(child, os.WNOHANG)
                    if pid:
                        break
                    time.sleep(0.01)
                else:
                    os.kill(child, 9)
                    os.waitpid(child, 0)
                    pytest.fail("the child hangs")
                assert status == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join(120)
