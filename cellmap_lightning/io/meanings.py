"""The meaning of stored predictions: probabilities, scaled probabilities, masks or ids.

Every writer of this package records it as ``cellmap.prediction.values`` of the group. Where nothing is recorded, it is
decided from the values, with one log line; values that could mean several things are an error that names the setting.
"""

import itertools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError, MetadataError
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import Encoding, Level, Multiscale, read_encoding

log = logging.getLogger(__name__)

#: ``probability``: from 0 to 1, as it is. ``scaled``: probability 1 is the largest value of the stored type, 255 for
#: uint8 and for floats. ``mask``: present where it is not 0. ``ids``: the same, and each id is an object.
Kind = Literal["probability", "scaled", "mask", "ids"]
#: A kind, or ``auto``: what the metadata record, else what the values show.
Values = Literal["auto", "probability", "scaled", "mask", "ids"]
#: The same for all classes, or ``{class: values}``, with ``"*"`` for the others.
ValuesSetting = Values | Mapping[str, Values]

#: By how much a probability may miss [0, 1]: the noise of half precision.
_TOLERANCE = 2e-3
_PLAIN = Encoding(0, None)
#: Voxels that are read at most to decide; of a larger array, evenly spaced chunks.
_MOST_VOXELS = 1 << 27


@dataclass(frozen=True)
class Meaning:
    """The meaning of the stored values of a prediction.

    Attributes:
        kind: see `Kind`.
        one: the stored value of probability 1.
        encoding: which values of a mask or of ids are background or unknown.
        checked: values that contradict the kind are an error, since it was recorded rather than set.
    """

    kind: Kind
    one: float = 1
    encoding: Encoding = _PLAIN
    checked: bool = False

    @property
    def is_labels(self) -> bool:
        """Whether values are labels, which cannot be interpolated."""
        return self.kind in ("mask", "ids")

    def least(self, threshold: float) -> float:
        """Return the least stored value of a voxel that is of the class.

        Args:
            threshold: probability from which it is.
        """
        return 1 if self.is_labels else threshold * self.one

    def present(self, stored: npt.NDArray[Any], threshold: float) -> npt.NDArray[np.bool_]:
        """Return where the class is present."""
        if self.is_labels:
            return self.encoding.present(stored)
        there: npt.NDArray[np.bool_] = stored >= threshold * self.one
        return there

    def check(self, stored: npt.NDArray[Any], where: str) -> None:
        """Check values against what the metadata record.

        Raises:
            MetadataError: a mask with other values than 0 and 1, or probabilities outside [0, 1].
        """
        if not self.checked or not stored.size or self.kind == "ids":
            return
        low, high = np.nanmin(stored), np.nanmax(stored)
        slack = 0 if self.kind == "mask" else _TOLERANCE * self.one
        if low < -slack or high > self.one * (2 if self.kind == "probability" else 1) + slack:
            raise MetadataError(
                f"{where}: its metadata record values={self.kind} (0 to {self.one:g}), and it holds values from "
                f"{low:g} to {high:g}; set values=probability to compare them with the threshold as they are, or the "
                "values that are right"
            )


def check_values(setting: Any) -> ValuesSetting:
    """Return the setting ``values`` if it is one.

    Raises:
        CellMapValueError: it is none.
    """
    parts = setting.values() if isinstance(setting, Mapping) else [setting]
    for part in parts:
        if part not in get_args(Values):
            raise CellMapValueError(f"values must be one of {', '.join(get_args(Values))}, got {part!r}")
    found: ValuesSetting = dict(setting) if isinstance(setting, Mapping) else setting
    return found


