"""Draw `intensity.png`: one patch of the demo volume before and after each intensity transform.

Run ``python docs/draw_intensity.py`` in the repository. Each patch is changed by `IntensityTransforms` with the
configuration in its title; nothing here changes voxels itself.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cellmap_lightning import CellMapDataset
from cellmap_lightning.demo.synthetic import demo_csv
from cellmap_lightning.transforms.intensity import EFFECTS, ORDER, IntensityTransforms

SCALE = [10.48, 8.0, 8.0]  # nm, z y x
PATCH = {"shape": [32, 96, 96], "scale": SCALE}
#: Effects on sections are drawn across z.
ACROSS = ("section_contrast", "dark_section", "missing_section", "low_resolution")
CASES: dict[str, Any] = {
    "low_resolution": {"voxel_size": [48, 48]},
    "motion_blur": {"length": [80, 80]},
    "blur": [14, 14],
    "match_histogram": {"quantiles": [0.1, 0.35, 0.6]},
    "contrast": [1.5, 1.5],
    "brightness": [0.15, 0.15],
    "gamma": [1.8, 1.8],
    "section_contrast": {"contrast": [0.7, 1.3], "brightness": [-0.1, 0.1]},
    "dark_section": {"probability": 0.15, "factor": [0.3, 0.6]},
    "stripes": {"amplitude": [0.2, 0.2], "width": [24, 24]},
    "poisson": {"counts": [30, 30]},
    "noise": [0.1, 0.1],
    "salt_pepper": {"fraction": [0.05, 0.05]},
    "cutnoise": {"size": [200, 300], "std": [0.2, 0.2], "count": 3},
    "cutout": {"size": [150, 250], "count": 8},
    "missing_section": {"probability": 0.15},
}


def read(folder: Path) -> torch.Tensor:
    """Read a patch from the middle of the demo volume, normalized."""
    demo_csv(str(folder / "demo.zarr"))
    raw = folder / "demo.zarr/recon-1/em/fibsem-uint8"
    with CellMapDataset(str(raw), input_arrays={"raw": PATCH}) as dataset:
        return dataset[len(dataset) // 2]["raw"][None]


def text(name: str, options: Any) -> str:
    """Return the configuration of a panel, as YAML."""
    if isinstance(options, list):
        return f"{name}: {options}"
    return f"{name}\n" + "\n".join(f"{key}: {value}" for key, value in options.items())


def main() -> None:
    """Write the picture beside this file."""
    with tempfile.TemporaryDirectory() as folder:
        raw = read(Path(folder))
    figure = Figure(figsize=(15, 9.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 6).ravel()
    plane = {"cmap": "gray", "vmin": 0.1, "vmax": 0.9}
    for axes, across, title in ((panels[0], False, "unchanged, x and y"), (panels[1], True, "unchanged, x and z")):
        show(axes, raw, across, title, plane)
    for axes, name in zip(panels[2:], ORDER, strict=True):
        options = CASES[name]
        config = {"probability": 1, **options} if name in EFFECTS else options
        changed = IntensityTransforms({name: config})(raw, 0, [3], 0, SCALE)
        show(axes, changed, name in ACROSS, text(name, options), plane)
    figure.savefig(Path(__file__).with_name("intensity.png"))


def show(axes: Any, raw: torch.Tensor, across: bool, title: str, plane: dict[str, Any]) -> None:
    """Draw the middle slice of a patch, across z or across y, in nm."""
    _, _, z, y, x = raw.shape
    image = raw[0, 0, :, y // 2] if across else raw[0, 0, z // 2]
    height = (z * SCALE[0]) if across else y * SCALE[1]
    axes.imshow(image, extent=(0, x * SCALE[2], height, 0), interpolation="nearest", **plane)
    axes.set_title(title, fontsize=8, family="monospace", loc="left")
    axes.set_xticks([])
    axes.set_yticks([])


if __name__ == "__main__":
    main()
