"""Value transforms as modules, without torchvision.

Those that draw use torch's global generator, which a dataset seeds by the number of the sample while they run.
`intensity_transforms` do the same on whole batches, where they are finished.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cellmap_lightning.compat.utils.misc import torch_max_value
from cellmap_lightning.errors import CellMapValueError

__all__ = [
    "Binarize",
    "GaussianBlur",
    "GaussianNoise",
    "NaNtoNum",
    "Normalize",
    "RandomContrast",
    "RandomGamma",
]


class KernelError(CellMapValueError, AssertionError):
    """Arguments of a blur that cannot be; also the `AssertionError` that cellmap-data raises."""


class _Transform(nn.Module):
    """A module that is also called by the name of torchvision's transforms."""

    def transform(self, x: torch.Tensor, params: Mapping[str, Any] | None = None) -> torch.Tensor:
        """The same as a call."""
        found: torch.Tensor = self(x)
        return found


class Binarize(_Transform):
    """1 above a threshold, 0 at it and below; NaN stays NaN; see docs/migration.md.

    Args:
        threshold: the threshold.
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of any shape; the type stays."""
        found = (x > self.threshold).to(x.dtype)
        return torch.where(x.isnan(), x, found) if x.is_floating_point() else found

    def extra_repr(self) -> str:
        """Its arguments."""
        return f"threshold={self.threshold}"


class NaNtoNum(_Transform):
    """`torch.nan_to_num`; see docs/migration.md.

    Args:
        params: its arguments: ``nan``, ``posinf``, ``neginf``.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        super().__init__()
        self.params = dict(params)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of any shape."""
        return x.nan_to_num(**self.params)

    def transform(self, inpt: torch.Tensor, params: Mapping[str, Any] | None = None) -> torch.Tensor:
        """Return the same as a call."""
        return self.forward(inpt)

    def extra_repr(self) -> str:
        """Its arguments."""
        return f"params={self.params}"


class Normalize(_Transform):
    """``(x + shift) * scale`` as float32; see docs/migration.md.

    Args:
        shift: added first.
        scale: factor.
    """

    def __init__(self, shift: float = 0, scale: float = 1 / 255) -> None:
        super().__init__()
        self.shift, self.scale = shift, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of any shape."""
        return (x.to(torch.float32) + self.shift) * self.scale

    def extra_repr(self) -> str:
        """Its arguments."""
        return f"shift={self.shift}, scale={self.scale}"


class GaussianNoise(_Transform):
    """Add noise to each voxel by itself; see docs/migration.md.

    Args:
        mean: mean of the noise.
        std: its standard deviation.
    """

    def __init__(self, mean: float = 0.0, std: float = 0.1) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of any shape."""
        return x + torch.normal(self.mean, self.std, size=x.shape, dtype=torch.float32, device="cpu").to(x.device)


class RandomContrast(_Transform):
    """Multiply the distance of every voxel from the mean of all by one random factor; see docs/migration.md.

    Args:
        contrast_range: lowest and highest factor.
    """

    def __init__(self, contrast_range: Sequence[float] = (0.5, 1.5)) -> None:
        super().__init__()
        self.contrast_range = contrast_range

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of any shape; the result lies between 0 and 1, for integers the largest that their type holds."""
        factor = _between(self.contrast_range)
        mean = x.to(torch.float32).nanmean()
        found = mean + factor * (x - mean)
        return found.clamp(0, torch_max_value(x.dtype)).nan_to_num(0.0).to(x.dtype)


class RandomGamma(_Transform):
    """Raise values in [0, 1] to one random power; see docs/migration.md.

    Args:
        gamma_range: lowest and highest exponent.
    """

    def __init__(self, gamma_range: Sequence[float] = (0.5, 1.5)) -> None:
        super().__init__()
        self.gamma_range = gamma_range

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of any shape; integers are divided by the largest that their type holds first."""
        if not x.is_floating_point():
            x = x.to(torch.float32) / torch_max_value(x.dtype)
        return (x ** _between(self.gamma_range)).clamp(0, 1).nan_to_num(0.0)


class GaussianBlur(_Transform):
    """A Gaussian, cut off at a number of voxels; the outermost voxels are repeated beyond the edge.

    See docs/migration.md.

    Args:
        kernel_size: voxels of the kernel along each axis, an odd number.
        sigma: standard deviation, voxels.
        dim: 2 or 3.
        channels: channels of what is blurred, each by itself.

    Raises:
        KernelError: an even kernel, or another number of axes.
    """

    def __init__(self, kernel_size: int = 3, sigma: float = 0.1, dim: int = 2, channels: int = 1) -> None:
        super().__init__()
        if kernel_size % 2 == 0 or dim not in (2, 3):
            raise KernelError(f"GaussianBlur: kernel_size must be odd and dim 2 or 3, got {kernel_size} and {dim}")
        self.kernel_shape = (kernel_size,) * dim
        self.kernel_size, self.sigma, self.dim, self.channels = kernel_size, sigma, dim, channels
        x = torch.arange(kernel_size, dtype=torch.float32, device="cpu") - kernel_size // 2
        along = torch.exp(-(x**2) / (2 * sigma**2))
        self.register_buffer("along", along / along.sum())

    @property
    def kernel(self) -> torch.Tensor:
        """Weights of the kernel, ``[kernel_size] * dim``."""
        along = self.get_buffer("along")
        found = along
        for _ in range(self.dim - 1):
            found = found[..., None] * along
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., channels, *space]``, or ``space`` alone; float32."""
        found = x.to(torch.float32).reshape(-1, self.channels, *x.shape[-self.dim :])
        convolve = nn.functional.conv2d if self.dim == 2 else nn.functional.conv3d
        reach = self.kernel_size // 2
        found = nn.functional.pad(found, [reach] * (2 * self.dim), mode="replicate")
        for axis in range(self.dim):  # a Gaussian is the product of those along the axes
            shape = [-1 if n == axis else 1 for n in range(self.dim)]
            kernel = self.get_buffer("along").to(x.device).reshape(1, 1, *shape)
            found = convolve(found, kernel.expand(self.channels, 1, *kernel.shape[2:]), groups=self.channels)
        return found.reshape(x.shape)


def _between(ends: Sequence[float]) -> float:
    lowest, highest = ends
    return lowest + float(torch.rand(1, dtype=torch.float32, device="cpu")) * (highest - lowest)
