import contextlib
import gc
import itertools
import logging
import os
import signal
import threading
import time
import weakref
from concurrent.futures import BrokenExecutor

import pytest
import torch
from lightning.pytorch.utilities.memory import is_oom_error

from cellmap_lightning import CellMapError, batch_memory
from cellmap_lightning.batches.memory import check_fits, device_memory
from cellmap_lightning.loading.prefetch import PrefetchSettings, ReadAhead, SideStream, _Ahead, decide, prefetch
from cellmap_lightning.runtime.thread_pool import ReadPool
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
        (200, "cpu", 80_000, {}, False, 0, "a cpu device has no copies"),
        (200, "cpu", None, {"enabled": False}, False, 0, "switched off"),
        # No stream, but a thread that reads ahead if it is enabled; queued batches are finished: 200, not 50.
        (200, "cpu", None, {"enabled": True}, True, 2, "a thread reads, nothing is copied"),
        (1, "mps", None, {"enabled": True, "depth": 3, "max_streams": 0}, True, 3, "a thread reads"),
        (200, "cpu", 4_000, {"enabled": True, "depth": 3}, True, 1, "20% of the memory is 800 MiB"),
        (200, "cpu", 3_999, {"enabled": True}, False, 0, "too little for one batch ahead"),
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
    assert decision.streams == (1 if enabled and device in ("cuda", "xpu") else 0)
    assert reason in decision.reason


def test_a_batch_that_cannot_fit_is_refused_with_advice():
    batch = memory(200)  # and 50 travel
    device = torch.device("cuda", 0)
    check_fits(batch, 200, device, 250 * MB, "train")
    check_fits(batch, 200, device, None, "train")
    with pytest.raises(CellMapError, match=r"at most batch_size=199 fits; most is for 'raw'") as caught:
        check_fits(batch, 200, device, 250 * MB - 1, "train")
    assert isinstance(caught.value, MemoryError)
    assert is_oom_error(caught.value)  # Lightning's tuner takes the batch size as too large
    with pytest.raises(CellMapError, match=r"val: .*not even one sample fits") as caught:
        check_fits(memory(1), 1, torch.device("cpu"), MB, "val")
    assert is_oom_error(caught.value)
    assert 1 << 30 < device_memory(torch.device("cpu")) < 1 << 50
    assert device_memory(torch.device("meta")) is None


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


class Batch:
    """An object that weak references can observe."""


@pytest.mark.parametrize("end", ["used up", "abandoned", "error in the step", "closed", "error in the source"])
@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_keeps_no_reference_to_a_yielded_batch(depth, end):
    alive = weakref.WeakSet()

    def source():
        for n in range(12):
            if end == "error in the source" and n == 6:
                raise OSError("chunk 6 unreadable")
            batch = Batch()
            alive.add(batch)
            yield batch
            del batch

    def use():
        batches = prefetch(source, ReadAhead(), depth)
        for n, batch in enumerate(batches):
            assert batch in alive
            del batch
            assert len(alive) <= depth + 1  # one may be in the middle of its read
            if n == 4 and end == "abandoned":
                return None
            if n == 4 and end == "error in the step":
                raise OSError("the step failed")
            if n == 4 and end == "closed":
                batches.close()
                return batches
        return batches

    if end.startswith("error"):
        with pytest.raises(OSError, match=r"unreadable|failed") as caught:
            use()
        caught.value.__traceback__ = None  # which holds the frames
        del caught
    else:
        use()
    assert len(alive) == 0
    assert reading_threads() == []


@pytest.mark.parametrize("depth", [1, 3])
def test_one_batch_is_read_at_a_time(depth):
    """An interpreter that exits waits for one batch, not for as many as may be ahead."""
    queued = []

    def source():
        for n in range(9):
            queued.append(thread_pool()._work_queue.qsize())
            yield n

    def thread_pool():
        return next(o for o in gc.get_objects() if isinstance(o, _Ahead))._pool

    assert list(prefetch(source, ReadAhead(), depth)) == list(range(9))
    assert set(queued) == {0}


def test_an_engine_that_cannot_begin_is_an_error():
    class Broken(ReadAhead):
        def bind(self):
            raise RuntimeError("no such device")

    logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL)
    with pytest.raises(BrokenExecutor):
        next(prefetch(lambda: range(3), Broken(), 2))


def test_batches_are_prepared_in_the_prefetching_thread():
    names = set()

    def prepare(n):
        names.add(threading.current_thread().name)
        return 2 * n

    assert list(prefetch(lambda: range(5), ReadAhead(prepare), 2)) == [0, 2, 4, 6, 8]
    assert names == {"cellmap-copy_0"}


