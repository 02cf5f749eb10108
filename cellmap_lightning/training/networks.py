"""Networks beside those of MONAI."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from cellmap_lightning.errors import CellMapValueError


class ContextNet(nn.Module):
    """A network with a patch and, as context, a wider and coarser patch around the same centre as inputs.

    A second network computes features of the context. They are interpolated linearly, in nm, at the voxel centres of
    the patch and are concatenated with it as input channels of the first network.

    Args:
        network: from ``[N, 1 + K, z, y, x]`` to logits.
        context: from the context ``[N, 1, z, y, x]`` to ``[N, K, z, y, x]``.
        scale: voxel size of the patch, nm, one number per axis.
        context_scale: voxel size of the context.

    Raises:
        CellMapValueError: voxel sizes are not positive, or have different numbers of axes.

    Example:
        >>> network, context = UNet(3, 1 + 4, 2, (8, 16), (2,)), UNet(3, 1, 4, (8, 16), (2,))
        >>> net = ContextNet(network, context, scale=[8, 8, 8], context_scale=[32, 32, 32])
        >>> net(torch.zeros(1, 1, 32, 32, 32), torch.zeros(1, 1, 32, 32, 32)).shape
        torch.Size([1, 2, 32, 32, 32])
    """

    def __init__(
        self, network: nn.Module, context: nn.Module, scale: Sequence[float], context_scale: Sequence[float]
    ) -> None:
        super().__init__()
        if len(scale) != len(context_scale) or not all(s > 0 for s in [*scale, *context_scale]):
            raise CellMapValueError(
                f"scale and context_scale must be voxel sizes in nm, one per axis, got {list(scale)} and "
                f"{list(context_scale)}"
            )
        self.network = network
        self.context = context
        self.zoom = [fine / coarse for fine, coarse in zip(scale, context_scale, strict=True)]

    def forward(self, patch: Tensor, context: Tensor) -> Tensor:
        """Return logits of a patch ``[N, 1, z, y, x]`` with its context.

        Raises:
            CellMapValueError: the context does not contain the patch.
        """
        features = self.context(context)
        return self.network(torch.cat([patch, self._at(patch, features)], 1))  # type: ignore[no-any-return]

    def _at(self, patch: Tensor, features: Tensor) -> Tensor:
        """Return the features at the voxel centres of the patch."""
        fine, coarse = patch.shape[2:], features.shape[2:]
        zoom = self.zoom[-len(fine) :]  # an xy slice has no z axis
        if any(n * z > m * (1 + 1e-6) for n, z, m in zip(fine, zoom, coarse, strict=True)):
            raise CellMapValueError(
                f"a context of {list(coarse)} voxels does not hold the patch of {list(fine)} voxels, each "
                f"{[round(z, 4) for z in zoom]} of a voxel of the context; make its shape or its scale larger"
            )
        # grid_sample expects positions from the centre, in units of half the edge of the context, and x first.
        positions = [
            (torch.arange(n, device=features.device, dtype=torch.float32) - (n - 1) / 2) * (2 * z / m)
            for n, z, m in zip(fine, zoom, coarse, strict=True)
        ]
        grid = torch.stack(torch.meshgrid(*positions, indexing="ij")[::-1], -1).to(features.dtype)
        return grid_sample(
            features, grid.expand(len(features), *grid.shape), padding_mode="border", align_corners=False
        )
