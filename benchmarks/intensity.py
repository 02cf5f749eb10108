"""CPU cost of each intensity transform.

    python benchmarks/intensity.py            # CPU ms per sample of 64^3 voxels

Each transform changes every sample of batches of 4. CPU seconds of one thread; the median of several rounds.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from cellmap_lightning.transforms.intensity import ORDER, IntensityTransforms

SCALE = [8.0, 8.0, 8.0]
CONFIG = {
    "blur": [8, 8],
    "contrast": [0.8, 1.2],
    "brightness": [-0.1, 0.1],
    "gamma": [0.8, 1.25],
    "noise": [0.05, 0.05],
    "low_resolution": {"probability": 1, "voxel_size": [24, 24], "axes": ["z", "y", "x"]},
    "motion_blur": {"probability": 1, "length": [40, 40]},
    "match_histogram": {"probability": 1, "quantiles": [np.linspace(0.1, 0.9, 33).tolist()]},
    "section_contrast": {"probability": 1},
    "dark_section": {"probability": 1},
    "stripes": {"probability": 1, "amplitude": [0.1, 0.1], "width": [32, 32]},
    "poisson": {"probability": 1, "counts": [100, 100]},
    "salt_pepper": {"probability": 1, "fraction": [0.01, 0.01]},
    "cutnoise": {"probability": 1, "size": [160, 160], "std": [0.2, 0.2]},
    "cutout": {"probability": 1, "size": [160, 160]},
    "missing_section": {"probability": 0.2, "fill": "nearest"},
}


def cost(name, edge, rounds):
    """CPU ms per sample of one transform."""
    transforms = IntensityTransforms({name: CONFIG[name]})
    raw = torch.from_numpy(np.random.default_rng(0).random((4, 1, edge, edge, edge), np.float32))
    seconds = []
    for number in range(rounds + 1):
        before = time.process_time()
        transforms(raw, 0, range(4 * number, 4 * number + 4), 0, SCALE)
        seconds.append(time.process_time() - before)
    return 1000 * statistics.median(seconds[1:]) / len(raw)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edge", type=int, default=64, help="voxels along each axis")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| transform | CPU ms per sample of {options.edge}^3 |\n|---|---|")
    for name in ORDER:
        print(f"| {name} | {cost(name, options.edge, options.rounds):.1f} |", flush=True)


if __name__ == "__main__":
    main()
