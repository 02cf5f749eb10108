"""Losses and scores over annotated voxels.

Targets are 1, 0 or NaN, and NaN (unannotated) is ignored. Every term is averaged per class over the annotated voxels,
then over the classes that occur in the batch, so that a class that is annotated in three crops has the same weight as
one that is annotated everywhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torchmetrics import Metric

from cellmap_lightning.errors import CellMapValueError

#: Loss of each channel, and a mask of the channels that count.
Channels = tuple[Tensor, Tensor]


def per_channel(value: Tensor) -> Tensor:
    """Return the sum over all but the channel axis, ``[N, C, ...] -> [C]``."""
    return value.sum(dim=[0, *range(2, value.ndim)])


def known_and_target(target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask of the annotated voxels, and the target with 0 where it is unannotated."""
    known = ~torch.isnan(target)
    return known, torch.nan_to_num(target, nan=0.0)


def mean_over_present(value: Tensor, present: Tensor) -> Tensor:
    """Return the mean of per-class values over the classes that are present; 0 with a gradient where none is."""
    return (value * present).sum() / present.sum().clamp(min=1)


def channel_mean(loss: Tensor, known: Tensor, weight: Tensor | None = None) -> Channels:
    """Return the mean of each channel over the known voxels, by default of the same weight."""
    counts = per_channel(known.to(loss.dtype) if weight is None else weight)
    value = per_channel(loss * known) / torch.where(counts > 0, counts, 1)
    return value, counts > 0


def bce(logits: Tensor, target: Tensor, pos_weight: Tensor | None = None) -> Channels:
    """Return the binary cross entropy of logits; ``pos_weight`` ``[C]`` is the weight of a positive voxel."""
    known, wanted = known_and_target(target)
    weight = pos_weight.reshape(-1, *[1] * (logits.ndim - 2)) if pos_weight is not None else None
    loss = binary_cross_entropy_with_logits(logits, wanted, reduction="none", pos_weight=weight)
    return channel_mean(loss, known)


