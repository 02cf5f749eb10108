"""Losses of networks that return outputs at several scales."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d, interpolate

from cellmap_lightning.errors import CellMapTypeError


def scales_of(output: Any, ndim: int) -> list[Tensor]:
    """Return the outputs of a network, the one of full resolution first.

    Args:
        output: a tensor, a list or tuple of tensors, or MONAI's tensor of outputs stacked along axis 1.
        ndim: axes of one output: 5 for ``[N, C, z, y, x]``.

    Raises:
        CellMapTypeError: it is something else.
    """
    if isinstance(output, Tensor):
        return list(output.unbind(1)) if output.ndim == ndim + 1 else [output]
    if isinstance(output, list | tuple) and output and all(isinstance(scale, Tensor) for scale in output):
        return list(output)
    raise CellMapTypeError(
        f"the network must return a tensor [N, C, ...], or a list of tensors from full to low resolution, got "
        f"{type(output).__name__}"
    )


def pooled(target: Tensor, shape: torch.Size) -> Tensor:
    """Return a target at a lower resolution.

    Args:
        target: ``[N, C, ...]``, floats with NaN or whole numbers.
        shape: voxels of the result.

    Returns:
        Of floats the mean over the known voxels, NaN where none is known; of whole numbers the nearest voxel.
    """
    if target.shape[2:] == shape:
        return target
    if not target.is_floating_point():
        # Exact in double precision up to 2^53, in which interpolate works.
        return interpolate(target.double(), list(shape), mode="nearest-exact").to(target.dtype)
    pool: Callable[[Tensor, Any], Tensor] = adaptive_avg_pool2d if len(shape) == 2 else adaptive_avg_pool3d
    known = ~torch.isnan(target)
    part = pool(known.to(target.dtype), tuple(shape))
    return pool(torch.nan_to_num(target, nan=0.0), tuple(shape)) / part  # 0 / 0 is NaN


def describe_scales(outputs: Sequence[Tensor]) -> str:
    """Return a sentence on the weights that `over_scales` gives to several outputs.

    Args:
        outputs: two or more; see `scales_of`.
    """
    total = 2 ** len(outputs) - 1
    weights = [f"{2 ** (len(outputs) - level)}/{total}" for level in range(1, len(outputs) + 1)]
    sizes = [f"{list(output.shape[2:])}" for output in outputs]
    return (
        f"{len(outputs)} outputs, deep supervision: weights {', '.join(weights[:-1])} and {weights[-1]} of the losses "
        f"at {', '.join(sizes[:-1])} and {sizes[-1]} voxels"
    )


def over_scales(loss: Callable[[Tensor, Tensor], Tensor], outputs: list[Tensor], target: Tensor) -> Tensor:
    """Return the mean of a loss over scales, with the weights 1, 1/2, 1/4 and so on.

    Args:
        loss: of one output and a target of its shape.
        outputs: see `scales_of`.
        target: at full resolution.
    """
    weights = [0.5**level for level in range(len(outputs))]
    losses = [
        weight * loss(output, pooled(target, output.shape[2:])) for weight, output in zip(weights, outputs, strict=True)
    ]
    return torch.stack(losses).sum() / sum(weights)
