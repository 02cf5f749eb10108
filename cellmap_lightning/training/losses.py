"""Losses by name and weight over annotated voxels.

Every loss compares ``[N, C, ...]`` with a target of the same shape, ignores NaN, and is averaged per channel over the
annotated voxels of the batch, then over the channels that have any: a class that is annotated in three crops has the
same weight as one that is annotated everywhere.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    l1_loss,
    logsigmoid,
    max_pool2d,
    max_pool3d,
    mse_loss,
    smooth_l1_loss,
)

from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.training.masked import (
    Channels,
    bce,
    channel_mean,
    dice,
    known_and_target,
    masked_cross_entropy,
    one_against_all,
    per_channel,
)
from cellmap_lightning.transforms.kinds.kind import Activation
from cellmap_lightning.transforms.kinds.objects import ndimage
from cellmap_lightning.validation import did_you_mean, one_of


def activate(output: Tensor, activation: Activation) -> Tensor:
    """Convert the output of a network to values: probabilities of classes without the background, or numbers.

    Args:
        output: ``[N, C, ...]``; with ``softmax`` ``[N, 1 + C, ...]``, the background first.
        activation: ``sigmoid``, ``softmax`` or ``tanh``.

    Returns:
        ``[N, C, ...]``.
    """
    if activation == "softmax":
        return torch.softmax(output, 1)[:, 1:]
    return torch.sigmoid(output) if activation == "sigmoid" else torch.tanh(output)


def balanced_bce(logits: Tensor, target: Tensor) -> Channels:
    """Return the mean of the binary cross entropies of positive and of negative voxels, half of the weight each."""
    known, wanted = known_and_target(target)
    loss = binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    parts = [channel_mean(loss * share, known & (share > 0), share * known) for share in (wanted, 1 - wanted)]
    counts = torch.stack([counted for _, counted in parts]).sum(0)
    return sum(value * counted for value, counted in parts) / counts.clamp(min=1), counts > 0


def focal(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Channels:
    """Return the focal loss (Lin et al. 2017): cross entropy times ``(1 - p)^gamma`` of the right answer's ``p``."""
    known, wanted = known_and_target(target)
    loss = binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    # log (1 - p) of the right answer, without cancellation.
    wrong = logsigmoid(-logits * (2 * wanted - 1))
    return channel_mean((gamma * wrong).exp() * loss, known)


def tversky(logits: Tensor, target: Tensor, alpha: float = 0.3, beta: float = 0.7, smooth: float = 1.0) -> Channels:
    """Return the Tversky loss (Salehi et al. 2017), pooled over the batch as `dice`.

    ``1 - (tp + smooth) / (tp + alpha fp + beta fn + smooth)``.
    """
    known, wanted = known_and_target(target)
    probability = torch.sigmoid(logits) * known
    tp = per_channel(probability * wanted)
    fp, fn = per_channel(probability) - tp, per_channel(wanted) - tp
    return 1 - (tp + smooth) / (tp + alpha * fp + beta * fn + smooth), per_channel(wanted) > 0


def cldice(logits: Tensor, target: Tensor, iterations: int = 3, smooth: float = 1.0) -> Channels:
    """Return the soft clDice loss (Shit et al. 2021), which preserves the connectivity of thin structures.

    Args:
        logits: scores before the sigmoid.
        target: 1, 0 or NaN.
        iterations: erosions of the soft skeleton; at least the half thickness of the structures, voxels.
        smooth: added to numerators and denominators, voxels.
    """
    known, wanted = known_and_target(target)
    probability = torch.sigmoid(logits) * known
    skeleton, wanted_skeleton = (soft_skeleton(x, known, iterations) * known for x in (probability, wanted))
    precision = (per_channel(skeleton * wanted) + smooth) / (per_channel(skeleton) + smooth)
    sensitivity = (per_channel(wanted_skeleton * probability) + smooth) / (per_channel(wanted_skeleton) + smooth)
    return 1 - 2 * precision * sensitivity / (precision + sensitivity), per_channel(wanted) > 0


