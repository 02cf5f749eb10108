"""Modules, tasks and Trainers that tests run: small, and real."""

from typing import Any

import lightning as L
import torch
from torch import nn

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.training.task import SegmentationTask
from tests.conftest import CLASSES, INPUTS, TARGETS

GT = "recon-1/labels/groundtruth"


def module(volume, **kwargs):
    entry = {n: {"raw": volume.raw_path, "gt": f"{volume.path}/{GT}/crop{n}/[mito,er,pm]"} for n in (2, 3, 4)}
    given: dict[str, Any] = {
        "classes": CLASSES,
        "input_arrays": INPUTS,
        "target_arrays": TARGETS,
        "datasets": {
            "train": [entry[2], entry[3]],
            "val": [entry[4]],
            "test": [entry[4]],
            "predict": [{"raw": volume.raw_path}],
        },
        "batch_size": 2,
        "batches_per_epoch": 3,
        "val_samples": 4,
    }
    return CellMapDataModule(**(given | kwargs))


def task(**kwargs):
    torch.manual_seed(0)
    return SegmentationTask(nn.Conv3d(1, 3, 3, padding=1), CLASSES, **kwargs)


def trainer(tmp_path, **kwargs):
    given = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path,
    }  # fmt: skip
    return L.Trainer(**(given | kwargs))


class Watch(L.Callback):
    """Keeps the batches that the steps saw."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append({n: t.clone() for n, t in batch.items()})

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.batches.append({n: t.clone() for n, t in batch.items()})
