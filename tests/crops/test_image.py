"""`CellMapImage`: choice of a level, positions and content of patches."""

import logging
import pickle

import numpy as np
import pytest
import torch

from cellmap_lightning import CellMapImage
from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.crops.image import choose_level
from cellmap_lightning.errors import (
    CellMapFileNotFoundError,
    CellMapIndexError,
    CellMapKeyError,
    CellMapValueError,
    MetadataError,
)
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.ngff.multiscale import shared_metadata

SHAPE = (20, 24, 28)
RAW = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)


def mean(data):
    z, y, x = data.shape
    return data.reshape(z // 2, 2, y // 2, 2, x // 2, 2).mean(axis=(1, 3, 5))


def pyramid(step=(5.24, 4.0, 4.0), origin=(100.0, 200.0, 300.0), levels=3, absent=()):
    out, data = {}, RAW.astype(np.float32)
    for k in range(levels):
        place = np.add(origin, np.multiply(step, (2**k - 1) / 2)).tolist()
        stored = RAW if k == 0 else data
        out[f"s{k}"] = (None if k in absent else stored, np.multiply(step, 2**k).tolist(), place)
        data = mean(data) if k + 1 < levels else data
    return out


@pytest.fixture
def path(write):
    return str(write(pyramid(), chunks=(8, 8, 8)))


def test_boxes_and_positions(path):
    image = CellMapImage(path, "raw", (5.24, 4, 4), (8, 8, 8))
    assert image.scale_level == 0
    assert image.bounding_box == {
        "z": pytest.approx([100 - 2.62, 100 + 19.5 * 5.24]),
        "y": pytest.approx([198, 198 + 24 * 4]),
        "x": pytest.approx([298, 298 + 28 * 4]),
    }
    assert image.sampling_box == {
        "z": pytest.approx([100 - 2.62 + 4 * 5.24, 100 - 2.62 + 16 * 5.24]),
        "y": pytest.approx([198 + 16, 198 + 80]),
        "x": pytest.approx([298 + 16, 298 + 96]),
    }
    assert len(image) == 13 * 17 * 21
    assert image.get_center(0) == {a: pytest.approx(image.sampling_box[a][0]) for a in "zyx"}
    assert image.get_center(-1) == image.get_center(len(image) - 1)
    assert image.get_center(len(image) - 1) == {a: pytest.approx(image.sampling_box[a][1]) for a in "zyx"}
    for index in (len(image), -len(image) - 1, 10**12):
        with pytest.raises(CellMapIndexError, match="position"):
            image.get_center(index)
        with pytest.raises(IndexError):
            image.get_center(index)


@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
def test_patches_are_float32_and_equal_stored_voxels(path, interpolation):
    image = CellMapImage(path, "raw", (5.24, 4, 4), (8, 6, 4), interpolation=interpolation)
    for index in (0, 1, len(image) // 2, len(image) - 1):
        z, y, x = np.unravel_index(index, image.placement.counts)
        patch = image[image.get_center(index)]
        assert patch.dtype == torch.float32
        assert patch.shape == (8, 6, 4)
        assert (patch.numpy() == RAW[z : z + 8, y : y + 6, x : x + 4]).all()


def test_the_order_of_the_centres_axes_does_not_matter(path):
    image = CellMapImage(path, "raw", (5.24, 4, 4), (8, 6, 4))
    center = image.get_center(100)
    turned = {a: center[a] for a in "xzy"}
    assert (image[center] == image[turned]).all()
    with pytest.raises(CellMapKeyError, match="z, y and x"):
        image[{"z": 1.0, "y": 2.0}]
    with pytest.raises(CellMapValueError, match="finite"):
        image[{"z": 1.0, "y": float("nan"), "x": 2.0}]


@pytest.mark.parametrize("axis_order", ["zyx", "xyz", "yzx", "xzy"])
def test_axis_order(path, axis_order):
    scale, shape = {"z": 5.24, "y": 4, "x": 4}, {"z": 8, "y": 6, "x": 4}
    image = CellMapImage(
        path, "raw", [scale[a] for a in axis_order], [shape[a] for a in axis_order], axis_order=axis_order
    )
    patch = image[image.get_center(0)].numpy()
    assert (patch == RAW[:8, :6, :4].transpose(["zyx".index(a) for a in axis_order])).all()
    assert list(image.get_center(0)) == ["z", "y", "x"]


def test_a_patch_across_the_border_is_padded(path):
    center = {"z": 100 - 2.62, "y": 198.0, "x": 298.0}  # the corner of the volume
    patch = CellMapImage(path, "raw", (5.24, 4, 4), (8, 8, 8))[center]
    assert torch.isnan(patch).sum() == 8**3 - 4**3
    assert (patch[4:, 4:, 4:].numpy() == RAW[:4, :4, :4]).all()
    patch = CellMapImage(path, "raw", (5.24, 4, 4), (8, 8, 8), pad_value=-1)[center]
    assert (patch == -1).sum() == 8**3 - 4**3
    far = CellMapImage(path, "raw", (5.24, 4, 4), (8, 8, 8))[{"z": 1e6, "y": 0.0, "x": 0.0}]
    assert torch.isnan(far).all()


def test_pad_lets_a_patch_hold_the_image(path):
    with pytest.raises(CellMapValueError, match=r"em: the patch is 167\.68 nm long along z .* only 104\.8 nm"):
        CellMapImage(path, "em", (5.24, 4, 4), (32, 8, 8))
    image = CellMapImage(path, "em", (5.24, 4, 4), (32, 8, 8), pad=True)
    assert image.placement.counts == (13, 17, 21)
    for index in (0, len(image) - 1):
        patch = image[image.get_center(index)]
        assert torch.isnan(patch).sum() == 12 * 8 * 8
        assert torch.isnan(patch).all(dim=(1, 2)).sum() == 12


LEVELS = [
    # asked for, the level that is read
    ((5.24, 4, 4), 0),
    ((10.48, 8, 8), 1),
    ((20.96, 16, 16), 2),
    ((100, 100, 100), 2),  # coarser than all: the coarsest
    ((8, 8, 8), 0),  # s1 is coarser along z
    ((10.48, 8, 4), 0),  # along x
    ((10.4, 8, 8), 1),  # within 1 %
    ((10.3, 8, 8), 0),
    ((12, 12, 12), 1),
    ((4, 4, 4), 0),  # finer than all along z: the finest, upsampled
    ((2.62, 2, 2), 0),
]


@pytest.mark.parametrize(("scale", "level"), LEVELS)
def test_the_coarsest_level_that_is_fine_enough_is_read(path, scale, level):
    assert CellMapImage(path, "raw", scale, (2, 2, 2), pad=True).scale_level == level


def test_a_scale_more_than_twice_as_fine_is_refused(path):
    with pytest.raises(
        CellMapValueError, match=r"em: .*2\.62x finer along z, .* than its finest level s0 \(\[5\.24, 4\.0, 4\.0\] nm\)"
    ):
        CellMapImage(path, "em", (2, 2, 2), (4, 4, 4))
    assert CellMapImage(path, "em", (2, 2, 2), (4, 4, 4), max_upsampling=4).scale_level == 0
    with pytest.raises(CellMapValueError, match="at most 1x"):
        CellMapImage(path, "em", (4, 4, 4), (4, 4, 4), max_upsampling=1)
    assert choose_level(read_multiscale(path), (0.1, 0.1, 0.1)).name == "s0", "without a limit anything goes"


@pytest.mark.parametrize(
    ("scale", "hint"),
    [
        ((4, 4, 40), "If the order is z, y, x, it would be [40.0, 4.0, 4.0]"),
        ((0.04, 0.004, 0.004), "If the unit is nm, it would be [40.0, 4.0, 4.0]"),
        ((0.004, 0.004, 0.04), "If the order is z, y, x and the unit nm, it would be [40.0, 4.0, 4.0]"),
        ((4, 4, 4), ""),
        ((0.5, 0.5, 0.5), ""),
    ],
)
def test_a_scale_in_another_order_or_unit_is_suspected(write, scale, hint):
    path = write({"s0": (np.zeros((4, 8, 8), np.uint8), (40, 4, 4), None)})
    with pytest.raises(CellMapValueError, match="finer along") as e:
        choose_level(read_multiscale(path), scale, "raw", 2.0)
    assert (hint in str(e.value)) if hint else ("it would be" not in str(e.value))


@pytest.mark.parametrize(
    ("stored", "scale", "unit", "meant"),
    [
        ((8000, 8000, 8000), (8, 8, 8), "micrometers", [8.0, 8.0, 8.0]),
        ((40000, 4000, 4000), (64, 8, 8), "micrometers", [40.0, 4.0, 4.0]),
        ((8e6, 8e6, 8e6), (8, 8, 8), "millimeters", [8.0, 8.0, 8.0]),
    ],
)
def test_a_stored_voxel_size_in_another_unit_is_suspected(write, stored, scale, unit, meant):
    """The advice is about the metadata, since no patch has such voxels."""
    path = write({"s0": (np.zeros((4, 8, 8), np.uint8), stored, None)})
    with pytest.raises(CellMapValueError, match="finer along") as e:
        choose_level(read_multiscale(path), scale, "raw", 2.0)
    assert f"was stored as {unit}, correct its metadata, or set voxel_size={meant} for its entry" in str(e.value)
    assert "it would be" not in str(e.value)


def test_a_missing_level_is_announced(write, caplog):
    path = str(write(pyramid(absent=[1])))
    with caplog.at_level(logging.WARNING):
        image = CellMapImage(path, "raw", (10.48, 8, 8), (2, 2, 2))
    assert image.scale_level == 0
    assert "lists level s1, which is not on disk; the finer level s0 is read instead of it ([5.24, 4.0, 4.0] nm)" in (
        caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert CellMapImage(path, "raw", (5.24, 4, 4), (2, 2, 2)).scale_level == 0
        assert CellMapImage(path, "raw", (20.96, 16, 16), (2, 2, 2)).scale_level == 2
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("absent", "scale", "parts"),
    [
        (
            [0],
            (5.24, 4, 4),
            ["level s0 ([5.24, 4.0, 4.0] nm), which", "coarser level s1 ([10.48, 8.0, 8.0] nm) is read"],
        ),
        ([0], (8, 6, 6), ["level s0 ", "coarser level s1 ", "it, upsampled to [8.0, 6.0, 6.0] nm"]),
        ([0, 1], (10.48, 8, 8), ["level s1 ([10.48, ", "coarser level s2 ([20.96, 16.0, 16.0] nm)"]),
        ([1], (4, 4, 4), []),  # finer than s0, which is on disk
        ([0], (10.48, 8, 8), []),
    ],
)
def test_a_coarser_level_in_place_of_a_missing_one_is_announced(write, caplog, absent, scale, parts):
    path = str(write(pyramid(absent=absent)))
    with caplog.at_level(logging.WARNING), shared_metadata():
        for _ in range(2):  # as for two crops of a volume
            CellMapImage(path, "raw", scale, (2, 2, 2))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(parts)
    assert all(part in line for line in lines for part in parts)


def test_the_error_of_a_fine_scale_lists_missing_levels(write):
    path = str(write(pyramid(absent=[0, 1])))
    with pytest.raises(
        CellMapValueError, match=r"4x finer along z, .*finest level s2 .*Levels s0, s1 are listed but not"
    ):
        CellMapImage(path, "raw", (5.24, 4, 4), (2, 2, 2))
    image = CellMapImage(path, "raw", (10.48, 8, 8), (2, 2, 2))
    assert image.scale_level == 2
    # Its box is that of the finest level there is.
    assert image.bounding_box["y"] == pytest.approx([198, 198 + 24 * 4])


def test_coarse_levels_show_the_same_world(path):
    """Patches of s0 averaged, and of s1 as it is stored, around one centre."""
    fine = CellMapImage(path, "raw", (5.24, 4, 4), (8, 8, 8))
    coarse = CellMapImage(path, "raw", (10.48, 8, 8), (4, 4, 4))
    assert (fine.scale_level, coarse.scale_level) == (0, 1)
    for index in (0, 100, len(coarse) - 1):
        center = coarse.get_center(index)
        np.testing.assert_allclose(coarse[center].numpy(), mean(fine[center].numpy()), rtol=1e-6)


def test_linear_between_voxels_and_nearest_labels(path):
    center = {"z": 100 + 5.24 * 4, "y": 216.0, "x": 316.5}
    linear = CellMapImage(path, "raw", (5.24, 4, 4), (1, 1, 1), interpolation="linear")[center].item()
    raw = RAW.astype(float)
    assert linear == pytest.approx(raw[4, 4, 4] * (1 - 0.125) + raw[4, 4, 5] * 0.125)
    assert CellMapImage(path, "raw", (5.24, 4, 4), (1, 1, 1))[center].item() == RAW[4, 4, 4]


def test_a_path_that_holds_no_image_is_met_at_once(path, tmp_path):
    with pytest.raises(CellMapFileNotFoundError, match="did you mean 'image'"):
        CellMapImage(str(tmp_path / "imgae"), "raw", (4, 4, 4), (2, 2, 2))
    with pytest.raises(MetadataError, match=r"one level of the image .*; give its parent"):
        CellMapImage(str(tmp_path / "image" / "s0"), "raw", (4, 4, 4), (2, 2, 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_scale": (4, 4)}, "target_scale needs three numbers"),
        ({"target_voxel_shape": (4, 4)}, "target_voxel_shape needs three numbers"),
        ({"target_voxel_shape": (4, 4, 4, 4)}, "target_voxel_shape needs three numbers"),
        ({"target_voxel_shape": (4, 0, 4)}, "shape"),
        ({"target_scale": (4, -4, 4)}, "scale"),
        ({"axis_order": "zyz"}, "axis_order"),
        ({"axis_order": "zy"}, "axis_order"),
        ({"interpolation": "cubic"}, "interpolation"),
    ],
)
def test_wrong_arguments(path, change, words):
    given = {"target_class": "raw", "target_scale": (5.24, 4, 4), "target_voxel_shape": (4, 4, 4)} | change
    with pytest.raises(CellMapValueError, match=words):
        CellMapImage(path, **given)


def test_images_share_a_cache_and_travel_without_it(path):
    cache = ChunkCache()
    images = [CellMapImage(path, "raw", (5.24, 4, 4), (8, 8, 8), cache=cache) for _ in range(2)]
    for image in images:
        image[image.get_center(0)]
    assert cache.decoded == 1
    copy = pickle.loads(pickle.dumps(images[0]))
    assert (copy[copy.get_center(5)] == images[0][images[0].get_center(5)]).all()
    assert "level='s0'" in repr(copy)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["xyz", "czyx"])
def test_patches_are_zyx_for_any_stored_order(write, version, axes):
    order = ["zyx".index(a) for a in axes if a != "c"]
    data, scale, place = RAW.transpose(order), np.asarray((5.24, 4, 4))[order], np.asarray((1.0, 2, 3))[order]
    if "c" in axes:
        data, scale, place = data[None], [1, *scale], [0, *place]
    path = str(write({"s0": (data, list(scale), list(place))}, version=version, axes=axes))
    image = CellMapImage(path, "raw", (5.24, 4, 4), SHAPE)
    assert len(image) == 1
    assert (image[image.get_center(0)].numpy() == RAW).all()


@pytest.mark.parametrize(
    ("scale", "text"),
    [(0.004, "1,000x finer along x"), (0.0001, "40,000x finer along x"), (0.3, "13.3x finer along x")],
)
def test_a_large_ratio_is_no_power_of_ten(path, scale, text):
    with pytest.raises(CellMapValueError) as caught:
        CellMapImage(path, "em", (scale,) * 3, (4, 4, 4))
    assert text in str(caught.value)
