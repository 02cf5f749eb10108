"""Call patterns of programs and tests of cellmap-data 2026.3, on small volumes."""

import logging

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset

import cellmap_lightning as own
from cellmap_lightning import compat
from cellmap_lightning.compat import dataset, dataset_writer, datasplit, image, image_writer
from cellmap_lightning.compat.spatial import spatial_transforms
from cellmap_lightning.compat.utils import metadata, split_target_path
from cellmap_lightning.errors import CellMapError, CellMapTypeError, CellMapValueError
from cellmap_lightning.io.writer import write_multiscale

pytestmark = pytest.mark.usefixtures("no_threads_left")

SPEC = {"shape": (4, 4, 4), "scale": (8, 8, 8)}
CLASSES = ["mito", "er"]
BOX = dict.fromkeys("zyx", (0.0, 128.0))


def ramp(side=16):
    z, y, x = np.indices((side,) * 3)
    return (z * 7 + y * 3 + x).astype(np.uint8)


def make(folder, side=16, **kwargs):
    """A dataset of one crop, which is as large as its raw; classes lie in gt.zarr itself."""
    write_multiscale(folder / "raw.zarr", ramp(side), scale=(8, 8, 8), translation=(4, 4, 4), overwrite=True)
    for number, name in enumerate(CLASSES):
        labels = np.zeros((side,) * 3, np.uint8)
        labels[number : side // 2] = 1
        write_multiscale(folder / "gt.zarr" / name, labels, scale=(8, 8, 8), translation=(4, 4, 4), overwrite=True)
    return compat.CellMapDataset(
        raw_path=str(folder / "raw.zarr"), target_path=f"{folder}/gt.zarr/[mito,er]", classes=CLASSES,
        input_arrays={"raw": SPEC}, target_arrays={"labels": SPEC}, **kwargs,
    )  # fmt: skip


@pytest.fixture
def crop(tmp_path):
    with make(tmp_path) as found:
        yield found


@pytest.fixture
def raw(tmp_path):
    write_multiscale(tmp_path / "raw.zarr", ramp(), scale=(8, 8, 8), translation=(4, 4, 4), overwrite=True)
    return compat.CellMapImage(str(tmp_path / "raw.zarr"), "raw", (8, 8, 8), (4, 4, 4), pad=True)


def make_writer(folder, **kwargs):
    write_multiscale(folder / "raw.zarr", ramp(), scale=(8, 8, 8), translation=(4, 4, 4), overwrite=True)
    return compat.CellMapDatasetWriter(
        str(folder / "raw.zarr"), str(folder / "out.zarr"), ["mito"], {"raw": SPEC}, {"pred": SPEC}, {"pred": BOX},
        **kwargs,
    )  # fmt: skip


# -- attributes


def test_classes_are_lists(crop, tmp_path):
    multi = compat.CellMapMultiDataset([crop], CLASSES, {"raw": SPEC}, {"labels": SPEC})
    split = compat.CellMapDataSplit({"raw": SPEC}, {"labels": SPEC}, CLASSES, datasets={"train": [crop]})
    with make_writer(tmp_path / "w", model_classes=["er", "mito"]) as writer:
        for found in (crop.classes, multi.classes, split.classes, writer.model_classes):
            assert isinstance(found, list)
            assert sorted(found) == sorted(CLASSES)
        assert writer.classes == ["mito"]
    split.close()
    multi.close()


@pytest.mark.parametrize("split", [own.CellMapDataSplit, compat.CellMapDataSplit])
@pytest.mark.parametrize("kind", [own.CellMapDataset, compat.CellMapDataset])
def test_a_split_takes_crops_of_either_package(tmp_path, split, kind):
    make(tmp_path).close()
    raw, target = str(tmp_path / "raw.zarr"), f"{tmp_path}/gt.zarr/[mito,er]"
    given = {"input_arrays": {"raw": SPEC}, "target_arrays": {"labels": SPEC}, "classes": CLASSES}
    crop = kind(raw, target, **given)
    found = split(**given, datasets={"validate": [crop]})
    joined = found.validation_datasets if split is compat.CellMapDataSplit else found["val"].datasets
    assert list(joined) == [crop]
    found.close()


def test_crops_of_both_packages_are_joined(tmp_path):
    target = f"{tmp_path}/gt.zarr/[mito,er]"
    with make(tmp_path, raw_value_transforms="auto") as crop:
        other = own.CellMapDataset(str(tmp_path / "raw.zarr"), target, CLASSES, {"raw": SPEC}, {"labels": SPEC})
        joined = own.CellMapMultiDataset([crop, other])
        assert torch.equal(joined[3]["raw"], joined[len(crop) + 3]["raw"])
        joined.close()
        other.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_class", "mito"),
        ("axes", "zyx"),
        ("spatial_axes", ["z", "y", "x"]),
        ("scale_level", 0),
        ("scale", {"z": 8.0, "y": 4.0, "x": 4.0}),
        ("offset", {"z": 0.0, "y": 0.0, "x": 0.0}),
        ("world_shape", {"z": 128.0, "y": 128.0, "x": 128.0}),
        ("shape", {"z": 16, "y": 32, "x": 32}),
        ("chunk_shape", [4, 8, 8]),
        ("write_world_shape", {"z": 32.0, "y": 32.0, "x": 32.0}),
    ],
)
def test_attributes_of_an_image_writer(tmp_path, name, value):
    writer = compat.ImageWriter(tmp_path / "o.zarr" / "mito", "mito", (8, 4, 4), BOX, (4, 8, 8))
    assert getattr(writer, name) == value
    assert writer.base_path == str(tmp_path / "o.zarr" / "mito")
    assert writer.array_path == writer.base_path + "/s0"


