"""One self-contained HTML file with a slider through the slices of each sample: no network, no other file."""

import base64
import html
import io
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.io.files import make_folder
from cellmap_lightning.io.own_files import MARK
from cellmap_lightning.visualization.figures.canvas import Array, needs_matplotlib
from cellmap_lightning.visualization.figures.outlines import outline_paths
from cellmap_lightning.visualization.figures.palette import outline_colors
from cellmap_lightning.visualization.figures.samples import SampleArrays, SheetSample, sample_arrays
from cellmap_lightning.visualization.figures.slices import (
    best_slice,
    contrast_limits,
    scale_bar_label,
    scale_bar_nm,
)

#: Pixels of the longer side of an image.
_SIZE = 420

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.2em; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.2em; } h2 { font-size: 1em; margin: 1.6em 0 .4em; }
.classes label { margin-right: 1em; white-space: nowrap; }
.swatch { display: inline-block; width: 1.4em; border-top: 3px solid; vertical-align: middle; margin-right: .3em; }
.panels { display: flex; gap: 12px; flex-wrap: wrap; }
figure { margin: 0; } figcaption { font-size: .85em; color: #666; }
.image { position: relative; background: #303030; }
.image img { width: 100%; height: 100%; display: block; image-rendering: pixelated; }
.image svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
path { fill: none; stroke-width: 1.6px; vector-effect: non-scaling-stroke; }
path.prediction { stroke-dasharray: 5 3; } path.unknown { fill: url(#hatch); stroke: none; }
input[type=range] { width: 420px; vertical-align: middle; }
code { font-size: .8em; word-break: break-all; }
"""

_HATCH = """
<svg width="0" height="0" style="position:absolute"><defs>
<pattern id="hatch" width="3" height="3" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<rect width="3" height="3" fill="rgba(0,0,0,.45)"/><rect width=".5" height="3" fill="rgba(255,255,255,.6)"/>
</pattern></defs></svg>
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById('data').textContent);
function draw(number) {
  const section = document.getElementById('sample-' + number);
  const z = Number(section.querySelector('input[type=range]').value), slice = data[number][z];
  section.querySelector('output').textContent = z;
  for (const image of section.querySelectorAll('img')) image.src = slice.pictures[image.alt] || slice.raw;
  for (const path of section.querySelectorAll('path[data-kind]')) {
    const shapes = slice[path.dataset.kind], shown = document.getElementById('class-' + path.dataset.c);
    path.setAttribute('d', shown && !shown.checked ? '' : shapes[path.dataset.c] || '');
  }
}
for (let number = 0; number < data.length; number++) {
  const slider = document.getElementById('sample-' + number).querySelector('input[type=range]');
  slider.addEventListener('input', () => draw(number));
  draw(number);
}
for (const box of document.querySelectorAll('.classes input'))
  box.addEventListener('change', () => data.forEach((_, number) => draw(number)));
"""


def write_page(
    samples: Sequence[SheetSample],
    classes: Sequence[str],
    path: str | PathLike[str],
    *,
    title: str = "",
    links: Sequence[tuple[str, str]] = (),
) -> None:
    """Write samples as one page, with a slider through the slices of each.

    Outlines are along the borders of voxels, solid for targets and dashed for predictions, and each class can be
    switched off. Targets that are drawn in colours, such as instances and affinities, lie over raw. Voxels that are
    unknown for every class are hatched.

    Args:
        samples: the samples, in order; see `contact_sheet`.
        classes: names of the classes.
        path: the file to write; folders are created.
        title: the heading.
        links: for each sample an address and a command that show its place; or none at all.

    Raises:
        CellMapValueError: there is no sample, or shapes, scales or class names do not fit together.
        MissingExtraError: matplotlib is not installed.
    """
    if not samples:
        raise CellMapValueError("A page needs at least one sample, got none")
    sections, data = [], []
    colors = outline_colors(len(classes))
    for number, sample in enumerate(samples):
        arrays = sample_arrays(sample, len(classes), f"Sample {number} of the page")
        data.append(_slices(arrays))
        link = links[number] if links else None
        sections.append(_section(arrays, number, sample.header, colors, link))
    boxes = "".join(
        f'<label><input type="checkbox" id="class-{c}" checked>'
        f'<span class="swatch" style="border-color:{color}"></span>{html.escape(name)}</label>'
        for c, (name, color) in enumerate(zip(classes, colors, strict=True))
    )
    # A closing tag inside the data would end the script.
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{MARK}">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f'<p class="classes">{boxes}</p>{_HATCH}{"".join(sections)}'
        f'<script type="application/json" id="data">{text}</script><script>{_SCRIPT}</script></body></html>\n'
    )
    file = Path(path)
    make_folder(file.parent)
    file.write_text(page, encoding="utf-8")


def _slices(arrays: SampleArrays) -> list[dict[str, Any]]:
    """Return the image of each slice, and the outlines of each class that occurs on it."""
    low, high = contrast_limits(arrays.raw)
    grey = (np.clip((arrays.raw - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
    slices = []
    for z, image in enumerate(grey):
        cut = arrays.cut(z)
        colored = {name: _png(_over(picture, image)) for name, picture in cut.pictures.items()}
        shapes: dict[str, Any] = {"raw": _png(image), "pictures": colored}
        for name, masks in cut.masks.items():
            if name not in colored:
                shapes[name] = {str(c): _path(mask) for c, mask in enumerate(masks) if mask.any()}
        if cut.unknown is not None:
            shapes["unknown"] = {"all": _path(cut.unknown)}
        slices.append(shapes)
    return slices


def _over(picture: Array, grey: Array) -> Array:
    """Return a picture with opacity, ``[row, column, 4]`` from 0 to 1, over a grey image, as bytes."""
    opacity = picture[..., 3:]
    mixed = opacity * picture[..., :3] * 255 + (1 - opacity) * grey[..., None]
    mixed_bytes: Array = mixed.round().astype(np.uint8)
    return mixed_bytes


def _png(image: Array) -> str:
    with needs_matplotlib():
        from PIL import Image  # comes with matplotlib
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _path(mask: Any) -> str:
    """Return outlines as the path of an SVG whose unit is a voxel and whose origin is the corner of the image."""
    parts = []
    for line in outline_paths(mask):
        points = (line[:-1] + 0.5).astype(int).tolist()
        parts.append("M" + "L".join(f"{x} {y}" for x, y in points) + "Z")
    return "".join(parts)


def _section(
    arrays: SampleArrays, number: int, header: str, colors: Sequence[str], link: tuple[str, str] | None
) -> str:
    count, rows, columns = arrays.raw.shape
    first = best_slice(arrays.stacks.get("target"), arrays.stacks.get("prediction"), arrays.raw.shape)
    height_nm, width_nm = rows * arrays.scale[1], columns * arrays.scale[2]
    pixels_per_nm = _SIZE / max(height_nm, width_nm)
    style = f"width:{round(width_nm * pixels_per_nm)}px;height:{round(height_nm * pixels_per_nm)}px"
    panels = [
        f'<figure><div class="image" style="{style}"><img alt="{kind}">'
        f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none">{_paths(kind, arrays, colors)}</svg></div>'
        f"<figcaption>{kind}</figcaption></figure>"
        for kind in ("raw", *arrays.stacks)
    ]
    bar = scale_bar_nm(width_nm)
    bar_pixels = bar / width_nm * round(width_nm * pixels_per_nm)
    places = ""
    if link is not None:
        places = (
            f'<p><a href="{html.escape(link[0])}">Neuroglancer</a>, where the data are served; napari: '
            f"<code>{html.escape(link[1])}</code></p>"
        )
    return (
        f'<section id="sample-{number}"><h2>{html.escape(header)}</h2>'
        f'<p>z <input type="range" min="0" max="{count - 1}" value="{first}" aria-label="slice"> '
        f"<output>{first}</output> of 0–{count - 1}</p>"
        f'<div class="panels">{"".join(panels)}</div>'
        f'<div style="width:{bar_pixels:.1f}px;border-top:3px solid #1a1a1a;margin-top:6px"></div>'
        f"{scale_bar_label(bar)}{places}</section>"
    )


def _paths(kind: str, arrays: SampleArrays, colors: Sequence[str]) -> str:
    """Return the empty paths of a panel, which the script fills with the outlines of a slice."""
    if kind == "raw":
        return ""
    unknown = '<path class="unknown" data-kind="unknown" data-c="all"/>' if "target" in arrays.stacks else ""
    return unknown + "".join(
        f'<path class="{kind}" data-kind="{kind}" data-c="{c}" stroke="{color}"/>' for c, color in enumerate(colors)
    )
