"""CPU time of reading volumes of other formats, beside the same reads with TensorStore alone.

    python benchmarks/formats.py

Random boxes of 64 voxels along each axis are read without a cache from an N5 dataset (gzip, blosc) and a precomputed
volume (raw, compressed_segmentation). Prints milliseconds of CPU time a box, the lowest of several passes, and the
ratio.
"""

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorstore

from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.readers import open_reader

SHAPE, BOX, BOXES, PASSES = (192, 192, 192), 64, 24, 5
BLOSC = {"type": "blosc", "cname": "zstd", "clevel": 3, "shuffle": 1}
SEGMENTATION = {"encoding": "compressed_segmentation", "compressed_segmentation_block_size": [8, 8, 8]}


def voxels():
    """Return smooth noise, which compresses as raw does: [z, y, x]."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 190, [n // 8 for n in SHAPE])
    fine = coarse.repeat(8, 0).repeat(8, 1).repeat(8, 2)
    return (fine + rng.integers(0, 6, SHAPE)).astype(np.uint8)


def n5(folder, compression):
    metadata = {"dimensions": SHAPE[::-1], "blockSize": [64] * 3, "dataType": "uint8", "compression": compression}
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": str(folder)}}
    store = tensorstore.open(spec | {"metadata": metadata | {"resolution": [8, 8, 8]}}, create=True).result()
    store[...] = voxels().T
    return store


def precomputed(folder, **scale):
    kind = "uint32" if scale.get("encoding") == "compressed_segmentation" else "uint8"
    spec = {"driver": "neuroglancer_precomputed", "kvstore": {"driver": "file", "path": str(folder)}}
    metadata = {
        "multiscale_metadata": {"data_type": kind, "num_channels": 1, "type": "image"},
        "scale_metadata": {
            "size": SHAPE[::-1],
            "resolution": [8] * 3,
            "chunk_size": [64] * 3,
            "encoding": "raw",
            **scale,
        },
    }
    store = tensorstore.open(spec | metadata, create=True).result()
    store[..., 0] = (voxels() // 16).astype(kind).T
    return store[..., 0]


def measure(read):
    """Return the lowest CPU time of several passes over the same boxes, in ms a box."""
    starts = np.random.default_rng(1).integers(0, np.subtract(SHAPE, BOX), (BOXES, 3)).tolist()
    times = []
    for _ in range(PASSES):
        began = time.process_time()
        for start in starts:
            read(start)
        times.append(time.process_time() - began)
    return 1000 * min(times) / BOXES


def main():
    cases = {
        "N5 gzip": lambda folder: n5(folder, {"type": "gzip"}),
        "N5 blosc": lambda folder: n5(folder, BLOSC),
        "precomputed raw": precomputed,
        "precomputed segmentation": lambda folder: precomputed(folder, **SEGMENTATION),
    }
    print(f"{'format':26} {'this package':>14} {'TensorStore':>12} {'ratio':>6}")
    for name, write in cases.items():
        root = Path(tempfile.mkdtemp())
        try:
            store = write(root / "volume")
            reader = open_reader(read_image(str(root / "volume")).finest)
            ours = measure(lambda start, r=reader: r.read(tuple(start), (BOX,) * 3))

            def plain(start, store=store):
                z, y, x = start
                box = store[x : x + BOX, y : y + BOX, z : z + BOX].read().result()
                return np.ascontiguousarray(box.T)

            theirs = measure(plain)
        finally:
            shutil.rmtree(root)
        print(f"{name:26} {ours:11.2f} ms {theirs:9.2f} ms {ours / theirs:6.2f}")


if __name__ == "__main__":
    main()
