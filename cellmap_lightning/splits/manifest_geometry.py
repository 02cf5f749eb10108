"""Comparison of the voxels that a manifest lists with the labels and with raw on disk."""

import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cellmap_lightning.crops.crop import Crop
from cellmap_lightning.errors import CellMapError, CellMapValueError
from cellmap_lightning.geometry.lattice import SCALE_TOLERANCE, Box, Lattice
from cellmap_lightning.io.images import image_exists, read_image
from cellmap_lightning.io.ngff import NO_OVERRIDES, Multiscale, Overrides
from cellmap_lightning.io.store import parse_location
from cellmap_lightning.splits.manifests import GROUNDTRUTH, RAW, ManifestCrop, ManifestRow

log = logging.getLogger(__name__)

#: Lines of the table at most.
_LINES = 20
_REVERSED = "; is the manifest in x y z order? Its lists must be [z;y;x]"


def check_geometry(crop: ManifestCrop, raw: str, scale: Sequence[float], overrides: Overrides = NO_OVERRIDES) -> Box:
    """Check the voxels that a manifest lists for a crop against its labels, where they are on disk, and against raw.

    Args:
        crop: the crop.
        raw: the raw group in the challenge's layout.
        scale: voxel size of the prediction, nm; voxels may end half of it outside raw.
        overrides: settings that replace the metadata of raw.

    Returns:
        The box of raw, nm.

    Raises:
        CellMapValueError: a class has other voxels on disk, or lies partly outside raw.
    """
    for row in crop.rows:
        text = _differs_on_disk(row, raw)
        if text is not None:
            raise CellMapValueError(f"{row.label}: {text}")
    image = read_image(parse_location(raw), overrides, allow_turned=True)
    levels = [level.lattice for level in image.levels]
    if any(level.turn is not None for level in levels):
        return levels[0].box  # refused with its own error
    for row in crop.rows:
        if not _within(row.lattice, levels[0], scale):
            fits = _within(_reversed(row.lattice), levels[0], scale)
            raise CellMapValueError(
                f"{row.label}: its box {row.lattice.box} in the manifest lies partly outside raw, {levels[0].box} "
                f"({raw}): the voxels outside would not be predicted{_REVERSED if fits else _advice(crop)}"
            )
        if not _is_voxel_size(row.lattice, levels) and _is_voxel_size(_reversed(row.lattice), levels):
            raise CellMapValueError(
                f"{row.label}: the manifest lists voxels of {list(row.lattice.step)} nm, and raw has "
                f"{', '.join(str(list(level.step)) for level in levels)} nm{_REVERSED}"
            )
    return levels[0].box


def report_geometry(crops: Iterable[Crop], listed: Mapping[str, Sequence[ManifestRow]]) -> None:
    """Warn of the classes whose labels have other voxels than the manifest lists, in one table.

    Args:
        crops: opened crops.
        listed: the rows of the manifest, by the path of the labels.
    """
    lines = []
    for crop in {str(crop.target_path): crop for crop in crops}.values():
        rows = {row.name: row for row in listed.get(str(crop.target_path), ())}
        texts: dict[str, list[str]] = {}
        for name, image in crop.label_images.items():
            text = _differs(rows[name], image) if name in rows else None
            if text is not None:
                texts.setdefault(text, []).append(name)
        lines += [f"  {crop.label} ({', '.join(names)}): {text}" for text, names in texts.items()]
    if lines:
        more = [f"  and {len(lines) - _LINES} more"] if len(lines) > _LINES else []
        log.warning(
            "crops whose labels have other voxels than the manifest lists: the labels are used\n%s",
            "\n".join([*lines[:_LINES], *more]),
        )


def _advice(crop: ManifestCrop) -> str:
    return f"; correct the manifest, get the rest of raw, or leave {crop.name.crop} out of crops=[...]"


def _differs_on_disk(row: ManifestRow, raw: str) -> str | None:
    """Return how a class on disk differs from its row; None if it does not, or is not there."""
    group = parse_location(f"{raw.removesuffix(RAW)}{GROUNDTRUTH}/{row.crop}/{row.name}")
    try:
        return _differs(row, read_image(group, allow_turned=True)) if image_exists(group) else None
    except CellMapError:
        return None  # labels that cannot be read are reported where they are needed


def _differs(row: ManifestRow, image: Multiscale) -> str | None:
    """Return how the levels of labels on disk differ from a row; None if one of them has its voxels."""
    levels = [level.lattice for level in (image.whole or image).levels if level.info is not None]
    if (
        not levels
        or any(level.turn is not None for level in levels)
        or any(_alike(row.lattice, level) for level in levels)
    ):
        return None
    hint = _REVERSED if any(_alike(_reversed(row.lattice), level) for level in levels) else ""
    return f"the manifest lists {_described(row.lattice)}, and the labels on disk have {_described(levels[0])}{hint}"


def _described(lattice: Lattice) -> str:
    return f"voxels of {[float(f'{n:g}') for n in lattice.step]} nm in {lattice.box}"


def _alike(one: Lattice, other: Lattice) -> bool:
    """Return True if two lattices have the same voxel size and, up to a voxel, the same box."""
    far = max(
        np.abs(np.subtract(a, b) / one.step).max()
        for a, b in ((one.box.lower, other.box.lower), (one.box.upper, other.box.upper))
    )
    return _is_voxel_size(one, [other]) and bool(far < 1)


def _is_voxel_size(lattice: Lattice, levels: Sequence[Lattice]) -> bool:
    """Return True if one of several lattices has the voxel size of another."""
    return any(bool((np.abs(np.divide(lattice.step, level.step) - 1) < SCALE_TOLERANCE).all()) for level in levels)


def _within(lattice: Lattice, raw: Lattice, scale: Sequence[float]) -> bool:
    """Return True if the centres of all voxels lie in raw, up to half a voxel of the prediction."""
    last = lattice.points(np.subtract(lattice.shape, 1))
    fine = 1e-3 * np.asarray(lattice.step)
    slack = np.maximum(0.5 * np.asarray(scale) - fine, fine)
    return bool((lattice.origin >= raw.box.lower - slack).all() and (last <= raw.box.upper + slack).all())


def _reversed(lattice: Lattice) -> Lattice:
    """Return a lattice whose lists are read in the opposite order."""
    return Lattice(lattice.origin[::-1], lattice.step[::-1], lattice.shape[::-1])
