"""Draw `rotation.png`: one letter, as it is stored and as the spatial transforms show it.

Run ``python docs/draw_rotation.py`` in the repository. The letter is written as a raw volume and as a label volume, and
read with `CellMapDataset` and the configurations in the titles; nothing here turns anything itself.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from cellmap_lightning import CellMapDataset
from cellmap_lightning.io.writer import write_multiscale
from cellmap_lightning.transforms.spatial import SpatialTransforms

Array = np.ndarray[Any, Any]
STORED = np.array([8.0, 2.0, 2.0])  # nm, z y x
PATCH = {"shape": [1, 24, 64], "scale": [8.0, 8.0, 4.0]}  # 192 nm high, 256 nm wide, of voxels that are no squares
CASES: dict[str, dict[str, Any]] = {
    "as stored": {},
    "mirror: {axes: {x: 1}}": {"mirror": {"axes": {"x": 1.0}}},
    "transpose: {axes: [x, y]}\n(when they are exchanged)": {"transpose": {"axes": ["x", "y"]}},
    "rotate: {axes: {z: [90, 90]}}": {"rotate": {"axes": {"z": [90, 90]}}},
    "rotate: {axes: {z: [30, 30]}}": {"rotate": {"axes": {"z": [30, 30]}}},
}
COLOR = "#e69f00"


def letter(y: Array, x: Array) -> Array:
    """Return a mask of the letter F, from nm around its middle: the foot points down, the arms to the right."""
    stem = (np.abs(y) < 72) & (np.abs(x + 36) < 12)
    upper = (np.abs(y + 60) < 12) & (x > -48) & (x < 56)
    lower = (np.abs(y + 4) < 12) & (x > -48) & (x < 24)
    return stem | upper | lower


def write(root: Path) -> None:
    """A raw volume of 512 x 512 nm, and labels of 192 x 256 nm around the same middle."""
    half = STORED / 2
    y, x = np.meshgrid(np.arange(-255, 257, 2.0), np.arange(-255, 257, 2.0), indexing="ij")
    grain = np.random.default_rng(0).normal(0, 6, (3, *y.shape))
    raw = np.clip(np.where(letter(y, x), 70, 165) + 12 * np.sin(x / 20) * np.cos(y / 20) + grain, 0, 255)
    write_multiscale(root / "raw", raw.astype(np.uint8), scale=STORED, translation=half - [12, 256, 256])
    inside = letter(y, x)[80:176, 64:192]
    labels = np.repeat(inside[None], 3, 0).astype(np.uint8)
    write_multiscale(root / "crop" / "F", labels, scale=STORED, translation=half - [12, 96, 128], mode="mode")


def read(root: Path, config: dict[str, Any]) -> tuple[Array, Array]:
    """The middle slice of raw, and its target, under a configuration."""
    position, seed = 1, 0  # of the three slices
    if "transpose" in config:  # it is a random permutation: the first seed for which it is not the identity
        seed = next(s for s in range(99) if SpatialTransforms(config).turns(s, [position])[0][1, 2])
    with CellMapDataset(
        root / "raw",
        f"{root}/crop/[F]",
        ["F"],
        {"raw": PATCH},
        {"labels": PATCH},
        spatial_transforms=config,
        is_train=True,
        seed=seed,
    ) as dataset:
        sample = dataset[position]
    return sample["raw"][0].numpy(), sample["labels"][0].numpy()


def edges(mask: Array, size: Sequence[float]) -> list[Any]:
    """Borders between voxels of different value as lines in nm, from the middle of the patch."""
    y, x = (np.arange(n + 1) * s - n * s / 2 for n, s in zip(mask.shape, size, strict=True))
    lines = []
    for i, j in np.argwhere(mask[:, 1:] != mask[:, :-1]):
        lines.append(((x[j + 1], y[i]), (x[j + 1], y[i + 1])))
    for i, j in np.argwhere(mask[1:] != mask[:-1]):
        lines.append(((x[j], y[i + 1]), (x[j + 1], y[i + 1])))
    return lines


def main() -> None:
    """Write the picture beside this file."""
    figure = Figure(figsize=(14, 2.75), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(CASES))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "F.zarr"
        write(root)
        for axes, (title, config) in zip(panels, CASES.items(), strict=True):
            raw, labels = read(root, config)
            axes.imshow(raw, cmap="gray", vmin=0.1, vmax=0.8, extent=(-128, 128, 96, -96))
            axes.add_collection(LineCollection(edges(labels == 1, PATCH["scale"][1:]), colors=COLOR, linewidths=1.6))
            axes.contourf(
                np.isnan(labels).astype(float), levels=[0.5, 1.5], colors="none", hatches=["////"],
                extent=(-128, 128, -96, 96), origin="lower",
            )  # fmt: skip
            axes.set_title(title, fontsize=9, family="monospace")
            axes.set_xticks([])
            axes.set_yticks([])
            for tip, name in (((-72, -86), "x"), ((-118, -46), "y")):
                axes.annotate(
                    "", xy=tip, xytext=(-118, -86), arrowprops={"arrowstyle": "-|>", "color": "#00c48c", "lw": 1.8}
                )
                axes.text(
                    tip[0] + (8 if name == "x" else 0), tip[1] + (0 if name == "x" else 10), name,
                    color="#00c48c", fontsize=10, weight="bold", ha="center", va="center",
                )  # fmt: skip
    figure.savefig(Path(__file__).with_name("rotation.png"))


if __name__ == "__main__":
    main()
