"""Raw that is the label array of a class is refused, since the input would be the target."""

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapValueError
from tests.foreign import cube, dataset, ramp, write_image, write_pair


@pytest.mark.parametrize("way", ["image", "link", "level", "label map"])
def test_raw_that_is_the_mask(tmp_path, way):
    _, target = write_pair(tmp_path, cube())
    raw = f"{tmp_path}/v.zarr/crop1/mito"
    options = {}
    if way == "link":
        (tmp_path / "link").symlink_to(raw)
        raw = str(tmp_path / "link")
    if way == "level":
        target, raw = target.replace("[mito]", "mito"), f"{tmp_path}/v.zarr/crop1/../crop1/mito"
    if way == "label map":
        target = f"{tmp_path}/v.zarr/crop1/mito/{{1:mito}}"
    with pytest.raises(CellMapValueError, match=r"^v/.*: raw and the class mito are the same array .*s0, so that"):
        dataset(raw, target, 16, **options)


@pytest.mark.parametrize("other", ["er", "copy", "raw"])
def test_other_arrays_may_be_raw(tmp_path, other):
    """A mask of another class, and a copy, are inputs like others."""
    raw, target = write_pair(tmp_path, cube())
    path = tmp_path / "v.zarr" / "crop1" / "er"
    write_image(path if other == "er" else tmp_path / "copy.zarr", ramp() if other == "er" else cube())
    raw = {"er": str(path), "copy": str(tmp_path / "copy.zarr"), "raw": raw}[other]
    with dataset(raw, target, 16) as data:
        assert np.isfinite(data[0]["raw"].numpy()).all()
