"""Images of OME-NGFF 0.6: coordinate systems, and transformations that reduce to a lattice or do not."""

import numpy as np
import pytest
import zarr
from pydantic_zarr.v3 import ArraySpec

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.ngff import Overrides, read_multiscale
from cellmap_lightning.io.readers import open_reader
from tests.foreign import edit

VOXELS = np.random.default_rng(0).integers(0, 255, (12, 20, 30)).astype(np.uint8)


def write(path, steps, voxels=VOXELS, axes="zyx", unit="nanometer", others=(), image=None):
    """Write an image with one level for each transformation."""
    group = zarr.open_group(path, mode="w", zarr_format=3)
    named = [{"name": name, "type": "space", "unit": unit} for name in axes]
    datasets = []
    for number, step in enumerate(steps):
        group.create_array(f"s{number}", data=voxels[tuple([slice(None, None, 2**number)] * voxels.ndim)])
        ends = {"input": {"path": f"s{number}"}, "output": {"name": "physical"}}
        datasets.append({"path": f"s{number}", "coordinateTransformations": [{**ends, **step}]})
    systems = [{"name": "physical", "axes": named}, *({"name": name, "axes": named} for name in others)]
    block = {"name": "em", "coordinateSystems": systems, "datasets": datasets, **(image or {})}
    group.attrs["ome"] = {"version": "0.6", "multiscales": [block]}
    return path


def scale(*values):
    return {"type": "scale", "scale": list(values)}


def shift(*values):
    return {"type": "translation", "translation": list(values)}


def sequence(*steps):
    return {"type": "sequence", "transformations": list(steps)}


def affine(*rows):
    return {"type": "affine", "affine": [list(row) for row in rows]}


def parts(*steps):
    keys = ("input_axes", "output_axes", "transformation")
    return {"type": "byDimension", "transformations": [dict(zip(keys, step, strict=True)) for step in steps]}


@pytest.mark.parametrize(
    ("step", "size", "translation"),
    [
        (scale(8, 4, 4), (8, 4, 4), (0, 0, 0)),
        (sequence(scale(8, 4, 4), shift(80, 40, 20)), (8, 4, 4), (80, 40, 20)),
        (sequence(shift(1, 2, 3), scale(8, 4, 4)), (8, 4, 4), (8, 8, 12)),
        ({"type": "identity"}, (1, 1, 1), (0, 0, 0)),
        (affine((8, 0, 0, 5), (0, 4, 0, 6), (0, 0, 4, 7)), (8, 4, 4), (5, 6, 7)),
        ({"type": "rotation", "rotation": np.eye(3).tolist()}, (1, 1, 1), (0, 0, 0)),
        ({"type": "bijection", "forward": scale(8, 4, 4), "inverse": scale(0.125, 0.25, 0.25)}, (8, 4, 4), (0, 0, 0)),
        (parts(([1, 2], [1, 2], scale(4, 2)), ([0], [0], sequence(scale(8), shift(3)))), (8, 4, 2), (3, 0, 0)),
        (sequence({"type": "mapAxis", "mapAxis": [0, 1, 2]}, scale(8, 4, 2)), (8, 4, 2), (0, 0, 0)),
    ],
)
def test_transformations_that_are_read(tmp_path, step, size, translation):
    level = read_multiscale(write(tmp_path / "v", [step])).finest
    assert (level.scale, level.translation, level.axes) == (size, translation, (0, 1, 2))
    np.testing.assert_array_equal(open_reader(level).read((1, 2, 3), (4, 5, 6)), VOXELS[1:5, 2:7, 3:9])


@pytest.mark.parametrize(
    "step",
    [
        sequence({"type": "mapAxis", "mapAxis": [2, 1, 0]}, scale(8, 4, 2)),
        sequence(scale(2, 4, 8), {"type": "mapAxis", "mapAxis": [2, 1, 0]}),
        affine((0, 0, 8, 0), (0, 4, 0, 0), (2, 0, 0, 0)),
        parts(([2], [0], scale(8)), ([0], [2], scale(2)), ([1], [1], scale(4))),
    ],
)
def test_an_order_of_axes(tmp_path, step):
    """The array is stored as x, y, z."""
    level = read_multiscale(write(tmp_path / "v", [step], VOXELS.T)).finest
    assert (level.scale, level.axes, level.lattice.shape) == ((8, 4, 2), (2, 1, 0), VOXELS.shape)
    np.testing.assert_array_equal(open_reader(level).read((1, 2, 3), (4, 5, 6)), VOXELS[1:5, 2:7, 3:9])


def test_mapped_axes_that_are_no_exchange(tmp_path):
    """Output axis i is input axis mapAxis[i]: a cycle and its inverse differ."""
    stored = VOXELS.transpose(1, 2, 0)  # y, x, z
    step = sequence({"type": "mapAxis", "mapAxis": [2, 0, 1]}, scale(8, 4, 2))
    level = read_multiscale(write(tmp_path / "v", [step], stored)).finest
    np.testing.assert_array_equal(open_reader(level).read((1, 2, 3), (4, 5, 6)), VOXELS[1:5, 2:7, 3:9])


