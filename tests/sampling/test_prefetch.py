import gc
import itertools

import pytest
import torch

from cellmap_lightning import batch_memory
from cellmap_lightning.sampling.prefetch import PrefetchSettings, SideStream, decide, prefetch
from tests.conftest import reading_threads

MB = 2**20
pytestmark = pytest.mark.usefixtures("no_threads_left")


def memory(finished_mb):
    """A batch of that many finished MiB: raw alone, which travels as a quarter of it."""
    return batch_memory({"raw": {"shape": [1, 512, 512], "scale": [8, 8, 8]}}, batch_size=finished_mb)


@pytest.mark.parametrize(
    ("size", "device", "total", "settings", "enabled", "depth", "reason"),
    [
        (200, "cuda", 80_000, {}, True, 2, "200.0 MiB"),
        (99, "cuda", 80_000, {}, False, 0, "below the threshold of 100 MiB"),
        (100, "cuda", 80_000, {}, True, 2, "threshold 100 MiB"),
        (99, "cuda", 80_000, {"enabled": True}, True, 2, "switched on"),
        (200, "cuda", 80_000, {"enabled": False}, False, 0, "switched off"),
        (200, "cpu", None, {}, False, 0, "a cpu device has no copies"),
        (200, "cpu", None, {"enabled": True}, False, 0, "a cpu device"),
        (200, "mps", None, {}, False, 0, "a mps device"),
        (200, "xpu", 80_000, {}, True, 2, "200.0 MiB"),
        (200, "cuda", 80_000, {"depth": 5}, True, 5, ""),
        (200, "cuda", 80_000, {"depth": 0}, False, 0, "depth is 0"),
        (200, "cuda", 80_000, {"max_streams": 0}, False, 0, "max_streams is 0"),
        # 20 % of the device holds one finished batch (200) and floor(rest / 50) queued ones, two of them in use.
        (200, "cuda", 1_750, {}, True, 1, "20% of the device is 350 MiB"),
        (200, "cuda", 1_745, {}, False, 0, "too little for one batch ahead"),
        (200, "cuda", 2_000, {"depth": 9}, True, 2, ""),
    ],
)
def test_decision(size, device, total, settings, enabled, depth, reason):
    decision = decide(memory(size), device, total and total * MB, PrefetchSettings(**settings))
    assert (decision.enabled, decision.depth) == (enabled, depth)
    assert decision.streams == (1 if enabled else 0)
    assert reason in decision.reason


class Engine:
    """Counts what is copied and not yet used."""

    def __init__(self):
        self.copied, self.ahead, self.most = 0, 0, 0

    def bind(self):
        pass

    def copy(self, batch):
        self.copied += 1
        self.ahead += 1
        self.most = max(self.most, self.ahead)
        return (batch,)

    def acquire(self, batch):
        self.ahead -= 1
        return batch


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_order_and_bound(depth):
    engine = Engine()
    assert list(prefetch(lambda: range(20), engine, depth)) == list(range(20))
    assert engine.most <= depth


def test_nothing_starts_before_the_first_batch():
    started = []

    def source():
        started.append(True)
        return range(3)

    batches = prefetch(source, Engine(), 2)
    assert not started
    assert reading_threads() == []
    assert next(batches) == 0
    assert started
    assert reading_threads() == ["cellmap-copy_0"]
    batches.close()


def test_an_error_arrives_at_its_place():
    def source():
        yield from (0, 1, 2)
        raise OSError("chunk 3 unreadable")

    batches = prefetch(source, Engine(), 2)
    assert list(itertools.islice(batches, 3)) == [0, 1, 2]
    with pytest.raises(OSError, match="chunk 3 unreadable"):
        next(batches)


def test_abandoned_iterators_leave_no_thread():
    for _ in range(5):
        batches = prefetch(lambda: iter(range(100)), Engine(), 2)
        next(batches)
        del batches
    gc.collect()
    assert reading_threads() == []


def test_reading_goes_on_while_the_step_computes():
    """What the thread is for: at the end of a step the next batch has been read. Told by events, not by a clock."""
    import threading

    read = threading.Event()

    def source():
        yield 0
        read.set()
        yield 1

    batches = prefetch(source, Engine(), 1)
    assert next(batches) == 0
    assert read.wait(10)  # nobody has asked for batch 1 yet
    batches.close()


class Log(list):
    """The order in which torch's entry points are called."""


@pytest.fixture
def torch_log(monkeypatch):
    log = Log()

    class Stream:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            log.append("enter side stream")

        def __exit__(self, *_):
            log.append("leave side stream")

        def record_event(self):
            log.append("record event on side stream")
            return "event"

    class Current:
        def wait_event(self, event):
            log.append(f"current stream waits for {event}")

    current = Current()
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: current)
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda self, s: log.append("kept for current") if s is current else log.append("?"),
    )
    return log


def test_the_order_of_a_side_stream_copy(torch_log):
    """The real code under torch's entry points: copy on the side stream, record; wait and keep on the current one."""
    engine = SideStream(torch.device("meta"))
    batch, event = engine.copy({"raw": torch.zeros(2), "labels": torch.zeros(3)})
    assert all(t.device.type == "meta" for t in batch.values())
    assert torch_log == ["enter side stream", "leave side stream", "record event on side stream"]
    del torch_log[:]
    engine.acquire(batch, event)
    assert torch_log == ["current stream waits for event", "kept for current", "kept for current"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_no_batch_is_overwritten_on_a_gpu(depth):
    """Patterned batches whose only reference the step drops at once, checked on the device."""
    device = torch.device("cuda", torch.cuda.current_device())

    def source():
        for i in range(500):
            yield {"x": torch.full((1 << 20,), i % 251, dtype=torch.uint8).pin_memory()}

    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for i, batch in enumerate(prefetch(source, SideStream(device), depth)):
        torch.cuda._sleep(100_000)
        wrong += (batch.pop("x") != i % 251).sum()
    assert wrong.item() == 0
