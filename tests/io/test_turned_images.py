"""Images of OME-NGFF 0.6 that are rotated, mirrored or sheared: the positions of voxels, and training reads."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.crops.options import IntensityOptions, ReadOptions
from cellmap_lightning.errors import CellMapError, MetadataError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.readers import open_reader
from tests.io.test_coordinate_systems import VOXELS, affine, parts, scale, sequence, shift, write
from tests.make import make_dataset
from tests.prediction.predictions import Identity, predict

number = st.floats(-3, 3).map(lambda v: round(v, 3))
size = st.floats(0.2, 3).map(lambda v: round(v, 3))
angles = st.tuples(*[st.floats(-180, 180)] * 3)


def rotation(angles):
    return {"type": "rotation", "rotation": Rotation.from_euler("xyz", angles, degrees=True).as_matrix().tolist()}


def sheared(values):
    matrix = np.eye(3) + 0.3 * np.reshape(values[:9], (3, 3))
    return affine(*np.column_stack([matrix, values[9:12]]).tolist())


simple = st.one_of(
    st.tuples(size, size, size).map(lambda v: scale(*v)),
    st.tuples(number, number, number).map(lambda v: shift(*v)),
    angles.map(rotation),
    st.lists(st.floats(-0.5, 0.5), min_size=12, max_size=12).map(sheared),
    st.permutations(range(3)).map(lambda order: {"type": "mapAxis", "mapAxis": list(order)}),
    st.tuples(size, number, st.permutations(range(3))).map(
        lambda v: parts(([v[2][0]], [v[2][1]], scale(v[0])), (v[2][1:], [v[2][0], v[2][2]], shift(v[1], 1.0)))
    ),
)
steps = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda found: sequence(*found)),
        inner.map(lambda step: {"type": "bijection", "forward": step, "inverse": step}),
    ),
    max_leaves=6,
)


def applied(step, point):
    """The image of a point, transformation by transformation, and not by a product of matrices."""
    kind = step["type"]
    if kind == "scale":
        return [p * s for p, s in zip(point, step["scale"], strict=True)]
    if kind == "translation":
        return [p + t for p, t in zip(point, step["translation"], strict=True)]
    if kind == "rotation":
        return [sum(r * p for r, p in zip(row, point, strict=True)) for row in step["rotation"]]
    if kind == "affine":
        return [sum(r * p for r, p in zip(row[:-1], point, strict=True)) + row[-1] for row in step["affine"]]
    if kind == "mapAxis":
        return [point[axis] for axis in step["mapAxis"]]
    if kind == "bijection":
        return applied(step["forward"], point)
    if kind == "sequence":
        for inner in step["transformations"]:
            point = applied(inner, point)
        return point
    found = [None] * len(point)
    for part in step["transformations"]:
        values = applied(part["transformation"], [point[axis] for axis in part["input_axes"]])
        for axis, value in zip(part["output_axes"], values, strict=True):
            found[axis] = value
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(step=steps, unit=st.sampled_from(["nanometer", "micrometer"]))
def test_voxels_are_where_their_transformations_place_them(folder, step, unit):
    path = write(folder / "v", [step], unit=unit)
    corners = [(0, 0, 0), (11, 0, 0), (0, 19, 0), (0, 0, 29), (5, 7, 11)]
    places = np.array([applied(step, corner) for corner in corners]) * (1000 if unit == "micrometer" else 1)
    vectors = places[1:4] - places[0]
    if abs(np.linalg.det(vectors / np.linalg.norm(vectors, axis=1)[:, None])) < 2e-3:
        return
    level = read_multiscale(path, allow_turned=True).finest
    voxels = np.array(corners)[:, list(level.axes)]
    np.testing.assert_allclose(level.lattice.points(voxels), places, rtol=1e-9, atol=1e-6)
    low, high = level.lattice.span(places.min(0), places.max(0))
    assert (low <= voxels.min(0) + 0.5 + 1e-6).all()
    assert (high >= voxels.max(0) + 0.5 - 1e-6).all()
    assert level.lattice.shape == tuple(VOXELS.shape[axis] for axis in level.axes)
    found = open_reader(level).read((1, 2, 3), (4, 5, 6))
    np.testing.assert_array_equal(found, VOXELS.transpose(level.axes)[1:5, 2:7, 3:9])
    # The smallest box around all voxels, edges included.
    edges = np.array([[-0.5, n - 0.5] for n in VOXELS.shape])
    ends = [applied(step, [edges[i][k] for i, k in enumerate(which)]) for which in np.ndindex(2, 2, 2)]
    ends = np.array(ends) * (1000 if unit == "micrometer" else 1)
    np.testing.assert_allclose(level.lattice.box.lower, ends.min(0), rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(level.lattice.box.upper, ends.max(0), rtol=1e-9, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- training

SHAPE = (40, 44, 48)
CHUNKS = np.random.default_rng(1).integers(20, 230, [n // 4 for n in SHAPE]).astype(np.uint8)
RAW = CHUNKS.repeat(4, 0).repeat(4, 1).repeat(4, 2)
LABELS = (RAW > 120).astype(np.uint8)
TURN = Rotation.from_euler("zyx", (25, 10, -15), degrees=True).as_matrix()
SPEC = {"shape": [20, 20, 20], "scale": [8.0, 8.0, 8.0]}
PLACES = {
    "rotated": 8 * TURN,
    "mirrored": np.diag([8.0, -8.0, 8.0]),
    "sheared": 8 * (np.eye(3) + np.array([[0, 0.2, 0], [0, 0, 0.1], [0.1, 0, 0]])),
    "about z": 8 * Rotation.from_euler("x", 90 / 7, degrees=True).as_matrix(),
    "exchanged and mirrored": 8.0 * np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]),
}


def placed(matrix, center=(400.0, 400.0, 400.0)):
    """An affine transformation that places the middle of the array at a centre."""
    offset = np.asarray(center) - matrix @ ((np.array(SHAPE) - 1) / 2)
    return affine(*np.column_stack([matrix, offset]).tolist())


def volume(tmp_path, raw, labels):
    write(tmp_path / "v.zarr" / "raw", [placed(raw)], RAW)
    write(tmp_path / "v.zarr" / "crop1" / "mito", [placed(labels)], LABELS)
    import zarr

    group = zarr.open_group(tmp_path / "v.zarr" / "crop1" / "mito", mode="r+")
    kind = {"type": "semantic_segmentation", "encoding": {"absent": 0, "present": 1, "unknown": 255}}
    group.attrs["cellmap"] = {"annotation": {"class_name": "mito", "annotation_type": kind}}
    return tmp_path / "v.zarr" / "raw", f"{tmp_path}/v.zarr/crop1/[mito]"


def opened(raw, target, kind="binary", **kwargs):
    kwargs = {"read": ReadOptions(pad=True, cache=kwargs.pop("cache", "memory"))} | kwargs
    return make_dataset(
        raw, target, ["mito"], {"raw": SPEC}, {"labels": {**SPEC, "kind": kind}},
        intensity=IntensityOptions(raw_value_transforms=None), too_coarse="upsample", **kwargs,
    )  # fmt: skip


def indices(matrix, center):
    """Fractional indices of the voxels of a patch around a centre, from the matrix that places the array."""
    points = np.moveaxis(np.indices(SPEC["shape"]), 0, -1) - 9.5
    world = np.asarray(center) + 8.0 * points - 400.0
    return np.moveaxis(world @ np.linalg.inv(matrix).T, -1, 0) + ((np.array(SHAPE) - 1) / 2)[:, None, None, None]


def inside(places, margin=0.0):
    ends = np.array(SHAPE)[:, None, None, None] - 0.5
    return ((places >= -0.5 + margin) & (places <= ends - margin)).all(0)


@pytest.mark.parametrize("kind", ["binary", "instances"])
@pytest.mark.parametrize("cache", ["memory", "none"])
@pytest.mark.parametrize(("raw", "labels"), [*((name, name) for name in PLACES), ("rotated", "sheared")])
def test_samples_are_the_volume_at_their_voxels(tmp_path, raw, labels, cache, kind):
    """Against scipy's linear interpolation of raw, and the nearest voxel of labels; both have their own map."""
    with opened(*volume(tmp_path, PLACES[raw], PLACES[labels]), kind, cache=cache) as data:
        known = 0
        for number in np.linspace(0, len(data) - 1, 7).astype(int).tolist():
            sample = data[number]
            center = list(data.get_center(number).values())
            places = indices(PLACES[raw], center)
            expected = map_coordinates(RAW.astype(np.float64), places, order=1, mode="nearest")
            # Within half a voxel of the border the interpolant continues its slope.
            deep = inside(places, 0.51)
            shear = np.linalg.norm(np.linalg.inv(PLACES[raw]) * 8, axis=0).max() > 1.01
            difference = np.abs(sample["raw"].squeeze().numpy() - expected)[deep]
            if len(difference) and not shear:  # a coarser voxel is averaged
                assert difference.max() <= 0.51
            outside = ~inside(places, -0.01)
            found = sample["labels"].squeeze().numpy()
            own = indices(PLACES[labels], center)
            nearest = np.rint(own).astype(int)
            clear = (np.abs(np.abs(own - np.floor(own)) - 0.5) > 1e-6).all(0)  # not on an edge between voxels
            here = inside(own, 0.01) & clear & inside(places, 0.01)
            z, y, x = (np.clip(n, 0, m - 1) for n, m in zip(nearest, SHAPE, strict=True))
            np.testing.assert_array_equal(found[here], LABELS[z, y, x][here])
            hidden = found[~inside(own, -0.01) | outside]
            assert np.isnan(hidden).all() if kind == "binary" else (hidden == -1).all()
            known += here.sum()
        assert known > 1000


