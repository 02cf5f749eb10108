"""Predictions with test-time augmentation, in several planes, of several volumes, and with skipped blocks."""

import datetime as dt
import shutil
from itertools import product
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.callbacks import make_prediction_writer
from cellmap_lightning.errors import CellMapError, CellMapFileExistsError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from cellmap_lightning.prediction import volumes as predicted
from tests.prediction.predictions import (
    SCALE,
    TRANSLATION,
    Convolution,
    Identity,
    contents,
    module,
    predict,
    raw_volume,
    read,
)
from tests.prediction.test_assembly import Counting

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")


def in_numbers(path):
    return read(path.parent, path.name).astype(np.float32) / 255


class Sided(L.LightningModule):
    """A model that is the same for no mirrored input: each voxel is that behind it, along every axis."""

    def predict_step(self, batch):
        x = batch["raw"]
        for dim in range(2, x.ndim):
            x = torch.cat([x.narrow(dim, 1, x.shape[dim] - 1), x.narrow(dim, x.shape[dim] - 1, 1)], dim)
        return {"found": x}


def test_mirrored_inputs_are_averaged(tmp_path):
    path, _ = raw_volume(tmp_path, (20, 24, 28))
    whole = in_numbers(path)

    def behind(values, axes):
        for axis in axes:
            values = np.concatenate([np.delete(values, 0, axis), np.take(values, [-1], axis)], axis)
        return values

    for tta_flips in ("", "y", "zx", "zyx"):
        out = tmp_path / f"flips{tta_flips}.zarr"
        predict(path, (20, 24, 28), out, Sided(), overlap=0, tta_flips=tta_flips)
        expected = np.mean(
            [
                np.flip(behind(np.flip(whole, axes), (0, 1, 2)), axes)
                for axes in (
                    tuple(axis for axis, chosen in zip([AXES.index(a) for a in tta_flips], bits, strict=True) if chosen)
                    for bits in product((0, 1), repeat=len(tta_flips))
                )
            ],
            axis=0,
        )
        assert np.abs(read(out) - expected).max() < 1e-6
    flat = tmp_path / "flat.zarr"
    predict(path, (1, 24, 28), flat, Sided(), overlap=0, tta_flips="zyx")
    both = [np.flip(behind(np.flip(whole, axes), (1, 2)), axes) for axes in ((), (1,), (2,), (1, 2))]
    assert np.abs(read(flat) - np.mean(both, axis=0)).max() < 1e-6
    with pytest.raises(CellMapFileExistsError, match="tta_flips: 'zyx' is there, now 'zy'"):
        predict(path, (20, 24, 28), tmp_path / "flipszyx.zarr", Sided(), overlap=0, tta_flips="yz")
    for wrong in ("w", "xx", [1]):
        with pytest.raises(CellMapValueError, match="tta_flips must be axes"):
            make_prediction_writer(str(tmp_path / "no.zarr"), tta_flips=wrong)


class Blur(L.LightningModule):
    """A model of slices: each pixel is the mean of itself and its two neighbours along the rows."""

    def predict_step(self, batch, batch_idx):
        assert batch["raw"].ndim == 4
        x = torch.nn.functional.pad(batch["raw"], (1, 1, 0, 0), mode="replicate")
        return (x[..., :-2] + x[..., 1:-1] + x[..., 2:]) / 3


def isotropic(folder, shape):
    values = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    path = Path(folder) / "iso.zarr" / "em"
    write_multiscale(path, values, scale=(8, 8, 8), translation=(4, 0, 2), storage=ArrayOptions(chunks=(16, 16, 16)))
    return path, values.astype(np.float32) / 255


