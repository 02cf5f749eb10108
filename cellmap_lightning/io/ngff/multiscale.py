"""OME-NGFF multiscale images, 0.4 (Zarr v2) and 0.5 (Zarr v3), read from their JSON.

Specifications: https://ngff.openmicroscopy.org/0.4/#multiscale-md, https://ngff.openmicroscopy.org/0.5/#multiscale-md.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, TypeGuard

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.lattice import AXES, Lattice, Shape, Vector, to_vector
from cellmap_lightning.io.missing_paths import missing
from cellmap_lightning.io.ngff.arrays import ArrayInfo, read_array, read_attributes
from cellmap_lightning.io.ngff.axes import read_axes
from cellmap_lightning.io.ngff.limits import MOST_IMAGES, MOST_LEVELS, check_length
from cellmap_lightning.io.ngff.notes import Note, reported_once
from cellmap_lightning.io.ngff.overrides import NO_OVERRIDES, Overrides
from cellmap_lightning.io.ngff.transformations import (
    check_finest_first,
    implausible_voxel_size,
    level_transformation,
    times,
    translations_missing,
)
from cellmap_lightning.io.store import (
    Remote,
    StorePath,
    children,
    exists,
    metadata_cache,
    parse_location,
    read_json,
)
from cellmap_lightning.runtime.shared_context import SharedContext

#: Folders between a level and its image at most.
DEEPEST_LEVEL = 3
#: Voxels of the first level by which lower edges of levels may differ; of the level itself, by which upper ones may
#: beyond a ragged last voxel.
BOX_TOLERANCE = 0.1


@dataclass(frozen=True)
class Level:
    """One resolution level of a multiscale image.

    Attributes:
        path: the array's folder.
        name: its path inside the image, such as ``s0``.
        scale: voxel size in nm (z, y, x).
        translation: centre of voxel 0 in nm (z, y, x).
        axes: the stored axes that are z, y, x.
        ndim: number of stored axes.
        channel: index along the stored axes that are not spatial; None where these have length 1.

    Example:
        >>> read_multiscale("jrc_a.zarr/recon-1/em/fibsem-uint8").finest.scale
        (8.0, 8.0, 8.0)
    """

    path: StorePath
    name: str
    scale: Vector
    translation: Vector
    axes: tuple[int, int, int]
    ndim: int
    channel: int | None = None

    @cached_property
    def info(self) -> ArrayInfo | None:
        """Metadata of the array; None where the image lists a level that does not exist."""
        info = read_array(self.path)
        if info is not None and len(info.shape) != self.ndim:
            raise MetadataError(
                f"{self.path}: the array has {len(info.shape)} axes {list(info.shape)}, the image's "
                f"metadata has {self.ndim}"
            )
        if info is not None and self.channel is None:
            other = [n for i, n in enumerate(info.shape) if i not in self.axes]
            if any(n != 1 for n in other):
                raise MetadataError(
                    f"{self.path}: shape {list(info.shape)} has a non-spatial axis longer than 1; "
                    "only channel and time axes of length 1 can be read"
                )
        return info

    @cached_property
    def lattice(self) -> Lattice:
        """Voxels in nm.

        Raises:
            CellMapFileNotFoundError: the level is not on disk.
        """
        return Lattice(self.translation, self.scale, self.zyx(self.array.shape))

    @property
    def array(self) -> ArrayInfo:
        """Metadata of the array.

        Raises:
            CellMapFileNotFoundError: the level is not on disk.
        """
        if self.info is None:
            raise missing(self.path, f"level {self.name!r} is listed in {self.path.parent} but")
        return self.info

    def zyx(self, stored: Sequence[int]) -> Shape:
        """Return values along the stored axes in the order z, y, x."""
        z, y, x = (int(stored[a]) for a in self.axes)
        return z, y, x


@dataclass(frozen=True)
class Multiscale:
    """One multiscale image.

    Attributes:
        path: the group's folder.
        levels: finest first, as listed.
        attributes: the group's attributes.
        assumed: assumptions made when the metadata was read; `notes` adds those about the arrays.
        as_stored: whether ``level_translations=stored`` was set, so that boxes of levels may differ.

    Example:
        >>> [level.name for level in read_multiscale("jrc_a.zarr/recon-1/em/fibsem-uint8").present]
        ['s0', 's1', 's2']
    """

    path: StorePath
    levels: tuple[Level, ...]
    attributes: Mapping[str, Any] = field(repr=False)
    assumed: tuple[Note, ...] = field(default=(), repr=False)
    as_stored: bool = field(default=False, repr=False)

    @cached_property
    def present(self) -> tuple[Level, ...]:
        """Levels whose arrays exist.

        Raises:
            CellMapFileNotFoundError: no array exists.
        """
        present = tuple(level for level in self.levels if level.info is not None)
        if not present:
            raise missing(self.levels[0].path, f"{self.path}: none of its levels is on disk;")
        return present

    @property
    def finest(self) -> Level:
        """Finest level that exists."""
        return self.present[0]

    @cached_property
    def notes(self) -> tuple[Note, ...]:
        """Assumptions about the image, including a comparison of the boxes of its levels.

        Raises:
            CellMapFileNotFoundError: none of its levels is on disk.
        """
        different = _different_boxes(self.present) if not self.as_stored else None
        return (*self.assumed, *([different] if different is not None else []))


#: Images read while `shared_metadata` is open.
_images = SharedContext(dict[tuple[StorePath, Overrides], Multiscale])


@contextlib.contextmanager
def shared_metadata() -> Iterator[None]:
    """Read each image once while the context is open: hundreds of crops lie in the same raw volume."""
    with _images.open(), metadata_cache(), reported_once():
        yield


def read_multiscale(path: str | StorePath, overrides: Overrides = NO_OVERRIDES) -> Multiscale:
    """Read the multiscale image in the group ``path``.

    Args:
        path: the group; with ``overrides.voxel_size`` also a plain Zarr array.
        overrides: settings that override the metadata.

    Raises:
        CellMapFileNotFoundError: ``path`` does not exist.
        MetadataError: it is not a multiscale image, or violates the specification.
    """
    images = _images.value
    if images is None:
        return _read_multiscale(path, overrides)
    key = parse_location(path), overrides
    image = images.get(key)
    if image is None:
        image = images[key] = _read_multiscale(*key)
    return image


def _read_multiscale(path: str | StorePath, overrides: Overrides) -> Multiscale:
    group = parse_location(path)
    node = read_attributes(group)
    if node is None and not exists(group):
        raise missing(group, "image")
    file = group / ("zarr.json" if node and node[1] == 3 else ".zattrs")
    attributes = node[0] if node else {}
    scales = _multiscales(attributes)
    if scales is None:
        array = read_array(group)
        if array is not None:
            return _plain_array(array, overrides)
        raise MetadataError(
            f"{group} holds no OME-NGFF multiscale image (no 'multiscales' in {file.name}){_near(group)}"
        )
    check_length(file, "images in 'multiscales'", scales, MOST_IMAGES)
    image, several = _chosen(file, scales, overrides)
    version = _version(attributes, image)
    _check_version(file, version)
    try:
        return _image(group, file, image, attributes, overrides, several)
    except MetadataError as e:
        old = _unread_version(version, image)
        if old is None:
            raise
        raise MetadataError(f"{file}: its metadata are {old}; OME-NGFF 0.4 and 0.5 are read. {e}") from e


def _image(
    group: StorePath,
    file: StorePath,
    image: dict[str, Any],
    attributes: Mapping[str, Any],
    overrides: Overrides,
    notes: list[Note],
) -> Multiscale:
    """Read one entry of ``multiscales``."""
    stored, units, assumed = read_axes(file, image, overrides.unit, overrides.voxel_size is None)
    order = [stored.index(a) for a in AXES]
    names, scales, translations = _datasets(file, image, len(stored), order)
    scales = [times(scale, units) for scale in scales]
    translations = [times(translation, units) for translation in translations]
    check_finest_first(file, names, scales)
    if overrides.voxel_size is not None:
        assumed = []
    else:
        assumed += implausible_voxel_size(scales[0], units)
    if overrides.level_translations == "auto" and translations_missing(scales, translations):
        # Voxels of coarser levels are means, so that all levels share the lower edge of level 0, and not its centre.
        offsets = [np.subtract(scale, scales[0]) / 2 for scale in scales]
        translations = [to_vector(np.add(translations[0], offset)) for offset in offsets]
        shift = max(float((offset / scales[0]).max()) for offset in offsets)
        assumed.append(
            Note(
                "levels",
                "its coarser levels have no separate translations, though their voxels are larger: they are placed "
                "so that all levels cover the same box, as means of voxels do, which moves level "
                f"{names[-1]} by {shift:g} voxels of level {names[0]}; level_translations=stored reads them as stored",
            )
        )
    if overrides.voxel_size is not None or overrides.translation is not None:
        scales, translations = overrides.place(scales, translations)
    levels = tuple(
        Level(group / name, name, s, t, (order[0], order[1], order[2]), len(stored))
        for name, s, t in zip(names, scales, translations, strict=True)
    )
    return Multiscale(group, levels, attributes, (*notes, *assumed), overrides.level_translations == "stored")


def _datasets(
    file: StorePath, image: dict[str, Any], ndim: int, order: list[int]
) -> tuple[list[str], list[Vector], list[Vector]]:
    """Return names, scales and translations of the levels, in the units of the axes."""
    datasets = image.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        raise MetadataError(f"{file}: 'datasets' should list the levels, got {datasets!r}")
    check_length(file, "levels in 'datasets'", datasets, MOST_LEVELS)
    names, scales, translations = [], [], []
    for entry in datasets:
        name = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name or ".." in PurePosixPath(name).parts or name.startswith("/"):
            raise MetadataError(f"{file}: a level's path should be a name inside the image, got {name!r}")
        scale, translation = level_transformation(f"{file}, level {name!r}", entry, image, ndim, order)
        names.append(name)
        scales.append(scale)
        translations.append(translation)
    return names, scales, translations


def _plain_array(array: ArrayInfo, overrides: Overrides) -> Multiscale:
    """Read a Zarr array without a multiscale image around it, with the voxel size that is set for it.

    Raises:
        MetadataError: it is a level of an image, or no voxel size is set; the message names the right path or setting.
    """
    path, ndim = array.path, len(array.shape)
    if overrides.voxel_size is not None and ndim >= 3:
        axes = _named_axes(array)
        level = Level(path, path.name, overrides.voxel_size, overrides.translation or (0.0, 0.0, 0.0), axes, ndim)
        return Multiscale(path, (level,), array.attributes)
    _check_not_in_image(path)
    text = f"{path} is a plain Zarr array without OME-NGFF metadata"
    size = next((array.attributes[key] for key in ("resolution", "voxel_size") if key in array.attributes), None)
    if not _is_vector(size):
        raise MetadataError(f"{text}: set voxel_size=[z, y, x] in nm, and translation, for its entry")
    text += f"; its attributes have resolution {size}"
    offset = array.attributes.get("offset", [0] * 3)
    if _is_vector(offset):
        center = [o + s / 2 for o, s in zip(offset, size, strict=True)]
        text += (
            f" and offset {offset} (as funlib and gunpowder write them: the corner of voxel 0): set "
            f"voxel_size={size} and translation={center} for its entry, if these are nm"
        )
    raise MetadataError(text)


def _check_not_in_image(path: StorePath) -> None:
    """Check that an array is not part of a multiscale image.

    Raises:
        MetadataError: it is; the message names the image.
    """
    inside, above = path.name, path
    for _ in range(DEEPEST_LEVEL):
        above = above.parent
        node = read_attributes(above)
        scales = _multiscales(node[0]) if node is not None else None
        if scales is not None:
            listed = [d.get("path") for s in scales if isinstance(s, dict) for d in s.get("datasets") or () if d]
            part = "one level" if inside in listed else "an array"
            raise MetadataError(f"{path} is {part} of the image {above}; give its parent, {above}")
        inside = f"{above.name}/{inside}"


def _is_vector(value: Any) -> TypeGuard[list[float]]:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(v, int | float) for v in value)


def _named_axes(array: ArrayInfo) -> tuple[int, int, int]:
    """Return the axes z, y and x of a plain array: by their names if it has any, else the last three.

    Names are those of xarray (``_ARRAY_DIMENSIONS``), Zarr v3 (``dimension_names``) and funlib (``axis_names``).
    """
    attributes, ndim = array.attributes, len(array.shape)
    content = read_json(array.metadata) or {}
    for names in (attributes.get("_ARRAY_DIMENSIONS"), content.get("dimension_names"), attributes.get("axis_names")):
        if isinstance(names, list) and len(names) == ndim and all(isinstance(name, str) for name in names):
            lower = [name.rstrip("^").lower() for name in names]
            if set(AXES) <= set(lower):
                return lower.index("z"), lower.index("y"), lower.index("x")
            if any(lower):
                raise MetadataError(f"{array.path}: the axes z, y and x are needed once each, got {names}")
    return ndim - 3, ndim - 2, ndim - 1


def _multiscales(attributes: Mapping[str, Any]) -> list[Any] | None:
    """Return the list of images in a group's attributes, or None."""
    ome = attributes.get("ome")
    scales = ome.get("multiscales") if isinstance(ome, dict) else None
    if scales is None:
        scales = attributes.get("multiscales")
    return scales if isinstance(scales, list) and scales and isinstance(scales[0], dict) else None


