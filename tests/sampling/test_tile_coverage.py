"""Tiles of an evaluation with several inputs and targets: each annotated voxel is shown in exactly one of them."""

import logging
import math
import re
from functools import partial

import lightning as L
import numpy as np
import pytest
import zarr
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from cellmap_lightning import CellMapDataLoader, CellMapDataModule
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from tests.make import make_dataset

SCALE = (10.48, 8.0, 8.0)
#: Voxel sizes of the stored raw, in those of the labels.
STORED = (1, 2, 3, 4)
RAW = 48
few = settings(max_examples=25, derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate])


def write_raw(path, displaced):
    """Raw at four voxel sizes; the coarser ones begin ``displaced`` fine voxels away."""
    group = zarr.open_group(path, mode="w", zarr_format=2)
    datasets = []
    for times in STORED:
        step = np.multiply(SCALE, times)
        array = np.random.default_rng(times).integers(0, 256, (RAW // times,) * 3).astype(np.uint8)
        group.create_array(f"s{times}", data=array, chunks=(16, 16, 16))
        lower = np.multiply(SCALE, displaced if times > 1 else 0)
        transforms = [
            {"type": "scale", "scale": step.tolist()},
            {"type": "translation", "translation": (lower + step / 2).tolist()},
        ]
        datasets.append({"path": f"s{times}", "coordinateTransformations": transforms})
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    group.attrs["multiscales"] = [{"version": "0.4", "name": "raw", "axes": axes, "datasets": datasets}]


@pytest.fixture(scope="module", autouse=True)
def raw(tmp_path_factory):
    """Folders of raw by the displacement of its coarser levels."""
    root = tmp_path_factory.mktemp("coverage")
    for displaced in (0, 0.5):
        write_raw(root / f"raw{displaced}", displaced)
    return root


class Annotated:
    """A crop in which each voxel has its own id, but for some that are unknown."""

    def __init__(self, root, name, shape, start, displaced=0.0, unknown=0.1):
        self.path = root / name
        self.lower = np.multiply(np.add(start, displaced), SCALE)
        ids = np.arange(1, math.prod(shape) + 1, dtype=np.uint32).reshape(shape)
        self.unknown = np.uint32(ids.size + 1)
        ids[np.random.default_rng(0).random(shape) < unknown] = self.unknown
        self.ids, self.upper = ids, self.lower + np.multiply(shape, SCALE)
        write_multiscale(
            self.path / "a", ids, scale=SCALE, translation=(self.lower + np.divide(SCALE, 2)).tolist(), levels=1,
            storage=ArrayOptions(chunks=(16, 16, 16)), mode="mode", overwrite=True, array_attributes=self.attributes,
        )  # fmt: skip

    def attributes(self, level, array):
        counts = {"absent": 0, "unknown": int((array == self.unknown).sum())}
        kind = {"type": "instance_segmentation", "encoding": {"absent": 0, "unknown": int(self.unknown)}}
        return {"cellmap": {"annotation": {"annotation_type": kind, "complement_counts": counts}}}

    @property
    def target(self):
        return f"{self.path}/[a]"

    def counts(self, shown):
        """Return how often each known voxel is among the ids of all tiles, and fail on ids that are not stored."""
        known = np.setdiff1d(self.ids, self.unknown)
        assert not np.setdiff1d(shown, known).size
        return np.bincount(shown, minlength=self.ids.size + 2)[known]


def spec(shape, times=1.0, **more):
    return {"shape": tuple(shape), "scale": tuple(np.multiply(SCALE, times)[-len(shape) :].tolist()), **more}


def shown(dataset, target="labels"):
    """Return the known ids of all tiles, and the centres of the voxels that have them, nm."""
    window = dataset.crops[0].in_volume(dataset.layout.targets[target].window, dataset.layout.targets[target].flat)
    ids, places = [], []
    offsets = (np.indices(window.shape).reshape(3, -1).T - (np.asarray(window.shape) - 1) / 2) * window.scale
    for batch in CellMapDataLoader(dataset, 4, is_train=False):
        for position, patch in zip(batch["idx"].tolist(), batch[target].numpy(), strict=True):
            patch = patch.reshape(window.shape).ravel()
            center = np.asarray([dataset.get_center(position)[axis] for axis in "zyx"])
            ids.append(patch[patch >= 0])
            places.append((center + offsets)[patch >= 0])
    return np.concatenate(ids), np.concatenate(places)


def opened(raw, crop, inputs, targets, displaced=0, **options):
    given = {"pad": True, "max_upsampling": 4, "classes": ["a"], "too_coarse": "upsample"} | options
    return make_dataset(raw / f"raw{displaced}", crop.target, input_arrays=inputs, target_arrays=targets, **given)


shapes = st.tuples(st.integers(1, 6), st.integers(2, 9), st.integers(2, 9))
crops = st.tuples(*[st.integers(1, 14)] * 3)
starts = st.tuples(*[st.integers(9, 17)] * 3)
#: Voxel sizes of the context, in those of the target: stored, and in between.
contexts = st.sampled_from([1, 2, 3, 4, 1.5, 2.5, 3.3])


@few
@example((4, 8, 8), (12, 13, 14), (9, 11, 10), [2], (4, 8, 8), 0, 0.0)
@example((4, 8, 8), (12, 13, 14), (9, 11, 10), [2, 4], (4, 7, 8), 0, 0.5)
@example((4, 8, 8), (12, 13, 14), (9, 11, 10), [3], (3, 5, 8), 0.5, 0.0)
@example((4, 8, 8), (12, 8, 9), (9, 11, 11), [2], (4, 8, 8), 0, 0.0)  # as large as the patch, off the context's voxels
@example((4, 8, 8), (3, 3, 5), (10, 11, 12), [4], (4, 8, 8), 0.5, 0.5)
@given(
    shapes, crops, starts, st.lists(contexts, min_size=1, max_size=2), shapes,
    st.sampled_from([0, 0.5]), st.sampled_from([0.0, 0.5]),
)  # fmt: skip
def test_each_annotated_voxel_is_in_one_tile(raw, shape, size, start, scales, wide, displaced, labels_displaced):
    crop = Annotated(raw, "crop1", size, start, labels_displaced)
    inputs = {"raw": spec(shape)} | {f"context{n}": spec(wide, times) for n, times in enumerate(scales)}
    with opened(raw, crop, inputs, {"labels": spec(shape, kind="instances")}, displaced) as dataset:
        ids, _ = shown(dataset)
    assert (crop.counts(ids) == 1).all()


@few
@example((4, 8, 8), (12, 13, 14), (9, 11, 10), (4, 8, 8), 2, 2, 0)
@example((3, 9, 5), (12, 13, 14), (9, 11, 10), (4, 8, 8), 1.5, 4, 0)
@given(shapes, crops, starts, shapes, st.sampled_from([1, 2, 3, 1.5]), contexts, st.sampled_from([0, 0.5]))
def test_each_voxel_of_each_target_is_in_one_tile(raw, shape, size, start, wide, coarse, context, displaced):
    """Of targets of two voxel sizes, each on its own lattice; where tiles can be whole voxels of both."""
    crop = Annotated(raw, "crop2", size, start, unknown=0)
    inputs = {"raw": spec(shape), "context": spec(wide, context)}
    targets = {"labels": spec(shape, kind="instances"), "wide": spec(wide, coarse, kind="instances")}
    with opened(raw, crop, inputs, targets, displaced) as dataset:
        whole = dataset.placement.step / np.multiply(SCALE, coarse)
        held = np.asarray(dataset.placement.held)
        ids, _ = shown(dataset)
        assert (crop.counts(ids) == 1).all()
        _, places = shown(dataset, "wide")
    assert_whole(places, crop, np.multiply(SCALE, coarse), held | (abs(whole - np.rint(whole)) < 1e-6))


def assert_whole(places, crop, step, axes):
    """Each voxel of a lattice whose centre is in the crop is there once, along some axes; no voxel is there twice."""
    at = np.rint(places * 1e3).astype(np.int64)
    assert len(np.unique(at, axis=0)) == len(at)
    for axis in np.flatnonzero(axes) if len(places) else ():  # a coarse voxel may have its centre beside the crop
        # Of the voxels whose centres lie on the crop's edges, the ones at the upper edge show a voxel inside.
        some = places[0, axis]
        first = math.floor((crop.lower[axis] - some) / step[axis] + 1e-6) + 1
        last = math.floor((crop.upper[axis] - some) / step[axis] + 1e-6)
        along = np.unique(np.rint((places[:, axis] - some) / step[axis] * 1e3) / 1e3)
        assert along.tolist() == list(range(first, last + 1))


# -- whole evaluations


class Ids(L.LightningModule):
    """Records the known ids of a target over an evaluation."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def validation_step(self, batch, batch_idx):
        ids = batch["labels"].flatten()
        self.shown.append(ids[ids >= 0].numpy())

    test_step = validation_step


AXES_OF = {"xy": [1, 2], "xz": [0, 2], "yz": [0, 1]}


def flat(shape, plane, times=1.0, **more):
    return {"shape": shape, "scale": np.multiply(SCALE, times)[AXES_OF[plane]].tolist(), **more}


@pytest.mark.usefixtures("quiet_lightning")
@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(
    ("scales", "plane"), [((1,), None), ((2,), None), ((3, 2), None), ((4,), None), ((2.5,), None), ((2,), "xy"),
                          ((3,), "xz"), ((4, 2.5), "yz")], ids=str,
)  # fmt: skip
def test_a_full_evaluation_shows_each_annotated_voxel_once(raw, scales, plane, split):
    one = partial(flat, (6, 7), plane) if plane else partial(spec, (4, 8, 8))
    inputs = {"raw": one()} | {f"context{times}": one(times) for times in scales}
    run = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    for number, (size, start) in enumerate([((11, 13, 15), (9, 11, 13)), ((3, 8, 21), (10, 10, 9))]):
        crop, model = Annotated(raw, f"{split}{number}", size, start), Ids()
        datasets = {split: [{"raw": str(raw / "raw0"), "gt": crop.target}]}
        with CellMapDataModule(
            ["a"], inputs, {"labels": one(kind="instances")}, datasets=datasets, batch_size=3, max_upsampling=4,
            planes=[plane or "xy"],
        ) as data:  # fmt: skip
            (run.validate if split == "val" else run.test)(model, data, verbose=False)
        assert (crop.counts(np.concatenate(model.shown)) == 1).all()


# -- without pad


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        ({"raw": 1, "context": 2}, {"labels": (4, 8, 8)}),
        ({"raw": 1, "context": 4}, {"labels": (4, 8, 8)}),
        ({"raw": 1}, {"labels": (3, 5, 7), "wide": (5, 9, 7)}),  # the wide one stays inside
        ({"raw": 1, "context": 2, "more": 3}, {"labels": (4, 9, 8)}),
    ],
    ids=str,
)
def test_without_pad_what_no_tile_shows_is_logged(raw, caplog, inputs, targets):
    crop = Annotated(raw, "crop3", (12, 13, 14), (17, 17, 17), unknown=0)
    inputs = {name: spec((3, 5, 5), times) for name, times in inputs.items()}
    targets = {name: spec(shape, kind="instances") for name, shape in targets.items()}
    with opened(raw, crop, inputs, targets, pad=False) as dataset, caplog.at_level(logging.WARNING):
        ids, _ = shown(dataset)
        shown(dataset)
    counts = crop.counts(ids)
    assert counts.max() == 1
    left = 100 * (1 - counts.mean())
    (line,) = [r.message for r in caplog.records if "no tile shows" in r.message]
    assert float(re.search(r"no tile shows ([\d.]+) % of 'labels'", line)[1]) == pytest.approx(left, rel=0.01)
    assert left > 5
    assert line.endswith("pad=True has tiles up to the edges")
    caplog.clear()
    with opened(raw, crop, inputs, targets) as dataset, caplog.at_level(logging.WARNING):
        assert (crop.counts(shown(dataset)[0]) == 1).all()
    assert "no tile shows" not in caplog.text


def test_without_pad_nothing_is_logged_where_tiles_fit(raw, caplog):
    crop = Annotated(raw, "crop4", (12, 14, 14), (16, 16, 16), unknown=0)
    inputs = {"raw": spec((4, 8, 8)), "context": spec((2, 4, 4), 2)}
    with opened(raw, crop, inputs, {"labels": spec((4, 8, 8), kind="instances")}, pad=False) as dataset:
        assert (crop.counts(shown(dataset)[0]) == 1).all()
    assert "no tile shows" not in caplog.text
