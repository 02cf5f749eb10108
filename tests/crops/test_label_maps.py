"""Label maps: one array whose ids are several classes, in OME-NGFF and in other formats."""

import numpy as np
import pytest

from cellmap_lightning import CellMapDataset, CellMapError
from cellmap_lightning.crops.options import LabelOptions, ReadOptions
from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.errors import MetadataError
from cellmap_lightning.inspection.facts import read_crop_facts
from cellmap_lightning.io.label_ids import ids_of
from cellmap_lightning.splits.entries import read_csv, read_mapping
from tests.foreign import write_image
from tests.io.formats import writers

CLASSES = ["mito", "er", "pm"]
SHAPE = {"shape": [8, 16, 16], "scale": [8, 8, 8]}
MAP = {0: "background", 1: "mito", 2: "er", 5: "mito", 255: "unknown"}
READ = ReadOptions(voxel_size=[8, 8, 8], translation=[0, 0, 0])


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).choice([0, 1, 2, 5, 255], (24, 32, 40)).astype(np.uint8)


def ngff(path, voxels):
    return write_image(path / "v.zarr", voxels, array_attributes={
        "cellmap": {"annotation": {"complement_counts": {"absent": 5, "unknown": 7}}}
    })  # fmt: skip


WRITERS = {"ngff": ngff, "tiff": writers.tiff, "n5": writers.n5, "npy": writers.npy}


@pytest.fixture(params=WRITERS)
def paths(request, tmp_path, ids):
    for name in ("raw", "gt"):
        (tmp_path / name).mkdir()
    raw = WRITERS[request.param](tmp_path / "raw", np.full(ids.shape, 7, np.uint8))
    return str(raw), str(WRITERS[request.param](tmp_path / "gt", ids))


def target(path, label_map=MAP):
    return f"{path}/{{{','.join(f'{i}:{name}' for i, name in label_map.items())}}}"


def open_dataset(raw, path, **options):
    arrays = {"labels": SHAPE | ({"kind": options.pop("kind")} if "kind" in options else {})}
    return CellMapDataset(raw, path, CLASSES, {"raw": SHAPE}, arrays, read=READ, labels=LabelOptions(**options))


def test_each_class_has_its_ids(paths, ids):
    with open_dataset(paths[0], target(paths[1])) as dataset:
        assert dataset.crop.annotated == ("mito", "er")
        for index in (0, len(dataset) - 1):
            center = [dataset.get_center(index)[axis] for axis in "zyx"]
            start = np.rint(np.divide(center, 8) - (np.array([8, 16, 16]) - 1) / 2).astype(int)
            stored = ids[tuple(slice(a, a + n) for a, n in zip(start, (8, 16, 16), strict=True))]
            labels = dataset[index]["labels"].numpy()
            expected = np.where(stored == 255, np.nan, np.isin(stored, (1, 5)))
            np.testing.assert_array_equal(labels[0], expected)
            np.testing.assert_array_equal(labels[1], np.where(stored == 255, np.nan, stored == 2))
            assert np.isnan(labels[2]).all()
        for name, values in (("mito", (1, 5)), ("er", (2,))):
            index = dataset.crop.labels.foreground_index(name, dataset.crop.pool, np.array([8.0] * 3))
            assert len(index) == np.isin(ids, values).sum()


def test_facts_of_a_label_map(paths, ids):
    entry = {"raw": paths[0], "gt": paths[1], "labels": MAP, "voxel_size": [8, 8, 8], "translation": [0, 0, 0]}
    [record] = read_mapping({"train": [entry]})["train"]
    [facts] = read_crop_facts([("train", record)])
    assert facts.wrong is None
    assert {name: of_class.read_as for name, of_class in facts.classes.items()} == {
        "mito": "id 1 or 5 of a label map", "er": "id 2 of a label map"
    }  # fmt: skip
    assert all(of_class.wrong is None for of_class in facts.classes.values())
    # Counts of the whole array tell nothing about a class; those that were counted before may be known.
    for name, values in (("mito", (1, 5)), ("er", (2,))):
        assert facts.classes[name].voxels in (None, np.isin(ids, values).sum())


def test_instances_of_a_label_map(paths, ids):
    """Instance targets see a class as one instance."""
    with open_dataset(paths[0], target(paths[1]), kind="ids") as dataset:
        labels = dataset[0]["labels"].numpy()[0]
    stored = ids[:8, :16, :16]
    np.testing.assert_array_equal(labels, np.where(stored == 255, labels[stored == 255][0], np.isin(stored, (1, 5))))