def _chosen(file: StorePath, scales: list[Any], overrides: Overrides) -> tuple[dict[str, Any], list[Note]]:
    """Return the image to read of those that a group lists.

    Raises:
        MetadataError: no image has the name that is set.
    """
    images = [scale for scale in scales if isinstance(scale, dict)]
    names = [str(image.get("name", number)) for number, image in enumerate(images)]
    if overrides.multiscale is not None:
        if overrides.multiscale not in names:
            raise MetadataError(f"{file}: lists no image {overrides.multiscale!r}; it lists {', '.join(names)}")
        return images[names.index(overrides.multiscale)], []
    if len(images) == 1:
        return images[0], []
    text = (
        f"the group lists {len(images)} images ({', '.join(names)}); the first one is read; "
        "set multiscale=<name> for its entry to read another"
    )
    return images[0], [Note("multiscales", text)]


def _near(group: StorePath) -> str:
    """Return a hint about a group without an image: the images below it, another format, or its children."""
    names = children(group)
    images = [name for name in names[:24] if _multiscales((read_attributes(group / name) or ({}, 0))[0]) is not None]
    if images:
        return f"; did you mean one of the images below it: {', '.join(images[:12])}?"
    for file, other in (("attributes.json", "N5"), ("info", "Neuroglancer precomputed")):
        if not isinstance(group, Remote) and (group / file).is_file():
            return f"; {file} in it is that of {other}, which is not read: convert it to OME-Zarr"
    return f"; it holds {', '.join(names[:12])}" if names else ""


