"""Pyramids of predictions and what becomes of their journal, under a Trainer."""

import datetime as dt
import re
import shutil

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.strategies import DDPStrategy

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.callbacks import make_prediction_writer
from cellmap_lightning.commands.predict_config import region_box
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.errors import CellMapFileExistsError, CellMapValueError
from cellmap_lightning.inspection.report import settings_around
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from cellmap_lightning.prediction.journal import Journal, journal_folder
from cellmap_lightning.splits.manifests import find_crops
from tests.prediction.predictions import Identity, contents, read
from tests.prediction.test_pyramid import next_level

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")

PATCH = (8, 16, 16)


def raw_volume(folder, shape, scale, factors=(2, 2, 2), levels=1):
    values = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    path = folder / "raw.zarr" / "em"
    write_multiscale(
        path,
        values,
        scale=scale,
        translation=(5.0, 4.0, 2.0),
        storage=ArrayOptions(chunks=(16, 16, 16)),
        levels=levels,
        factors=factors,
    )
    return path, values


def run(path, output, scale, classes=("a",), world=1, limit=None, **kwargs):
    """Predict with a model that gives its input back, in blocks of a few chunks."""
    given = {"dtype": "uint8", "overlap": 0.0, "check_context": False, "chunks": [8, 16, 16], "block_size_mb": 0.05}
    writer = make_prediction_writer(str(output), **(given | kwargs))
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork", timeout=dt.timedelta(seconds=300))
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy if world > 1 else "auto", logger=False, callbacks=[writer],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_predict_batches=limit,
    )  # fmt: skip
    spec = {"raw": {"shape": list(PATCH), "scale": list(scale)}}
    with CellMapDataModule(list(classes), spec, datasets={"predict": [{"raw": str(path)}]}, batch_size=3) as data:
        trainer.predict(Identity(len(classes)), datamodule=data)
    return writer


def levels_of(output, name="a"):
    """Voxel sizes, origins and voxels of every level."""
    levels = read_multiscale(output / name).levels
    return [(level.scale, level.translation, read(output, name, n)) for n, level in enumerate(levels)]


FIB, SERIAL = (8.0, 8.0, 8.0), (50.0, 9.2, 9.2)


@pytest.mark.cover(1)  # types with steps and formats: `test_levels_by_plain_numpy`
@pytest.mark.parametrize(
    ("shape", "scale", "factors", "raw_levels", "steps"),
    [
        ((64, 70, 72), FIB, (2, 2, 2), 1, [(2, 2, 2)]),
        ((64, 70, 72), FIB, (2, 2, 2), 3, [(2, 2, 2)]),
        ((30, 140, 150), SERIAL, (2, 2, 2), 1, [(1, 2, 2), (1, 2, 2)]),
        ((30, 140, 150), SERIAL, (1, 2, 2), 2, [(1, 2, 2), (1, 2, 2)]),
        ((30, 140, 150), SERIAL, (2, 2, 2), 2, [(2, 2, 2), (1, 2, 2)]),
        ((32, 140, 150), FIB, (1, 2, 2), 3, [(1, 2, 2), (1, 2, 2), (2, 1, 1), (2, 1, 1)]),
        ((40, 100, 110), FIB, (3, 3, 3), 3, [(3, 3, 3)]),
        ((40, 100, 200), FIB, (3, 3, 3), 2, [(3, 3, 3), (2, 2, 2)]),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "kind", "classes"),
    [("uint8", "v2", ("a",)), ("labels", "v3", ("a", "b")), ("float32", "sharded", ("a",))],
)
def test_levels_are_those_of_raw_and_then_of_the_finest_axes(
    tmp_path, shape, scale, factors, raw_levels, steps, dtype, kind, classes
):
    path, values = raw_volume(tmp_path, shape, scale, factors, raw_levels)
    out = tmp_path / "out.zarr"
    more = {"shards": [16, 32, 32]} if kind == "sharded" else {}
    run(path, out, scale, dtype=dtype, classes=classes, zarr_format=2 if kind == "v2" else 3, **more)
    assert Journal(out).settings["pyramid factors"] == [list(step) for step in steps]
    assert Journal(out).settings["levels"] == 1 + len(steps)
    probability = values.astype(np.float32) / 255
    whole = {"uint8": values, "labels": (probability >= 0.5).astype(np.uint8), "float32": probability}[dtype]
    for name in classes:
        found = levels_of(out, name)
        assert len(found) == 1 + len(steps)
        expected, total = whole, np.ones(3, int)
        for number, (size, origin, voxels) in enumerate(found):
            if number:
                expected, total = next_level(expected, steps[number - 1], dtype), total * steps[number - 1]
            if dtype == "float32":
                np.testing.assert_allclose(voxels, expected, rtol=1e-5)
            else:
                np.testing.assert_array_equal(voxels, expected)
            np.testing.assert_allclose(size, np.multiply(scale, total), rtol=1e-12)
            np.testing.assert_allclose(origin, (5.0, 4.0, 2.0) + np.multiply(scale, total - 1) / 2, atol=1e-9)
        assert max(voxels.shape) >= 32
    # Where raw has the level too, both are of the same voxels.
    for level, other in zip(read_multiscale(out / "a").levels, read_multiscale(path).levels, strict=False):
        assert level.lattice.matches(other.lattice)


