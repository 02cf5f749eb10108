"""The same work by ours and by each peer.

A sample is a patch of raw at a random place inside a crop, and the patch of each class there. All deliver batches: raw
float32 in [0, 1], `[N, 1, z, y, x]`, and labels `[N, C, z, y, x]`; only ours, where it is compact, delivers what would
travel to a device (raw uint8, labels as bits). Peers are set up as their documentation says, with every cheap choice
made in their favour: see the comments. They are imported when they are asked for, so one file serves every environment.
"""

import inspect
import itertools
import math
import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

#: Samples of an epoch, where a loader needs a number: more than a measurement draws.
MANY = 1_000_000

AUGMENTS = ("none", "mirror", "rotate", "elastic")


class NotSupported(Exception):  # noqa: N818
    """The implementation cannot do this work."""


@dataclass
class Work:
    """The patches to deliver.

    Attributes:
        volume: as `data.describe` gives it.
        patch: voxels a side.
        augment: ``none``; ``mirror``: half of the samples mirrored along each axis, and the axes permuted; ``rotate``:
            any angle about z, and mirrored; ``elastic``: the same, and displaced by up to 6 voxels by control points
            that are 32 voxels apart.
        classes: how many of the volume's classes.
        crops: how many of the volume's crops.
        workers: worker processes.
        options: passed on, as an implementation understands them.
    """

    volume: dict
    patch: int = 64
    batch: int = 4
    augment: str = "none"
    classes: int = 8
    crops: int = 1
    workers: int = 0
    seed: int = 1
    options: dict = field(default_factory=dict)

    @property
    def names(self):
        return self.volume["classes"][: self.classes]

    @property
    def spec(self):
        return {"shape": [self.patch] * 3, "scale": [self.volume["scale"]] * 3}

    @property
    def raw_path(self):
        return f"{self.volume['root']}/raw"

    @property
    def crop_paths(self):
        return [f"{self.volume['root']}/{crop['path']}" for crop in self.volume["crops"][: self.crops]]

    @property
    def bracket_paths(self):
        return [f"{path}/[{','.join(self.names)}]" for path in self.crop_paths]

    @property
    def spatial(self):
        """The augmentation as ours and cellmap-data say it."""
        mirror = {"axes": {"x": 0.5, "y": 0.5, "z": 0.5}}
        return {
            "none": None,
            "mirror": {"mirror": mirror, "transpose": {"axes": ["x", "y", "z"]}},
            "rotate": {"mirror": mirror, "rotate": {"axes": {"z": [-180, 180]}}},
            "elastic": {
                "mirror": mirror,
                "rotate": {"axes": {"z": [-180, 180]}},
                "elastic": {"spacing": 32 * self.volume["scale"], "magnitude": 6 * self.volume["scale"]},
            },
        }[self.augment]

    def only(self, augments=AUGMENTS, workers=False, crops=False):
        """Refuse work that an implementation cannot do."""
        if self.augment not in augments:
            raise NotSupported(f"no augmentation {self.augment!r}")
        if self.workers and not workers:
            raise NotSupported("no worker processes")
        if self.crops > 1 and not crops:
            raise NotSupported("one crop only")


@dataclass
class Source:
    """Batches without end, and how to give back what they hold."""

    batches: Iterable
    close: Callable = lambda: None


@dataclass(frozen=True)
class Implementation:
    """One way to do the work.

    Attributes:
        build: from the work to a source of batches.
        title: what tables call it.
        needs: what it imports, ``module`` or ``module:name``.
        packages: distributions whose versions matter.
        python: the key of the interpreter that it runs with.
        compact: delivers what would travel, not what a network takes.
        keeps: keeps what it decoded, and is measured once most of that is there.
    """

    build: Callable
    title: str
    needs: tuple
    packages: tuple
    python: str
    compact: bool = False
    keeps: bool = False


IMPLEMENTATIONS: dict[str, Implementation] = {}


