"""Chunks of raw that the patches of a prediction reach and that are not stored: checked before the first block."""

import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from cellmap_lightning.cache.patches import reached
from cellmap_lightning.crops.crop import Crop
from cellmap_lightning.crops.image import MissingRaw, StoredImage
from cellmap_lightning.crops.missing_raw import within
from cellmap_lightning.errors import ChunkError
from cellmap_lightning.geometry.lattice import SCALE_TOLERANCE, Box, FloatArray, Shape, to_vector
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.prediction.blending import Tiling
from cellmap_lightning.prediction.blocks import BlockGrid
from cellmap_lightning.wording import part_of

log = logging.getLogger(__name__)

#: Chunks whose existence is checked at most: of an array on a disk, and of a remote one, where each costs a request.
MOST_CHECKED, MOST_REQUESTED = 1 << 18, 1 << 10
_THREADS = 16

Index = tuple[int, ...]


@dataclass(frozen=True)
class NamedBox:
    """A box that is predicted, and its name in messages.

    Attributes:
        name: dataset and name of a crop, as ``jrc_hela-2/crop113``.
        box: its box without a margin, nm.

    Example:
        >>> NamedBox("jrc_hela-2/crop113", Box((0, 0, 0), (800, 800, 800))).crop
        'crop113'
    """

    name: str
    box: Box

    @property
    def crop(self) -> str:
        """The name of the crop."""
        return self.name.rpartition("/")[2]


@dataclass
class _Reached:
    """The chunks of one array that patches reach.

    Attributes:
        image: the array.
        chunks: their indices.
        inside: those that hold a part of the box that is predicted.
        ends: first and last voxel along each axis, over all patches.
    """

    image: StoredImage
    chunks: set[Index] = field(default_factory=set)
    inside: set[Index] = field(default_factory=set)
    ends: list[tuple[FloatArray, FloatArray]] = field(default_factory=list)

    @property
    def is_too_large(self) -> bool:
        """True if there are more chunks than can be checked."""
        return len(self.chunks) > (MOST_CHECKED if self.image.reader.local else MOST_REQUESTED)

    def missing(self) -> set[Index] | None:
        """Return the chunks that are not stored; None if there are too many to check."""
        local = self.image.reader.local
        if self.is_too_large:
            return None
        ordered = sorted(self.chunks)
        try:
            if local:
                stored = [self.image.stored(index) for index in ordered]
            else:
                with ThreadPoolExecutor(_THREADS) as pool:
                    stored = list(pool.map(self.image.stored, ordered))
        except ChunkError:  # of a store that does not answer: reading retries, and raises it
            return None
        return {index for index, there in zip(ordered, stored, strict=True) if not there}

    def nearest(self, chunks: set[Index], point: FloatArray) -> str:
        """Return the file of the chunk whose middle is nearest to a point in voxels of the array."""
        size = np.asarray(self.image.level.zyx(self.image.level.array.files))

        def distance(index: Index) -> float:
            return float(np.linalg.norm((np.asarray(self.image.level.zyx(index)) + 0.5) * size - point))

        index = min(sorted(chunks), key=distance)
        array = self.image.level.array
        return f"chunk {array.file(index)}" if self.image.reader.local else f"chunk {array.key(index)}"

    def padding(self, box: Box) -> int:
        """Return the voxels that must be fetched around a box so that every patch finds its raw."""
        part = within(self.image, box)
        if part is None:
            return 1
        start, shape = np.asarray(part[0]), np.asarray(part[1])
        low = np.min([first for first, _ in self.ends], axis=0)
        high = np.max([last for _, last in self.ends], axis=0)
        return max(1, int((start - low).max()), int((high - start - shape).max()))


