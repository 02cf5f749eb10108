"""Measurement of the halo of a network: the receptive field of its output voxels."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, avg_pool3d
from torch.nn.modules.batchnorm import _NormBase

from cellmap_lightning.training.deep_supervision import scales_of

#: Neighbouring output voxels that are measured: strided layers give them different receptive fields.
_PHASES = 8


def measure_halo(network: nn.Module, shape: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """Measure how far the input voxels lie that an output voxel depends on, by gradients.

    Gradients are computed in a copy of the network whose weights are all positive, so that none of them cancel, and
    whose maxima are means. Statistics of the whole patch, as in instance normalization, are left out: they depend on
    all voxels, but little on each. Araujo, Norris and Sim, "Computing receptive fields of convolutional neural
    networks" (Distill 2019), define the receptive field.

    Args:
        network: from ``[N, 1, z, y, x]`` (or ``[N, 1, y, x]``) to ``[N, C, ...]`` or several scales of it.
        shape: voxels of the input.

    Returns:
        Voxels on either side, per axis, the larger side of each; and False if the border of the input limits them, so
        that the receptive field is larger.

    Example:
        >>> measure_halo(nn.Conv3d(1, 1, 5, padding=2), (16, 16, 16))
        ((2, 2, 2), True)
    """
    copied = positive_copy(network)
    x = torch.ones(1, 1, *shape, dtype=torch.float64, device="cpu", requires_grad=True)
    with torch.enable_grad():
        output = scales_of(copied(x), x.ndim)[0].sum(1)[0]
        halo, clipped = reach_of(output, x)
    return halo, not any(clipped)


def reach_of(output: Tensor, x: Tensor) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Return the halo per axis, and per axis True if the border of the input limits it.

    Args:
        output: the sum over channels that a `positive_copy` gives for ``x``, ``[z, y, x]`` or ``[y, x]``.
        x: the input ``[1, 1, ...]``, which requires gradients.
    """
    reaches = [_reach(output, x, phase) for phase in range(min(_PHASES, *output.shape))]
    axes = range(output.ndim)
    halo = tuple(max(distances[axis] for distances, _ in reaches) for axis in axes)
    return halo, tuple(any(clipped[axis] for _, clipped in reaches) for axis in axes)


def _reach(output: Tensor, x: Tensor, phase: int) -> tuple[list[int], list[bool]]:
    """Return the distances of the furthest input voxels of one output voxel, and True where one is at the border."""
    shape = x.shape[2:]
    centre = [n // 2 - min(_PHASES, *output.shape) // 2 + phase for n in output.shape]
    (gradient,) = torch.autograd.grad(output[tuple(centre)], x, retain_graph=True)
    distances, clipped = [0] * len(shape), [False] * len(shape)
    for axis, (n, m, position) in enumerate(zip(shape, output.shape, centre, strict=True)):
        others = [a for a in range(len(shape)) if a != axis]
        used = gradient[0, 0].abs().amax(others).nonzero().flatten().tolist()
        if not used:
            continue
        # Both are centred; of a valid network the output is smaller, of another voxel size it is scaled.
        place = (position + 0.5) * (n / m) - 0.5 if n % m == 0 else position + (n - m) / 2
        distances[axis] = max(int(-(-(place - used[0]) // 1)), int(-(-(used[-1] - place) // 1)), 0)
        clipped[axis] = used[0] == 0 or used[-1] == n - 1
    return distances, clipped


def positive_copy(network: nn.Module) -> nn.Module:
    """Return a copy with positive weights, normalizations without effect, and means in place of maxima."""
    copied = copy.deepcopy(network).cpu().double().eval()
    with torch.no_grad():
        for parameter in copied.parameters():
            count = max(parameter[0].numel() if parameter.ndim > 1 else 1, 1)
            parameter.fill_(1 / count)  # the sums of layers stay near 1
    for module in copied.modules():
        if isinstance(module, _NormBase | nn.GroupNorm):
            module.register_forward_hook(lambda _module, inputs, _output: inputs[0])
        elif isinstance(module, nn.MaxPool2d | nn.MaxPool3d):
            module.register_forward_hook(_mean_pool)
    return copied


def _mean_pool(module: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
    pool = avg_pool2d if isinstance(module, nn.MaxPool2d) else avg_pool3d
    return pool(inputs[0], module.kernel_size, module.stride, module.padding, module.ceil_mode)
