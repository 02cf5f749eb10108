"""Detection of blocks without anything to predict."""

from collections.abc import Sequence

from cellmap_lightning.cache.patches import stored_box
from cellmap_lightning.crops.image import StoredImage, choose_level
from cellmap_lightning.geometry.grids import cell_parts
from cellmap_lightning.geometry.lattice import Box
from cellmap_lightning.io.array_reader import ArrayReader, chunk_shape
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.readers import open_reader


class Skipping:
    """A predicate that is True for physical boxes without anything to predict.

    These are boxes in which the mask has no voxel above 0, or in which all voxels of raw have one value, as around the
    imaged volume. See docs/prediction.md.

    Args:
        mask: a multiscale group, read at the coarsest level that is not coarser than the output; None for no mask.
        scale: voxel size of the output, nm.
        raw: the volume to predict; None to use the mask alone.

    Raises:
        CellMapFileNotFoundError: the mask does not exist.
    """

    def __init__(self, mask: str | None, scale: Sequence[float], raw: StoredImage | None) -> None:
        self.raw = raw
        #: Reader of the mask.
        self.mask: ArrayReader | None = None
        if mask is not None:
            self.mask = open_reader(choose_level(read_image(mask), scale, "mask"), "mask")
        self._known: dict[Box, bool] = {}

    def __call__(self, box: Box) -> bool:
        """Return True if the box is skipped; computed once per box, so that all callers agree."""
        if box not in self._known:
            self._known[box] = self.is_masked(box) or self._empty(box)
        return self._known[box]

    def is_masked(self, box: Box) -> bool:
        """Return True if the mask has no voxel above 0 in a box; always False without a mask."""
        if self.mask is None:
            return False
        stored = stored_box(self.mask.level.lattice, box, 0)
        if stored is None:
            return True
        parts = cell_parts(*stored, chunk_shape([self.mask]))
        return not any((self.mask.read(*part) > 0).any() for part in parts)

    def _empty(self, box: Box) -> bool:
        if self.raw is None:
            return False
        stored = stored_box(self.raw.lattice, box, 0)
        if stored is None:
            return True
        value = None
        # Chunk by chunk: in most blocks the first one has several values.
        for part in cell_parts(*stored, self.raw.region.chunks):
            voxels = self.raw.region.read(*part)
            if value is None:
                value = voxels.flat[0]
            if (voxels != value).any():
                return False
        return True
