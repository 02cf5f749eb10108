"""Samples off the lattice of stored voxels: cached resampled arrays against direct evaluation."""

import sys

import numpy as np
import pytest

from cellmap_lightning.geometry.lattice import AffineMap, patch_map
from cellmap_lightning.geometry.resample import evaluate
from tests.cache.annotated_volume import NAN, SPATIAL, Volume, blocks

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="decoded voxels are shared so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


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
    """Resampled once to the patches' lattice and cached, or evaluated for each patch where that is not possible."""
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
                assert dataset._store.chunks.decoded == decoded, "what is cached is not read again"


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
def test_implied_voxels_are_cached_too(tmp_path, step, spatial):
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
    """Without a voxel centre inside, the crop is unannotated and not background."""
    volume = Volume(tmp_path / "volume.zarr").add_raw(np.full((40, 20, 20), 9, np.uint8))
    volume.add("a", np.full((1, 20, 20), 5, np.uint8), (2.5, 8.0, 8.0), (3.9, 0.0, 0.0))
    with volume.dataset(["a"], (4, 8, 8), target={"kind": "instances"}) as dataset:
        for position in range(0, len(dataset), 97):
            assert (dataset[position]["target"] == -1).all()
    with volume.dataset(["a"], (4, 8, 8)) as dataset:
        assert dataset[0]["target"].isnan().all()
