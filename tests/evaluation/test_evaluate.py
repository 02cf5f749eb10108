"""Voxel scores of stored predictions."""

import numpy as np
import pytest
import torch
import zarr

from cellmap_lightning.commands.predict_config import groundtruth
from cellmap_lightning.evaluation.evaluate import Score, evaluate
from cellmap_lightning.io.ngff import read_encoding, read_multiscale
from cellmap_lightning.io.writer import write_multiscale


def test_scores_ignore_unannotated_voxels(volume, tmp_path):
    """A prediction that equals the labels is perfect; one with the labels removed in one half has half the recall."""
    crop = f"{volume.path}/recon-1/labels/groundtruth/crop2/mito"
    image = read_multiscale(crop)
    level, encoding = image.finest, read_encoding(image, image.finest)
    stored = zarr.open_array(str(level.path), mode="r")[...]
    known, there = stored != encoding.unknown, (stored != encoding.absent) & (stored != encoding.unknown)
    spoilt = there.copy()
    spoilt[: len(spoilt) // 2] = False
    for values, name in ((there, "whole"), (spoilt, "spoilt")):
        position = {"scale": level.scale, "translation": level.translation}
        write_multiscale(tmp_path / name / "mito", np.where(values, 255, 0).astype(np.uint8), **position)
    (whole,) = [s for s in scores_of(tmp_path / "whole", volume) if s.crop == "crop2"]
    assert (whole.known, whole.tp, whole.fp, whole.fn) == (known.sum(), there.sum(), 0, 0)
    assert whole.dice == whole.iou == whole.precision == whole.recall == 1
    (half,) = [s for s in scores_of(tmp_path / "spoilt", volume) if s.crop == "crop2"]
    left = int(spoilt.sum())
    assert (half.tp, half.fp, half.fn) == (left, 0, there.sum() - left)
    assert half.precision == 1
    assert half.recall == pytest.approx(left / there.sum())


def test_scores_equal_torchmetrics():
    from torchmetrics.classification import BinaryF1Score, BinaryJaccardIndex, BinaryPrecision, BinaryRecall

    rng = torch.Generator().manual_seed(0)
    truth, there = (torch.rand(500, generator=rng) > 0.6 for _ in range(2))
    known = torch.rand(500, generator=rng) > 0.3
    tp, fp, fn = ((known & a & b).sum().item() for a, b in ((there, truth), (there, ~truth), (~there, truth)))
    score = Score("crop", "mito", int(known.sum()), tp, fp, fn)
    for name, metric in (
        ("dice", BinaryF1Score()), ("iou", BinaryJaccardIndex()), ("precision", BinaryPrecision()),
        ("recall", BinaryRecall()),
    ):  # fmt: skip
        expected = metric(there[known].int(), truth[known].int()).item()
        assert getattr(score, name) == pytest.approx(expected, abs=1e-6)


def scores_of(output, volume):
    return evaluate(output, groundtruth(volume.raw_path), ["mito"])
