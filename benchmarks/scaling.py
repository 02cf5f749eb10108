"""CPU ms per sample against the number of crops and of classes, and the time to construct 300 crops of 48 classes.

    python benchmarks/scaling.py --data FOLDER --plot scaling.png

The crops are small (40^3, patches of 32^3, 8 classes) and share one raw volume; they differ in their place alone, so
what grows is what ours does for each crop. The classes are those of one crop of 160^3, in patches of 64^3.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from data import MOST_CLASSES, ensure
from loaders import machine
from measure import run

CROPS = (1, 10, 100, 300)
CLASSES = (1, 8, 16, 32, MOST_CLASSES)
TARGET = 10.0
SHOWN = {"ours": "compact", "ours-finished": "finished"}


def figure(path, by_crops, by_classes):
    """Both curves, side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plot, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, title in SHOWN.items():
        for ax, found in zip(axes, (by_crops, by_classes), strict=True):
            counts = sorted(n for n, key in found if key == name)
            ax.plot(counts, [found[n, name]["cpu_ms"] for n in counts], "o-", label=title)
    axes[0].set(xscale="log", xticks=CROPS, xlabel="crops (8 classes, 32³)", ylabel="CPU ms per sample")
    axes[1].set(xticks=CLASSES, xlabel="classes (one crop, 64³)")
    axes[0].xaxis.set_major_formatter("{x:.0f}")
    axes[0].xaxis.set_minor_locator(mpl.ticker.NullLocator())
    for ax in axes:
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    plot.savefig(path, dpi=150)
    plt.close(plot)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder for the volumes, which are written if they are not there")
    parser.add_argument("--plot", help="PNG; by default scaling.png in that folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--json", help="file for the raw numbers")
    args = parser.parse_args()
    ensure(args.data, "crops", raw_size=256, crop_size=40, classes=MOST_CLASSES, crops=max(CROPS), levels=1)
    ensure(args.data, "classes", raw_size=256, crop_size=160, classes=MOST_CLASSES, crops=1, levels=1)
    results = {"crops": {}, "classes": {}}
    construction = []
    cache_dir = tempfile.mkdtemp(prefix="cache-", dir=args.data)

    def add(volume, key, **arguments):
        result = run(
            sys.executable, key[1], args.data, cache_dir, name=volume, seconds=args.seconds, warm_seconds=1, **arguments
        )
        if "cpu_ms" not in result:
            raise SystemExit(f"{key}: {result.get('skipped') or result.get('unsupported') or result.get('failed')}")
        results[volume].setdefault(key, []).append(result)
        print(f"{key[0]} {volume}, {SHOWN[key[1]]}: {result['cpu_ms']:.3g} ms", file=sys.stderr, flush=True)

    try:
        for _ in range(args.rounds):
            for name in SHOWN:
                for count in CROPS:
                    # So many that hardly a crop is read for the first time in the window.
                    add("crops", (count, name), patch=32, crops=count, warm_samples=12 * count)
                for count in CLASSES:
                    add("classes", (count, name), patch=64, classes=count, warm_samples=500)
            with tempfile.TemporaryDirectory(prefix="cache-", dir=args.data) as empty:
                result = run(
                    sys.executable, "ours", args.data, empty, name="crops", patch=32, crops=max(CROPS),
                    classes=MOST_CLASSES, seconds=0,
                )  # fmt: skip
            if "construct_s" not in result:
                raise SystemExit(f"construction: {result.get('failed')}")
            construction.append(result)
    finally:
        shutil.rmtree(cache_dir, ignore_errors=True)

    medians = {
        volume: {key: {"cpu_ms": statistics.median(r["cpu_ms"] for r in rounds)} for key, rounds in found.items()}
        for volume, found in results.items()
    }
    print(f"CPU ms per sample of ours, median of {args.rounds} rounds.\n")
    for volume, counts in (("crops", CROPS), ("classes", CLASSES)):
        print(f"| {volume} | " + " | ".join(f"{title} ms" for title in SHOWN.values()) + " |\n|---|---|---|")
        for count in counts:
            print(f"| {count} | " + " | ".join(f"{medians[volume][count, n]['cpu_ms']:.3f}" for n in SHOWN) + " |")
        print()
    took = [r["construct_s"] for r in construction]
    first = statistics.median(r["first_batch_s"] for r in construction)
    print(
        f"{max(CROPS)} crops of {MOST_CLASSES} classes are constructed in {statistics.median(took):.2f} s (slowest "
        f"{max(took):.2f}), the first batch is there after {first:.2f} s; target below {TARGET:g} s: "
        f"{'met' if max(took) < TARGET else 'not met'}"
    )
    plot = Path(args.plot) if args.plot else Path(args.data) / "scaling.png"
    figure(plot, medians["crops"], medians["classes"])
    here = machine()
    print(f"\n- {plot}\n- {here['cpu']}, {here['cores']} cores; {here['date']}")
    if args.json:
        flat = {
            v: [{"count": k[0], "name": k[1], "rounds": r} for k, r in found.items()] for v, found in results.items()
        }
        Path(args.json).write_text(json.dumps({"machine": here, **flat, "construction": construction}, indent=1))


if __name__ == "__main__":
    main()
