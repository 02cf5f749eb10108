"""Losses over several scales."""

import pytest
import torch
from monai.networks.nets import DynUNet

from cellmap_lightning import CellMapError
from cellmap_lightning.training.deep_supervision import over_scales, pooled, scales_of
from cellmap_lightning.training.masked import masked_bce

NAN = float("nan")


def test_targets_are_pooled_over_the_known_voxels():
    target = torch.tensor([1.0, 0.0, NAN, 1.0, NAN, NAN, 1.0, 1.0]).reshape(1, 1, 1, 1, 8).expand(2, 3, 2, 2, 8)
    found = pooled(target, torch.Size([1, 1, 4]))
    assert found.shape == (2, 3, 1, 1, 4)
    torch.testing.assert_close(found[1, 2, 0, 0], torch.tensor([0.5, 1.0, NAN, 1.0]), equal_nan=True)
    slices = pooled(target[:, :, 0], torch.Size([1, 4]))
    torch.testing.assert_close(slices, found[:, :, 0], equal_nan=True)
    assert pooled(target, target.shape[2:]) is target


def test_class_numbers_are_those_of_the_nearest_voxel():
    target = torch.tensor([0, 1, -100, 2, 3, 3]).reshape(1, 1, 1, 1, 6).expand(1, 1, 3, 3, 6)
    found = pooled(target, torch.Size([1, 1, 3]))
    assert found.dtype == torch.int64
    assert found.flatten().tolist() in ([1, 2, 3], [0, -100, 3])


def test_scales_are_weighted_by_halves():
    generator = torch.Generator().manual_seed(0)
    target = (torch.rand(1, 2, 8, 8, 8, generator=generator) < 0.5).float()
    target[..., :4] = NAN
    outputs = [torch.randn(1, 2, n, n, n, generator=generator) for n in (8, 4, 2)]
    losses = [masked_bce(o, pooled(target, o.shape[2:])) for o in outputs]
    expected = (losses[0] + losses[1] / 2 + losses[2] / 4) / 1.75
    torch.testing.assert_close(over_scales(masked_bce, outputs, target), expected)
    torch.testing.assert_close(over_scales(masked_bce, outputs[:1], target), masked_bce(outputs[0], target))


def test_outputs_of_monai_are_unstacked():
    network = DynUNet(
        3, 1, 2, [3, 3, 3, 3], [1, 2, 2, 2], [2, 2, 2], filters=[4, 8, 8, 8], deep_supervision=True, deep_supr_num=2
    )
    x = torch.zeros(1, 1, 16, 16, 16)
    scales = scales_of(network(x), x.ndim)
    assert [tuple(scale.shape) for scale in scales] == [(1, 2, 16, 16, 16)] * 3
    network.eval()
    assert [tuple(scale.shape) for scale in scales_of(network(x), x.ndim)] == [(1, 2, 16, 16, 16)]
    assert len(scales_of((scales[0], scales[1]), 5)) == 2


@pytest.mark.parametrize("output", [{"logits": torch.zeros(1)}, [], [torch.zeros(1), None], "text"])
def test_other_outputs_are_refused(output):
    with pytest.raises(CellMapError, match="the network must return a tensor"):
        scales_of(output, 5)