def _version(attributes: Mapping[str, Any], image: Mapping[str, Any]) -> str | None:
    ome = attributes.get("ome")
    version = image.get("version") or (ome.get("version") if isinstance(ome, dict) else None)
    return str(version) if version is not None else None


def _check_version(file: StorePath, version: str | None) -> None:
    """Check that the version is not newer than 0.5: later ones use the same keys with other meanings."""
    number = re.match(r"(\d+)\.(\d+)", version or "")
    if number is not None and (int(number[1]), int(number[2])) > (0, 5):
        raise MetadataError(f"{file}: its metadata are OME-NGFF {version}; 0.4 and 0.5 are read")


def _unread_version(version: str | None, image: Mapping[str, Any]) -> str | None:
    """Return the name of an unsupported older metadata format; None for supported ones."""
    datasets = image.get("datasets")
    first = datasets[0] if isinstance(datasets, list) and datasets and isinstance(datasets[0], dict) else {}
    if "transform" in first and "coordinateTransformations" not in first:
        return "early COSEM metadata (a 'transform' in each level)"
    if version is not None and re.match(r"0\.[123]($|\D)", version):
        return f"OME-NGFF {version}"
    axes = image.get("axes")
    if "coordinateSystems" in image:
        return "OME-NGFF 0.6 ('coordinateSystems')"
    if isinstance(axes, list) and axes and all(isinstance(axis, str) for axis in axes):
        return "OME-NGFF 0.3 (names of axes without types)"
    if version is None and "axes" not in image:
        return "OME-NGFF 0.1 or 0.2 (no 'axes')"
    return None


def _different_boxes(levels: Sequence[Level]) -> Note | None:
    """Return a note on a level that does not cover the box of the finest one, apart from a ragged last voxel."""
    first = levels[0].lattice
    for level in levels[1:]:
        lattice = level.lattice
        low = np.abs(np.subtract(lattice.box.lower, first.box.lower)) / first.step
        high = np.abs(np.subtract(lattice.box.upper, first.box.upper)) / lattice.step
        if (low > BOX_TOLERANCE).any() or (high >= 1 + BOX_TOLERANCE).any():
            return Note(
                "boxes",
                f"level {level.name} covers {lattice.box}, and level {levels[0].name} covers {first.box}: one of them "
                "is misplaced or of another voxel size; they are read as stored",
            )
    return None
