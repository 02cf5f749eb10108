"""Inputs of a crop from raw: the level and patches of each input, and the fill value outside the volume."""

import logging
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.cache.patches import Patches, Resampled, reached
from cellmap_lightning.cache.region import Region
from cellmap_lightning.cache.region_store import RegionStore
from cellmap_lightning.crops.image import MissingRaw, StoredImage, choose_level
from cellmap_lightning.crops.options import IntensityOptions, ReadOptions
from cellmap_lightning.crops.raw_range import first_report
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import FloatArray, Shape
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.geometry.sample_map import Warp, sample_map
from cellmap_lightning.io.chunk_names import check_chunk_names
from cellmap_lightning.io.ngff import Level, Multiscale
from cellmap_lightning.io.statistics import statistics
from cellmap_lightning.redaction import hide_address
from cellmap_lightning.transforms.normalization import AUTO
from cellmap_lightning.transforms.spatial import SpatialTransforms

log = logging.getLogger(__name__)


class RawInputs:
    """The inputs of a crop; see docs/transforms.md.

    Args:
        image: the raw image.
        path: its path, for messages and checkpoints.
        windows: a patch of each input, along the axes of the volume.
        label: name of raw in messages.
        read: options of reading and caching.
        intensity: options of normalization.
        store: cache of decoded voxels.

    Attributes:
        levels: the level that each input is read from.
        images: the stored voxels of each input.
        affine: offset and factor that normalize stored values.
        patches: patches of each input, after `place`.
        regions: the arrays that are read, after `place`.

    Raises:
        CellMapError: an input is too fine, or the metadata do not match the files.
    """

    def __init__(
        self,
        image: Multiscale,
        path: str,
        windows: Mapping[str, Window],
        label: str,
        read: ReadOptions,
        intensity: IntensityOptions,
        store: RegionStore,
    ) -> None:
        self.label, self.read, self.missing = label, read, read.missing_raw
        self.box = image.finest.lattice.box
        self.scales = tuple(level.scale for level in image.levels)
        self.levels = {
            name: choose_level(image, window.scale.tolist(), label, read.max_upsampling)
            for name, window in windows.items()
        }
        for level in self.distinct_levels:
            check_chunk_names(level.array, label)
        self._chunk_cache = store.chunks
        self.images = self._open_images()
        self.patches: dict[str, Patches] = {}
        self.regions: list[Region] = []
        self._fills: dict[float, float] = {}
        rule = intensity.rule
        measured = statistics(image, read.retry_policy) if rule.needs_statistics else None
        self.affine = rule.affine(self.dtype, measured, path)
        if rule.rule == "dtype" and self.dtype.kind in "iu" and self.dtype.itemsize >= 4:
            _warn_of_wide_type(path, str(self.dtype))
        if image.finest.array.dtype.kind == "b" and rule.rule == "dtype":
            self.affine = (1.0, -1.0) if rule.invert else (0.0, 1.0)
        #: Identifies this volume and rule in checkpoints, which hold no credentials.
        self.normalization_key = hide_address(f"{path} {rule}")

    def _open_images(self) -> dict[str, StoredImage]:
        read, cache = self.read, self._chunk_cache
        return {
            name: StoredImage(level, cache, self.label, read.reader, read.retry_policy, self.missing)
            for name, level in self.levels.items()
        }

    @property
    def distinct_levels(self) -> list[Level]:
        """The levels that are read, each once."""
        return list({level.path: level for level in self.levels.values()}.values())

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored type."""
        return next(iter(self.images.values())).region.dtype

    @property
    def cached(self) -> bool:
        """True if decoded voxels are cached."""
        return self.regions[0].is_cached

    def in_store(self, store: RegionStore) -> "RawInputs":
        """Return the same inputs with decoded voxels cached in another store; `place` them before reading."""
        other = copy(self)
        other.reopen(store)
        return other

    def reopen(self, store: RegionStore) -> None:
        """Replace the images by new ones that are cached in another store."""
        quiet = {name: image.quiet for name, image in self.images.items()}
        self._chunk_cache = store.chunks
        self.images = self._open_images()
        for name, image in self.images.items():
            image.quiet = quiet[name]  # missing chunks were reported already

    def share(self, store: RegionStore) -> None:
        """Cache single chunks in the store of a collection."""
        self._chunk_cache = store.chunks
        # Also images without a region in the store's plan, which feed resampled arrays.
        for image in self.images.values():
            image.region.cache = store.chunks

    def set_missing(self, policy: MissingRaw) -> None:
        """Set the policy for chunks that are not stored."""
        self.missing = policy
        for image in self.images.values():
            image.missing = policy

    def place(
        self,
        windows: Mapping[str, Window],
        straight: Mapping[str, Window],
        placement: Placement,
        axis: FloatArray | None,
        spatial: SpatialTransforms,
    ) -> None:
        """Plan how each input is read at each position, and the part of the volume that patches can touch.

        Args:
            windows: a patch of each input, along the patch's axes.
            straight: the same along the axes of the volume.
            placement: the positions.
            axis: matrix from the patch's axes to the volume's; None if they are the same.
            spatial: the spatial augmentation.
        """
        rotated, turned = bool(spatial.rotate), bool(spatial.transpose)
        directions = np.eye(3) if axis is None else np.abs(axis)
        self.patches, self.regions = {}, []
        for name, image in self.images.items():
            window, upright = windows[name], straight[name]
            patches = Patches(image.region, image.lattice, window, placement, image, axis)
            half = spatial.extended(window.extent / 2)
            extended = None if half is None else directions @ half
            roaming = rotated or not patches.sliced
            image.region.limit(*reached(placement, upright, image.lattice, turned, roaming, extended))
            regions = [image.region]
            if not patches.sliced and image.lattice.turn is None:
                # Not aligned with the lattice of raw: unless patches are rotated or displaced, all are slices of one
                # resampled array.
                box, region = image.lattice.box, image.region
                resampled = Resampled(
                    image, box, upright, placement, region.dtype, 0, self._chunk_cache, region.name
                )  # fmt: skip
                patches = resampled.patches(window, placement, axis)
                if patches.sliced:
                    resampled.region.limit(*reached(placement, upright, resampled.lattice, turned, rotated, extended))
                    regions = [resampled.region, image.region] if spatial.roaming else [resampled.region]
            self.patches[name] = patches
            self.regions += regions

    def fill(self, transform: Any) -> float:
        """Return the fill value outside the volume: the stored value closest to the one that is normalized to 0."""
        zero = self.affine[0] if isinstance(transform, str) else 0.0
        if zero not in self._fills:
            value = zero
            if self.dtype.kind in "iu":
                info = np.iinfo(self.dtype)
                value = min(max(round(value), int(info.min)), int(info.max))
            self._fills[zero] = value
        return self._fills[zero]

    def check_fill(self, label: str, transforms: Iterable[Any]) -> None:
        """Check that the fill value outside the volume is normalized to 0.

        Raises:
            CellMapValueError: the stored type cannot hold such a value.
        """
        offset, factor = self.affine
        error = abs((self.fill(AUTO) - offset) * factor)
        # Rounding a z-score's mean to a whole number is harmless; a value beyond the type is not.
        if AUTO in transforms and self.dtype.kind in "iu" and error > max(0.01, abs(factor)):
            raise CellMapValueError(
                f"{label}: normalize maps the stored value {offset:g} to 0, which {self.dtype} cannot represent, "
                "so that voxels outside the volume cannot be 0; use a range inside the type, or pad=False"
            )

    def read_into(
        self,
        name: str,
        place: Shape,
        turn: FloatArray | None,
        out: np.ndarray[Any, Any],
        transform: Any,
        warp: Warp | None = None,
    ) -> None:
        """Write an input of one sample to ``out`` ``[z, y, x]``; ``transform`` is its value transform."""
        fill = self.fill(transform)
        if out.dtype == self.dtype:
            self.patches[name].read_into(place, out, turn, fill, warp)
            return
        # Crops of different stored types are batched as float32, rounded as in their stored type.
        stored = np.empty(out.shape, self.dtype)
        self.patches[name].read_into(place, stored, turn, fill, warp)
        out[...] = stored

    def not_stored(
        self, center: FloatArray, window: Window, turn: FloatArray | None, warp: Warp | None = None
    ) -> list[npt.NDArray[np.bool_] | None]:
        """Return a mask of a patch's voxels of raw that are not stored, per input; see `StoredImage.missing_mask`."""
        images = self.images.values()
        return [
            image.missing_mask(sample_map(center, window.shape, window.scale, image.lattice, turn, warp))
            for image in images
        ]

    def bytes_under(self, extent: FloatArray) -> int:
        """Return an upper limit of the bytes of the decoded chunks that a box touches.

        Args:
            extent: edge lengths of the box, nm (z, y, x).
        """
        total = 0
        for image in {image.region.key: image for image in self.images.values()}.values():
            region = image.region
            reach = np.ceil(np.divide(extent, image.lattice.step) / region.chunks) + 1
            grid = np.ceil(np.divide(region.shape, region.chunks))
            total += region.chunk_bytes * int(np.minimum(reach, grid).prod())
        return total


def _warn_of_wide_type(path: str, dtype: str) -> None:
    """Warn once per volume that its values are a small part of the range of their type."""
    if not first_report(path, dtype):
        return
    log.warning(
        "raw %s: normalize=dtype maps the whole range of %s to [0, 1], in which usual values are nearly constant; set "
        "normalize={percentile: [0.5, 99.5]} or {range: [lowest, highest]}",
        hide_address(path), dtype,
    )  # fmt: skip
