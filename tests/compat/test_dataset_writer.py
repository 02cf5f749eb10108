"""The writers under the names of cellmap-data: what is assigned is what is on disk, where it was read."""

import pickle

import numpy as np
import ome_zarr_models.v04.image
import pytest
import torch
import zarr
from torch.utils.data import DataLoader

from cellmap_lightning import CellMapImage
from cellmap_lightning.compat.array_writer import ImageWriter
from cellmap_lightning.compat.patch_writer import CellMapDatasetWriter
from cellmap_lightning.errors import (
    CellMapError,
    CellMapFileExistsError,
    CellMapIndexError,
    CellMapKeyError,
    CellMapTypeError,
    CellMapValueError,
    OutputError,
)
from cellmap_lightning.geometry.lattice import AXES
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.writer import write_multiscale

pytestmark = pytest.mark.usefixtures("no_threads_left")

SCALE = (10.48, 8.0, 8.0)


def raw_volume(folder, shape, translation=(5.24, 4.0, 2.0)):
    """Random voxels, and where they are."""
    values = np.random.default_rng(0).integers(1, 256, shape).astype(np.uint8)
    write_multiscale(folder / "raw.zarr" / "em", values, scale=SCALE, translation=translation, levels=2)
    return folder / "raw.zarr" / "em", values


def writer_of(path, patch, out, classes=("a",), **kwargs):
    spec = {"shape": list(patch), "scale": list(SCALE)}
    return CellMapDatasetWriter(str(path), str(out), list(classes), {"input": spec}, {"output": spec}, **kwargs)


def copy(writer, batch_size=3):
    """Write the input as the prediction of every class."""
    count = len(writer.model_classes)
    with writer:
        for batch in writer.loader(batch_size=batch_size):
            raw = batch["input"] if batch["input"].ndim == 5 else batch["input"].unsqueeze(2)
            writer[batch["idx"]] = {"output": raw.repeat(1, count, 1, 1, 1)}


def read(out, name="a"):
    return zarr.open_array(str(out / name / "s0"), mode="r")[...]


@pytest.mark.parametrize(
    ("shape", "patch", "tiles"),
    [
        ((16, 32, 48), (8, 16, 16), 2 * 2 * 3),
        ((17, 33, 50), (8, 16, 16), 3 * 3 * 4),
        ((9, 18, 31), (8, 17, 30), 2 * 2 * 2),
        ((6, 40, 20), (8, 16, 32), 1 * 3 * 1),
        ((5, 40, 40), (1, 16, 16), 5 * 3 * 3),
    ],
    ids=["divides", "does-not", "one-voxel-over", "smaller-than-a-patch", "slices"],
)
def test_an_identity_is_reproduced_bit_for_bit(tmp_path, shape, patch, tiles):
    path, values = raw_volume(tmp_path, shape)
    writer = writer_of(path, patch, tmp_path / "out.zarr")
    assert len(writer.writer_indices) == len(writer.blocks) == len(set(writer.writer_indices)) == tiles
    copy(writer)
    found = read(tmp_path / "out.zarr")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values)
    lattice = read_multiscale(str(tmp_path / "out.zarr" / "a")).finest.lattice
    assert lattice.matches(read_multiscale(str(path)).finest.lattice)


def test_every_position_is_read_and_written_at_one_place(tmp_path):
    """The loops of cellmap-data's own description: over all positions, and over the tiles, one at a time."""
    path, values = raw_volume(tmp_path, (6, 7, 9))
    for name in ("all", "tiles"):
        with writer_of(path, (4, 4, 4), tmp_path / name) as writer:
            assert len(writer) == 3 * 4 * 6
            for idx in range(len(writer)) if name == "all" else writer.writer_indices:
                writer[idx] = {"output": writer[idx]["input"]}
        np.testing.assert_array_equal(read(tmp_path / name), values)
    with writer_of(path, (4, 4, 4), tmp_path / "one") as writer:
        writer[29] = {"a": writer[29]["input"][0]}
        z, y, x = np.unravel_index(29, (3, 4, 6))
        expected = np.zeros_like(values)
        expected[z : z + 4, y : y + 4, x : x + 4] = values[z : z + 4, y : y + 4, x : x + 4]
        np.testing.assert_array_equal(read(tmp_path / "one"), expected)
        center = writer.get_center(29)
        assert list(center.values()) == pytest.approx([10.48 * (z + 2), 8 * (y + 2), 8 * (x + 2) - 2])
        np.testing.assert_array_equal(
            writer.target_array_writers["output"]["a"][center], writer[29]["input"][0].numpy()
        )
        assert len(writer.get_indices({"z": 20.96, "y": 16, "x": 8})) == 2 * 3 * 6
        with pytest.raises(CellMapIndexError, match="position 72"):
            writer[72] = {"a": np.zeros((4, 4, 4))}