@pytest.mark.parametrize("blend", ["trim", "gaussian"])
def test_slices_in_every_plane_and_their_mean(tmp_path, blend):
    path, values = isotropic(tmp_path, (21, 34, 40))
    along = {"xy": 2, "xz": 2, "yz": 1}  # the volume's axis that is a patch's row

    def expected(plane):
        padded = np.pad(values, [(1, 1) if axis == along[plane] else (0, 0) for axis in range(3)], mode="edge")
        n = values.shape[along[plane]]
        return sum(np.take(padded, range(k, k + n), along[plane]) for k in range(3)) / 3

    spec = {"input_arrays": {"raw": {"shape": [16, 20], "scale": [8, 8]}}, "batch_size": 3}
    given = (
        {"blend": blend, "block_size_mb": 0.05, "context": 2}
        if blend == "trim"
        else {"blend": blend, "block_size_mb": 0.05}
    )
    identity = blend == "gaussian"  # whose patches see no further than they reach
    for planes in (["xz"], ["yz"], ["xy", "xz", "yz"]):
        out = tmp_path / f"{'-'.join(planes)}.zarr"
        writer = predict_spec(path, spec | {"planes": planes}, out, Identity() if identity else Blur(), **given)
        assert writer.summary.complete
        wanted = values if identity else np.mean([expected(plane) for plane in planes], axis=0)
        assert np.abs(read(out) - wanted).max() < 1e-6
    again = predict_spec(path, spec | {"planes": planes}, out, Identity() if identity else Blur(), **given)
    assert again.summary.written == 0
    with pytest.raises(CellMapFileExistsError, match="planes: "):
        predict_spec(path, spec | {"planes": ["xy"]}, out, Identity() if identity else Blur(), **given)


def predict_spec(path, data, output, model, world=1, **kwargs):
    """The same, of arrays that are given whole."""
    data = {"classes": ["a"], "datasets": {"predict": [{"raw": str(path)}]}} | data
    writer = make_prediction_writer(str(output), **({"chunks": [8, 8, 16], "dtype": "float32"} | kwargs))
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork", timeout=dt.timedelta(seconds=300))
    run = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy if world > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[writer],
    )  # fmt: skip
    with CellMapDataModule(**data) as module:
        run.predict(model, datamodule=module)
    return writer


def test_planes_share_the_chunks_that_their_voxels_are_made_of(tmp_path):
    """No level has voxels of 11 nm: each plane caches separate voxels, decoded from the same chunks."""
    path, _ = raw_volume(tmp_path, (40, 50, 60))
    caches = []

    class Looks(Identity):
        def predict_step(self, batch, batch_idx):
            source = writer._source
            caches.append({id(image.region.cache) for c in source.crops for image in c.images.values()})
            assert caches[-1] == {id(source._store.chunks)}
            return super().predict_step(batch, batch_idx)

    writer = make_prediction_writer(str(tmp_path / "out.zarr"), classes=["a"], check_context=False)
    run = L.Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[writer], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    arrays = {"input_arrays": {"raw": {"shape": [16, 16], "scale": [11, 11]}}, "planes": ["xy", "xz", "yz"]}
    with CellMapDataModule(classes=["a"], datasets={"predict": [{"raw": str(path)}]}, **arrays) as data:
        run.predict(Looks(), datamodule=data)
    assert caches
    assert writer._source._store.chunks.nbytes == 0, "it is given back at the end"


def test_chunks_decoded_ahead_are_cached_when_needed(tmp_path, monkeypatch):
    """As many chunks are decoded ahead as lie side by side in a block: both have room."""
    path = tmp_path / "raw.zarr" / "em"
    values = np.zeros((256, 256, 512), np.uint8)
    values[:, ::7] = 3  # so that all chunks have files
    write_multiscale(path, values, scale=SCALE, translation=TRANSLATION, storage=ArrayOptions(chunks=(32, 32, 32)))
    monkeypatch.setattr(predicted, "LEAST_CHUNK_BYTES", 1)
    monkeypatch.setattr("cellmap_lightning.io.array_reader.LEAST_CHUNK", 32)
    writer = make_prediction_writer(
        str(tmp_path / "out.zarr"), chunks=(64, 64, 64), block_size_mb=1000, check_context=False
    )
    run = L.Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[writer], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with module(path, (64, 64, 64), batch_size=8) as data:
        run.predict(Identity(), datamodule=data)
    assert writer._source._store.chunks.decoded <= 1.3 * 8 * 8 * 16


