"""The CPU time of gathering batches from resident voxels, over that of reading them on the host.

    python benchmarks/device_gather.py

Both run on the CPU, in one thread, from memory: raw of one byte and 8 classes as bits. The code of the first is that of
a GPU, where it costs something else; this shows that nothing in it is out of proportion.
"""

import argparse
import os
import tempfile
import time

import torch
from data import ensure
from gpu_training import CLASSES, SPATIAL

from cellmap_lightning import CellMapDataset
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.loading.resident_reader import ResidentReader
from cellmap_lightning.resident.device_cache import DeviceCache

TURNS = {
    "shifted": None,
    "mirrored": SPATIAL["mirrored"],
    "mirrored and transposed": {**SPATIAL["mirrored"], "transpose": {"axes": ["z", "y", "x"]}},
    "rotated about z": {"rotate": {"axes": {"z": [-180, 180]}}},
    "rotated": SPATIAL["rotated"],
    "rotated + elastic": SPATIAL["rotated + elastic"],
}
TARGET, BATCH = 3.0, 8


def cpu_ms(function, rounds):
    """The least CPU milliseconds per sample."""
    function()
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        result = function()
        best = min(best, time.process_time() - began)
        del result
    return 1e3 * best / BATCH


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--edges", type=int, nargs="+", default=[64, 96, 128])
    args = parser.parse_args()
    torch.set_num_threads(1)
    worst = 0.0
    print("| patch | augmentation | host, ms | gathered, ms | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CELLMAP_CACHE_DIR"] = f"{folder}/cache"
        size = 2 * max(args.edges)
        volume = ensure(folder, levels=1, classes=CLASSES, raw_size=size, crop_size=size * 3 // 4)
        target = f"{volume['root']}/{volume['crops'][0]['path']}/[{','.join(volume['classes'])}]"
        for edge in args.edges:
            patch = {"shape": [edge] * 3, "scale": [volume["scale"]] * 3}
            for name, spatial in TURNS.items():
                read = ReadOptions(pad=True, cache="memory", max_workers=1)
                with CellMapDataset(
                    f"{volume['root']}/raw", target, volume["classes"], {"raw": patch}, {"labels": patch}, spatial,
                    is_train=True, read=read,
                ) as dataset:  # fmt: skip
                    draws = dataset.draw(range(BATCH), True, 0)
                    reader = ResidentReader(dataset, DeviceCache("cpu", 1 << 40))
                    host = cpu_ms(lambda d=dataset, s=draws: d.read(s), args.rounds)
                    gathered = cpu_ms(lambda r=reader, s=draws: r.read(s).gathered(), args.rounds)
                if "rotated" not in name:
                    worst = max(worst, gathered / host)
                print(f"| {edge}³ | {name} | {host:.2f} | {gathered:.2f} | {gathered / host:.2f} |", flush=True)
    print(f"\nTarget: boxes take at most {TARGET} x the time of the host; {worst:.2f} x")


if __name__ == "__main__":
    main()
