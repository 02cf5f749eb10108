"""Datasets in HDF5 files, named by ``volume.h5/path/of/dataset``.

Voxel sizes: the attribute ``element_size_um`` (z, y, x; https://imagej.net/plugins/hdf5), or ``resolution`` and
``offset`` in nm; see `attribute_voxels`. Names of axes: HDF5's dimension labels, or ilastik's ``axistags``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.errors import CellMapError, CellMapFileNotFoundError, MetadataError, missing_extra
from cellmap_lightning.geometry.lattice import AXES, Vector, to_vector
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.formats.hdf5_links import link_names, resolved
from cellmap_lightning.io.formats.hdf5_sources import has_gaps, is_incomplete
from cellmap_lightning.io.formats.open_files import OPEN_FILES
from cellmap_lightning.io.formats.volume import AXIS_NAMES, FormatArray, FormatLevel, FormatVolume
from cellmap_lightning.io.ngff import Note
from cellmap_lightning.io.ngff.attribute_voxels import attribute_voxels, element_size
from cellmap_lightning.io.ngff.near_keys import check_voxel_size, unread_offset, unread_voxel_size
from cellmap_lightning.io.ngff.notes import FOR_ENTRY, OF_PREDICT
from cellmap_lightning.io.store import StorePath
from cellmap_lightning.validation import did_you_mean, first_few

#: Suffixes of HDF5 files.
SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5", ".ilp")
#: Bytes of a dataset without chunks from which slow access is reported.
_LARGE = 1 << 28


class Hdf5Format:
    """HDF5 files; the path of a dataset follows that of its file, and may be left out of a file with one dataset."""

    name = "HDF5"
    suffixes = SUFFIXES

    def matches(self, path: StorePath) -> bool:
        """Return whether a location is an HDF5 file, or is named as a dataset in one."""
        return isinstance(path, Path) and _split(path) is not None

    def open(self, path: StorePath) -> FormatVolume:
        """Read the metadata of a dataset.

        Raises:
            MissingExtraError: h5py is not installed.
            CellMapFileNotFoundError: the file has no such dataset; the message lists those that it has.
            MetadataError: it is not an HDF5 file, not a dataset of numbers, or a virtual dataset that lacks a source.
        """
        parts = _split(path) if isinstance(path, Path) else None
        assert parts is not None
        container, inside = parts
        with OPEN_FILES.use(_opened, str(container)) as file:
            names = _datasets(file)
            if not inside and len(names) == 1:
                inside = names[0]
            if inside and inside not in names:
                inside = resolved(file, container, inside)
            if inside not in names:
                wrong = f"has no dataset {inside!r}{did_you_mean(inside, names)}" if inside else "needs a dataset"
                raise CellMapFileNotFoundError(
                    f"{container}: {wrong}; give {container.name}/<dataset>, one of {first_few(names, 12) or 'none'}"
                )
            dataset = file[inside]
            attributes = {name: _plain(value) for name, value in dataset.attrs.items()}
            axes = _axes(dataset, attributes)
            array = _Hdf5Array(
                container / inside, dataset.shape, dataset.dtype, dataset.chunks, container=container,
                attributes=attributes, codec=dataset.compression or "none", details=(inside, str(container)),
            )  # fmt: skip
            nbytes = dataset.size * dataset.dtype.itemsize
            gaps, fill = has_gaps(container, dataset), dataset.fillvalue
            array.incomplete = is_incomplete(dataset)
        array.inside = inside
        notes = []
        if array.is_contiguous and nbytes > _LARGE:
            text = (
                f"the dataset {inside} has no chunks, so that patches are read in short runs: convert it with "
                "cellmap-convert, or store it with chunks"
            )
            notes.append(Note("access", text))
        if gaps:
            text = f"parts of the virtual dataset {inside} are not stored, and are read as its fill value {fill}"
            notes.append(Note("sources", text))
        size, translation, problem = None, (0.0, 0.0, 0.0), ""
        try:
            size, translation = _voxels(container / inside, attributes, len(array.shape), axes)
        except MetadataError as e:  # the setting voxel_size may replace it
            problem = str(e)
        level = FormatLevel(inside, array, axes, size or (1.0, 1.0, 1.0), translation)
        return FormatVolume(
            (level,), size is not None, attributes=attributes, notes=tuple(notes), voxel_size_problem=problem
        )

    def children(self, path: StorePath) -> list[str]:
        """Return the names of the datasets and groups in a file or a group."""
        parts = _split(path) if isinstance(path, Path) else None
        if parts is None:
            return []
        with OPEN_FILES.use(_opened, str(parts[0])) as file:
            names = _names(file, *parts)
        return sorted({name.partition("/")[0] for name in names})


class _Hdf5Array(FormatArray):
    """A dataset. All reads of a process are serialized by h5py."""

    inside = ""
    #: Whether some of its chunks were never written, or all of a dataset without chunks.
    incomplete = False

    def has_chunk(self, index: Sequence[int]) -> bool:
        """Return whether a chunk was written; any other shows the fill value."""
        if not self.incomplete:
            return True
        with OPEN_FILES.use(_opened, str(self.container)) as file:
            if file[self.inside].chunks is None:
                return False
            corner = tuple(int(i) * n for i, n in zip(index, self.chunks, strict=True))
            return file[self.inside].id.get_chunk_info_by_coord(corner).byte_offset is not None

    @property
    def is_contiguous(self) -> bool:
        return self.chunks == tuple(min(64, n) for n in self.shape)

    def read(self, start: Sequence[int], shape: Sequence[int]) -> AnyArray:
        box = tuple(slice(first, first + count) for first, count in zip(start, shape, strict=True))
        with OPEN_FILES.use(_opened, str(self.container)) as file:
            return np.asarray(file[self.inside][box])


def _opened(path: str) -> Any:
    try:
        import h5py
    except ImportError:
        raise missing_extra("hdf5", f"{path}: HDF5 files need h5py") from None
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as e:
        raise MetadataError(f"{path}: not a whole HDF5 file ({e}); copy or write it again") from e


def _split(path: Path) -> tuple[Path, str] | None:
    """Return the file of a location and the path of a dataset in it; None where there is no HDF5 file."""
    for place in (path, *path.parents):
        if place.suffix in SUFFIXES and place.is_file():
            return place, path.relative_to(place).as_posix().strip(".")
    return None


def _names(file: Any, container: Path, group: str) -> list[str]:
    """Return the paths of datasets below a group, with those of links to datasets and of links that lead nowhere."""
    try:
        start = f"{resolved(file, container, group)}/" if group else ""
    except CellMapError:  # opening it reports the error
        return []
    datasets = _datasets(file)
    names = list(datasets)
    for name in link_names(file):
        try:
            target = resolved(file, container, name)
        except CellMapError:
            names.append(name)
        else:
            names += [name] if any(f"{dataset}/".startswith(f"{target}/") for dataset in datasets) else []
    return [name.removeprefix(start) for name in names if name.startswith(start)]


def _datasets(file: Any) -> list[str]:
    """Return the paths of all datasets of two axes or more."""
    names: list[str] = []

    def visit(name: str, item: Any) -> None:
        if len(getattr(item, "shape", None) or ()) >= 2:
            names.append(name)

    file.visititems(visit)
    return names


def _plain(value: Any) -> Any:
    """Return an attribute as Python's own types."""
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _axes(dataset: Any, attributes: Mapping[str, Any]) -> str:
    """Return the names of the stored axes; empty where the file has none."""
    labels = [dimension.label.lower() for dimension in dataset.dims]
    try:
        tags = [str(axis["key"]).lower() for axis in json.loads(attributes["axistags"])["axes"]]
    except (KeyError, TypeError, ValueError):
        tags = []
    for names in (labels, tags):
        if len(names) == len(dataset.shape) and set(AXES) <= set(names) and all(len(name) == 1 for name in names):
            return "".join(names)
    return ""


