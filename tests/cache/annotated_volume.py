"""A volume with annotated classes, and its samples computed independently."""

import hashlib
import shutil
from typing import Any

import numpy as np
import zarr

from cellmap_lightning.geometry.lattice import Lattice
from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale
from tests.make import make_dataset

NAN = float("nan")


def annotation(level=0, array=None):
    return {
        "cellmap": {
            "annotation": {
                "annotation_type": {
                    "type": "semantic_segmentation",
                    "encoding": {"absent": 0, "unknown": 255},
                },
                "complement_counts": {"absent": 0, "unknown": 1},
            }
        }
    }


def blocks(rng, shape, values, size=4):
    """Blocks of one value, so that neighbours often agree."""
    coarse = rng.choice(values, size=[-(-n // size) for n in shape])
    found = coarse.repeat(size, 0).repeat(size, 1).repeat(size, 2)
    return np.ascontiguousarray(found[tuple(slice(0, n) for n in shape)])


class Volume:
    """Raw and label arrays in a Zarr store, and what was written to it."""

    def __init__(self, root, zarr_format=2, separator="/", shards=None, chunk=16):
        self.root, self.chunks = root, (chunk,) * 3
        self.how = {"zarr_format": zarr_format, "shards": shards, "separator": separator}
        self.raw = self.raw_lattice = None
        self.labels, self.lattices = {}, {}
        write_group(root, zarr_format=zarr_format)

    def _write(self, path, data, lattice, **kwargs):
        zarr_format, shards, separator = self.how.values()
        write_multiscale(
            path, data, scale=lattice.step, translation=lattice.origin,
            storage=ArrayOptions(chunks=self.chunks, zarr_format=zarr_format, shards=shards), **kwargs,
        )  # fmt: skip
        if separator != "/":  # as other programs name their chunks
            attributes = dict(zarr.open_array(path / "s0", mode="r").attrs)
            shutil.rmtree(path / "s0")
            zarr.create_array(
                path / "s0", data=data, chunks=self.chunks, zarr_format=zarr_format, attributes=attributes,
                chunk_key_encoding={"name": "v2" if zarr_format == 2 else "default", "separator": separator},
            )  # fmt: skip

    def add_raw(self, data, step=(8.0, 8.0, 8.0), origin=(0.0, 0.0, 0.0)):
        self.raw, self.raw_lattice = data, Lattice(origin, step, data.shape)
        self._write(self.root / "raw", data, self.raw_lattice)
        return self

    def add(self, name, data, step=(8.0, 8.0, 8.0), origin=(0.0, 0.0, 0.0)):
        self.labels[name], self.lattices[name] = data, Lattice(origin, step, data.shape)
        path = self.root / "crop1" / name
        self._write(path, data, self.lattices[name], mode="mode", array_attributes=annotation)
        return self

    def dataset(self, classes, shape, scale=(8.0, 8.0, 8.0), annotated=None, target=None, **kwargs):
        spec = {"shape": list(shape), "scale": list(scale)}
        given = {"raw_value_transforms": None, "pad": True, "max_workers": 2}
        return make_dataset(
            self.root / "raw",
            f"{self.root}/crop1/[{','.join(annotated or self.labels)}]",
            classes,
            {"raw": spec},
            {"target": spec | (target or {})},
            **(given | kwargs),
        )


SIZE = (44, 40, 36)
NAMES = [f"c{n}" for n in range(24)]


def fill_up(volume, classes):
    rng = np.random.default_rng(classes)
    volume.add_raw(rng.integers(0, 256, SIZE, np.uint8))
    for name in NAMES[:classes]:
        volume.add(name, blocks(rng, (36, 32, 28), [0, 1, 255]).astype(np.uint8), origin=(32.0, 32.0, 32.0))
    return volume


STORAGE: dict[str, dict[str, Any]] = {
    "v2 /": {},
    "v2 .": {"separator": "."},
    "v3": {"zarr_format": 3},
    "v3 .": {"zarr_format": 3, "separator": "."},
    "v3 sharded": {"zarr_format": 3, "shards": (32, 32, 32)},
}


SPATIAL = {
    "straight": None,
    "mirrored and transposed": {"mirror": {"axes": dict.fromkeys("zyx", 0.5)}, "transpose": {"axes": list("zyx")}},
    "rotated about z": {"mirror": {"axes": {"x": 0.5}}, "rotate": {"axes": {"z": [-180, 180]}}},
    "rotated": {"transpose": {"axes": ["x", "y"]}, "rotate": {"axes": {"z": [-30, 30], "x": [-180, 180]}}},
}


# -- several processes


def digest(batch):
    batch = batch.tensors
    return hashlib.sha256(b"".join(batch[name].numpy().tobytes() for name in sorted(batch))).hexdigest()


def chunks_of(dataset):
    """All the chunks that a dataset can keep."""
    return sum(int(np.prod(region.layout.grid)) for region in [r for c in dataset.crops for r in c.regions])
