"""Measurement of the reach of a network along each axis, and of the shifts of its input that shift its output."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.export.halo import positive_copy, reach_of
from cellmap_lightning.training.deep_supervision import scales_of

#: Longest input along the measured axis, and the granularity of the other lengths, voxels.
_LONGEST, _GRANULARITY = 512, 16
#: Largest product of strides that is looked for, and output voxels that are compared for it.
_LARGEST_STEP, _COMPARED = 64, 8


@dataclass(frozen=True)
class Reach:
    """Distance of the input voxels that an output voxel of a network depends on.

    Attributes:
        halo: voxels on either side, per axis.
        step: product of the strides per axis: a shift of the input by ``step`` voxels shifts the output likewise, so
            that patches whose starts differ by multiples of it give the same values.
        voxel_bytes: bytes of the outputs of all layers for one voxel of the input, float32. A network that predicts
            holds a part of them at a time. 0 where it is not known: then the patch of the training is used.
        statistics: kinds of layers that normalize by statistics of the whole patch, such as ``InstanceNorm3d``. With
            them each voxel of a patch changes all of its output a little, also beyond ``halo``.

    Example:
        >>> measure_reach(nn.Conv3d(1, 1, 5, padding=2), (32, 32, 32))
        Reach(halo=(2, 2, 2), step=(1, 1, 1), voxel_bytes=4.0, statistics=())
    """

    halo: tuple[int, ...]
    step: tuple[int, ...]
    voxel_bytes: float
    statistics: tuple[str, ...]


def measure_reach(network: nn.Module, shape: Sequence[int]) -> Reach:
    """Measure the reach of a network as `measure_halo` does, with inputs that are long along one axis only.

    Args:
        network: from ``[N, 1, z, y, x]`` (or ``[N, 1, y, x]``) to ``[N, C, ...]`` or several scales of it.
        shape: voxels of an input that the network accepts.

    Raises:
        CellMapValueError: the network accepts no other input, or its reach is larger than the longest of them.
    """
    copied = positive_copy(network)
    try:
        along = [_along(copied, shape, axis) for axis in range(len(shape))]
    except CellMapValueError:
        raise
    except Exception as e:  # the code of a network can raise anything
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise CellMapValueError(
            f"{type(network).__name__}: an input of another length is not accepted: {reason}"
        ) from e
    halo, step = (tuple(one) for one in zip(*along, strict=True))
    return Reach(halo, step, _voxel_bytes(copied, _slab(copied, shape, 0, shape[0])), patch_statistics(network))


def patch_statistics(network: nn.Module) -> tuple[str, ...]:
    """Return the kinds of layers that normalize by statistics of the whole patch in evaluation mode."""
    layers = [
        module
        for module in network.modules()
        if isinstance(module, nn.GroupNorm) or (isinstance(module, _InstanceNorm) and not module.track_running_stats)
    ]
    return tuple(dict.fromkeys(type(layer).__name__ for layer in layers))


def _along(network: nn.Module, shape: Sequence[int], axis: int) -> tuple[int, int]:
    """Return halo and step along an axis.

    Args:
        network: see `positive_copy`.
        shape: see `measure_reach`.
        axis: the axis.
    """
    length = shape[axis]
    while length <= _LONGEST:
        x = torch.ones(
            1, 1, *_slab(network, shape, axis, length), dtype=torch.float64, device="cpu", requires_grad=True
        )
        with torch.enable_grad():
            halo, clipped = reach_of(_output(network, x), x)
        if not clipped[axis]:
            return halo[axis], _step(network, x.shape[2:], axis)
        length *= 2
    raise CellMapValueError(
        f"{type(network).__name__}: an output voxel depends on all of {length // 2} input voxels along an axis"
    )


def _slab(network: nn.Module, shape: Sequence[int], axis: int, length: int) -> tuple[int, ...]:
    """Return the shape of an input that is short along the other axes, as far as the network accepts it.

    Raises:
        CellMapValueError: it accepts none.
    """
    # Lengths that differ from the given ones by multiples of 16 suit strides and layers without padding.
    choices = [[length] if a == axis else range((n - 1) % _GRANULARITY + 1, n + 1, _GRANULARITY)
               for a, n in enumerate(shape)]  # fmt: skip
    reason = ""
    for lengths in zip_longest(*choices):
        slab = tuple(options[-1] if n is None else n for n, options in zip(lengths, choices, strict=True))
        try:
            with torch.no_grad():
                _output(network, torch.zeros(1, 1, *slab, dtype=torch.float64, device="cpu"))
        except Exception as e:  # the code of a network can raise anything
            reason = next(iter(str(e).splitlines()), type(e).__name__)
        else:
            return slab
    raise CellMapValueError(
        f"{type(network).__name__}: an input of {length} voxels along an axis is not accepted: {reason}"
    )


def _step(network: nn.Module, slab: Sequence[int], axis: int) -> int:
    """Return the smallest power of two by which a shift of the input along an axis shifts the output.

    The input is twice as long as one whose centre sees no border, so that shifted positions see none either.

    Raises:
        CellMapValueError: there is none up to `_LARGEST_STEP`.
    """
    length = 2 * slab[axis] + 2 * _LARGEST_STEP
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = [length + _LARGEST_STEP if a == axis else n for a, n in enumerate(slab)]
    x = torch.rand(1, 1, *shape, dtype=torch.float64, device="cpu", generator=generator)
    with torch.no_grad():
        whole = _output(network, x.narrow(2 + axis, 0, length))
        first = (whole.shape[axis] - _COMPARED) // 2
        for step in (1, 2, 4, 8, 16, 32, _LARGEST_STEP):
            shifted = _output(network, x.narrow(2 + axis, step, length))
            same = shifted.narrow(axis, first - step, _COMPARED) - whole.narrow(axis, first, _COMPARED)
            if float(same.abs().max()) < 1e-12 * float(whole.abs().max()):
                return step
    raise CellMapValueError(
        f"{type(network).__name__}: no shift of the input by up to {_LARGEST_STEP} voxels shifts the output"
    )


def _voxel_bytes(network: nn.Module, slab: Sequence[int]) -> float:
    """Return the bytes of the outputs of all layers in float32, for one voxel of an input of this shape."""
    count = 0

    def add(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal count
        count += output.numel() if isinstance(output, Tensor) else 0

    leaves = [module for module in network.modules() if next(module.children(), None) is None]
    hooks = [leaf.register_forward_hook(add) for leaf in leaves]
    with torch.no_grad():
        _output(network, torch.zeros(1, 1, *slab, dtype=torch.float64, device="cpu"))
    for hook in hooks:
        hook.remove()
    return count * torch.float32.itemsize / math.prod(slab)


def _output(network: nn.Module, x: Tensor) -> Tensor:
    """Return the output of full resolution for ``[1, 1, ...]``, summed over the channels."""
    return scales_of(network(x), x.ndim)[0].sum(1)[0]
