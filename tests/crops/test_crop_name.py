from pathlib import PurePosixPath

import pytest

from cellmap_lightning.crops.crop_name import CropName, container_of


def test_the_text_of_a_name():
    name = CropName("jrc_hela-2", "crop1")
    assert f"{name}" == str(name) == "jrc_hela-2/crop1"
    assert name.of("mito") == "jrc_hela-2/crop1/mito"
    assert name == ("jrc_hela-2", "crop1")  # as filters take them


@pytest.mark.parametrize(
    ("path", "container"),
    [
        ("data/jrc_a.zarr/recon-1/crop1", "data/jrc_a.zarr"),
        ("data/jrc_a.n5/crop1", "data/jrc_a.n5"),
        ("outer.zarr/jrc_b.zarr/crop1", "outer.zarr/jrc_b.zarr"),
        ("data/jrc_a/crop1.zarr", None),
        ("crop1", None),
    ],
)
def test_the_innermost_container_that_holds_a_path(path, container):
    expected = PurePosixPath(container) if container else None
    assert container_of(PurePosixPath(path).parents) == expected
