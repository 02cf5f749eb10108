"""Sample ``g`` is a function of (seed, g): bit-identical for all readers, loaders and processes."""

import hashlib
import itertools
import random
import tracemalloc
from multiprocessing.util import Finalize

import numpy as np
import pytest
import torch

from cellmap_lightning import CellMapDataLoader, CellMapDataset, CellMapMultiDataset
from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from cellmap_lightning.loading.options import LoaderOptions
from cellmap_lightning.loading.prefetch import PrefetchDecision
from cellmap_lightning.resident.device_cache import DeviceCache
from tests.conftest import CLASSES
from tests.make import make_dataset
from tests.sampling.bare import write_bare

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

SEED, EPOCH, EPOCHS = 11, 8, 2
FINE = {"shape": [6, 15, 17], "scale": [10.48, 8, 8]}
KINDS = {
    "binary": {},
    "numbers": {"kind": "labels"},
    "ids": {"kind": "instances"},
    "pairs": {"kind": "affinities", "offsets": [[1, 0, 0], [0, -2, 1]]},
    "near": {"kind": "sdt", "nm": 50},
}
VALUES = {"blur": [0, 9], "contrast": [0.7, 1.3], "brightness": [-0.1, 0.1], "gamma": [0.7, 1.4], "noise": [0, 0.1]}
#: Every intensity effect, and targets that are unknown in missing sections.
EFFECTS = {
    "low_resolution": {"probability": 0.5, "voxel_size": [8, 40]},
    "motion_blur": {"probability": 0.5, "length": [0, 40]},
    "match_histogram": {"probability": 0.5, "quantiles": [[0.1, 0.2, 0.7], [0.0, 0.9]]},
    "section_contrast": {"probability": 0.5},
    "dark_section": {"probability": 0.2},
    "stripes": {"probability": 0.5, "amplitude": [0, 0.3], "width": [10, 40]},
    "poisson": {"probability": 0.5, "counts": [10, 100]},
    "salt_pepper": {"probability": 0.5, "fraction": [0, 0.2]},
    "cutnoise": {"probability": 0.5, "size": [20, 60], "std": [0.1, 0.3]},
    "cutout": {"probability": 0.5, "size": [20, 60]},
    "missing_section": {"probability": 0.3, "unknown": True},
}
MIRRORED = {"mirror": {"axes": {"x": 0.5, "y": 0.5, "z": 0.5}}, "transpose": {"axes": ["x", "y"]}}


def own_noise(value):
    """A value transform of user code that uses every random generator."""
    drawn = torch.randn(value.shape) + random.random() + torch.from_numpy(np.random.normal(size=value.shape))  # noqa: NPY002
    return value.to(torch.float32) + drawn


def own_flicker(value):
    return value * random.choice([1.0, 0.5]) + 0 * torch.rand(())


#: Three training sets with everything on. In the first every patch is computed, and functions of user code run; in the
#: second patches are slices of a resampled array, which is cached; in the third they are displaced.
SETS = {
    "turned": {
        "input_arrays": {"raw": FINE, "around": {"shape": [4, 9, 10], "scale": [20.96, 16, 16]}},
        "target_arrays": {name: {**FINE, **kind} for name, kind in KINDS.items()},
        "spatial_transforms": {**MIRRORED, "rotate": {"axes": {"z": [-180, 180]}}},
        "raw_value_transforms": {"around": own_noise},
        "target_value_transforms": {"er": own_flicker},
        "normalize": "zscore",
    },
    "resampled": {
        "input_arrays": {"raw": {**FINE, "scale": [9, 7.1, 11.3]}},
        "target_arrays": {name: {**FINE, "scale": [9, 7.1, 11.3], **kind} for name, kind in KINDS.items()},
        "spatial_transforms": MIRRORED,
        "class_relation_dict": {"pm": ["mito"]},
        "infer": ["subset", "superset"],
    },
    "warped": {
        "input_arrays": {"raw": FINE, "around": {"shape": [4, 9, 10], "scale": [20.96, 16, 16]}},
        "target_arrays": {name: {**FINE, **kind} for name, kind in KINDS.items()},
        "spatial_transforms": {
            **MIRRORED,
            "rotate": {"axes": {"z": [-180, 180]}},
            "zoom": [0.8, 1.2],
            "shear": {"axes": {"zx": [-0.2, 0.2]}},
            "elastic": {"spacing": 60, "magnitude": 20},
            "slip": {"probability": 0.2, "max_shift": 16, "thickness": 10.48},
            "misalign": {"probability": 0.2, "max_shift": 16, "thickness": 10.48, "rotate": 4},
        },
    },
}


