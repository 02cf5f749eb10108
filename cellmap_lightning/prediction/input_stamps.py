"""Stamps of the stored chunks that the blocks of a prediction are computed from.

They are compared when a block ends, when the prediction ends, and when it is resumed: otherwise one output could mix
voxels that were predicted from raw before and after a change.
"""

import hashlib
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import numpy as np

from cellmap_lightning.cache.patches import stored_box
from cellmap_lightning.crops.crop import Crop
from cellmap_lightning.errors import OutputError
from cellmap_lightning.geometry.lattice import Box, Shape, to_vector
from cellmap_lightning.io.array_reader import ArrayReader
from cellmap_lightning.prediction.blending import Tiling
from cellmap_lightning.prediction.blocks import BlockGrid
from cellmap_lightning.prediction.skipping import Skipping

#: An array, and the start and the shape of a box of it.
Read = tuple[ArrayReader, tuple[int, int, int], Shape]

#: Threads that read the state of files: on network file systems each call waits.
THREADS = 16


class InputStamps:
    """The stamps of the stored chunks of one volume. Thread-safe. See docs/prediction.md.

    Args:
        grid: the blocks.
        tilings: the patches, for each plane.
        crops: the volume, once for each plane.
        skips: the predicate of skipped blocks, which reads chunks too; None without it.
    """

    def __init__(
        self, grid: BlockGrid, tilings: Sequence[Tiling], crops: Sequence[Crop], skips: Skipping | None
    ) -> None:
        self._grid, self._tilings, self._crops, self._skips = grid, tilings, crops, skips
        self._lock = threading.Lock()
        self._begun: dict[int, str] = {}

    @property
    def metadata(self) -> str:
        """A hash of the identity of the arrays that are read: their locations and metadata."""
        readers = [image.reader for crop in self._crops for image in crop.images.values()]
        if self._skips is not None and self._skips.mask is not None:
            readers.append(self._skips.mask)
        names = sorted({repr(reader.identity()) for reader in readers})
        return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]

    def begin(self, block: int) -> str:
        """Return the stamp of a block at the first call, which must be before anything of the block is read."""
        with self._lock:
            if block not in self._begun:
                self._begun[block] = self.of(block)
            return self._begun[block]

    def of(self, block: int) -> str:
        """Return the current stamp of a block: 16 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=8)
        for reader, start, shape in self._reads(block):
            digest.update(reader.stamp(start, shape).to_bytes(8, "little"))
        return digest.hexdigest()

    def changed(self, stamps: dict[int, str]) -> int | None:
        """Return the first block whose stamp has changed; None if all are unchanged."""
        with ThreadPoolExecutor(THREADS) as pool:
            now = pool.map(self.of, stamps)
            return next((block for block, stamp in zip(stamps, now, strict=True) if stamps[block] != stamp), None)

    def check(self, block: int) -> None:
        """Check that the chunks of a block have not changed since `begin`.

        Raises:
            OutputError: they have changed.
        """
        if self.of(block) != self.begin(block):
            raise OutputError(
                f"{self.describe(block)}. The prediction would mix both states: start again with overwrite=True when "
                "no other program writes there"
            )

    def check_all(self) -> None:
        """Check all blocks that this process has read; see `check`."""
        block = self.changed(dict(self._begun))
        if block is not None:
            self.check(block)

    def describe(self, block: int) -> str:
        """Return a sentence about the latest change of the files of a block, for messages."""
        newest: tuple[int, str] = 0, ""
        for reader, start, shape in self._reads(block):
            for index in reader.files(start, shape) if reader.local else ():
                file = reader.level.array.file(index)
                try:
                    status = os.stat(file)  # noqa: PTH116  thousands of them
                except OSError:
                    continue
                newest = max(newest, (max(status.st_mtime_ns, status.st_ctime_ns), file))
        time, file = newest
        where = f"{file} (changed {datetime.fromtimestamp(time / 1e9):%Y-%m-%d %H:%M:%S})" if file else "a chunk file"
        return f"raw has changed since block {block} ({self._grid.box(block)}) was predicted: {where}"

    def _reads(self, block: int) -> list[Read]:
        """Return the boxes of stored arrays that the patches of a block, and the test for skipping it, read."""
        first, (_, shape) = self._grid.whole_start(block), self._grid[block]
        whole = self._grid.whole
        boxes: dict[str, tuple[ArrayReader, Box, int]] = {}
        for crop, tiling in zip(self._crops, self._tilings, strict=True):
            along = [
                [start for start, _, _ in tiling.along(axis, a, a + n)]
                for axis, (a, n) in enumerate(zip(first, shape, strict=True))
            ]
            half = np.multiply(tiling.patch, whole.step) / 2
            low, high = (
                np.asarray(whole.box.lower) + np.multiply(whole.step, [pick(starts) for starts in along]) + half
                for pick in (min, max)
            )
            for name, spec in crop.arrays.inputs.items():
                window, image = crop.in_volume(spec.window, spec.flat), crop.images[name]
                box = Box(to_vector(low - window.extent / 2), to_vector(high + window.extent / 2))
                # Neighbouring voxels for interpolation or averaging.
                margin = 2 + math.ceil(np.max(window.scale / np.asarray(image.lattice.step)))
                key = str(image.level.path)
                if key in boxes:
                    box, margin = box.union(boxes[key][1]), max(margin, boxes[key][2])
                boxes[key] = image.reader, box, margin
        if self._skips is not None and self._skips.mask is not None:
            boxes["mask"] = self._skips.mask, self._grid.box(block), 1
        stored = ((reader, stored_box(reader.level.lattice, box, margin)) for reader, box, margin in boxes.values())
        return [(reader, *part) for reader, part in stored if part is not None]