@pytest.mark.parametrize("value", [3, -1, 300])
def test_ids_that_appear_later(value):
    """An array that is too large to be read whole at setup is checked when it is read."""
    meaning = ids_of(((1, "mito"), (255, "unknown")), "mito")
    stored = np.array([[[0, 1, 255]]], np.int64)
    np.testing.assert_array_equal(meaning.decode(stored, "crop1/mito"), [[[0, 1, 255]]])
    stored[0, 0, 0] = value
    with pytest.raises(MetadataError, match=rf"crop1/mito holds the id {value}, which its label map does not list"):
        meaning.decode(stored, "crop1/mito")


@pytest.mark.parametrize("gone", [(1,), (2, 5), (1, 2)])
def test_ids_that_are_not_listed(paths, gone):
    label_map = {i: name for i, name in MAP.items() if i not in gone} | {9: "pm"}
    listed = ", ".join(map(str, gone))
    with pytest.raises(MetadataError, match=rf"holds the ids? {listed}, which its label map does not list"):
        open_dataset(paths[0], target(paths[1], label_map))


def test_ids_without_unknown(tmp_path, ids):
    raw, gt = writers.npy(tmp_path, ids), writers.tiff(tmp_path, np.where(ids == 255, 0, ids))
    with open_dataset(str(raw), target(gt, {1: "mito", 2: "er", 5: "background"})) as dataset:
        assert np.isfinite(dataset[0]["labels"].numpy()[:2]).all()


def test_a_changed_label_map_is_read_again(tmp_path, ids):
    raw, gt = writers.npy(tmp_path, ids), writers.tiff(tmp_path, np.where(ids == 255, 0, ids))
    with open_dataset(str(raw), target(gt, {1: "mito", 2: "er", 5: "pm"})) as dataset:
        before = dataset[0]["labels"].numpy()
    with open_dataset(str(raw), target(gt, {1: "er", 2: "mito", 5: "pm"})) as dataset:
        after = dataset[0]["labels"].numpy()
    np.testing.assert_array_equal(before, after[[1, 0, 2]])


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint64", "float32"])
def test_types_of_ids(tmp_path, ids, dtype):
    raw, gt = writers.npy(tmp_path, ids), writers.tiff(tmp_path, ids.astype(dtype))
    with open_dataset(str(raw), target(gt)) as dataset:
        labels = dataset[0]["labels"].numpy()[1]
    np.testing.assert_array_equal(labels, np.where(ids == 255, np.nan, ids == 2)[:8, :16, :16])


@pytest.mark.parametrize(
    "label_map",
    [
        {},
        {1: "unknown"},
        {0: "background"},
        {1.5: "mito"},
        {"a": "mito"},
        {1: 2},
        {1: ""},
        [1, 2],
        "mito",
        {1: "a,b"},
        {True: "mito"},
    ],
)
def test_bad_label_maps(label_map):
    with pytest.raises(CellMapError, match=r"datasets.train\[0\]: a label map must"):
        read_mapping({"train": [{"raw": "a", "gt": "b", "labels": label_map}]})


@pytest.mark.parametrize("path", ["crop1/[mito,er]", "crop1/{1:mito}", None])
def test_a_label_map_beside_names_of_classes(path):
    with pytest.raises(CellMapError, match="without a bracket of classes"):
        read_mapping({"train": [{"raw": "a", "gt": path, "labels": {1: "mito"}}]})


def test_the_path_of_a_label_map():
    path = TargetPath.parse("a.zarr/crop1/labels/{1:mito, 2:er,255:unknown}")
    assert (path.before, path.names) == ("a.zarr/crop1/labels", ("mito", "er"))
    assert str(path) == "a.zarr/crop1/labels/{1:mito,2:er,255:unknown}"
    assert TargetPath.parse(str(path)) == path
    assert str(path.of("mito")) == str(path.of("er")) == str(path.crop)
    remote = TargetPath.parse("zip://labels/{1:mito}::/data/v.zip")
    assert TargetPath.parse(str(remote)) == remote


def test_a_csv_with_label_maps(tmp_path):
    (tmp_path / "crops.csv").write_text(
        "usage,raw,gt,labels,voxel_size\n"
        'train,raw.tif,gt.tif,"{1: mito, 2: er}","[8, 8, 8]"\n'
        "val,raw.tif,crop/[mito],,\n"
    )
    entries = read_csv(tmp_path / "crops.csv")
    assert entries["train"][0].target_path == f"{tmp_path}/gt.tif/{{1:mito,2:er}}"
    assert entries["train"][0].metadata == {"voxel_size": [8, 8, 8]}
    assert entries["val"][0].target_path == f"{tmp_path}/crop/[mito]"
