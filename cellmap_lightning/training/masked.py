"""Losses and scores over the voxels that somebody annotated.

Targets are 1, 0 or NaN; NaN takes no part. Every term is averaged per class over the voxels that count, then over the
classes that occur in the batch, so that a class that is annotated in three crops is not drowned by one that is
everywhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torchmetrics import Metric

from cellmap_lightning.errors import CellMapValueError


def _per_class(value: Tensor) -> Tensor:
    """Sum over everything but the class axis, ``[N, C, ...] -> [C]``."""
    return value.sum(dim=[0, *range(2, value.ndim)])


def known_and_target(target: Tensor) -> tuple[Tensor, Tensor]:
    """Mask of the annotated voxels, and the target with 0 where there is none."""
    known = ~torch.isnan(target)
    return known, torch.nan_to_num(target, nan=0.0)


def mean_over_present(value: Tensor, present: Tensor) -> Tensor:
    """Mean of per-class values over the classes that are present; 0 with a gradient where none is."""
    return (value * present).sum() / present.sum().clamp(min=1)


def masked_bce(logits: Tensor, target: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """Binary cross entropy of ``[N, C, ...]`` logits against 1, 0 and NaN.

    Args:
        logits: scores before the sigmoid.
        target: 1, 0 or NaN.
        pos_weight: ``[C]``, how much a positive voxel counts.

    Returns:
        Mean over the annotated voxels of each class, then over the classes that have any.
    """
    logits = logits.float()  # sums over a patch leave the range of half precision
    known, wanted = known_and_target(target.float())
    weight = pos_weight.reshape(-1, *[1] * (logits.ndim - 2)) if pos_weight is not None else None
    loss = binary_cross_entropy_with_logits(logits, wanted, reduction="none", pos_weight=weight)
    counts = _per_class(known.to(loss.dtype))
    return mean_over_present(_per_class(loss * known) / counts.clamp(min=1), counts > 0)


def masked_dice(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """Soft Dice loss of ``[N, C, ...]`` logits against 1, 0 and NaN, pooled over the batch.

    Args:
        logits: scores before the sigmoid.
        target: 1, 0 or NaN.
        smooth: added to both sides of the ratio, voxels.

    Returns:
        Mean of ``1 - (2 |pt| + smooth) / (|p| + |t| + smooth)`` over the classes that have positive voxels in the
        batch.
    """
    logits = logits.float()
    known, wanted = known_and_target(target.float())
    chance = torch.sigmoid(logits) * known
    both, sums = _per_class(chance * wanted), _per_class(chance) + _per_class(wanted)
    return mean_over_present(1 - (2 * both + smooth) / (sums + smooth), _per_class(wanted) > 0)


def masked_cross_entropy(logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """Cross entropy of ``[N, 1 + C, ...]`` logits against numbers of classes, over the annotated voxels.

    Args:
        logits: scores before the softmax, background first.
        target: ``[N, 1, ...]`` whole numbers, 0 for background.
        known: which of them count.
    """
    wanted = torch.where(known, target, -100)[:, 0]
    return cross_entropy(logits.float(), wanted, ignore_index=-100, reduction="sum") / known.sum().clamp(min=1)


def one_against_all(logits: Tensor, target: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of classes as a target of 1, 0 and NaN per class, and logits of each class against all others.

    The logit of class i is its score minus the logarithm of the summed exponentials of the others: its sigmoid is the
    softmax.

    Args:
        logits: ``[N, 1 + C, ...]``, background first.
        target: ``[N, 1, ...]`` whole numbers.
        known: which of them count.

    Returns:
        ``[N, C, ...]`` logits and targets.
    """
    chance = torch.log_softmax(logits.float(), 1)[:, 1:]
    against = chance - torch.log1p(-chance.exp().clamp(max=1 - 1e-6))
    number = torch.arange(1, logits.shape[1], dtype=torch.int64, device=target.device)
    number = number.reshape(-1, *[1] * (target.ndim - 2))
    wanted = (target == number).to(chance.dtype)
    return against, wanted.masked_fill(~known, float("nan"))


def probabilities(logits: Tensor, classes: int) -> Tensor:
    """Probability of each class: by softmax where the logits have one more channel, the background, else by sigmoid.

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
    """Dice per class, pooled over everything that was seen: true and false positives are counted, then divided once.

    Args:
        classes: names of the classes.
        threshold: logit from which a voxel is taken as positive.
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
            # Whole numbers stay exact, also when a Trainer converts the model to half precision.
            self.add_state(name, torch.zeros(len(self.classes), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count a batch: ``[N, C, ...]`` logits and targets (1, 0, NaN)."""
        if logits.shape[1] != len(self.classes) or logits.shape != target.shape:
            raise CellMapValueError(
                f"{list(logits.shape)} logits and {list(target.shape)} targets do not fit {len(self.classes)} classes"
            )
        known, wanted = known_and_target(target)
        found = (logits > self.threshold) & known
        hit = found & (wanted > 0.5)
        for name, value in (("tp", hit), ("predicted", found), ("positive", wanted > 0.5), ("known", known)):
            setattr(self, name, getattr(self, name) + _per_class(value))

    def compute(self) -> dict[str, Tensor]:
        """Scores of each class, ``[C]``.

        Returns:
            ``dice``, NaN where the class neither occurs nor is predicted; ``constant``, that of the best constant
            predictor (the one that says yes everywhere), NaN where the class does not occur; ``occurs``, whether it
            does.
        """
        occurs = self.positive > 0
        twice_tp, twice_positive = (2.0 * value.to(torch.float32) for value in (self.tp, self.positive))
        constant = torch.where(occurs, twice_positive / (self.known + self.positive), torch.nan)
        return {"dice": twice_tp / (self.predicted + self.positive), "constant": constant, "occurs": occurs}


class MeanOverSamples(Metric):
    """Mean of a value per batch, weighted by samples, over everything that was seen on all ranks.

    Lightning's own mean over ranks (``self.log(..., sync_dist=True)`` in a step) divides the number of samples by that
    of the ranks as an integer, and is wrong where ranks saw different numbers of samples.
    """

    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, value: Tensor, samples: int) -> None:
        """Count a batch of so many samples."""
        # Not in place: a state that was made in inference mode cannot be changed outside of it.
        self.total = self.total + value.detach().to(self.total.dtype) * samples
        self.samples = self.samples + samples

    def compute(self) -> Tensor:
        """The mean; NaN when nothing was seen."""
        return self.total / self.samples
