import pytest
import torch
from torch import nn

from cellmap_lightning.errors import CellMapError
from cellmap_lightning.training.networks import ContextNet
from cellmap_lightning.training.reconstruction import ReconstructionTask


class Second(nn.Module):
    """Returns the channel of the context."""

    def forward(self, x):
        return x[:, 1:]


@pytest.mark.parametrize(("fine", "coarse"), [((8, 6, 10), (4, 6, 8)), ((6, 10), (6, 8))])
def test_context_is_resampled_at_patch_voxels(fine, coarse):
    """A field that is linear in nm is reproduced exactly at the voxel centres of the patch."""
    scale, context_scale = [4, 8, 8], [16, 20, 32]

    def field(shape, step):
        axes = [(torch.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, step[-len(shape) :], strict=True)]
        grid = torch.meshgrid(*axes, indexing="ij")
        return sum(weight * part for weight, part in zip((1.0, 0.3, -0.7), grid, strict=False))[None, None]

    net = ContextNet(Second(), nn.Identity(), scale, context_scale)
    output = net(torch.zeros(1, 1, *fine), field(coarse, context_scale))
    torch.testing.assert_close(output, field(fine, scale), atol=1e-4, rtol=0)


def test_context_smaller_than_patch_is_refused():
    net = ContextNet(Second(), nn.Identity(), [8, 8, 8], [8, 8, 8])
    with pytest.raises(CellMapError, match="does not hold the patch"):
        net(torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 4, 8, 8))


def test_hidden_blocks_depend_on_seed_epoch_and_position():
    task = ReconstructionTask(nn.Identity(), hidden=0.25, block=(4, 4, 4), seed=3)
    x = torch.rand(2, 1, 8, 16, 10)
    seen, mask = task.hide(x, [5, 9])
    assert torch.equal(seen[~mask], x[~mask])
    for one, where, original in zip(seen, mask, x, strict=True):
        torch.testing.assert_close(one[where], original[~where].mean().expand(int(where.sum())))
    alone, _ = task.hide(x[1:], [9])
    assert torch.equal(alone[0], seen[1])
    assert not torch.equal(task.hide(x, [5, 9], epoch=1)[1], mask)
    assert not torch.equal(mask[0], mask[1])
    blocks = mask[:, 0, ::4, ::4, ::4].flatten(1)
    assert blocks.sum(1).tolist() == [6, 6]  # a quarter of 2 x 4 x 3