def test_planes_whose_voxels_differ_have_no_mean(tmp_path):
    path, _ = raw_volume(tmp_path, (16, 16, 16))
    data = {"input_arrays": {"raw": {"shape": [8, 8], "scale": [8, 8]}}, "planes": ["xy", "xz"]}
    with pytest.raises(CellMapValueError, match=r"their voxel sizes differ .*xy has \[10.48, 8.0, 8.0\] nm; xz has"):
        predict_spec(path, data, tmp_path / "out.zarr", Identity())
    assert not (tmp_path / "out.zarr").exists()


def test_several_volumes_in_one_run(tmp_path):
    volumes = [raw_volume(tmp_path / name, shape) for name, shape in (("one", (20, 24, 28)), ("two", (9, 30, 17)))]
    paths = []
    for (path, _), name in zip(volumes, ("jrc_one", "jrc_two"), strict=True):
        paths.append(path.parent.rename(tmp_path / f"{name}.zarr") / path.name)
    entries = {"datasets": {"predict": [{"raw": str(path)} for path in paths]}}
    for world in (1, 2):
        out = tmp_path / f"out{world}"
        writer = predict(paths[0], (8, 16, 16), out, data=entries, world=world, levels=1)
        if world == 1:
            assert writer.summary.complete
            assert set(writer.summary.fractions) == {"jrc_one/a", "jrc_two/a"}
        for path in paths:
            assert np.abs(read(out / path.parent.stem) - in_numbers(path)).max() < 1e-6
            lattice = read_multiscale(out / path.parent.stem / "a").finest.lattice
            assert lattice.matches(read_multiscale(path).finest.lattice)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert predict(paths[0], (8, 16, 16), out, data=entries, levels=1).summary.written == 0
    box = {"z": [0, 50], "y": [0, 50], "x": [0, 50]}
    with pytest.raises(CellMapValueError, match="a region needs a single volume"):
        predict(paths[0], (8, 16, 16), tmp_path / "no", data=entries, region=box)
    (tmp_path / "copy").mkdir()
    other = shutil.copytree(paths[0].parent, tmp_path / "copy" / "jrc_one.zarr") / "em"
    entries = {"datasets": {"predict": [{"raw": str(path)} for path in (paths[0], other)]}}
    with pytest.raises(CellMapValueError, match="would all be written to 'jrc_one'"):
        predict(paths[0], (8, 16, 16), tmp_path / "no", data=entries)


def test_several_volumes_share_the_memory_of_one(tmp_path, monkeypatch):
    memories = []

    class Noted(Counting):
        def __init__(self):
            super().__init__()
            memories.append(self)

    monkeypatch.setattr("cellmap_lightning.prediction.job.BlockMemory", Noted)
    raw = [raw_volume(tmp_path / name, (20, 24, 28))[0] for name in "abc"]
    paths = [path.parent.rename(tmp_path / f"{n}.zarr") / path.name for n, path in enumerate(raw)]
    entries = {"datasets": {"predict": [{"raw": str(path)} for path in paths]}}
    assert predict(paths[0], (8, 16, 16), tmp_path / "out", data=entries, levels=1, blend="gaussian").summary.complete
    assert [(m.held, m.most <= most) for m, most in zip(memories, (2, 1), strict=True)] == [(0, True), (0, True)]


def hollow(folder):
    """A volume with three empty quarters, and a mask of one corner at twice the voxel size."""
    values = np.zeros((32, 64, 64), np.uint8)
    values[:, :32, :32] = np.random.default_rng(0).integers(1, 256, (32, 32, 32))
    values[:, 32:, 32:] = 7  # as empty as black
    raw, mask = Path(folder) / "v.zarr" / "em", Path(folder) / "mask.zarr"
    write_multiscale(raw, values, scale=(8, 8, 8), translation=(4, 4, 4), storage=ArrayOptions(chunks=(16, 16, 16)))
    wanted = np.zeros((16, 32, 32), np.uint8)
    wanted[:8, :16, 16:] = 1
    write_multiscale(mask, wanted, scale=(16, 16, 16), translation=(8, 8, 8), storage=ArrayOptions(chunks=(16, 16, 16)))
    return raw, mask, values.astype(np.float32) / 255


