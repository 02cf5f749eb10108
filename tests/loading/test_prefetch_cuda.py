"""Prefetch on a real device. Skipped without one; `benchmarks/gpu_streams.py` measures what is only judged here."""

import contextlib
import time

import pytest
import torch

from cellmap_lightning.loading.prefetch import SideStream, prefetch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("no_threads_left"),
]
MB = 2**20


@pytest.fixture
def device():
    torch.cuda.empty_cache()
    return torch.device("cuda", torch.cuda.current_device())


def busy(seconds):
    """Keep the device busy, roughly."""
    torch.cuda._sleep(int(seconds * 1.5e9))


def pinned(nbytes, count):
    """Batches in new page-locked memory, which torch takes from earlier batches, as the loader's are."""
    for number in range(count):
        yield {"x": torch.empty(nbytes // 4, dtype=torch.int32, pin_memory=True).fill_(number)}


def mismatches(engine, depth, count, nbytes=MB):
    wrong = torch.zeros((), dtype=torch.int64, device=engine.device)
    for number, batch in enumerate(prefetch(lambda: pinned(nbytes, count), engine, depth)):
        busy(20e-6 if number % 7 else 200e-6)  # the device falls behind: the batch is dropped before it is looked at
        wrong += (batch.pop("x") != number).sum()
    return wrong.item()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_ten_thousand_batches_are_unchanged(device, depth):
    assert mismatches(SideStream(device), depth, 10_000) == 0


def test_memory_that_is_reused_too_early_is_detected(device):
    """Without it, the test above would prove nothing."""

    class NotKept(SideStream):
        def acquire(self, batch, copied):
            torch.accelerator.current_stream(self.device).wait_event(copied)
            return batch

    assert mismatches(NotKept(device), 2, 1_000) > 0


@pytest.mark.parametrize("synced", [True, False], ids=["the host waits for each step", "the host runs ahead"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_memory_stays_within_the_prediction(device, depth, synced):
    """``depth`` queued, one in use, one that is freed when its step has run: also for steps that never wait."""
    # Memory that the host has dropped is held until its step has run: `acquire` throttles a host that runs ahead.
    nbytes = 32 * MB
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    total = torch.zeros((), dtype=torch.int32, device=device)
    for batch in prefetch(lambda: pinned(nbytes, 40), SideStream(device), depth):
        busy(0.02)  # longer than reading and copying
        total += batch.pop("x")[0]
        if synced:
            total.item()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated(device) - before <= (depth + 2) * nbytes + MB


def test_copies_overlap_with_the_step(device):
    """Reading and copying take less than the step, so that a pass takes little more than its steps. Generous."""
    nbytes, count = 64 * MB, 30

    def seconds(batches):
        torch.cuda.synchronize()
        began = time.perf_counter()
        with contextlib.closing(batches):
            for _ in batches:
                busy(0.05)
                torch.cuda.synchronize()
        return time.perf_counter() - began

    def plain():
        for batch in pinned(nbytes, count):
            yield {name: tensor.to(device) for name, tensor in batch.items()}

    seconds(plain())  # pinned memory is slow to make
    resident = seconds({} for _ in range(count))
    ahead = seconds(prefetch(lambda: pinned(nbytes, count), SideStream(device), 2))
    assert ahead < 1.1 * resident
    assert ahead < seconds(plain())
