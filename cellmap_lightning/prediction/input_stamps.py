"""Stamps of the stored chunks that the blocks of a prediction are computed from.

They are compared when a block ends, when the prediction ends, and when it is resumed: voxels that were predicted from
raw before and after a change would otherwise lie side by side in one output.
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
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.prediction.blending import Tiling
from cellmap_lightning.prediction.blocks import BlockGrid
from cellmap_lightning.prediction.skipping import Skipping

#: An array, and start and shape of a box of it.
Read = tuple[ChunkReader, tuple[int, int, int], Shape]

#: Threads that ask a file system for the state of files: on network file systems each call waits.
THREADS = 16


class InputStamps:
    """The stamps of one volume.

    Args:
        grid: the blocks.
        tilings: the patches, in each plane.
        crops: the volume, in each plane.
        skips: what decides on blocks that are not computed, as it reads too; None for nothing.
    """

    def __init__(
        self, grid: BlockGrid, tilings: Sequence[Tiling], crops: Sequence[Crop], skips: Skipping | None
    ) -> None:
        self._grid, self._tilings, self._crops, self._skips = grid, tilings, crops, skips
        self._lock = threading.Lock()
        self._begun: dict[int, str] = {}

    @property
    def metadata(self) -> str:
        """A hash of what identifies the arrays that are read: where they are, and their metadata."""
        readers = [image.reader for crop in self._crops for image in crop.images.values()]
        if self._skips is not None and self._skips.mask is not None:
            readers.append(self._skips.mask)
        names = sorted({repr(reader.identity()) for reader in readers})
        return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]

    def begin(self, block: int) -> str:
        """Return the stamp of a block as it is when this is called first, which is before anything of it is read."""
        with self._lock:
            if block not in self._begun:
                self._begun[block] = self.of(block)
            return self._begun[block]

    def of(self, block: int) -> str:
        """Return the stamp of a block as it is now: 16 hexadecimal digits."""
        found = hashlib.blake2b(digest_size=8)
        for reader, start, shape in self._reads(block):
            found.update(reader.stamp(start, shape).to_bytes(8, "little"))
        return found.hexdigest()

    def changed(self, stamps: dict[int, str]) -> int | None:
        """Return the first of some blocks whose stamp is another one now; None where there is none."""
        with ThreadPoolExecutor(THREADS) as pool:
            now = pool.map(self.of, stamps)
            return next((block for block, stamp in zip(stamps, now, strict=True) if stamps[block] != stamp), None)

    def check(self, block: int) -> None:
        """Check a block that was read against its stamp from before.

        Raises:
            OutputError: chunks that it was read from have changed since.
        """
        if self.of(block) != self.begin(block):
            raise OutputError(
                f"{self.describe(block)}. What is predicted would be a mixture: start again with overwrite=True when "
                "nothing writes there any more"
            )

    def check_all(self) -> None:
        """Check all blocks that this process has read; see `check`."""
        block = self.changed(dict(self._begun))
        if block is not None:
            self.check(block)

    def describe(self, block: int) -> str:
        """Say which of the files of a block was changed last, for messages."""
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
        """The boxes of stored arrays that the patches of a block show, and what decides whether it is skipped."""
        first, (_, shape) = self._grid.whole_start(block), self._grid[block]
        whole = self._grid.whole
        boxes: dict[str, tuple[ChunkReader, Box, int]] = {}
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
                # Neighbours that are interpolated from, or averaged.
                more = 2 + math.ceil(np.max(window.scale / np.asarray(image.lattice.step)))
                key = str(image.level.path)
                if key in boxes:
                    box, more = box.union(boxes[key][1]), max(more, boxes[key][2])
                boxes[key] = image.reader, box, more
        if self._skips is not None and self._skips.mask is not None:
            boxes["mask"] = self._skips.mask, self._grid.box(block), 1
        found = ((reader, stored_box(reader.level.lattice, box, more)) for reader, box, more in boxes.values())
        return [(reader, *part) for reader, part in found if part is not None]
