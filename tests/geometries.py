"""Volumes and crops of given geometries: of raw the metadata alone, of labels the chunks that their counts promise."""

import json
from pathlib import Path

import numcodecs
import numpy as np

from cellmap_lightning.splits.manifests import GROUNDTRUTH, RAW


def write_image(path, scale, origin, shape, dtype="|u1", levels=1, chunks=64, array=None, group=None):
    """A multiscale group of Zarr v2 whose levels halve."""
    datasets = []
    for level in range(levels):
        step = np.multiply(scale, 2**level)
        datasets.append(
            {
                "path": f"s{level}",
                "coordinateTransformations": [
                    {"type": "scale", "scale": step.tolist()},
                    {"type": "translation", "translation": (np.add(origin, (step - scale) / 2)).tolist()},
                ],
            }
        )
        folder = Path(path) / f"s{level}"
        folder.mkdir(parents=True)
        size = [max(1, n // 2**level) for n in shape]
        meta = {
            "zarr_format": 2, "shape": size, "chunks": [min(chunks, n) for n in size], "dtype": dtype, "fill_value": 0,
            "order": "C", "filters": None, "dimension_separator": "/",
            "compressor": {"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": 1},
        }  # fmt: skip
        (folder / ".zarray").write_text(json.dumps(meta))
        if level == 0 and array:
            (folder / ".zattrs").write_text(json.dumps(array))
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    attributes = {"multiscales": [{"version": "0.4", "axes": axes, "datasets": datasets}], **(group or {})}
    (Path(path) / ".zgroup").write_text('{"zarr_format": 2}')
    (Path(path) / ".zattrs").write_text(json.dumps(attributes))


def write_voxels(level, foreground, unknown=0):
    """Chunks of a level of labels that hold so many voxels of 1 and of 255, the first ones; others are left out."""
    meta = json.loads((level / ".zarray").read_text())
    shape, chunks = meta["shape"], meta["chunks"]
    codec = numcodecs.get_codec(meta["compressor"]) if meta["compressor"] else None
    whole: dict[int, bytes] = {}
    for index in np.ndindex(*(-(-n // c) for n, c in zip(shape, chunks, strict=True))):
        if foreground + unknown <= 0:
            return
        inside = [min(c, n - i * c) for i, c, n in zip(index, chunks, shape, strict=True)]
        size = int(np.prod(inside))
        ones = min(size, foreground)
        others = min(size - ones, unknown)
        foreground, unknown = foreground - ones, unknown - others
        if ones == size == np.prod(chunks) and ones in whole:
            content = whole[ones]
        else:
            voxels = np.zeros(chunks, np.uint8)
            flat = np.zeros(size, np.uint8)
            flat[:ones], flat[ones : ones + others] = 1, 255
            voxels[tuple(map(slice, inside))] = flat.reshape(inside)
            content = bytes(codec.encode(voxels)) if codec else voxels.tobytes()
            whole[ones] = content
        file = level / "/".join(map(str, index))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def write_label(path, scale, origin, shape, voxels, unknown=0, levels=2):
    """A semantic label with its counts, as cellmap-schemas writes them."""
    size = int(np.prod(shape))
    kind = {"type": "semantic_segmentation", "encoding": {"absent": 0, "present": 1, "unknown": 255}}
    counts = {"absent": size - voxels - unknown, "unknown": unknown}
    array = {"cellmap": {"annotation": {"annotation_type": kind, "complement_counts": counts}}}
    group = {"cellmap": {"annotation": {"annotation_type": kind}}}
    write_image(path, scale, origin, shape, levels=levels, array=array, group=group)
    for level in range(levels):
        write_voxels(Path(path) / f"s{level}", voxels >> 3 * level, unknown >> 3 * level)


def write_challenge(root, crops, share=0.4):
    """Crops as `read_manifest` lists them, with labels that hold voxels in a part of the classes.

    Args:
        root: the folder to write.
        crops: rows of the manifest by (dataset, crop): voxel size, translation, shape and classes.
        share: part of the classes of a crop that has voxels.
    """
    extents: dict[str, np.ndarray] = {}
    for (dataset, _), (scale, origin, shape, _) in crops.items():
        reach = np.add(origin, np.multiply(scale, shape))
        extents[dataset] = np.maximum(extents.get(dataset, reach), reach)
    for dataset, reach in extents.items():
        own = [scale for (name, _), (scale, *_) in crops.items() if name == dataset]
        # Most labels are twice as fine as raw.
        step = np.multiply(np.min(own, axis=0), 2)
        shape = np.ceil(reach / step).astype(int) + 64
        write_image(Path(root) / dataset / f"{dataset}.zarr" / RAW, step.tolist(), [0, 0, 0], shape.tolist(), levels=5)
    rng = np.random.default_rng(0)
    for (dataset, crop), (scale, origin, shape, classes) in crops.items():
        for name in classes:
            voxels = int(np.prod(shape) * 0.01) if rng.random() < share else 0
            path = Path(root) / dataset / f"{dataset}.zarr" / GROUNDTRUTH / crop / name
            write_label(path, scale, origin, shape, voxels, levels=4)
