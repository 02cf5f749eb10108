"""Cost of drawing samples, and frequencies of classes beside those that a strategy promises.

    python benchmarks/sampling.py                            # start of an epoch, 10,000 descriptions, balanced and not
    python benchmarks/sampling.py --plot start.png           # the first of these as a picture
    python benchmarks/sampling.py --frequencies classes.png  # expected and achieved, on the synthetic volume

Volumes are metadata (`tests/sampling/bare.py`), except that for foreground each class of each crop has one chunk.
Seconds are CPU seconds of one thread.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from cellmap_lightning.crops.options import ReadOptions

sys.path.insert(0, str(Path(__file__).parents[1]))

from cellmap_lightning import CellMapDataLoader, CellMapDataModule, CellMapDataset, CellMapMultiDataset
from cellmap_lightning.datasets.frequencies import class_frequencies
from cellmap_lightning.demo.synthetic import demo_csv
from cellmap_lightning.sampling.strategies import parse_strategy
from tests.sampling.bare import write_bare

SPEC = {"shape": [64, 64, 64], "scale": [8, 8, 8]}
CROPS, CLASSES = 300, 48
DESCRIPTIONS = 10_000
SAMPLES = 2000
OURS, GREY = "#0b6fa4", "#9a9a9a"


def cpu():
    return time.process_time()


def crop(folder, number, edges, foreground, blob=None):
    """A crop of metadata with as many classes as counts are given."""
    raw = folder / f"v{number}.zarr" / "raw"
    write_bare(raw, [edges] * 3, [8, 8, 8])
    names = [f"c{i}" for i in range(len(foreground))]
    for name, count in zip(names, foreground, strict=True):
        there = folder / f"v{number}.zarr" / "crop" / name
        write_bare(there, [edges] * 3, [8, 8, 8], foreground=count)
        if blob is not None and count:
            file = there / "s0/0/0/0"
            file.parent.mkdir(parents=True)
            file.write_bytes(blob)
    return CellMapDataset(
        raw,
        f"{folder}/v{number}.zarr/crop/[{','.join(names)}]",
        names,
        {"raw": SPEC},
        {"labels": SPEC},
        is_train=True,
        read=ReadOptions(pad=True, max_workers=1),
    )


def start_of_an_epoch(folder):
    """[(voxels, CPU seconds, bytes)]: a new dataset of the default strategy, to its first samples' description.

    The median of seven, and what Python holds at most meanwhile. Each class has one chunk that is stored.
    """
    blob = (np.random.default_rng(0).random((64, 64, 64)) < 0.01).astype(np.uint8)
    found = []
    for power in range(6, 13):
        edges = round(10 ** (power / 3))
        seconds, sizes = [], []
        for trial in range(9):
            place = folder / f"{power}-{trial}"
            count = int(blob.sum())
            dataset = CellMapMultiDataset(
                [crop(place, n, edges, [count, count], blob.tobytes()) for n in range(2)], "mix"
            )
            measured = trial >= 7
            if measured:  # apart: it takes time
                tracemalloc.start()
            begun = cpu()
            loader = CellMapDataLoader(dataset, 4, samples_per_epoch=10**9)
            loader.dataset.prepare()
            dataset.draw(range(4), True, 0)
            seconds += [] if measured else [cpu() - begun]
            if measured:
                sizes.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
            dataset.close()
        found.append((edges**3, float(np.median(seconds)), min(sizes)))
        print(f"{edges**3:>16,} voxels  {1e3 * found[-1][1]:6.2f} ms CPU  {min(sizes) / 1024:7.0f} KiB", flush=True)
    return found


def descriptions(folder):
    """CPU seconds of 10,000 descriptions by strategy, at 300 crops of 48 classes."""
    rng = np.random.default_rng(0)
    blob = (rng.random((64, 64, 64)) < 0.01).astype(np.uint8)
    there = rng.random((CROPS, CLASSES)) < 0.3
    begun = time.perf_counter()
    edges = rng.choice([100, 100, 100, 50, 200, 400], CROPS)
    dataset = CellMapMultiDataset(
        [
            crop(folder, n, int(edges[n]), np.where(there[n], int(blob.sum()), 0).tolist(), blob.tobytes())
            for n in range(CROPS)
        ]
    )
    print(f"{CROPS} crops of {CLASSES} classes, written and opened in {time.perf_counter() - begun:.0f} s")
    used = {name: parse_strategy(name).on(dataset.crops) for name in ("uniform", "class_balanced", "foreground", "mix")}
    found = {}
    begun = cpu()
    used["class_balanced"].prepare()
    print(f"chances of {CROPS} x {CLASSES} from the counts of the metadata: {cpu() - begun:.2f} s, once")
    begun = cpu()
    dataset.draw(range(DESCRIPTIONS), True, 0, used["mix"])
    indices = len(dataset.crops._indices)
    print(f"the first {DESCRIPTIONS:,} of mix build {indices} indices of foreground: {cpu() - begun:.1f} s, once")
    dataset.crops._indices.clear()
    begun = cpu()
    dataset.draw(range(DESCRIPTIONS), True, 0, used["mix"])
    print(f"the same {indices} indices from the cache folder: {cpu() - begun:.1f} s, once per process")
    dataset.draw(range(DESCRIPTIONS), True, 0, used["foreground"])  # builds the rest
    times = {name: [] for name in used}
    for _ in range(7):  # in turn, so that what else the machine does hits all alike
        for name, strategy in used.items():
            begun = cpu()
            dataset.draw(range(DESCRIPTIONS), True, 0, strategy)
            times[name].append(cpu() - begun)
    for name, seconds in times.items():
        found[name] = float(np.median(seconds))
        print(
            f"{DESCRIPTIONS:,} descriptions, {name:<15} {found[name]:.3f} s CPU (median of {len(seconds)})", flush=True
        )
    print(f"class_balanced / uniform: {found['class_balanced'] / found['uniform']:.2f}")
    dataset.close()
    return found


def plot(found, path):
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    voxels, seconds, size = zip(*found, strict=True)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, values, label in (
        (axes[0], np.multiply(seconds, 1e3), "CPU ms"),
        (axes[1], np.divide(size, 1024), "peak of Python's memory, KiB"),
    ):
        axis.semilogx(voxels, values, "o-", color=OURS)
        axis.set(xlabel="voxels of each of 2 crops", ylabel=label, ylim=(0, 1.6 * max(values)))
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("From a new dataset to the description of its first samples (mix)", fontsize=10)
    figure.savefig(path, dpi=130)


def frequencies(folder, path):
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    data = CellMapDataModule(
        classes=["mito", "er", "nuc", "pm", "ecs", "ves"],
        input_arrays={"raw": {"shape": [8, 16, 16], "scale": [10.48, 8, 8]}},
        target_arrays={"labels": {"shape": [8, 16, 16], "scale": [10.48, 8, 8]}},
        csv_path=demo_csv(folder / "demo.zarr"),
    )
    names = ["uniform", "class_balanced", "foreground", "mix"]
    found = [class_frequencies(data.train_dataset, SAMPLES, strategy=name) for name in names]
    data.close()
    for table in found:
        print(table, end="\n\n")
    figure, axes = plt.subplots(2, len(names), figsize=(12, 5.2), layout="constrained", sharex=True, sharey="row")
    for column, (name, table) in enumerate(zip(names, found, strict=True)):
        rows = table.rows
        at = np.arange(len(rows))
        for axis, wanted, got in (
            (axes[0, column], [r.expected_drawn for r in rows], [r.drawn for r in rows]),
            (axes[1, column], [r.expected_crop for r in rows], [r.crop for r in rows]),
        ):
            error = [200 * table.error(w) for w in wanted]
            axis.bar(at, np.multiply(got, 100), 0.6, color=OURS, label="achieved")
            axis.errorbar(
                at, np.multiply(wanted, 100), error, fmt="_", color="black", markersize=13, capsize=3,
                label="expected, ±2 standard deviations",
            )  # fmt: skip
            axis.spines[["top", "right"]].set_visible(False)
        axes[1, column].plot(
            at,
            [100 * r.shown for r in rows],
            "D",
            color="#e07b00",
            label="samples whose patch shows the class, achieved",
        )
        axes[0, column].set_title(name, fontsize=11)
        axes[1, column].set_xticks(at, [r.name for r in rows])
    axes[0, 0].text(2.5, 20, "samples are drawn\nfor no class", ha="center", color=GREY)
    axes[0, 0].set_ylabel("samples drawn\nfor the class, %")
    axes[1, 0].set_ylabel("samples from a crop\nthat holds the class, %")
    axes[1, 0].set_ylim(0, 105)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Classes of the synthetic volume in {SAMPLES} samples of each strategy", fontsize=12)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="picture of the start of an epoch")
    parser.add_argument("--frequencies", type=Path, help="only this: picture of expected and achieved frequencies")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ["CELLMAP_CACHE_DIR"] = f"{place}/cache"
        if args.frequencies:
            frequencies(Path(place), args.frequencies)
            return
        found = start_of_an_epoch(Path(place))
        if args.plot:
            plot(found, args.plot)
        descriptions(Path(place) / "many")
        print(f"peak of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
