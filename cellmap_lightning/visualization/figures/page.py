"""One HTML file to look through samples slice by slice. It needs nothing beside it: no network, no other file."""

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
from cellmap_lightning.visualization.figures.canvas import Array, needs_matplotlib
from cellmap_lightning.visualization.figures.palette import outline_colors
from cellmap_lightning.visualization.figures.panels import outline_paths
from cellmap_lightning.visualization.figures.sheet import SheetSample
from cellmap_lightning.visualization.figures.slices import THRESHOLD, best_slice, contrast_limits, scale_bar_nm

#: Pixels of the longer side of an image on the page.
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
  for (const image of section.querySelectorAll('img')) image.src = slice.raw;
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
    switched off. What is unknown for every class is hatched.

    Args:
        samples: what to show, in order; see `contact_sheet`.
        classes: names of the classes.
        path: the file to write; folders are made.
        title: the heading.
        links: for each sample an address and a command that show its place; or none at all.

    Raises:
        CellMapValueError: there is no sample, or a target of another shape than raw.
        MissingExtraError: matplotlib is not installed.
    """
    if not samples:
        raise CellMapValueError("A page needs at least one sample; there is none.")
    sections, data = [], []
    colors = outline_colors(len(classes))
    for number, sample in enumerate(samples):
        slices, first, columns = _slices(sample, number)
        data.append(slices)
        sections.append(_section(sample, number, len(slices), first, columns, colors, links[number] if links else None))
    boxes = "".join(
        f'<label><input type="checkbox" id="class-{c}" checked>'
        f'<span class="swatch" style="border-color:{color}"></span>{html.escape(name)}</label>'
        for c, (name, color) in enumerate(zip(classes, colors, strict=True))
    )
    # A closing tag inside the data would end the script.
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f'<p class="classes">{boxes}</p>{_HATCH}{"".join(sections)}'
        f'<script type="application/json" id="data">{text}</script><script>{_SCRIPT}</script></body></html>\n'
    )
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")


def _slices(sample: SheetSample, number: int) -> tuple[list[dict[str, Any]], int, list[str]]:
    """The slices of a sample, the one to begin with, and which of target and prediction there are."""
    raw = np.asarray(sample.raw)
    stacks = {"target": sample.target, "prediction": sample.prediction}
    given: dict[str, Array] = {}
    for name, stack in stacks.items():
        if stack is None:
            continue
        values = np.asarray(stack)
        if values.shape[1:] != raw.shape:
            raise CellMapValueError(
                f"Sample {number} of the page: {name} has the shape {values.shape}, which does not fit raw {raw.shape}."
            )
        given[name] = values[:, None] if raw.ndim == 2 else values
    raw = raw[None] if raw.ndim == 2 else raw
    low, high = contrast_limits(raw)
    grey = (np.clip((raw - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
    slices = []
    for z in range(len(raw)):
        shapes: dict[str, Any] = {"raw": _png(grey[z])}
        for name, values in given.items():
            shapes[name] = {str(c): _path(channel[z] > THRESHOLD) for c, channel in enumerate(values)}
            shapes[name] = {c: path for c, path in shapes[name].items() if path}
        if "target" in given and len(given["target"]):
            shapes["unknown"] = {"all": _path(np.isnan(given["target"][:, z]).all(axis=0))}
        slices.append(shapes)
    first = best_slice(given.get("target"), given.get("prediction"), raw.shape)
    return slices, first, list(given)


def _png(image: Array) -> str:
    with needs_matplotlib():
        from PIL import Image  # comes with matplotlib
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _path(mask: Any) -> str:
    """The outlines of a mask as the path of an SVG whose unit is a voxel, its origin the corner of the image."""
    parts = []
    for line in outline_paths(mask):
        points = (line[:-1] + 0.5).astype(int).tolist()
        parts.append("M" + "L".join(f"{x} {y}" for x, y in points) + "Z")
    return "".join(parts)


def _section(
    sample: SheetSample,
    number: int,
    count: int,
    first: int,
    columns: Sequence[str],
    colors: Sequence[str],
    links: tuple[str, str] | None,
) -> str:
    rows, width = np.asarray(sample.raw).shape[-2:]
    sy, sx = (float(s) for s in list(sample.scale)[-2:])
    tall, wide = rows * sy, width * sx
    size = (round(_SIZE * tall / max(tall, wide)), round(_SIZE * wide / max(tall, wide)))
    bar = scale_bar_nm(wide)
    panels = []
    for kind in ("raw", *columns):
        shapes = ""
        if kind != "raw":
            shapes = '<path class="unknown" data-kind="unknown" data-c="all"/>' if "target" in columns else ""
            shapes += "".join(
                f'<path class="{kind}" data-kind="{kind}" data-c="{c}" stroke="{color}"/>'
                for c, color in enumerate(colors)
            )
        panels.append(
            f'<figure><div class="image" style="width:{size[1]}px;height:{size[0]}px"><img alt="{kind}">'
            f'<svg viewBox="0 0 {width} {rows}" preserveAspectRatio="none">{shapes}</svg></div>'
            f"<figcaption>{kind}</figcaption></figure>"
        )
    length = f"{bar:g} nm" if bar < 1000 else f"{bar / 1000:g} µm"
    line = f'<div style="width:{bar / wide * size[1]:.1f}px;border-top:3px solid #1a1a1a;margin-top:6px"></div>{length}'
    places = ""
    if links is not None:
        places = (
            f'<p><a href="{html.escape(links[0])}">Neuroglancer</a>, where the data are served; napari: '
            f"<code>{html.escape(links[1])}</code></p>"
        )
    return (
        f'<section id="sample-{number}"><h2>{html.escape(sample.header)}</h2>'
        f'<p>z <input type="range" min="0" max="{count - 1}" value="{first}" aria-label="slice"> '
        f"<output>{first}</output> of 0–{count - 1}</p>"
        f'<div class="panels">{"".join(panels)}</div>{line}{places}</section>'
    )
