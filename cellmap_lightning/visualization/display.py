"""The display of targets and predictions of every kind: masks that are outlined, and colours."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cellmap_lightning.transforms.kinds.kind import TargetKind
from cellmap_lightning.visualization.figures.palette import outline_colors, rgb_of

#: Opacity of a picture over raw.
_OPACITY = 0.8
#: Number of colours of instances; instances whose ids differ by a multiple of it share one.
_INSTANCE_COLORS = 61


@dataclass(frozen=True, eq=False)
class Display:
    """A target or a prediction, ready to be drawn.

    Attributes:
        masks: per class, ``[C, ...]``: above 0.5 inside, NaN where unknown. Outlined, unless there is a picture.
        picture: red, green, blue and opacity from 0 to 1, ``[..., 4]``; None for kinds that are outlined.
    """

    masks: Tensor
    picture: Tensor | None = None


def display(kind: TargetKind, values: Tensor) -> Display:
    """Return how values of a kind are drawn.

    Presence and boundaries are outlined, signed distances at 0. Instances have a colour each; of affinities the first
    three offsets, of shape descriptors the offset, and of vectors the components z, y, x are red, green and blue;
    skeleton-aware distances are the brightness of the class's colour.

    Args:
        kind: the kind.
        values: a finished target of one sample, or a prediction after its activation, ``[channels, ...]``.
    """
    values = values.detach().cpu()
    classes = kind.classes
    if kind.name in ("instances", "ids"):
        return _instances(values)
    if not values.is_floating_point():  # class numbers from 1, negative where unknown
        number = torch.arange(1, classes + 1, dtype=torch.int64, device="cpu").reshape(-1, *[1] * (values.ndim - 1))
        return Display((values == number).float().masked_fill(values < 0, float("nan")))
    values = values.float()
    if kind.name == "sdt":
        return Display((values + 1) / 2)
    by_class = values.reshape(classes, -1, *values.shape[1:])  # [C, channels of a class, ...]
    unknown = by_class.isnan().any(1)
    known = torch.nan_to_num(by_class, nan=0.0)
    if kind.name == "affinities":
        return _colored(known.amax(1), unknown, known[:, :3], None)
    if kind.name == "lsd":
        inside = (known[:, -1] > 0.05).float()
        return _colored(inside, unknown, known[:, :3], inside)
    if kind.name == "flow":
        inside = (known.square().sum(1) > 0.25).float()
        return _colored(inside, unknown, 0.5 + 0.5 * known, inside)
    if kind.name == "skeleton_distance":
        colors = torch.stack([torch.from_numpy(rgb_of(color)) for color in outline_colors(classes)]).float()
        bright = known * colors.reshape(classes, 3, *[1] * (values.ndim - 1))
        return _colored((known[:, 0] > 0.05).float(), unknown, bright, known[:, 0])
    return Display(values)


def display_prediction(kind: TargetKind | None, values: Tensor, classes: int) -> Display:
    """Return how a prediction is drawn: by the kind of its target, or as probabilities of classes.

    Args:
        kind: the kind of the target; None without one.
        values: ``[channels, ...]``.
        classes: number of classes.
    """
    if kind is None or (len(values) == classes and kind.name not in ("sdt", "skeleton_distance", "lsd", "flow")):
        return Display(values.detach().cpu().float())
    return display(kind, values)


def prediction_title(kind: TargetKind | None) -> str:
    """Return the title of predictions of a kind."""
    if kind is not None and kind.name in ("affinities", "lsd", "flow", "skeleton_distance"):
        return "prediction"
    return "prediction ≥ 0" if kind is not None and kind.name == "sdt" else "prediction ≥ 0.5"


def _instances(ids: Tensor) -> Display:
    """Return the display of instance ids, -1 or NaN where unknown."""
    unknown = ids.isnan() if ids.is_floating_point() else ids < 0
    known = torch.where(unknown, 0, ids).long()
    colors = torch.stack([torch.from_numpy(rgb_of(color)) for color in outline_colors(_INSTANCE_COLORS)]).float()
    # Of classes that overlap the first one is shown. Its number shifts the colours, so that equal ids differ.
    shown = (known > 0).int().argmax(0, keepdim=True)
    number = known.gather(0, shown)[0]
    picture = colors[(number + 17 * shown[0]) % _INSTANCE_COLORS]
    opacity = _OPACITY * (number > 0).float()
    masks = (known > 0).float().masked_fill(unknown, float("nan"))
    return Display(masks, torch.cat([picture, opacity[..., None]], -1))


def _colored(inside: Tensor, unknown: Tensor, colors: Tensor, opacity: Tensor | None) -> Display:
    """Return a display in colours; of several classes the one of the greatest opacity is shown.

    Args:
        inside: ``[C, ...]``, above 0.5 inside.
        unknown: mask of the same shape.
        colors: ``[C, up to 3, ...]`` from 0 to 1.
        opacity: ``[C, ...]``; None for the brightest colour.
    """
    colors = torch.cat([colors, torch.zeros_like(colors[:, :1]).expand(-1, 3 - colors.shape[1], *colors.shape[2:])], 1)
    opacity = colors.amax(1) if opacity is None else opacity
    shown = opacity.argmax(0, keepdim=True)
    picture = colors.gather(0, shown[:, None].expand(1, 3, *shown.shape[1:]))[0].movedim(0, -1)
    alpha = _OPACITY * opacity.gather(0, shown)[0].clamp(0, 1)
    masks = inside.masked_fill(unknown, float("nan"))
    return Display(masks, torch.cat([picture.clamp(0, 1), alpha[..., None]], -1))
