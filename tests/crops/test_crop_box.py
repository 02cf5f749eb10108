"""A crop with a box against a smaller crop of the same place, and boxes that are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cellmap_lightning.crops.crop_box import CropBox, restricted
from cellmap_lightning.crops.options import LabelOptions, ReadOptions
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.errors import CellMapError, CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.io.images import read_image
from tests.boxed import CLASSES, END, START, labels, nm, voxels, write_crops

BOX = nm(START, END)
#: Options of kinds of targets that read a margin around the patch.
OPTIONS = {"affinities": {"offsets": [[0, 0, 1], [3, 0, 0]]}, "sdt": {"nm": 64}}


@pytest.fixture(scope="module", params=[2, 3])
def crops(tmp_path_factory, request):
    """Raw, the crop, and the smaller crop."""
    return write_crops(tmp_path_factory.mktemp(f"v{request.param}"), request.param)


def dataset(raw, target, scale=8, shape=16, kind="binary", box=None, train=False, **labels_options):
    spec = {"shape": [shape] * 3, "scale": [scale] * 3}
    targets = {"target": {**spec, "kind": kind, **OPTIONS.get(kind, {})}}
    spatial = {"mirror": {"axes": {"x": 0.5}}, "rotate": {"axes": {"z": [-180, 180]}}} if train else None
    context = {"raw": {"shape": [shape + 8] * 3, "scale": [scale] * 3}}
    return CellMapDataset(
        raw, target, CLASSES, context, targets, spatial, train, 3, read=ReadOptions(pad=True, box=box, cache="memory"),
        labels=LabelOptions(too_coarse="upsample", **labels_options),
    )  # fmt: skip


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["binary", "instances", "sdt", "affinities"])
@pytest.mark.parametrize("scale", [8, 16, 12])
def test_samples_are_those_of_a_smaller_crop(crops, kind, scale):
    raw, whole, part = crops
    for train in (False, True):
        boxed, small = (
            dataset(raw, whole, scale, 16, kind, BOX, train),
            dataset(raw, part, scale, 16, kind, None, train),
        )
        assert boxed.box == small.box
        assert boxed.placement.counts == small.placement.counts
        picked = range(0, len(boxed), max(1, len(boxed) // 12))
        for index in picked:
            same(boxed[index], small[index])
        boxed.close()
        small.close()


@pytest.mark.parametrize("downsample", ["majority", "any"])
def test_downsampled_labels_are_those_of_a_smaller_crop(crops, downsample):
    raw, whole, part = crops
    boxed = dataset(raw, whole, 16, box=BOX, label_downsample=downsample)
    small = dataset(raw, part, 16, label_downsample=downsample)
    for index in range(0, len(boxed), 200):
        same(boxed[index], small[index])
    boxed.close()
    small.close()


def test_measurements_are_those_of_a_smaller_crop(crops):
    raw, whole, part = crops
    boxed, small = dataset(raw, whole, box=BOX), dataset(raw, part)
    truth = {name: stored[tuple(map(slice, START, END))] for name, stored in labels().items()}
    assert boxed.class_counts == small.class_counts
    assert boxed.class_counts == {
        "mito": (truth["mito"] == 1).sum(), "nuc": (truth["nuc"] > 0).sum()
    }  # fmt: skip
    assert boxed.background_counts == small.background_counts
    for name in CLASSES:
        here, there = boxed.crop.foreground_index(name), small.crop.foreground_index(name)
        assert here.lattice == there.lattice
        for attribute in ("counts", "sampled", "voxels"):
            np.testing.assert_array_equal(getattr(here, attribute), getattr(there, attribute))
        np.testing.assert_array_equal(boxed.crop.class_tiles[name], small.crop.class_tiles[name])
    boxed.close()
    small.close()


def test_voxels_text_and_nm_are_one_box(crops):
    raw, whole, _ = crops
    boxes = {
        dataset(raw, whole, box=box).box
        for box in (BOX, voxels(START, END), "20:70 12:60 8:78 voxels", str(CropBox.parse(BOX)))
    }
    assert len(boxes) == 1


def test_two_boxes_of_one_array_share_neither_voxels_nor_counts(crops):
    raw, whole, _ = crops
    corners = (
        ((0, 32, 0), (24, 56, 24)),
        ((5, 37, 5), (29, 61, 29)),
    )  # of the same chunk file, so that their stamps are equal
    first, second = (dataset(raw, whole, box=voxels(*pair)) for pair in corners)
    second.share(first.crop.pool, first.crop.store)
    keys = {region.key for d in (first, second) for region in d.crop.labels.regions}
    assert len(keys) == 2
    stored = labels()["mito"]
    for boxed, (a, b) in zip((first, second), corners, strict=True):
        assert boxed.class_counts["mito"] == (stored[tuple(map(slice, a, b))] == 1).sum()
    _ = first[0]
    z, y, x = (slice(int(c) - 8, int(c) + 8) for c in (second.placement.center(0) - 8 * 16) / 8)
    expected = np.where(stored[z, y, x] == 255, np.nan, stored[z, y, x] == 1)
    np.testing.assert_array_equal(second[0]["target"][0], expected)
    first.close()


def test_missing_chunks_are_unannotated_where_they_lie(tmp_path):
    raw, whole, _ = write_crops(tmp_path)
    image = read_image(whole.partition("/[")[0] + "/nuc")
    Path(image.finest.array.file((0, 0, 0))).unlink()
    boxed = dataset(raw, whole, box=voxels((20, 12, 8), (60, 60, 60)), missing_labels="unknown")
    target = boxed[0]["target"][1].numpy()
    assert boxed.placement.center(0).tolist() == [8 * (16 + n + 8) for n in (20, 12, 8)]
    expected = np.zeros((16, 16, 16), bool)
    expected[:12] = True  # voxels 20 to 31 of the crop
    np.testing.assert_array_equal(np.isnan(target), expected)
    boxed.close()


def test_the_whole_crop_as_a_box_is_the_crop(crops):
    image = read_image(crops[1].partition("/[")[0] + "/mito")
    inside, outside, box = restricted("crop", {"mito": image}, CropBox((0, 0, 0), (80, 72, 88), "voxels"))
    assert inside["mito"] is image
    assert not outside
    assert box == image.finest.lattice.box


def test_coarse_voxels_across_an_edge_are_outside(crops):
    image = read_image(crops[1].partition("/[")[0] + "/mito")
    inside, _, _ = restricted("crop", {"mito": image}, CropBox((1, 0, 0), (40, 40, 40), "voxels"))
    assert [level.lattice.shape for level in inside["mito"].levels] == [(39, 40, 40), (19, 20, 20), (9, 10, 10)]
    assert inside["mito"].levels[1].lattice.box.lower[0] == 8 * 16 + 2 * 8


def test_raw_alone_is_restricted(crops):
    spec = {"raw": {"shape": [16] * 3, "scale": [8] * 3}}
    boxed = CellMapDataset(crops[0], None, None, spec, read=ReadOptions(box={"min_nm": [80] * 3, "max_nm": [400] * 3}))
    assert set(map(tuple, boxed.box.as_dict().values())) == {(80, 400)}
    assert set(map(tuple, boxed.placement.centers.as_dict().values())) == {(144, 336)}
    boxed.close()


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (3, CellMapTypeError, "box must be {min_nm"),
        ([[0, 0, 0], [8, 8, 8]], CellMapTypeError, "box must be {min_nm"),
        ({"min_nm": [0, 0, 0]}, CellMapKeyError, "min_nm and max_nm"),
        ({"min_nm": [0, 0, 0], "max_voxels": [1, 1, 1]}, CellMapKeyError, "in one unit"),
        ({"min_um": [0, 0, 0], "max_um": [1, 1, 1]}, CellMapKeyError, "no 'min_um'; did you mean 'min_nm'"),
        ({"lower": [0, 0, 0], "max_nm": [1, 1, 1]}, CellMapKeyError, "no 'lower'"),
        ({"min_nm": [0, 0], "max_nm": [1, 1]}, CellMapValueError, "three numbers"),
        ({"min_nm": [0, 0, 0, 0], "max_nm": [1, 1, 1, 1]}, CellMapValueError, "three numbers"),
        ({"min_nm": "0 0 0", "max_nm": [1, 1, 1]}, CellMapValueError, "three numbers"),
        ({"min_nm": [0, True, 0], "max_nm": [1, 1, 1]}, CellMapValueError, "three numbers"),
        ({"min_nm": [0, 0, 8], "max_nm": [8, 8, 8]}, CellMapValueError, "below the maximum, got 8 and 8 nm along x"),
        ({"min_nm": [9, 0, 0], "max_nm": [8, 8, 8]}, CellMapValueError, "below the maximum, got 9 and 8 nm along z"),
        ({"min_nm": [0, 0, 0], "max_nm": [8, 8, float("nan")]}, CellMapValueError, "finite"),
        ({"min_voxels": [0, 0, 0.5], "max_voxels": [8, 8, 8]}, CellMapValueError, "whole numbers"),
        ("0:8 0:8 nm", CellMapValueError, "min:max along z, y and x"),
        ("0:8 0:8 0:8", CellMapValueError, "min:max along z, y and x"),
        ("0:8 0:8 0:8 um", CellMapValueError, "min:max along z, y and x"),
        ("0-8 0-8 0-8 nm", CellMapValueError, "min:max along z, y and x"),
        ("0:a 0:8 0:8 nm", CellMapValueError, "must be numbers"),
        ("", CellMapValueError, "min:max along z, y and x"),
    ],
)
def test_malformed_boxes_are_refused(value, error, text):
    with pytest.raises(error) as caught:
        CropBox.parse(value)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("box", "text"),
    [
        (voxels((0, 0, 0), (81, 8, 8)), "reaches outside the crop along z"),
        (voxels((0, -1, 0), (8, 8, 8)), "reaches outside the crop along y"),
        ("0:8 0:8 0:8 nm", "reaches outside the crop along z, which covers z [128, 768]"),
        ("128:300 128:256 128:256 nm", "maximum along z is 300 nm; the nearest edges are 296 and 304 nm"),
        ("128:256 130:256 128:256 nm", "minimum along y is 130 nm; the nearest edges are 128 and 136 nm"),
        ("130:134 128:256 128:256 nm", "holds no voxel"),
    ],
)
def test_boxes_that_do_not_fit_a_crop_are_refused(crops, box, text):
    with pytest.raises(CellMapError) as caught:
        dataset(crops[0], crops[1], box=box)
    assert text in str(caught.value)
    assert "jrc_a/crop1" in str(caught.value)
