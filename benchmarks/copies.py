"""The speed of copying a box of voxels in every orientation, beside a plain assignment of NumPy.

    python benchmarks/copies.py
    python benchmarks/copies.py --patch 128 --bytes 2 12

Boxes lie at random places of an array in memory. CPU ms per copy, the least of several rounds, averaged over the eight
flips of each order of axes.
"""

import argparse
import itertools
import time

import numpy as np

from cellmap_lightning.cache.copying import copy_voxels

SIZE = 300


def assign(target, source):
    """The plain assignment."""
    target[...] = source


def measured(function, target, volume, patch, seconds, rng):
    """CPU ms per copy."""
    best = float("inf")
    for _ in range(3):
        copies, began = 0, time.process_time()
        while copies < 3 or time.process_time() - began < seconds:
            z, y, x = rng.integers(0, SIZE - patch, 3).tolist()
            function(target, volume[z : z + patch, y : y + patch, x : x + patch])
            copies += 1
        best = min(best, (time.process_time() - began) / copies * 1e3)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, default=64, help="voxels a side")
    parser.add_argument("--bytes", type=int, nargs="+", default=[1, 2, 12], help="bytes per voxel")
    parser.add_argument("--seconds", type=float, default=0.02, help="of each measurement")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print("| bytes per voxel | order of axes | assigned, ms | copied, ms | ratio |\n|---|---|---|---|---|")
    for depth in args.bytes:
        shape = (SIZE,) * 3 if depth == 1 else (SIZE, SIZE, SIZE, depth)
        volume = rng.integers(0, 256, shape, np.uint8)
        for order in itertools.permutations(range(3)):
            ms = {assign: [], copy_voxels: []}
            for flips in itertools.product((1, -1), repeat=3):
                patch = np.empty((*[args.patch] * 3, *shape[3:]), np.uint8)
                target = patch.transpose(*order, *range(3, patch.ndim))[tuple(slice(None, None, f) for f in flips)]
                for function, found in ms.items():
                    found.append(measured(function, target, volume, args.patch, args.seconds, rng))
            plain, ours = np.mean(ms[assign]), np.mean(ms[copy_voxels])
            print(f"| {depth} | {order} | {plain:.3f} | {ours:.3f} | {plain / ours:.1f} |", flush=True)


if __name__ == "__main__":
    main()
