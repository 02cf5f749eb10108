"""Validation scores of the heads of a network, and the names under which they are logged."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from cellmap_lightning.training.heads import Head

#: ``{score: {class: {"value": .., "constant": ..}}}``
ScoresOfHead = dict[str, dict[str, dict[str, float]]]


def loggable(name: str) -> str:
    """Return a class name as part of a metric name, with the characters that every logger accepts.

    MLflow accepts letters, digits, ``_ . - / :`` and spaces, and keeps metrics as files, so that one must not be the
    folder of another.
    """
    return re.sub(r"[^\w. -]", "_", name)


class Scorers(nn.Module):
    """The metrics of one stage, of all heads.

    Args:
        heads: the heads.

    Example:
        >>> scorers = Scorers(heads)
        >>> scorers.update(heads, parts, targets)
        >>> scorers.compute(heads)[0]["dice"]["mito"]["value"]
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        self.by_head = nn.ModuleList(nn.ModuleDict(head.scorers()) for head in heads)

    def update(self, heads: Sequence[Head], parts: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Add a batch: the output and the target of each head."""
        for head, scorers, part, target in zip(heads, self._dicts, parts, targets, strict=True):
            head.update(scorers, part, target)

    def compute(self, heads: Sequence[Head]) -> list[ScoresOfHead]:
        """Compute the scores of each head: ``{score: {class: values}}`` of the classes that occur; then reset.

        The values of a score are its ``value``, and for Dice that of the best constant predictor, ``constant``.
        """
        results = []
        for head, scorers in zip(heads, self._dicts, strict=True):
            scores: ScoresOfHead = {}
            for name, metric in scorers.items():
                # torchmetrics returns a scalar instead of one element, as with a single class.
                computed = {key: value.reshape(-1).tolist() for key, value in metric.compute().items()}
                metric.reset()
                score = "dice" if name == "dice" else str(head.number)
                values = computed[score]
                occurs = computed.get("occurs", [value == value for value in values])  # not NaN
                scores[score] = {
                    label: {"value": values[i]} | ({"constant": computed["constant"][i]} if name == "dice" else {})
                    for i, label in enumerate(head.classes)
                    if occurs[i]
                }
            results.append(scores)
        return results

    def reset(self) -> None:
        """Reset all metrics."""
        for scorers in self._dicts:
            for metric in scorers.values():
                metric.reset()

    @property
    def _dicts(self) -> list[dict[str, Any]]:
        return [dict(scorers.items()) for scorers in self.by_head]  # type: ignore[operator]


def score_names(heads: Sequence[Head]) -> list[str]:
    """Return all names under which `epoch_scores` can log a score; that of a class is logged where the class occurs."""
    names: list[str] = []
    for head in heads:
        prefix = f"{loggable(head.name)}_" if len(heads) > 1 else ""
        for score in dict.fromkeys("dice" if name == "dice" else str(head.number) for name in head.scorers()):
            names += [prefix + score, *(f"{prefix}{score}_{loggable(name)}" for name in head.classes)]
    if any(name.endswith("dice") for name in names):
        names.insert(0, "dice")
    return list(dict.fromkeys([*names, "score"]))


def epoch_scores(heads: Sequence[Head], results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the scores of an epoch by the names under which they are logged.

    Args:
        heads: the heads.
        results: of `Scorers.compute`.

    Returns:
        Of each score the mean over classes, and ``<score>_<class>``. With several heads these have ``<target>_`` before
        them, and ``dice`` is the mean over the heads that have it. ``score`` is the mean of the main scores of all
        heads; higher is better.
    """
    logged: dict[str, float] = {}
    means: list[dict[str, float]] = []
    for head, scores in zip(heads, results, strict=True):
        prefix = f"{loggable(head.name)}_" if len(heads) > 1 else ""
        means.append({score: _mean([v["value"] for v in by_class.values()]) for score, by_class in scores.items()})
        for score, by_class in scores.items():
            logged[prefix + score] = means[-1][score]
            logged |= {f"{prefix}{score}_{loggable(name)}": value["value"] for name, value in by_class.items()}
    if len(heads) > 1 and any("dice" in scores for scores in means):
        logged["dice"] = _mean([scores["dice"] for scores in means if "dice" in scores])
    logged["score"] = _mean([scores[head.main_score] for head, scores in zip(heads, means, strict=True)])
    return logged


def dice_by_class(classes: Sequence[str], results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]] | None:
    """Return Dice of each class that occurs, and that of the best constant predictor, the mean over heads.

    None where no head has Dice.
    """
    found = [scores["dice"] for scores in results if "dice" in scores]
    if not found:
        return None
    by_class: dict[str, dict[str, float]] = {}
    for name in classes:
        values = [scores[name] for scores in found if name in scores]
        if values:
            dice, constant = (_mean([value[key] for value in values]) for key in ("value", "constant"))
            by_class[name] = {"dice": dice, "constant": constant}
    return by_class


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
