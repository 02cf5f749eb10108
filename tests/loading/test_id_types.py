"""Batches of crops whose ids are stored in types of different widths."""

import numpy as np
import pytest

from cellmap_lightning import CellMapDataModule
from tests.foreign import INSTANCE, annotated, cube, write_pair

SPEC = {"shape": [32] * 3, "scale": [8] * 3}


@pytest.mark.parametrize("kind", ["ids", "instances"])
@pytest.mark.parametrize("narrow", ["uint8", "uint16", "int32"])
def test_narrow_ids_join_batches_of_wide_ones(tmp_path, kind, narrow):
    entries = []
    for crop, dtype, value in (("crop1", narrow, 7), ("crop2", "uint64", 9)):
        raw, target = write_pair(tmp_path, cube(value, dtype), crop=crop, attributes=annotated(INSTANCE))
        entries.append({"raw": raw, "gt": target})
    targets = {"labels": {**SPEC, "kind": kind}}
    with CellMapDataModule(
        ["mito"], {"raw": SPEC}, targets, datasets={"train": entries}, batch_size=16, samples_per_epoch=16,
        spatial_transforms=None, num_workers=0,
    ) as data:  # fmt: skip
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        found = {tuple(np.unique(labels).tolist()) for labels in batch["labels"].numpy()}
    assert found == {(0.0, 7.0), (0.0, 9.0)}
