"""Volumes of any size without chunks, except for the voxels that their counts declare."""

import json
from pathlib import Path

from tests.geometries import write_voxels


def write_bare(path, shape, scale, translation=(0, 0, 0), foreground=None, chunk=64):
    """A multiscale group of one level; with ``foreground`` a label image whose metadata counts so many voxels."""
    level = Path(path) / "s0"
    level.mkdir(parents=True)
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    steps = [
        {"type": "scale", "scale": list(map(float, scale))},
        {"type": "translation", "translation": list(map(float, translation))},
    ]
    image = {"version": "0.4", "axes": axes, "datasets": [{"path": "s0", "coordinateTransformations": steps}]}
    array = {
        "zarr_format": 2, "shape": list(map(int, shape)), "chunks": [chunk] * 3, "dtype": "|u1", "compressor": None,
        "fill_value": 0, "order": "C", "filters": None, "dimension_separator": "/",
    }  # fmt: skip
    attributes = {}
    if foreground is not None:
        size = 1
        for n in shape:
            size *= int(n)
        kind = {"type": "semantic_segmentation", "encoding": {"absent": 0, "present": 1, "unknown": 255}}
        counts = {"absent": size - int(foreground), "unknown": 0}
        attributes = {"cellmap": {"annotation": {"annotation_type": kind, "complement_counts": counts}}}
    for file, content in (
        (level.parent / ".zgroup", {"zarr_format": 2}),
        (level.parent / ".zattrs", {"multiscales": [image]}),
        (level / ".zarray", array),
        (level / ".zattrs", attributes),
    ):
        file.write_text(json.dumps(content))
    if foreground:
        write_voxels(level, int(foreground))
    return path
