"""Settings that override or interpret the metadata of an image, since data is often read-only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, Vector, to_vector
from cellmap_lightning.io.ngff.axes import unit_nm
from cellmap_lightning.validation import one_of

#: Placement of the levels of a pyramid whose translations are missing or all the same: by the averaging convention
#: (``auto``), in which every level covers the same box, or as stored.
LevelTranslations = Literal["auto", "stored"]
LEVEL_TRANSLATIONS = ("auto", "stored")
#: Keys of an entry that override metadata; each is a value for raw and labels alike, or ``{raw: ..., gt: ...}``.
OVERRIDE_KEYS = ("unit", "voxel_size", "translation", "multiscale", "axes")


@dataclass(frozen=True)
class Overrides:
    """Overrides of the metadata of one image; docs/data.md shows the settings.

    Attributes:
        unit: unit of all three spatial axes, in place of the stored ones.
        voxel_size: voxel size of the first level in nm (z, y, x); the other levels and the stored translations keep
            their ratio to it. With it, a plain Zarr array without OME-NGFF metadata is read as an image of one level.
        translation: centre of voxel 0 of the first level in nm (z, y, x); the other levels move with it.
        multiscale: name of the image to read where a group lists several.
        level_translations: see `LevelTranslations`.
        axes: names of the stored axes, one letter each, such as ``xyz``; for arrays that are not OME-NGFF images.
    """

    unit: str | None = None
    voxel_size: Vector | None = None
    translation: Vector | None = None
    multiscale: str | None = None
    level_translations: LevelTranslations = "auto"
    axes: str | None = None

    @classmethod
    def parse(
        cls,
        unit: Any = None,
        voxel_size: Any = None,
        translation: Any = None,
        multiscale: Any = None,
        level_translations: Any = "auto",
        axes: Any = None,
    ) -> "Overrides":
        """Check the values of one image.

        Raises:
            CellMapError: an invalid value; the message names the key and the valid values.
        """
        one_of("level_translations", level_translations, LEVEL_TRANSLATIONS)
        if unit is not None and unit_nm(unit) is None:
            raise CellMapValueError(f"unit must be a unit of length such as nanometer or micrometer, got {unit!r}")
        if multiscale is not None and not isinstance(multiscale, str):
            raise CellMapTypeError(f"multiscale must be the name of an image in the group, got {multiscale!r}")
        is_named = isinstance(axes, str) and len(set(axes)) == len(axes) and set(AXES) <= set(axes)
        if axes is not None and not is_named:
            raise CellMapValueError(
                f"axes must be one letter for each stored axis, with z, y and x once each, such as zyx, got {axes!r}"
            )
        size = _three("voxel_size", voxel_size)
        if size is not None and min(size) <= 0:
            raise CellMapValueError(f"voxel_size must be three positive numbers in nm (z, y, x), got {voxel_size!r}")
        return cls(unit, size, _three("translation", translation), multiscale, level_translations, axes)

    @classmethod
    def pair(cls, level_translations: Any = "auto", **values: Any) -> "tuple[Overrides, Overrides]":
        """Check the values of an entry, and return the overrides of its raw image and of its labels.

        Args:
            level_translations: see `LevelTranslations`.
            **values: ``unit``, ``voxel_size``, ``translation``, ``multiscale`` and ``axes``, each a value for both or a
                mapping ``{raw: ..., gt: ...}``.

        Raises:
            CellMapError: see `parse`.
        """
        raw: dict[str, Any] = {}
        labels: dict[str, Any] = {}
        for key, value in values.items():
            if isinstance(value, Mapping):
                unknown = sorted(set(map(str, value)) - {"raw", "gt"})
                if unknown:
                    raise CellMapKeyError(
                        f"{key} must be a value, or {{raw: ..., gt: ...}}, got the key {unknown[0]!r}"
                    )
                raw[key], labels[key] = value.get("raw"), value.get("gt")
            else:
                raw[key] = labels[key] = value
        return (
            cls.parse(**raw, level_translations=level_translations),
            cls.parse(**labels, level_translations=level_translations),
        )

    def place(self, scales: Sequence[Vector], translations: Sequence[Vector]) -> tuple[list[Vector], list[Vector]]:
        """Return voxel sizes and translations of all levels with the overrides applied, nm."""
        first, origin = np.asarray(scales[0]), np.asarray(translations[0])
        ratio = np.divide(self.voxel_size, first) if self.voxel_size is not None else np.ones(3)
        start = np.asarray(self.translation) if self.translation is not None else origin * ratio
        moved = [to_vector(start + (np.asarray(t) - origin) * ratio) for t in translations]
        return [to_vector(np.asarray(s) * ratio) for s in scales], moved


#: The defaults: no metadata is replaced.
NO_OVERRIDES = Overrides()


def _three(key: str, value: Any) -> Vector | None:
    if value is None:
        return None
    good = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3
    if not good or not all(isinstance(v, int | float) and not isinstance(v, bool) and np.isfinite(v) for v in value):
        raise CellMapValueError(f"{key} must be three numbers in nm (z, y, x), got {value!r}")
    return cast("Vector", tuple(float(v) for v in value))