def open_set(volume, name, threads=1, reader="zarr", cache="none", seed=SEED):
    return CellMapMultiDataset(
        [
            make_dataset(
                volume.raw_path,
                f"{volume.path}/recon-1/labels/groundtruth/{crop}/[{','.join(has)}]",
                CLASSES,
                is_train=True,
                seed=seed,
                read=ReadOptions(pad=True, max_workers=threads, reader=reader, cache=cache),
                labels=LabelOptions(too_coarse="upsample"),
                intensity=IntensityOptions(intensity_transforms=VALUES | EFFECTS),
                **SETS[name],
            )
            for crop, has in (("crop1", ["mito", "er"]), ("crop2", CLASSES), ("crop3", CLASSES))
        ],
        {"name": "mix", "parts": {"class_balanced": 2, "foreground": 2, "uniform": 1}},
    )


def digest(batch):
    """One number for the bits of a batch or a sample, NaN included."""
    found = hashlib.sha256()
    for name in sorted(batch):
        tensor = batch[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def one_by_one(batch):
    return [digest({name: tensor[row] for name, tensor in batch.items()}) for row in range(len(batch["idx"]))]


def passes(dataset, workers=0, method=None, depth=0, world=1, size=4, resident=None, **more):
    """``{sample: digest}`` and the digests of the batches of each rank, of two epochs; ranks come one after another."""
    decision = PrefetchDecision(True, depth, 0, "") if depth else None
    samples, batches = {}, []
    for rank in range(world):
        loader = CellMapDataLoader(
            dataset, size // world, workers, EPOCH,
            options=LoaderOptions(decision=decision, rank=rank, world=world, resident=resident),
            multiprocessing_context=method if workers else None, **more,
        )  # fmt: skip
        for epoch in range(EPOCHS):
            numbers = iter(range(epoch * EPOCH + rank, (epoch + 1) * EPOCH, world))
            for batch in loader:
                batches.append(digest(batch))
                samples |= {next(numbers): bits for bits in one_by_one(batch)}
            assert next(numbers, None) is None
        loader.close()
    return samples, batches


@pytest.fixture(autouse=True, scope="module")
def threads_of_torch():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def references(volume, tmp_path_factory):
    """Reference samples: one thread, no cache, an empty cache folder, sample by sample."""
    found = {}
    for name in SETS:
        with pytest.MonkeyPatch.context() as patch, open_set_in(patch, volume, name, tmp_path_factory) as dataset:
            torch.set_num_threads(1)
            samples, _ = passes(dataset, size=1)
            assert len(set(samples.values())) == EPOCH * EPOCHS == len(samples)
            # By batches of whole samples, in the order in which one process would read them.
            found[name] = samples, {world: passes(dataset, world=world)[1] for world in (1, 2, 4)}
    return found


def open_set_in(patch, volume, name, tmp_path_factory):
    patch.setenv("CELLMAP_CACHE_DIR", str(tmp_path_factory.mktemp("empty")))
    return open_set(volume, name)


def check(volume, references, name, threads=1, reader="zarr", cache="auto", world=1, room=0, **how):
    if reader == "tensorstore":
        pytest.importorskip("tensorstore")
    torch.set_num_threads(threads)
    with open_set(volume, name, threads, reader, cache) as dataset:
        if room:  # the ranks share it one after another
            how["resident"] = DeviceCache("cpu", room)
        samples, batches = passes(dataset, world=world, **how)
        assert not room or 0 < how["resident"].nbytes <= room
    assert samples == references[name][0]
    assert batches == references[name][1][world]


#: Every value of every dimension at least once; processes that have to import everything cost seconds.
ROWS = [
    {},
    {"cache": "none", "threads": 4},
    {"cache": "memory", "depth": 1, "reader": "tensorstore"},
    {"cache": "disk", "depth": 3, "world": 2, "threads": 4},
    {"cache": "none", "world": 4, "reader": "tensorstore", "threads": 4},
    {"cache": "device", "room": 1 << 30},
    {"cache": "device", "room": 2_400_000, "threads": 4, "depth": 2, "world": 2},
    {"cache": "none", "room": 1 << 30, "depth": 1, "reader": "tensorstore"},
    {"workers": 1, "method": "fork", "cache": "memory", "threads": 4, "depth": 1},
    {"workers": 2, "method": "fork", "cache": "disk", "world": 2},
]
SLOWER_ROWS = [
    ("turned", {"workers": 2, "method": "forkserver", "reader": "tensorstore", "cache": "none", "depth": 3}),
    pytest.param("resampled", {"workers": 1, "method": "spawn", "cache": "disk"}, marks=pytest.mark.slow),
    ("warped", {"workers": 1, "method": "spawn", "cache": "memory"}),
]


def words(value):
    return value if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value.items()) or "plain"