def implementation(name, title, needs, packages, python=None, **flags):
    def add(build):
        IMPLEMENTATIONS[name] = Implementation(build, title, needs, packages, python or name, **flags)
        return build

    return add


def forever(loader):
    return itertools.chain.from_iterable(itertools.repeat(loader))


# Ours


def _ours(work, finish):
    from cellmap_lightning import CellMapDataLoader, CellMapDataset, CellMapMultiDataset, ReadOptions

    options = dict(work.options)
    if "cache_bytes" in options:
        options["cache_bytes"] = int(options["cache_bytes"])
    datasets = [
        CellMapDataset(
            work.raw_path,
            path,
            work.names,
            {"raw": work.spec},
            {"labels": work.spec},
            is_train=True,
            spatial_transforms=work.spatial,
            seed=work.seed,
            read=ReadOptions(**options),
        )
        for path in work.bracket_paths
    ]
    dataset = datasets[0] if len(datasets) == 1 else CellMapMultiDataset(datasets)
    loader = CellMapDataLoader(
        dataset, batch_size=work.batch, samples_per_epoch=MANY, num_workers=work.workers, finish=finish
    )
    return Source(forever(loader), dataset.close)


_OURS = {
    "needs": (
        "cellmap_lightning:CellMapDataset",
        "cellmap_lightning:CellMapDataLoader",
        "cellmap_lightning:CellMapMultiDataset",
    ),
    "packages": ("cellmap-lightning", "torch", "numpy", "zarr"),
    "python": "ours",
}


@implementation("ours", "ours, compact", **_OURS, compact=True, keeps=True)
def ours(work):
    return _ours(work, finish=False)


@implementation("ours-finished", "ours, finished", **_OURS, keeps=True)
def ours_finished(work):
    return _ours(work, finish=True)


def _tenth(work):
    """A tenth of the bytes that the crop would take if it were held: a byte per voxel of raw, two bits per class."""
    voxels = work.volume["crop_size"] ** 3
    return voxels * (1 + 2 * math.ceil(len(work.names) / 8)) // 10


@implementation("ours-tenth-zarr", "ours, reader=zarr", **_OURS)
def ours_tenth_zarr(work):
    work.options.setdefault("cache_bytes", _tenth(work))
    return _ours(work, finish=True)


@implementation(
    "ours-tenth-tensorstore",
    "ours, reader=tensorstore",
    needs=(*_OURS["needs"], "tensorstore"),
    packages=(*_OURS["packages"], "tensorstore"),
    python="ours",
)
def ours_tenth_tensorstore(work):
    work.options.setdefault("cache_bytes", _tenth(work))
    work.options.setdefault("reader", "tensorstore")
    return _ours(work, finish=True)


@implementation("ours-none-zarr", "ours, cache=none, reader=zarr", **_OURS)
def ours_none_zarr(work):
    work.options.setdefault("cache", "none")
    return _ours(work, finish=True)


@implementation(
    "ours-none-tensorstore",
    "ours, cache=none, reader=tensorstore",
    needs=(*_OURS["needs"], "tensorstore"),
    packages=(*_OURS["packages"], "tensorstore"),
    python="ours",
)
def ours_none_tensorstore(work):
    work.options.setdefault("cache", "none")
    work.options.setdefault("reader", "tensorstore")
    return _ours(work, finish=True)


# cellmap-data


def _unit(raw):
    """Grey values to [0, 1], without a copy where they are floats already."""
    return raw.div_(255) if raw.is_floating_point() else raw / 255


def _as_stored(labels):
    return labels


