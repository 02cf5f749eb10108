"""The picture of a prediction: raw, annotation and prediction are aligned in nm."""

import re

import numpy as np
import pytest
import zarr

from cellmap_lightning import CellMapImage
from cellmap_lightning.commands.predict_config import groundtruth
from cellmap_lightning.evaluation.overview import draw_prediction, samples_of
from cellmap_lightning.io.ngff import read_encoding, read_multiscale
from cellmap_lightning.io.writer import create_level, multiscale_attributes, write_group, write_multiscale

CROP = "crop2"


@pytest.fixture(scope="module")
def labels(volume):
    """Labels of a class of a crop: its level, and the masks of positive and of annotated voxels."""
    image = read_multiscale(groundtruth(volume.raw_path) / CROP / "mito")
    level, encoding = image.finest, read_encoding(image, image.finest)
    stored = zarr.open_array(str(level.path), mode="r")[...]
    return level, (stored != encoding.absent) & (stored != encoding.unknown), stored != encoding.unknown


@pytest.fixture(scope="module")
def crops(volume, tmp_path_factory):
    """A folder with one crop."""
    folder = tmp_path_factory.mktemp("crops")
    (folder / CROP).symlink_to(groundtruth(volume.raw_path) / CROP)
    return folder


def predicted(folder, level, values, shift=(0, 0, 0), **kwargs):
    translation = np.add(level.translation, np.multiply(shift, level.scale)).tolist()
    write_multiscale(folder / "mito", values, scale=level.scale, translation=translation, **kwargs)
    return folder


def of_the_crop(samples):
    (sample,) = [s for s in samples if s.header.startswith(f"{CROP}, centre")]
    return sample


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_prediction_and_annotation_are_aligned(volume, labels, crops, tmp_path, dtype):
    level, there, _ = labels
    most = 255 if dtype == "uint8" else 1
    out = predicted(tmp_path / "out", level, (there * most).astype(dtype))
    shown = of_the_crop(samples_of(out, volume.raw_path, ["mito"], crops))
    known = ~np.isnan(shown.target)
    assert known.any()
    assert (shown.target == 1).any()
    np.testing.assert_array_equal(shown.prediction[known], shown.target[known])
    center = [float(part.split()[1]) for part in shown.header.split("centre ")[1].removesuffix(" nm").split(", ")]
    assert shown.scale == level.scale
    assert max(shown.raw.shape) <= 192
    box = level.lattice.box
    assert (np.asarray(center) > box.lower).all()
    assert (np.asarray(center) < box.upper).all()


def test_shift_is_visible(volume, labels, crops, tmp_path):
    """The same voxels with a translation of two voxels along an axis are not aligned with the annotation."""
    level, there, _ = labels
    values = np.pad((there * 255).astype(np.uint8), 4)
    differing = []
    for axis in (None, 0, 1, 2):
        shift = [-2 if at == axis else -4 for at in range(3)]
        out = predicted(tmp_path / f"along-{axis}", level, values, shift)
        shown = of_the_crop(samples_of(out, volume.raw_path, ["mito"], crops))
        known = ~np.isnan(shown.target)
        differing.append(int((shown.prediction[known] != shown.target[known]).sum()))
    assert differing[0] == 0
    assert min(differing[1:]) > 100


def test_densest_places_are_drawn_without_crops(volume, tmp_path, monkeypatch):
    monkeypatch.setattr("cellmap_lightning.evaluation.overview._PLACE", (16, 32, 32))
    raw = read_multiscale(volume.raw_path).levels[1]
    values = np.zeros(raw.array.shape, np.uint8)
    values[20:30, 40:60, 70:90] = 200
    about = {"cellmap": {"prediction": {"class_name": "mito", "probability_1": 255}}}
    out = predicted(tmp_path / "out.zarr", raw, values, levels=2, attributes=about)
    whole, *places = samples_of(out, volume.raw_path, ["mito"])
    assert whole.header == "whole prediction"
    assert whole.raw.shape == values.shape
    np.testing.assert_array_equal(whole.prediction[0], values > 0)
    assert [p.raw.shape for p in places] == [(16, 32, 32)] * 3
    assert places[0].prediction.any()
    assert all(p.target is None for p in places)
    stored = CellMapImage(volume.raw_path, "raw", raw.scale, raw.array.shape, interpolation="linear")
    box = raw.lattice.box.center
    np.testing.assert_array_equal(whole.raw, stored[dict(zip("zyx", box, strict=True))].numpy())
    draw_prediction(out, volume.raw_path, ["mito"], tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 20_000


def test_an_overview_of_a_large_prediction_is_a_part_of_it(volume, tmp_path, monkeypatch):
    monkeypatch.setattr("cellmap_lightning.evaluation.overview._PLACE", (16, 32, 32))
    monkeypatch.setattr("cellmap_lightning.evaluation.overview._OVERVIEW", (64, 64))
    raw = read_multiscale(volume.raw_path).levels[1]
    values = np.zeros(raw.array.shape, np.uint8)
    values[40:50, 100:130, 20:50] = 200
    about = {"cellmap": {"prediction": {"class_name": "mito", "probability_1": 255}}}
    out = predicted(tmp_path / "out.zarr", raw, values, levels=2, attributes=about)
    overview, *_ = samples_of(out, volume.raw_path, ["mito"])
    whole = " × ".join(map(str, values.shape))
    start = f"overview, {len(values)} × 64 × 64 of {whole} voxels (z, y, x), where most was predicted: z "
    assert overview.header.startswith(start)
    boxes = re.findall(r"([zyx]) (-?\d+)\.\.(-?\d+)", overview.header)
    assert [axis for axis, *_ in boxes] == list("zyx")
    extents = np.multiply(overview.raw.shape, raw.lattice.step)
    assert np.abs(np.subtract([int(b) - int(a) for _, a, b in boxes], extents)).max() <= 1
    y, x = (raw.lattice.origin[n] + raw.lattice.step[n] * at for n, at in ((1, 115), (2, 35)))
    assert int(boxes[1][1]) < y < int(boxes[1][2])
    assert int(boxes[2][1]) < x < int(boxes[2][2])
    assert overview.raw.shape == (len(values), 64, 64)
    assert overview.scale == raw.lattice.step  # a voxel of the prediction, not a coarser one
    assert overview.prediction.any()


@pytest.mark.parametrize("levels", [1, 12])
def test_read_volume_is_bounded(tmp_path, levels):
    """An empty volume and an empty prediction of 1.25e14 voxels."""
    paths = tmp_path / "raw.zarr" / "em", tmp_path / "out.zarr" / "mito"
    for path in paths:
        write_group(path, multiscale_attributes("em", (8, 8, 8), (0, 0, 0), levels))
        for level in range(levels):
            create_level(path / f"s{level}", [50_000 >> level] * 3, np.uint8, [64] * 3, 2, None)
    samples = samples_of(tmp_path / "out.zarr", str(paths[0]), ["mito"])
    assert len(samples) == (1 if levels == 1 else 4)
    assert max(s.raw.size for s in samples) <= 2**25
