"""Scores of predicted numbers: error, explained variance and direction, over annotated voxels."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.training.masked import known_and_target, per_channel


class RegressionScore(Metric):
    """Mean absolute error and explained variance (R^2) per class, pooled over all batches.

    Args:
        classes: names of the classes; their channels follow each other, as many for each.

    Example:
        >>> score = RegressionScore(["mito"])
        >>> score.update(values, target)  # [N, 10, z, y, x]
        >>> score.compute()["r2"]
    """

    full_state_update = False
    count: Tensor
    total: Tensor
    square: Tensor
    error: Tensor
    absolute: Tensor

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = tuple(classes)
        # Sums of squares of many voxels cancel in single precision.
        for name in ("count", "total", "square", "error", "absolute"):
            self.add_state(name, torch.zeros(len(self.classes), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, target: Tensor) -> None:
        """Add the sums of a batch: values after the activation and targets with NaN, both ``[N, C, ...]``."""
        if values.shape != target.shape or values.shape[1] % len(self.classes):
            raise CellMapValueError(
                f"{list(values.shape)} values and {list(target.shape)} targets do not fit {len(self.classes)} classes"
            )
        known, wanted = known_and_target(target.double())
        values = values.double() * known

        def of_classes(numbers: Tensor) -> Tensor:
            return per_channel(numbers).reshape(len(self.classes), -1).sum(1)

        self.count = self.count + of_classes(known.double())
        self.total = self.total + of_classes(wanted)
        self.square = self.square + of_classes(wanted**2)
        self.error = self.error + of_classes((values - wanted) ** 2)
        self.absolute = self.absolute + of_classes((values - wanted).abs())

    def compute(self) -> dict[str, Tensor]:
        """Compute the scores of each class, ``[C]``.

        Returns:
            ``mae``, NaN where nothing is known; ``r2``, 1 for a perfect prediction and 0 for the mean of the target,
            NaN where the target is constant.
        """
        variance = self.square - self.total**2 / self.count
        r2 = torch.where(variance > 0, 1 - self.error / variance, torch.nan)
        return {"mae": self.absolute / self.count, "r2": r2}


class DirectionScore(Metric):
    """Mean cosine between predicted and true vectors per class, over the voxels that have a direction.

    Args:
        classes: names of the classes; the components of their vectors follow each other.

    Example:
        >>> score = DirectionScore(["mito"])
        >>> score.update(values, target)  # [N, 3, z, y, x]
        >>> score.compute()["cosine"]
    """

    full_state_update = False
    count: Tensor
    total: Tensor

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = tuple(classes)
        for name in ("count", "total"):
            self.add_state(name, torch.zeros(len(self.classes), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, target: Tensor) -> None:
        """Add the cosines of a batch: values after the activation and targets with NaN, both ``[N, C, ...]``."""
        if values.shape != target.shape or values.shape[1] % len(self.classes):
            raise CellMapValueError(
                f"{list(values.shape)} values and {list(target.shape)} targets do not fit {len(self.classes)} classes"
            )
        vectors = (len(target), len(self.classes), -1, *target.shape[2:])
        wanted = torch.nan_to_num(target.float(), nan=0.0).reshape(vectors)
        counted = wanted.square().sum(2) > 0.25  # a unit vector, rather than the background or a centre
        cosine = torch.cosine_similarity(values.float().reshape(vectors), wanted, 2)
        self.count = self.count + per_channel(counted.double())
        self.total = self.total + per_channel((cosine * counted).double())

    def compute(self) -> dict[str, Tensor]:
        """Compute the mean ``cosine`` of each class, ``[C]``; NaN where no voxel has a direction."""
        return {"cosine": self.total / self.count}