def test_a_pyramid_in_micrometres(tmp_path):
    steps = [scale(0.008, 0.004, 0.004), sequence(scale(0.016, 0.008, 0.008), shift(0.004, 0.002, 0.002))]
    image = read_multiscale(write(tmp_path / "v", steps, unit="micrometer"))
    np.testing.assert_allclose([level.scale for level in image.present], [(8, 4, 4), (16, 8, 8)])
    np.testing.assert_allclose(image.present[1].translation, (4, 2, 2))
    assert not image.notes
    moved = read_multiscale(tmp_path / "v", Overrides(voxel_size=(1, 1, 1), translation=(5, 5, 5)))
    np.testing.assert_allclose(moved.present[1].translation, (5.5, 5.5, 5.5))


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (
            affine((8, 1, 0, 0), (0, 4, 0, 0), (0, 0, 4, 0)),
            "which only training reads",
        ),
        (
            {"type": "rotation", "rotation": [[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]]},
            "which only training reads",
        ),
        (scale(-8, 4, 4), "which only training reads"),
        (affine((8, 0, 0, 0), (0, 4, 0, 0), (0, 4, 0, 0)), "depends on 2 stored axes"),
        (affine((8, 0, 0, 0), (0, 4, 4, 0), (0, 4, 4, 0)), "is singular"),
        (scale(0, 4, 4), "depends on 2 stored axes"),
        ({"type": "displacements", "path": "field"}, "'displacements' cannot be read.*resample the image"),
        ({"type": "coordinates", "path": "field"}, "'coordinates' cannot be read.*resample the image"),
        (sequence(scale(8, 4, 4), {"type": "displacements", "path": "f"}), "'displacements' cannot be read"),
        ({"type": "thin-plate"}, "'thin-plate' cannot be read"),
        (scale(8, 4), "2 outputs, its coordinate system 3 axes"),
        (scale("a", 4, 4), "malformed"),
        ({"type": "scale"}, "malformed"),
        ({"type": "scale", "scale": 8}, "malformed"),
        (sequence(scale(8, 4), shift(1, 2, 3)), "malformed"),
        ({"type": "mapAxis", "mapAxis": [0, 0, 1]}, "malformed"),
        ({"type": "mapAxis", "mapAxis": [0, 1, 5]}, "malformed"),
        (parts(([0], [0], scale(8)), ([1], [0], scale(4))), "malformed"),
        (parts(([9], [0], scale(8))), "malformed"),
        ({"type": "affine", "affine": [1, 2, 3]}, "malformed"),
        ({"type": "sequence", "transformations": "x"}, "malformed"),
        ({"output": {"name": "other"}, **scale(8, 4, 4)}, "one of the coordinate systems physical, got other"),
    ],
)
def test_transformations_that_are_refused(tmp_path, step, text):
    with pytest.raises(MetadataError, match=rf"(zarr.json|/v:).*{text}"):
        read_multiscale(write(tmp_path / "v", [step]))


@pytest.mark.parametrize("value", [None, [], [{}], [{"name": 1}], "physical"])
def test_bad_coordinate_systems(tmp_path, value):
    with pytest.raises(MetadataError, match=r"v/zarr\.json"):
        read_multiscale(write(tmp_path / "v", [scale(8, 4, 4)], image={"coordinateSystems": value}))


@pytest.mark.parametrize("value", [None, [], [scale(1, 1, 1)] * 2, [None], "x"])
def test_each_level_has_one_transformation(tmp_path, value):
    path = write(tmp_path / "v", [scale(8, 4, 4)])
    edit(
        path / "zarr.json",
        lambda c: c["attributes"]["ome"]["multiscales"][0]["datasets"][0].update(coordinateTransformations=value),
    )
    with pytest.raises(MetadataError, match="one coordinateTransformation"):
        read_multiscale(path)


def test_other_systems_are_reported(tmp_path):
    world = {"type": "affine", "input": {"name": "physical"}, "output": {"name": "world"}, "affine": [[1] * 4] * 3}
    path = write(tmp_path / "v", [scale(8, 4, 4)], others=["world"], image={"coordinateTransformations": [world]})
    image = read_multiscale(path)
    assert image.finest.scale == (8, 4, 4)
    [note] = image.notes
    assert note.text.startswith("positions are those of the coordinate system 'physical'")


def test_images_of_ome_zarr_models(tmp_path):
    """Its draft of 0.6 has the axes and transformations of 0.5."""
    # A draft, of which newer versions have another form.
    v06 = pytest.importorskip("ome_zarr_models._v06.image")
    from ome_zarr_models._v06.axes import Axis

    image = v06.Image.new(
        array_specs=[ArraySpec.from_array(VOXELS, dimension_names=list("zyx"))], paths=["s0"],
        axes=[Axis(name=name, type="space", unit="nanometer") for name in "zyx"],
        scales=[[8, 4, 4]], translations=[[80, 40, 20]],
    )  # fmt: skip
    image.to_zarr(zarr.storage.LocalStore(tmp_path / "v"), path="")
    zarr.open_array(tmp_path / "v" / "s0")[...] = VOXELS
    level = read_multiscale(tmp_path / "v").finest
    assert (level.scale, level.translation) == ((8, 4, 4), (80, 40, 20))
    np.testing.assert_array_equal(open_reader(level).read((0, 0, 0), VOXELS.shape), VOXELS)
