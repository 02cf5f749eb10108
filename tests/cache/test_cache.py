"""Samples do not depend on where decoded voxels are kept: against what is stored, computed here in another way."""

import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from cellmap_lightning import CellMapError, CellMapMultiDataset
from cellmap_lightning.datasets.source import Draw
from cellmap_lightning.geometry.lattice import AffineMap, Lattice, patch_map
from cellmap_lightning.geometry.resample import evaluate
from cellmap_lightning.io.writer import write_group, write_multiscale
from cellmap_lightning.runtime import location
from cellmap_lightning.runtime import thread_pool as pool_module
from cellmap_lightning.runtime.location import filesystem
from cellmap_lightning.transforms.spatial import rotation
from tests.make import make_dataset

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="decoded voxels are shared so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
ROOT = Path(__file__).parents[2]
NAN = float("nan")
TURNS = [
    np.eye(3)[list(p)] * np.asarray(signs)
    for p in itertools.permutations(range(3))
    for signs in itertools.product((1.0, -1.0), repeat=3)
]


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
            path, data, scale=lattice.step, translation=lattice.origin, chunks=self.chunks, zarr_format=zarr_format,
            shards=shards, **kwargs,
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


STORAGE = {
    "v2 /": {},
    "v2 .": {"separator": "."},
    "v3": {"zarr_format": 3},
    "v3 .": {"zarr_format": 3, "separator": "."},
    "v3 sharded": {"zarr_format": 3, "shards": (32, 32, 32)},
}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """The same voxels in each kind of store; the first also with more classes."""
    root = tmp_path_factory.mktemp("stores")
    made = {name: fill_up(Volume(root / f"{n}.zarr", **how), 3) for n, (name, how) in enumerate(STORAGE.items())}
    return made | {n: fill_up(Volume(root / f"classes{n}.zarr"), n) for n in (1, 8, 11, 24)}


def box_of(array, first, shape, turn, outside):
    """A box of an array in a signed permutation of its axes, by indexing alone; ``first``: that of the straight box."""
    axes = np.abs(turn).argmax(axis=0)
    size = np.zeros(3, int)
    size[axes] = shape
    lo = np.asarray(first) + (np.asarray(shape) - size) // 2
    padded = np.pad(array, 60, constant_values=outside)
    box = padded[tuple(slice(60 + a, 60 + a + n) for a, n in zip(lo.tolist(), size.tolist(), strict=True))]
    return np.flip(box, [axis for axis in range(3) if turn[axis].sum() < 0]).transpose(*axes)


