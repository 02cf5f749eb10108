"""Programs written for cellmap-data 2025: what its examples use works, or one sentence has the form of 2026."""

import re
from itertools import islice

import pytest
import torch

from cellmap_lightning import compat
from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from tests.compat.test_patterns import BOX, CLASSES, SPEC, make, make_writer

pytestmark = pytest.mark.usefixtures("no_threads_left")

ARRAYS = {"input_arrays": {"raw": SPEC}, "target_arrays": {"labels": SPEC}, "classes": CLASSES}


@pytest.fixture
def folder(tmp_path):
    make(tmp_path).close()
    return tmp_path


def crop(folder, **kwargs):
    return compat.CellMapDataset(str(folder / "raw.zarr"), f"{folder}/gt.zarr[mito,er]", **(ARRAYS | kwargs))


@pytest.fixture
def dataset(folder):
    with crop(folder) as found:
        yield found


# -- arguments without effect, or with the same one


@pytest.mark.parametrize(
    "given",
    [
        {"axis_order": "zyx"},
        {"context": object()},
        {"empty_value": torch.nan},
        {"force_has_data": True},
        {"device": "cpu"},
        {"max_workers": 3},
        {"is_train": False},
        {"rng": torch.Generator().manual_seed(0)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_arguments_of_a_dataset_change_no_sample(folder, dataset, given):
    with crop(folder, **given) as other:
        assert torch.equal(other[7]["raw"], dataset[7]["raw"])
        assert torch.equal(other[7]["labels"], dataset[7]["labels"])
        other.set_raw_value_transforms(None)
        assert other.context is given.get("context")
        assert other.max_workers == given.get("max_workers", dataset.max_workers)


def test_rng_gives_the_seed(folder):
    mirror = {"mirror": {"axes": dict.fromkeys("zyx", 0.5)}}
    by_rng = crop(folder, spatial_transforms=mirror, rng=torch.Generator().manual_seed(5))
    by_seed = crop(folder, spatial_transforms=mirror, seed=5)
    other = crop(folder, spatial_transforms=mirror, seed=6)
    shown = [[d[n]["raw"] for n in range(20)] for d in (by_rng, by_seed, other)]
    assert all(map(torch.equal, shown[0], shown[1]))
    assert not all(map(torch.equal, shown[1], shown[2]))
    for found in (by_rng, by_seed, other):
        found.close()
    with pytest.raises(CellMapTypeError, match="rng and seed"):
        crop(folder, rng=torch.Generator(), seed=1)


@pytest.mark.parametrize("given", [{"context": object()}, {"rng": None}, {"empty_value": 7}, {"axis_order": "zyx"}])
def test_arguments_of_a_writer(tmp_path, given):
    with make_writer(tmp_path, **given) as writer:
        index = writer.writer_indices[0]
        writer[index] = {"pred": {"mito": torch.ones(4, 4, 4)}}
        written = writer.target_array_writers["pred"]["mito"]
        assert float(written[writer.get_center(index)].min()) == 1
        assert float(written[writer.get_center(writer.writer_indices[-1])].min()) == given.get("empty_value", 0)


@pytest.mark.parametrize(
    ("name", "value", "workers"),
    [
        ("CELLMAP_MAX_CONCURRENT_READS", "2", None),
        ("CELLMAP_DATA_BACKEND", "dask", None),
        ("CELLMAP_MAX_WORKERS", "3", 3),
    ],
)
def test_environment_variables_change_no_sample(folder, dataset, monkeypatch, name, value, workers):
    monkeypatch.setenv(name, value)
    with crop(folder) as other:
        assert torch.equal(other[7]["raw"], dataset[7]["raw"])
        assert other.max_workers == (workers or dataset.max_workers)


# -- arguments that belong elsewhere

OTHER = {
    "use_cuda_streams": "StreamPrefetch(enabled=",
    "max_streams": "StreamPrefetch(max_streams=",
    "stream_timeout": "leave it out",
    "executor": "dataset.executor",
}


@pytest.mark.parametrize("name", [*OTHER, "max_workers", "empty_value", "axis_order"])
def test_arguments_that_a_loader_names_the_place_of(dataset, name):
    advice = OTHER.get(name, f"give {name} to CellMap")
    with pytest.raises(CellMapTypeError, match=rf"^CellMapDataLoader: {name} .*{re.escape(advice)}"):
        compat.CellMapDataLoader(dataset, **{name: 4})


@pytest.mark.parametrize("name", OTHER)
def test_arguments_that_a_dataset_and_a_writer_name_the_place_of(folder, tmp_path, name):
    with pytest.raises(CellMapTypeError, match=rf"^CellMapDataset: {name} .*{re.escape(OTHER[name])}"):
        crop(folder, **{name: 4})
    with pytest.raises(CellMapTypeError, match=rf"^CellMapDatasetWriter: {name} .*{re.escape(OTHER[name])}"):
        make_writer(tmp_path / "w", **{name: 4})


@pytest.mark.parametrize("name", ["force_has_data", "context"])
def test_arguments_that_a_loader_passes_over(dataset, name):
    found = compat.CellMapDataLoader(dataset, batch_size=2, is_train=False, **{name: None})
    assert next(iter(found))["raw"].shape == (2, 1, 4, 4, 4)


@pytest.mark.parametrize("order", ["xyz", "yx", ["x", "y", "z"]])
def test_another_order_of_axes_is_refused(folder, tmp_path, order):
    with pytest.raises(CellMapValueError, match="CellMapDataset: axis_order must be 'zyx'"):
        crop(folder, axis_order=order)
    with pytest.raises(CellMapValueError, match="CellMapDatasetWriter: axis_order must be 'zyx'"):
        make_writer(tmp_path / "w", axis_order=order)


@pytest.mark.parametrize("value", [0, -1.0, 255])
def test_another_empty_value_is_refused(folder, value):
    with pytest.raises(CellMapValueError, match="CellMapDataset: empty_value must be NaN"):
        crop(folder, empty_value=value)
    with pytest.raises(CellMapValueError, match="CellMapDataSplit: empty_value must be NaN"):
        compat.CellMapDataSplit(**ARRAYS, empty_value=value)


# -- the order of arguments


def by_position(kind, folder):
    raw, target = str(folder / "raw.zarr"), f"{folder}/gt.zarr/[mito,er]"
    inputs, targets = ARRAYS["input_arrays"], ARRAYS["target_arrays"]
    if kind == "CellMapDataset":
        return compat.CellMapDataset(raw, target, CLASSES, inputs, targets, {"mirror": {"axes": {"x": 0.5}}})
    if kind == "CellMapMultiDataset":
        return compat.CellMapMultiDataset(CLASSES, inputs, targets, [])
    if kind == "CellMapDataSplit":
        return compat.CellMapDataSplit(inputs, targets, CLASSES, torch.nan, True)
    if kind == "EmptyImage":
        return compat.EmptyImage(label_class="mito", scale=(8, 8, 8), voxel_shape=(4, 4, 4))
    return compat.CellMapDatasetWriter(raw, f"{folder}/o.zarr", ["mito"], inputs, targets, {"labels": BOX}, torch.abs)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("CellMapDataset", "pad must be True or False.*is given by name"),
        ("CellMapMultiDataset", "datasets must be crops.*give arguments by name"),
        ("CellMapDataSplit", "pad must be True, False.*is given by name"),
        ("CellMapDatasetWriter", "overwrite must be True or False.*is given by name"),
        ("EmptyImage", r"call EmptyImage\(path, target_class, target_scale, target_voxel_shape\)"),
    ],
)
def test_the_order_of_2025_is_refused_in_one_sentence(folder, kind, sentence):
    with pytest.raises((CellMapTypeError, CellMapValueError), match=f"^{kind}: .*{sentence}"):
        by_position(kind, folder)


# -- the examples of its README


def test_the_executor_and_the_derived_attributes(dataset):
    assert dataset.executor.submit(sum, [1, 2]).result() == 3
    assert dataset.executor is dataset.executor
    assert dataset.center == {"z": 64.0, "y": 64.0, "x": 64.0}
    assert dataset.largest_voxel_sizes == {"z": 8.0, "y": 8.0, "x": 8.0}
    assert dataset.bounding_box_shape == {"z": 16, "y": 16, "x": 16}
    assert dataset.sampling_box_shape == {"z": 12, "y": 12, "x": 12}
    assert dataset.size == 128.0**3
    assert dataset.has_data
    assert not dataset.raw_only
    assert dataset.device == torch.device("cpu")


@pytest.mark.parametrize("count", [3, 10, 50])
def test_random_subsets(dataset, count):
    found = dataset.get_random_subset_indices(count, torch.Generator().manual_seed(1))
    assert len(set(found)) == count
    assert found == dataset.get_random_subset_indices(count, torch.Generator().manual_seed(1))
    subset = compat.CellMapSubset(dataset, range(100, 110))
    if count > len(subset):
        with pytest.warns(UserWarning, match="Sampling with replacement"):
            found = subset.get_random_subset_indices(count)
    else:
        found = subset.get_random_subset_indices(count)
    assert len(found) == count
    assert set(found) <= set(range(100, 110))


def test_a_loop_with_batches_refresh_and_a_device(folder, dataset):
    multi = compat.CellMapMultiDataset(datasets=[dataset], **ARRAYS)
    sampler = multi.get_weighted_sampler(batch_size=4)
    assert len(list(sampler)) == 4
    loader = compat.CellMapDataLoader(
        multi, batch_size=4, num_workers=0, weighted_sampler=True, is_train=True, batches_per_epoch=3, pin_memory=False
    )
    loader.to("cpu", non_blocking=True)
    seen = []
    for _ in range(2):
        loader.refresh()
        seen.append([batch["idx"].tolist() for batch in loader])
    assert [len(epoch) for epoch in seen] == [3, 3]
    assert seen[0] != seen[1]
    multi.close()


def test_iterations_in_batches_are_named(dataset, caplog):
    loader = compat.CellMapDataLoader(dataset, batch_size=4, iterations_per_epoch=8)
    assert len(list(loader)) == 2
    assert "batches_per_epoch=8" in caplog.text


def test_a_writer_loop_of_one_position_at_a_time(tmp_path):
    with make_writer(tmp_path) as writer:
        for index in islice(range(len(writer)), 3):
            inputs = writer[index]
            writer[index] = {"pred": inputs["raw"] + 1}
        assert torch.equal(writer.target_array_writers["pred"]["mito"][writer.get_center(2)], inputs["raw"][0] + 1)
