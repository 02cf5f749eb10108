"""The channels of a prediction: their names, kinds and ranges, and the metadata that record them."""

from collections.abc import Mapping, Sequence
from typing import Any

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.io.meanings import prediction_attributes
from cellmap_lightning.prediction.quantize import StoredValues

#: Kinds whose channels are probabilities of classes, which need no further description.
_CLASSES = ("binary", "labels")

#: Key of CellMap's attributes of a channel whose class no crop of the training annotates.
UNTRAINED = "untrained"

#: Of each described channel, by its name: kind, class, range, and the numbers of the kind, as plain values.
Targets = Mapping[str, Mapping[str, Any]]


def described_channels(module: Any) -> Targets:
    """Return the channels that a model describes by ``output_channels``, in order; empty without descriptions.

    See `SegmentationTask.output_channels`. In user code the attribute may mean something else, and is ignored then.
    """
    describe = getattr(module, "output_channels", None)
    channels = describe() if callable(describe) else None
    if not isinstance(channels, list) or not all(isinstance(c, Mapping) and "name" in c for c in channels):
        return {}
    return {channel["name"]: {k: v for k, v in channel.items() if k != "name"} for channel in channels}


def is_signed(target: Mapping[str, Any] | None) -> bool:
    """Return True for values from -1 to 1, such as signed distances."""
    return target is not None and target.get("range", [0, 1])[0] < 0


def signed_positions(names: Sequence[str], targets: Targets, values: StoredValues) -> list[int]:
    """Return the positions of the channels from -1 to 1 that are stored as ``(value + 1) / 2``."""
    if values.kind not in ("uint8", "labels"):
        return []
    return [position for position, name in enumerate(names) if is_signed(targets.get(name))]


def check_flips(flips: str, names: Sequence[str], targets: Targets) -> None:
    """Check that test-time augmentation is possible.

    Raises:
        CellMapValueError: channels are directions, which a mirrored patch exchanges.
    """
    directions = [name for name in names if targets.get(name, {}).get("directional")]
    if flips and directions:
        raise CellMapValueError(
            f"tta_flips={flips}: {', '.join(directions[:3])} are of kind {targets[directions[0]].get('kind')}, whose "
            "channels a mirrored patch exchanges; leave tta_flips out, or write other channels with only=[...]"
        )


def channel_attributes(
    name: str, values: StoredValues, target: Mapping[str, Any] | None, untrained: bool = False
) -> dict[str, Any]:
    """Return CellMap's attributes of a channel: those of labels, or of predicted numbers with their kind.

    Args:
        name: the channel.
        values: the conversion to stored values.
        target: its description, see `described_channels`; None for the probabilities of a class.
        untrained: no crop of the training annotates the class.
    """
    mark = {UNTRAINED: True} if untrained else {}
    if values.kind == "labels":
        encoding = {"absent": 0, "present": 1, "unknown": 255}
        annotation_type = {"type": "semantic_segmentation", "encoding": encoding}
        return {"annotation": {"class_name": name, "annotation_type": annotation_type}} | mark
    if values.kind == "uint8":
        attributes = prediction_attributes(name, "scaled", values.dtype)
    else:
        attributes = prediction_attributes(name, None if is_signed(target) else "probability", values.dtype)
    if target is not None and target.get("kind") not in _CLASSES:
        attributes["prediction"]["target"] = {k: v for k, v in target.items() if k not in ("target", "directional")}
    return attributes | mark


def untrained_text(names: Sequence[str]) -> str:
    """Return the warning of classes whose predictions mean nothing."""
    return f"no crop of the training annotated {', '.join(names)}: the model has learnt nothing of them"
