"""The prediction that is segmented: its kind, its channels and its voxels."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from cellmap_lightning.crops.encodings import Code, Unknown, check_unknown, code_of
from cellmap_lightning.errors import (
    CellMapError,
    CellMapFileNotFoundError,
    CellMapKeyError,
    CellMapValueError,
    MetadataError,
)
from cellmap_lightning.geometry.lattice import Lattice, Shape
from cellmap_lightning.instances.mutex_watershed import check_offsets
from cellmap_lightning.instances.options import InputKind
from cellmap_lightning.instances.predicted_channels import channels_of, target_of
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.meanings import Meaning, ValuesSetting, meaning_of
from cellmap_lightning.io.missing_paths import similar_path
from cellmap_lightning.io.ngff import Encoding, Level, Multiscale, read_attributes, read_encoding, read_multiscale
from cellmap_lightning.io.ngff.arrays import read_array
from cellmap_lightning.io.store import Remote, StorePath, children, exists, parse_location
from cellmap_lightning.prediction.output_checks import check_finished
from cellmap_lightning.validation import did_you_mean, one_of

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
#: Keys of attributes about the values of a prediction.
_NOTES = ("kind", "offsets", "offset", "nm", "zero", "range")
#: Names of kinds in attributes.
_NAMES: dict[str, InputKind] = {
    "probability": "probability", "scaled": "probability", "binary": "probability", "multiclass": "probability",
    "mask": "mask", "sdt": "distance", "signed_distance": "distance", "distance": "distance",
    "affinities": "affinities", "affinity": "affinities", "boundary": "boundary", "boundaries": "boundary",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class SegmentationSource:
    """The stored prediction of one class; see `open_source`.

    Attributes:
        path: the group of the class.
        name: the class.
        kind: the kind of its values.
        lattice: its voxels at full resolution.
        offsets: the offset of each channel of affinities, voxels; empty for other kinds.
        readers: the readers of its channels.
        meaning: the meaning of stored probabilities; None for distances.
        scale: nm of a stored unit of distance.
        zero: the stored value of distance 0.
        record: what identifies the prediction, in the record of the segmentation.
    """

    path: StorePath
    name: str
    kind: InputKind
    lattice: Lattice
    offsets: tuple[Shape, ...]
    readers: tuple[ChunkReader, ...]
    meaning: Meaning | None
    scale: float
    zero: float
    record: dict[str, Any]

    @property
    def depth(self) -> int:
        """The planes of a stored chunk."""
        return max(reader.chunks[0] for reader in self.readers)

    @property
    def annotation(self) -> Path | None:
        """The group, if it is a mask on this machine that is no recorded prediction; else None."""
        is_annotation = self.kind == "mask" and not self.record["checksum"]
        return self.path if is_annotation and isinstance(self.path, Path) else None

    def read(self, start: Shape, shape: Shape) -> Floats:
        """Return probabilities, or distances in nm, of a box; ``[C, z, y, x]`` for affinities, else ``[z, y, x]``.

        Raises:
            ChunkError: a chunk cannot be read.
            CellMapValueError: values are NaN.
        """
        if self.kind != "affinities":
            return self._values(self.readers[0], start, shape)
        values = np.empty((len(self.readers), *shape), np.float32)
        for channel, reader in enumerate(self.readers):
            values[channel] = self._values(reader, start, shape)
        return values

    def unknown(self, start: Shape, shape: Shape) -> npt.NDArray[np.bool_] | None:
        """Return a mask ``[z, y, x]`` of the unannotated voxels of a box; None where no value means unknown.

        Raises:
            ChunkError: a chunk cannot be read.
        """
        if self.meaning is None or not self.meaning.is_labels or self.meaning.encoding.unknown is None:
            return None
        unknown: npt.NDArray[np.bool_] = self.readers[0].read(start, shape) == self.meaning.encoding.unknown
        return unknown

    def stamp(self, start: Shape, shape: Shape) -> int:
        """Return a number (63 bits) that changes when the stored files of a box do; see `ChunkReader.stamp`."""
        total = sum(n * reader.stamp(start, shape) for n, reader in enumerate(self.readers, 1))
        return total & (1 << 63) - 1

    def _values(self, reader: ChunkReader, start: Shape, shape: Shape) -> Floats:
        stored = reader.read(start, shape)
        if self.meaning is None:
            values = (stored.astype(np.float32) - np.float32(self.zero)) * np.float32(self.scale)
        elif self.meaning.is_labels:
            values = self.meaning.present(stored, 1).astype(np.float32)
            if self.kind == "boundary" and self.meaning.encoding.unknown is not None:
                values[stored == self.meaning.encoding.unknown] = 1  # no object lies there
        else:
            values = stored.astype(np.float32)
            if self.meaning.one != 1:
                values /= np.float32(self.meaning.one)
        if stored.dtype.kind == "f" and np.isnan(values).any():
            raise CellMapValueError(f"{reader.where(start, shape)} contain NaN; predict them again, or replace NaN")
        return values


def open_source(
    location: str,
    class_name: str | None = None,
    kind: InputKind | None = None,
    offsets: Sequence[Sequence[int]] | None = None,
    channels: Sequence[str] | None = None,
    values: ValuesSetting = "auto",
    unknown: Unknown = "metadata",
) -> SegmentationSource:
    """Open a prediction, as ``cellmap-predict`` writes it.

    Args:
        location: the Zarr group with one group per class, or the group of the class.
        class_name: the class; None for the only one.
        kind: the kind of its values; None for that in the metadata.
        offsets: the offset of each channel of affinities, voxels (z, y, x); None for those in the metadata.
        channels: names of the groups in ``location`` that are the channels of affinities, each with one; None for the
            channels of the array of the class.
        values: see `meaning_of`.
        unknown: the stored value of unannotated voxels of an annotation, if the metadata do not define it; see
            `LabelOptions`.

    Raises:
        CellMapFileNotFoundError: it does not exist.
        CellMapKeyError: there is no such class.
        CellMapValueError: the prediction is not finished, or of a kind that cannot be segmented; or ``unknown`` is
            given for values that are no labels.
    """
    if kind is not None:
        one_of("kind", kind, get_args(InputKind))
    root = _existing_group(location)
    if channels is None and class_name is not None:
        channels = _described_channels(root, class_name, kind)
    path, name = (root / channels[0], str(class_name)) if channels and class_name else _class_group(root, class_name)
    check_finished(root, path, path.parent)
    images = _read_images(path, [path] if channels is None else [_child(root, channel) for channel in channels])
    notes = _joined_notes(images)
    levels = [level for image in images for level in _channels(image)]
    code = code_of(check_unknown(unknown), name)
    number = code if isinstance(code, int) else None
    kind = kind or _kind(notes, images[0], len(levels), values, number)
    where = f"input={location}, class={name}"
    directions = _directions(where, kind, offsets if offsets is not None else notes.get("offsets"), len(levels))
    readers = _readers(where, levels, name)
    meaning = None if kind == "distance" else _meaning(images[0], name, values, kind, readers[0].dtype, number)
    meaning = _with_unknown(where, meaning, images[0], code)
    scale, zero = _distance_scale(notes, readers[0].dtype)
    record = _record(root, path, channels or (), code)
    return SegmentationSource(path, name, kind, levels[0].lattice, directions, readers, meaning, scale, zero, record)


def _existing_group(location: str) -> StorePath:
    """Return the group at a location.

    Raises:
        CellMapFileNotFoundError: it does not exist.
    """
    root = parse_location(location)
    if not exists(root):
        similar = "" if isinstance(root, Remote) else similar_path(root)
        raise CellMapFileNotFoundError(
            f"input={location}: it does not exist{similar}; give the output of cellmap-predict"
        )
    return root


def _described_channels(root: StorePath, name: str, kind: InputKind | None) -> list[str] | None:
    """Return the groups that record to be channels of a class; None where the class has a group itself, or has none."""
    if root.name == name or exists(root / name):
        return None
    return channels_of(root, name, kind, _NAMES) or None


def _read_images(path: StorePath, groups: Sequence[StorePath]) -> list[Multiscale]:
    """Read the metadata of the channels.

    Raises:
        MetadataError: one cannot be read.
    """
    try:
        return [read_multiscale(group) for group in groups]
    except CellMapError as e:
        raise MetadataError(f"{path} cannot be read, or its prediction is not finished: {e}") from e


def _directions(where: str, kind: InputKind, offsets: Any, count: int) -> tuple[Shape, ...]:
    """Return the offsets of affinities after a check; none for other kinds, which have one channel.

    Raises:
        CellMapValueError: they are missing, or do not fit the channels, or another kind has several channels.
    """
    if kind != "affinities":
        if count != 1:
            raise CellMapValueError(f"{where}: {count} channels are no {kind}; set kind=affinities and offsets")
        return ()
    if not isinstance(offsets, Sequence) or not offsets:
        raise CellMapValueError(f"{where}: affinities without offsets in the metadata; set offsets=[[-1,0,0],...]")
    return check_offsets(offsets, count)


def _readers(where: str, levels: Sequence[Level], name: str) -> tuple[ChunkReader, ...]:
    """Return a reader of each channel.

    Raises:
        CellMapValueError: their shapes differ.
    """
    readers = tuple(ChunkReader(level, name) for level in levels)
    if any(reader.shape != readers[0].shape for reader in readers):
        raise CellMapValueError(f"{where}: the shapes of the channels differ; predict them together")
    return readers


def _child(group: StorePath, name: str) -> StorePath:
    """Return a group inside of another.

    Raises:
        CellMapKeyError: there is no such group.
    """
    path = group / name
    if not exists(path):
        names = sorted(child for child in children(group) if not child.startswith(".") and child != "OME")
        hint = did_you_mean(name, names)
        raise CellMapKeyError(f"{group}: it has no class {name!r}{hint}; it has {', '.join(names) or 'none'}")
    return path


def _class_group(root: StorePath, name: str | None) -> tuple[StorePath, str]:
    """Return the group of a class, and its name."""
    if name is not None:
        if root.name == name and not exists(root / name):
            return root, name
        return _child(root, name), name
    attributes = read_attributes(root)
    if attributes is not None and ("multiscales" in attributes[0] or "multiscales" in attributes[0].get("ome", {})):
        return root, root.name
    names = sorted(child for child in children(root) if not child.startswith(".") and child != "OME")
    names = [child for child in names if read_attributes(root / child) is not None]
    if len(names) != 1:
        raise CellMapValueError(f"class: {root} has {', '.join(names) or 'no classes'}; choose one with class=...")
    return root / names[0], names[0]


def _notes(image: Multiscale) -> dict[str, Any]:
    """Return what the attributes of a prediction record about its values: ``kind``, ``offsets``, ``nm``."""
    notes: dict[str, Any] = {}
    array = read_array(image.levels[0].path)
    for attributes in (array.attributes if array is not None else {}, image.attributes):
        block = attributes.get("cellmap")
        block = block if isinstance(block, Mapping) else {}
        for part in (block, block.get("prediction"), block.get("target"), target_of(attributes)):
            if isinstance(part, Mapping):
                notes.update({key: part[key] for key in _NOTES if part.get(key) is not None})
    return notes


def _record(root: StorePath, path: StorePath, channels: Sequence[str], code: Code) -> dict[str, Any]:
    """Return what identifies a prediction, and the setting ``unknown`` that replaces its metadata."""
    record: dict[str, Any] = {"input": str(path), "channels": list(channels), "checksum": _identity(root)}
    if code != "metadata":
        record["unknown"] = code
    return record


def _joined_notes(images: Sequence[Multiscale]) -> dict[str, Any]:
    """Return the notes of the first channel, with the offsets of all where each records one."""
    notes = _notes(images[0])
    if "offset" in notes:
        notes["offsets"] = [_notes(image).get("offset") for image in images]
    return notes


def _channels(image: Multiscale) -> list[Level]:
    """Return the finest level of an image, once for each channel."""
    level = image.levels[0]
    info = read_array(level.path)
    if info is None or len(info.shape) != level.ndim:
        return [image.finest]
    others = [(axis, n) for axis, n in enumerate(info.shape) if axis not in level.axes and n > 1]
    if len(others) > 1:
        raise MetadataError(
            f"{level.path}: the shape {list(info.shape)} has several axes of channels; store one of them"
        )
    return [replace(level, channel=channel) for channel in range(others[0][1])] if others else [image.finest]


def _kind(
    notes: Mapping[str, Any], image: Multiscale, channels: int, values: ValuesSetting, unknown: int | None
) -> InputKind:
    """Return the kind of a prediction, from its metadata."""
    recorded = notes.get("kind")
    if recorded is not None:
        if recorded not in _NAMES:
            raise CellMapValueError(
                f"{image.path}: predictions of the kind {recorded!r} cannot be segmented; set kind to one of "
                f"{', '.join(get_args(InputKind))} if they are"
            )
        return _NAMES[str(recorded)]
    if channels > 1 or "offsets" in notes:
        return "affinities"
    stored = meaning_of(image, str(image.path.name), values, unknown).kind
    if stored == "ids":
        raise CellMapValueError(f"{image.path}: it holds ids of objects already; segment the probabilities")
    return "mask" if stored == "mask" else "probability"


def _meaning(
    image: Multiscale, name: str, values: ValuesSetting, kind: InputKind, dtype: np.dtype[Any], unknown: int | None
) -> Meaning:
    """Return the meaning of stored probabilities."""
    if kind == "affinities" and values == "auto" and dtype.kind in "iu":
        return Meaning("scaled", float(np.iinfo(dtype).max))
    if kind == "affinities" and values == "auto":
        return Meaning("probability")
    return meaning_of(image, name, values, unknown)


def _with_unknown(where: str, meaning: Meaning | None, image: Multiscale, code: Code) -> Meaning | None:
    """Return a meaning with the code of unannotated voxels, where the metadata leave it open.

    Raises:
        CellMapValueError: the values are no labels, so that no code means unannotated.
    """
    if code == "metadata" or (code is None and (meaning is None or not meaning.is_labels)):
        return meaning
    if meaning is None or not meaning.is_labels:
        raise CellMapValueError(
            f"{where}: unknown={code} is the value of unannotated voxels of a mask, and the values are "
            f"{'distances' if meaning is None else meaning.kind}; leave unknown out, or set values=mask if they are one"
        )
    declared = read_encoding(image, image.finest)
    if (declared is None or declared.ambiguous) and image.finest.array.dtype.kind != "b":
        encoding = Encoding(0 if declared is None else declared.absent, code)
        return replace(meaning, encoding=encoding)
    own = None if declared is None else declared.unknown
    if code != own:
        log.warning(
            "%s: unknown=%s does not apply, as %s", where, "null" if code is None else code,
            "a boolean mask has no unknown voxels" if declared is None
            else f"the metadata define the code of unknown voxels: {'none' if own is None else own}",
        )  # fmt: skip
    return meaning


def _distance_scale(notes: Mapping[str, Any], dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return the nm of a stored unit of distance, and the stored value of 0.

    Floats are nm. Whole numbers are ``nm`` at the largest value of the type, and 0 in its middle.
    """
    limit = notes.get("nm")
    if notes.get("range") == [-1, 1] and isinstance(limit, int | float):  # as cellmap-predict stores it
        middle = 0.0 if dtype.kind == "f" else np.iinfo(dtype).max / 2
        return float(limit) / (middle or 1.0), middle
    if dtype.kind == "f" or isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
        return 1.0, 0.0
    top = np.iinfo(dtype).max
    zero = float(notes.get("zero", (top + 1) // 2 if dtype.kind == "u" else 0))
    return (float(limit) / (top - zero), zero) if math.isfinite(limit) else (1.0, 0.0)


def _identity(root: StorePath) -> str:
    """Return the checksum of the record of a finished prediction, or nothing."""
    attributes = read_attributes(root)
    block = attributes[0].get("cellmap") if attributes is not None else None
    record = block.get("prediction") if isinstance(block, Mapping) else None
    return str(record.get("checksum", "")) if isinstance(record, Mapping) else ""
