"""A resumed run sees the samples that it would have seen, however its loaders are made, limited and combined."""

import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.training.task import SegmentationTask
from tests.conftest import CLASSES
from tests.loading.test_resume import StopAfter, StopError
from tests.runs import module, trainer

pytestmark = [
    pytest.mark.usefixtures("quiet_lightning", "no_threads_left"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*exists:UserWarning"),
]


class OneCycle(SegmentationTask):
    """As most recipes with a warm-up do."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        total = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total), "interval": "step"}
        ]


class LooksAtLoaders(SegmentationTask):
    """A module that has the loaders created in another hook, and reads a batch itself."""

    def configure_optimizers(self):
        self.trainer.fit_loop.setup_data()
        next(iter(self.trainer.datamodule.train_dataloader()))
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Plain(SegmentationTask):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Seen(L.Callback):
    """The positions of each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, run, pl_module, outputs, batch, batch_idx):
        parts = batch if "idx" not in batch else {"": batch}
        self.steps.append(tuple(tuple(part["idx"].tolist()) for part in parts.values()))


def run(volume, folder, kind, *, stop=None, ckpt=None, options=None, data=None, more=(), **given):
    seen = Seen()
    keep = ModelCheckpoint(folder, "kept", enable_version_counter=False, save_top_k=1, every_n_train_steps=1)
    callbacks = [*more, seen, keep] + ([StopAfter(stop)] if stop is not None else [])
    torch.manual_seed(0)
    model = kind(nn.Conv3d(1, 3, 3, padding=1), CLASSES, input_name="raw", target_name="labels")
    with data or module(volume, batches_per_epoch=4, val_samples=2, **given) as made:
        train = trainer(
            folder, callbacks=callbacks, enable_checkpointing=True, num_sanity_val_steps=0, limit_val_batches=0,
            **{"max_epochs": 3} | (options or {}),
        )  # fmt: skip
        try:
            train.fit(model, made, ckpt_path=ckpt, weights_only=True)
        except StopError:
            assert stop is not None
    return seen.steps


@pytest.mark.parametrize("kind", [OneCycle, LooksAtLoaders])
@pytest.mark.parametrize("stop", [1, 3, 4, 6])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_loaders_that_are_made_before_the_state_is_restored(volume, tmp_path, kind, stop, workers):
    """`Trainer.estimated_stepping_batches` has them made, and Lightning drops their state (its issue 20550)."""
    whole = run(volume, tmp_path, kind)
    assert len(set(whole)) == 12
    before = run(volume, tmp_path, kind, stop=stop, num_workers=workers)
    after = run(volume, tmp_path, kind, ckpt=tmp_path / "kept.ckpt", num_workers=workers)
    assert before + after == whole


@pytest.mark.parametrize("batch", [1, 4])
def test_early_loaders_with_another_batch_size(volume, tmp_path, batch):
    whole = [i for step in run(volume, tmp_path, LooksAtLoaders) for i in step[0]]
    length = {"samples_per_epoch": 8, "batches_per_epoch": None}
    run(volume, tmp_path, LooksAtLoaders, stop=6)
    with module(volume, batch_size=batch, val_samples=2, **length) as data:
        after = run(volume, tmp_path, LooksAtLoaders, ckpt=tmp_path / "kept.ckpt", data=data)
    assert [i for step in after for i in step[0]] == whole[12:]


@pytest.mark.parametrize("kind", [Plain, OneCycle])
@pytest.mark.parametrize("stop", [2, 3, 5, 6])
def test_epochs_that_are_limited(volume, tmp_path, kind, stop):
    """Also from a checkpoint of the last step before the limit: the next epoch begins where it always does."""
    options = {"options": {"limit_train_batches": 3}}
    whole = run(volume, tmp_path, kind, **options)
    assert len(set(whole)) == 9
    before = run(volume, tmp_path, kind, stop=stop, **options)
    after = run(volume, tmp_path, kind, ckpt=tmp_path / "kept.ckpt", **options)
    assert before + after == whole


class Two(CellMapDataModule):
    """Its own loader, and the shorter one of another module."""

    def train_dataloader(self):
        return {"a": super().train_dataloader(), "b": self.other.train_dataloader()}

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


class Both(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)


class BothOneCycle(OneCycle, Both):
    pass


@pytest.mark.parametrize("kind", [Both, BothOneCycle])
@pytest.mark.parametrize("attached", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "lengths", [(5, 3), pytest.param((3, 5), marks=pytest.mark.slow), pytest.param((5, 2), marks=pytest.mark.slow)]
)
def test_two_modules_of_different_lengths(volume, tmp_path, kind, attached, lengths):
    """The shorter loader has several passes in an epoch."""

    def both(folder, **kwargs):
        with module(volume, batches_per_epoch=lengths[1], seed=1) as other:
            data = module(volume, batches_per_epoch=lengths[0])
            data.__class__ = Two
            data.other = other

            class Attach(L.Callback):
                def setup(self, run, pl_module, stage):
                    other.setup("fit")
                    if attached:
                        other.trainer = run

            return run(volume, folder, kind, data=data, more=[Attach()], **kwargs)

    whole = both(tmp_path)
    assert len(whole) == 15
    for stop in (2, 4, 5, 8):
        before = both(tmp_path, stop=stop)
        after = both(tmp_path, ckpt=tmp_path / "kept.ckpt")
        assert list(itertools.chain(before, after)) == whole, stop