def test_attributes_of_a_dataset_writer(tmp_path):
    seen = []

    def double(x):
        seen.append(x.dtype)
        return x.float() * 2

    with make_writer(tmp_path, raw_value_transforms=double, overwrite=True) as writer:
        assert (writer.axis_order, writer.overwrite, writer.raw_value_transforms) == ("zyx", True, double)
        assert writer.input_arrays == {"raw": SPEC}
        assert writer.target_arrays == {"pred": SPEC}
        assert writer.target_bounds == {"pred": BOX}
        assert isinstance(writer.target_array_writers["pred"]["mito"], compat.ImageWriter)
        index = writer.writer_indices[1]
        stored = writer.input_sources["raw"][writer.get_center(index)]
        assert torch.equal(writer[index]["raw"][0], stored * 2)
        assert seen == [torch.uint8]


def test_a_dataset_writer_by_position_and_without_warnings(tmp_path):
    found = compat.CellMapDatasetWriter(
        raw_path=str(make_writer(tmp_path).raw_path), target_path=str(tmp_path / "b.zarr"), classes=["mito"],
        input_arrays={"raw": SPEC}, target_arrays={"pred": SPEC}, target_bounds={"pred": BOX},
    )  # fmt: skip
    assert len(found) > 0
    assert found.overwrite is False
    by_position = make_writer(tmp_path / "c", device="cpu")
    assert by_position.overwrite is False


def test_cumulative_sizes_are_those_of_a_concat_dataset(tmp_path):
    with make(tmp_path / "a") as a, make(tmp_path / "b", 8) as b:
        multi = compat.CellMapMultiDataset([a, b])
        assert multi.cumulative_sizes == ConcatDataset([a, b]).cumulative_sizes == [len(a), len(a) + len(b)]
        multi.close()


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (dataset, ["CellMapImage", "EmptyImage", "box_intersection", "box_shape", "split_target_path"]),
        (dataset_writer, ["CellMapImage", "ImageWriter", "box_shape", "box_union"]),
        (image, ["box_shape"]),
        (datasplit, ["CellMapDataset", "CellMapMultiDataset", "Binarize", "NaNtoNum"]),
        (image_writer, ["create_multiscale_metadata"]),
    ],
    ids=lambda value: value.__name__.rpartition(".")[2] if hasattr(value, "__name__") else "",
)
def test_helpers_are_where_programs_look_for_them(module, names):
    assert all(callable(getattr(module, name)) for name in names)


