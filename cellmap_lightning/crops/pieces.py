"""Descriptions of samples: the voxels that an array of a sample shows, for a gather elsewhere, such as on a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellmap_lightning.cache.patches import Patches
from cellmap_lightning.cache.region import Region
from cellmap_lightning.crops.crop import Crop
from cellmap_lightning.crops.image import StoredImage
from cellmap_lightning.crops.labels import IdStack, Nearest
from cellmap_lightning.geometry.lattice import AffineMap, FloatArray, Shape, patch_map
from cellmap_lightning.geometry.resample import Method, Slices, slices
from cellmap_lightning.geometry.rotation import gathered_box, is_gathered
from cellmap_lightning.transforms.kinds.kind import UNKNOWN_ID, TargetKind


@dataclass(frozen=True, eq=False)
class Piece:
    """A patch of one region: a box of it where the map is a lattice map, else the map that it is evaluated by.

    Attributes:
        region: the stored voxels.
        fill: value of the voxels outside the region.
        low: first voxel of the region that is needed.
        shape: voxels that are needed; 0 along an axis where the patch lies outside.
        cut: the box that is copied; None for a map.
        start: first voxel of that box, which may lie outside of the region.
        amap: map from the patch's voxels to those of the region; None for a box.
        method: ``linear`` for raw, ``nearest`` for labels.
        channel: position of the class, for ids; None for all channels.
    """

    region: Region
    fill: float
    low: Shape
    shape: Shape
    cut: Slices | None = None
    start: Shape = (0, 0, 0)
    amap: AffineMap | None = None
    method: Method = "nearest"
    channel: int | None = None


@dataclass(frozen=True, eq=False)
class Description:
    """One array of one sample; see docs/device.md.

    Attributes:
        pieces: the patches that it consists of.
        unknown: value of channels without a piece; None where pieces cover all.
        before: voxels along each axis that the previous tile covers; see `Crop.voxels_before`.
        kind: content of a target; None for an input.
    """

    pieces: tuple[Piece, ...]
    unknown: float | None = None
    before: tuple[int, ...] = ()
    kind: TargetKind | None = None


def describe(
    crop: Crop, name: str, place: Shape, turn: FloatArray | None, transform: Any, advance: FloatArray | None
) -> Description | None:
    """Describe one array of one sample without displacement.

    None where it must be read: computed kinds, exact means, masked voxels.

    Args:
        crop: the crop.
        name: an input or a target.
        place: the sample's place in the placement's grid (z, y, x).
        turn: see `geometry.patch_map`; along the patch's axes.
        transform: value transform of an input; see `BatchLayout`.
        advance: distance to the previous tile; see `Placement.advance`.
    """
    turn = crop.plane.turn(turn)
    target = crop.arrays.targets.get(name)
    if target is None:
        piece = _piece(crop.raw.patches[name], place, turn, crop.raw.fill(transform))
        return Description((piece,)) if piece is not None else None
    window = crop.windows[name]
    if not _is_stored(target.kind) or any(mask is not None for mask in crop.hidden(place, window, turn, None)):
        return None
    stack = crop.labels.stacks[name]
    channels: Sequence[int | None] = [None]
    fill, unknown = 0, None
    if isinstance(stack, IdStack):
        channels, fill, unknown = [index for index, *_ in stack.members], UNKNOWN_ID, UNKNOWN_ID
    pieces = []
    for channel, patches in zip(channels, crop.labels.patches(name), strict=True):
        piece = _piece(patches, place, turn, fill, channel)
        if piece is None:
            return None
        pieces.append(piece)
    before = () if advance is None else tuple(crop.voxels_before(window, advance))
    return Description(tuple(pieces), unknown, before, target.kind)


def described_regions(crop: Crop) -> list[Region]:
    """Return the regions that descriptions of samples of a crop refer to, each once."""
    regions: dict[int, Region] = {}
    targets = [name for name, target in crop.arrays.targets.items() if _is_stored(target.kind)]
    patches = [*crop.raw.patches.values(), *(part for name in targets for part in crop.labels.patches(name))]
    for part in patches:
        if part.sliced:
            regions[id(part.region)] = part.region
        if isinstance(part.source, StoredImage | Nearest) and (crop.spatial.roaming or not part.sliced):
            regions[id(part.source.region)] = part.source.region
    return list(regions.values())


def _is_stored(kind: TargetKind) -> bool:
    """Return True if the compact form of a target consists of stored voxels."""
    return not kind.computed and not any(kind.margin)


def _piece(
    patches: Patches, place: Shape, turn: FloatArray | None, fill: float, channel: int | None = None
) -> Piece | None:
    """Describe a patch; None where it is computed in another way than by a copy or a gather."""
    cut = patches.cut(turn)
    if cut is not None:
        return _copied(patches.region, cut, patches.start(cut, place), patches.window.shape, fill, channel)
    source, window = patches.source, patches.window
    if not isinstance(source, StoredImage | Nearest):
        return None
    center = patches.placement.first + patches.placement.step * place
    amap = patch_map(center, window.shape, window.scale, source.lattice, turn)
    cut = slices(amap)
    if cut is not None:
        return _copied(source.region, cut, cut.start, window.shape, fill, channel)
    method: Method = "linear" if isinstance(source, StoredImage) else "nearest"
    if not is_gathered(amap, method):
        return None
    dtype = source.region.dtype
    if method == "linear" and (dtype.kind not in "iu" or dtype.itemsize > 4):
        return None  # of floats, those that are not finite need a search of the box
    low, high = gathered_box(amap, source.region.shape)
    return Piece(
        source.region, fill, _shape(low), _shape(np.subtract(high, low)), amap=amap, method=method, channel=channel
    )


def _copied(region: Region, cut: Slices, start: Shape, patch: Shape, fill: float, channel: int | None) -> Piece:
    """Describe a patch that is a box of a region, perhaps partly outside."""
    shape = cut.shape(patch)
    low = np.clip(start, 0, region.shape)
    high = np.clip(np.add(start, shape), low, region.shape)
    return Piece(region, fill, _shape(low), _shape(high - low), cut, start, channel=channel)


def _shape(value: Any) -> Shape:
    z, y, x = (int(n) for n in value)
    return z, y, x