def _cellmap(work):
    import torch
    from cellmap_data import CellMapDataLoader, CellMapDataset

    work.only(workers=True)
    spec = {name: tuple(value) for name, value in work.spec.items()}
    known = inspect.signature(CellMapDataset.__init__).parameters
    arguments = {
        "raw_value_transforms": _unit,
        "spatial_transforms": work.spatial,
        "force_has_data": True,  # as nothing is counted then, it starts sooner
    }
    if "is_train" in known:  # up to 2025
        arguments |= {"is_train": True, "target_value_transforms": _as_stored, "pad": True}
    else:
        # Turned patches reach beyond the crop, and come out damaged unless that is padded.
        arguments |= {"pad": work.augment == "rotate"}
    if "device" in known:
        arguments["device"] = "cpu"
    dataset = CellMapDataset(
        work.raw_path, work.bracket_paths[0], work.names, {"raw": spec}, {"labels": spec}, **arguments
    )
    # Of its samplers, one permutes all 38 million places, the other picks the class first; this is the cheapest.
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=MANY)
    loader = CellMapDataLoader(
        dataset,
        classes=work.names,
        batch_size=work.batch,
        num_workers=work.workers,
        sampler=sampler,
        is_train=True,
        device="cpu",
        **({"persistent_workers": True} if work.workers else {}),
    )
    return Source(forever(loader if hasattr(loader, "__iter__") else loader.loader))


_CELLMAP = {"needs": ("torch.utils.data", "cellmap_data"), "packages": ("cellmap-data", "torch", "numpy", "zarr")}


@implementation("cellmap", "cellmap-data", **_CELLMAP)
def cellmap(work):
    return _cellmap(work)


@implementation("cellmap-old", "cellmap-data (older)", **_CELLMAP)
def cellmap_old(work):
    return _cellmap(work)


# Plain loops


def _assembled(work, samples):
    """Patches of a batch as two new tensors; each patch is copied once."""
    import torch

    side = (work.patch,) * 3
    raw = np.empty((work.batch, 1, *side), np.float32)
    labels = np.empty((work.batch, len(work.names), *side), np.uint8)
    for i, (grey, classes, view) in enumerate(samples):
        np.multiply(view(grey), np.float32(1 / 255), out=raw[i, 0])
        for c, label in enumerate(classes):
            labels[i, c] = view(label)
    return {"raw": torch.from_numpy(raw), "labels": torch.from_numpy(labels)}


def _places(work):
    """Boxes in raw and in the crop, and how to look at the patch: without end."""
    rng = np.random.default_rng(work.seed)
    offset = work.volume["crops"][0]["offset"]
    while True:
        start = rng.integers(0, work.volume["crop_size"] - work.patch + 1, 3)
        in_crop = tuple(slice(int(s), int(s) + work.patch) for s in start)
        in_raw = tuple(slice(int(s) + o, int(s) + o + work.patch) for s, o in zip(start, offset, strict=True))
        if work.augment == "mirror":
            steps = tuple(slice(None, None, -1 if back else 1) for back in rng.random(3) < 0.5)
            order = tuple(rng.permutation(3))
            yield in_raw, in_crop, lambda patch, steps=steps, order=order: patch[steps].transpose(order)
        else:
            yield in_raw, in_crop, lambda patch: patch


def _array_paths(work):
    return [f"{work.raw_path}/s0", *(f"{work.crop_paths[0]}/{name}/s0" for name in work.names)]


def _tensorstore(work, cache_bytes):
    import tensorstore

    work.only(augments=("none", "mirror"))
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    raw, *labels = (
        tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": path},
                "recheck_cached_data": False,  # the files do not change
                "recheck_cached_metadata": False,
            },
            open=True,
            read=True,
            context=context,
        ).result()
        for path in _array_paths(work)
    )

    def batches():
        places = _places(work)
        while True:
            # All reads of a batch are under way together.
            reads = [
                (raw[in_raw].read(), [label[in_crop].read() for label in labels], view)
                for in_raw, in_crop, view in itertools.islice(places, work.batch)
            ]
            yield _assembled(work, ((r.result(), [c.result() for c in classes], view) for r, classes, view in reads))

    return Source(batches())


_LOOP = {"needs": ("torch", "tensorstore"), "packages": ("tensorstore", "torch", "numpy"), "python": "tensorstore"}


@implementation("tensorstore", "tensorstore", **_LOOP)
def tensorstore_loop(work):
    return _tensorstore(work, 0)


