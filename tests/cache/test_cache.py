"""Samples do not depend on the cache mode, compared with an independent computation from stored voxels."""

import itertools
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from cellmap_lightning import CellMapError, CellMapMultiDataset
from cellmap_lightning.datasets.source import Draw
from cellmap_lightning.runtime import location
from cellmap_lightning.runtime.location import filesystem
from cellmap_lightning.transforms.spatial import rotation
from cellmap_lightning.wording import size_text
from tests.cache.annotated_volume import (
    NAMES,
    NAN,
    SPATIAL,
    STORAGE,
    Volume,
    blocks,
    chunks_of,
    digest,
)

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="decoded voxels are shared so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
ROOT = Path(__file__).parents[2]
TURNS = [
    np.eye(3)[list(p)] * np.asarray(signs)
    for p in itertools.permutations(range(3))
    for signs in itertools.product((1.0, -1.0), repeat=3)
]


def box_of(array, first, shape, turn, outside):
    """A box of an array in a signed permutation of its axes, by indexing alone; ``first``: that of the straight box."""
    axes = np.abs(turn).argmax(axis=0)
    size = np.zeros(3, int)
    size[axes] = shape
    lo = np.asarray(first) + (np.asarray(shape) - size) // 2
    # The part inside of the array, in a box of what is outside.
    inside = [range(max(a, 0), min(a + n, m)) for a, n, m in zip(lo.tolist(), size.tolist(), array.shape, strict=True)]
    box = np.full(size, outside, array.dtype)
    if all(inside):
        there = tuple(slice(r.start - a, r.stop - a) for r, a in zip(inside, lo.tolist(), strict=True))
        box[there] = array[tuple(slice(r.start, r.stop) for r in inside)]
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
def test_samples_equal_stored_voxels(volumes, storage, reader):
    """For all names and shapes of chunks, and both decoding libraries."""
    if reader == "tensorstore":
        pytest.importorskip("tensorstore")
    decoded, by_chunks = check_all_turns(volumes[storage], NAMES[:3], 0, cache="disk", reader=reader)
    assert decoded == 2  # all of raw, all of the labels
    assert by_chunks == 0


@pytest.mark.cover(2)
@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("classes", [1, 11])
def test_samples_do_not_depend_on_the_cache_mode(volumes, cache, reader, classes):
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


def test_eight_processes_read_one_dataset(tmp_path):
    """All of them right from the first batch, and every chunk decoded by one of them."""
    rng = np.random.default_rng(2)
    volume = Volume(tmp_path / "volume.zarr").add_raw(rng.integers(0, 256, (80, 70, 90), np.uint8))
    for name in "ab":
        volume.add(name, blocks(rng, (80, 70, 90), [0, 1, 255]).astype(np.uint8))
    given = {"is_train": True, "spatial_transforms": SPATIAL["mirrored and transposed"]}
    with volume.dataset(["a", "b"], (16, 24, 20), cache="none", **given) as plain:
        samples = [plain.draw(range(8 * k, 8 * k + 8), True, 0) for k in range(12)]
        tiles = [plain.draw([n], False, 0) for n in range(plain.tile_count)]
        reference = [digest(plain.read(draws)) for draws in [*samples, *tiles]]
    dataset = volume.dataset(["a", "b"], (16, 24, 20), cache="disk", **given)
    dataset.prepare()
    assert chunks_of(dataset) == 2 * 2 * 2 * 2
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
    # Files of a measurement of coverage would be too large too.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", json.dumps(given)],
        env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False, text=True, timeout=100,
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


def test_on_a_network_file_system_voxels_are_cached_in_memory(volumes, tmp_path, monkeypatch, caplog):
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


def test_arrays_beyond_the_budget_are_logged_with_numbers(volumes, caplog):
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
        assert f"({size_text(nbytes[1])})" in line
        assert how in line or is_train, "24 classes of a small crop fit into the memory for chunks"
        assert "raise cache_bytes" in line


# -- sources that change


def copied(volume, tmp_path):
    shutil.copytree(volume.root, tmp_path / "copy.zarr")
    copy = Volume.__new__(Volume)
    copy.__dict__.update(volume.__dict__, root=tmp_path / "copy.zarr")
    copy.raw, copy.labels = volume.raw.copy(), {name: array.copy() for name, array in volume.labels.items()}
    return copy


# -- options and messages


def test_samples_of_many_crops_share_one_store(volumes, cache_dir):
    volume = volumes["v2 /"]
    crops = [volume.dataset(NAMES[:3], (8, 12, 16), is_train=True) for _ in range(3)]
    alone = [tiles(crop) for crop in crops]
    with CellMapMultiDataset(crops) as dataset:
        assert [tiles(crop) for crop in crops] == alone
        assert {id(crop._store) for crop in crops} == {id(dataset._store)}
        assert len(list(cache_dir.rglob("*.region"))) == 2, "one for raw, one for the labels"
    assert dataset._store.decoded == 0


def test_earlier_batches_are_never_written_to(volumes):
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


def test_values_of_the_cache_options(volumes):
    volume = volumes["v2 /"]
    for bad, match in (({"cache": "ssd"}, "cache must be one of"), ({"cache_bytes": -5}, "cache_bytes must be")):
        with pytest.raises(CellMapError, match=match):
            volume.dataset(NAMES[:3], (8, 12, 16), **bad)
    one = volume.dataset(NAMES[:3], (8, 12, 16), cache="none")
    two = volume.dataset(NAMES[:3], (8, 12, 16), cache="memory")
    with pytest.raises(CellMapError, match="differ in their cache: memory and none"):
        CellMapMultiDataset([one, two])


def test_quarter_turns_are_copies(volumes):
    """A rotation by exactly 90 degrees is a slice of the cached array."""
    volume = volumes["v2 /"]
    with volume.dataset(NAMES[:3], (8, 12, 16), spatial_transforms=SPATIAL["rotated about z"]) as dataset:
        dataset.prepare()
        place = dataset.placement.grid_index(len(dataset) // 2)
        for turn in (rotation("z", 90), rotation("x", 180), rotation("y", 270)):
            assert dataset.crop.missing("raw", place, turn) is not None
            assert dataset.crop.missing("target", place, turn) is not None
        assert dataset.crop.missing("raw", place, rotation("z", 45)) is None
