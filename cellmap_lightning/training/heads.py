"""The parts of a network's output that belong to one target each: channels, loss, activation and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.training.deep_supervision import scales_of
from cellmap_lightning.training.losses import MaskedLoss, activate, parse_loss
from cellmap_lightning.training.masked import DiceScore, one_against_all, probabilities
from cellmap_lightning.training.scores import DirectionScore, RegressionScore
from cellmap_lightning.transforms.kinds.affinities import Affinities
from cellmap_lightning.transforms.kinds.kind import Activation, TargetKind
from cellmap_lightning.transforms.kinds.registry import KINDS, make_kind

#: Scores of kinds whose main score is not Dice; ``sdt`` has both.
_NUMBERS = {"sdt": "mae", "lsd": "r2", "skeleton_distance": "r2", "flow": "cosine"}
TRAINABLE = tuple(name for name, kind in KINDS.items() if kind.activation is not None)


@dataclass(frozen=True, eq=False)
class Head:
    """The output of a network for one target.

    Attributes:
        name: name of the target.
        kind: its kind.
        activation: activation of its channels.
        classes: names of the classes.
        loss: its loss.
    """

    name: str
    kind: TargetKind
    activation: Activation
    classes: tuple[str, ...]
    loss: MaskedLoss

    @classmethod
    def of(cls, name: str, kind: TargetKind, classes: Sequence[str], loss: Any, dice_weight: float) -> "Head":
        """Return the head of a target.

        Args:
            name: name of the target.
            kind: its kind.
            classes: names of the classes.
            loss: specification of its loss, see `parse_loss`; None for the default of the kind.
            dice_weight: weight of Dice in the default loss of probabilities.

        Raises:
            CellMapValueError: a kind that no loss can compare with outputs, such as instance ids.
            CellMapError: see `parse_loss`.
        """
        activation = kind.activation
        if activation is None:
            raise CellMapValueError(
                f"the target {name!r} has the kind {kind.name}, which SegmentationTask does not train; use one of "
                f"{', '.join(TRAINABLE)}, or select another target with target_name"
            )
        where = f"loss of {name}"
        if loss is None:
            if kind.name in _NUMBERS:
                loss = {"mse": 1.0}
            else:
                loss = {"ce" if activation == "softmax" else "bce": 1 - dice_weight, "dice": dice_weight}
        weights = kind.weights * len(classes) if isinstance(kind, Affinities) else None
        return cls(
            name, kind, activation, tuple(classes), MaskedLoss(parse_loss(where, loss, activation), activation, weights)
        )

    def values(self, output: Tensor) -> Tensor:
        """Convert its part of the output to values: probabilities of classes, affinities, distances, ..."""
        return activate(output, self.activation)

    def scorers(self) -> dict[str, Any]:
        """Return new metrics: ``dice`` for kinds that separate inside from outside, else the score of their numbers."""
        scorers: dict[str, Any] = {}
        if self.kind.name not in _NUMBERS or self.kind.name == "sdt":
            scorers["dice"] = DiceScore(self.classes)
        if self.kind.name == "flow":
            scorers["numbers"] = DirectionScore(self.classes)
        elif self.kind.name in _NUMBERS:
            scorers["numbers"] = RegressionScore(self.classes)
        return scorers

    @property
    def main_score(self) -> str:
        """The score by which the head is compared: higher is better."""
        number = _NUMBERS.get(self.kind.name)
        return "dice" if number in (None, "mae") else str(number)

    @property
    def number(self) -> str | None:
        """The score of its numbers: ``mae``, ``r2`` or ``cosine``; None for probabilities."""
        return _NUMBERS.get(self.kind.name)

    def update(self, scorers: Mapping[str, Any], output: Tensor, target: Tensor) -> None:
        """Add a batch to the metrics.

        Args:
            scorers: of `scorers`.
            output: its part of the network's output.
            target: the target.
        """
        if "numbers" in scorers:
            scorers["numbers"].update(self.values(output), target)
        if "dice" not in scorers:
            return
        if self.activation == "softmax":
            known = (target >= 0) & (target < output.shape[1])
            scorers["dice"].update(*one_against_all(output, target, known))
            return
        if self.kind.name == "sdt":  # inside where the distance is positive
            target = torch.where(target.isnan(), target, (target > 0).to(target.dtype))
        # Channels of one class, such as the offsets of affinities, are pooled.
        shape = (len(output), len(self.classes), -1, *output.shape[3:])
        scorers["dice"].update(output.reshape(shape), target.reshape(shape))


def make_heads(
    kinds: Mapping[str, TargetKind], classes: Sequence[str], loss: Any, dice_weight: float
) -> tuple[Head, ...]:
    """Return the heads of some targets, in the order of the network's channels.

    Args:
        kinds: the kind of each target.
        classes: names of the classes.
        loss: with one target the specification of its loss, with several ``{target: specification}``.
        dice_weight: weight of Dice where no loss is given.

    Raises:
        CellMapKeyError: ``loss`` names a target that is not trained.
        CellMapError: see `Head.of`.
    """
    by_target: Mapping[str, Any] = loss or {}
    if loss is not None and not set(loss) <= set(kinds):
        if len(kinds) > 1:
            raise CellMapKeyError(
                f"loss must be {{target: {{loss: weight}}}} for the targets {', '.join(kinds)}, got {dict(loss)}"
            )
        by_target = dict.fromkeys(kinds, loss)
    return tuple(Head.of(name, kind, classes, by_target.get(name), dice_weight) for name, kind in kinds.items())


def kind_of(target: Tensor, classes: Sequence[str]) -> TargetKind:
    """Return the kind of a target without a specification: class numbers if it holds integers, else presence."""
    window = Window((1, 1, 1), (1.0, 1.0, 1.0))
    return make_kind("target", window, len(classes), {"kind": "binary" if target.is_floating_point() else "labels"})


def split_output(output: Tensor, heads: Sequence[Head]) -> list[Tensor]:
    """Return the channels of each head.

    Args:
        output: ``[N, C, ...]``.
        heads: the heads, in order.

    Raises:
        CellMapValueError: the network has another number of channels than the targets need.
    """
    needed = [head.kind.outputs for head in heads]
    if output.shape[1] != sum(needed):
        parts = ", ".join(f"{h.name} ({h.kind.name}) {n}" for h, n in zip(heads, needed, strict=True))
        raise CellMapValueError(
            f"the network returns {output.shape[1]} channels, and the targets need {sum(needed)}: {parts}; set its "
            f"out_channels to {sum(needed)}"
        )
    return list(torch.split(output, needed, 1))


def channel_values(output: Any, heads: Sequence[Head], classes: int, ndim: int) -> Tensor:
    """Convert the output of a network to the values of each channel after its activation.

    Args:
        output: of the network: a tensor ``[N, C, ...]``, or several scales of it.
        heads: the heads, in order; without any, the output is the logits of classes.
        classes: number of classes.
        ndim: axes of the input: 5 for ``[N, 1, z, y, x]``.

    Returns:
        ``[N, channels, ...]``, see `describe_channels`.

    Raises:
        CellMapValueError: the network has another number of channels than the heads need.
    """
    full = scales_of(output, ndim)[0]
    if not heads:
        return probabilities(full, classes)
    return torch.cat([head.values(part) for head, part in zip(heads, split_output(full, heads), strict=True)], 1)


def check_shapes(output: Tensor, targets: Sequence[Tensor], heads: Sequence[Head]) -> None:
    """Check that targets have the voxels of the network's output.

    Raises:
        CellMapValueError: one has others.
    """
    for head, target in zip(heads, targets, strict=True):
        if output.shape[2:] != target.shape[2:]:
            raise CellMapValueError(
                f"the target {head.name!r} has {list(target.shape[2:])} voxels, and the network returns "
                f"{list(output.shape[2:])}; give its target_arrays the shape of the network's output"
            )


def describe_channels(heads: Sequence[Head]) -> list[dict[str, Any]]:
    """Return a description of each predicted channel; see `TargetKind.describe`.

    Names that two targets share have that of the target before them.
    """
    channels = [
        {**channel, "target": head.name, "range": list(head.kind.value_range), "directional": head.kind.directional}
        for head in heads
        for channel in head.kind.describe(head.classes)
    ]
    names = [channel["name"] for channel in channels]
    for channel in channels:
        if names.count(channel["name"]) > 1:
            channel["name"] = f"{channel['target']}_{channel['name']}"
    return channels