# -- the sampler


class Foreign:
    """A dataset of another package."""

    def __init__(self, matrix, sizes=None, length=None):
        self.matrix, self.length = np.asarray(matrix, bool), length
        if sizes is not None:
            self.datasets, self.cumulative_sizes = [None] * len(sizes), np.cumsum(sizes).tolist()
            self.length = sum(sizes)

    def get_crop_class_matrix(self):
        return self.matrix

    def __len__(self):
        return len(self.matrix) if self.length is None else self.length


RARE = np.eye(2, dtype=bool)[[0] * 9 + [1]]


@pytest.mark.parametrize(
    ("foreign", "last"),
    [
        (Foreign(RARE), lambda n: n == 9),
        (Foreign(RARE, sizes=[5] * 10), lambda n: n >= 45),
        (Foreign(RARE, length=50), lambda n: n >= 45),
    ],
    ids=["a sample per crop", "cumulative_sizes", "a length"],
)
def test_a_rare_class_is_half_of_the_samples_of_any_dataset(foreign, last):
    sampler = compat.ClassBalancedSampler(foreign, 40, seed=1)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 40
    assert sum(map(last, drawn)) == 20
    assert all(0 <= n < len(foreign) for n in drawn)
    assert drawn == list(compat.ClassBalancedSampler(foreign, 40, seed=1))
    assert drawn != list(sampler)


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        (Foreign(np.zeros((3, 2))), "no active classes"),
        (Foreign(np.eye(3), sizes=[5, 5]), "crop 2 is out of range for 2"),
        (Foreign(np.eye(2), sizes=[0, 5]), "crop 0 has the positions 0 to 0 of 5"),
    ],
    ids=["no class", "fewer sizes than rows", "a crop without positions"],
)
def test_what_the_sampler_refuses(foreign, message):
    with pytest.raises(CellMapValueError, match=message):
        list(compat.ClassBalancedSampler(foreign, 50))


def test_attributes_of_the_sampler(crop):
    foreign = compat.ClassBalancedSampler(Foreign([[1, 0, 0], [1, 1, 0]]))
    assert len(foreign) == 2
    assert (foreign.n_crops, foreign.n_classes) == (2, 3)
    assert foreign.active_classes == [0, 1]
    assert {n: crops.tolist() for n, crops in foreign.class_to_crops.items()} == {0: [0, 1], 1: [1]}
    sampler = compat.ClassBalancedSampler(crop, 8, seed=3)
    assert sampler.crop_class_matrix.tolist() == [[True, True]]
    assert sampler.active_classes == [0, 1]
    assert isinstance(sampler.rng, np.random.Generator)
    loader = compat.CellMapDataLoader(crop, batch_size=4, sampler=sampler)
    assert [batch["idx"].tolist() for batch in loader] == np.reshape(list(sampler), (2, 4)).tolist()
    assert loader._sampler is sampler