class RawGaps:
    """A check of the chunks of raw that the patches of a prediction reach; see docs/prediction.md.

    Args:
        crops: the volume, once for each plane.
        grid: the blocks.
        tilings: the patches, for each plane.
        box: the box to predict; None for the whole volume.
        named: the crop of a manifest that is predicted; None for another box.
    """

    def __init__(
        self,
        crops: Sequence[Crop],
        grid: BlockGrid,
        tilings: Sequence[Tiling],
        box: Box | None,
        named: NamedBox | None = None,
    ) -> None:
        self._crops, self._grid, self._tilings = crops, grid, tilings
        self._named = named
        self._box = box if named is None else named.box

    def check(self, blocks: Sequence[int], policy: MissingRaw, reports: bool = True) -> None:
        """Refuse or report missing chunks, and set the policy with which the crops are read.

        Args:
            blocks: numbers of the blocks that are computed.
            policy: the setting ``missing_raw``; ``auto`` refuses gaps inside a box, and reports those around it.
            reports: log warnings; errors are raised in any case.

        Raises:
            ChunkError: chunks are missing and that is an error; the message names one and what fetches it.
        """
        checked: set[str] = set()
        for found in self._reached(blocks):
            path = str(found.image.level.path)
            if not found.image.reader.local and self._box is None and policy != "error":
                continue  # one request per chunk of a whole volume; they are reported when they are read
            missing = found.missing()
            if missing is None:  # too many to check
                continue
            checked.add(path)
            inside = missing & found.inside
            if missing and (policy == "error" or (policy == "auto" and self._box is not None and inside)):
                raise ChunkError(self._refusal(found, inside or missing, bool(inside), policy))
            if missing and reports:
                log.warning("%s", self._report(found, missing, policy))
        self._settle(checked)

    def _settle(self, checked: set[str]) -> None:
        """Read checked arrays without further reports: chunks are decoded several at a time, and patches need some."""
        for crop in self._crops:
            for image in crop.images.values():
                image.quiet = image.quiet or str(image.level.path) in checked
            if all(str(image.level.path) in checked for image in crop.images.values()):
                crop.raw.set_missing("fill")

    # -- the chunks that patches reach

    def _reached(self, blocks: Sequence[int]) -> list[_Reached]:
        arrays: dict[str, _Reached] = {}
        for block in blocks:
            for image, low, high in self._spans(block):
                found = arrays.setdefault(str(image.level.path), _Reached(image))
                if found.is_too_large:
                    continue
                found.ends.append((low, high))
                found.chunks.update(_files(image, low, high))
                part = self._part(image, block)
                if part is not None:
                    found.inside.update(image.reader.files(*part))
        for found in arrays.values():
            found.inside &= found.chunks
        return list(arrays.values())

    def _spans(self, block: int) -> Iterator[tuple[StoredImage, FloatArray, FloatArray]]:
        """Yield each array with the first voxel and the end of what the patches of a block reach, inside the array."""
        whole, first, (_, shape) = self._grid.whole, self._grid.whole_start(block), self._grid[block]
        for crop, tiling in zip(self._crops, self._tilings, strict=True):
            along = [
                [start for start, _, _ in tiling.along(axis, a, a + n)]
                for axis, (a, n) in enumerate(zip(first, shape, strict=True))
            ]
            lowest = np.asarray([min(starts) for starts in along])
            z, y, x = (max(starts) - min(starts) + 1 for starts in along)
            step = np.asarray(whole.step)
            center = np.asarray(whole.box.lower) + step * (lowest + np.asarray(tiling.patch) / 2)
            placement = Placement(center, step, (z, y, x), tiling.patch, (False, False, False))
            for name, spec in crop.arrays.inputs.items():
                window, image = crop.in_volume(spec.window, spec.flat), crop.images[name]
                # Patches that are resampled need neighbours of their voxels.
                resampled = None if _is_aligned(window, image) else window.extent / 2
                lo, hi = reached(placement, window, image.lattice, False, False, resampled)
                yield image, np.maximum(lo, 0), np.minimum(hi, image.lattice.shape)

    def _part(self, image: StoredImage, block: int) -> tuple[Shape, Shape] | None:
        """Return the part of an array that holds the part of the predicted box in a block; None for none."""
        box = self._grid.box(block)
        if self._box is not None:
            if not box.intersects(self._box):
                return None
            box = Box(
                to_vector(np.maximum(box.lower, self._box.lower)), to_vector(np.minimum(box.upper, self._box.upper))
            )
        return within(image, box)

    # -- messages

    @property
    def _where(self) -> str:
        if self._named is not None:
            return self._named.name
        return "raw" if self._box is None else f"region {self._box}"

    @property
    def _what(self) -> str:
        if self._named is not None:
            return "crop"
        return "volume" if self._box is None else "region"

    def _middle(self, image: StoredImage) -> FloatArray:
        box = self._box or self._grid.lattice.box
        low, high = image.lattice.span(box.lower, box.upper)
        return (low + high) / 2

    def _command(self, found: _Reached) -> str:
        """Return the command of the challenge's tool that fetches what patches reach."""
        crops = "" if self._named is None else f" --crops {self._named.crop.removeprefix('crop')}"
        box = self._box or self._grid.lattice.box
        return f"csc fetch-data{crops} --raw-padding {found.padding(box)}"

    def _refusal(self, found: _Reached, missing: set[Index], inside: bool, policy: MissingRaw) -> str:
        level, of = found.image.level, found.inside if inside else found.chunks
        place = f"inside the {self._what}" if inside else f"around the {self._what}, as context,"
        setting = "" if policy == "auto" else f" (missing_raw={policy})"
        return (
            f"{self._where}: {part_of(len(missing), len(of), 'chunk')} of raw that its patches reach {place} "
            f"{_is(len(missing))} not stored{setting}: level {level.name} ({level.path}), as "
            f"{found.nearest(missing, self._middle(found.image))}; fetch them, for data of the challenge with "
            f"{self._command(found)}, or set missing_raw=warn to predict from the fill value there"
        )

    def _report(self, found: _Reached, missing: set[Index], policy: MissingRaw) -> str:
        level, count = found.image.level, len(found.chunks)
        around = not missing & found.inside
        nearest = found.nearest(missing, self._middle(found.image))
        place = f", all around the {self._what}" if around else ""
        text = (
            f"{self._where}: {part_of(len(missing), count, 'chunk')} ({100 * len(missing) / count:.0f} %) of raw that "
            f"its patches reach {_is(len(missing))} not stored{place}: level "
            f"{level.name} ({level.path}), nearest to the middle of the {self._what} {nearest}; they show the fill "
            f"value"
        )
        if around:
            return f"{text} as context; {self._command(found)} fetches them"
        if self._box is None and policy == "auto":
            return f"{text}, which is right where empty chunks are left out; missing_raw=error refuses them"
        return f"{text} (missing_raw={policy})"


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


def _is_aligned(window: Window, image: StoredImage) -> bool:
    """Return True if patches have the voxel size of an array: those that start on a voxel are a slice of it."""
    same = np.allclose(window.scale, image.lattice.step, rtol=SCALE_TOLERANCE, atol=0)
    return bool(same) and image.lattice.turn is None


def _files(image: StoredImage, low: FloatArray, high: FloatArray) -> Iterator[Index]:
    """Return the chunks of a part of an array, from its first voxel and its end."""
    start, shape = [int(a) for a in low], [math.floor(b - a) for a, b in zip(low, high, strict=True)]
    if min(shape) < 1:
        return iter(())
    return image.reader.files((start[0], start[1], start[2]), (shape[0], shape[1], shape[2]))