def test_a_region_has_levels_by_its_own_shape(tmp_path):
    path, values = raw_volume(tmp_path, (64, 70, 72), FIB, (2, 2, 2), 3)
    out = tmp_path / "out.zarr"
    region = {"z": [1.0 + 8 * 9, 1.0 + 8 * 10], "y": [0, 64 * 8], "x": [-2.0, 66 * 8]}
    run(path, out, FIB, region=region, levels=3)
    found = [voxels for _, _, voxels in levels_of(out)]
    assert [v.shape for v in found] == [(1, 64, 67), (1, 32, 33), (1, 16, 16)]
    expected = next_level(values[9:10, :64, :67], (1, 2, 2), "uint8")
    np.testing.assert_array_equal(found[1], expected)
    with pytest.raises(CellMapValueError, match=r"levels must be from 1 to 7 for \[1, 64, 67\] voxels of .* nm, got 8"):
        run(path, tmp_path / "no.zarr", FIB, region=region, levels=8)
    assert not (tmp_path / "no.zarr").exists()


@pytest.mark.cover(1)
@pytest.mark.parametrize(("blend", "world"), [("trim", 1), ("gaussian", 1), ("trim", 2)])
@pytest.mark.parametrize(
    ("shape", "scale", "factors"), [((30, 80, 90), SERIAL, (1, 2, 2)), ((40, 80, 90), FIB, (3, 3, 3))]
)
def test_resumed_run_has_the_same_levels(tmp_path, blend, world, shape, scale, factors):
    path, _ = raw_volume(tmp_path, shape, scale, factors, 2)
    given = {"blend": blend, "overlap": 0.25, "classes": ("a", "b"), "levels": 4}
    run(path, tmp_path / "once.zarr", scale, **given)
    out = tmp_path / "out.zarr"
    for limit in (5, 9, 17):
        assert not run(path, out, scale, limit=limit, **given).summary.complete
        assert (out / journal_folder("prediction")).is_dir()
    last = run(path, out, scale, world=world, **given)
    assert not (out / journal_folder("prediction")).exists()
    assert contents(out) == contents(tmp_path / "once.zarr")
    if world == 1:
        assert 0 < last.summary.written < last.summary.blocks
    again = run(path, out, scale, world=world, **given)
    assert contents(out) == contents(tmp_path / "once.zarr")
    if world == 1:
        assert (again.summary.written, again.summary.complete) == (0, True)
        assert again.summary.finished == again.summary.blocks
        assert again.summary.fractions == last.summary.fractions


@pytest.mark.cover(1)
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("before", "after"), [((2, 2, 2), (1, 2, 2)), ((1, 2, 2), (3, 3, 3)), ((3, 3, 3), None)])
def test_another_pyramid_of_raw_is_another_prediction(tmp_path, finished, before, after):
    path, _ = raw_volume(tmp_path, (40, 60, 60), FIB, before, 2)
    out = tmp_path / "out.zarr"
    run(path, out, FIB, levels=2, limit=None if finished else 10)
    assert Journal(out).complete == finished
    there = contents(out)
    shutil.rmtree(path.parent)
    raw_volume(tmp_path, (40, 60, 60), FIB, after or (2, 2, 2), 2 if after else 1)
    now = list(after or (2, 2, 2))
    text = f"there:\n  pyramid factors: [{list(before)}] is there, now [{now}]\nchoose"
    with pytest.raises(CellMapFileExistsError, match=re.escape(text)):
        run(path, out, FIB, levels=2)
    assert contents(out) == there
    run(path, out, FIB, levels=2, overwrite=True)
    assert read(out, "a", 1).shape == tuple(n // f for n, f in zip((40, 60, 60), now, strict=True))


def test_a_prediction_is_read_as_a_crop_and_as_raw(tmp_path):
    """Labels of a first model may teach a second one: the list of images beside them is no class."""
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 60)).astype(np.uint8)
    volume = tmp_path / "jrc_x.zarr" / "recon-1"
    raw, crop = volume / "em" / "fibsem-uint8", volume / "labels" / "groundtruth" / "crop7"
    raw.parent.mkdir(parents=True)
    write_multiscale(raw, values, scale=FIB, translation=(5.0, 4.0, 2.0), storage=ArrayOptions(chunks=(16, 16, 16)))
    run(raw, crop, FIB, dtype="labels", classes=("mito", "er"))
    assert (crop / "OME").is_dir()
    (found,) = find_crops(tmp_path)
    assert found.classes == ("er", "mito")
    entry = {"raw": str(raw), "gt": f"{crop}/[er,mito]"}
    assert settings_around(str(raw)) == {"datasets": {"train": [entry]}, "split": "csv"}
    assert region_box("crop7", str(raw)) == read_multiscale(crop / "mito").finest.lattice.box.as_dict()
    spec = {"shape": list(PATCH), "scale": list(FIB)}
    with CellMapDataset(str(raw), f"{crop}/[er,mito]", ["mito", "er"], {"raw": spec}, {"labels": spec}) as dataset:
        target = dataset[0]["labels"]
        start = (dataset.get_center(0)["z"] - 5.0) / 8 - (PATCH[0] - 1) / 2
        assert start == 0
        np.testing.assert_array_equal(target[0].numpy(), values[:8, :16, :16] / np.float32(255) >= 0.5)
    run(crop / "mito", tmp_path / "again.zarr", FIB, dtype="labels", threshold=0.001)
    np.testing.assert_array_equal(read(tmp_path / "again.zarr"), read(crop, "mito"))
