"""Speed and memory of segmentation out of core beside the same library on a whole array.

    python benchmarks/segmentation.py --sizes 256 512 --methods components watershed --report FILE.md

Each measurement is a separate process with one thread. `blocks` reads a stored prediction (uint8, chunks of 64^3),
segments it block by block with the default halo, joins, and writes ids, their pyramid and the list of objects.
`library` segments the same array in memory in one piece, with the same functions, and writes nothing. The volume
consists of touching spheres, as a network with noise would predict them: one cube of 128^3, repeated along the axes.
With `--isolated` it consists of single voxels, every second one along each axis, for the memory of many objects.

CPU time is user + system. Memory is the highest resident size above that after the imports. Figures are medians over
the rounds.
"""

import argparse
import datetime as dt
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CUBE = 128
METHODS = ("components", "watershed", "mutex_watershed", "agglomeration")
OPTIONS = {"agglomeration": {"merge_threshold": 0.75}}


def write_volume(path, size, affinities, isolated=False):
    """Write a prediction of ``size``^3 voxels, cube by cube."""
    import numpy as np
    import zarr

    from tests.instances.volumes import OFFSETS, affinities_of, probability_of, touching_spheres, write_prediction

    ids = touching_spheres((CUBE,) * 3)
    values = affinities_of(ids) if affinities else probability_of(ids)[None]
    if isolated:
        values[:] = 0
        values[:, ::2, ::2, ::2] = 255
    count = len(values)
    attributes = {"kind": "affinities", "offsets": OFFSETS} if affinities else {}
    empty = np.zeros((count, 64, 64, 64), np.uint8)
    write_prediction(path, empty if affinities else empty[0], kind="scaled", attributes=attributes, chunks=(64,) * 3)
    array = zarr.open_array(str(path / "mito" / "s0"), mode="r+")
    array.resize((*array.shape[:-3], size, size, size))
    for z in range(0, size, CUBE):
        for y in range(0, size, CUBE):
            for x in range(0, size, CUBE):
                box = (slice(z, z + CUBE), slice(y, y + CUBE), slice(x, x + CUBE))
                array[(slice(None), *box) if affinities else box] = values if affinities else values[0]


def measure(path, method, way, block_mb):
    """Segment a stored prediction, and print its figures."""
    from cellmap_lightning.instances.options import SegmentationOptions, StorageOptions
    from cellmap_lightning.instances.segmenter import BlockSegmenter
    from cellmap_lightning.instances.source import open_source
    from cellmap_lightning.instances.volume import VolumeSegmentation

    source = open_source(str(path), "mito")
    options = SegmentationOptions(method, **OPTIONS.get(method, {}))
    small = SegmentationOptions(method, halo=1, **OPTIONS.get(method, {}))
    warm = source.read((0, 0, 0), (32, 32, 32))
    BlockSegmenter.of(source, small)(warm)  # imports
    before = resource.getrusage(resource.RUSAGE_SELF)
    if way == "library":
        objects = int(BlockSegmenter.of(source, options)(source.read((0, 0, 0), source.lattice.shape)).max())
    else:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            storage = StorageOptions(block_size_mb=block_mb, check_space=False)
            volume = VolumeSegmentation(source, Path(folder) / "out.zarr", options, storage)
            objects = volume.run(report=lambda _: None).objects
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    memory = (after.ru_maxrss - before.ru_maxrss) / 1024
    print(json.dumps({"cpu": cpu, "mib": memory, "objects": objects}))


def measured(*arguments):
    """Run one measurement in a separate process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[256], help=f"voxels along an axis, multiples of {CUBE}"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--block-mb", type=float, default=2048)
    parser.add_argument("--isolated", action="store_true", help="single voxels instead of spheres")
    parser.add_argument("--no-library", action="store_true", help="leave out the whole array in memory")
    parser.add_argument("--report", type=Path, help="a Markdown file to write")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        path, method, way, block_mb = given.measure
        measure(Path(path), method, way, float(block_mb))
        return
    ways = ["blocks"] if given.no_library else ["blocks", "library"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in given.sizes:
            for affinities in (False, True):
                methods = [m for m in given.methods if (m in METHODS[2:]) == affinities]
                if not methods:
                    continue
                path = Path(folder) / f"{size}-{affinities}.zarr"
                write_volume(path, size, affinities, given.isolated)
                for method in methods:
                    for way in ways:
                        runs = [measured(path, method, way, given.block_mb) for _ in range(given.rounds)]
                        cpu = statistics.median(run["cpu"] for run in runs)
                        memory = statistics.median(run["mib"] for run in runs)
                        speed = size**3 / cpu / 1e6
                        rows.append(
                            f"| {size}^3 | {method} | {way} | {speed:.1f} | {memory:.0f} | {runs[0]['objects']} |"
                        )
                        print(rows[-1], flush=True)
    head = ["| volume | method | way | million voxels per CPU second | MiB | objects |", "|---|---|---|---:|---:|---:|"]
    text = "\n".join([*head, *rows])
    command = f"python benchmarks/segmentation.py {' '.join(sys.argv[1:])}"
    title = f"# Segmentation, {dt.date.today()}\n\nPython {platform.python_version()}, `{command}`:\n\n"
    if given.report:
        given.report.write_text(f"{title}{text}\n", encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