# -- spatial transforms


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"mirror": {"z": True, "x": False}}, {"mirror": {"axes": {"z": 1.0, "x": 0.0}}}),
        ({"mirror": {"axes": {"x": 0.5}}}, {"mirror": {"axes": {"x": 0.5}}}),
        ({"rotate": {"z": 45}}, {"rotate": {"axes": {"z": [-45, 45]}}}),
        ({"rotate": {"axes": {"z": [0, 90]}}}, {"rotate": {"axes": {"z": [0, 90]}}}),
        ({"transpose": True}, {"transpose": {"axes": ["z", "y", "x"]}}),
        ({"transpose": False}, {"transpose": None}),
        ({"mirror": ["x"]}, {"mirror": ["x"]}),
        (None, None),
    ],
)
def test_forms_of_spatial_transforms(given, wanted):
    assert spatial_transforms(given, {"raw": SPEC}) == wanted


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 4)])
def test_a_slice_is_transposed_in_its_plane(shape):
    arrays = {"raw": {"shape": shape, "scale": (8,) * len(shape)}, "labels": SPEC}
    assert spatial_transforms({"transpose": True}, arrays) == {"transpose": {"axes": ["y", "x"]}}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flat_mirror_turns_one_axis(tmp_path, axis):
    with make(tmp_path) as plain:
        mirrored = make(tmp_path, spatial_transforms={"mirror": {"zyx"[axis]: True}})
        assert torch.equal(mirrored[5]["raw"], plain[5]["raw"].flip(axis + 1))
        assert torch.equal(mirrored[5]["labels"], plain[5]["labels"].flip(axis + 1))
        mirrored.close()


# -- images


@pytest.mark.parametrize(("axis", "degrees"), [("z", 90), ("y", 90), ("x", -90), ("z", 180)])
def test_a_rotated_image_is_what_a_rotated_dataset_shows(tmp_path, raw, axis, degrees):
    from cellmap_lightning.transforms.spatial import rotation

    with make(tmp_path, spatial_transforms={"rotate": {"axes": {axis: [degrees, degrees]}}}) as turned:
        raw.set_spatial_transforms({"rotation_matrix": rotation(axis, degrees)})
        shown = raw[turned.get_center(700)]
        assert torch.equal(turned[700]["raw"][0], shown)
        raw.set_spatial_transforms(None)
        assert not torch.equal(raw[turned.get_center(700)], shown)


def test_axes_of_a_rotation_are_those_of_the_image(tmp_path, raw):
    from cellmap_lightning.transforms.spatial import rotation

    other = compat.CellMapImage(raw.path, "raw", (8, 8, 8), (4, 4, 4), axis_order="xyz")
    center = {"z": 48.0, "y": 64.0, "x": 64.0}
    matrix = rotation("z", 90)
    raw.set_spatial_transforms({"rotation_matrix": matrix})
    other.set_spatial_transforms({"rotation_matrix": matrix[::-1, ::-1]})
    assert torch.equal(raw[center], other[center].permute(2, 1, 0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rotation_matrix": np.ones((3, 3))}, "orthogonal"),
        ({"rotation_matrix": np.eye(2)}, "orthogonal"),
        ({"mirror": {"axes": {"x": 0.5}}}, "probabilities to the dataset"),
        ({"zoom": 2}, "zoom"),
    ],
)
def test_transforms_that_an_image_refuses(raw, given, message):
    raw.set_spatial_transforms({"mirror": {"x": True}})
    with pytest.raises(CellMapValueError, match=message):
        raw.set_spatial_transforms(given)
    assert raw._mirrored == [2]  # nothing was changed


@pytest.mark.parametrize(("center", "outside"), [(10000.0, True), (-16.0, True), (-8.0, False), (64.0, False)])
def test_a_patch_outside_the_image_is_reported(raw, caplog, center, outside):
    with caplog.at_level(logging.WARNING, "cellmap_lightning.compat.image"):
        patch = raw[{"z": center, "y": 64.0, "x": 64.0}]
    assert ("out-of-bounds" in caplog.text) is outside
    assert bool(patch.isnan().all()) is outside


# -- paths and splits


@pytest.mark.parametrize("path", ["{}/gt.zarr[mito,er]", "{}/gt.zarr/[mito,er]", "{}/gt.zarr[mito]"])
def test_a_bracket_after_a_container(crop, path):
    given = path.format(crop.raw_path.rpartition("/")[0])
    with compat.CellMapDataset(crop.raw_path, given, CLASSES, {"raw": SPEC}, {"labels": SPEC}) as found:
        first = found[0]["labels"]
        assert torch.equal(first[0], crop[0]["labels"][0])
        assert bool(first[1].isnan().all()) is ("er" not in path)