def dice(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Channels:
    """Return the soft Dice loss, pooled over the batch; channels without positive voxels do not count.

    ``1 - (2 |pt| + smooth) / (|p| + |t| + smooth)``.
    """
    known, wanted = known_and_target(target)
    probability = torch.sigmoid(logits) * known
    both, sums = per_channel(probability * wanted), per_channel(probability) + per_channel(wanted)
    return 1 - (2 * both + smooth) / (sums + smooth), per_channel(wanted) > 0


def masked_bce(logits: Tensor, target: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """Return the binary cross entropy of ``[N, C, ...]`` logits against 1, 0 and NaN.

    Args:
        logits: scores before the sigmoid.
        target: 1, 0 or NaN.
        pos_weight: weight of a positive voxel, ``[C]``.

    Returns:
        Mean over the annotated voxels of each class, then over the classes that have any.
    """
    return mean_over_present(*bce(logits.float(), target.float(), pos_weight))  # sums overflow half precision


def masked_dice(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """Return the soft Dice loss of ``[N, C, ...]`` logits against 1, 0 and NaN, pooled over the batch.

    Args:
        logits: scores before the sigmoid.
        target: 1, 0 or NaN.
        smooth: added to numerator and denominator, voxels.

    Returns:
        Mean of ``1 - (2 |pt| + smooth) / (|p| + |t| + smooth)`` over the classes that have positive voxels in the
        batch.
    """
    return mean_over_present(*dice(logits.float(), target.float(), smooth))


def masked_cross_entropy(logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Return the cross entropy of ``[N, 1 + C, ...]`` logits against class numbers, over the annotated voxels.

    Args:
        logits: scores before the softmax, background first.
        target: ``[N, 1, ...]`` class numbers, 0 for background.
        known: mask of the annotated voxels.
    """
    wanted = torch.where(known, target, -100)[:, 0]
    return cross_entropy(logits.float(), wanted, ignore_index=-100, reduction="sum") / known.sum().clamp(min=1)


def one_against_all(logits: Tensor, target: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Convert multi-class logits and class numbers to one binary problem per class.

    The logit of class i is its score minus the logarithm of the summed exponentials of the others: its sigmoid is the
    softmax.

    Args:
        logits: ``[N, 1 + C, ...]``, background first.
        target: ``[N, 1, ...]`` class numbers.
        known: mask of the annotated voxels.

    Returns:
        Logits and targets of 1, 0 and NaN, ``[N, C, ...]``.
    """
    log_p = torch.log_softmax(logits.float(), 1)[:, 1:]
    against = log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))  # log p - log (1 - p)
    number = torch.arange(1, logits.shape[1], dtype=torch.int64, device=target.device)
    number = number.reshape(-1, *[1] * (target.ndim - 2))
    wanted = (target == number).to(log_p.dtype)
    return against, wanted.masked_fill(~known, float("nan"))


def probabilities(logits: Tensor, classes: int) -> Tensor:
    """Return the probability of each class: softmax where the logits have a background channel, else sigmoid.

    Args:
        logits: ``[N, C, ...]``, or ``[N, 1 + C, ...]`` with the background first.
        classes: number of classes.

    Returns:
        ``[N, C, ...]``.
    """
    if logits.shape[1] == classes + 1:
        return torch.softmax(logits, 1)[:, 1:]
    return torch.sigmoid(logits)


class DiceScore(Metric):
    """Dice per class, pooled over all batches: true and false positives are summed, then divided once.

    Args:
        classes: names of the classes.
        threshold: logit from which a voxel is positive.

    Example:
        >>> dice = DiceScore(["mito"])
        >>> dice.update(logits, target)  # [N, 1, z, y, x]
        >>> dice.compute()["dice"]
    """

    full_state_update = False
    tp: Tensor
    predicted: Tensor
    positive: Tensor
    known: Tensor

    def __init__(self, classes: Sequence[str], threshold: float = 0.0) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.threshold = threshold
        for name in ("tp", "predicted", "positive", "known"):
            # Integers stay exact, also when a Trainer converts the model to half precision.
            self.add_state(name, torch.zeros(len(self.classes), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add the counts of a batch: ``[N, C, ...]`` logits and targets (1, 0, NaN)."""
        if logits.shape[1] != len(self.classes) or logits.shape != target.shape:
            raise CellMapValueError(
                f"{list(logits.shape)} logits and {list(target.shape)} targets do not fit {len(self.classes)} classes"
            )
        known, wanted = known_and_target(target)
        predicted, positive = (logits > self.threshold) & known, wanted > 0.5
        self.tp = self.tp + per_channel(predicted & positive)
        self.predicted = self.predicted + per_channel(predicted)
        self.positive = self.positive + per_channel(positive)
        self.known = self.known + per_channel(known)

    def compute(self) -> dict[str, Tensor]:
        """Compute the scores of each class, ``[C]``.

        Returns:
            ``dice``, NaN where the class neither occurs nor is predicted; ``constant``, that of the best constant
            predictor (1 everywhere), NaN where the class does not occur; ``occurs``, whether it
            does.
        """
        occurs = self.positive > 0
        twice_tp, twice_positive = (2.0 * value.to(torch.float32) for value in (self.tp, self.positive))
        constant = torch.where(occurs, twice_positive / (self.known + self.positive), torch.nan)
        return {"dice": twice_tp / (self.predicted + self.positive), "constant": constant, "occurs": occurs}


class MeanOverSamples(Metric):
    """Mean of a value per batch, weighted by samples, over all batches of all ranks.

    Lightning's mean over ranks (``self.log(..., sync_dist=True)`` in a step) divides the number of samples by that
    of the ranks as an integer, and is wrong where ranks have different numbers of samples.

    Example:
        >>> loss = MeanOverSamples()
        >>> loss.update(torch.tensor(0.5), samples=2)
        >>> loss.compute()
    """

    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, value: Tensor, samples: int) -> None:
        """Add the value of a batch and its number of samples."""
        # Not in place: a state that was created in inference mode cannot be changed outside of it.
        self.total = self.total + value.detach().to(self.total.dtype) * samples
        self.samples = self.samples + samples

    def compute(self) -> Tensor:
        """Compute the mean; NaN where there was no batch."""
        return self.total / self.samples
