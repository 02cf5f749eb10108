"""Reads of a distant store: requests per second, second epochs, and the opening of many crops.

    python benchmarks/remote.py

A server on loopback, in a separate process, lets every request wait 50 ms (``--latency``), as a distant store does.
So many requests under way at a time can give ``concurrency / latency`` of them per second at most. `fill` reads every
chunk of a volume once through a dataset with as many threads; each of them asks for all chunks of a box at a time, so
that more than one request per thread can be under way. `second epoch` reads the same again; `open` is the time from
the list of crops to a dataset that can be read, for crops of three classes that lie in one raw volume.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cellmap_lightning.crops.options import ReadOptions

sys.path.insert(0, str(Path(__file__).parents[1]))

CHUNK, LENGTH = 32, 256
CLASSES = ["a", "b", "c"]


def write(folder, crops):
    from cellmap_lightning.io.writer import ArrayOptions, write_multiscale

    rng = np.random.default_rng(0)
    raw = rng.integers(1, 255, (LENGTH,) * 3).astype(np.uint8)
    chunks = (CHUNK,) * 3
    write_multiscale(
        folder / "v.zarr" / "raw", raw, scale=(8, 8, 8), translation=(4, 4, 4), storage=ArrayOptions(chunks=chunks)
    )
    labels = (raw[:64, :64, :64] > 128).astype(np.uint8)
    first = folder / "v.zarr" / "crop0"
    for name in CLASSES:
        write_multiscale(
            first / name, labels, scale=(8, 8, 8), translation=(4, 4, 4), storage=ArrayOptions(chunks=chunks)
        )
    for number in range(1, crops):
        (folder / "v.zarr" / f"crop{number}").symlink_to(first, target_is_directory=True)


def serve(folder, latency, link, ended):
    from tests.io.faults import serving

    with serving(Path(folder), latency=latency) as (url, asked):
        link.send(url)
        while not ended.is_set():
            if link.poll(0.05):
                link.recv()
                link.send(sum(asked.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--crops", type=int, nargs="+", default=[30, 100, 300])
    args = parser.parse_args()

    from cellmap_lightning import CellMapDataLoader, CellMapDataset
    from cellmap_lightning.splits.datasplit import CellMapDataSplit

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), max(args.crops))
        context = multiprocessing.get_context("fork")
        link, other = context.Pipe()
        ended = context.Event()
        server = context.Process(target=serve, args=(folder, args.latency, other, ended), daemon=True)
        server.start()
        try:
            url = link.recv()

            def requests():
                link.send(None)
                return link.recv()

            spec = {"raw": {"shape": [CHUNK * 2] * 3, "scale": [8, 8, 8]}}
            chunks = (LENGTH // CHUNK) ** 3
            print(f"each request waits {1000 * args.latency:.0f} ms; {chunks} chunks of {CHUNK}^3 voxels")
            for concurrency in args.concurrency:
                with CellMapDataset(
                    f"{url}/v.zarr/raw", input_arrays=spec, read=ReadOptions(cache="memory", max_workers=concurrency)
                ) as dataset:
                    loader = CellMapDataLoader(dataset, 8, is_train=False)
                    before, began = requests(), time.perf_counter()
                    for _ in loader:
                        pass
                    seconds, asked = time.perf_counter() - began, requests() - before
                    before, began = requests(), time.perf_counter()
                    for _ in loader:
                        pass
                    second, again = time.perf_counter() - began, requests() - before
                most = concurrency / args.latency
                print(
                    f"fill, concurrency {concurrency:>2}: {asked} requests in {seconds:5.2f} s, {asked / seconds:4.0f} "
                    f"per second, {asked / seconds / most:4.0%} of {most:.0f}; second epoch {again} requests,"
                    f" {second:.2f} s",
                    flush=True,
                )
            targets = {"labels": {"shape": [32] * 3, "scale": [8, 8, 8]}}
            for crops in args.crops:
                entries = [
                    {"raw": f"{url}/v.zarr/raw", "gt": f"{url}/v.zarr/crop{n}/[{','.join(CLASSES)}]"}
                    for n in range(crops)
                ]
                split = CellMapDataSplit(
                    datasets={"train": entries},
                    classes=CLASSES,
                    input_arrays={"raw": targets["labels"]},
                    target_arrays=targets,
                    read=ReadOptions(cache="none"),
                )
                before, began = requests(), time.perf_counter()
                split["train"]
                seconds, asked = time.perf_counter() - began, requests() - before
                print(
                    f"open {crops:>3} crops of {len(CLASSES)} classes: {seconds:5.2f} s, {asked} requests, "
                    f"{asked * args.latency / seconds:.0f} under way at a time",
                    flush=True,
                )
                split.close()
        finally:
            ended.set()
            server.join(10)


if __name__ == "__main__":
    main()
