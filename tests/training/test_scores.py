"""Scores of numbers, compared with numpy and torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics import R2Score

from cellmap_lightning import CellMapError
from cellmap_lightning.training.scores import DirectionScore, RegressionScore

NAN = float("nan")


def batches(channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        target = torch.rand(2, channels, 4, 5, 6, generator=generator)
        values = target + 0.2 * torch.randn(target.shape, generator=generator)
        target[torch.rand(target.shape, generator=generator) < 0.2] = NAN
        yield values, target


def test_error_and_explained_variance_are_those_of_the_known_voxels():
    metric, r2 = RegressionScore(["a", "b"]), R2Score()
    seen = []
    for values, target in batches(4):
        metric.update(values, target)
        known = ~target[:, 2:].isnan()
        seen.append((values[:, 2:][known], target[:, 2:][known]))
    values, target = (torch.cat(parts) for parts in zip(*seen, strict=True))
    found = metric.compute()
    torch.testing.assert_close(found["r2"][1].float(), r2(values, target))
    torch.testing.assert_close(found["mae"][1].float(), (values - target).abs().mean())


def test_unknown_and_constant_targets_have_no_explained_variance():
    metric = RegressionScore(["a", "b", "c"])
    target = torch.rand(1, 3, 2, 2, 2)
    target[:, 0], target[:, 1] = NAN, 0.25
    metric.update(target.nan_to_num(0), target)
    found = metric.compute()
    assert found["r2"].isnan().tolist() == [True, True, False]
    assert found["r2"][2] == 1
    assert found["mae"].isnan().tolist() == [True, False, False]


def test_directions_are_compared_where_there_are_any():
    metric = DirectionScore(["a", "b"])
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 6, 3, 4, 5, generator=generator)
    target = torch.randn(2, 6, 3, 4, 5, generator=generator)
    target = torch.cat([part / part.norm(dim=1, keepdim=True) for part in target.split(3, 1)], 1)
    target[:, :3, 0], target[:, :3, 1] = 0, NAN
    metric.update(values, target)
    found = metric.compute()["cosine"]
    dots = [(v * t).sum(1) / v.norm(dim=1) for v, t in zip(values.split(3, 1), target.split(3, 1), strict=True)]
    np.testing.assert_allclose(found[0], dots[0][:, 2:].mean(), atol=1e-6)
    np.testing.assert_allclose(found[1], dots[1].mean(), atol=1e-6)


@pytest.mark.parametrize("metric", [RegressionScore(["a", "b"]), DirectionScore(["a", "b"])])
@pytest.mark.parametrize("shapes", [((1, 3, 2, 2), (1, 3, 2, 2)), ((1, 2, 2, 2), (1, 4, 2, 2)), ((1, 2, 2), (1, 2, 3))])
def test_other_shapes_are_refused(metric, shapes):
    with pytest.raises(CellMapError, match="do not fit 2 classes"):
        metric.update(*(torch.zeros(shape) for shape in shapes))
