"""The U-Net: MONAI's, but for the upsampling."""

import pytest
import torch
from monai.networks.nets import UNet as MonaiUNet
from torch import nn

from cellmap_lightning.training.unet import UNet

SIZES = [
    (3, (4, 8, 8), (2, 2)),
    (3, (4, 8), ((1, 2, 2),)),
    (2, (4, 8, 8), (2, 4)),
]  # fmt: skip


def ups(network):
    """Return the transposed convolutions of a network."""
    return [m for m in network.modules() if isinstance(m, nn.ConvTranspose2d | nn.ConvTranspose3d)]


def terms(conv, axis):
    """Return how many voxels of the input each plane of the output of a transposed convolution is a sum of."""
    dimensions = conv.weight.ndim - 2
    with torch.no_grad():
        conv.weight.fill_(1.0)
        if conv.bias is not None:
            conv.bias.zero_()
        x = torch.ones(1, conv.in_channels, *[5] * dimensions)
        sums = conv(x) / conv.in_channels
    return sums.movedim(2 + axis, 0).flatten(1).max(1).values


@pytest.mark.parametrize(("dimensions", "channels", "strides"), SIZES, ids=str)
@pytest.mark.parametrize("units", [0, 1, 2])
def test_each_plane_has_one_term(dimensions, channels, strides, units):
    network = UNet(dimensions, 1, 2, channels, strides, num_res_units=units)
    convs = ups(network)
    assert len(convs) == len(strides)
    for conv in convs:
        for axis in range(dimensions):
            counts = terms(conv, axis)
            assert torch.equal(counts, torch.ones_like(counts))


def test_the_last_plane_of_monai_has_fewer_terms():
    """The reason for the class: drop it when this fails."""
    for conv in ups(MonaiUNet(3, 1, 1, (4, 8, 8), (2, 2))):
        counts = terms(conv, 0)
        assert counts[-1] * 2 == counts[1]


@pytest.mark.parametrize(("dimensions", "channels", "strides"), SIZES, ids=str)
@pytest.mark.parametrize("units", [0, 1, 2])
def test_all_else_is_monai(dimensions, channels, strides, units):
    """Modules and weights differ in the transposed convolutions alone, and the output has the shape of the patch."""
    options = {"num_res_units": units, "act": ("leakyrelu", {"inplace": True}), "norm": "BATCH", "bias": False}
    ours = UNet(dimensions, 2, 3, channels, strides, **options)
    theirs = MonaiUNet(dimensions, 2, 3, channels, strides, **options)
    shapes, others = ({k: v.shape for k, v in net.state_dict().items()} for net in (ours, theirs))
    assert list(shapes) == list(others)
    changed = {k for k, shape in shapes.items() if shape != others[k]}
    assert changed == {k for k in shapes if any(shapes[k] == conv.weight.shape for conv in ups(ours))}
    patch = torch.rand(2, 2, *[16] * dimensions)
    assert ours(patch).shape == (2, 3, *[16] * dimensions)
