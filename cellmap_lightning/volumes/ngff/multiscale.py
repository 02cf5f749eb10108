"""OME-NGFF multiscale images, 0.4 (Zarr v2) and 0.5 (Zarr v3), read from their JSON.

Specifications: https://ngff.openmicroscopy.org/0.4/#multiscale-md, https://ngff.openmicroscopy.org/0.5/#multiscale-md.
"""

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.volumes.geometry import AXES, SCALE_TOLERANCE, Lattice, Shape, Vector, to_vector
from cellmap_lightning.volumes.ngff.arrays import ArrayInfo, read_array, read_attributes
from cellmap_lightning.volumes.ngff.axes import read_axes
from cellmap_lightning.volumes.store import StorePath, children, exists, keeping, located, missing


@dataclass(frozen=True)
class Level:
    """One resolution of a multiscale image.

    Attributes:
        path: the array's folder.
        name: its path inside the image, such as ``s0``.
        scale: voxel size in nm (z, y, x).
        translation: centre of voxel 0 in nm (z, y, x).
        axes: which stored axis is z, y, x.
        ndim: number of stored axes.
    """

    path: StorePath
    name: str
    scale: Vector
    translation: Vector
    axes: tuple[int, int, int]
    ndim: int

    @cached_property
    def info(self) -> ArrayInfo | None:
        """The array's metadata, or None when the image lists a level that is not on disk."""
        info = read_array(self.path)
        if info is not None and len(info.shape) != self.ndim:
            raise MetadataError(
                f"{self.path}: the array has {len(info.shape)} axes {list(info.shape)}, the image's "
                f"metadata has {self.ndim}"
            )
        if info is not None:
            other = [n for i, n in enumerate(info.shape) if i not in self.axes]
            if any(n != 1 for n in other):
                raise MetadataError(
                    f"{self.path}: shape {list(info.shape)} has a non-spatial axis longer than 1; "
                    "only channel and time axes of length 1 can be read"
                )
        return info

    @cached_property
    def lattice(self) -> Lattice:
        """The voxels in nm.

        Raises:
            CellMapFileNotFoundError: the level is not on disk.
        """
        return Lattice(self.translation, self.scale, self.zyx(self.array.shape))

    @property
    def array(self) -> ArrayInfo:
        """The array's metadata.

        Raises:
            CellMapFileNotFoundError: the level is not on disk.
        """
        if self.info is None:
            raise missing(self.path, f"level {self.name!r} is listed in {self.path.parent} but")
        return self.info

    def zyx(self, stored: Sequence[int]) -> Shape:
        """Lengths along the stored axes, in the order z, y, x."""
        z, y, x = (int(stored[a]) for a in self.axes)
        return z, y, x


@dataclass(frozen=True)
class Multiscale:
    """One multiscale image.

    Attributes:
        path: the group's folder.
        levels: finest first, as listed.
        attributes: the group's attributes.
    """

    path: StorePath
    levels: tuple[Level, ...]
    attributes: Mapping[str, Any] = field(repr=False)

    @cached_property
    def present(self) -> tuple[Level, ...]:
        """The levels that are on disk.

        Raises:
            CellMapFileNotFoundError: none is.
        """
        found = tuple(level for level in self.levels if level.info is not None)
        if not found:
            raise missing(self.levels[0].path, f"{self.path}: none of its levels is on disk;")
        return found

    @property
    def finest(self) -> Level:
        """The finest level on disk."""
        return self.present[0]


#: Images that were read since somebody began to share them; None while nobody does.
_shared: dict[StorePath, Multiscale] | None = None
_sharing = threading.Lock()


@contextlib.contextmanager
def shared_metadata() -> Iterator[None]:
    """While it lasts, an image that was read is not read again: hundreds of crops lie in the same raw volume."""
    global _shared
    with _sharing:
        outer, _shared = _shared, {} if _shared is None else _shared
    try:
        with keeping():
            yield
    finally:
        with _sharing:
            _shared = outer


