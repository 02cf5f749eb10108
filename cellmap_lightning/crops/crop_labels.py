"""Labels of a crop: the annotated classes, the reading of targets, and measurements of classes."""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.batches.arrays import TargetArray
from cellmap_lightning.cache.patches import Patches
from cellmap_lightning.cache.region import Region
from cellmap_lightning.cache.region_store import RegionStore
from cellmap_lightning.crops.class_index import Foreground, foreground_index
from cellmap_lightning.crops.class_tiles import tiles_with
from cellmap_lightning.crops.counts import foreground, known_foreground, unknown_in_metadata
from cellmap_lightning.crops.encodings import LabelEncodings
from cellmap_lightning.crops.id_labels import IdStack, id_dtype
from cellmap_lightning.crops.image import choose_level
from cellmap_lightning.crops.labels import BitStack
from cellmap_lightning.crops.options import LabelOptions, ReadOptions
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, SCALE_TOLERANCE, Box, FloatArray, Lattice, Shape
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.geometry.sample_map import Warp
from cellmap_lightning.io.ngff import Level, Multiscale
from cellmap_lightning.runtime.thread_pool import ReadPool
from cellmap_lightning.transforms.implied import Implications
from cellmap_lightning.transforms.kinds.kind import UNKNOWN_ID, TargetKind


class TooCoarseError(CellMapValueError):
    """The labels of a crop are coarser than a target."""