@pytest.mark.parametrize("strategy", ["plain", "rotated"])
def test_a_turned_crop_trains(tmp_path, strategy):
    raw, target = volume(tmp_path, PLACES["rotated"], PLACES["rotated"])
    with CellMapDataModule(
        ["mito"], {"raw": SPEC}, {"labels": SPEC}, datasets={"train": [{"raw": str(raw), "gt": target}]},
        batch_size=4, samples_per_epoch=8, num_workers=0, pad=True,
        spatial_transforms={"rotate": {"axes": {"z": [-30, 30]}}, "elastic": None} if strategy == "rotated" else None,
    ) as data:  # fmt: skip
        data.setup("fit")
        first = [batch["raw"] for batch in data.train_dataloader()]
        assert all(torch.isfinite(raw).all() for raw in first)


def test_a_box_of_a_turned_crop_is_refused(tmp_path):
    raw, target = volume(tmp_path, PLACES["rotated"], PLACES["rotated"])
    entry = {"raw": str(raw), "gt": target, "box": {"min_nm": [380, 380, 380], "max_nm": [420, 420, 420]}}
    with (
        CellMapDataModule(
            ["mito"],
            {"raw": SPEC},
            {"labels": SPEC},
            datasets={"train": [entry]},
            batch_size=4,
            num_workers=0,
            pad=True,
        ) as data,
        pytest.raises(CellMapError, match="cannot cut an array whose axes are turned in space"),
    ):
        data.setup("fit")


def test_other_commands_refuse_it(tmp_path):
    raw, _ = volume(tmp_path, PLACES["rotated"], PLACES["rotated"])
    for read in (read_multiscale, read_image):
        with pytest.raises(MetadataError, match="which only training reads; resample the image"):
            read(raw)
    with pytest.raises(CellMapError, match="which only training reads"):
        predict(raw, (8, 8, 8), tmp_path / "p.zarr", Identity())
