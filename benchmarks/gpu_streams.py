"""Batches copied ahead on a side stream of a GPU: are they right, what is gained, what memory is held.

    python benchmarks/gpu_streams.py

One command, within 8 minutes on its own clock: what does not fit is named as left out. ``--minutes 3.5`` measures fewer
sizes for a shorter time each. Needs a CUDA device and this checkout on the path, and neither zarr nor Lightning. It
writes a JSON and, where matplotlib is there, a PNG; elsewhere ``--plot-json FILE`` draws the PNG from the JSON.
``--device cpu`` runs the same code without a stream, to test this program: its figures say nothing about streams.

- **Corruption**: patterned batches, checked on the device by a step that drops its input at once, 10,000 for each
  depth. The same hunt with a part of the engine left out has to find something, or it would prove nothing.
- **Overlap**: the time of a step over that on a batch that is already on the device: with prefetch, without it (pinned
  memory, copied on the compute stream within the step), and as cellmap-data 2025.7 did it (unpinned memory, side
  streams, and a barrier before the batch is handed out). The same bytes are read in all of them, by the package's own
  reading threads. The compute is matrix products.
- **Streams**: one against two and four, each batch split between them.
- **Memory**: the most that is allocated against ``(depth + 2) * queued + finished``, with a host that waits for each
  step, and with one that runs ahead of the device.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from loaders import machine

from cellmap_lightning.batches.memory import BatchMemory, FormMemory
from cellmap_lightning.loading.prefetch import PrefetchSettings, ReadAhead, SideStream, decide, prefetch
from cellmap_lightning.runtime.thread_pool import ReadPool, default_workers
from cellmap_lightning.transforms.targets import packed_bytes, unpack

MIB = 2**20
SIZES = (10, 30, 100, 300, 1000, 2000)  # MiB of a finished batch
#: With less time than this, fewer sizes on both sides of the threshold and shorter measurements cover each claim.
SHORT_MINUTES, SHORT_SIZES = 6, (10, 100, 300, 1000)
FORMS = ("compact", "finished")
MODES = ("resident", "on", "off", "original")
CLASSES, SAMPLES, PLANES, ROWS = 8, 4, 16, 64
TARGET = 1.02
THRESHOLD = PrefetchSettings().min_batch_mb
NO_STREAMS = "run on the CPU to test the program: these figures say nothing about streams"


@dataclass(frozen=True)
class Regime:
    """The time that the step computes, and whether batches are read.

    Attributes:
        title: for tables and pictures.
        reads: each batch is read into its memory; otherwise what was read once is copied again and again.
        synced: the host waits for every step, as it does where the loss of every step is looked at.
    """

    title: str
    reads: bool = True
    synced: bool = False

    def seconds(self, read, copy, name):
        if name in ("long", "synced"):
            return 1.5 * (read + copy)
        return max(read, copy) if self.reads else copy


REGIMES = {
    "long": Regime("compute 1.5 x (reading + copying)"),
    "synced": Regime("the same, the host waits for each step", synced=True),
    "equal": Regime("compute as long as the longer of both"),
    "bare": Regime("nothing read, compute as long as copying", reads=False),
}


# ------------------------------------------------------------------------------------------------------- the devices
class Cuda:
    """The current CUDA device."""

    measures_streams = True

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())

    def describe(self):
        properties = torch.cuda.get_device_properties(self.device)
        query = ["nvidia-smi", f"--id={self.device.index}", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = None
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        return {
            "type": "cuda", "name": properties.name, "memory_mib": properties.total_memory // MIB,
            "driver": driver, "cuda": torch.version.cuda, "torch": torch.__version__,
        }  # fmt: skip

    def total_bytes(self):
        return torch.cuda.get_device_properties(self.device).total_memory

    def engine(self, streams=1):
        return SideStream(self.device) if streams == 1 else SplitStreams(self.device, streams)

    def empty(self, like, pin=True):
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=pin)

    def synchronize(self):
        torch.cuda.synchronize(self.device)

    def mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, stop):
        return start.elapsed_time(stop) / 1e3

    def busy(self, seconds):
        torch.cuda._sleep(int(seconds * 1.5e9))  # cycles, at about 1.5 GHz

    def forget(self):
        """Give cached memory back, that of the host too where this torch can."""
        torch.cuda.empty_cache()
        with contextlib.suppress(AttributeError):
            torch._C._host_emptyCache()

    def held(self):
        """Bytes allocated and reserved; from here on the most of both is followed."""
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)

    def most(self):
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)


class Cpu:
    """The same calls without a device, to test this program."""

    measures_streams = False
    device = torch.device("cpu")

    def describe(self):
        return {"type": "cpu", "name": "no device", "torch": torch.__version__, "note": NO_STREAMS}

    def total_bytes(self):
        return None

    def engine(self, streams=1):
        return ReadAhead()

    def empty(self, like, pin=True):
        return torch.empty(like.shape, dtype=like.dtype)

    def synchronize(self):
        pass

    def mark(self):
        return time.perf_counter()

    def between(self, start, stop):
        return stop - start

    def busy(self, seconds):
        pass

    def forget(self):
        pass

    def held(self):
        return 0, 0

    def most(self):
        return 0, 0


class SplitStreams:
    """`SideStream` with more streams: each copies some of the samples."""

    def __init__(self, device, count):
        self.device = device
        self.streams = [torch.cuda.Stream(device) for _ in range(count)]

    def bind(self):
        torch.cuda.set_device(self.device)

    def copy(self, batch):
        first = self.streams[0]
        with torch.cuda.stream(first):
            moved = {name: torch.empty(t.shape, dtype=t.dtype, device=self.device) for name, t in batch.items()}
        made = first.record_event()
        for stream, part in zip(self.streams, torch.arange(SAMPLES).tensor_split(len(self.streams)), strict=True):
            at = slice(int(part[0]), int(part[-1]) + 1)
            stream.wait_event(made)
            with torch.cuda.stream(stream):
                for name, tensor in batch.items():
                    moved[name][at].copy_(tensor[at], non_blocking=True)
        return moved, [stream.record_event() for stream in self.streams]

    def acquire(self, batch, copied):
        current = torch.cuda.current_stream(self.device)
        for event in copied:
            current.wait_event(event)
        for tensor in batch.values():
            tensor.record_stream(current)
        return batch


class NotKept(SideStream):
    """Broken on purpose: memory goes back to the side stream while the step still uses it."""

    def acquire(self, batch, copied):
        torch.accelerator.current_stream(self.device).wait_event(copied)
        return batch


class NotAwaited(SideStream):
    """Broken on purpose: the step does not wait for the copy."""

    def acquire(self, batch, copied):
        for tensor in batch.values():
            tensor.record_stream(torch.accelerator.current_stream(self.device))
        return batch


# ---------------------------------------------------------------------------------------------------------- the clock
class Clock:
    """Time that may be spent: each section has a share, and what one leaves over the next ones may use."""

    def __init__(self, seconds, shares):
        self.began = time.perf_counter()
        self.ends, so_far = {}, 0.0
        for name, share in shares.items():
            so_far += share
            self.ends[name] = seconds * so_far
        self.left_out = []

    def spent(self):
        return time.perf_counter() - self.began

    def left(self, section):
        return self.ends[section] - self.spent()

    def leave_out(self, section, what, why="no time was left"):
        self.left_out.append(f"{section}: {what} ({why})")
        print(f"left out: {self.left_out[-1]}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------- a case
class Case:
    """Batches of one size and form, and a step that computes.

    Args:
        backend: the device.
        finished_mib: size of the finished batch.
        form: the form in which it travels; a compact one is finished on the device, as a part of the step.
        pool: the threads that read.
    """

    def __init__(self, backend, finished_mib, form, pool):
        self.backend, self.form, self.pool = backend, form, pool
        self.size = finished_mib
        columns = max(1, round(finished_mib * MIB / (4 * (1 + CLASSES) * SAMPLES * PLANES * ROWS)))
        shape = (PLANES, ROWS, columns)
        generator = torch.Generator().manual_seed(0)
        bits = functools.partial(torch.randint, 0, 256, dtype=torch.uint8, generator=generator)
        compact = {"raw": bits((SAMPLES, 1, *shape)), "labels": bits((SAMPLES, *shape, packed_bytes(CLASSES)))}
        finished = {
            "raw": 4 * SAMPLES * columns * PLANES * ROWS,
            "labels": 4 * CLASSES * SAMPLES * columns * PLANES * ROWS,
        }
        self.memory = BatchMemory(finished, FormMemory({name: t.nbytes for name, t in compact.items()}))
        #: What is read: warm memory of the host.
        self.stored = compact if form == "compact" else self._finish(compact)
        self.queued = sum(t.nbytes for t in self.stored.values())
        self.total = torch.zeros((), device=backend.device)
        self.products = 0
        self.read_s = self.copy_s = 0.0

    @staticmethod
    def _finish(batch):
        """As the package finishes uint8 raw and binary labels."""
        return {"raw": batch["raw"].to(torch.float32).mul_(1 / 255), "labels": unpack(batch["labels"], CLASSES)}

    def read(self, pin=True):
        """One batch, in new memory of the host, which torch takes from what earlier batches left."""
        batch = {name: self.backend.empty(t, pin) for name, t in self.stored.items()}
        tasks = [
            functools.partial(batch[name][i].copy_, t[i]) for name, t in self.stored.items() for i in range(SAMPLES)
        ]
        self.pool.run(tasks)
        return batch

    def step(self, batch):
        if self.form == "compact":
            batch = self._finish(batch)
        self.total += batch["raw"].sum()
        for _ in range(self.products):
            torch.mm(self.left, self.right, out=self.out)

    def calibrate(self):
        """Measure reading and copying."""
        backend, reads, copies = self.backend, [], []
        for number in range(5):
            began = time.perf_counter()
            batch = self.read()
            reads.append(time.perf_counter() - began)
            backend.synchronize()
            start = backend.mark()
            moved = {name: t.to(backend.device, non_blocking=True) for name, t in batch.items()}
            stop = backend.mark()
            backend.synchronize()
            copies.append(backend.between(start, stop))
            if number < 2:  # new memory, cold
                reads.clear()
                copies.clear()
            del moved
        self.read_s, self.copy_s = statistics.median(reads), statistics.median(copies)

    def compute(self, seconds):
        """Choose the matrix products: at least ten, so that their sum can be what is asked for, and not thousands."""
        backend = self.backend
        kind = torch.float16 if backend.measures_streams else torch.float32
        chosen = None
        for width in (64, 256, 1024, 2048, 4096, 8192):
            left, right = torch.randn((2, width, width), device=backend.device).to(kind)
            out = torch.empty_like(left)
            times = []
            for number in range(6):
                backend.synchronize()
                start = backend.mark()
                for _ in range(4):
                    torch.mm(left, right, out=out)
                stop = backend.mark()
                backend.synchronize()
                if number:
                    times.append(backend.between(start, stop) / 4)
            each = statistics.median(times)
            if chosen is None or each <= seconds / 10:
                chosen = left, right, out, each
            if each > seconds / 10:
                break
        self.left, self.right, self.out, each = chosen
        self.products = max(1, round(seconds / each))

    def batches(self, mode, count, depth=2, engine=None, reads=True):
        """The batches of a pass on the device, as a mode gets them there."""
        device = self.backend.device
        if mode == "resident":
            batch = {name: t.to(device) for name, t in self.stored.items()}
            return (dict(batch) for _ in range(count))
        pinned = mode != "original"
        if reads:
            source = (self.read(pinned) for _ in range(count))
        else:
            once = [self.read(pinned) for _ in range(2)]
            source = itertools.islice(itertools.cycle(once), count)
        if mode == "on":
            return prefetch(lambda: source, engine or self.backend.engine(), depth)
        if mode == "off":
            return ({name: t.to(device, non_blocking=True) for name, t in batch.items()} for batch in source)
        return self._original(source)

    def _original(self, source):
        """One stream per array, and a barrier."""
        if not self.backend.measures_streams:
            yield from source
            return
        streams = [torch.cuda.Stream(self.backend.device) for _ in self.stored]
        current = torch.cuda.current_stream(self.backend.device)
        for batch in source:
            moved = {}
            for (name, tensor), stream in zip(batch.items(), streams, strict=True):
                with torch.cuda.stream(stream):
                    moved[name] = tensor.to(self.backend.device, non_blocking=True)
            for stream in streams:
                stream.synchronize()
            for tensor in moved.values():
                # Not a part of that design: without it the step's input could be overwritten.
                tensor.record_stream(current)
            yield moved

    def run(self, mode, steps, warm=3, regime=REGIMES["long"], **options):
        """Seconds per step: between events, after the first steps; and on the wall, all steps and the first read."""
        backend, depth = self.backend, options.get("depth", 2)
        count = warm + steps
        # More batches than steps, so that reading ahead continues to the last one.
        batches = self.batches(mode, count + depth + 1, reads=regime.reads, **options)
        backend.synchronize()
        began = time.perf_counter()
        with contextlib.closing(batches):
            for number, batch in enumerate(batches, 1):
                self.step(batch)
                del batch
                if regime.synced:
                    self.total.item()
                if number == warm:
                    start = backend.mark()
                if number == count:
                    stop = backend.mark()
                    break
            backend.synchronize()
            wall = (time.perf_counter() - began) / count
        return {"step_s": backend.between(start, stop) / steps, "wall_s": wall}


def spread(values):
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "rounds": len(values)}


# ----------------------------------------------------------------------------------------------------------- sections
def hunt(backend, engine, depth, batches, nbytes, seconds):
    """Values that were not those of their batch, and how many batches were looked at."""
    words = nbytes // 4
    wrong = torch.zeros((), dtype=torch.int64, device=backend.device)
    like = {"a": torch.empty(words, dtype=torch.int32), "b": torch.empty(words // 3, dtype=torch.int32)}

    def source():
        for number in range(batches):
            yield {name: backend.empty(t).fill_(number) for name, t in like.items()}

    ends, seen = time.perf_counter() + seconds, 0
    with contextlib.closing(prefetch(source, engine, depth)) as found:
        for number, batch in enumerate(found):
            # The device falls behind, so that Python has dropped the batch long before it is looked at.
            backend.busy(20e-6 if number % 7 else 200e-6)
            for name in like:
                wrong += (batch.pop(name) != number).sum()
            seen += 1
            # The host must not run away from the device for ever: nothing would be used again.
            if number % 64 == 63:
                backend.synchronize()
                if time.perf_counter() > ends:
                    break
    return int(wrong), seen


def corruption(backend, clock, batches, nbytes):
    rows = []
    for depth in (1, 2, 3, 4):
        seconds = clock.left("corruption") / (5 - depth) - 1
        engine = backend.engine()
        wrong, seen = hunt(backend, engine, depth, batches, nbytes, max(0, seconds))
        rows.append({"engine": type(engine).__name__, "depth": depth, "batches": seen, "mismatches": wrong})
        if seen < batches:
            clock.leave_out("corruption", f"{batches - seen} of {batches} batches at depth {depth}")
    for broken in (NotKept, NotAwaited):
        if not backend.measures_streams:
            clock.leave_out("corruption", f"the control {broken.__name__}", "it needs a stream")
            continue
        wrong, seen = hunt(backend, broken(backend.device), 2, min(batches, 1000), nbytes, 10)
        rows.append({"engine": broken.__name__, "depth": 2, "batches": seen, "mismatches": wrong})
    for row in rows:
        print(
            f"corruption  {row['engine']}, depth {row['depth']}: {row['mismatches']} wrong in {row['batches']} batches"
        )
    return rows


def rounds_that_fit(seconds, per_round, most):
    return min(most, int(seconds / per_round)) if per_round else most


def fits_in_memory(backend, case, batches):
    """Return True if that many batches fit on the device and in pinned memory, for a host that runs ahead."""
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    device = backend.total_bytes() or host
    held = batches * case.queued
    # torch rounds pinned blocks up to powers of two.
    return held + 2 * case.memory.total_bytes < 0.8 * device and 2 * held < 0.8 * host


def steps_for(step_s, most, seconds=0.5):
    """Steps of one measurement: about half a second of them."""
    return max(4, min(most, int(seconds / step_s)))


def overlap(backend, clock, sizes, pool, most_rounds, most_steps, measured=0.5):
    """Measure a step for each form, size and regime; in each round each mode once.

    Args:
        backend: the device.
        clock: the time that is left.
        sizes: of finished batches, MiB.
        pool: the threads that read.
        most_rounds: rounds at most.
        most_steps: steps of a measurement at most.
        measured: seconds of a measurement, about.
    """
    rows = []
    ahead = len(FORMS) * len(sizes) * len(REGIMES)
    for size, form in itertools.product(sizes, FORMS):
        what = f"{size} MiB, {form}"
        if clock.left("overlap") <= 0:
            clock.leave_out("overlap", what)
            continue
        try:
            case = Case(backend, size, form, pool)
            case.calibrate()
            for key, regime in REGIMES.items():
                # Large batches take longer than their share of the time, small ones less.
                share = min(clock.left("overlap"), 3 * clock.left("overlap") / max(1, ahead))
                ahead -= 1
                seconds = regime.seconds(case.read_s, case.copy_s, key)
                longest = seconds + 3 * (case.read_s + case.copy_s)
                steps = steps_for(longest, most_steps, measured)
                # Where the host does not wait, every step may have its batch on the device.
                if not fits_in_memory(backend, case, steps + 8):
                    clock.leave_out("overlap", f"{what}, {key}", "too little memory")
                    continue
                expected = len(MODES) * longest * (steps + 6)
                # One more pass warms up.
                if clock.left("overlap") < 3 * expected:
                    clock.leave_out("overlap", f"{what}, {key}")
                    continue
                rounds = max(2, rounds_that_fit(share - expected, expected, most_rounds))
                case.compute(seconds)
                rows.append(_overlap_row(case, key, regime, steps, rounds))
        except torch.OutOfMemoryError:
            clock.leave_out("overlap", what, "out of memory")
        case = None
        backend.forget()
    return rows


def _overlap_row(case, key, regime, steps, rounds):
    found = {mode: [] for mode in MODES}
    for mode in MODES:  # warm: pinned memory is slow to make
        case.run(mode, steps, regime=regime)
    for number in range(rounds):
        for mode in MODES if number % 2 == 0 else reversed(MODES):
            found[mode].append(case.run(mode, steps, regime=regime))
    decision = decide(case.memory, "cuda", case.backend.total_bytes(), PrefetchSettings())

    def ratios(over, under):
        return spread([a["step_s"] / b["step_s"] for a, b in zip(found[over], found[under], strict=True)])

    row = {
        "form": case.form, "finished_mib": case.size, "queued_mib": case.queued / MIB, "regime": key,
        "reading_s": case.read_s, "copying_s": case.copy_s, "steps": steps, "products": case.products,
        "step_s": {mode: spread([r["step_s"] for r in found[mode]]) for mode in MODES},
        "wall_s": {mode: spread([r["wall_s"] for r in found[mode]]) for mode in MODES},
        "over_resident": {mode: ratios(mode, "resident") for mode in MODES[1:]},
        "off_over_on": ratios("off", "on"), "original_over_on": ratios("original", "on"),
        "callback": decision.reason if case.form == "compact" else "",
    }  # fmt: skip
    over = row["over_resident"]
    print(
        f"overlap  {case.form:8} {case.size:5} MiB {key:6}: on {over['on']['median']:.3f}, off "
        f"{over['off']['median']:.3f}, original {over['original']['median']:.3f} x resident "
        f"({1e3 * row['step_s']['resident']['median']:.2f} ms)",
        flush=True,
    )
    return row


def streams(backend, clock, sizes, pool, most_rounds, most_steps):
    """One, two and four streams, where the copy is what takes longest."""
    rows = []
    regime = REGIMES["bare"]
    for size in sizes:
        case = Case(backend, size, "compact", pool)
        case.calibrate()
        steps = steps_for(2 * case.copy_s, most_steps)
        expected = 3 * 2 * case.copy_s * (steps + 6)
        rounds = rounds_that_fit(clock.left("streams") - 3 - expected, expected, most_rounds)
        if rounds < 2 or not fits_in_memory(backend, case, steps + 8):
            clock.leave_out("streams", f"{size} MiB")
            continue
        case.compute(case.copy_s / 2)
        found = {count: [] for count in (1, 2, 4)}
        for number in range(rounds + 1):
            for count, times in found.items():
                result = case.run("on", steps, regime=regime, engine=backend.engine(count))
                if number:  # the first round warms up
                    times.append(result["step_s"])
        for count, times in found.items():
            ratio = spread([t / one for t, one in zip(times, found[1], strict=True)])
            rows.append({"finished_mib": size, "streams": count, "step_s": spread(times), "over_one": ratio})
            print(f"streams  {size} MiB, {count}: {ratio['median']:.3f} x one stream", flush=True)
        case = None
        backend.forget()
    return rows


def memory(backend, clock, sizes, pool):
    """The most that is allocated above what was there before, against the prediction."""
    rows = []
    for size, form in itertools.product(sizes, FORMS):
        if clock.left("memory") < 3:
            clock.leave_out("memory", f"{size} MiB, {form}")
            continue
        case = Case(backend, size, form, pool)
        case.calibrate()
        case.compute(1.5 * (case.read_s + case.copy_s))
        case.run("resident", 1)  # what the libraries keep for themselves
        for depth, synced in itertools.product((1, 2, 3, 4), (True, False)):
            what = f"{size} MiB, {form}, depth {depth}, {'host waits for each step' if synced else 'host runs ahead'}"
            steps = 8 + 2 * depth
            if clock.left("memory") < 1 + 3 * steps * (case.read_s + case.copy_s):
                clock.leave_out("memory", what)
            elif not fits_in_memory(backend, case, steps + 8):
                clock.leave_out("memory", what, "too little memory")
            else:
                rows.append(_memory_row(case, depth, synced, steps))
                row = rows[-1]
                print(
                    f"memory  {what}: {row['peak_mib']:.0f} MiB, predicted {row['predicted_mib']:.0f} "
                    f"({row['peak_over_predicted']:.2f} x)",
                    flush=True,
                )
        case = None
        backend.forget()
    return rows


def _memory_row(case, depth, synced, steps):
    backend = case.backend
    backend.synchronize()
    backend.forget()
    allocated, reserved = backend.held()
    case.run("on", steps, depth=depth, regime=REGIMES["synced" if synced else "long"])
    most_allocated, most_reserved = backend.most()
    peak = most_allocated - allocated
    predicted = (depth + 2) * case.queued + (case.memory.total_bytes if case.form == "compact" else 0)
    return {
        "finished_mib": case.size, "form": case.form, "depth": depth, "synced": synced, "steps": steps,
        "peak_mib": peak / MIB, "reserved_mib": (most_reserved - reserved) / MIB, "predicted_mib": predicted / MIB,
        "peak_over_predicted": peak / predicted,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- verdicts
def pays_from(rows, regime, form="compact"):
    """The smallest size from which prefetch gains 2 % or more in the regime, and from which on it never loses 2 %.

    A gain has to hold in every round. None where no such size was measured.
    """
    found = sorted((r for r in rows if r["regime"] == regime and r["form"] == form), key=lambda r: r["finished_mib"])
    answer = None
    for row in reversed(found):
        ratio = row["off_over_on"]
        if ratio["median"] < 1 / TARGET:
            break
        if ratio["median"] >= TARGET and ratio["low"] > 1:
            answer = row["finished_mib"]
    return answer


def _sizes(found):
    return ", ".join(f"{size} MiB" for size in sorted(found))


def threshold_verdict(rows):
    """The threshold by the measured sizes, for batches that travel compact, as they do."""
    sizes = sorted({r["finished_mib"] for r in rows if r["form"] == "compact"})
    if not sizes:
        return "no measurements"
    parts = []
    for regime, description in REGIMES.items():
        if regime not in {r["regime"] for r in rows}:
            continue
        size = pays_from(rows, regime)
        parts.append(f"{description.title}: " + (f"from {size} MiB" if size is not None else "at no size"))
    compact = [r for r in rows if r["form"] == "compact"]
    gains = {r["finished_mib"] for r in compact if r["off_over_on"]["median"] >= TARGET and r["off_over_on"]["low"] > 1}
    losses = {r["finished_mib"] for r in compact if r["off_over_on"]["median"] < 1 / TARGET}
    small = {s for s in sizes if s < THRESHOLD}
    this = f"{THRESHOLD:g} MiB"
    if losses - small:
        verdict = f"{this} is too low: prefetch loses 2 % at {_sizes(losses - small)}"
    elif not gains - small:
        verdict = f"{this} is not supported: from there on prefetch gains 2 % at no size that was measured"
    elif gains & small and not losses:
        verdict = f"{this} is too high: prefetch gains from {min(gains)} MiB, and loses nowhere"
    elif gains & small:
        verdict = (
            f"{this} is a compromise: below it prefetch gains at {_sizes(gains & small)}, loses at {_sizes(losses)}"
        )
    else:
        verdict = f"{this} is right: prefetch gains from there on, and not below"
    if not small or small == set(sizes):
        verdict += " (one side of it was not measured)"
    return f"{verdict}. Gains of 2 % or more, {'; '.join(parts)}."


def judge(sections):
    """Each target with what was reached."""
    found = {}
    rows = sections["corruption"]
    real = [r for r in rows if r["engine"] == "SideStream"]
    if real:
        wrong = sum(r["mismatches"] for r in real)
        found["corruption"] = {
            "target": "no mismatch", "met": wrong == 0 and all(r["batches"] >= 10_000 for r in real),
            "mismatches": wrong, "batches": {r["depth"]: r["batches"] for r in real},
            "controls_find_something": {r["engine"]: r["mismatches"] > 0 for r in rows if r not in real},
        }  # fmt: skip
    rows = [r for r in sections["overlap"] if r["regime"] in ("long", "synced")]
    if rows:
        missed = [
            f"{r['form']} {r['finished_mib']} MiB {r['regime']}: {r['over_resident']['on']['median']:.3f}"
            for r in rows
            if r["over_resident"]["on"]["median"] > TARGET
        ]
        found["overlap"] = {
            "target": f"at most {TARGET} x a resident batch where reading and copying are shorter than compute",
            "met": not missed, "measured": len(rows), "missed": missed,
        }  # fmt: skip
    rows = sections["streams"]
    if rows:
        more = [r for r in rows if r["streams"] > 1]
        helped = [
            f"{r['streams']} at {r['finished_mib']} MiB: {r['over_one']['median']:.3f}"
            for r in more
            if r["over_one"]["high"] < 1 / TARGET
        ]
        found["streams"] = {"target": "one stream, more only where they help by 2 %", "more_help": helped}
    rows = sections["memory"]
    if rows:
        for synced in (True, False):
            over = [r["peak_over_predicted"] for r in rows if r["synced"] == synced]
            if over:
                name = "memory" if synced else "memory_where_the_host_runs_ahead"
                found[name] = {"target": "at most the prediction", "met": max(over) <= 1, "worst": max(over)}
    if sections["overlap"]:
        found["threshold"] = threshold_verdict(sections["overlap"])
    return found


# ------------------------------------------------------------------------------------------------------------ picture
def draw(result, path):
    """The sweep as small multiples, streams and memory below."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sections = result["sections"]
    figure = plt.figure(figsize=(15, 10.5), layout="constrained")
    grid = figure.add_gridspec(3, 4)
    colors = {"on": "#0072b2", "off": "#e69f00", "original": "#999999"}
    names = {"on": "prefetch", "off": "no prefetch", "original": "original design"}
    for y, form in enumerate(FORMS):
        for x, (key, regime) in enumerate(REGIMES.items()):
            axes = figure.add_subplot(grid[y, x])
            rows = [r for r in sections["overlap"] if (r["form"], r["regime"]) == (form, key)]
            rows.sort(key=lambda r: r["finished_mib"])
            for mode, color in colors.items():
                found = [r["over_resident"][mode] for r in rows]
                middle = [f["median"] for f in found]
                errors = [
                    [m - f["low"] for m, f in zip(middle, found, strict=True)],
                    [f["high"] - m for m, f in zip(middle, found, strict=True)],
                ]
                sizes = [r["finished_mib"] for r in rows]
                axes.errorbar(sizes, middle, errors, fmt="o-", ms=4, color=color, label=names[mode], capsize=2)
            axes.axhline(TARGET, color="#d55e00", lw=0.8, ls="--")
            axes.axvline(THRESHOLD, color="#009e73", lw=0.8, ls=":")
            axes.set_xscale("log")
            axes.set_xticks(SIZES, [f"{s // 1000}k" if s >= 1000 else str(s) for s in SIZES], fontsize=8)
            axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
            axes.set_title(f"{form} batches travel\n{regime.title}", fontsize=9)
            axes.set_xlabel("finished batch, MiB")
            if x == 0:
                axes.set_ylabel("step / step on a resident batch")
            if x == y == 0:
                axes.legend(frameon=False, fontsize=8)
            axes.grid(alpha=0.3)
    axes = figure.add_subplot(grid[2, :2])
    rows = [r for r in sections["memory"] if r["form"] == "compact"]
    for synced, color, label in ((True, "#0072b2", "host waits for each step"), (False, "#cc79a7", "host runs ahead")):
        for size, marker in zip(sorted({r["finished_mib"] for r in rows}), "os^", strict=False):
            chosen = [r for r in rows if r["synced"] == synced and r["finished_mib"] == size]
            axes.plot(
                [r["depth"] for r in chosen], [r["peak_over_predicted"] for r in chosen], marker + "-", color=color,
                label=f"{label}, {size} MiB",
            )  # fmt: skip
    axes.axhline(1, color="#d55e00", lw=0.8, ls="--")
    axes.set(xlabel="depth", ylabel="peak / prediction", xticks=[1, 2, 3, 4], title="memory, compact batches travel")
    if rows:
        axes.legend(frameon=False, fontsize=8)
    axes = figure.add_subplot(grid[2, 2:])
    sizes = sorted({r["finished_mib"] for r in sections["streams"]})
    for count, color in ((1, "#999999"), (2, "#56b4e9"), (4, "#0072b2")):
        chosen = {r["finished_mib"]: r["over_one"] for r in sections["streams"] if r["streams"] == count}
        at = [sizes.index(s) + {1: -0.25, 2: 0, 4: 0.25}[count] for s in chosen]
        axes.bar(
            at,
            [r["median"] for r in chosen.values()],
            0.23,
            color=color,
            label="1 stream" if count == 1 else f"{count} streams",
        )
    axes.set_xticks(range(len(sizes)), [str(s) for s in sizes])
    axes.set(xlabel="finished batch, MiB", ylabel="step / one stream", title="side streams, where the copy is longest")
    axes.set_ylim(0, 1.35)
    if sizes:
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")
    device = result["device"]
    title = f"{device['name']}, torch {device['torch']}, {result['machine']['date'][:10]}"
    if device["type"] == "cpu":
        title += f": {NO_STREAMS}"
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def try_to_draw(result, path):
    try:
        draw(result, path)
    except ImportError:
        print(f"no matplotlib here: draw with --plot-json {path.with_suffix('.json')}")
        return
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tests this program")
    parser.add_argument("--minutes", type=float, default=8, help="that all of it may take")
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--quick", action="store_true", help="few and small batches; proves nothing")
    parser.add_argument("--out", help="folder for the JSON and the PNG; by default benchmarks/results")
    parser.add_argument("--plot-json", metavar="FILE", help="draw the PNG of this JSON beside it, and measure nothing")
    args = parser.parse_args()
    if args.plot_json:
        source = Path(args.plot_json)
        try_to_draw(json.loads(source.read_text()), source.with_suffix(".png"))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here, so streams cannot be measured.", file=sys.stderr)
        raise SystemExit(2)
    if args.device == "cpu" and not args.out:
        parser.error("--device cpu needs --out: its figures do not belong to the results")
    backend = Cuda() if args.device == "cuda" else Cpu()
    if args.device == "cpu":
        print(f"Note: {NO_STREAMS}.")
    # The reserve is for writing, drawing and the longest single measurement.
    clock = Clock(60 * args.minutes - 20, {"corruption": 0.22, "memory": 0.15, "streams": 0.1, "overlap": 0.53})
    short = args.minutes < SHORT_MINUTES
    sizes = (1, 2) if args.quick else SHORT_SIZES if short else SIZES
    few = sizes[-1:] if args.quick else (100, 1000)
    rounds, steps = (2, 4) if args.quick else (args.rounds, 40)
    pool = ReadPool(default_workers())
    torch.manual_seed(0)
    try:
        sections = {
            "corruption": corruption(backend, clock, *((200, 1 << 14) if args.quick else (10_000, 1 << 20))),
            "memory": memory(backend, clock, few, pool),
            "streams": streams(backend, clock, few, pool, rounds, steps),
            "overlap": overlap(backend, clock, sizes, pool, rounds, steps, 0.2 if short else 0.5),
        }
    finally:
        pool.close()
    proves = backend.measures_streams and not args.quick
    result = {
        "machine": machine(), "device": backend.describe(), "threads_reading": pool.workers, "quick": args.quick,
        "says_something_about_streams": proves,
        "regimes": {key: regime.title for key, regime in REGIMES.items()}, "sections": sections,
        "left_out": clock.left_out, "verdicts": judge(sections) if proves else {}, "seconds": clock.spent(),
    }  # fmt: skip
    folder = Path(args.out) if args.out else Path(__file__).with_name("results")
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join(result["device"]["name"].lower().split()) if args.device == "cuda" else "cpu-no-streams"
    path = folder / f"gpu_streams-{result['machine']['date'][:10]}-{name}.json"
    path.write_text(json.dumps(result, indent=1))
    for key, verdict in result["verdicts"].items():
        print(f"{key}: {verdict if isinstance(verdict, str) else json.dumps(verdict)}")
    print(f"{len(clock.left_out)} left out, {clock.spent():.0f} s\n{path}")
    try_to_draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
