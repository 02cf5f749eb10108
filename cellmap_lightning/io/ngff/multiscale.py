"""OME-NGFF multiscale images, 0.4 (Zarr v2), 0.5 and 0.6 (Zarr v3), read from their JSON.

Specifications: https://ngff.openmicroscopy.org/0.4/#multiscale-md, https://ngff.openmicroscopy.org/0.5/#multiscale-md,
https://ngff.openmicroscopy.org/0.6/.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.lattice import Shape, Turn, Vector, to_vector
from cellmap_lightning.io.missing_paths import ARCHIVES, missing
from cellmap_lightning.io.ngff.arrays import read_array, read_attributes
from cellmap_lightning.io.ngff.axes import read_axes
from cellmap_lightning.io.ngff.coordinate_systems import intrinsic_system, place_level, turned_axes
from cellmap_lightning.io.ngff.levels import Level, Multiscale
from cellmap_lightning.io.ngff.limits import MOST_IMAGES, MOST_LEVELS, check_length
from cellmap_lightning.io.ngff.notes import FOR_ENTRY, Note, reported_once
from cellmap_lightning.io.ngff.overrides import NO_OVERRIDES, Overrides
from cellmap_lightning.io.ngff.plain_array import image_lists, listed_images, read_plain_array
from cellmap_lightning.io.ngff.transformations import (
    check_finest_first,
    implausible_setting,
    implausible_voxel_size,
    level_transformation,
    times,
    translations_missing,
)
from cellmap_lightning.io.store import (
    StorePath,
    children,
    exists,
    metadata_cache,
    parse_location,
)
from cellmap_lightning.runtime.shared_context import SharedContext

#: Images read while `shared_metadata` is open.
_images = SharedContext(dict[tuple[StorePath, Overrides], Multiscale])


@contextlib.contextmanager
def shared_metadata() -> Iterator[None]:
    """Read each image once while the context is open: hundreds of crops lie in the same raw volume."""
    with _images.open(), metadata_cache(), reported_once():
        yield


class NoImageError(MetadataError):
    """A location that holds no OME-NGFF image and no Zarr array; see docs/formats.md."""


def shared_image(
    path: StorePath, overrides: Overrides, read: Callable[[StorePath, Overrides], Multiscale | None]
) -> Multiscale | None:
    """Read an image by a function, once while `shared_metadata` is open.

    Args:
        path: the image.
        overrides: settings that override the metadata.
        read: reads it; returns None where it is not an image.
    """
    images = _images.value
    image = images.get((path, overrides)) if images is not None else None
    if image is None:
        image = read(path, overrides)
        if images is not None and image is not None:
            images[path, overrides] = image
    return image


def read_multiscale(
    path: str | StorePath, overrides: Overrides = NO_OVERRIDES, allow_turned: bool = False
) -> Multiscale:
    """Read the multiscale image in the group ``path``.

    Args:
        path: the group; with ``overrides.voxel_size`` also a plain Zarr array.
        overrides: settings that override the metadata.
        allow_turned: read images whose arrays are rotated, mirrored or sheared; see `Lattice.turn`.

    Raises:
        CellMapFileNotFoundError: ``path`` does not exist.
        MetadataError: it is not a multiscale image, violates the specification, or is turned.
    """
    image = shared_image(parse_location(path), overrides, _read_multiscale)
    assert image is not None
    if not allow_turned and any(level.turn is not None for level in image.levels):
        raise MetadataError(
            f"{image.path}: its transformation rotates, mirrors or shears the image, which only training reads; "
            "resample the image"
        )
    return image


def _read_multiscale(group: StorePath, overrides: Overrides) -> Multiscale:
    node = read_attributes(group)
    if node is None and not exists(group):
        raise missing(group, "image")
    file = group / ("zarr.json" if node and node[1] == 3 else ".zattrs")
    attributes = node[0] if node else {}
    lists = _without_older(image_lists(attributes, node[1])) if node else {}
    scales = next(iter(lists.values()), None)
    if scales is None:
        array = read_array(group)
        if array is not None:
            return read_plain_array(array, overrides)
        raise NoImageError(
            f"{group} holds no OME-NGFF multiscale image (no 'multiscales' in {file.name}){_near(group)}"
        )
    check_length(file, "images in 'multiscales'", scales, MOST_IMAGES)
    image, notes = _chosen(file, scales, overrides)
    notes += _both_versions(lists)
    version = _version(attributes, image)
    _check_version(file, version)
    try:
        return _image(group, file, image, attributes, overrides, notes)
    except MetadataError as e:
        old = _unread_version(version, image)
        if old is None:
            raise
        raise MetadataError(f"{file}: its metadata are {old}; OME-NGFF 0.4, 0.5 and 0.6 are read. {e}") from e


def _image(
    group: StorePath,
    file: StorePath,
    image: dict[str, Any],
    attributes: Mapping[str, Any],
    overrides: Overrides,
    notes: list[Note],
) -> Multiscale:
    """Read one entry of ``multiscales``."""
    if overrides.axes is not None:
        raise MetadataError(f"{file}: OME-NGFF images name their axes; leave axes={overrides.axes} out")
    is_placed = "coordinateSystems" in image  # OME-NGFF 0.6
    entries = _datasets(file, image) if is_placed else []
    system, others = intrinsic_system(file, image, [entry for _, entry in entries]) if is_placed else (image, [])
    stored, units, assumed = read_axes(file, system, overrides.unit, overrides.voxel_size is None)
    assumed += others
    order = (stored.index("z"), stored.index("y"), stored.index("x"))
    if is_placed:
        names, scales, translations, axes, turns = _by_systems(file, entries, order, len(stored), units)
    else:
        names, factors, offsets = _placements(file, image, len(stored), list(order))
        scales, translations = ([times(value, units) for value in values] for values in (factors, offsets))
        axes, turns = [(order, len(stored))] * len(names), [None] * len(names)
    check_finest_first(file, names, scales)
    if overrides.voxel_size is not None:
        assumed = implausible_setting(overrides.voxel_size)
    else:
        assumed += implausible_voxel_size(scales[0], units)
    if overrides.level_translations == "auto" and translations_missing(scales, translations):
        translations, note = _shared_lower_edge(names, scales, translations[0], turns[0])
        assumed.append(note)
    if overrides.voxel_size is not None or overrides.translation is not None:
        scales, translations = overrides.place(scales, translations)
    levels = tuple(
        Level(group / name, name, s, t, *order, turn=turn, names=() if is_placed else tuple(stored))
        for name, s, t, order, turn in zip(names, scales, translations, axes, turns, strict=True)
    )
    return Multiscale(group, levels, attributes, (*notes, *assumed), overrides.level_translations == "stored")


def _by_systems(
    file: StorePath, entries: Sequence[tuple[str, dict[str, Any]]], order: Shape, ndim: int, units: Vector
) -> tuple[list[str], list[Vector], list[Vector], list[tuple[Shape, int]], list[Turn | None]]:
    """Return names, voxel sizes and translations in nm, axes and turns of the levels of OME-NGFF 0.6."""
    placed = [place_level(file, entry, order, ndim) for _, entry in entries]
    turned = [turned_axes(level.matrix, units) for level in placed]
    return (
        [name for name, _ in entries],
        [times(level.scale, units) if size is None else size for level, (size, _) in zip(placed, turned, strict=True)],
        [times(level.translation, units) for level in placed],
        [(level.axes, level.ndim) for level in placed],
        [turn for _, turn in turned],
    )


def _shared_lower_edge(
    names: Sequence[str], scales: Sequence[Vector], finest: Vector, turn: Turn | None
) -> tuple[list[Vector], Note]:
    """Return translations with which all levels have the lower edge of level 0, as means of voxels have.

    Args:
        names: names of the levels, finest first.
        scales: their voxel sizes in nm.
        finest: translation of level 0 in nm.
        turn: see `Lattice`.

    Returns:
        The translations in nm, and a note about them.
    """
    directions = np.eye(3) if turn is None else np.asarray(turn)
    offsets = [directions @ (np.subtract(scale, scales[0]) / 2) for scale in scales]
    shift = max(float((offset / scales[0]).max()) for offset in offsets)
    note = Note(
        "levels",
        "its coarser levels have no separate translations, though their voxels are larger: they are placed so that all "
        f"levels cover the same box, as means of voxels do, which moves level {names[-1]} by {shift:g} voxels of level "
        f"{names[0]}; level_translations=stored reads them as stored",
    )
    return [to_vector(np.add(finest, offset)) for offset in offsets], note


def _datasets(file: StorePath, image: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return name and entry of each level."""
    datasets = image.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        raise MetadataError(f"{file}: 'datasets' should list the levels, got {datasets!r}")
    check_length(file, "levels in 'datasets'", datasets, MOST_LEVELS)
    levels = []
    for entry in datasets:
        name = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name or ".." in PurePosixPath(name).parts or name.startswith("/"):
            raise MetadataError(f"{file}: a level's path should be a name inside the image, got {name!r}")
        levels.append((name, entry))
    return levels


