"""The persistent thread pool against one that is created for each call: the gain per call and per sample.

    python benchmarks/executor.py

Three answers, from one run. **Access**: making a pool and shutting it down, over reading the property `executor` of
the package's own `ReadPool`; the figure that such a pool is advertised with, and says nothing about work. **Work**: the
same tasks, which do nothing, through a new pool and through the persistent one. **A sample**: what the difference is
per sample, if each sample made a pool as cellmap-data 2025.6 did, beside what a sample of the synthetic volume costs.

Each round measures everything once; figures are medians over the rounds, ratios are taken within a round. CPU is user +
system of all threads of the process.
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from loaders import machine

from cellmap_lightning import CellMapDataset
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.demo.synthetic import write_volume
from cellmap_lightning.runtime.thread_pool import ReadPool

TARGET = 33.1
TASKS = (1, 4, 9)  # 9: raw and eight classes, a task each
CLASSES = ("mito", "er", "er_mem", "nuc", "pm", "cyto")
PATCH = {"shape": [32, 64, 64], "scale": [5.24, 4, 4]}
CREATE, ACCESS = "new pool, no task", "access to ReadPool.executor"


def name_of(which, count):
    return f"{which} pool, {count} task{'s' if count > 1 else ''}"


def nothing():
    """A task."""


def through(executor, count):
    for future in [executor.submit(nothing) for _ in range(count)]:
        future.result()


def anew(workers, count):
    with ThreadPoolExecutor(workers) as executor:
        through(executor, count)


def create(workers):
    ThreadPoolExecutor(workers).shutdown()


def timed(call, calls):
    """Microseconds per call, wall and CPU; the loop itself is measured and taken off."""
    spans = []
    for what in (nothing, call):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            what()
        spans.append((time.perf_counter() - wall, time.process_time() - cpu))
    return tuple(max(0.0, 1e6 * (full - empty) / calls) for empty, full in zip(*spans, strict=True))


def measurements(pool):
    """The measured call, and how many calls of it make a round."""
    kept = pool.executor
    found = {CREATE: (lambda: create(pool.workers), 500), ACCESS: (lambda: pool.executor, 50_000)}
    for count in TASKS:
        found[name_of("new", count)] = (lambda n=count: anew(pool.workers, n), 50)
        found[name_of("persistent", count)] = (lambda n=count: through(kept, n), 200)
    return found


def samples(folder, workers):
    """For each way of keeping voxels, a function that reads one sample, and how many a round reads."""
    volume = write_volume(Path(folder) / "volume.zarr")
    target = f"{volume.path}/recon-1/labels/groundtruth/crop2/[{','.join(CLASSES)}]"
    found = {}
    for cache, calls in (("memory", 50), ("none", 5)):
        dataset = CellMapDataset(
            volume.raw_path,
            target,
            CLASSES,
            {"raw": PATCH},
            {"labels": PATCH},
            read=ReadOptions(cache=cache, max_workers=workers),
        )
        places = len(dataset)
        turn = iter(range(10**9))
        found[cache] = (lambda d=dataset, n=places, t=turn: d[(next(t) * 7919) % n], calls, dataset)
    return found


def middle(rounds, name, which=0):
    return statistics.median(r[name][which] for r in rounds)


def ratios(rounds, over, under, which=0):
    """Median, lowest and highest of the ratios within a round."""
    found = sorted(r[over][which] / r[under][which] for r in rounds if r[under][which])
    return statistics.median(found), found[0], found[-1]


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def shown(ratio):
    return f"{number(ratio[0])}x ({number(ratio[1])} to {number(ratio[2])})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4, help="threads of a pool")
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pool = ReadPool(args.workers)
    with tempfile.TemporaryDirectory() as folder:
        reads = samples(folder, args.workers)
        for read, calls, _ in reads.values():
            for _ in range(max(20, calls)):
                read()
        work = measurements(pool)
        through(pool.executor, 64)  # so that its threads are there
        rounds = []
        for _ in range(args.rounds):
            row = {name: timed(call, calls) for name, (call, calls) in work.items()}
            row |= {f"sample, cache={name}": timed(read, calls) for name, (read, calls, _) in reads.items()}
            rounds.append(row)
        for _, _, dataset in reads.values():
            dataset.close()
        pool.close()

    print(f"Pools of {args.workers} threads; medians of {args.rounds} interleaved rounds.\n")
    print("| what | wall µs | CPU µs |\n|---|---|---|")
    for name in rounds[0]:
        print(f"| {name} | {number(middle(rounds, name))} | {number(middle(rounds, name, 1))} |")
    print("\n| ratio, median (lowest to highest round) | wall | CPU |\n|---|---|---|")
    pairs = {
        "**Access**: new pool without a task / access": (CREATE, ACCESS),
        "new pool with 1 task / access": (name_of("new", 1), ACCESS),
    }
    for count in TASKS:
        title = f"{'**Work**: ' if count == TASKS[0] else ''}{count} task{'s' if count > 1 else ''}, new / persistent"
        pairs[title] = (name_of("new", count), name_of("persistent", count))
    for title, (over, under) in pairs.items():
        print(f"| {title} | {shown(ratios(rounds, over, under))} | {shown(ratios(rounds, over, under, 1))} |")
    bare, used = (ratios(rounds, over, ACCESS, 1)[0] for over in (CREATE, name_of("new", 1)))
    print(
        f"\nTarget: access takes at most 1/{TARGET} of making a pool and shutting it down (CPU). A pool that is given "
        f"a task, and so starts a thread, as every pool does that is used: {used:.3g}x, "
        f"{'met' if used >= TARGET else 'not met'}. A pool that is made and never used: {bare:.3g}x, "
        f"{'met' if bare >= TARGET else 'not met'}."
    )
    print("\nPer sample, if each made a pool for its tasks and shut it down:\n")
    print(
        "| tasks | saved wall µs | saved CPU µs | of a sample's CPU, voxels in memory | of a sample's CPU, no cache |"
    )
    print("|---|---|---|---|---|")
    for count in TASKS:
        saved = [
            statistics.median(r[name_of("new", count)][which] - r[name_of("persistent", count)][which] for r in rounds)
            for which in (0, 1)
        ]
        shares = [saved[1] / (saved[1] + middle(rounds, f"sample, cache={name}", 1)) for name in ("memory", "none")]
        print(f"| {count} | {saved[0]:.0f} | {saved[1]:.0f} | {shares[0]:.1%} | {shares[1]:.1%} |")
    print(
        f"\nA sample is raw and {len(CLASSES)} classes of {'x'.join(map(str, PATCH['shape']))} voxels of the synthetic "
        f"volume, finished: {middle(rounds, 'sample, cache=memory', 1):.0f} µs of CPU with its voxels in memory, "
        f"{middle(rounds, 'sample, cache=none', 1):.0f} without a cache. {TASKS[-1]} tasks are raw and eight classes, "
        "one each. Shares are of the sample and such a pool together. A sample that small whose voxels are in memory "
        "is read by its caller: there a pool per sample would be no use at all, and the persistent one saves nothing."
    )
    here = machine()
    print(f"\n- {here['cpu']}, {here['cores']} cores; {here['date']}")


if __name__ == "__main__":
    main()
