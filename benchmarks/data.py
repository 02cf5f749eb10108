"""The volume that the benchmarks read: OME-NGFF 0.4 in Zarr v2, the same voxels every time.

Raw is uint8 with the noise of electron microscopy, so that it compresses about as badly (1.7 to 1), in blosc-zstd
chunks of 128 voxels a side. An annotated crop lies in it off the lattice of its chunks, with one binary uint8 array per
class in chunks of 64. All translations are centres of voxel 0, in nm. Beside `<name>.zarr` lies `<name>.json`, which
says what was written: the measurements read it, also where zarr is another version.

    python benchmarks/data.py FOLDER
    python benchmarks/data.py FOLDER --raw-size 768
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np

SCALE = 8.0
FIRST_CLASSES = ("mito", "er", "nuc", "golgi", "ves", "endo", "lyso", "ld")
MOST_CLASSES = 48
#: Share of the crop that each class covers; further classes begin again at the first.
SHARES = (0.15, 0.25, 0.35, 0.03, 0.02, 0.06, 0.04, 0.01)


def class_names(count):
    """Names of the first classes, up to 48."""
    if not 1 <= count <= MOST_CLASSES:
        raise SystemExit(f"a volume has 1 to {MOST_CLASSES} classes, not {count}")
    return [*FIRST_CLASSES, *(f"class{n:02d}" for n in range(9, MOST_CLASSES + 1))][:count]


class SmoothNoise:
    """Gaussian noise on a coarse lattice, interpolated linearly between its points; read in slabs along z."""

    def __init__(self, rng, size, spacing):
        points = size // spacing + 2
        self.lattice = rng.standard_normal((points, points, points), dtype=np.float32)
        at = np.arange(size) / spacing
        left = at.astype(int)
        self.weights = np.zeros((size, points), np.float32)
        self.weights[np.arange(size), left] = 1 - (at - left)
        self.weights[np.arange(size), left + 1] = at - left

    def slab(self, first, stop):
        along_z = np.tensordot(self.weights[first:stop], self.lattice, 1)
        return self.weights @ (along_z @ self.weights.T)


def raw_voxels(size, seed):
    """Grey cytoplasm of several textures, dark membranes, and noise in every voxel."""
    rng = np.random.default_rng([seed, 0])
    large, small = SmoothNoise(rng, size, 56), SmoothNoise(rng, size, 14)
    voxels = np.empty((size, size, size), np.uint8)
    for first in range(0, size, 32):
        stop = min(first + 32, size)
        a, b = large.slab(first, stop), small.slab(first, stop)
        grey = 136 + 6 * a + 4 * b
        grey -= 24 * (np.abs(a + 0.5 * b) < 0.06)
        grey += 2.9 * rng.standard_normal(grey.shape, dtype=np.float32)
        np.clip(np.rint(grey, out=grey), 0, 255, out=grey)
        voxels[first:stop] = grey
    return voxels


def label_voxels(size, share, seed, number):
    """Blobs with uneven borders that cover about that share of the crop."""
    rng = np.random.default_rng([seed, 1, number])
    spacing = max(3, min(42, size // 3))
    blobs = SmoothNoise(rng, size, spacing).slab(0, size)
    blobs += 0.4 * SmoothNoise(rng, size, max(2, spacing // 3)).slab(0, size)
    sparse = blobs[::5, ::5, ::5] if size > 100 else blobs
    return (blobs > np.quantile(sparse, 1 - share)).astype(np.uint8)


def halved(voxels, majority):
    """The next level of a pyramid: means of 2x2x2 voxels, or what most of them are."""
    z, y, x = (n // 2 for n in voxels.shape)
    eights = voxels[: 2 * z, : 2 * y, : 2 * x].reshape(z, 2, y, 2, x, 2)
    total = eights.sum(axis=(1, 3, 5), dtype=np.uint16)
    return (total >= 4).astype(np.uint8) if majority else ((total + 4) // 8).astype(np.uint8)


def _attributes(path, attributes):
    (path / ".zattrs").write_text(json.dumps(attributes, indent=1))


def _group(path, attributes=None):
    path.mkdir(parents=True, exist_ok=True)
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    if attributes:
        _attributes(path, attributes)


def _multiscales(name, offset, levels):
    datasets = []
    for level in range(levels):
        # A coarser voxel's centre lies in the middle of the finest voxels that it covers.
        shift = SCALE * (2**level - 1) / 2
        datasets.append(
            {
                "path": f"s{level}",
                "coordinateTransformations": [
                    {"type": "scale", "scale": [SCALE * 2**level] * 3},
                    {"type": "translation", "translation": [SCALE * o + shift for o in offset]},
                ],
            }
        )
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    return [{"version": "0.4", "name": name, "axes": axes, "datasets": datasets}]


def _write_levels(path, voxels, levels, chunk, majority):
    import numcodecs
    import zarr

    for level in range(levels):
        array = zarr.create_array(
            store=str(path / f"s{level}"),
            shape=voxels.shape,
            chunks=[min(chunk, n) for n in voxels.shape],
            dtype=voxels.dtype,
            zarr_format=2,
            compressors=numcodecs.Blosc("zstd", 5, numcodecs.Blosc.SHUFFLE),
            fill_value=0,
            chunk_key_encoding={"name": "v2", "separator": "/"},
        )
        array[...] = voxels
        if level + 1 < levels:
            voxels = halved(voxels, majority)


def _class_attributes(name, offset, levels):
    kind = {"class_name": name, "annotation_type": {"type": "semantic_segmentation"}}
    kind["annotation_type"]["encoding"] = {"absent": 0, "present": 1, "unknown": 255}
    return kind, {"multiscales": _multiscales(name, offset, levels), "cellmap": {"annotation": kind}}


def _write_crop(path, names, size, levels, chunk, offset, seed):
    _group(path)
    for number, name in enumerate(names):
        voxels = label_voxels(size, SHARES[number % len(SHARES)], seed, number)
        kind, attributes = _class_attributes(name, offset, levels)
        _group(path / name, attributes)
        _write_levels(path / name, voxels, levels, chunk, majority=True)
        counts = {"absent": int(voxels.size - voxels.sum()), "unknown": 0}
        _attributes(path / name / "s0", {"cellmap": {"annotation": {**kind, "complement_counts": counts}}})


def stored_ratio(path):
    """Bytes of an array's voxels over the bytes of its files."""
    shape = json.loads((path / ".zarray").read_text())["shape"]
    return np.prod(shape) / sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def write(folder, name="volume", raw_size=512, crop_size=400, classes=8, crops=1, levels=3, seed=0):
    """Write `<folder>/<name>.zarr`; with several crops, each has the voxels of the first at another place in raw."""
    folder = Path(folder)
    room = raw_size - crop_size
    if room < 0:
        raise SystemExit(f"a crop of {crop_size} voxels does not fit into {raw_size} voxels of raw")
    names = class_names(classes)
    # In the middle and a few voxels aside, differently along each axis.
    offsets = [[min(max(room // 2 + aside, 0), room) for aside in (-19, -5, 14)]]
    offsets += np.random.default_rng([seed, 2]).integers(0, room + 1, (crops - 1, 3)).tolist()
    paths = ["labels"] if crops == 1 else [f"labels/crop{n}" for n in range(1, crops + 1)]
    final, root = folder / f"{name}.zarr", folder / f"{name}.zarr.unfinished"
    shutil.rmtree(root, ignore_errors=True)
    _group(root)
    _group(root / "raw", {"multiscales": _multiscales("raw", (0, 0, 0), levels)})
    _write_levels(root / "raw", raw_voxels(raw_size, seed), levels, 128, majority=False)
    _group(root / "labels")
    _write_crop(root / paths[0], names, crop_size, levels, 64, offsets[0], seed)
    for path, offset in zip(paths[1:], offsets[1:], strict=True):
        shutil.copytree(root / paths[0], root / path)
        for class_name in names:
            _attributes(root / path / class_name, _class_attributes(class_name, offset, levels)[1])
    described = {
        "name": name,
        "parameters": {
            "raw_size": raw_size, "crop_size": crop_size, "classes": classes, "crops": crops, "levels": levels,
            "seed": seed,
        },
        "scale": SCALE,
        "classes": names,
        "crops": [{"path": path, "offset": offset} for path, offset in zip(paths, offsets, strict=True)],
        "crop_size": crop_size,
        "raw_size": raw_size,
        "raw_ratio": round(float(stored_ratio(root / "raw/s0")), 2),
        "label_ratio": round(float(stored_ratio(root / paths[0] / names[0] / "s0")), 1),
    }  # fmt: skip
    root.rename(final)
    (folder / f"{name}.json").write_text(json.dumps(described, indent=1))
    return described


def describe(folder, name="volume"):
    """The description of a volume by `write`, and its path."""
    folder = Path(folder)
    described = json.loads((folder / f"{name}.json").read_text())
    return {**described, "root": str(folder / f"{name}.zarr")}


def ensure(folder, name="volume", **parameters):
    """The volume of that name, written now if it is not there.

    Raises:
        SystemExit: there is one that was written with other parameters.
    """
    folder = Path(folder)
    if not (folder / f"{name}.json").exists():
        if (folder / f"{name}.zarr").exists():
            raise SystemExit(f"{folder / name}.zarr was not written by this program; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        print(f"writing {folder / name}.zarr ...", file=sys.stderr, flush=True)
        made = write(folder, name, **parameters)
        took = time.perf_counter() - began
        print(f"... raw is stored 1 : {made['raw_ratio']}; {took:.0f} s", file=sys.stderr, flush=True)
    described = describe(folder, name)
    for key, value in parameters.items():
        if described["parameters"][key] != value:
            raise SystemExit(
                f"{folder / name}.zarr was written with {key}={described['parameters'][key]}, not {value}: "
                "remove it, or name another folder"
            )
    return described


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--name", default="volume")
    parser.add_argument("--raw-size", type=int, default=512, help="voxels a side of raw")
    parser.add_argument("--crop-size", type=int, default=400, help="voxels a side of the annotated crop")
    parser.add_argument("--classes", type=int, default=8, help=f"1 to {MOST_CLASSES}")
    parser.add_argument("--crops", type=int, default=1)
    parser.add_argument("--levels", type=int, default=3, help="levels of the pyramids")
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(ensure(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