def check_kind(value: Any) -> Kind:
    """Return the meaning of that name.

    Raises:
        CellMapValueError: there is none.
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


def meaning_of(image: Multiscale, name: str, setting: ValuesSetting = "auto") -> Meaning:
    """Return the meaning of a prediction: as set, as its metadata record, or as its values show.

    Args:
        image: the prediction of a class.
        name: the class, and where it lies, for messages.
        setting: see `ValuesSetting`; a kind takes precedence over the metadata.

    Raises:
        MetadataError: the metadata are malformed, or the values could mean several things.
        ChunkError: a chunk cannot be read.
    """
    dtype = image.finest.array.dtype
    label = name.rpartition("/")[2]
    value: Values = setting.get(label, setting.get("*", "auto")) if isinstance(setting, Mapping) else setting
    if value != "auto":
        return Meaning(value, _one(value, dtype), _PLAIN)
    recorded = _recorded(image, name)
    if recorded is not None:
        return recorded
    if dtype.kind == "b":
        return Meaning("mask")
    kind, why = _decided(_seen(image.finest, name), dtype, f"{name}: {image.finest.path}", label)
    log.info("%s: the metadata do not record what its values mean; %s: read as %s", name, why, kind)
    return Meaning(kind, _one(kind, dtype))


def _one(kind: str, dtype: np.dtype[Any]) -> int:
    if kind != "scaled":
        return 1
    return int(np.iinfo(dtype).max) if dtype.kind in "iu" else 255


def _recorded(image: Multiscale, name: str) -> Meaning | None:
    """Return the meaning that the attributes of a group record; None where they record none."""
    block = image.attributes.get("cellmap")
    block = block if isinstance(block, Mapping) else {}
    annotation = block.get("annotation")
    if isinstance(annotation, Mapping):
        kind = annotation.get("annotation_type")
        instances = isinstance(kind, Mapping) and kind.get("type") == "instance_segmentation"
        encoding = read_encoding(image, image.finest) or _PLAIN
        return Meaning("ids" if instances else "mask", encoding=encoding)
    found = block.get("prediction")
    if not isinstance(found, Mapping) or not {"values", "probability_1"} & set(found):
        return None
    # Earlier versions recorded the stored value of probability 1 alone.
    kind = found.get("values", "scaled")
    one = found.get("probability_1", 1)
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
    """Return the kind that the metadata of a prediction record; None where they record none."""
    found = _recorded(image, name)
    return found.kind if found is not None else None


@dataclass(frozen=True)
class _Seen:
    """The stored values of an array.

    Attributes:
        low: the least.
        high: the greatest.
        between: whether any is neither 0, 1 nor the largest value of the type.
        one: whether any is 1.
        whole: whether all are whole numbers.
    """

    low: float = math.inf
    high: float = -math.inf
    between: bool = False
    one: bool = False
    whole: bool = True

    def __or__(self, more: "_Seen") -> "_Seen":
        return _Seen(
            min(self.low, more.low), max(self.high, more.high), self.between or more.between, self.one or more.one,
            self.whole and more.whole,
        )  # fmt: skip


def _seen(level: Level, name: str) -> _Seen:
    """Read the values of an array, chunk by chunk."""
    reader = ChunkReader(level, name, empty="missing")
    size = level.zyx(level.array.files)
    most = max(1, _MOST_VOXELS // math.prod(size))
    files = sorted(reader.stored())
    if len(files) > most:
        files = [files[i] for i in np.linspace(0, len(files) - 1, most).round().astype(int)]
    found = _Seen(low=0, high=0)
    for place in files:
        ranges = [
            range(i * f, min((i + 1) * f, n), c)
            for i, f, n, c in zip(place, size, reader.shape, reader.chunks, strict=True)
        ]
        for z, y, x in itertools.product(*ranges):
            dz, dy, dx = (min(c, r.stop - a) for a, r, c in zip((z, y, x), ranges, reader.chunks, strict=True))
            found |= _values(reader.read((z, y, x), (dz, dy, dx)))
    return found


def _values(stored: npt.NDArray[Any]) -> _Seen:
    if stored.dtype.kind == "f":
        stored = stored[np.isfinite(stored)]
        if not stored.size:
            return _Seen()
    low, high = float(stored.min()), float(stored.max())
    if low == high == 0:
        return _Seen(0, 0)
    top = np.iinfo(stored.dtype).max if stored.dtype.kind in "iu" else math.inf
    one = stored == 1
    edges = int(np.count_nonzero(one)) + int(np.count_nonzero(stored == 0)) + int(np.count_nonzero(stored == top))
    whole = stored.dtype.kind != "f" or bool((np.rint(stored) == stored).all())
    return _Seen(low, high, edges < stored.size, bool(one.any()), whole)


def _decided(seen: _Seen, dtype: np.dtype[Any], where: str, label: str) -> tuple[Kind, str]:
    """Return the only thing that values can mean, and why.

    Raises:
        MetadataError: there are several.
    """
    text = f"{dtype} values from {seen.low:g} to {seen.high:g}"
    if dtype.kind == "f":
        # A model without a sigmoid may exceed 1 a little; logits are negative as well.
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
        f"{where} holds {text}, and its metadata do not record what they mean; set {settings}, or for this class alone "
        f"values={{{label}: {kinds[0]}}}"
    )


class WrittenMeaning:
    """The meaning of values, followed while patches of them are written.

    Args:
        dtype: type of a stored voxel.
        given: the meaning, where it is set.
        recorded: the meaning that earlier writes recorded.
        begun: whether there were earlier writes; where these recorded nothing, nothing is recorded any more.

    Attributes:
        kind: the meaning so far; None where the values could mean several things.
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
        """Follow values before they are rounded to the stored type. Returns whether the meaning changed."""
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