def test_an_abandoned_pass_cancels_its_own_reads_and_no_others():
    """Two threads wait for reads of one pool: who is abandoned cancels what it waits for."""
    pool = ReadPool(1)
    hold, held = threading.Event(), threading.Event()
    ran = []

    def block():
        held.set()
        hold.wait(120)

    def source():
        yield 0
        pool.run([lambda: ran.append("mine") for _ in range(3)])
        yield 1

    def other():
        pool.run([block, lambda: ran.append("other")])

    thread = threading.Thread(target=other)
    thread.start()
    assert held.wait(120)
    batches = prefetch(source, ReadAhead(), 2, pool.cancel)
    assert next(batches) == 0
    while len(pool._queued) < 5:  # the thread that reads ahead now waits for its reads
        time.sleep(0.001)
    batches.close()  # at once, though the pool's only thread is held
    assert not hold.is_set()
    hold.set()
    thread.join(120)
    assert ran == ["other"]
    pool.close()


def test_hanging_read_does_not_block_the_end(monkeypatch, caplog):
    monkeypatch.setattr("cellmap_lightning.runtime.thread_pool.PATIENCE", 0.2)
    begun, hang = threading.Event(), threading.Event()

    def source():
        yield 0
        begun.set()
        hang.wait(120)
        yield 1

    batches = prefetch(source, ReadAhead(), 1)
    assert next(batches) == 0
    assert begun.wait(120)
    with caplog.at_level(logging.WARNING):
        batches.close()
    assert "a batch is read ahead for more than 0.2 s and cannot be interrupted: cellmap-copy_0" in caplog.text
    hang.set()


def test_error_is_raised_at_its_place_in_the_order():
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_pass_cannot_continue_in_a_forked_process():
    """The thread does not exist in a forked process: ending the pass does not wait, continuing it is an error."""
    ahead = _Ahead(iter(range(9)), Engine(), 2, None)
    ahead.queue()
    assert ahead.take() == 0
    with ahead._lock:  # as the thread may hold it
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(120)  # ends a child that waits
            held = threading.Event()
            threading.Thread(target=lambda: (ahead._lock.acquire(), held.set(), time.sleep(1000)), daemon=True).start()
            held.wait(120)
            with contextlib.suppress(CellMapError):
                ahead.take()
                code = 2
            ahead.close()
            code = 0 if code == 1 else 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [ahead.take() for _ in range(8)] == list(range(1, 9))
    ahead.close()


def test_an_interrupt_before_the_pass_is_watched_leaves_no_thread(monkeypatch):
    """Ctrl-C may come at any place, also right after the thread was started."""
    queue = _Ahead.queue

    def interrupted(self, done=None):
        queue(self, done)
        if done is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Ahead, "queue", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(prefetch(lambda: range(9), Engine(), 2))
    assert reading_threads() == []


def test_abandoned_pass_ends_its_thread():
    ahead = _Ahead(iter(range(9)), Engine(), 2, None)
    ahead.queue()
    ahead.take()
    del ahead
    end = time.monotonic() + 120
    while reading_threads():
        assert time.monotonic() < end


def test_truncated_pass_is_an_error(monkeypatch):
    """When the interpreter exits nothing can be queued any more, and a thread that trains still runs."""
    ahead = _Ahead(iter(range(9)), Engine(), 1, None)
    ahead.queue()

    def refuse(step):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(ahead._pool, "submit", refuse)
    assert ahead.take() == 0
    with pytest.raises(CellMapError, match="the interpreter exits"):
        ahead.take()
    ahead.close()


def test_source_is_closed_with_the_pass():
    """A holder of the traceback of an error, and of the frames in it."""
    ended = []

    class Broken(ReadAhead):
        def copy(self, batch):
            raise OSError("no room")

    def source():
        try:
            yield from range(9)
        finally:
            ended.append(True)

    with pytest.raises(OSError, match="no room") as caught:
        next(prefetch(source, Broken(), 1))
    assert caught.value.__traceback__ is not None
    assert ended == [True]


def test_reading_continues_while_the_step_computes():
    """At the end of a step the next batch has been read. Checked by events, not by a clock."""
    read = threading.Event()

    def source():
        yield 0
        read.set()
        yield 1

    batches = prefetch(source, Engine(), 1)
    assert next(batches) == 0
    assert read.wait(120)  # batch 1 was not requested yet
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

    class Event:
        made = 0

        def __init__(self):
            Event.made += 1
            self.number = Event.made

        def synchronize(self):
            log.append(f"host waits for event {self.number} of current stream")

    class Current:
        def query(self):
            log.append("current stream idle?")
            return True

        def record_event(self):
            log.append("record event on current stream")
            return Event()

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
    # The device is queried for idleness before it has to wait for this very copy.
    asked, used = ["current stream idle?", "record event on current stream"], ["kept for current", "kept for current"]
    assert torch_log == [*asked, "current stream waits for event", *used]
    assert engine.idle()
    # The host queues a step while the one before runs, and no further ahead: each would hold its batch.
    for number in (1, 2):
        del torch_log[:]
        engine.acquire(batch, event)
        held = f"host waits for event {number} of current stream"
        assert torch_log == [*asked, held, "current stream waits for event", *used]
