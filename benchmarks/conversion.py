"""CPU and wall time of cellmap-convert for a TIFF stack, beside reading and compressing the same voxels alone.

    python benchmarks/conversion.py             # 256 MB
    python benchmarks/conversion.py --mb 1024

The stack has 8-bit pages, without compression and with deflate. "alone" reads pages with tifffile and compresses
chunks with the same codec, in as many threads, and writes nothing: no files, no pyramid, no comparison with the input.
Both run alternately, and the lowest time of each counts.
"""

import argparse
import itertools
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numcodecs
import numpy as np
import tifffile

from cellmap_lightning.conversion import convert as conversion
from cellmap_lightning.conversion.options import ConversionOptions
from cellmap_lightning.io.writer import codec_of
from cellmap_lightning.runtime.thread_pool import default_workers

PAGE, CHUNK, PASSES = 1024, 64, 3


def write_stack(path, pages, compression):
    """Write smooth noise, which compresses as raw does, page by page."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 190, (pages // 8 + 1, PAGE // 8, PAGE // 8), np.uint8)
    with tifffile.TiffWriter(path) as file:
        for number in range(pages):
            page = coarse[number // 8].repeat(8, 0).repeat(8, 1) + rng.integers(0, 12, (PAGE, PAGE), np.uint8)
            file.write(page, compression=compression, photometric="minisblack", metadata=None)


def alone(path, workers):
    """Read the pages, and compress the chunks."""
    codec = numcodecs.get_codec(codec_of("zstd", 2, conversion.COMPRESSION_LEVEL))

    def compress(slab, corner):
        y, x = corner
        return len(codec.encode(np.ascontiguousarray(slab[:, y : y + CHUNK, x : x + CHUNK])))

    corners = list(itertools.product(range(0, PAGE, CHUNK), repeat=2))
    with tifffile.TiffFile(path) as file, ThreadPoolExecutor(workers) as pool:
        for first in range(0, len(file.pages), CHUNK):
            slab = file.asarray(key=range(first, min(first + CHUNK, len(file.pages))), maxworkers=workers)
            sum(pool.map(lambda corner, slab=slab: compress(slab, corner), corners))


def measured(function):
    cpu, began = time.process_time(), time.perf_counter()
    function()
    return time.process_time() - cpu, time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=256, help="size of the stack")
    parser.add_argument("--workers", type=int, help="threads; those of reading by default")
    arguments = parser.parse_args()
    workers = default_workers(arguments.workers, False)
    print(f"{'stack':10} {'':>10} {'convert':>9} {'alone':>9} {'alone / convert':>16}")
    with tempfile.TemporaryDirectory() as folder:
        for compression in (None, "deflate"):
            path = Path(folder) / f"{compression}.tif"
            write_stack(path, arguments.mb << 20 >> 20, compression)
            times = {"convert": [], "alone": []}
            for number in range(PASSES):
                options = ConversionOptions(
                    input=str(path), output=f"{folder}/{compression}-{number}.zarr", voxel_size=(8, 8, 8),
                    workers=arguments.workers,
                )  # fmt: skip
                times["convert"].append(measured(lambda o=options: conversion.convert(o)))
                times["alone"].append(measured(lambda p=path: alone(p, workers)))
            for index, unit in enumerate(("CPU", "wall")):
                ours, theirs = (min(t[index] for t in times[name]) for name in ("convert", "alone"))
                print(f"{compression or 'plain':10} {unit:>10} {ours:7.2f} s {theirs:7.2f} s {theirs / ours:15.0%}")


if __name__ == "__main__":
    main()
