"""Growth of memory: that of the process tree, pages of files left out, over many samples.

    python benchmarks/memory.py --data FOLDER

Two runs draw finished 64^3 samples: decoded voxels cached on disk, where they are pages of a file and cost no memory of
the process, and cached in memory. The slope is that of a line through the memory after every 1,000 samples. The peak is
above the level after the imports, less the bytes that the cache was allowed to hold in memory.
"""

import argparse
import shutil
import sys
import tempfile

import numpy as np
from data import ensure
from loaders import machine
from measure import run

TARGET = 1.0
MB = 1e6


def slope(samples, memory):
    """MB per 1,000 samples."""
    return float(np.polyfit(np.asarray(samples) / 1000, np.asarray(memory) / MB, 1)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the volume, which is written if it is not there")
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--every", type=int, default=1_000)
    parser.add_argument("--warm-samples", type=int, default=2_000, help="not followed")
    parser.add_argument("--workers", type=int, default=0, help="worker processes")
    parser.add_argument("--cache-bytes", type=int, default=256_000_000, help="of what is cached in memory")
    parser.add_argument("--compact", action="store_true", help="batches as they travel instead of finished ones")
    parser.add_argument("--trace", action="store_true", help="print every figure")
    args = parser.parse_args()
    ensure(args.data)
    name = "ours" if args.compact else "ours-finished"
    print(f"{args.samples} samples of 64³, 8 classes, {'compact' if args.compact else 'finished'}.")
    print(f"Target: below {TARGET:g} MB per 1,000 samples.\n")
    print("| decoded voxels | MB per 1,000 samples | peak above imports, MB | less the budget, MB | met |")
    print("|---|---|---|---|---|", flush=True)
    traces = {}
    for where, option, budget in (
        ("on disk", {"cache": "disk"}, 0),
        ("in memory", {"cache": "memory", "cache_bytes": args.cache_bytes}, args.cache_bytes),
    ):
        cache_dir = tempfile.mkdtemp(prefix="cache-", dir=args.data)
        try:
            result = run(
                sys.executable, name, args.data, cache_dir, timeout=3600, draw=args.samples, every=args.every,
                warm_samples=args.warm_samples, workers=args.workers, option=option,
            )  # fmt: skip
        finally:
            shutil.rmtree(cache_dir, ignore_errors=True)
        if "memory_bytes" not in result:
            raise SystemExit(f"{where}: {result.get('skipped') or result.get('failed')}")
        memory = np.array(result["memory_bytes"])
        samples = np.arange(len(memory)) * result["every"]
        grows = slope(samples, memory)
        peak = memory.max() / MB - result["memory_imported_mb"]
        met = "yes" if grows < TARGET else "no"
        print(f"| {where} | {grows:.3f} | {peak:.0f} | {peak - budget / MB:.0f} | {met} |", flush=True)
        traces[where] = [round(m / MB, 1) for m in memory.tolist()]
    if args.trace:
        for where, found in traces.items():
            print(f"\n{where}, MB: {found}")
    here = machine()
    print(f"\n- {here['cpu']}, {here['cores']} cores; {here['date']}")


if __name__ == "__main__":
    main()
