import itertools

import numpy as np
import pytest

from cellmap_lightning.geometry.grids import cell_parts, covering_boxes, touched_cells


@pytest.mark.parametrize(
    ("start", "shape", "cell"),
    [
        ((0, 0, 0), (8, 8, 8), (4, 4, 4)),
        ((3, 5, 7), (9, 1, 6), (4, 5, 3)),
        ((4, 8, 0), (4, 4, 1), (4, 4, 4)),
        ((2, 2, 2), (3, 3, 3), (16, 1, 2)),
        ((5, 0, 3), (0, 4, 4), (4, 4, 4)),
    ],
)
def test_parts_of_a_box(start, shape, cell):
    """Each voxel of the box is in one part, and each part in one cell; against the cell of each voxel."""
    voxels = list(itertools.product(*(range(a, a + n) for a, n in zip(start, shape, strict=True))))
    cells = {tuple(int(v) for v in np.floor_divide(voxel, cell)) for voxel in voxels}
    if voxels:
        assert set(itertools.product(*touched_cells(start, shape, cell))) == cells
    count = np.zeros(np.add(start, shape) + 1, int)
    for first, size in cell_parts(start, shape, cell):
        if all(size):
            assert len({tuple(np.floor_divide(end, cell)) for end in (first, np.add(first, size) - 1)}) == 1
        count[tuple(slice(a, a + n) for a, n in zip(first, size, strict=True))] += 1
    assert count.sum() == len(voxels)
    assert all(count[voxel] == 1 for voxel in voxels)


def test_boxes_that_cover_an_array():
    """Those of a loop over chunks, in the same order."""
    assert list(covering_boxes((5, 4, 2), (4, 4, 4))) == [((0, 0, 0), (4, 4, 2)), ((4, 0, 0), (1, 4, 2))]
    corners = [start for start, _ in covering_boxes((9, 5, 7), (4, 2, 3))]
    assert corners == list(itertools.product(range(0, 9, 4), range(0, 5, 2), range(0, 7, 3)))
    assert list(covering_boxes((0, 5, 5), (4, 4, 4))) == []


def test_axes_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        touched_cells((0, 0), (4, 4), (4, 4, 4))
