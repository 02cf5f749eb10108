"""MONAI's residual U-Net, with upsampling that treats both ends of a patch alike."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from cellmap_lightning.errors import missing_extra

try:
    from monai.networks.nets.unet import UNet as MonaiUNet
except ModuleNotFoundError as error:
    raise missing_extra("train", "this network needs monai") from error


class UNet(MonaiUNet):
    """MONAI's residual U-Net, in which no plane of a patch is worse than the others.

    ``monai.networks.nets.UNet`` upsamples by transposed convolutions of 3 voxels with a stride of 2. The last voxel of
    each axis then gets half of the terms that the others get, at every level, so that the last plane of a patch, and
    with it the last plane of a predicted volume, stays poor for a long time. Here the kernel is as long as the stride:
    each voxel gets exactly one term, as in nnU-Net (Isensee et al. 2021).

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the patch.
        out_channels: channels of the output.
        channels: channels of each level, the finest first.
        strides: by what each level but the last shrinks a patch, a number or one per axis.
        kernel_size: voxels of the other convolutions, odd.
        num_res_units: convolutions in a residual unit; 0 for single convolutions.
        act: activation, a name of MONAI's or ``(name, arguments)``.
        norm: normalization, likewise.
        dropout: probability.
        bias: whether convolutions add a constant.
        adn_ordering: order of activation (A), dropout (D) and normalization (N).

    Raises:
        MissingExtraError: MONAI is not installed.
        ValueError: MONAI's errors about channels, strides and kernels.

    Example:
        >>> import torch
        >>> network = UNet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)
        >>> network(torch.zeros(1, 1, 16, 32, 32)).shape
        torch.Size([1, 2, 16, 32, 32])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        strides: Sequence[int | Sequence[int]],
        kernel_size: int | Sequence[int] = 3,
        num_res_units: int = 0,
        act: Any = "PRELU",
        norm: Any = "INSTANCE",
        dropout: float = 0.0,
        bias: bool = True,
        adn_ordering: str = "NDA",
    ) -> None:
        super().__init__(
            spatial_dims, in_channels, out_channels, channels, strides,  # type: ignore[arg-type]
            kernel_size=kernel_size, num_res_units=num_res_units, act=act, norm=norm, dropout=dropout, bias=bias,
            adn_ordering=adn_ordering,
        )  # fmt: skip

    def _get_up_layer(self, in_channels: int, out_channels: int, strides: Any, is_top: bool) -> nn.Module:
        """Return MONAI's layer, whose transposed convolution has a kernel as long as the stride."""
        layer = super()._get_up_layer(in_channels, out_channels, strides, is_top)
        convolution: Any = layer.get_submodule("0") if self.num_res_units > 0 else layer
        kind: Any = type(convolution.conv)
        convolution.conv = kind(in_channels, out_channels, kernel_size=strides, stride=strides, bias=self.bias)
        return layer
