"""The halo of a network: the receptive field that its layers have by their formula."""

import pytest
import torch
from monai.networks.nets import UNet
from torch import nn

from cellmap_lightning.export.halo import measure_halo


@pytest.mark.parametrize(
    ("layers", "halo"),
    [
        ([nn.Conv3d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv3d(2, 1, 3, padding=1)], (2, 2, 2)),
        ([nn.Conv3d(1, 2, (1, 3, 5), padding=(0, 1, 2)), nn.InstanceNorm3d(2), nn.Conv3d(2, 1, 1)], (0, 1, 2)),
        ([nn.Conv3d(1, 4, 3, padding=4, dilation=4), nn.GroupNorm(2, 4), nn.PReLU()], (4, 4, 4)),
        ([nn.Conv3d(1, 2, 5)], (2, 2, 2)),
        ([nn.Conv3d(1, 2, 3, padding=1), nn.MaxPool3d(3, 1, 1)], (2, 2, 2)),
        # A stride of 2 and back: a voxel at the far end of its pair.
        ([nn.Conv3d(1, 2, 2, stride=2), nn.ConvTranspose3d(2, 1, 2, stride=2)], (1, 1, 1)),
    ],
    ids=["two 3", "anisotropic", "dilated", "valid", "maximum", "strided"],
)
def test_receptive_field_of_layers(layers, halo):
    assert measure_halo(nn.Sequential(*layers), (24, 24, 24)) == (halo, True)


def test_no_voxel_beyond_the_halo_changes_the_output():
    network = UNet(2, 1, 1, channels=(4, 8), strides=(2,), num_res_units=1, norm="BATCH").eval()
    (halo, _), exact = measure_halo(network, (48, 48))
    assert exact
    x = torch.rand(1, 1, 48, 48)
    with torch.no_grad():
        before = network(x)
        changed = []
        for y in range(48):
            other = x.clone()
            other[..., y, :] += 10
            rows = (network(other) - before).abs().amax((0, 1, 3)).nonzero().flatten()
            changed += (rows - y).abs().tolist()
    assert max(changed) == halo


def test_a_receptive_field_larger_than_the_patch():
    halo, exact = measure_halo(nn.Conv3d(1, 1, 15, padding=7), (8, 16, 16))
    assert not exact
    assert halo == (7, 7, 7)


def test_units_that_are_off_count():
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv3d(2, 1, 3, padding=1))
    nn.init.constant_(network[0].bias, -100)
    assert measure_halo(network, (16, 16, 16)) == ((2, 2, 2), True)