@pytest.mark.parametrize("path", ["crop[mito,er]", "gt.zarr2[mito]", "gt.zarr[mito]x"])
def test_other_brackets_without_a_slash_are_refused(crop, path):
    with pytest.raises(CellMapValueError, match="one bracket"):
        compat.CellMapDataset(crop.raw_path, path, CLASSES, {"raw": SPEC}, {"labels": SPEC})
    assert split_target_path("crop[mito,er].zarr") == ("crop{label}.zarr", ["mito", "er"])


@pytest.mark.parametrize("given", [{}, {"dataset_dict": {}}, {"datasets": {"train": [], "validate": []}}])
def test_a_split_may_be_empty(given):
    split = compat.CellMapDataSplit({"raw": SPEC}, {"labels": SPEC}, CLASSES, **given)
    assert split.train_datasets == split.validation_datasets == []


# -- errors


@pytest.mark.parametrize("kwargs", [{"kernel_size": 4}, {"dim": 1}, {"dim": 4}])
def test_a_blur_raises_what_programs_catch(kwargs):
    from cellmap_lightning.compat.transforms import GaussianBlur

    for kind in (AssertionError, CellMapValueError):
        with pytest.raises(kind, match="kernel_size must be odd"):
            GaussianBlur(**kwargs)
    kernel = GaussianBlur(kernel_size=3, sigma=1.0, dim=3).kernel
    assert kernel.shape == (3, 3, 3)
    assert float(kernel.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, "Scalar writes are not supported"),
        (np.array(1.0), "Zero-dimensional NumPy arrays"),
        (torch.tensor(1.0), "Zero-dimensional torch.Tensors"),
    ],
)
def test_single_numbers_are_not_written(tmp_path, value, message):
    with make_writer(tmp_path) as writer:
        center = dict.fromkeys("zyx", 16.0)
        for write in (
            lambda: writer.target_array_writers["pred"]["mito"].__setitem__(center, value),
            lambda: writer.__setitem__(torch.tensor([0, 1]), {"mito": value}),
            lambda: writer.__setitem__(torch.tensor([0, 1]), {"pred": {"mito": value}}),
        ):
            with pytest.raises(CellMapTypeError, match=message):
                write()
        with pytest.raises(CellMapTypeError, match="Unsupported batched value type"):
            writer[torch.tensor([0, 1])] = {"mito": object()}
    assert not (tmp_path / "out.zarr").exists()


# -- helpers


def test_metadata_of_a_pyramid_is_read_back(tmp_path):
    write_multiscale(tmp_path / "a.zarr", ramp(), scale=(8, 8, 8), translation=(4, 4, 4), levels=3)
    found = metadata.create_multiscale_metadata(
        "x/a.zarr", [8, 8, 8], [4, 4, 4], "nanometer", ["z", "y", "x"], levels_to_add=2
    )
    wanted = compat.CellMapImage(str(tmp_path / "a.zarr"), "raw", (8, 8, 8), (2, 2, 2)).image.levels
    for level, entry in zip(wanted, found["multiscales"][0]["datasets"], strict=True):
        scale, translation = entry["coordinateTransformations"]
        assert (level.name, list(level.scale)) == (entry["path"], scale["scale"])
        assert list(level.lattice.origin) == translation["translation"]
    for scale, level in ((8, "s0"), (15.9, "s0"), (16, "s1"), (100, "s2"), (4, "s0")):
        assert metadata.find_level(str(tmp_path / "a.zarr"), dict.fromkeys("zyx", scale)) == level
    metadata.write_metadata(found, str(tmp_path / "found.json"))
    assert (tmp_path / "found.json").read_text().startswith("{")


def test_samples_are_collated():
    samples = [{"a": torch.tensor([n]), "name": str(n)} for n in range(3)]
    found = compat.CellMapDataLoader.collate_fn(samples)
    assert found["a"].tolist() == [[0], [1], [2]]
    assert found["name"] == ["0", "1", "2"]
    assert compat.CellMapDataLoader.collate_fn([]) == {}


