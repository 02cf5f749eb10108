"""Draw `transforms.png`: one volume with a regular grid, under each spatial transform but mirrors and rotations.

Run ``python docs/draw_transforms.py`` in the repository. The volume is read with `CellMapDataset` and the
configurations in the titles; nothing here transforms anything itself.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cellmap_lightning import CellMapDataset
from cellmap_lightning.io.writer import write_multiscale

Array = np.ndarray[Any, Any]
STORED = np.array([16.0, 8.0, 8.0])  # nm, z y x
COUNT = np.array([100, 200, 200])
MIDDLE = COUNT * STORED / 2
PATCH = {"shape": [40, 80, 80], "scale": STORED.tolist()}  # 640 nm along each axis
SECTIONS = {"thickness": 16, "max_shift": 48}
CASES: dict[str, dict[str, Any]] = {
    "as stored": {},
    "zoom: [0.7, 1.4]": {"zoom": [0.7, 1.4]},
    "shear: {axes: {yx: [-0.4, 0.4],\nzx: [-0.4, 0.4]}}": {"shear": {"axes": {"yx": [-0.4, 0.4], "zx": [-0.4, 0.4]}}},
    "elastic: {spacing: 160,\nmagnitude: 60}": {"elastic": {"spacing": 160, "magnitude": 60}},
    "slip: {probability: 0.1,\nmax_shift: 48, thickness: 16}": {"slip": {"probability": 0.1, **SECTIONS}},
    "misalign: {probability: 0.1,\nmax_shift: 48, thickness: 16,\nrotate: 5}": {
        "misalign": {"probability": 0.1, "rotate": 5, **SECTIONS}
    },
    "mirror, transpose, rotate z,\nelastic, misalign": {
        "mirror": {"axes": {"z": 0.5, "y": 0.5, "x": 0.5}},
        "transpose": {"axes": ["y", "x"]},
        "rotate": {"axes": {"z": [-180, 180]}},
        "elastic": {"spacing": 160, "magnitude": 60},
        "misalign": {"probability": 0.1, **SECTIONS},
    },
}
SEEDS = (3, 7)
COLOR = "#e69f00"


def write(root: Path) -> None:
    """A raw volume with a grid, and a ball and a tube in an annotated box around its middle."""
    grid = np.moveaxis(np.indices(COUNT), 0, -1) * STORED + STORED / 2 - MIDDLE
    z, y, x = np.moveaxis(grid, -1, 0)
    cells = np.array([160, 80, 80])  # the middle of the volume is that of a cell
    lines = (np.abs(grid % cells - cells / 2) < STORED / 2 + 0.1).any(axis=-1)
    ball = np.linalg.norm(grid, axis=-1) < 120
    tube = np.hypot(y + 200, z - 0.4 * x) < 50
    raw = np.where(ball | tube, 130, 190) - 60 * lines
    write_multiscale(root / "raw", raw.astype(np.uint8), scale=STORED, translation=STORED / 2)
    inside = tuple(slice(n // 4, 3 * n // 4) for n in COUNT)
    translation = COUNT // 4 * STORED + STORED / 2
    write_multiscale(
        root / "crop" / "shapes",
        (ball | tube)[inside].astype(np.uint8),
        scale=STORED,
        translation=translation,
        mode="mode",
    )


def read(root: Path, config: dict[str, Any], seed: int) -> tuple[Array, Array]:
    """Raw and target of the patch in the middle, under a configuration."""
    with CellMapDataset(
        root / "raw", f"{root}/crop/[shapes]", ["shapes"], {"raw": PATCH}, {"labels": PATCH}, spatial_transforms=config,
        is_train=True, seed=seed,
    ) as dataset:  # fmt: skip
        sample = dataset[len(dataset) // 2]
    return sample["raw"][0].numpy(), sample["labels"][0].numpy()


def main() -> None:
    """Write the picture beside this file."""
    figure = Figure(figsize=(11.5, 2.5 * len(CASES)), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(CASES), 2 * len(SEEDS))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "grid.zarr"
        write(root)
        for line, (row, (title, config)) in enumerate(zip(panels, CASES.items(), strict=True)):
            for number, seed in enumerate(SEEDS):
                raw, labels = read(root, config, seed)
                z, y, _ = (n // 2 for n in raw.shape)
                planes = {"y down, x right": (raw[z], labels[z]), "z down, x right": (raw[:, y], labels[:, y])}
                for axes, (name, (grey, target)) in zip(row[2 * number :], planes.items(), strict=False):
                    extent = (0.0, 640.0, 640.0, 0.0)
                    axes.imshow(grey, cmap="gray", vmin=0.1, vmax=0.85, extent=extent, aspect="equal")
                    axes.contour(
                        np.nan_to_num(target), levels=[0.5], colors=COLOR, linewidths=1.4, extent=extent, origin="upper"
                    )
                    axes.contourf(
                        np.isnan(target).astype(float), levels=[0.5, 1.5], colors="none", hatches=["////"],
                        extent=extent, origin="upper",
                    )  # fmt: skip
                    axes.set_xticks([])
                    axes.set_yticks([])
                    if line == 0:
                        axes.set_title(f"sample {number + 1}: {name}", fontsize=9)
            row[0].set_ylabel(title, fontsize=8, family="monospace")
    figure.savefig(Path(__file__).with_name("transforms.png"))


if __name__ == "__main__":
    main()
