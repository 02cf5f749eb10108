"""Messages for shapes and voxel sizes of patches that cannot be used."""

import numpy as np
import pytest
from omegaconf import OmegaConf

from cellmap_lightning.batches.arrays import parse_inputs
from cellmap_lightning.commands.config_values import check_model_shape, check_patch
from cellmap_lightning.errors import CellMapError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.patch_numbers import check_scale, check_shape

VOXELS, NM = "give three lengths in voxels (z, y, x)", "give three numbers in nm (z, y, x)"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (64, f"shape=64 is a single number; {VOXELS}, such as [64, 64, 64]"),
        (-3, f"shape=-3 is a single number; {VOXELS}, such as [64, 64, 64]"),
        ([64], f"shape=[64] has 1 number; {VOXELS}, such as [64, 64, 64], or two (y, x) for slices"),
        ([64, 64, 32, 1], "shape=[64, 64, 32, 1] has 4 numbers; " + VOXELS + ", such as [64, 64, 32], or two"),
        ([1, 1, 64, 64, 32], "shape=[1, 1, 64, 64, 32] has 5 numbers; " + VOXELS + ", such as [64, 64, 32], or two"),
        ([2, 3, 4, 5], "such as [64, 64, 64], or two"),
        ([], "shape=[] has 0 numbers; " + VOXELS),
        ([0, 64, 64], "shape=[0, 64, 64]: the length along z is 0; lengths are whole numbers of voxels of at least 1"),
        ([8, 0.5, -2], "the length along y is 0.5 and x is -2; lengths"),
        ([0, 64], "shape=[0, 64]: the length along y is 0; lengths"),
        ([float("nan")] * 3, "the length along z is nan and y is nan and x is nan"),
        ("64", f"shape='64' is not a list of numbers; {VOXELS}, such as [64, 64, 64]"),
        ([8, "8", 8], "shape=[8, '8', 8] is not a list of numbers"),
        ([8, True, 8], "is not a list of numbers"),
    ],
)
def test_the_message_names_key_value_and_what_is_right(value, text):
    with pytest.raises(CellMapError) as caught:
        check_shape("patch.shape", value)
    assert text in str(caught.value)
    assert str(caught.value).startswith("patch.shape=")


@pytest.mark.parametrize(
    ("value", "lengths", "text"),
    [
        (8, 3, f"scale=8 is a single number; {NM}, such as [8, 8, 8]"),
        ([8], 3, f"scale=[8] has 1 number; {NM}, such as [8, 8, 8]"),
        ([40, 4], 3, f"scale=[40, 4] has 2 numbers; {NM}, such as [40, 4, 4]"),
        ([4, 4], 3, "such as [4, 4, 4]"),
        ([8, 8, 8, 1], 2, "such as [8, 8, 8], or two (y, x), as the shape has"),
        ([-8, 8, 8], 3, "scale=[-8, 8, 8]: the voxel size along z is -8; voxel sizes are positive numbers of nm"),
        ([8, 0, float("inf")], 3, "the voxel size along y is 0 and x is inf; voxel sizes"),
        ([8, 0], 2, "scale=[8, 0]: the voxel size along x is 0"),
    ],
)
def test_voxel_sizes_likewise(value, lengths, text):
    with pytest.raises(CellMapError) as caught:
        check_scale("patch.scale", value, lengths)
    assert text in str(caught.value)
    assert str(caught.value).startswith("patch.scale=")


@pytest.mark.parametrize("value", [[8, 16, 32], (8.0, 16, 32), np.array([8, 16, 32])])
def test_what_is_right_is_returned(value):
    assert check_shape("shape", value) == [8, 16, 32]
    assert check_scale("scale", value) == [8, 16, 32]
    assert check_shape("shape", value[1:]) == [16, 32]
    assert check_scale("scale", value, 2) == [8, 16, 32]


@pytest.mark.parametrize(
    ("array", "error", "text"),
    [
        ({"shape": 64, "scale": [8] * 3}, CellMapTypeError, r"^input_arrays\.raw\.shape=64 is a single number"),
        ({"shape": [0, 8, 8], "scale": [8] * 3}, CellMapValueError, r"^input_arrays\.raw\.shape=.* along z is 0"),
        ({"shape": [8] * 3, "scale": [8] * 2}, CellMapValueError, r"^input_arrays\.raw\.scale=\[8, 8\] has 2 numbers"),
    ],
)
def test_arrays_of_a_dataset_are_checked_too(array, error, text):
    with pytest.raises(error, match=text):
        parse_inputs({"raw": array})


@pytest.mark.parametrize(
    ("patch", "text"),
    [
        ({"shape": [16, 64], "scale": [8, 8]}, None),
        ({"shape": None, "scale": [8]}, "patch.scale=[8] has 1 number"),
        ({"shape": [64, 64, 64], "scale": [8, 8]}, "patch.scale=[8, 8] has 2 numbers"),
        ({"shape": 64, "scale": [8, 8, 8]}, "patch.shape=64 is a single number"),
        ({}, None),
    ],
)
def test_the_patch_of_a_command(patch, text):
    config = OmegaConf.create({"patch": patch})
    if text is None:
        check_patch(config)
        return
    with pytest.raises(CellMapError) as caught:
        check_patch(config)
    assert text in str(caught.value)


@pytest.mark.parametrize("slices", [False, True])
def test_a_scale_of_slices_alone_is_for_a_checkpoint(slices):
    config = OmegaConf.create({"patch": {"shape": None, "scale": [8, 8]}})
    if slices:
        check_patch(config, slices=True)
        return
    with pytest.raises(CellMapValueError, match=r"has 2 numbers"):
        check_patch(config)


@pytest.mark.parametrize(
    ("shape", "dimensions", "texts"),
    [
        (
            [16, 64],
            3,
            [
                "patch.shape=[16, 64] has two lengths (y, x), those of a slice, and model.spatial_dims=3; give three",
                "lengths (z, y, x), such as [16, 64, 64], or for slices model=unet2d",
            ],
        ),
        (
            [16, 64, 32],
            2,
            [
                "patch.shape=[16, 64, 32] has 3 dimensions, and model.spatial_dims=2; give two lengths (y, x), such as",
                "[64, 32], or for three dimensions model=unet",
            ],
        ),
        (
            [1, 64, 64],
            3,
            [
                "patch.shape=[1, 64, 64] has 2 dimensions without its axis of length 1, and model.spatial_dims=3; give",
                "three lengths above 1 (z, y, x), or for slices model=unet2d",
            ],
        ),
    ],
)
def test_a_patch_of_other_dimensions_than_the_model(shape, dimensions, texts):
    with pytest.raises(CellMapValueError) as caught:
        check_model_shape(OmegaConf.create({"patch": {"shape": shape}, "model": {"spatial_dims": dimensions}}))
    assert str(caught.value) == " ".join(texts)