def _placements(
    file: StorePath, image: dict[str, Any], ndim: int, order: list[int]
) -> tuple[list[str], list[Vector], list[Vector]]:
    """Return names, scales and translations of the levels, in the units of the axes."""
    names, scales, translations = [], [], []
    for name, entry in _datasets(file, image):
        scale, translation = level_transformation(f"{file}, level {name!r}", entry, image, ndim, order)
        names.append(name)
        scales.append(scale)
        translations.append(translation)
    return names, scales, translations


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
        f"set multiscale=<name>{FOR_ENTRY} to read another"
    )
    return images[0], [Note("multiscales", text)]


def _without_older(lists: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the lists without the one in ``multiscales`` if it is older than 0.4, and ``ome`` has another."""
    older = lists["multiscales"][0] if len(lists) > 1 else None
    if older is None or _unread_version(_version({}, older), older) is None:
        return lists
    return {"ome": lists["ome"]}


def _both_versions(lists: Mapping[str, list[Any]]) -> list[Note]:
    """Return a note about a group with metadata of OME-NGFF 0.4 and of 0.5 that place its images differently."""
    if len(lists) < 2:
        return []
    (read, scales), (other, others) = lists.items()
    if [_placing(image) for image in scales] == [_placing(image) for image in others]:
        return []
    version = {"ome": "Zarr v3", "multiscales": "Zarr v2"}[read]
    text = (
        "its metadata have images in 'multiscales' (OME-NGFF 0.4) and in 'ome' (0.5 and later), which differ; "
        f"{read!r} is read, as the group is {version}; remove {other!r}"
    )
    return [Note("versions", text)]


def _placing(image: Any) -> Any:
    """Return what places an image, the same for each notation."""
    if not isinstance(image, dict):
        return image
    steps = image.get("coordinateTransformations")
    whole = [step for step in steps if not _is_identity(step)] if isinstance(steps, list) else steps or []
    return image.get("axes"), image.get("datasets"), image.get("coordinateSystems"), whole


def _is_identity(step: Any) -> bool:
    values = step.get("scale") if isinstance(step, dict) and step.get("type") == "scale" else None
    return isinstance(values, list) and all(value == 1 for value in values)


def _near(group: StorePath) -> str:
    """Return a hint about a group without an image: the images below it, its children, or the address of an archive."""
    if group.suffix.lower() in ARCHIVES and isinstance(group, Path):
        return f"; it is an archive: give zip://<path in it>::{group}"
    names = children(group)
    images = [name for name in names[:24] if listed_images(*(read_attributes(group / name) or ({}, 2))) is not None]
    if images:
        return f"; did you mean one of the images below it: {', '.join(images[:12])}?"
    return f"; it holds {', '.join(names[:12])}: give the path of an image in it" if names else ""


def _version(attributes: Mapping[str, Any], image: Mapping[str, Any]) -> str | None:
    ome = attributes.get("ome")
    version = image.get("version") or (ome.get("version") if isinstance(ome, dict) else None)
    return str(version) if version is not None else None


def _check_version(file: StorePath, version: str | None) -> None:
    """Check that the version is not newer than 0.6: later ones use the same keys with other meanings."""
    number = re.match(r"(\d+)\.(\d+)", version or "")
    if number is not None and (int(number[1]), int(number[2])) > (0, 6):
        raise MetadataError(f"{file}: its metadata are OME-NGFF {version}; 0.4, 0.5 and 0.6 are read")


def _unread_version(version: str | None, image: Mapping[str, Any]) -> str | None:
    """Return the name of an unsupported older metadata format; None for supported ones."""
    datasets = image.get("datasets")
    first = datasets[0] if isinstance(datasets, list) and datasets and isinstance(datasets[0], dict) else {}
    if "transform" in first and "coordinateTransformations" not in first:
        return "early COSEM metadata (a 'transform' in each level)"
    if version is not None and re.match(r"0\.[123]($|\D)", version):
        return f"OME-NGFF {version}"
    axes = image.get("axes")
    if isinstance(axes, list) and axes and all(isinstance(axis, str) for axis in axes):
        return "OME-NGFF 0.3 (names of axes without types)"
    if version is None and "axes" not in image:
        return "OME-NGFF 0.1 or 0.2 (no 'axes')"
    return None
