"""Ranks of a real Trainer: they see the samples of one process, and share what they decode."""

import csv
import datetime as dt
import hashlib
import itertools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from tests.conftest import INPUTS
from tests.runs import module, task, trainer

pytestmark = [
    pytest.mark.usefixtures("quiet_lightning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
#: Off the lattice of raw, so that voxels are resampled.
ARRAY = {"shape": INPUTS["raw"]["shape"], "scale": [9, 9, 9]}


class Hashes(L.Callback):
    """Writes what each step of a rank saw, and how many chunks the rank decoded."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rows = range(len(batch["idx"]))
        parts = ("raw", "labels", "idx")
        found = [hashlib.sha256(b"".join(batch[n][row].numpy().tobytes() for n in parts)).hexdigest() for row in rows]
        self.seen.append((trainer.current_epoch, batch_idx, found))

    def on_train_end(self, trainer, pl_module):
        store = trainer.datamodule.train_dataset._store
        messages = [r.getMessage() for r in self.caplog.records if "are dropped" in r.getMessage()]
        assert (trainer.datamodule.residents.cache is not None) == (trainer.datamodule.train_dataset.cache == "device")
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps([self.seen, store.decoded, messages]))


def fit(volume, folder, world, caplog, cache):
    folder.mkdir()
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork", timeout=dt.timedelta(seconds=300))
    watch = Hashes(folder)
    watch.caplog = caplog
    caplog.clear()
    with (
        caplog.at_level(logging.INFO, "cellmap_lightning.loading.epoch"),
        module(
            volume, input_arrays={"raw": ARRAY}, target_arrays={"labels": ARRAY}, batch_size=4 // world,
            batches_per_epoch=None, samples_per_epoch=11, cache=cache, seed=5,
            spatial_transforms={"mirror": {"axes": {"x": 0.5}}},
            intensity_transforms={"blur": [0, 9], "noise": [0, 0.1]},
        ) as data,
    ):  # fmt: skip
        trainer(
            folder, callbacks=[watch], devices=world, strategy=strategy if world > 1 else "auto", max_epochs=2,
            limit_val_batches=0, reload_dataloaders_every_n_epochs=1,
        ).fit(task(), data)  # fmt: skip
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("cache", ["disk", "device"])
def test_two_ranks_see_the_samples_of_one_and_share_what_they_decode(volume, tmp_path, monkeypatch, caplog, cache):
    found = {}
    for world in (1, 2):
        monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / f"cache{world}"))
        ranks = fit(volume, tmp_path / f"world{world}", world, caplog, cache)
        steps = list(zip(*(seen for seen, _, _ in ranks), strict=True))
        together = [(parts[0][:2], sorted(itertools.chain(*(bits for _, _, bits in parts)))) for parts in steps]
        assert [where for where, _ in together] == [[0, 0], [0, 1], [1, 0], [1, 1]]
        assert len({bits for _, batch in together for bits in batch}) == 16
        found[world] = together, [decoded for _, decoded, _ in ranks], [messages for _, _, messages in ranks]
    assert found[1][0] == found[2][0]
    alone, shared = (sum(found[world][1]) for world in (1, 2))
    assert alone == shared > 0, "each chunk by one of the ranks"
    # One line, on one rank, although the loaders were built for each epoch.
    (one,), (first, second) = found[1][2], found[2][2]
    assert [len(lines) for lines in (one, first, second)] == [1, 1, 0]
    for (line,), how in ((one, "ranks: 1, samples of each: 4"), (first, "ranks: 2, samples of each: 2")):
        assert f"an epoch of 11 samples is 2 global batches of 4 ({how}); the last 3 samples fill no batch" in line


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_a_sweep_of_jobs_of_two_processes(volume, tmp_path, strategy):
    """The replacement of `-m` with trainer.strategy=ddp, which is an error."""
    given = [
        f"data.csv_path={volume.csv_path}", "data.classes=[mito,er]", "patch.shape=[8,16,16]",
        "patch.scale=[10.48,8,8]", "data.batch_size=2", "data.batches_per_epoch=4", "data.val_samples=4",
        "model.channels=[4,8]", "model.strides=[2]", "trainer=cpu", "trainer.max_epochs=1",
        "trainer.log_every_n_steps=1", "trainer.devices=2", f"trainer.strategy={strategy}",
    ]  # fmt: skip
    done = subprocess.run(
        [Path(sys.executable).with_name("cellmap-train"), "-m", *given, "task.dice_weight=0,1", "hydra.sweep.dir=out"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for job in ("0", "1"):
        with (tmp_path / "out" / job / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert all(0 <= float(row["val/dice"]) <= 1 for row in rows if row["val/dice"])
        assert sum(bool(row["train/loss"]) for row in rows) == 2
        best = torch.load(tmp_path / "out" / job / "checkpoints" / "best.ckpt", weights_only=True)
        assert best["global_step"] == 2, "four batches for two processes"
    assert done.stdout.count("val/dice 0.") == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0", "1", "multirun.yaml"]


@pytest.mark.slow
def test_torchrun(volume, tmp_path):
    """Processes of an external launcher share one folder, and one stream of samples."""
    done = subprocess.run(
        [
            Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", "2",
            Path(sys.executable).with_name("cellmap-train"), f"data.csv_path={volume.csv_path}",
            "patch.shape=[8,16,16]", "patch.scale=[10.48,8,8]", "data.batch_size=2", "data.batches_per_epoch=4",
            "data.val_samples=4", "data.classes=[mito,er]", "model.channels=[4,8]", "model.strides=[2]", "trainer=ddp",
            "trainer.accelerator=cpu",
            "trainer.devices=2", "trainer.max_epochs=1", "final_validation=false",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("torchrun-")
    assert torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == 2