class CropLabels:
    """Labels of one crop, readable without raw; see docs/targets.md.

    Args:
        label: name of the crop, for messages.
        images: the label image of each class that is read and annotated.
        classes: the classes of the targets.
        targets: the target arrays.
        windows: a patch of each target, along the axes of the volume.
        implications: implications between classes.
        read: options of reading and caching.
        options: options of the meaning of labels.
        store: cache of decoded voxels.

    Attributes:
        annotated: the classes that are annotated here.
        encodings: encodings of the classes.
        stacks: the stored arrays of each target.

    Raises:
        TooCoarseError: the labels are coarser than a target, and that is an error.
        CellMapError: an encoding or a level cannot be read.
    """

    def __init__(
        self,
        label: str,
        images: Mapping[str, Multiscale],
        classes: Sequence[str],
        targets: Mapping[str, TargetArray],
        windows: Mapping[str, Window],
        implications: Implications,
        read: ReadOptions,
        options: LabelOptions,
        store: RegionStore,
    ) -> None:
        self.label, self.images, self.classes, self.targets = label, images, tuple(classes), targets
        self.annotated = tuple(c for c in classes if c in images)
        self._stored_levels = options.label_downsample == "stored"
        self._retry_policy = read.retry_policy
        if images and options.too_coarse == "error":
            self._check_resolution([windows[name].scale for name in targets])
        self.encodings = LabelEncodings(label, options.unknown, options.missing_labels, retry_policy=read.retry_policy)
        self.stacks: dict[str, BitStack | IdStack] = {}
        for name, target in targets.items():
            if target.kind.reads == "bits":
                self.stacks[name] = BitStack(
                    images, implications, len(classes), windows[name], store.chunks, label, options.label_downsample,
                    self.encodings, read.reader, read.retry_policy,
                )  # fmt: skip
            else:
                annotated = {c: image for c, image in images.items() if c in classes}
                self.stacks[name] = IdStack(
                    annotated, classes, windows[name], store.chunks, label, self.encodings, read.reader,
                    read.retry_policy,
                )  # fmt: skip
        self.id_dtype = id_dtype(images)

    @cached_property
    def box(self) -> Box:
        """The smallest box that holds the labels of all classes, nm."""
        boxes = [image.finest.lattice.box for image in self.images.values()]
        crop = boxes[0]
        for box in boxes[1:]:
            crop = crop.union(box)
        return crop

    def _check_resolution(self, scales: Sequence[FloatArray]) -> None:
        finest = np.min(scales, axis=0)
        for name, image in self.images.items():
            level = image.finest
            ratio = np.divide(level.scale, finest)
            if ratio.max() > 1 + SCALE_TOLERANCE:
                axis = int(ratio.argmax())
                raise TooCoarseError(
                    f"{self.label}: the labels of {name!r} ({level.scale[axis]:g} nm along {AXES[axis]} at their "
                    f"finest level) are {ratio[axis]:.3g}x coarser than the {finest[axis]:g} nm asked for; use a "
                    "coarser scale, or too_coarse=upsample"
                )

    # -- reading

    @property
    def lattices(self) -> list[tuple[str, Lattice]]:
        """Each target with the lattices that it is read from."""
        return [(name, lattice) for name, stack in self.stacks.items() for lattice in stack.lattices]

    @property
    def levels(self) -> list[Level]:
        """The level of each array that samples are read from."""
        return [level for stack in self.stacks.values() for level in stack.levels]

    @property
    def regions(self) -> list[Region]:
        """The arrays that are read, each decoded once; after `place`."""
        return [region for stack in self.stacks.values() for region in stack.regions]

    def place(
        self,
        windows: Mapping[str, Window],
        straight: Mapping[str, Window],
        placement: Placement,
        axis: FloatArray | None,
        roaming: bool,
    ) -> None:
        """Plan how each target is read at each position.

        Args:
            windows: a patch of each target, along the patch's axes.
            straight: the same along the axes of the volume.
            placement: the positions.
            axis: matrix from the patch's axes to the volume's; None if they are the same.
            roaming: patches may be other than slices: rotated by any angle, zoomed, sheared or displaced.
        """
        for name, stack in self.stacks.items():
            margin = self.targets[name].kind.margin
            window, upright = (with_margin(w[name], margin) for w in (windows, straight))
            stack.place(window, upright, placement, axis, roaming)

    def patches(self, name: str) -> list[Patches]:
        """Return the patches of a target; after `place`."""
        stack = self.stacks[name]
        if isinstance(stack, IdStack):
            return stack.patches
        assert stack.patches is not None
        return [stack.patches]

    def read_into(
        self,
        name: str,
        place: Shape,
        turn: FloatArray | None,
        out: np.ndarray[Any, Any],
        kind: TargetKind,
        window: Window,
        hidden: Sequence[npt.NDArray[np.bool_] | None] = (),
        warp: Warp | None = None,
    ) -> None:
        """Write a target of one sample to its place in a compact batch.

        Args:
            name: the target.
            place: the sample's place in the placement's grid (z, y, x).
            turn: see `geometry.patch_map`.
            out: one sample of the target's compact form.
            kind: content and encoding of the target.
            window: its patch, with the margin of its kind.
            hidden: masks ``[z, y, x]`` of that patch, in which the target is unknown regardless of annotations.
            warp: the displacement along the patch's axes; None for none.
        """
        stack = self.stacks[name]
        shape: tuple[int, ...]
        if isinstance(stack, IdStack):
            shape, dtype = (len(self.classes), *window.shape), stack.dtype
        else:
            shape, dtype = (*window.shape, stack.depth_out), np.dtype(np.uint8)
        # Read in place if the stored form is the compact form, as for binary targets.
        same = shape == out.shape and dtype == out.dtype
        stored = out if same else np.empty(shape, dtype)
        if isinstance(stack, IdStack):
            stack.read_into(place, stored, turn, warp)
        else:
            self.patches(name)[0].read_into(place, stored, turn, 0, warp)
        for mask in hidden:
            if mask is not None and isinstance(stack, IdStack):
                stored[:, mask] = UNKNOWN_ID
            elif mask is not None:
                stored[mask] = 0
        if not same:
            kind.encode(stored, out)

    # -- measurements

    def class_counts(self, pool: ReadPool, window: Window) -> dict[str, float]:
        """Count the foreground voxels of each annotated class, scaled to the resolution of a patch.

        Counts are those of ``complement_counts`` in the metadata. Without these the voxels are counted once, and the
        count is cached in the cache folder, never in the data.
        """
        counts = {}
        for name in self.annotated:
            image = self.images[name]
            code, label = self.encodings.of(name, image, image.finest), f"{self.label}/{name}"
            stored = foreground(image, code, pool, label, self._retry_policy)
            counts[name] = stored * _per_stored_voxel(image, window)
        return counts

    def background_counts(self, counts: Mapping[str, float], window: Window) -> dict[str, float]:
        """Return the voxels where each annotated class is absent, scaled like `class_counts`.

        Unknown voxels are left out if the metadata have their number.
        """
        background = {}
        for name, count in counts.items():
            image = self.images[name]
            known = float(np.prod(image.finest.array.shape)) - unknown_in_metadata(image)
            background[name] = max(0.0, known * _per_stored_voxel(image, window) - count)
        return background

    @property
    def counted(self) -> bool:
        """True if `class_counts` reads no voxels."""
        images = {name: self.images[name] for name in self.annotated}
        codes = self.encodings
        return all(known_foreground(i, i.finest, codes.of(n, i, i.finest)) is not None for n, i in images.items())

    def foreground_index(self, name: str, pool: ReadPool, scale: FloatArray) -> Foreground:
        """Return an index of the foreground of a class.

        Its level is that of patches of this voxel size, or the next finer one with any foreground. With
        ``label_downsample`` other than ``stored`` it is the finest level, from which patches are computed.
        """
        image, label = self.images[name], f"{self.label}/{name}"
        chosen = choose_level(image, scale.tolist(), label) if self._stored_levels else image.finest
        levels = image.present[image.present.index(chosen) :: -1]
        code = self.encodings.of(name, image, chosen)
        return foreground_index(levels, code, pool, label, self._retry_policy)

    def class_tiles(
        self, pool: ReadPool, placement: Placement, window: Window
    ) -> dict[str, npt.NDArray[np.int64] | None]:
        """Return the tiles that contain each annotated class; see `tiles_with`."""
        tiles: dict[str, npt.NDArray[np.int64] | None] = {}

        def find_tiles(name: str) -> None:
            image, label = self.images[name], f"{self.label}/{name}"
            code = partial(self.encodings.of, name, image)
            tiles[name] = tiles_with(image, code, placement, window, label, self._retry_policy)

        pool.run([partial(find_tiles, name) for name in self.annotated])
        return tiles


def with_margin(window: Window, margin: Shape) -> Window:
    """Return a window with more voxels at each side."""
    if not any(margin):
        return window
    z, y, x = (n + 2 * m for n, m in zip(window.shape, margin, strict=True))
    return Window((z, y, x), window.scale.tolist())


def _per_stored_voxel(image: Multiscale, window: Window) -> float:
    """Return the ratio of a voxel's volume at the finest level to that of a patch's voxel."""
    return image.finest.lattice.voxel_volume / float(np.prod(window.scale))