def test_errors_are_of_one_family():
    from cellmap_lightning.compat.transforms.augment.values import KernelError

    assert issubclass(KernelError, CellMapError)


# -- what differs on purpose


@pytest.mark.parametrize("shape", [(16, 16, 16), (4, 4, 9), (9, 4, 4)])
def test_what_is_smaller_than_the_patch_is_refused_when_it_is_opened(tmp_path, shape):
    make(tmp_path, 8).close()
    raw, large = str(tmp_path / "raw.zarr"), {"shape": shape, "scale": (8, 8, 8)}
    with pytest.raises(CellMapValueError, match="use a smaller patch, or pad=True"):
        compat.CellMapDataset(raw, f"{tmp_path}/gt.zarr/[mito,er]", CLASSES, {"raw": large}, {"labels": large})
    with pytest.raises(CellMapValueError, match="use a smaller patch, or pad=True"):
        compat.CellMapImage(raw, "raw", (8, 8, 8), shape)


def test_idx_of_joined_crops_is_their_position(tmp_path):
    with make(tmp_path / "a") as a, make(tmp_path / "b") as b:
        multi = compat.CellMapMultiDataset([a, b])
        sample = multi[len(a) + 3]
        assert int(sample["idx"]) == len(a) + 3
        assert multi.get_center(int(sample["idx"])) == b.get_center(3)
        multi.close()


@pytest.mark.parametrize("index", [0, 100, -1])
def test_the_sampling_box_holds_the_centres(raw, index):
    for axis, center in raw.get_center(index).items():
        lower, upper = raw.sampling_box[axis]
        assert lower <= center <= upper
    assert raw.get_center(0) == {axis: lower for axis, (lower, _) in raw.sampling_box.items()}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_evaluation_is_not_augmented(tmp_path, seed):
    mirror = {"mirror": {"axes": dict.fromkeys("zyx", 0.5)}}
    with make(tmp_path) as plain, make(tmp_path, spatial_transforms=mirror, seed=seed) as augmented:
        loaders = [compat.CellMapDataLoader(d, batch_size=4, is_train=False) for d in (plain, augmented)]
        assert all(torch.equal(a["raw"], b["raw"]) for a, b in zip(*loaders, strict=True))


@pytest.mark.parametrize("classes", [["mito", "er", "ld"], ["er", "mito"], ["mito"]])
def test_crops_are_joined_with_their_own_classes(crop, classes):
    with pytest.raises(CellMapValueError, match="the crops were made for"):
        compat.CellMapMultiDataset([crop], classes)


def test_attributes_that_have_another_form(tmp_path, raw):
    writer = compat.ImageWriter(tmp_path / "o.zarr" / "mito", "mito", (8, 4, 4), BOX, (4, 8, 8))
    assert writer.write_voxel_shape == (4, 8, 8)
    assert writer.path == tmp_path / "o.zarr" / "mito"
    assert raw.axes == ["z", "y", "x"]


def test_value_transforms_of_targets_are_named_by_class(tmp_path):
    with pytest.raises(CellMapError, match=r"target_value_transforms: \['labels'\] are not among the classes"):
        make(tmp_path, target_value_transforms={"labels": torch.abs})


@pytest.mark.parametrize("name", ["mitos", "Mito", "mito_mem"])
def test_a_class_that_no_crop_annotates(tmp_path, name, caplog):
    make(tmp_path).close()
    entry = {"raw": str(tmp_path / "raw.zarr"), "gt": f"{tmp_path}/gt.zarr[mito,er]"}
    compat.CellMapDataSplit({"raw": SPEC}, {"labels": SPEC}, ["er", name], dataset_dict={"train": [entry]}).close()
    texts = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    (warning,) = [text for text in texts if "no crop annotates" in text]
    assert f"no crop annotates {name} (did you mean 'mito'?)" in warning