@pytest.mark.parametrize("world", [1, 2])
def test_empty_blocks_are_skipped(tmp_path, world):
    raw, mask, values = hollow(tmp_path)
    data = {"input_arrays": {"raw": {"shape": [16, 16, 16], "scale": [8, 8, 8]}}, "batch_size": 2}
    given = {"chunks": [16, 16, 16], "block_size_mb": 0.01, "overlap": 0, "levels": 2}
    model = Identity()
    writer = predict_spec(raw, data, tmp_path / "a.zarr", model, world, skip_empty=True, **given)
    expected = np.zeros_like(values)
    expected[:, :32, :32] = values[:, :32, :32]
    assert np.abs(read(tmp_path / "a.zarr") - expected).max() < 1e-6
    files = [p for p in (tmp_path / "a.zarr" / "a" / "s0").rglob("*") if p.is_file() and p.name[0] != "."]
    assert len(files) == 8, "nothing is written of what is skipped"
    if world == 1:
        assert model.batches == 8
        assert (writer.summary.blocks, writer.summary.finished, writer.summary.complete) == (32, 32, True)
        assert writer.summary.skipped == 24
        assert "24 more were skipped" in str(writer.summary)
        assert writer.summary.fractions["a"] == pytest.approx((expected >= 0.5).mean())
        writer = predict_spec(raw, data, tmp_path / "b.zarr", Identity(), mask=str(mask), **given)
        assert writer.summary.skipped == 28
        kept = np.zeros_like(values)
        kept[:16, :32, 32:] = values[:16, :32, 32:]
        assert np.abs(read(tmp_path / "b.zarr") - kept).max() < 1e-6
        again = predict_spec(raw, data, tmp_path / "b.zarr", Identity(), mask=str(mask), **given)
        assert (again.summary.written, again.summary.skipped, again.summary.complete) == (0, 0, True)
        with pytest.raises(CellMapFileExistsError, match="mask: "):
            predict_spec(raw, data, tmp_path / "b.zarr", Identity(), **given)
        with pytest.raises(CellMapError, match="nowhere"):
            predict_spec(raw, data, tmp_path / "c.zarr", Identity(), mask=str(tmp_path / "nowhere"), **given)
        outside = predict_spec(raw, data, tmp_path / "d.zarr", Identity(), mask=str(mask), skip_empty=True, **given)
        assert outside.summary.skipped == 32
        assert outside.summary.complete
        assert not read(tmp_path / "d.zarr").any()


def test_warning_about_a_receptive_field_larger_than_the_context(tmp_path, caplog):
    path, _ = raw_volume(tmp_path, (24, 32, 32))
    given = {"classes": ("a", "b"), "model": Convolution()}  # 3 voxels on either side
    for context, said in ((1, True), (2, True), (3, False), (4, False)):
        caplog.clear()
        predict(path, (16, 16, 16), tmp_path / f"{context}.zarr", context=context, **given)
        found = "is larger than the context of [" in caplog.text
        assert found == said, context
    caplog.clear()
    predict(path, (16, 16, 16), tmp_path / "quiet.zarr", context=1, check_context=False, **given)
    assert "receptive field" not in caplog.text


def test_a_level_that_is_not_there_is_known_before_anything_is_computed(tmp_path):
    path, _ = raw_volume(tmp_path, (16, 16, 16), levels=2)
    shutil.rmtree(path / "s0")
    model = Identity()
    with pytest.raises(CellMapError, match="s0 are listed but not on disk"):
        predict(path, (8, 8, 8), tmp_path / "out.zarr", model, data={"max_upsampling": 1.0})
    assert model.batches == 0
    assert not (tmp_path / "out.zarr").exists()
