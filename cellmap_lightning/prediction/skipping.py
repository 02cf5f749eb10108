"""Which blocks of a prediction need not be computed."""

from collections.abc import Sequence
from itertools import pairwise, product

from cellmap_lightning.cache.patches import stored_box
from cellmap_lightning.crops.image import StoredImage, choose_level
from cellmap_lightning.geometry.lattice import Box
from cellmap_lightning.io.chunks import ChunkReader, chunk_shape
from cellmap_lightning.io.ngff import read_multiscale


class Skipping:
    """Says of a physical box whether there is anything to predict in it.

    There is nothing where the mask has no voxel above 0 in the box, or where all of raw's voxels in it have one value,
    as what lies around the imaged volume has.

    Args:
        mask: a multiscale group, read at the coarsest level that is not coarser than the output; None for no mask.
        scale: voxel size of the output, nm.
        raw: the volume that is predicted; None to look at the mask alone.

    Raises:
        CellMapFileNotFoundError: there is no such mask.
    """

    def __init__(self, mask: str | None, scale: Sequence[float], raw: StoredImage | None) -> None:
        self.raw = raw
        #: Reads the mask, where there is one.
        self.mask: ChunkReader | None = None
        if mask is not None:
            self.mask = ChunkReader(choose_level(read_multiscale(mask), scale, "mask"), "mask")
        self._known: dict[Box, bool] = {}

    def __call__(self, box: Box) -> bool:
        """Whether the box is skipped: the same answer each time, found once."""
        if box not in self._known:
            self._known[box] = self._masked(box) or self._empty(box)
        return self._known[box]

    def _masked(self, box: Box) -> bool:
        if self.mask is None:
            return False
        found = stored_box(self.mask.level.lattice, box, 0)
        if found is None:
            return True
        parts = _parts(*found, chunk_shape([self.mask]))
        return not any((self.mask.read(*where) > 0).any() for where in parts)

    def _empty(self, box: Box) -> bool:
        if self.raw is None:
            return False
        found = stored_box(self.raw.lattice, box, 0)
        if found is None:
            return True
        value = None
        for where in _parts(*found, self.raw.region.chunks):
            voxels = self.raw.region.read(*where)
            if value is None:
                value = voxels.flat[0]
            if (voxels != value).any():
                return False
        return True


def _parts(
    start: tuple[int, int, int], shape: tuple[int, int, int], chunks: tuple[int, int, int]
) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """A box in the parts that lie in one chunk each."""
    axes = []
    for first, count, chunk in zip(start, shape, chunks, strict=True):
        cuts = [first, *range((first // chunk + 1) * chunk, first + count, chunk), first + count]
        axes.append([(a, b - a) for a, b in pairwise(cuts)])
    return [((z[0], y[0], x[0]), (z[1], y[1], x[1])) for z, y, x in product(*axes)]