@pytest.mark.parametrize("edges", [True, False], ids=["edges", "as-cellmap-data"])
@pytest.mark.parametrize("first", [(0, 0, 0), (3, 1, 5)], ids=str)
def test_bounds_name_voxels_by_their_edges_or_their_centres(tmp_path, edges, first):
    path, values = raw_volume(tmp_path, (16, 20, 24))
    count = (9, 10, 11)
    lower = np.add(np.multiply(first, SCALE), (5.24, 4.0, 2.0)) - (np.divide(SCALE, 2) if edges else 0)
    bounds = {a: [lower[i], lower[i] + count[i] * SCALE[i]] for i, a in enumerate(AXES)}
    writer = writer_of(path, (4, 4, 8), tmp_path / "out.zarr", target_bounds={"output": bounds})
    copy(writer)
    here = tuple(slice(a, a + n) for a, n in zip(first, count, strict=True))
    np.testing.assert_array_equal(read(tmp_path / "out.zarr"), values[here])
    box = writer.bounding_box
    level = read_multiscale(str(tmp_path / "out.zarr" / "a")).finest
    for i, axis in enumerate(AXES):
        assert box[axis] == pytest.approx(np.subtract(bounds[axis], 0 if edges else SCALE[i] / 2), abs=1e-9)
        assert level.translation[i] == pytest.approx(box[axis][0] + SCALE[i] / 2, abs=1e-9)
    image = CellMapImage(str(path), "raw", SCALE, count)
    center = {axis: (box[axis][0] + box[axis][1]) / 2 for axis in AXES}
    np.testing.assert_array_equal(image[center], values[here])


def test_bounds_may_reach_beyond_the_volume_and_not_lie_outside_it(tmp_path):
    path, values = raw_volume(tmp_path, (8, 8, 8), (0, 0, 0))
    bounds = {axis: [-2 * s, 10 * s] for axis, s in zip(AXES, SCALE, strict=True)}
    copy(writer_of(path, (4, 4, 8), tmp_path / "out.zarr", target_bounds={"output": bounds}))
    np.testing.assert_array_equal(read(tmp_path / "out.zarr"), np.pad(values, 2))
    for wrong in ({a: [500, 600] for a in AXES}, {a: [0.5, 1] for a in AXES}, {"z": [0, 1]}, {a: [1, 0] for a in AXES}):
        with pytest.raises(CellMapValueError, match=r"bounds|region"):
            writer_of(path, (4, 4, 8), tmp_path / "no.zarr", target_bounds={"output": wrong})
    with pytest.raises(CellMapKeyError, match="target_bounds must be those of"):
        writer_of(path, (4, 4, 8), tmp_path / "no.zarr", target_bounds={"array": bounds})
    assert not (tmp_path / "no.zarr").exists()


