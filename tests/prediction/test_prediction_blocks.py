"""Blocks of a prediction: batches, carried sums, distribution over processes, skipping."""

import re

import lightning as L
import numpy as np
import pytest
import zarr

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.callbacks import make_prediction_writer
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from cellmap_lightning.prediction.blending import Tiling
from cellmap_lightning.prediction.blocks import BlockGrid
from cellmap_lightning.prediction.journal import Journal
from cellmap_lightning.prediction.output import PredictionOutput
from tests.prediction.predictions import SCALE, TRANSLATION, Convolution, Identity, contents, predict, raw_volume, read

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")


class Company(L.LightningModule):
    """A model whose output depends on what else is in its batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def predict_step(self, batch, batch_idx):
        self.seen += batch["idx"].tolist()
        return batch["raw"] * (1 + batch["raw"].mean())


@pytest.mark.parametrize(("blend", "overlap"), [("trim", 0.25), ("average", 0.25), ("gaussian", 0.5), ("average", 0.7)])
def test_resumed_run_computes_the_same_batches(tmp_path, blend, overlap):
    path, _ = raw_volume(tmp_path, (70, 41, 50))
    given = {"blend": blend, "overlap": overlap, "block_size_mb": 0.06, "check_context": False}
    model = Company()
    predict(path, (12, 16, 20), tmp_path / "once.zarr", model, **given)
    once, out = contents(tmp_path / "once.zarr"), tmp_path / "out.zarr"
    batches = -(-len(model.seen) // 3)
    for limit, world in ((1, 1), (batches // 7, 1), (batches // 9, 2), (batches // 5, 1)):
        predict(path, (12, 16, 20), out, Company(), limit=limit, world=world, **given)
        assert not Journal(out).complete
    predict(path, (12, 16, 20), out, Company(), **given)
    assert contents(out) == once


@pytest.mark.parametrize("blend", ["average", "gaussian"])
def test_blocks_below_each_other_share_their_patches(tmp_path, blend):
    path, _ = raw_volume(tmp_path, (70, 41, 50))
    model = Company()
    out, shape, patch = tmp_path / "out.zarr", (70, 41, 50), (12, 16, 20)
    predict(path, patch, out, model, blend=blend, block_size_mb=0.06)
    block, tiling = Journal(out).settings["block"], Tiling(shape, patch, blend)
    assert block[0] < 70 / 3
    assert block[1] < 41 or block[2] < 50
    columns = tiling.count(1, 0, 41, block[1]) * tiling.count(2, 0, 50, block[2])
    assert len(model.seen) == tiling.count(0, 0, 70, 70) * columns
    assert len(set(model.seen)) == len(tiling.parts((0, 0, 0), shape))


@pytest.mark.parametrize(("blend", "limit"), [("trim", 50), ("gaussian", 70)])
def test_remaining_blocks_are_distributed_over_processes(tmp_path, blend, limit, monkeypatch):
    # The end would remove the journal; a process that is done still waits for the others.
    monkeypatch.setattr(PredictionOutput, "finish", lambda _, rank, world, barrier, broadcast: bool(barrier()))
    path, _ = raw_volume(tmp_path, (70, 41, 50))
    out, given = tmp_path / "out.zarr", {"blend": blend, "block_size_mb": 0.06}
    predict(path, (12, 16, 20), out, limit=limit, **given)
    before = set(Journal(out).finished)
    lattice = read_multiscale(path).finest.lattice
    grid = BlockGrid(lattice, (0, 0, 0), (70, 41, 50), tuple(Journal(out).settings["block"]))
    left = [number for number in range(len(grid)) if number not in before]
    assert 2 < len(before) < len(grid) - 4
    predict(path, (12, 16, 20), out, world=2, **given)
    files = [out / ".cellmap-prediction" / f"blocks-{rank}.txt" for rank in range(2)]
    done = [{int(n) for n in re.findall(r"done (\d+)", file.read_text())} - before for file in files]
    assert done == [set(grid.share(left, rank, 2, blend != "trim")) for rank in range(2)]
    whole = [set(grid.share(range(len(grid)), rank, 2, blend != "trim")) - before for rank in range(2)]
    assert done != whole, "the blocks of a resumed run, not those of one that begins"
    assert abs(len(done[0]) - len(done[1])) <= 1


def test_warning_about_small_blocks_names_a_better_size(tmp_path, caplog):
    path, _ = raw_volume(tmp_path, (40, 64, 64))
    given = {"blend": "gaussian", "chunks": [8, 8, 8], "levels": 1}
    few = predict(path, (16, 16, 16), tmp_path / "few.zarr", block_size_mb=0.1, **given)
    said = [r.getMessage() for r in caplog.records if "block_size_mb" in r.getMessage()]
    found = re.search(
        r"model computes ([\d.]+) times .* block_size_mb=([\d.]+) would allow .* make it ([\d.]+) times", said[0]
    )
    assert float(found[1]) == pytest.approx(few.redundancy, abs=0.01)
    caplog.clear()
    more = predict(path, (16, 16, 16), tmp_path / "more.zarr", block_size_mb=float(found[2]), **given)
    assert float(found[3]) == pytest.approx(more.redundancy, abs=0.01)
    assert more.redundancy <= 1.25 < 1.5 < few.redundancy
    assert not [r for r in caplog.records if "block_size_mb" in r.getMessage()]
    assert contents(tmp_path / "few.zarr", root=False) == contents(tmp_path / "more.zarr", root=False)
    predict(path, (16, 16, 16), tmp_path / "late.zarr", block_size_mb=0.1, limit=9, **given)
    caplog.clear()
    assert predict(path, (16, 16, 16), tmp_path / "late.zarr", block_size_mb=0.1, **given).summary.complete
    assert not [r for r in caplog.records if "block_size_mb" in r.getMessage()], "other blocks could not resume there"


def test_a_block_that_is_skipped_changes_nothing_below_it(tmp_path):
    path, _ = raw_volume(tmp_path, (64, 32, 32))
    wanted = np.ones((64, 32, 32), np.uint8)
    wanted[16:32], wanted[40:48, :16] = 0, 0
    mask = tmp_path / "mask.zarr"
    write_multiscale(mask, wanted, scale=SCALE, translation=TRANSLATION, storage=ArrayOptions(chunks=(16, 16, 16)))
    given = {"blend": "gaussian", "chunks": [8, 16, 16], "block_size_mb": 0.05, "model": Convolution(), "levels": 1}
    given["classes"] = ("a", "b")
    predict(path, (12, 16, 20), tmp_path / "whole.zarr", **given)
    writer = predict(path, (12, 16, 20), tmp_path / "part.zarr", mask=str(mask), **given)
    whole, part = read(tmp_path / "whole.zarr", "b"), read(tmp_path / "part.zarr", "b")
    assert 0 < writer.summary.skipped < writer.summary.blocks
    computed = part != 0
    assert np.array_equal(part[computed], whole[computed])
    assert computed[wanted > 0].all()
    assert not computed[16:32].any()


def test_real_volume_is_reproduced(real_volume, tmp_path):
    path = real_volume / "recon-1" / "em" / "fibsem-uint8"
    level = read_multiscale(path).finest
    spec = {"raw": {"shape": [8, 128, 128], "scale": list(level.scale)}}
    with CellMapDataModule(["a"], spec, datasets={"predict": [{"raw": str(path)}]}, batch_size=4) as data:
        run = L.Trainer(
            accelerator="cpu", devices=1, logger=False, callbacks=[make_prediction_writer(str(tmp_path / "out.zarr"))],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        run.predict(Identity(), datamodule=data)
    assert np.array_equal(read(tmp_path / "out.zarr"), zarr.open_array(str(level.path), mode="r")[...])
    assert read_multiscale(tmp_path / "out.zarr" / "a").finest.lattice.matches(level.lattice)


@pytest.mark.parametrize(("blend", "times"), [("trim", 2), ("average", 3), ("trim", 4)])
def test_blocks_have_no_gaps_beside_a_coarser_input(tmp_path, blend, times):
    """The coarser input is stored at twice and four times the voxel size; the region begins off its voxels."""
    path, values = raw_volume(tmp_path, (19, 41, 40), levels=3)
    patch, out = (8, 16, 16), tmp_path / "out.zarr"
    context = {"shape": list(patch), "scale": np.multiply(SCALE, times).tolist()}
    data = {"input_arrays": {"raw": {"shape": list(patch), "scale": list(SCALE)}, "context": context}}
    lower, upper = (3, 3, 5), (18, 38, 40)
    region = {
        axis: [t + (a - 0.5) * s, t + (b - 0.5) * s]
        for axis, t, s, a, b in zip("zyx", TRANSLATION, SCALE, lower, upper, strict=True)
    }
    predict(path, patch, out, data=data, blend=blend, overlap=0.25, region=region, check_context=False)
    expected = values[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))] / 255
    np.testing.assert_allclose(read(out), expected, atol=1e-6)