@implementation("tensorstore-cached", "tensorstore, 2 GB cache", **_LOOP, keeps=True)
def tensorstore_cached(work):
    return _tensorstore(work, 2_000_000_000)


@implementation("zarr", "zarr-python", needs=("torch", "zarr"), packages=("zarr", "torch", "numpy"))
def zarr_loop(work):
    import zarr

    work.only(augments=("none", "mirror"))
    raw, *labels = (zarr.open_array(path, mode="r") for path in _array_paths(work))

    def batches():
        places = _places(work)
        while True:
            yield _assembled(
                work,
                (
                    (raw[in_raw], [label[in_crop] for label in labels], view)
                    for in_raw, in_crop, view in itertools.islice(places, work.batch)
                ),
            )

    return Source(batches())


# Limits: the bytes that must be written, by the fastest plain copy


def _fresh(shape, dtype):
    """An array in memory that the system has just given: it zeroes each page when the page is first touched."""
    dtype = np.dtype(dtype)
    return np.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def _floor(work, buffers):
    """Raw and packed labels of the crop lie decoded in memory; a patch of each is copied to the next buffers."""
    import torch
    import zarr

    work.only(augments=("none",))
    raw, *labels = (zarr.open_array(path, mode="r") for path in _array_paths(work))
    offset, size = work.volume["crops"][0]["offset"], work.volume["crop_size"]
    grey = torch.from_numpy(np.ascontiguousarray(raw[tuple(slice(o, o + size) for o in offset)]))
    present = np.zeros((size,) * 3, np.uint8)
    for bit, label in enumerate(labels):
        present |= label[:].astype(np.uint8) << bit
    # As one integer per voxel: that is how a copy is fastest.
    packed = torch.from_numpy(np.stack([present, np.full_like(present, 255)], axis=-1).view(np.int16)[..., 0])

    def batches():
        places = _places(work)
        for some, bits in buffers:
            for i, (_, in_crop, _) in enumerate(itertools.islice(places, work.batch)):
                torch.from_numpy(some[i, 0]).copy_(grey[in_crop])
                torch.from_numpy(bits[i].view(np.int16)[..., 0]).copy_(packed[in_crop])
            yield {"raw": torch.from_numpy(some), "labels": torch.from_numpy(bits)}

    return Source(batches())


def _fresh_buffers(work):
    side = (work.patch,) * 3
    while True:
        yield _fresh((work.batch, 1, *side), np.uint8), _fresh((work.batch, *side, 2), np.uint8)


_FLOOR = {"needs": ("torch", "zarr"), "packages": ("torch", "numpy"), "python": "floor", "compact": True}


@implementation("floor", "one strided copy", **_FLOOR)
def floor(work):
    return _floor(work, _fresh_buffers(work))


@implementation("floor-reused", "one strided copy, memory reused", **_FLOOR)
def floor_reused(work):
    return _floor(work, itertools.cycle(itertools.islice(_fresh_buffers(work), 2)))


@implementation("floor-finished", "float32 written once", needs=("torch",), packages=("torch", "numpy"))
def floor_finished(work):
    """Raw and labels are written as constants to fresh memory: nothing is read."""
    import torch

    work.only(augments=("none",))

    def batches():
        side = (work.patch,) * 3
        while True:
            raw = _fresh((work.batch, 1, *side), np.float32)
            labels = _fresh((work.batch, len(work.names), *side), np.float32)
            raw.fill(0.5)
            labels.fill(1)
            yield {"raw": torch.from_numpy(raw), "labels": torch.from_numpy(labels)}

    return Source(batches())


# MONAI, with the crop in memory


