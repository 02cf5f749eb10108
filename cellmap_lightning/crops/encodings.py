"""Encodings of a crop's label arrays: from their metadata, from a setting, or from their values."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError, MetadataError
from cellmap_lightning.io.array_reader import Empty
from cellmap_lightning.io.chunk_names import check_chunk_names
from cellmap_lightning.io.declared_counts import check_declared_counts, check_empty_level
from cellmap_lightning.io.label_ids import UNANNOTATED, LabelIds, unlisted_text
from cellmap_lightning.io.label_values import CODE, MOST_IDS, MOST_VOXELS, LabelValues, label_values, stored_ids
from cellmap_lightning.io.ngff import (
    UNKNOWN_CODE,
    Encoding,
    Level,
    Multiscale,
    declared_present,
    first_time,
    is_semantic,
    read_encoding,
)
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy
from cellmap_lightning.validation import first_few, one_of

log = logging.getLogger(__name__)

#: Code of unknown voxels in arrays whose metadata do not define it: decided by the values (``metadata``), a stored
#: value, or None if no value means unknown.
Code = int | None | Literal["metadata"]
#: One code for all classes, or ``{class: code}``, in which other classes have the code of ``"*"``, else ``metadata``.
Unknown = Code | Mapping[str, Code]
#: Policy for label chunks that have 0 bytes, or are missing although the metadata declare voxels in them.
MissingLabels = Literal["error", "unknown"]
MISSING_LABELS: tuple[MissingLabels, ...] = ("error", "unknown")


#: Different values up to `CODE` from which on an array may be a mask with gray edges.
_GRAY = 8


def check_unknown(value: Any) -> Unknown:
    """Check the setting ``unknown`` and return it.

    Raises:
        CellMapValueError: an invalid code.
        CellMapTypeError: a mapping with keys that are not names of classes.
    """
    codes = value if isinstance(value, Mapping) else {"": value}
    for name, code in codes.items():
        if not isinstance(name, str):
            raise CellMapTypeError(f"unknown must be a code or {{class: code}}, got the key {name!r}")
        if code not in ("metadata", None) and (isinstance(code, bool) or not isinstance(code, int)):
            where = f" for {name!r}" if name else ""
            raise CellMapValueError(f"unknown must be 'metadata', a stored value or null, got {code!r}{where}")
    return dict(value) if isinstance(value, Mapping) else value


def code_of(unknown: Unknown, name: str) -> Code:
    """Return the code that the setting ``unknown`` has for a class."""
    return unknown.get(name, unknown.get("*", "metadata")) if isinstance(unknown, Mapping) else unknown


def check_missing_labels(value: Any) -> MissingLabels:
    """Check the setting ``missing_labels`` and return it.

    Raises:
        CellMapValueError: it is not a policy.
    """
    policy: MissingLabels = one_of("missing_labels", value, MISSING_LABELS)
    return policy


class LabelEncodings:
    """Encodings of the label arrays of one crop, each decided once; see docs/targets.md.

    Args:
        label: name of the crop, for messages.
        unknown: see `Unknown`.
        missing_labels: see `MissingLabels`.
        thorough: compare declared counts with voxels in large arrays too.
        retry_policy: retries and timeouts of reads.

    Attributes:
        decided: for each class whose metadata do not define its encoding, how it is read, in words.
        averaged: for each class and level that holds values that the finest level does not, which.
        filled: for each class that fills its whole crop, though no metadata has its encoding, its values.
        masks: classes whose objects all have the same stored value, by the metadata or the values.
        explicit: classes to which the setting ``unknown`` does not apply, with the code of their metadata.
    """

    def __init__(
        self,
        label: str,
        unknown: Unknown = "metadata",
        missing_labels: MissingLabels = "error",
        thorough: bool = False,
        retry_policy: RetryPolicy = DEFAULT_RETRY,
    ) -> None:
        self.label, self.unknown, self.missing_labels = label, unknown, missing_labels
        self.thorough, self.retry_policy = thorough, retry_policy
        self.decided: dict[str, str] = {}
        self.explicit: dict[str, int | None] = {}
        self.filled: dict[str, str] = {}
        self.masks: set[str] = set()
        self.averaged: dict[tuple[str, str], str] = {}
        self._encodings: dict[tuple[str, str], Encoding] = {}

    def of(self, name: str, image: Multiscale, level: Level) -> Encoding:
        """Return the encoding of a level of a class; that of the whole array for a box of it.

        Raises:
            MetadataError: the encoding is malformed, the values are ambiguous, or chunks are misnamed, or missing where
                the metadata declare voxels.
            ChunkError: a chunk cannot be read.
        """
        key = name, level.name
        image, level = image.whole or image, level.whole or level
        encoding = self._encodings.get(key)
        if encoding is None:
            has_first = check_chunk_names(level.array, f"{self.label}/{name}")
            encoding = self._decide(name, image, level)
            encoding = self._checked(name, image, level, encoding, has_first)
            if level != image.finest and encoding.ids is None and level.array.dtype.kind != "b":
                self._compare_levels(name, image, level, encoding)
            self._encodings[key] = encoding
        return encoding

    def report(self) -> None:
        """Log the decided encodings in one line, and those that may be wrong, or to which a setting does not apply."""
        if self.decided:
            listed = "; ".join(f"{name}: {text}" for name, text in self.decided.items())
            log.info("%s: labels whose metadata have no encoding are read by their values: %s", self.label, listed)
        for name, values in self.filled.items():
            if first_time(f"class {name}", "filled"):
                log.warning(
                    "%s: no voxel of %s is 0 (values %s), so that it is present in the whole crop; deep=true of "
                    "cellmap-inspect lists all crops where it is. If one of the values means absent, as 1 in a mask of "
                    "1 and 2, give the ids their meaning with labels: {2: %s}, see docs/targets.md",
                    self.label, name, values, name,
                )  # fmt: skip
        if self.explicit:
            listed = ", ".join(f"{name} {code}" for name, code in self.explicit.items())
            per_class = isinstance(self.unknown, Mapping)
            log.log(
                logging.WARNING if per_class else logging.INFO,
                "%s: unknown=%s does not apply to classes whose metadata define the code of unknown voxels: %s",
                self.label, self.unknown, listed,
            )  # fmt: skip

    @property
    def _empty(self) -> Empty:
        return "error" if self.missing_labels == "error" else "missing"

    def _code(self, name: str) -> Code:
        return code_of(self.unknown, name)

    def _decide(self, name: str, image: Multiscale, level: Level) -> Encoding:
        """Return the encoding of present, absent and unknown voxels."""
        if level.ids is not None or level.array.dtype.kind == "b" or is_semantic(image, level):
            self.masks.add(name)
        if level.ids is not None:
            return self._by_map(name, level, level.ids)
        dtype = level.array.dtype
        if dtype.kind == "b":
            return Encoding(0, None)
        declared, code = read_encoding(image, level), self._code(name)
        if declared is None:
            if code != "metadata":
                self.decided[name] = f"unknown={'null' if code is None else code}, as set"
                return Encoding(0, code)
            return self._by_values(name, level)
        if declared.ambiguous and (dtype.kind == "f" or np.iinfo(dtype).max > (declared.unknown or 0)):
            return self._ambiguous(name, level, declared, code)
        if code not in ("metadata", declared.unknown):
            self.explicit[name] = declared.unknown
        return replace(declared, ambiguous=False)

    def _by_map(self, name: str, level: Level, ids: LabelIds) -> Encoding:
        """Return the encoding of a class of a label map, after a check that the map lists all stored ids."""
        label = f"{self.label}/{name}"
        unlisted = ids.unlisted(np.array(stored_ids(level, label, self.retry_policy, self._empty)))
        if unlisted:
            raise MetadataError(unlisted_text(f"{label}: {level.path}", unlisted))
        self.decided[name] = f"id {' or '.join(map(str, ids.present))} of a label map"
        return Encoding(0, UNANNOTATED if ids.unknown else None, ids=ids)

    def _check_gray(self, label: str, level: Level, values: LabelValues) -> None:
        """Check that the values up to 255 of an array are not many, as in a mask with smooth or blurred edges.

        Raises:
            MetadataError: they are.
        """
        stored = stored_ids(level, label, self.retry_policy, self._empty)
        if len(stored) >= _GRAY and stored[-2] > CODE // 2:  # ids are rather counted from 1
            raise MetadataError(
                f"{label}: {level.path} holds {values}, {len(stored)} different values: a mask that was resized, "
                "smoothed or saved as JPEG needs a threshold, as in (mask >= 128) * 255; if they are ids of objects, "
                f"no metadata say whether {CODE} means unknown or is an id: set unknown={CODE} or unknown=null for "
                "this crop or class"
            )

    def _by_values(self, name: str, level: Level) -> Encoding:
        """Decide the encoding of an array without metadata for it, by its values."""
        label = f"{self.label}/{name}"
        values = label_values(level, label, CODE, self.retry_policy, self._empty)
        self._check_unambiguous(label, level, values)
        if values.complete and not values.zero and (values.one or values.other):
            self.filled[name] = str(values)
        self.decided[name] = (
            f"values {values}, a mask in which {CODE} is present" if values.code
            else f"values {values}, ids" if values.other
            else f"values {values}, 1 is present"
        )  # fmt: skip
        if values.complete and not values.other:
            self.masks.add(name)
        return Encoding(0, None, assumed="" if values.complete else "mask" if values.code else "ids")

    def _check_unambiguous(self, label: str, level: Level, values: LabelValues) -> None:
        """Check that the values of an array without an encoding have one meaning.

        Raises:
            MetadataError: a value is negative, or the code may mean unknown, present or an id.
        """
        if values.negative is not None:
            raise MetadataError(
                f"{label}: {level.path} holds the negative label {values.negative} and no encoding that explains it; "
                f"if it means unknown, set unknown={values.negative} for this crop or class"
            )
        if values.code and not (values.zero or values.one or values.other):
            raise MetadataError(
                f"{label}: {level.path}: all {'' if values.complete else 'examined '}voxels are {CODE}, and no "
                f"metadata say whether {CODE} means present, as in a mask of 0 and {CODE}, or unknown, as in CellMap's "
                f"encoding: set unknown=null (present) or unknown={CODE} for this crop or class"
            )
        if values.code and values.other and not values.above:
            self._check_gray(label, level, values)
        if values.code and (values.one or values.other):
            raise MetadataError(
                f"{label}: {level.path} holds {values}, and no metadata say whether {CODE} means unknown or is an id: "
                f"set unknown={CODE} or unknown=null for this crop or class" + _averaged(values, level)
            )

    def _ambiguous(self, name: str, level: Level, declared: Encoding, code: Code) -> Encoding:
        """Decide an instance segmentation in which the code of unknown voxels may also be an id."""
        assert declared.unknown is not None
        label = f"{self.label}/{name}"
        values = label_values(level, label, declared.unknown, self.retry_policy, self._empty)
        if not (values.above and values.code):  # the code cannot be an id, or does not occur
            if code not in ("metadata", declared.unknown):
                self.explicit[name] = declared.unknown
            return replace(declared, ambiguous=not values.complete)
        if code == "metadata":
            raise MetadataError(
                f"{label}: {level.path} holds ids above {declared.unknown}, and nothing says whether "
                f"{declared.unknown} means unknown or is an instance: its attributes have no complement_counts.unknown."
                f" Set unknown={declared.unknown} or unknown=null for this crop or class"
            )
        self.decided[name] = f"ids above {declared.unknown}, unknown={'null' if code is None else code}, as set"
        return Encoding(declared.absent, code)

    def _checked(self, name: str, image: Multiscale, level: Level, encoding: Encoding, has_first: bool) -> Encoding:
        """Return the encoding, completed by the meaning of missing chunks, after a check of declared counts."""
        thorough = self.thorough or self.missing_labels == "unknown"
        if self.missing_labels == "unknown":
            code = UNKNOWN_CODE if encoding.unknown is None else encoding.unknown
            encoding = replace(encoding, missing="empty", unknown=code)
        label = f"{self.label}/{name}"
        problem = check_declared_counts(level, encoding, label, thorough, self.retry_policy, has_first, image)
        if not has_first and level != image.finest:
            problem = problem or check_empty_level(level, image, encoding, label, self.retry_policy)
        if problem is None:
            return encoding
        if self.missing_labels == "error":
            raise MetadataError(problem)
        log.warning("%s; missing_labels=unknown", problem.rpartition(";")[0])
        return replace(encoding, missing="unknown")

    def _compare_levels(self, name: str, image: Multiscale, level: Level, encoding: Encoding) -> None:
        """Compare the values of a coarser level with those of the finest, which an averaged level does not share.

        Raises:
            MetadataError: it holds values between absent and present of an encoding, and the finest does not.
        """
        label, present = f"{self.label}/{name}", declared_present(image, level)
        if read_encoding(image, level) is not None:
            low, high = sorted((encoding.absent, encoding.absent if present is None else present))
            if high - low < 2:  # nothing lies between them, as with 0 and 1
                return
            found = self._between(level, label, low, high, encoding)
            if found and not self._between(image.finest, label, low, high, encoding):
                raise MetadataError(
                    f"{label}: {level.path} holds {first_few(found)}, which its encoding does not explain (absent "
                    f"{encoding.absent}, present {present}), and {image.finest.name} holds no such value. If "
                    f"{level.name} was made by averaging, label_downsample=majority reads the finest level instead"
                )
        elif math.prod(image.finest.array.shape) <= MOST_VOXELS:  # of larger arrays, not all values are known
            values = set(self._ids(level, label)) - {0, 1, encoding.unknown}
            found = sorted(values.difference(self._ids(image.finest, label))) if 0 < len(values) < MOST_IDS else []
            if found:
                text = self.averaged[name, level.name] = (
                    f"{level.name} holds {first_few(found)}, which {image.finest.name} does not: it was probably made "
                    "by averaging, and label_downsample=majority reads the finest level instead"
                )
                log.warning("%s: %s: level %s", label, image.path, text)

    def _between(self, level: Level, label: str, low: int, high: int, encoding: Encoding) -> list[int]:
        """Return the stored values between two others, apart from that of unknown voxels."""
        return [value for value in self._ids(level, label) if low < value < high and value != encoding.unknown]

    def _ids(self, level: Level, label: str) -> list[int]:
        return stored_ids(level, label, self.retry_policy, self._empty)


def _averaged(values: LabelValues, level: Level) -> str:
    """Return a hint if the values look like those of an averaged mask; else an empty text."""
    return (
        f". If {level.name} was made by averaging a mask of 0 and {CODE}, label_downsample=majority reads the finest "
        "level instead"
        if values.zero and values.other and level.name not in ("s0", "0")
        else ""
    )
