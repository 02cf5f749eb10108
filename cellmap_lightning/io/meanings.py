"""The meaning of stored predictions: probabilities, scaled probabilities, masks or ids.

Every writer of this package records it as ``cellmap.prediction.values`` of the group. Where nothing is recorded, it is
inferred from the values, with one log line; ambiguous values are an error that names the setting.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError, MetadataError
from cellmap_lightning.io.ngff import Encoding, Level, Multiscale, read_encoding
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.validation import one_of

log = logging.getLogger(__name__)

#: ``probability``: from 0 to 1, as it is. ``scaled``: probability 1 is the largest value of the stored type, 255 for
#: uint8 and for floats. ``mask``: present where it is not 0. ``ids``: the same, and each id is an object.
Kind = Literal["probability", "scaled", "mask", "ids"]
#: A kind, or ``auto``: recorded in the metadata, else inferred from the values.
Values = Literal["auto", "probability", "scaled", "mask", "ids"]
#: The same for all classes, or ``{class: values}``, with ``"*"`` for the others.
ValuesSetting = Values | Mapping[str, Values]

#: Distance by which a probability may lie outside [0, 1]: the noise of half precision.
_TOLERANCE = 2e-3
_PLAIN = Encoding(0, None)
#: Voxels that are read at most for that; of a larger array, evenly spaced chunks.
_MOST_VOXELS = 1 << 27


@dataclass(frozen=True)
class Meaning:
    """The meaning of the stored values of a prediction.

    Attributes:
        kind: see `Kind`.
        one: the stored value of probability 1.
        encoding: values of a mask or of ids that are background or unannotated.
        checked: values that contradict the kind are an error, since it was recorded rather than set.
    """

    kind: Kind
    one: float = 1
    encoding: Encoding = _PLAIN
    checked: bool = False

    @property
    def is_labels(self) -> bool:
        """True if values are labels, which cannot be interpolated."""
        return self.kind in ("mask", "ids")

    def least(self, threshold: float) -> float:
        """Return the least stored value of a voxel that is of the class.

        Args:
            threshold: probability from which it is.
        """
        return 1 if self.is_labels else threshold * self.one

    def present(self, stored: npt.NDArray[Any], threshold: float) -> npt.NDArray[np.bool_]:
        """Return a mask of the voxels where the class is present."""
        if self.is_labels:
            return self.encoding.present(stored)
        present: npt.NDArray[np.bool_] = stored >= threshold * self.one
        return present

    def check(self, stored: npt.NDArray[Any], where: str) -> None:
        """Check values against the recorded kind.

        Raises:
            MetadataError: a mask with other values than 0 and 1, or probabilities outside [0, 1].
        """
        if not self.checked or not stored.size or self.kind == "ids":
            return
        low, high = np.nanmin(stored), np.nanmax(stored)
        slack = 0 if self.kind == "mask" else _TOLERANCE * self.one
        if low < -slack or high > self.one * (2 if self.kind == "probability" else 1) + slack:
            raise MetadataError(
                f"{where}: its metadata record values={self.kind} (0 to {self.one:g}), but it holds values from "
                f"{low:g} to {high:g}; set values=probability to compare them with the threshold as they are, or the "
                "right kind"
            )


def check_values(setting: Any) -> ValuesSetting:
    """Return the setting ``values`` if it is valid.

    Raises:
        CellMapValueError: an unknown kind.
    """
    for kind in setting.values() if isinstance(setting, Mapping) else [setting]:
        one_of("values", kind, get_args(Values))
    checked: ValuesSetting = dict(setting) if isinstance(setting, Mapping) else setting
    return checked


def check_kind(value: Any) -> Kind:
    """Return the kind of that name.

    Raises:
        CellMapValueError: an unknown kind.
    """
    if value not in get_args(Kind):
        raise CellMapValueError(f"values must be one of {', '.join(get_args(Kind))} or None, got {value!r}")
    kind: Kind = value
    return kind


def prediction_attributes(name: str, kind: Kind | None, dtype: npt.DTypeLike = np.float32) -> dict[str, Any]:
    """Return CellMap's attributes of a prediction.

    Args:
        name: the class.
        kind: the meaning of its values; None where it is not known.
        dtype: type of a stored voxel.
    """
    block: dict[str, Any] = {"class_name": name}
    if kind is not None:
        block["values"] = kind
    if kind in ("probability", "scaled"):
        block["probability_1"] = _one(kind, np.dtype(dtype))
    return {"prediction": block}


def meaning_of(image: Multiscale, name: str, setting: ValuesSetting = "auto", unknown: int | None = None) -> Meaning:
    """Return the meaning of a prediction: as set, as recorded in its metadata, or inferred from its values.

    Args:
        image: the prediction of a class.
        name: the class, and where it lies, for messages.
        setting: see `ValuesSetting`; a kind takes precedence over the metadata.
        unknown: the stored value of unannotated voxels, if it is known that values are labels: those of a mask or ids
            are inferred from the other values alone. None if it is not.

    Raises:
        MetadataError: the metadata are malformed, or the values are ambiguous.
        ChunkError: a chunk cannot be read.
    """
    dtype = image.finest.array.dtype
    label = name.rpartition("/")[2]
    value: Values = setting.get(label, setting.get("*", "auto")) if isinstance(setting, Mapping) else setting
    if value != "auto":
        # Voxels that an annotation marks as unknown are so with any setting.
        encoding = read_encoding(image, image.finest) if value in ("mask", "ids") else None
        return Meaning(value, _one(value, dtype), encoding or _PLAIN)
    recorded = _recorded(image, name)
    if recorded is not None:
        return recorded
    if dtype.kind == "b":
        return Meaning("mask")
    where = f"{name}: {image.finest.path}"
    if unknown is not None:
        kind, reason = _inferred_labels(_read_range(image.finest, name, unknown), dtype, where, unknown)
    else:
        kind, reason = _inferred(_read_range(image.finest, name), dtype, where, label)
    log.info("%s: the metadata do not record the meaning of its values; %s: read as %s", name, reason, kind)
    return Meaning(kind, _one(kind, dtype))


def _one(kind: str, dtype: np.dtype[Any]) -> int:
    if kind != "scaled":
        return 1
    return int(np.iinfo(dtype).max) if dtype.kind in "iu" else 255


def _recorded(image: Multiscale, name: str) -> Meaning | None:
    """Return the meaning that is recorded in the attributes of a group, or None."""
    block = _mapping(image.attributes.get("cellmap"))
    annotation = block.get("annotation")
    if annotation is None and "prediction" not in block:  # CellMap's own crops have it in the arrays alone
        annotation = _mapping(image.finest.array.attributes.get("cellmap")).get("annotation")
    if isinstance(annotation, Mapping):
        instances = _mapping(annotation.get("annotation_type")).get("type") == "instance_segmentation"
        encoding = read_encoding(image, image.finest) or _PLAIN
        return Meaning("ids" if instances else "mask", encoding=encoding)
    prediction = _mapping(block.get("prediction"))
    if not {"values", "probability_1"} & set(prediction):
        return None
    # Earlier versions recorded only the stored value of probability 1.
    kind = prediction.get("values", "scaled")
    one = prediction.get("probability_1", 1)
    if kind not in get_args(Kind):
        raise MetadataError(
            f"{name}: {image.path} records cellmap.prediction.values={kind!r}; it must be one of "
            f"{', '.join(get_args(Kind))}"
        )
    if isinstance(one, bool) or not isinstance(one, int | float) or not (math.isfinite(one) and one > 0):
        raise MetadataError(
            f"{name}: {image.path} records cellmap.prediction.probability_1={one!r}; it must be a positive number"
        )
    return Meaning(kind, one if kind in ("probability", "scaled") else 1, checked=True)


def recorded_kind(image: Multiscale, name: str) -> Kind | None:
    """Return the kind that is recorded in the metadata of a prediction, or None."""
    meaning = _recorded(image, name)
    return meaning.kind if meaning is not None else None


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return a value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


@dataclass(frozen=True)
class _Range:
    """The range of the stored values of an array.

    Attributes:
        low: minimum.
        high: maximum.
        between: whether any is neither 0, 1 nor the largest value of the type.
        one: whether any is 1.
        whole: whether all are whole numbers.
    """

    low: float = math.inf
    high: float = -math.inf
    between: bool = False
    one: bool = False
    whole: bool = True

    def __or__(self, more: "_Range") -> "_Range":
        return _Range(
            min(self.low, more.low), max(self.high, more.high), self.between or more.between, self.one or more.one,
            self.whole and more.whole,
        )  # fmt: skip


def _read_range(level: Level, name: str, without: int | None = None) -> _Range:
    """Read the range of the values of an array, chunk by chunk, apart from one value."""
    reader = open_reader(level, name, empty="missing")
    most = max(1, _MOST_VOXELS // math.prod(level.array.files))
    files = sorted(reader.stored())
    if len(files) > most:
        files = [files[i] for i in np.linspace(0, len(files) - 1, most).round().astype(int)]
    values = _Range(low=0, high=0)
    for file in files:
        for start, shape in reader.chunks_of(file):
            stored = reader.read(start, shape)
            values |= _range_of(stored if without is None else stored[stored != without])
    return values


def _range_of(stored: npt.NDArray[Any]) -> _Range:
    if stored.dtype.kind == "f":
        stored = stored[np.isfinite(stored)]
    if not stored.size:
        return _Range()
    low, high = float(stored.min()), float(stored.max())
    if low == high == 0:
        return _Range(0, 0)
    top = np.iinfo(stored.dtype).max if stored.dtype.kind in "iu" else math.inf
    one = stored == 1
    edges = int(np.count_nonzero(one)) + int(np.count_nonzero(stored == 0)) + int(np.count_nonzero(stored == top))
    whole = stored.dtype.kind != "f" or bool((np.rint(stored) == stored).all())
    return _Range(low, high, edges < stored.size, bool(one.any()), whole)


def _inferred(seen: _Range, dtype: np.dtype[Any], where: str, label: str) -> tuple[Kind, str]:
    """Return the only possible kind of some values, and the reason.

    Args:
        seen: range of the values.
        dtype: their stored type.
        where: name and path of the array, for messages.
        label: the class.

    Raises:
        MetadataError: several kinds are possible.
    """
    text = f"{dtype} values from {seen.low:g} to {seen.high:g}"
    if dtype.kind == "f":
        # A model without a sigmoid may slightly exceed 1; logits are negative too.
        if seen.low >= -_TOLERANCE and seen.high <= (1 + _TOLERANCE if seen.whole else 2):
            return "probability", text
        if seen.low >= 0 and seen.whole and seen.high > _one("scaled", dtype):
            return "ids", text
        kinds = ["ids", "scaled"] if seen.low >= 0 and seen.whole else ["probability", "scaled"]
    elif seen.low >= 0:
        top = np.iinfo(dtype).max
        if seen.high <= 1:
            return "mask", text
        if not (seen.between or seen.one):
            return "scaled", f"{dtype} values 0 and {top}"
        if dtype.itemsize > 1 and seen.high < top / 2:
            return "ids", text
        kinds = ["scaled", "ids"] if seen.between else ["scaled", "mask"]
    else:
        kinds = ["probability"]
    settings = " or ".join(f"values={kind}" for kind in kinds)
    raise MetadataError(
        f"{where} holds {text}, and its metadata do not record their meaning; set {settings}, or for this class alone "
        f"values={{{label}: {kinds[0]}}}"
    )


def _inferred_labels(seen: _Range, dtype: np.dtype[Any], where: str, unknown: int) -> tuple[Kind, str]:
    """Return the kind of labels, whose voxels of one value are unannotated, and the reason.

    Args:
        seen: range of the other values.
        dtype: their stored type.
        where: name and path of the array, for messages.
        unknown: the value of unannotated voxels.

    Raises:
        MetadataError: the values are no labels.
    """
    text = f"{dtype} values from {seen.low:g} to {seen.high:g}, apart from unknown={unknown}"
    if seen.low < 0 or not seen.whole:
        raise MetadataError(
            f"{where} holds {text}, which are no labels; unknown is the value of unannotated voxels of masks and ids: "
            "leave it out, or give the value that the labels have there"
        )
    if seen.high <= 1 or not (seen.between or seen.one):
        return "mask", text
    return "ids", text


class WrittenMeaning:
    """The meaning of values, updated while patches of them are written.

    Args:
        dtype: type of a stored voxel.
        given: the kind, where it is set.
        recorded: the kind that earlier writes recorded.
        begun: whether there were earlier writes; if these recorded nothing, later ones do not either.

    Attributes:
        kind: the kind so far; None while the values are ambiguous.
    """

    def __init__(
        self, dtype: np.dtype[Any], given: Kind | None = None, recorded: Kind | None = None, begun: bool = False
    ) -> None:
        self.dtype = dtype
        self.kind: Kind | None = given or recorded
        self._fixed = given is not None or recorded == "ids" or (begun and recorded is None)
        self._fractions = recorded == "scaled"
        self._low, self._high = 0.0, 2.0 if self._fractions else 1.0

    def add(self, values: npt.NDArray[Any]) -> bool:
        """Update the kind from values, before they are rounded to the stored type; return whether it changed."""
        if self._fixed or not values.size:
            return False
        before = self.kind
        self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
        if self.dtype.kind == "f":
            inside = self._low >= -_TOLERANCE and self._high <= 1 + _TOLERANCE
            self.kind = "probability" if inside else None
        else:
            self._fractions |= values.dtype.kind == "f" and bool((np.rint(values) != values).any())
            self.kind = "mask" if self._high <= 1 else "scaled" if self._fractions else None
        return self.kind != before