@implementation(
    "monai",
    "MONAI",
    needs=("torch.utils.data", "zarr", "monai.data", "monai.transforms"),
    packages=("monai", "torch", "numpy", "zarr"),
    keeps=True,
)
def monai(work):
    import torch
    import zarr
    from monai.data import CacheDataset, DataLoader
    from monai.transforms import (
        Compose,
        Rand3DElasticd,
        RandFlipd,
        RandRotate90d,
        RandRotated,
        RandSpatialCropd,
        ScaleIntensityRanged,
        ToTensord,
    )

    work.only(workers=True)
    raw_path, *label_paths = _array_paths(work)
    box = tuple(slice(o, o + work.volume["crop_size"]) for o in work.volume["crops"][0]["offset"])
    crop = {
        "raw": zarr.open_array(raw_path, mode="r")[box][None],
        "labels": np.stack([zarr.open_array(path, mode="r")[...] for path in label_paths]),
    }
    keys = ("raw", "labels")
    steps = [
        ToTensord(keys, track_meta=False),
        RandSpatialCropd(keys, (work.patch,) * 3, random_size=False),
        ScaleIntensityRanged("raw", 0, 255, 0, 1, dtype=np.float32),
    ]
    if work.augment != "none":
        steps += [RandFlipd(keys, 0.5, axis) for axis in range(3)]
    if work.augment == "mirror":
        # With the tta_flips, quarter turns in two planes give every permutation of the axes.
        steps += [RandRotate90d(keys, 0.5, spatial_axes=plane) for plane in ((0, 1), (1, 2))]
    if work.augment == "rotate":
        # The patch itself is turned, its corners filled from its border: turning a larger one would cost more.
        steps.append(RandRotated(keys, range_x=math.pi, prob=1, mode=("bilinear", "nearest"), padding_mode="border"))
    if work.augment == "elastic":
        # Its smoothing and magnitude are those of its documentation's example; rotation and displacement are one
        # resampling.
        steps.append(
            Rand3DElasticd(
                keys, sigma_range=(5, 8), magnitude_range=(100, 200), rotate_range=(math.pi, 0, 0), prob=1,
                mode=("bilinear", "nearest"), padding_mode="border",
            )
        )  # fmt: skip
    # By default it would copy the whole crop for each sample.
    dataset = CacheDataset([crop], Compose(steps), progress=False, copy_cache=False)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=MANY)
    return Source(forever(DataLoader(dataset, batch_size=work.batch, sampler=sampler, num_workers=work.workers)))


# TorchIO


@implementation(
    "torchio",
    "TorchIO",
    needs=("torch.utils.data", "zarr", "torchio"),
    packages=("torchio", "torch", "numpy", "zarr"),
    keeps=True,
)
def torchio(work):
    import torch
    import torchio as tio
    import zarr

    work.only(augments=("none", "elastic"))
    raw_path, *label_paths = _array_paths(work)
    box = tuple(slice(o, o + work.volume["crop_size"]) for o in work.volume["crops"][0]["offset"])
    raw = torch.from_numpy(zarr.open_array(raw_path, mode="r")[box][None])
    labels = torch.from_numpy(np.stack([zarr.open_array(path, mode="r")[...] for path in label_paths]))
    steps = []
    if work.augment == "elastic":
        # As many control points as patches of 64 voxels have of ours, with the two outermost fixed. Rotation and
        # displacement are a resampling each.
        points = max(4, work.patch // 32 + 3)
        steps = [
            tio.RandomFlip((0, 1, 2), flip_probability=0.5),
            tio.RandomAffine(scales=0, degrees=(180, 0, 0), default_pad_value="mean"),
            tio.RandomElasticDeformation(points, max_displacement=6),
        ]
    transform = tio.Compose(steps)

    class Patches(torch.utils.data.IterableDataset):
        def __iter__(self):
            numbers = np.random.default_rng(work.seed)
            side = work.volume["crop_size"] - work.patch + 1
            while True:
                z, y, x = (int(numbers.integers(side)) for _ in range(3))
                cut = (slice(None), *(slice(c, c + work.patch) for c in (z, y, x)))
                subject = tio.Subject(
                    raw=tio.ScalarImage(tensor=raw[cut].float() / 255), labels=tio.LabelMap(tensor=labels[cut])
                )
                moved = transform(subject)
                yield {"raw": moved.raw.data, "labels": moved.labels.data.float()}

    return Source(iter(torch.utils.data.DataLoader(Patches(), batch_size=work.batch)))