def read_multiscale(path: str | StorePath) -> Multiscale:
    """Read the multiscale image in the group ``path``.

    Raises:
        CellMapFileNotFoundError: ``path`` does not exist.
        MetadataError: it holds no multiscale image, or one that breaks the specification.
    """
    shared = _shared
    if shared is None:
        return _read_multiscale(path)
    key = located(path)
    found = shared.get(key)
    if found is None:
        found = shared[key] = _read_multiscale(key)
    return found


def _read_multiscale(path: str | StorePath) -> Multiscale:
    group = located(path)
    node = read_attributes(group)
    if node is None and not exists(group):
        raise missing(group, "image")
    file = group / ("zarr.json" if node and node[1] == 3 else ".zattrs")
    attributes = node[0] if node else {}
    ome = attributes.get("ome")
    scales = ome.get("multiscales") if isinstance(ome, dict) else None
    if scales is None:
        scales = attributes.get("multiscales")
    if not isinstance(scales, list) or not scales or not isinstance(scales[0], dict):
        names = children(group)
        raise MetadataError(
            f"{group} holds no OME-NGFF multiscale image (no 'multiscales' in {file.name})"
            + (f"; it holds {', '.join(names[:12])}" if names else "")
        )
    image = scales[0]
    stored, units = read_axes(file, image)
    z, y, x = (stored.index(a) for a in AXES)
    datasets = image.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        raise MetadataError(f"{file}: 'datasets' should list the levels, got {datasets!r}")
    levels: list[Level] = []
    for entry in datasets:
        name = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name or ".." in PurePosixPath(name).parts or name.startswith("/"):
            raise MetadataError(f"{file}: a level's path should be a name inside the image, got {name!r}")
        scale, translation = np.ones(len(stored)), np.zeros(len(stored))
        where = f"{file}, level {name!r}"
        own, common = _transformations(where, entry), _transformations(where, image)
        if not any(isinstance(step, dict) and step.get("type") == "scale" for step in own):
            raise MetadataError(f"{where}: its coordinateTransformations have no scale, so its voxels have no size")
        for step in own + common:
            scale, translation = _compose(where, step, scale, translation)
        if not (np.isfinite(scale).all() and (scale > 0).all() and np.isfinite(translation).all()):
            raise MetadataError(
                f"{where}: scale must be positive and finite, got scale {scale.tolist()}, "
                f"translation {translation.tolist()}"
            )
        s, t = to_vector(scale[[z, y, x]] * units), to_vector(translation[[z, y, x]] * units)
        if levels and math.prod(s) < math.prod(levels[-1].scale) * (1 - SCALE_TOLERANCE):
            raise MetadataError(
                f"{where}: its voxels {list(s)} nm are finer than those of level {levels[-1].name!r} before it "
                f"({list(levels[-1].scale)} nm); levels are listed finest first"
            )
        levels.append(Level(group / name, name, s, t, (z, y, x), len(stored)))
    return Multiscale(group, tuple(levels), attributes)


def _transformations(where: str, node: dict[str, Any]) -> list[Any]:
    steps = node.get("coordinateTransformations") or []
    if not isinstance(steps, list):
        raise MetadataError(f"{where}: 'coordinateTransformations' should be a list, got {steps!r}")
    return steps


def _compose(where: str, step: Any, scale: Any, translation: Any) -> tuple[Any, Any]:
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "identity":
        return scale, translation
    value = step.get(kind) if kind in ("scale", "translation") else None
    good = isinstance(value, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value
    )
    if value is None or not good or len(value) != len(scale):
        raise MetadataError(f"{where}: needs a scale or translation of {len(scale)} numbers, got {step!r}")
    values = np.asarray(value, dtype=np.float64)
    if kind == "scale":
        return scale * values, translation * values
    return scale, translation + values