@pytest.mark.cover(1)
@pytest.mark.parametrize("how", ROWS, ids=words)
@pytest.mark.parametrize("name", SETS)
def test_the_same_bits_however_it_is_read(volume, references, name, how):
    check(volume, references, name, **how)


@pytest.mark.parametrize(("name", "how"), SLOWER_ROWS, ids=words)
def test_the_same_bits_from_processes_that_start_anew(volume, references, name, how):
    check(volume, references, name, **how)


CACHES, READERS = ("auto", "device", "disk", "memory", "none"), ("zarr", "tensorstore")


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("threads", [1, 4])
def test_the_full_product(volume, references, name, cache, reader, threads):
    """All of it without workers; with workers, those are left out that would only start the same processes again."""
    if reader == "tensorstore":
        pytest.importorskip("tensorstore")
    torch.set_num_threads(threads)
    ways = [(0, None, depth, world) for depth, world in itertools.product((0, 1, 3), (1, 2, 4))]
    if reader == "zarr":
        ways += [(threads // 2 or 1, "fork", depth, world) for depth, world in ((0, 4), (1, 2), (3, 1))]
    ways.append((2, "forkserver", 3, 1) if threads == 4 else (1, "spawn", 1, 1))
    for workers, method, depth, world in ways:
        how = {"workers": workers, "method": method, "depth": depth, "world": world}
        resident = DeviceCache("cpu", 1 << 30) if cache == "device" and not workers else None
        with open_set(volume, name, threads, reader, cache) as dataset:
            samples, batches = passes(dataset, resident=resident, **how)
        assert samples == references[name][0], how
        assert batches == references[name][1][world], how


@pytest.mark.parametrize("name", SETS)
def test_neither_batches_nor_the_order_of_reading_count(volume, references, name):
    reference, _ = references[name]
    with open_set(volume, name, cache="auto") as dataset:
        for size in (2, 8):
            assert passes(dataset, size=size)[0] == reference
        loader = CellMapDataLoader(dataset, 1, samples_per_epoch=EPOCH)
        numbers = list(reference)
        random.Random(0).shuffle(numbers)
        assert {n: digest(loader.dataset[n]) for n in numbers} == reference
        # And with the order and the batches of another loader.
        batches = [numbers[:3], numbers[3:4], numbers[4:11], numbers[11:]]
        found = [one_by_one(b) for b in CellMapDataLoader(loader.dataset, batch_sampler=batches)]
        assert found == [[reference[n] for n in batch] for batch in batches]
    with open_set(volume, name, seed=SEED + 1) as dataset:
        assert not set(passes(dataset)[0].values()) & set(reference.values())


def test_any_ranks_see_the_same_global_batches(volume, references):
    with open_set(volume, "turned", cache="auto") as dataset:
        for world in (1, 2, 4):
            ranks = [
                [
                    one_by_one(b)
                    for b in CellMapDataLoader(
                        dataset, 4 // world, 0, EPOCH + 3, options=LoaderOptions(rank=rank, world=world)
                    )
                ]
                for rank in range(world)
            ]
            assert [len(batches) for batches in ranks] == [2] * world, "what is no complete global batch is left out"
            together = [set(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
            reference = references["turned"][0]
            assert together == [{reference[n] for n in range(first, first + 4)} for first in (0, 4)]


# -- global generators


def hashed_states():
    """The states of the global generators, as one number."""
    name, keys, *more = np.random.get_state()  # noqa: NPY002
    found = (torch.get_rng_state().tolist(), name, keys.tolist(), more, random.getstate())
    return hashlib.sha256(repr(found).encode()).hexdigest()


def watched(folder):
    """A `worker_init_fn` that writes, when its process ends, whether the generators are as they were."""

    def begin(worker):
        before = hashed_states()
        Finalize(None, lambda: (folder / f"{worker}").write_text(str(hashed_states() == before)), exitpriority=100)

    return begin


@pytest.mark.cover(1)
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_neither_used_nor_touched(volume, references, tmp_path, name, workers):
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        before = hashed_states()
        with open_set(volume, name, cache="auto") as dataset:
            samples, _ = passes(dataset, workers, "fork", worker_init_fn=watched(tmp_path))
            dataset[3]
        assert hashed_states() == before
        assert samples == references[name][0]
        assert sorted((p.name, p.read_text()) for p in tmp_path.iterdir()) == [(str(w), "True") for w in range(workers)]


# -- size


def test_a_volume_of_a_million_million_voxels_costs_nothing(tmp_path):
    """From the start of an epoch to its samples' description: no permutation, no list of positions."""
    edge = 10_000
    blob = (np.random.default_rng(0).random((64, 64, 64)) < 0.01).astype(np.uint8)
    write_bare(tmp_path / "raw", [edge] * 3, [8] * 3)
    for name in ("a", "b"):
        file = write_bare(tmp_path / "crop" / name, [edge] * 3, [8] * 3, foreground=int(blob.sum())) / "s0" / "0/0/0"
        file.write_bytes(blob.tobytes())
    spec = {"shape": [64] * 3, "scale": [8] * 3}
    dataset = CellMapMultiDataset(
        [
            CellMapDataset(
                tmp_path / "raw",
                f"{tmp_path}/crop/[a,b]",
                ["a", "b"],
                {"raw": spec},
                {"labels": spec},
                is_train=True,
                spatial_transforms=SETS["turned"]["spatial_transforms"],
                read=ReadOptions(max_workers=1),
            )
        ]
    )
    tracemalloc.start()  # NumPy reports its arrays to it
    try:
        loader = CellMapDataLoader(dataset, 4, samples_per_epoch=10**12)
        assert len(loader) == 10**12 // 4
        assert len(dataset) > 0.9e12
        loader.set_epoch(3)
        loader.dataset.prepare()
        assert list(itertools.islice(loader.sampler.numbers(), 2)) == [0, 1]
        drawn = [dataset.draw(range(first, first + 4), True, 0) for first in (0, 10**12, 7 * 10**12)]
        tiles = CellMapDataLoader(dataset, 4, is_train=False)
        first = [tiles.dataset.tiles[n] for n in (0, 1, len(tiles.dataset) - 1)]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        dataset.close()
    assert len({draw.position for draws in drawn for draw in draws}) == 12
    assert len(set(first)) == 3
    assert most < 2 << 20, f"{most / 2**20:.1f} MiB"