def _voxels(path: Path, attributes: Mapping[str, Any], ndim: int, names: str) -> tuple[Vector | None, Vector]:
    """Return voxel size (None without one) and centre of voxel 0, nm (z, y, x)."""
    names = names or AXIS_NAMES[-ndim:]
    if not set(AXES) <= set(names):
        return None, (0.0, 0.0, 0.0)
    stored = attribute_voxels(path, attributes, ndim, (names.index("z"), names.index("y"), names.index("x")))
    if "element_size_um" in attributes:
        size = element_size(path, attributes["element_size_um"], ndim)
        if stored is None:
            _check_others(path, attributes, size)
            return size, (0.0, 0.0, 0.0)
        if not np.allclose(stored[0], size, rtol=1e-3, atol=0):
            raise MetadataError(
                f"{path}: its voxel size is {list(size)} nm by element_size_um and {list(stored[0])} nm by its other "
                f"attributes (z, y, x), which contradict each other; set voxel_size=[z, y, x] in nm{FOR_ENTRY}"
            )
    unread = unread_voxel_size(attributes) if stored is None else ""
    if unread:
        raise MetadataError(f"{path}: {unread}; rename it, or set voxel_size=[z, y, x] in nm{FOR_ENTRY}{OF_PREDICT}")
    return stored if stored is not None else (None, (0.0, 0.0, 0.0))


def _check_others(path: Path, attributes: Mapping[str, Any], size: Vector) -> None:
    """Check that a dataset whose voxel size is that of ``element_size_um`` has no other voxel size and no position.

    Raises:
        MetadataError: an attribute has another voxel size, or a position whose unit is not known.
    """
    remedy = f"set voxel_size=[z, y, x] in nm and translation{FOR_ENTRY}{OF_PREDICT}"
    check_voxel_size(path, attributes, [size, to_vector(np.divide(size, 1000))], remedy)
    unread = unread_offset(attributes)
    if unread:
        raise MetadataError(
            f"{path}: {unread}, since positions are read beside voxel_size or resolution only, and the voxel size is "
            f"element_size_um; store resolution in the same unit, or {remedy}"
        )