def boundary(logits: Tensor, target: Tensor) -> Channels:
    """Return the boundary loss (Kervadec et al. 2019): the mean of probability times signed distance, voxels.

    The distance to the boundary of the target is negative inside. It is computed on the host. Samples without any
    positive voxel add nothing.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    known, wanted = known_and_target(target)
    edt = ndimage().distance_transform_edt
    distances = torch.zeros(target.shape, dtype=torch.float32, device="cpu")
    host_known, host_wanted = known.cpu(), wanted.cpu() > 0.5
    for index in [(n, c) for n in range(target.shape[0]) for c in range(target.shape[1])]:
        inside, outside = host_wanted[index], host_known[index] & ~host_wanted[index]
        if inside.any() and outside.any():
            to_inside, to_outside = (torch.from_numpy(edt(~mask.numpy())) for mask in (inside, outside))
            distances[index] = torch.where(inside, 1 - to_outside, to_inside).float()
    return channel_mean(torch.sigmoid(logits) * distances.to(logits.device), known)


def _regression(function: Callable[..., Tensor], values: Tensor, target: Tensor, **options: Any) -> Channels:
    """Return an element-wise loss between values and target."""
    known, wanted = known_and_target(target)
    return channel_mean(function(values, wanted, reduction="none", **options), known)


def soft_skeleton(x: Tensor, known: Tensor, iterations: int) -> Tensor:
    """Return the soft skeleton of ``[N, C, ...]`` in [0, 1] by iterated minima and maxima; unknown voxels are ignored.

    Shit et al. 2021, algorithm 1.
    """
    opened = _dilate(_erode(x, known), known)
    skeleton = torch.relu(x - opened)
    for _ in range(iterations):
        x = _erode(x, known)
        rest = torch.relu(x - _dilate(_erode(x, known), known))
        skeleton = skeleton + torch.relu(rest - skeleton * rest)
    return skeleton


def _erode(x: Tensor, known: Tensor) -> Tensor:
    """Return the minimum over the face neighbours; unknown voxels are 1, which no minimum takes."""
    x = -torch.where(known, x, 1.0)
    if x.ndim == 4:
        return -torch.maximum(max_pool2d(x, (3, 1), 1, (1, 0)), max_pool2d(x, (1, 3), 1, (0, 1)))
    lines = [max_pool3d(x, [3 if a == axis else 1 for a in range(3)], 1, [int(a == axis) for a in range(3)])
             for axis in range(3)]  # fmt: skip
    return -torch.maximum(torch.maximum(lines[0], lines[1]), lines[2])


def _dilate(x: Tensor, known: Tensor) -> Tensor:
    """Return the maximum over the box of 3 voxels; unknown voxels are 0, which no maximum takes."""
    x = torch.where(known, x, 0.0)
    return max_pool2d(x, 3, 1, 1) if x.ndim == 4 else max_pool3d(x, 3, 1, 1)


#: Losses of logits and of a target from 0 to 1.
CLASSIFICATION: Mapping[str, Callable[..., Channels]] = {
    "bce": bce, "balanced_bce": balanced_bce, "focal": focal, "dice": dice, "tversky": tversky, "cldice": cldice,
    "boundary": boundary,
}  # fmt: skip
#: Losses of values after the activation.
REGRESSION: Mapping[str, Callable[..., Channels]] = {
    "mse": partial(_regression, mse_loss),
    "l1": partial(_regression, l1_loss),
    "smooth_l1": partial(_regression, smooth_l1_loss),
}
_OPTIONS = {
    "focal": ("gamma",), "dice": ("smooth",), "tversky": ("alpha", "beta", "smooth"),
    "cldice": ("iterations", "smooth"), "smooth_l1": ("beta",),
}  # fmt: skip


@dataclass(frozen=True)
class LossTerm:
    """One loss of a sum.

    Attributes:
        name: its name, see `parse_loss`.
        weight: its weight.
        options: further arguments, such as ``gamma``.
    """

    name: str
    weight: float
    options: Mapping[str, float] = field(default_factory=dict)


def available(activation: Activation) -> tuple[str, ...]:
    """Return the names of the losses for outputs of an activation."""
    if activation == "softmax":
        return ("ce", *CLASSIFICATION)
    return (*CLASSIFICATION, *REGRESSION) if activation == "sigmoid" else tuple(REGRESSION)


def parse_loss(where: str, spec: Any, activation: Activation) -> tuple[LossTerm, ...]:
    """Return the terms of a specification: ``{name: weight}``, or ``{name: {weight: .., option: ..}}``.

    Args:
        where: the setting, for messages.
        spec: the specification.
        activation: activation of the outputs, from which it follows which losses are possible.

    Raises:
        CellMapTypeError: it is no mapping, or empty.
        CellMapKeyError: an unknown loss, or an option that it does not have.
        CellMapValueError: a number is invalid, or no weight is above 0.
    """
    if not isinstance(spec, Mapping) or not spec:
        raise CellMapTypeError(f"{where} must be {{loss: weight}}, such as {{bce: 1, dice: 1}}, got {spec!r}")
    names = available(activation)
    terms = []
    for name, value in spec.items():
        one_of(f"{where}: a loss for outputs with {activation}", name, names, CellMapKeyError)
        options = dict(value) if isinstance(value, Mapping) else {"weight": value}
        weight = options.pop("weight", 1)
        for key, number in {"weight": weight, **options}.items():
            if key != "weight" and key not in _OPTIONS.get(name, ()):
                listed = ", ".join(("weight", *_OPTIONS.get(name, ())))
                hint = did_you_mean(key, _OPTIONS.get(name, ()), f"; it has {listed}")
                raise CellMapKeyError(f"{where}.{name} has no {key!r}{hint}")
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
                raise CellMapValueError(f"{where}.{name}: {key} must be a number from 0, got {number!r}")
        if not isinstance(options.get("iterations", 1), int):
            raise CellMapValueError(f"{where}.{name}: iterations must be a whole number, got {options['iterations']!r}")
        terms.append(LossTerm(name, float(weight), options))
    if not any(term.weight for term in terms):
        raise CellMapValueError(f"{where}: at least one weight must be above 0, got {dict(spec)}")
    return tuple(term for term in terms if term.weight)


class MaskedLoss:
    """A weighted sum of losses of the outputs of one target; NaN and ignored class numbers do not count.

    Args:
        terms: the losses, see `parse_loss`.
        activation: activation of the outputs.
        channel_weights: weight of each channel; by default all are equal.

    Example:
        >>> loss = MaskedLoss(parse_loss("loss", {"bce": 1, "dice": 1}, "sigmoid"), "sigmoid")
        >>> loss(logits, target)  # both [N, C, z, y, x]
    """

    def __init__(
        self, terms: tuple[LossTerm, ...], activation: Activation, channel_weights: tuple[float, ...] | None = None
    ) -> None:
        self.terms, self.activation, self.channel_weights = terms, activation, channel_weights

    def __call__(self, output: Tensor, target: Tensor, pos_weight: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            output: of the network, ``[N, C, ...]``, or with softmax ``[N, 1 + C, ...]``.
            target: of the same shape, or with softmax class numbers ``[N, 1, ...]``.
            pos_weight: weight of a positive voxel in ``bce``, ``[C]``.
        """
        output = output.float()  # sums over a patch overflow half precision
        logits, wanted = output, target
        total = output.new_zeros(())
        if self.activation == "softmax":
            known = (target >= 0) & (target < output.shape[1])
            logits, wanted = one_against_all(output, target, known)
        values = activate(output, self.activation) if any(t.name in REGRESSION for t in self.terms) else None
        for term in self.terms:
            if term.name == "ce":
                total = total + term.weight * masked_cross_entropy(output, target, known)
                continue
            if values is not None and term.name in REGRESSION:
                channels = REGRESSION[term.name](values, wanted.float(), **term.options)
            else:
                options = {**term.options, **({"pos_weight": pos_weight} if term.name == "bce" else {})}
                channels = CLASSIFICATION[term.name](logits, wanted.float(), **options)
            total = total + term.weight * self._over_channels(*channels)
        return total

    def _over_channels(self, value: Tensor, counted: Tensor) -> Tensor:
        """Return the weighted mean over the channels that count; 0 with a gradient where none does."""
        weights = counted.to(value.dtype)
        if self.channel_weights is not None:
            weights = weights * torch.tensor(self.channel_weights, dtype=value.dtype, device=value.device)
        total = weights.sum()
        return (value * weights).sum() / torch.where(total > 0, total, 1)
