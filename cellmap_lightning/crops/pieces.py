"""Descriptions of samples: the voxels that an array of a sample shows, for a gather elsewhere, such as on a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellmap_lightning.cache.patches import Patches
from cellmap_lightning.cache.region import Region
from cellmap_lightning.crops.crop import Crop
from cellmap_lightning.crops.id_labels import IdStack
from cellmap_lightning.crops.image import StoredImage
from cellmap_lightning.crops.labels import Nearest
from cellmap_lightning.geometry.exact_means import Means, plan_means
from cellmap_lightning.geometry.lattice import AffineMap, FloatArray, Shape
from cellmap_lightning.geometry.resample import Method, Slices, slices
from cellmap_lightning.geometry.rotation import gathered_box, is_gathered
from cellmap_lightning.geometry.sample_map import SampleMap, Warp, sample_map
from cellmap_lightning.geometry.spline_gather import spline_box
from cellmap_lightning.geometry.spline_map import SplineMap
from cellmap_lightning.transforms.kinds.kind import UNKNOWN_ID, TargetKind

#: A box of a patch's voxels.
PatchBox = tuple[slice, slice, slice]


@dataclass(frozen=True, eq=False)
class Piece:
    """A patch, or a box of one, from one region: a box of that, or the map that evaluates it.

    Attributes:
        region: the stored voxels.
        fill: value of the voxels outside the region.
        low: first voxel of the region that is needed.
        shape: voxels that are needed; 0 along an axis where the patch lies outside.
        box: the part of the patch; None for all of it.
        cut: the box that is copied; None for a map.
        start: first voxel of that box, which may lie outside of the region.
        amap: map from the voxels of that part to those of the region; None for a box.
        method: ``linear`` for raw, ``nearest`` for labels.
        channel: position of the class, for ids; None for all channels.
        means: sums along the axes in place of the map.
    """

    region: Region
    fill: float
    low: Shape
    shape: Shape
    box: PatchBox | None = None
    cut: Slices | None = None
    start: Shape = (0, 0, 0)
    amap: AffineMap | SplineMap | None = None
    method: Method = "nearest"
    channel: int | None = None
    means: Means | None = None


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
    crop: Crop,
    name: str,
    place: Shape,
    turn: FloatArray | None,
    transform: Any,
    advance: FloatArray | None,
    warp: Warp | None = None,
) -> Description | None:
    """Describe one array of one sample.

    None where it must be read: computed kinds, floats, masked voxels.

    Args:
        crop: the crop.
        name: an input or a target.
        place: the sample's place in the placement's grid (z, y, x).
        turn: see `geometry.patch_map`; along the patch's axes.
        transform: value transform of an input; see `BatchLayout`.
        advance: distance to the previous tile; see `Placement.advance`.
        warp: the displacement along the patch's axes; None for none.
    """
    turn = crop.plane.turn(turn)
    target = crop.arrays.targets.get(name)
    if target is None:
        parts = _pieces(crop.raw.patches[name], place, turn, warp, crop.raw.fill(transform))
        return Description(tuple(parts)) if parts is not None else None
    window = crop.windows[name]
    if not _is_stored(target.kind) or any(mask is not None for mask in crop.hidden(place, window, turn, warp)):
        return None
    stack = crop.labels.stacks[name]
    channels: Sequence[int | None] = [None]
    fill, unknown = 0, None
    if isinstance(stack, IdStack):
        channels, fill, unknown = [index for index, *_ in stack.members], UNKNOWN_ID, UNKNOWN_ID
    pieces: list[Piece] = []
    for channel, patches in zip(channels, crop.labels.patches(name), strict=True):
        parts = _pieces(patches, place, turn, warp, fill, channel)
        if parts is None:
            return None
        pieces += parts
    before = () if advance is None else tuple(crop.voxels_before(window, advance, place))
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


def _pieces(
    patches: Patches,
    place: Shape,
    turn: FloatArray | None,
    warp: Warp | None,
    fill: float,
    channel: int | None = None,
) -> list[Piece] | None:
    """Describe a patch, by its boxes where sections move; None where it is computed otherwise than on a device."""
    cut = patches.cut(turn) if warp is None else None
    if cut is not None:
        start = patches.start(cut, place)
        return [_copied(patches.region, cut, start, patches.window.shape, None, fill, channel)]
    source, window = patches.source, patches.window
    if not isinstance(source, StoredImage | Nearest):
        return None
    center = patches.placement.first + patches.placement.step * place
    vmap = sample_map(center, window.shape, window.scale, source.lattice, turn, warp)
    method: Method = "linear" if isinstance(source, StoredImage) else "nearest"
    pieces = []
    for box, amap in vmap.pieces() if isinstance(vmap, SampleMap) else [(None, vmap)]:
        piece = _piece(source.region, amap, box, method, fill, channel)
        if piece is None:
            return None
        pieces.append(piece)
    return pieces


def _piece(
    region: Region,
    amap: AffineMap | SplineMap,
    box: PatchBox | None,
    method: Method,
    fill: float,
    channel: int | None,
) -> Piece | None:
    """Describe a patch, or a box of one, by its map; None where another path computes it exactly."""
    if isinstance(amap, AffineMap):
        cut = slices(amap)
        if cut is not None:
            return _copied(region, cut, cut.start, amap.shape, box, fill, channel)
    if method == "linear" and (region.dtype.kind not in "iu" or region.dtype.itemsize > 4):
        return None  # of floats, those that are not finite need a search of the box
    if isinstance(amap, AffineMap) and method == "linear" and not is_gathered(amap):
        # The patches of sections are many, and would often differ from the host's where another path rounds otherwise.
        return _exact(region, amap, fill, channel) if box is None else None
    if isinstance(amap, AffineMap):
        low, high = gathered_box(amap, region.shape)
    else:
        low, high = spline_box(*amap.bounds(0.5), region.shape)
    needed = _shape(np.subtract(high, low))
    return Piece(region, fill, _shape(low), needed, box, amap=amap, method=method, channel=channel)


def _exact(region: Region, amap: AffineMap, fill: float, channel: int | None) -> Piece:
    """Describe a patch along the axes of raw, or rotated about one of them, as sums along the axes."""
    plan = plan_means(amap, region.shape)
    if plan is None:
        return Piece(region, fill, (0, 0, 0), (0, 0, 0), amap=amap, method="linear", channel=channel)
    extent = _shape(np.subtract(plan.high, plan.low))
    return Piece(region, fill, _shape(plan.low), extent, amap=amap, method="linear", channel=channel, means=plan)


def _copied(
    region: Region, cut: Slices, start: Shape, patch: Shape, box: PatchBox | None, fill: float, channel: int | None
) -> Piece:
    """Describe a patch, or a box of one, that is a box of a region, perhaps partly outside."""
    shape = cut.shape(patch)
    low = np.clip(start, 0, region.shape)
    high = np.clip(np.add(start, shape), low, region.shape)
    return Piece(region, fill, _shape(low), _shape(high - low), box, cut, start, channel=channel)


def _shape(value: Any) -> Shape:
    z, y, x = (int(n) for n in value)
    return z, y, x