def packed(stored):
    """The compact form of stored labels ``[C, z, y, x]``: present and known bits of eight classes after each other."""
    count = -(-len(stored) // 8) * 8
    bits = np.zeros((2, count, *stored.shape[1:]), np.uint8)
    bits[0, : len(stored)], bits[1, : len(stored)] = (stored != 0) & (stored != 255), stored != 255
    found = np.packbits(bits.reshape(2, count // 8, 8, *stored.shape[1:]), axis=2, bitorder="little")[:, :, 0]
    return np.ascontiguousarray(found.transpose(2, 3, 4, 1, 0).reshape(*stored.shape[1:], -1))


def expected_batch(volume, dataset, draws, shape):
    raw, target = [], []
    for draw in draws:
        corner = dataset.placement.center(draw.position) - np.asarray(shape) * 4 - np.subtract(dataset.box.lower, 0)
        inside = np.rint(corner / 8).astype(int)
        turn = np.eye(3) if draw.turn is None else draw.turn
        raw.append(box_of(volume.raw, inside + 4, shape, turn, 0)[None])
        labels = [volume.labels.get(name, np.full((36, 32, 28), 255)) for name in dataset.classes]
        target.append(packed(np.stack([box_of(array, inside, shape, turn, 255) for array in labels])))
    return np.stack(raw), np.stack(target)


CACHES = {
    "disk": {"cache": "disk"},
    "memory": {"cache": "memory"},
    "none": {"cache": "none"},
    "chunks": {"cache": "chunks"},
    "too small, by chunks": {"cache": "disk", "cache_bytes": 20_000, "is_train": False},
    "too small, directly": {"cache": "disk", "cache_bytes": 1, "is_train": True},
    "too small, memory": {"cache": "memory", "cache_bytes": 1, "is_train": True},
}


def check_all_turns(volume, classes, seed, **kwargs):
    """Samples in all 48 turns, in and across the border of the crop, equal slices of the stored arrays."""
    shape = (8, 12, 16)
    rng = np.random.default_rng(seed)
    turns = {"mirror": {"axes": dict.fromkeys("zyx", 0.5)}, "transpose": {"axes": list("zyx")}}
    with volume.dataset(classes, shape, spatial_transforms=turns, **kwargs) as dataset:
        count = len(dataset)
        positions = [0, count - 1, *rng.integers(0, count, 50).tolist()]
        draws = [
            Draw(n, position, turn)
            for n, (position, turn) in enumerate(zip(positions, [None, *TURNS, *TURNS[:3]], strict=True))
        ]
        raw, target = expected_batch(volume, dataset, draws, shape)
        for first in range(0, len(draws), 13):  # batches, and one by one
            batch = dataset.read(draws[first : first + 13]).tensors
            assert batch["raw"].numpy().tobytes() == raw[first : first + 13].tobytes()
            assert batch["target"].numpy().tobytes() == target[first : first + 13].tobytes()
        for row in (0, 7, 30, 51):
            batch = dataset.read(draws[row : row + 1]).tensors
            assert batch["raw"].numpy().tobytes() == raw[row].tobytes()
            assert batch["target"].numpy().tobytes() == target[row].tobytes()
        finished = dataset.layout.finish(dataset.read(draws[:5]))["target"].numpy()
        for c in range(len(classes)):
            present, known = (target[:5, ..., 2 * (c // 8) + k] >> (c % 8) & 1 for k in (0, 1))
            np.testing.assert_array_equal(finished[:, c], np.where(known, present.astype(float), NAN))
        return dataset._store.decoded, dataset._store.chunks.decoded


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
@pytest.mark.parametrize("storage", STORAGE)
def test_samples_are_what_is_stored(volumes, storage, reader):
    """Whatever names and shapes chunks have, and whatever decodes them."""
    if reader == "tensorstore":
        pytest.importorskip("tensorstore")
    decoded, by_chunks = check_all_turns(volumes[storage], NAMES[:3], 0, cache="disk", reader=reader)
    assert decoded == 2  # all of raw, all of the labels
    assert by_chunks == 0


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("classes", [1, 11])
def test_samples_do_not_depend_on_where_voxels_are_kept(volumes, cache, reader, classes):
    if reader == "tensorstore":
        pytest.importorskip("tensorstore")
    decoded, by_chunks = check_all_turns(volumes[classes], NAMES[:classes], 1, reader=reader, **CACHES[cache])
    assert (decoded > 0) == (cache in ("disk", "memory"))
    assert (by_chunks > 0) == (cache in ("chunks", "too small, by chunks"))


@pytest.mark.parametrize("cache", ["disk", "none"])
@pytest.mark.parametrize("classes", [8, 24])
def test_any_number_of_classes_is_packed_alike(volumes, classes, cache):
    """In any order, some of them not annotated here."""
    asked = [*NAMES[classes - 1 :: -1]]
    asked[1 % classes] = "other"
    check_all_turns(volumes[classes], asked, 2, cache=cache)


# -- off the lattice


class Plain:
    """A plain array."""

    def __init__(self, array):
        self.array, self.dtype, self.shape = array, array.dtype, array.shape

    def read(self, start, shape):
        return self.array[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]

    def read_into(self, start, out):
        out[...] = self.read(start, out.shape)


def direct(array, lattice, center, shape, scale, turn, method, outside):
    out = np.empty(shape, array.dtype)
    amap = patch_map(center, shape, np.asarray(scale), lattice, turn)
    evaluate(Plain(array), amap, out, method=method, fill=outside)
    return out


def votes(array, lattice, center, shape, scale, turn, rule):
    """Each voxel from all stored voxels that it covers: 0, 1 or 255."""
    amap = patch_map(center, shape, np.asarray(scale), lattice, turn)
    parts = np.maximum(np.ceil(np.linalg.norm(amap.matrix, axis=0) - 1e-3), 1).astype(int)
    present = known = np.zeros(shape, int)
    for part in np.ndindex(*parts):
        moved = AffineMap(amap.matrix, amap.offset + amap.matrix @ ((np.add(part, 0.5)) / parts - 0.5), shape)
        out = np.empty(shape, array.dtype)
        evaluate(Plain(array), moved, out, method="nearest", fill=255)
        present, known = present + ((out != 0) & (out != 255)), known + (out != 255)
    if rule == "any":
        return np.where(present > 0, 1, np.where(known == parts.prod(), 0, 255))
    return np.where(2 * known > parts.prod(), np.where(2 * present > known, 1, 0), 255)


SPATIAL = {
    "straight": None,
    "mirrored and transposed": {"mirror": {"axes": dict.fromkeys("zyx", 0.5)}, "transpose": {"axes": list("zyx")}},
    "rotated about z": {"mirror": {"axes": {"x": 0.5}}, "rotate": {"axes": {"z": [-180, 180]}}},
    "rotated": {"transpose": {"axes": ["x", "y"]}, "rotate": {"axes": {"z": [-30, 30], "x": [-180, 180]}}},
}
CLOSE = {
    "one step": {"a": ((2.62, 8.0, 8.0), (3.37, 0.21, 0.0)), "b": ((2.62, 8.0, 8.0), (3.37, 0.21, 0.0))},
    "another": {"a": ((1.7, 5.24, 8.0), (0.83, -1.2, 0.4)), "b": ((1.7, 5.24, 8.0), (0.83, -1.2, 0.4))},
    "several": {
        "a": ((2.62, 8.0, 8.0), (3.37, 0.21, 0.0)),
        "b": ((4.0, 4.0, 4.0), (-1.1, 9.3, 2.2)),
        "c": ((8.0, 8.0, 8.0), (16.0, 0.0, 8.0)),
    },
}


def off_lattice(root, how, raw_step=(5.24, 8.0, 8.0), dtype=np.uint8):
    rng = np.random.default_rng(7)
    volume = Volume(root / "volume.zarr")
    volume.add_raw(
        rng.integers(0, np.iinfo(dtype).max, (60, 34, 30), dtype, endpoint=True), raw_step, (-20.0, -16.3, -8.0)
    )
    for name, (step, origin) in CLOSE[how].items():
        shape = tuple(round(n / s) for n, s in zip((180, 170, 168), step, strict=True))
        volume.add(name, blocks(rng, shape, [0, 1, 255], 5).astype(np.uint8), step, origin)
    return volume


def compare(volume, dataset, shape, scale=(8.0, 8.0, 8.0), labels=None, raw=True, count=30, turn_of=lambda turn: turn):
    """Random samples against the direct evaluation of the plain arrays."""
    draws = dataset.draw(range(count), True, 3)
    batch = dataset.layout.finish(dataset.read(draws))
    wrong = 0
    for row, draw in enumerate(draws):
        center, turn = dataset.placement.center(draw.position), turn_of(draw.turn)
        if raw:
            found = batch["raw"][row].numpy().reshape(shape)
            expected = direct(volume.raw, volume.raw_lattice, center, shape, scale, turn, "linear", 0).astype(float)
            assert np.abs(found - expected).max() <= 1
            wrong += (found != expected).sum()
        if labels is not None:
            found = batch["target"][row].numpy().reshape(-1, *shape)
            np.testing.assert_array_equal(found, labels(center, turn))
    assert wrong <= 2e-4 * batch["raw"].numel() * volume.raw.itemsize**4
    return batch


def as_floats(stored):
    return np.where(stored == 255, NAN, (stored != 0).astype(float))


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("how", CLOSE)
def test_off_the_lattice_samples_are_those_of_the_direct_evaluation(tmp_path, how, spatial):
    """Evaluated once on the patches' lattice and kept, or for each patch where that cannot be."""
    volume = off_lattice(tmp_path, how, dtype=np.uint16 if how == "another" else np.uint8)
    shape = (10, 12, 8)

    def labels(center, turn):
        found = [
            direct(volume.labels[c], volume.lattices[c], center, shape, (8,) * 3, turn, "nearest", 255)
            if c in volume.labels
            else np.full(shape, 255)
            for c in ("b", "nobody", "a", "c")
        ]
        return as_floats(np.stack(found))

    for cache in ("disk", "none"):
        given = {"is_train": True, "spatial_transforms": SPATIAL[spatial], "cache": cache}
        with volume.dataset(["b", "nobody", "a", "c"], shape, **given) as dataset:
            compare(volume, dataset, shape, labels=labels)
            assert (dataset._store.decoded > 0) == (cache == "disk")
            if cache == "disk" and "rotated" not in spatial:
                decoded = dataset._store.chunks.decoded
                dataset.read(dataset.draw(range(30), True, 3))
                assert dataset._store.chunks.decoded == decoded, "what is kept is not read again"


@pytest.mark.parametrize("plane", ["xz", "yz"])
def test_slices_in_another_plane_off_the_lattice(tmp_path, plane):
    volume = off_lattice(tmp_path, "one step")
    with volume.dataset(
        ["a"], (12, 16), (8.0, 8.0), is_train=True, plane=plane, spatial_transforms={"mirror": {"axes": {"x": 0.5}}}
    ) as dataset:
        shape, scale = (1, 12, 16), tuple(dataset.crop.windows["raw"].scale)

        def labels(center, turn):
            return as_floats(
                direct(volume.labels["a"], volume.lattices["a"], center, shape, scale, turn, "nearest", 255)
            )

        compare(volume, dataset, shape, scale, lambda *of: labels(*of)[None], turn_of=dataset.crop.plane.turn)


@pytest.mark.parametrize("spatial", ["straight", "mirrored and transposed", "rotated about z"])
@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ("one step", "majority"),
        pytest.param("several", "any", marks=pytest.mark.slow),
        pytest.param("one step", "any", marks=pytest.mark.slow),
        pytest.param("several", "majority", marks=pytest.mark.slow),
    ],
)
def test_votes_off_the_lattice(tmp_path, rule, spatial, how):
    volume = off_lattice(tmp_path, how)
    shape, scale = (6, 8, 10), (10.0, 16.0, 16.0)
    names = list(volume.labels)

    def labels(center, turn):
        return as_floats(
            np.stack([votes(volume.labels[c], volume.lattices[c], center, shape, scale, turn, rule) for c in names])
        )

    given = {"is_train": True, "spatial_transforms": SPATIAL[spatial], "label_downsample": rule}
    for cache in ("disk", "none"):
        with volume.dataset(names, shape, scale, cache=cache, **given) as dataset:
            compare(volume, dataset, shape, scale, labels, raw=False, count=10)


TABLE = 'part,1\nother,2\nwhole,100,"1, 2"\n'


@pytest.mark.parametrize("spatial", ["straight", "mirrored and transposed", "rotated"])
@pytest.mark.parametrize("step", [8.0, 2.62])
def test_what_is_implied_is_kept_as_well(tmp_path, step, spatial):
    """Of classes that are only read for it, on the lattice and off it."""
    (tmp_path / "table.csv").write_text(TABLE)
    rng = np.random.default_rng(9)
    volume = Volume(tmp_path / "volume.zarr").add_raw(rng.integers(0, 256, (40, 34, 30), np.uint8))
    shape_z = round(200 / step)
    for name in ("part", "other", "whole", "rival"):
        volume.add(name, blocks(rng, (shape_z, 24, 24), [0, 1, 255], 6).astype(np.uint8), (step, 8, 8), (16.4, 8, 8))
    shape = (10, 12, 8)
    classes = ["whole", "part", "excluded"]

    def labels(center, turn):
        stored = {
            c: as_floats(direct(volume.labels[c], volume.lattices[c], center, shape, (8,) * 3, turn, "nearest", 255))
            for c in volume.labels
        }
        part, other, whole, rival = (stored[c] for c in ("part", "other", "whole", "rival"))
        either = (part == 1) | (other == 1)
        neither = (part == 0) & (other == 0)
        inferred = np.where(np.isnan(whole), np.where(either, 1, np.where(neither, 0, NAN)), whole)
        piece = np.where(np.isnan(part) & (whole == 0), 0, part)
        return np.stack([inferred, piece, np.where((rival == 1) | (piece == 1), 0, NAN)])

    given = {
        "infer": ["subset", "superset"],
        "class_table": str(tmp_path / "table.csv"),
        "class_relation_dict": {"excluded": ["rival", "part"]},
        "spatial_transforms": SPATIAL[spatial],
        "is_train": True,
    }
    for cache in ("disk", "none"):
        with volume.dataset(classes, shape, cache=cache, **given) as dataset:
            compare(volume, dataset, shape, labels=labels, count=20)


@pytest.mark.parametrize("spatial", SPATIAL)
def test_ids_off_the_lattice(tmp_path, spatial):
    """Also with neighbours outside the patch, and of two lattices."""
    rng = np.random.default_rng(4)
    volume = Volume(tmp_path / "volume.zarr").add_raw(rng.integers(0, 256, (60, 30, 30), np.uint8), (2.62, 8.0, 8.0))
    volume.add(
        "a", blocks(rng, (50, 20, 21), [0, 1, 2, 200, 255], 5).astype(np.uint8), (2.62, 8.0, 8.0), (9.0, 3.0, 8.0)
    )
    volume.add("b", blocks(rng, (17, 40, 20), [0, 7, 255], 5).astype(np.uint8), (8.0, 4.0, 8.0), (8.0, 3.0, 8.0))
    shape = (6, 12, 8)

    def ids(center, turn, size=shape):
        found = [
            direct(volume.labels[c], volume.lattices[c], center, size, (8,) * 3, turn, "nearest", 255).astype(int)
            for c in ("b", "a")
        ]
        return np.where(np.stack(found) == 255, -1, found)

    def pairs(center, turn):
        wide = ids(center, turn, (8, 12, 12))
        here, there = wide[:, 1:-1, :, 2:-2], wide[:, 2:, :, :-4]
        same = ((here == there) & (here > 0)).astype(float)
        return np.where((here == -1) | (there == -1), NAN, same)

    given = {"is_train": True, "spatial_transforms": SPATIAL[spatial], "raw_value_transforms": None}
    for cache in ("disk", "none"):
        with volume.dataset(["b", "a"], shape, cache=cache, target={"kind": "instances"}, **given) as dataset:
            compare(volume, dataset, shape, labels=ids)
    affinities = {"kind": "affinities", "offsets": [[1, 0, -2]]}
    with volume.dataset(["b", "a"], shape, target=affinities, **given) as dataset:
        compare(volume, dataset, shape, labels=pairs)


def test_ids_of_a_crop_that_is_thinner_than_a_voxel_of_the_patches(tmp_path):
    """Where no voxel centre lies in it, nobody says that there is no instance."""
    volume = Volume(tmp_path / "volume.zarr").add_raw(np.full((40, 20, 20), 9, np.uint8))
    volume.add("a", np.full((1, 20, 20), 5, np.uint8), (2.5, 8.0, 8.0), (3.9, 0.0, 0.0))
    with volume.dataset(["a"], (4, 8, 8), target={"kind": "instances"}) as dataset:
        for position in range(0, len(dataset), 97):
            assert (dataset[position]["target"] == -1).all()
    with volume.dataset(["a"], (4, 8, 8)) as dataset:
        assert dataset[0]["target"].isnan().all()


# -- several processes


def digest(batch):
    batch = batch.tensors
    return hashlib.sha256(b"".join(batch[name].numpy().tobytes() for name in sorted(batch))).hexdigest()


def chunks_of(dataset):
    """All the chunks that a dataset can keep."""
    return sum(int(np.prod(region.layout.grid)) for region in [r for c in dataset.crops for r in c.regions])


def test_eight_processes_read_one_dataset(tmp_path):
    """All of them right from the first batch, and every chunk decoded by one of them."""
    rng = np.random.default_rng(2)
    volume = Volume(tmp_path / "volume.zarr").add_raw(rng.integers(0, 256, (130, 100, 140), np.uint8))
    for name in "ab":
        volume.add(name, blocks(rng, (130, 100, 140), [0, 1, 255]).astype(np.uint8))
    given = {"is_train": True, "spatial_transforms": SPATIAL["mirrored and transposed"]}
    with volume.dataset(["a", "b"], (16, 24, 20), cache="none", **given) as plain:
        samples = [plain.draw(range(8 * k, 8 * k + 8), True, 0) for k in range(12)]
        tiles = [plain.draw([n], False, 0) for n in range(plain.tile_count)]
        reference = [digest(plain.read(draws)) for draws in [*samples, *tiles]]
    dataset = volume.dataset(["a", "b"], (16, 24, 20), cache="disk", **given)
    dataset.prepare()
    assert chunks_of(dataset) == 2 * 3 * 2 * 3
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(8), context.Queue()

    def child(number):
        barrier.wait(60)
        order = [(k + number) % len(samples) for k in range(len(samples))]
        right = all(digest(dataset.read(samples[k])) == reference[k] for k in order)
        right &= all(digest(dataset.read(t)) == r for t, r in zip(tiles, reference[len(samples) :], strict=True))
        queue.put((right, dataset._store.decoded))

    processes = [context.Process(target=child, args=(n,)) for n in range(8)]
    [p.start() for p in processes]
    found = [queue.get(timeout=100) for _ in processes]
    [p.join(60) for p in processes]
    assert [right for right, _ in found] == [True] * 8
    assert sum(count for _, count in found) == chunks_of(dataset)
    assert [digest(dataset.read(draws)) for draws in samples] == reference[: len(samples)]
    assert dataset._store.decoded == 0
    dataset.close()


SCRIPT = """
    import hashlib, json, logging, resource, sys
    given = json.loads(sys.argv[1])
    if given["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (given["limit"], given["limit"]))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from cellmap_lightning import CellMapDataset
    from cellmap_lightning.crops.options import ReadOptions
    spec = {"shape": [8, 12, 16], "scale": [8, 8, 8]}
    with CellMapDataset(
        given["raw"], given["target"], given["classes"], {"raw": spec}, {"target": spec},
        read=ReadOptions(cache="disk", pad=True),
    ) as dataset:
        batch = dataset.read(dataset.draw(range(dataset.tile_count), False, 0)).tensors
        again = dataset.read(dataset.draw(range(dataset.tile_count), False, 0)).tensors
        found = [
            hashlib.sha256(b"".join(b[n].numpy().tobytes() for n in sorted(b))).hexdigest() for b in (batch, again)
        ]
        print(json.dumps([*found, dataset._store.decoded]))
"""


def in_a_new_process(volume, tmp_path, limit=0):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    given = {
        "raw": str(volume.root / "raw"),
        "target": f"{volume.root}/crop1/[{','.join(volume.labels)}]",
        "classes": list(volume.labels),
        "limit": limit,
    }
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", json.dumps(given)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr.splitlines()


def tiles(dataset):
    return digest(dataset.read(dataset.draw(range(dataset.tile_count), False, 0)))


def test_another_run_decodes_nothing(volumes, tmp_path):
    volume = volumes["v2 /"]
    with volume.dataset(NAMES[:3], (8, 12, 16), cache="disk", raw_value_transforms="auto") as dataset:
        reference = tiles(dataset)
        assert dataset._store.decoded == 2
    assert in_a_new_process(volume, tmp_path) == ([reference, reference, 0], [])


def test_a_disk_without_room_for_the_files(volumes, tmp_path):
    """They may not be so large: the results are right, one line says why it is slow, and nothing is left there."""
    volume = volumes["v2 /"]
    with volume.dataset(NAMES[:3], (8, 12, 16), cache="none") as dataset:
        reference = tiles(dataset)
    found, said = in_a_new_process(volume, tmp_path, 30_000)
    assert found == [reference, reference, 0]
    (line,) = said
    assert "no room for decoded voxels" in line
    assert "File too large" in line
    assert list((tmp_path / "cache").rglob("*.region")) == []


def test_on_a_network_file_system_voxels_are_kept_in_memory(volumes, tmp_path, monkeypatch, caplog):
    (tmp_path / "mountinfo").write_text(
        f"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:9 / {tmp_path} rw - nfs4 filer:/ rw\n"
    )
    monkeypatch.setattr(location, "filesystem", partial(filesystem, mounts=str(tmp_path / "mountinfo")))
    volume = volumes["v2 /"]
    with volume.dataset(NAMES[:3], (8, 12, 16), cache="none") as dataset:
        reference = tiles(dataset)
    for cache, level in (("disk", logging.WARNING), ("auto", logging.INFO)):
        caplog.clear()
        one = volume.dataset(NAMES[:3], (8, 12, 16), cache=cache)
        other = volume.dataset(NAMES[:3], (8, 12, 16), cache=cache)
        with CellMapMultiDataset([one, other]) as dataset, caplog.at_level(logging.INFO, "cellmap_lightning"):
            assert tiles(one) == reference
            assert tiles(other) == reference
            assert dataset._store.decoded == 2, "both crops are the same"
        records = [r for r in caplog.records if "network file system (nfs4)" in r.getMessage()]
        assert [r.levelno for r in records] == [level]
        assert not list((tmp_path / "cache").rglob("*.region"))


def test_what_does_not_fit_is_said_with_numbers(volumes, caplog):
    volume = volumes[24]
    for is_train, how in ((True, "read from the source each time"), (False, "cached chunk by chunk in memory")):
        caplog.clear()
        with (
            volume.dataset(NAMES, (8, 12, 16), cache="disk", cache_bytes=100_000, is_train=is_train) as dataset,
            caplog.at_level(logging.WARNING, "cellmap_lightning"),
        ):
            dataset[0]
            nbytes = [region.layout.nbytes for region in [r for c in dataset.crops for r in c.regions]]
            assert dataset._store.mapped.tolist() == [True, False]
        (line,) = [r.getMessage() for r in caplog.records]
        assert "1 of 2 arrays" in line
        assert f"({nbytes[1] / 1e9:.2f} GB)" in line
        assert how in line or is_train, "24 classes of a small crop fit into the memory for chunks"
        assert "raise cache_bytes" in line


# -- sources that change


def copied(volume, tmp_path):
    shutil.copytree(volume.root, tmp_path / "copy.zarr")
    copy = Volume.__new__(Volume)
    copy.__dict__.update(volume.__dict__, root=tmp_path / "copy.zarr")
    copy.raw, copy.labels = volume.raw.copy(), {name: array.copy() for name, array in volume.labels.items()}
    return copy


def overwrite(path, box, value):
    """Voxels of an array, as another program would; each file that is written has a new time."""
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}
    zarr.open_array(path, mode="r+")[box] = value
    for p, earlier in before.items():
        stat = p.stat()
        if stat.st_mtime_ns != earlier:
            os.utime(p, ns=(stat.st_atime_ns, max(stat.st_mtime_ns, earlier + 10**7)))


@pytest.fixture
def large(tmp_path):
    """A volume of several chunks that are decoded by themselves."""
    rng = np.random.default_rng(6)
    volume = Volume(tmp_path / "volume.zarr", chunk=32)
    volume.add_raw(rng.integers(0, 256, (130, 70, 100), np.uint8))
    for name in "ab":
        volume.add(name, blocks(rng, (130, 70, 100), [0, 1, 255]).astype(np.uint8))
    return volume


def read_all(volume, step=8.0, classes=("a", "b"), **kwargs):
    """All tiles, checked against a dataset that keeps nothing; how many chunks were decoded."""
    spec = ((32, 48, 40), (step, 8.0, 8.0))
    with volume.dataset(list(classes), *spec, cache="none", **kwargs) as plain:
        reference = plain.read(plain.draw(range(plain.tile_count), False, 0)).tensors
    with volume.dataset(list(classes), *spec, cache="disk", **kwargs) as dataset:
        found = dataset.read(dataset.draw(range(dataset.tile_count), False, 0)).tensors
        assert torch.equal(found["target"], reference["target"])
        assert torch.equal(found["raw"], reference["raw"])
        return dataset._store.decoded, chunks_of(dataset)


@pytest.mark.parametrize("step", [8.0, 8.9])
def test_only_what_changed_is_decoded_again(large, step):
    """A chunk of raw, a chunk of one class; where voxels are resampled, the blocks that are made of it."""
    decoded, count = read_all(large, step)
    assert decoded == count > 10
    assert read_all(large, step) == (0, count)
    few = 1 if step == 8.0 else 4
    overwrite(large.root / "raw" / "s0", np.s_[0:16, 0:16, 0:16], 5)
    assert read_all(large, step) == (1, count)
    overwrite(large.root / "crop1" / "b" / "s0", np.s_[64:80, 64:70, 96:100], 1)
    assert 1 <= read_all(large, step)[0] <= few
    overwrite(large.root / "raw" / "s0", np.s_[:], 6)
    assert read_all(large, step) == (count // 2, count)
    assert read_all(large, step) == (0, count)


@pytest.mark.parametrize("at", [0.1, 0.35, 0.6])
def test_regions_that_are_damaged_on_disk_are_repaired(large, at, cache_dir, caplog):
    """Samples are right, one line per region says so."""
    _, count = read_all(large)
    files = list(cache_dir.rglob("*.region"))
    for file in files:
        with file.open("r+b") as out:
            out.seek(int(at * file.stat().st_size))
            content = out.read(3000)
            out.seek(-len(content), os.SEEK_CUR)
            out.write(bytes(b ^ 0xFF for b in content))
    with caplog.at_level(logging.WARNING, "cellmap_lightning"):
        decoded, _ = read_all(large)
    assert len(files) <= decoded < count
    lines = [record.getMessage() for record in caplog.records if "is damaged in" in record.getMessage()]
    assert {file for file in files for line in lines if str(file) in line} == set(files)
    assert read_all(large) == (0, count)


def slowly(decode, start, shape):
    time.sleep(0.01)
    return decode(start, shape)


@pytest.mark.parametrize("cache", ["disk", "memory", "chunks"])
def test_a_dataset_that_is_closed_while_threads_read(volumes, cache, monkeypatch):
    """Every batch is right, or an error that says so; also where closing does not wait for slow reads."""
    monkeypatch.setattr(pool_module, "PATIENCE", 0.0)
    dataset = volumes["v2 /"].dataset(NAMES[:3], (8, 12, 16), cache=cache)
    for region in [r for c in dataset.crops for r in c.regions]:
        region.decode = partial(slowly, region.decode)
    draws = dataset.draw(range(dataset.tile_count), False, 0)
    reference, stop = digest(dataset.read(draws)), threading.Event()

    def read():
        found = set()
        while not stop.is_set():
            try:
                found.add(digest(dataset.read(draws)) == reference)
            except CellMapError as e:
                found.add(re.sub("^reading was cancelled: ", "", str(e)))
        return found

    with ThreadPoolExecutor(3) as pool:
        reading = [pool.submit(read) for _ in range(3)]
        for _ in range(20):
            time.sleep(0.02)
            dataset.close()
        stop.set()
        found = {result for future in reading for result in future.result(60)}
    assert True in found
    assert found <= {True, "the dataset was closed while it was read"}
    dataset.close()


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_other_classes_are_other_voxels(large):
    """The same crop for another list of classes, in another order, or with other rules."""
    decoded, count = read_all(large)
    assert decoded == count
    half = count // 2  # raw is the same
    for kwargs in (
        {"classes": ("b", "a")},
        {"classes": ("a",)},
        {"classes": ("a", "nobody", "b")},
        {"classes": ("a", "c"), "class_relation_dict": {"c": ["b"]}},
        {"classes": ("a", "c"), "class_relation_dict": {"c": ["a"]}},
        {"classes": ("a", "b"), "annotated": ("a",)},
    ):
        assert read_all(large, **kwargs) == (half, count), kwargs
        assert read_all(large, **kwargs) == (0, count), kwargs
    for unknown in (None, 1, {"a": None}):  # which does not apply: the metadata say what is unknown
        assert read_all(large, unknown=unknown) == (0, count)
    assert read_all(large) == (0, count)


def test_an_encoding_that_was_corrected_is_another_array(large):
    _, count = read_all(large)

    def swap(content):
        content["cellmap"]["annotation"]["annotation_type"]["encoding"] = {"absent": 1, "unknown": 0}

    edit(large.root / "crop1" / "b" / "s0" / ".zattrs", swap)
    assert read_all(large) == (count // 2, count)


@pytest.mark.parametrize("what", ["raw", "crop1/b"])
def test_a_translation_that_was_corrected_moves_resampled_voxels(large, what):
    """By less than a voxel, so that everything else stays as it was."""
    _, count = read_all(large, 8.9)

    def move(content):
        (level,) = content["multiscales"][0]["datasets"]
        level["coordinateTransformations"][1]["translation"][0] = 0.9

    edit(large.root / what / ".zattrs", move)
    decoded, _ = read_all(large, 8.9)
    assert decoded >= count // 2


def test_an_array_that_was_written_again_in_other_chunks(large):
    read_all(large)
    shutil.rmtree(large.root / "raw")
    rng = np.random.default_rng(8)
    write_multiscale(
        large.root / "raw", rng.integers(0, 256, (130, 70, 100), np.uint8), scale=(8, 8, 8), translation=(0, 0, 0),
        chunks=(32, 70, 50),
    )  # fmt: skip
    decoded, count = read_all(large)
    assert 0 < decoded < count


def test_a_source_that_went_away_is_an_error_and_not_what_is_kept(large):
    with large.dataset(["a", "b"], (16, 24, 20), cache="disk") as dataset:
        dataset[0]
    for file in (large.root / "raw" / "s0").rglob("*"):
        if file.is_file() and file.name[0] != ".":
            file.write_bytes(b"no chunk")
    with large.dataset(["a", "b"], (16, 24, 20), cache="disk") as dataset, pytest.raises(CellMapError, match="raw: "):
        dataset[0]


# -- what people see


def test_samples_of_many_crops_share_one_store(volumes, cache_dir):
    volume = volumes["v2 /"]
    crops = [volume.dataset(NAMES[:3], (8, 12, 16), is_train=True) for _ in range(3)]
    alone = [tiles(crop) for crop in crops]
    with CellMapMultiDataset(crops) as dataset:
        assert [tiles(crop) for crop in crops] == alone
        assert {id(crop._store) for crop in crops} == {id(dataset._store)}
        assert len(list(cache_dir.rglob("*.region"))) == 2, "one for raw, one for the labels"
    assert dataset._store.decoded == 0


def test_a_kept_batch_is_never_written_to(volumes):
    """Batches of a loop that keeps them, while others are read into memory that was given back."""
    volume = volumes["v2 /"]
    with volume.dataset(NAMES[:3], (16, 32, 28), is_train=True) as dataset:
        kept, copies = [], []
        for k in range(12):
            batch = dataset.layout.finish(dataset.read(dataset.draw(range(24 * k, 24 * k + 24), True, 0)))
            if k % 3 == 0:
                kept.append({"raw": batch["raw"], "view": batch["target"][3:, 1].numpy()})
                copies.append({"raw": batch["raw"].clone(), "view": batch["target"][3:, 1].numpy().copy()})
            del batch
        for held, copy in zip(kept, copies, strict=True):
            assert torch.equal(held["raw"], copy["raw"])
            np.testing.assert_array_equal(held["view"], copy["view"])


def test_what_one_can_say_about_the_cache(volumes):
    volume = volumes["v2 /"]
    for bad, match in (({"cache": "ssd"}, "cache is one of"), ({"cache_bytes": -5}, "cache_bytes must be")):
        with pytest.raises(CellMapError, match=match):
            volume.dataset(NAMES[:3], (8, 12, 16), **bad)
    one = volume.dataset(NAMES[:3], (8, 12, 16), cache="none")
    two = volume.dataset(NAMES[:3], (8, 12, 16), cache="memory")
    with pytest.raises(CellMapError, match="differ in their cache: memory and none"):
        CellMapMultiDataset([one, two])


def test_quarter_turns_are_copies(volumes):
    """A rotation by exactly 90 degrees is a box of what is kept, and so is every turn of the augmentation."""
    volume = volumes["v2 /"]
    with volume.dataset(NAMES[:3], (8, 12, 16), spatial_transforms=SPATIAL["rotated about z"]) as dataset:
        dataset.prepare()
        place = dataset.placement.place(len(dataset) // 2)
        for turn in (rotation("z", 90), rotation("x", 180), rotation("y", 270)):
            assert dataset.crop.missing("raw", place, turn) is not None
            assert dataset.crop.missing("target", place, turn) is not None
        assert dataset.crop.missing("raw", place, rotation("z", 45)) is None
