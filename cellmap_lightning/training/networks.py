"""Networks that MONAI does not have."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from cellmap_lightning.errors import CellMapValueError


class ContextNet(nn.Module):
    """A network that sees, beside the patch, a wider and coarser patch about the same centre.

    The second network looks at the wide patch. Its channels are evaluated at the voxel centres of the patch, by linear
    interpolation in nm, and go into the first network together with the patch.

    Args:
        network: from ``[N, 1 + K, z, y, x]`` to logits.
        context: from the wide patch ``[N, 1, z, y, x]`` to ``[N, K, z, y, x]``.
        scale: voxel size of the patch, nm, one number per axis.
        context_scale: that of the wide patch.

    Raises:
        CellMapValueError: voxel sizes that cannot be ones.
    """

    def __init__(
        self, network: nn.Module, context: nn.Module, scale: Sequence[float], context_scale: Sequence[float]
    ) -> None:
        super().__init__()
        if len(scale) != len(context_scale) or not all(s > 0 for s in [*scale, *context_scale]):
            raise CellMapValueError(
                f"scale and context_scale are voxel sizes in nm, one per axis; got {list(scale)} and "
                f"{list(context_scale)}"
            )
        self.network = network
        self.context = context
        self.zoom = [fine / coarse for fine, coarse in zip(scale, context_scale, strict=True)]

    def forward(self, patch: Tensor, context: Tensor) -> Tensor:
        """Logits of a patch ``[N, 1, z, y, x]`` in its surroundings.

        Raises:
            CellMapValueError: the surroundings do not hold the patch.
        """
        features = self.context(context)
        return self.network(torch.cat([patch, self._at(patch, features)], 1))  # type: ignore[no-any-return]

    def _at(self, patch: Tensor, features: Tensor) -> Tensor:
        """The features at the voxel centres of the patch."""
        fine, coarse = patch.shape[2:], features.shape[2:]
        zoom = self.zoom[-len(fine) :]  # of a slice, its axis of length 1 is dropped
        if any(n * z > m * (1 + 1e-6) for n, z, m in zip(fine, zoom, coarse, strict=True)):
            raise CellMapValueError(
                f"a context of {list(coarse)} voxels does not hold the patch of {list(fine)} voxels, each "
                f"{[round(z, 4) for z in zoom]} of one of its own; make its shape or its scale larger"
            )
        # In units of half the context's edge, from its centre: what grid_sample takes.
        places = [
            (torch.arange(n, device=features.device, dtype=torch.float32) - (n - 1) / 2) * (2 * z / m)
            for n, z, m in zip(fine, zoom, coarse, strict=True)
        ]
        grid = torch.stack(torch.meshgrid(*places, indexing="ij")[::-1], -1).to(features.dtype)
        return grid_sample(
            features, grid.expand(len(features), *grid.shape), padding_mode="border", align_corners=False
        )
