"""How the stored integers of a crop's label arrays are read: by their metadata, by a setting, or by their values."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError, MetadataError
from cellmap_lightning.io.chunk_names import check_chunk_names
from cellmap_lightning.io.chunks import Empty
from cellmap_lightning.io.declared_counts import check_declared_counts, warn_of_empty_level
from cellmap_lightning.io.label_values import CODE, LabelValues, label_values
from cellmap_lightning.io.ngff import UNKNOWN_CODE, Encoding, Level, Multiscale, read_encoding
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy

log = logging.getLogger(__name__)

#: The code of unknown voxels in arrays whose metadata leave it open: decided by the values (``metadata``), a stored
#: value, or None where every value is meant.
Code = int | None | Literal["metadata"]
#: The same for all classes, or ``{class: code}``; for classes that it does not name that of ``"*"``, else ``metadata``.
Unknown = Code | Mapping[str, Code]
#: What chunks of labels are that have 0 bytes, or are missing although the metadata promise voxels in them.
MissingLabels = Literal["error", "unknown"]
MISSING_LABELS = ("error", "unknown")


def check_unknown(value: Any) -> Unknown:
    """Return the setting ``unknown`` if it is one.

    Raises:
        CellMapValueError: a code that is none.
        CellMapTypeError: a mapping whose keys are not names of classes.
    """
    codes = value if isinstance(value, Mapping) else {"": value}
    for name, code in codes.items():
        if not isinstance(name, str):
            raise CellMapTypeError(f"unknown must be a code or {{class: code}}, got the key {name!r}")
        if code not in ("metadata", None) and (isinstance(code, bool) or not isinstance(code, int)):
            where = f" for {name!r}" if name else ""
            raise CellMapValueError(f"unknown must be 'metadata', a stored value or null, got {code!r}{where}")
    return dict(value) if isinstance(value, Mapping) else value


def check_missing_labels(value: Any) -> MissingLabels:
    """Return the policy of that name.

    Raises:
        CellMapValueError: there is none.
    """
    if value not in MISSING_LABELS:
        raise CellMapValueError(f"missing_labels must be one of {', '.join(MISSING_LABELS)}, got {value!r}")
    policy: MissingLabels = value
    return policy


class LabelEncodings:
    """Encodings of the label arrays of one crop, each decided once.

    Args:
        label: name of the crop, for messages.
        unknown: see `Unknown`.
        missing_labels: see `MissingLabels`.
        thorough: compare counts with voxels also in large arrays.
        retry_policy: retries and deadlines of the reads.
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
        #: How each class is read whose metadata leave it open, in words.
        self.decided: dict[str, str] = {}
        #: Classes to which the setting ``unknown`` does not apply, with the code of their metadata.
        self.explicit: dict[str, int | None] = {}
        self._known: dict[tuple[str, str], Encoding] = {}

    def of(self, name: str, image: Multiscale, level: Level) -> Encoding:
        """Return the encoding of a level of a class.

        Raises:
            MetadataError: the encoding is malformed, the values are ambiguous, the chunks are named otherwise than the
                metadata say, or are missing where the metadata promise voxels.
            ChunkError: a chunk cannot be read.
        """
        key = name, level.name
        encoding = self._known.get(key)
        if encoding is None:
            has_first = check_chunk_names(level.array, f"{self.label}/{name}")
            encoding = self._decide(name, image, level)
            encoding = self._known[key] = self._checked(name, image, level, encoding, has_first)
        return encoding

    def report(self) -> None:
        """Log what was decided, one line; and one where a setting does not apply."""
        if self.decided:
            listed = "; ".join(f"{name}: {text}" for name, text in self.decided.items())
            log.info("%s: labels whose metadata have no encoding are read by their values: %s", self.label, listed)
        if self.explicit:
            listed = ", ".join(f"{name} {code}" for name, code in self.explicit.items())
            named = isinstance(self.unknown, Mapping)
            log.log(
                logging.WARNING if named else logging.INFO,
                "%s: unknown=%s does not apply to classes whose metadata say what is unknown: %s",
                self.label, self.unknown, listed,
            )  # fmt: skip

    @property
    def _empty(self) -> Empty:
        return "error" if self.missing_labels == "error" else "missing"

    def _code(self, name: str) -> Code:
        if not isinstance(self.unknown, Mapping):
            return self.unknown
        return self.unknown.get(name, self.unknown.get("*", "metadata"))

    def _decide(self, name: str, image: Multiscale, level: Level) -> Encoding:
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

    def _by_values(self, name: str, level: Level) -> Encoding:
        """Decide the encoding of an array that has no metadata for it."""
        label = f"{self.label}/{name}"
        values = label_values(level, label, CODE, self.retry_policy, self._empty)
        if values.negative is not None:
            raise MetadataError(
                f"{label}: {level.path} holds the negative label {values.negative} and no encoding that explains it; "
                f"if it means unknown, set unknown={values.negative} for this crop or class"
            )
        if values.code and (values.one or values.other):
            raise MetadataError(
                f"{label}: {level.path} holds {values}, and no metadata say whether {CODE} means unknown or is an id: "
                f"set unknown={CODE} or unknown=null for this crop or class" + _averaged(values, level)
            )
        self.decided[name] = (
            f"values {values}, a mask in which {CODE} is present" if values.code
            else f"values {values}, ids" if values.other
            else f"values {values}, 1 is present"
        )  # fmt: skip
        return Encoding(0, None, assumed="" if values.complete else "mask" if values.code else "ids")

    def _ambiguous(self, name: str, level: Level, declared: Encoding, code: Code) -> Encoding:
        """Decide an instance segmentation in which the code of unknown voxels may also be an id."""
        assert declared.unknown is not None
        label = f"{self.label}/{name}"
        values = label_values(level, label, declared.unknown, self.retry_policy, self._empty)
        if not (values.above and values.code):  # the code is no id, or does not occur
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
        """Return the encoding with the meaning of missing chunks."""
        thorough = self.thorough or self.missing_labels == "unknown"
        if self.missing_labels == "unknown":
            code = UNKNOWN_CODE if encoding.unknown is None else encoding.unknown
            encoding = replace(encoding, missing="empty", unknown=code)
        label = f"{self.label}/{name}"
        wrong = check_declared_counts(level, encoding, label, thorough, self.retry_policy, has_first, image)
        if not has_first and level != image.finest:
            warn_of_empty_level(level, image, label)
        if wrong is None:
            return encoding
        if self.missing_labels == "error":
            raise MetadataError(wrong)
        log.warning("%s; missing_labels=unknown", wrong.rpartition(";")[0])
        return replace(encoding, missing="unknown")


def _averaged(values: LabelValues, level: Level) -> str:
    """A hint where the values look like those of an averaged mask."""
    return (
        f". If {level.name} was made by averaging a mask of 0 and {CODE}, label_downsample=majority reads the finest "
        "level instead"
        if values.zero and values.other and level.name not in ("s0", "0")
        else ""
    )