def test_an_output_finer_than_its_input(tmp_path):
    """A model that doubles: each voxel of raw becomes eight, inside the very box that it has."""
    path, values = raw_volume(tmp_path, (8, 12, 12))
    inputs = {"input": {"shape": [4, 8, 8], "scale": SCALE}}
    fine = {"shape": [8, 16, 16], "scale": np.divide(SCALE, 2).tolist()}
    with CellMapDatasetWriter(str(path), str(tmp_path / "o.zarr"), ["a"], inputs, {"output": fine}) as writer:
        for batch in writer.loader(2):
            raw = batch["input"]
            for axis in (2, 3, 4):
                raw = raw.repeat_interleave(2, axis)
            writer[batch["idx"]] = {"output": raw}
    np.testing.assert_array_equal(read(tmp_path / "o.zarr"), values.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    lattice = read_multiscale(str(tmp_path / "o.zarr" / "a")).finest.lattice
    assert np.allclose(lattice.box.lower, read_multiscale(str(path)).finest.lattice.box.lower)


def test_channels_and_their_classes(tmp_path):
    path, _ = raw_volume(tmp_path, (4, 6, 8))
    out, names = tmp_path / "out.zarr", ["x", "a", "b"]
    with writer_of(path, (4, 4, 8), out, ["b", "a"], model_classes=names, empty_value=7) as writer:
        everything = torch.arange(3.0).reshape(1, 3, 1, 1, 1).expand(1, 3, 4, 4, 8) + 1
        writer[writer.writer_indices[:1]] = {"output": everything, "input": torch.zeros(1), "idx": torch.zeros(1)}
        assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["a", "b"]
        for name, value in (("a", 2), ("b", 3)):
            found = read(out, name)
            assert (found[:, :4] == value).all()
            assert (found[:, 4:] == 7).all()
        last, patch = writer.writer_indices[-1], torch.full((4, 4, 8), 5.0)
        writer[last] = {"output": {"a": patch[None], "x": patch}}
        writer[torch.tensor([last])] = {"b": patch[None].to(torch.bfloat16)}
        for name in "ab":
            assert (read(out, name)[:, 2:] == 5).all()
        for arrays, match in (
            ({"output": everything[:, :2]}, r"must be \[1, 3, 4, 4, 8\], got \[1, 2, 4, 4, 8\]"),
            ({"output": everything[..., :4]}, "shape must be"),
            ({"segmentation": everything}, "'segmentation' is neither the target array 'output' nor"),
            ({"x": everything[:, 0]}, "nothing to write"),
            ({"a": 1.0}, "got a single number"),
            ({"a": torch.tensor(1.0)}, "got a single number"),
        ):
            with pytest.raises(CellMapError, match=match):
                writer[[last]] = arrays
        with pytest.raises(CellMapTypeError, match="idx must be a whole number"):
            writer[0.5] = {"a": patch}
    with pytest.raises(CellMapKeyError, match=r"classes \['c'\] are not among the model's"):
        writer_of(path, (4, 4, 8), out, ["c"], model_classes=names)


def test_other_libraries_read_the_output(tmp_path):
    path, values = raw_volume(tmp_path, (9, 18, 31))
    copy(writer_of(path, (8, 16, 16), tmp_path / "out.zarr" / "crop1"))
    group = zarr.open_group(tmp_path / "out.zarr", mode="r", zarr_format=2)
    image = ome_zarr_models.v04.image.Image.from_zarr(group["crop1/a"])
    (found,) = image.attributes.multiscales[0].datasets
    assert found.coordinateTransformations[0].scale == list(SCALE)
    assert found.coordinateTransformations[1].translation == pytest.approx([5.24, 4.0, 2.0], abs=1e-12)
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/out.zarr/crop1/a/s0"}}
    np.testing.assert_array_equal(tensorstore.open(spec, read=True).result().read().result(), values)


def test_existing_output_is_continued_or_replaced(tmp_path):
    path, values = raw_volume(tmp_path, (8, 8, 8))
    out, half = tmp_path / "out.zarr", {"output": {a: [0, 4 * s] for a, s in zip(AXES, SCALE, strict=True)}}
    with writer_of(path, (4, 8, 8), out) as writer:
        writer[0] = {"a": np.ones((4, 8, 8))}
    with writer_of(path, (4, 8, 8), out) as writer:
        writer[writer.writer_indices[1]] = {"a": np.full((4, 8, 8), 2)}
    np.testing.assert_array_equal(read(out)[:, 0, 0], [1] * 4 + [2] * 4)
    with pytest.raises(CellMapFileExistsError, match=r"has \[8, 8, 8\] voxels .* got \[4, 4, 4\]"):
        writer_of(path, (4, 4, 4), out, target_bounds=half)
    with pytest.raises(CellMapFileExistsError, match=r"float32, got .* uint8"):
        writer_of(path, (4, 8, 8), out, dtype="uint8")
    copy(writer_of(path, (4, 4, 4), out, target_bounds=half, overwrite=True))
    np.testing.assert_array_equal(read(out), values[:4, :4, :4])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a").mkdir()
    (tmp_path / "notes" / "a" / "text").write_text("mine")
    for overwrite in (False, True):
        with (
            writer_of(path, (4, 8, 8), tmp_path / "notes", overwrite=overwrite) as writer,
            pytest.raises(CellMapFileExistsError),
        ):
            writer[0] = {"a": np.ones((4, 8, 8))}
    assert (tmp_path / "notes" / "a" / "text").read_text() == "mine"


def test_invalid_arguments_are_errors_before_writing(tmp_path):
    path, _ = raw_volume(tmp_path, (8, 8, 8))
    spec, out = {"shape": [4, 4, 4], "scale": list(SCALE)}, tmp_path / "out.zarr"
    with pytest.raises(CellMapValueError, match="must not be inside of each other"):
        writer_of(path, (4, 4, 4), path / "pred")
    with pytest.raises(CellMapValueError, match="use a writer for each"):
        CellMapDatasetWriter(str(path), str(out), ["a"], spec, {"one": spec, "two": spec})
    with pytest.raises(CellMapValueError, match="axis_order must be 'zyx'"):
        writer_of(path, (4, 4, 4), out, axis_order="xyz")
    with pytest.raises(CellMapTypeError, match="give input_path, target_path, classes"):
        CellMapDatasetWriter(str(path), str(out))
    with pytest.warns(DeprecationWarning, match="raw_path is called input_path"):
        old = CellMapDatasetWriter(
            raw_path=str(path), target_path=str(out), classes=["a"], input_arrays=spec, target_arrays=spec,
            context=None, rng=None, device="cpu",
        )  # fmt: skip
    assert sorted(old[0]) == ["idx", "input"]
    old.close()
    assert not out.exists()


def test_stored_and_normalized_raw(tmp_path):
    path, values = raw_volume(tmp_path, (4, 4, 4))
    for given, factor in ((None, 1), ("auto", 1 / 255), (lambda raw: raw * 2.0, 2)):
        with writer_of(path, (4, 4, 4), tmp_path / "out.zarr", raw_value_transforms=given) as writer:
            np.testing.assert_allclose(writer[0]["input"][0], values * np.float64(factor), rtol=1e-6)


def test_in_worker_processes_and_by_torchs_own_loader(tmp_path):
    path, values = raw_volume(tmp_path, (8, 8, 20))
    for name in ("workers", "torch"):
        with writer_of(path, (4, 8, 8), tmp_path / name) as writer:
            loader = writer.loader(2, num_workers=1) if name == "workers" else DataLoader(writer.blocks, 2)
            for batch in loader:
                writer[batch["idx"]] = {"output": batch["input"]}
            if name == "workers":
                loader.close()
        np.testing.assert_array_equal(read(tmp_path / name), values)
    again = pickle.loads(pickle.dumps(writer))
    again[0] = {"a": np.zeros((4, 8, 8))}
    again.close()
    assert not read(tmp_path / "torch")[:4, :, :8].any()


# -- one image alone


def image_writer(folder, **kwargs):
    box = {"z": [0, 100], "y": (0, 40), "x": (0, 24)}
    return ImageWriter(str(folder / "out.zarr" / "a"), "a", (10, 4, 2), box, (4, 4, 4), **kwargs)


def test_an_image_by_centres(tmp_path):
    writer = image_writer(tmp_path)
    assert writer.shape == {"z": 10, "y": 10, "x": 12}
    writer[{"z": 20, "y": 8, "x": 4}] = np.full((4, 4, 4), 1)
    writer[{"z": [60, 100], "y": [8, 40], "x": [4, 24]}] = torch.arange(2.0, 4).reshape(2, 1, 1, 1).expand(2, 4, 4, 4)
    expected = np.zeros((10, 10, 12), np.float32)
    expected[:4, :4, :4], expected[4:8, :4, :4], expected[8:, 8:, 10:] = 1, 2, 3
    np.testing.assert_array_equal(read(tmp_path / "out.zarr"), expected)
    assert writer[{"z": 100, "y": 40, "x": 24}].tolist() == np.full((2, 2, 2), 3).tolist()
    assert read_multiscale(str(tmp_path / "out.zarr" / "a")).finest.translation == (5, 2, 1)
    with pytest.raises(
        CellMapValueError, match=r"lies between the voxels; the nearest aligned one is around .*'z': 20"
    ):
        writer[{"z": 23, "y": 8, "x": 4}] = np.ones((4, 4, 4))
    with pytest.raises(CellMapValueError, match="lies outside"):
        writer[{"z": 200, "y": 8, "x": 4}] = np.ones((4, 4, 4))
    with pytest.raises(CellMapTypeError, match="a patch must be an array"):
        writer[{"z": 20, "y": 8, "x": 4}] = 1.0
    with pytest.raises(CellMapValueError, match=r"scale_level must be 0, .*got 1"):
        image_writer(tmp_path, scale_level=1)


def test_whole_numbers_are_rounded_and_never_wrapped(tmp_path):
    writer = image_writer(tmp_path, dtype=np.uint8, fill_value=255)
    where = {"z": 20, "y": 8, "x": 4}
    writer[where] = np.full((4, 4, 4), 199.6)
    found = read(tmp_path / "out.zarr")
    assert found.dtype == np.uint8
    assert set(np.unique(found)) == {200, 255}
    for bad in (256, -1, np.nan):
        with pytest.raises(CellMapValueError, match="cannot be stored as uint8"):
            writer[where] = np.full((4, 4, 4), bad)


def test_write_error_names_the_path(tmp_path):
    writer = image_writer(tmp_path)
    (tmp_path / "out.zarr").write_text("a file where a folder should be")
    with pytest.raises((OutputError, CellMapFileExistsError), match=r"out\.zarr"):
        writer[{"z": 20, "y": 8, "x": 4}] = np.ones((4, 4, 4))
