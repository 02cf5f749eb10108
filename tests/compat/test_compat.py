"""Programs written for cellmap-data run after changing the import, and get what this package gives."""

import importlib
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import cellmap_lightning as own
from cellmap_lightning import compat
from cellmap_lightning.compat.transforms import augment
from cellmap_lightning.compat.utils import (
    array_has_singleton_dim,
    box_intersection,
    box_shape,
    box_union,
    fig_to_image,
    get_fig_dict,
    is_array_2D,
    longest_common_substring,
    min_redundant_inds,
    permute_singleton_dimension,
    split_target_path,
    torch_max_value,
)
from cellmap_lightning.errors import CellMapIndexError, CellMapTypeError, CellMapValueError

pytestmark = pytest.mark.usefixtures("no_threads_left")

PATCH = {"shape": (16, 32, 32), "scale": (10.48, 8, 8)}
CLASSES = ["mito", "er"]


def make(volume, crop="crop2", **kwargs):
    target = f"{volume.path}/recon-1/labels/groundtruth/{crop}/[mito,er]"
    return compat.CellMapDataset(volume.raw_path, target, CLASSES, {"input": PATCH}, {"output": PATCH}, **kwargs)


@pytest.fixture
def dataset(volume):
    with make(volume) as found:
        yield found


@pytest.fixture
def split(volume):
    root = f"{volume.path}/recon-1/labels/groundtruth"
    entries = {
        "train": [{"raw": str(volume.raw_path), "gt": f"{root}/{crop}/[mito,er]"} for crop in ("crop1", "crop2")],
        "validate": [{"raw": str(volume.raw_path), "gt": f"{root}/crop4/[mito,er]"}],
    }
    found = compat.CellMapDataSplit(
        {"input": PATCH}, {"output": PATCH}, CLASSES, pad=True, dataset_dict=entries,
        spatial_transforms={"mirror": {"axes": {"x": 0.5}}},
    )  # fmt: skip
    yield found
    found.close()


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("", compat.__all__),
        (".dataset", ["CellMapDataset"]),
        (".multidataset", ["CellMapMultiDataset"]),
        (".datasplit", ["CellMapDataSplit"]),
        (".dataloader", ["CellMapDataLoader"]),
        (".image", ["CellMapImage"]),
        (".empty_image", ["EmptyImage"]),
        (".sampler", ["ClassBalancedSampler"]),
        (".dataset_writer", ["CellMapDatasetWriter"]),
        (".image_writer", ["ImageWriter"]),
        (".subdataset", ["CellMapSubset"]),
        (".mutable_sampler", ["MutableSubsetRandomSampler"]),
        (".transforms", ["Binarize", "GaussianBlur", "GaussianNoise", "NaNtoNum", "RandomContrast", "RandomGamma"]),
        (".transforms.augment", ["Binarize", "NaNtoNum", "Normalize"]),
        (".utils", ["get_fig_dict", "longest_common_substring", "is_array_2D", "array_has_singleton_dim"]),
        (".utils.misc", ["split_target_path", "min_redundant_inds"]),
    ],
)
def test_module_paths(module, names):
    found = importlib.import_module(f"cellmap_lightning.compat{module}")
    for name in names:
        assert callable(getattr(found, name))


def test_a_training_script(split):
    """As its users write it: two loaders, `loader.loader`, counts for the loss, a model, a step."""
    train = compat.CellMapDataLoader(
        split.train_datasets_combined, classes=CLASSES, batch_size=2, weighted_sampler=True, samples_per_epoch=8,
        is_train=True, device="cpu",
    )  # fmt: skip
    validation = compat.CellMapDataLoader(split.validation_blocks, classes=CLASSES, batch_size=2, is_train=False)
    counts = split.train_datasets_combined.class_counts
    assert set(counts["totals"]) == set(CLASSES)
    weights = torch.tensor([split.train_datasets_combined.class_weights[name] for name in CLASSES])
    assert all(counts["totals_total"][name] > counts["totals"][name] > 0 for name in CLASSES)
    model = torch.nn.Conv3d(1, 2, 3, padding=1)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        train.refresh()
        seen = []
        for batch in train.loader:
            seen += batch["idx"].tolist()
            known = ~torch.isnan(batch["output"])
            loss = torch.nn.BCEWithLogitsLoss(reduction="none", pos_weight=weights[:, None, None, None])
            optimizer.zero_grad()
            loss(model(batch["input"]), batch["output"].nan_to_num())[known].mean().backward()
            optimizer.step()
        assert len(seen) == 8
        assert batch["input"].shape == (2, 1, 16, 32, 32)
        assert 0 <= batch["input"].min() <= batch["input"].max() <= 1
    shown = [int(i) for batch in validation.loader for i in batch["idx"]]
    assert shown == list(split.validation_blocks.indices)


def test_samples_are_those_of_the_package(volume, dataset):
    spec = {key: list(value) for key, value in PATCH.items()}
    target = f"{volume.path}/recon-1/labels/groundtruth/crop2/[mito,er]"
    with own.CellMapDataset(
        volume.raw_path,
        target,
        CLASSES,
        {"input": spec},
        {"output": spec},
        intensity=own.IntensityOptions(raw_value_transforms=None),
    ) as same:
        for position in (0, len(same) // 2, len(same) - 1):
            for name, value in same[position].items():
                assert torch.equal(dataset[position][name].nan_to_num(-1), value.nan_to_num(-1))
    center = dataset.get_center(5)
    assert dataset.sampling_box["x"][0] <= center["x"] <= dataset.sampling_box["x"][1]
    sample = dataset[5]
    for name, image in dataset.target_sources.items():
        labels = image[center]
        assert torch.equal(labels == 1, sample["output"][CLASSES.index(name)] == 1)
    raw = dataset.input_sources["input"][center]
    assert (raw.round() - sample["input"][0]).abs().max() <= 1


@pytest.mark.parametrize("how", ["crop", "crops", "subset", "sampler"])
def test_the_dataset_of_a_loader_has_what_the_dataset_has(split, dataset, how):
    """Training programs take class weights, classes and crops from ``loader.dataset``."""
    source = dataset if how == "crop" else split.train_datasets_combined
    given = compat.CellMapSubset(source, range(4)) if how == "subset" else source
    sampler = torch.utils.data.SequentialSampler(range(4)) if how == "sampler" else None
    loader = compat.CellMapDataLoader(given, batch_size=2, samples_per_epoch=4, sampler=sampler)
    found = loader.dataset
    assert found.class_weights == source.class_weights
    assert list(found.classes) == CLASSES
    assert found.class_counts == source.class_counts
    assert how == "crop" or found.datasets is source.datasets
    assert len(list(loader)) == 2
    assert not hasattr(found, "nothing_of_the_kind")
    assert pickle.loads(pickle.dumps(found)).classes == found.classes


def test_counts_and_extent_of_an_image(volume):
    path = f"{volume.path}/recon-1/labels/groundtruth/crop2/mito"
    stored = zarr.open_array(f"{path}/s0", mode="r")[...]
    image = compat.CellMapImage(path, "mito", (10.48, 8, 8), (8, 16, 16))
    finest = image.image.finest.scale
    share = np.prod(finest) / (10.48 * 8 * 8)
    assert image.class_counts == {"mito": int((stored == 1).sum() * share)}
    assert image.total_voxels == round(stored.size * share)
    assert image.output_size == {"z": 8 * 10.48, "y": 128, "x": 128}
    assert "class_counts" not in (Path(path) / "s0" / ".zattrs").read_text()  # cellmap-data writes them there


def test_an_image_mirrors_and_transposes(volume):
    image = compat.CellMapImage(volume.raw_path, "raw", (10.48, 8, 8), (8, 16, 12), interpolation="linear")
    center = image.get_center(77)
    plain = image[center]
    image.set_spatial_transforms({"mirror": {"z": True, "y": False, "x": True}, "transpose": [0, 2, 1]})
    assert torch.equal(image[center], plain.flip(0, 2).permute(0, 2, 1))
    image.set_spatial_transforms({"mirror": [False, True, False]})
    assert torch.equal(image[center], plain.flip(1))
    image.set_spatial_transforms(None)
    assert torch.equal(image[center], plain)
    with pytest.raises(CellMapValueError, match=r"zoom.*rotation_matrix"):
        image.set_spatial_transforms({"zoom": 2})
    empty = compat.EmptyImage("", "er", (8, 8, 8), (2, 2, 2))
    empty.set_spatial_transforms({"mirror": {"z": True}})
    assert empty[center].isnan().all()


@pytest.mark.parametrize("usage", ["train", "validate"])
def test_counts_of_a_split_without_crops(volume, usage):
    entry = {"raw": str(volume.raw_path), "gt": f"{volume.path}/recon-1/labels/groundtruth/crop2/[mito,er]"}
    split = compat.CellMapDataSplit({"input": PATCH}, {"output": PATCH}, CLASSES, dataset_dict={usage: [entry]})
    other = {"train": "validate", "validate": "train"}[usage]
    assert split.class_counts[other] == {"mito": 0, "er": 0}
    assert split.class_counts[other]["totals_total"] == {"mito": 0, "er": 0}
    assert split.class_counts[usage]["mito"] > 0
    split.close()


def test_totals_are_found_in_class_counts(dataset, split):
    for counts in (dataset.class_counts, split.class_counts["train"]):
        assert {"totals", "totals_total", "mito"} <= {
            key for key in ("totals", "totals_total", "mito", "no") if key in counts
        }
        assert "no" not in counts
        assert sorted(counts) == sorted(CLASSES)


def test_iterations_per_epoch_is_a_number_of_samples(dataset, caplog):
    loader = compat.CellMapDataLoader(dataset, batch_size=2, iterations_per_epoch=6)
    (record,) = [r for r in caplog.records if "iterations_per_epoch" in r.getMessage()]
    assert record.levelname == "WARNING"
    assert "an epoch has 3 batches of 2" in record.getMessage()
    assert "batches_per_epoch=6" in record.getMessage()
    assert len(loader) == 3
    assert len(compat.CellMapDataLoader(dataset, batch_size=2, batches_per_epoch=6)) == 6
    with pytest.raises(CellMapTypeError, match="give one"):
        compat.CellMapDataLoader(dataset, samples_per_epoch=4, batches_per_epoch=2)


def test_a_sampler_of_positions(dataset):
    asked = iter([[3, 1, 2], [4, 5, 3]])
    sampler = compat.MutableSubsetRandomSampler(lambda: next(asked), torch.Generator().manual_seed(0))
    loader = compat.CellMapDataLoader(dataset, batch_size=2, sampler=sampler)
    assert sorted(int(i) for batch in loader for i in batch["idx"]) == [1, 2, 3]
    loader.refresh()
    batches = list(loader.loader)
    assert sorted(int(i) for batch in batches for i in batch["idx"]) == [3, 4, 5]
    for batch in batches:
        for row, position in enumerate(batch["idx"].tolist()):
            assert torch.equal(batch["input"][row], dataset[position]["input"])
    wrong = compat.CellMapDataLoader(dataset, sampler=[0, len(dataset)])
    with pytest.raises(CellMapIndexError, match=f"chose {len(dataset)}"):
        list(wrong)


def test_samplers_of_the_dataset(dataset):
    balanced = compat.ClassBalancedSampler(dataset, samples_per_epoch=5)
    assert len(list(compat.CellMapDataLoader(dataset, sampler=balanced))) == 5
    drawn = dataset.get_subset_random_sampler(6)
    assert len(list(compat.CellMapDataLoader(dataset, batch_size=3, sampler=drawn))) == 2


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_subset_is_drawn_from_and_augmented_again(volume, num_workers):
    with make(volume, spatial_transforms={"mirror": {"axes": {"x": 0.5}}}) as dataset:
        subset = compat.CellMapSubset(dataset, [2, 40, 77, 100])
        assert subset.classes == dataset.classes
        assert subset.class_counts == dataset.class_counts
        loader = compat.CellMapDataLoader(subset, batch_size=2, num_workers=num_workers)
        turned = set()
        for _ in range(6):
            batches = list(loader)
            assert sorted(int(i) for batch in batches for i in batch["idx"]) == [2, 40, 77, 100]
            turned |= {batch["input"][row].sum(-2).flatten()[0].item() for batch in batches
                       for row in range(2) if batch["idx"][row] == 40}  # fmt: skip
        assert len(turned) == 2, "the same position comes in both directions"
        again = compat.CellMapDataLoader(subset, batch_size=2, rng=torch.Generator().manual_seed(3))
        same = compat.CellMapDataLoader(subset, batch_size=2, rng=torch.Generator().manual_seed(3))
        for a, b in zip(again, same, strict=True):
            assert torch.equal(a["input"], b["input"])
        assert subset.get_subset_random_sampler(6, torch.Generator().manual_seed(0)).indices[4] in range(4)
        loader.close()


def test_pad_for_one_split(volume):
    root = f"{volume.path}/recon-1/labels/groundtruth"
    large = {"shape": (64, 200, 200), "scale": (10.48, 8, 8)}
    entries = {"train": [{"raw": str(volume.raw_path), "gt": f"{root}/crop2/[mito,er]"}]}
    entries["validate"] = entries["train"]
    given = ({"input": large}, {"output": large}, CLASSES)
    with pytest.raises(CellMapValueError, match=r"'val' cannot be used"):
        compat.CellMapDataSplit(*given, pad="train", dataset_dict=entries)
    with pytest.raises(CellMapValueError, match="'train' or 'validate'"):
        compat.CellMapDataSplit(*given, pad="test", dataset_dict=entries)


def test_the_split_is_changed_afterwards(split):
    before = split.validation_datasets_combined[0]["input"]
    split.set_raw_value_transforms(None, augment.Normalize(0, 1))
    assert torch.allclose(split.validation_datasets_combined[0]["input"], before * 255, atol=1e-3)
    smaller = {"output": {"shape": (8, 16, 16), "scale": (10.48, 8, 8)}}
    split.set_arrays(smaller, "target", "validate")
    assert split.validation_datasets_combined[0]["output"].shape == (2, 8, 16, 16)
    assert split.train_datasets_combined[0]["output"].shape == (2, 16, 32, 32)
    split.set_spatial_transforms(None)
    assert not split.train_datasets_combined.is_train
    assert len(split.train_datasets) == 2


def test_positions_in_steps(dataset):
    step = {axis: n * s for axis, n, s in zip("zyx", PATCH["shape"], PATCH["scale"], strict=True)}
    found = dataset.get_indices(step)
    assert {0, len(dataset) - 1} <= set(found)
    lower = np.array([[dataset.get_center(i)[a] for a in "zyx"] for i in found]) - [s / 2 for s in step.values()]
    for axis, name in enumerate("zyx"):
        assert np.diff(np.unique(lower[:, axis])).max() <= step[name] + 1e-6, "no gap"


def test_an_image_with_a_transform(volume):
    image = compat.CellMapImage(
        str(volume.raw_path), "raw", (8, 8), (32, 48), interpolation="linear", value_transform=augment.Normalize()
    )
    assert (image.axes, image.output_shape) == (["z", "y", "x"], {"z": 1, "y": 32, "x": 48})
    patch = image[image.get_center(len(image) // 2)]
    assert patch.shape == (1, 32, 48)
    assert 0 <= patch.min() <= patch.max() <= 1
    empty = compat.EmptyImage("", "mito", (8, 8), (32, 48)).to("cpu")
    assert empty[{"z": 0}].shape == (1, 32, 48)
    assert empty[{"z": 0}].isnan().all()
    assert empty.class_counts == {"mito": 0}


def test_classes_that_are_not_those_of_the_crops(dataset):
    with pytest.raises(CellMapValueError, match=r"made for \['mito', 'er'\], not for \['er'\]"):
        compat.CellMapMultiDataset([dataset], ["er"], {"input": PATCH}, {"output": PATCH})
    with pytest.raises(CellMapTypeError, match="needs a CellMapDataset"):
        compat.CellMapDataLoader([1, 2])


def test_helpers():
    a, b = {"z": (0, 4), "x": (2, 8)}, {"z": (1, 9), "x": (0, 3)}
    assert box_intersection(a, b) == {"z": (1, 4), "x": (2, 3)}
    assert box_intersection(a, {"z": (4, 9), "x": (0, 3)}) is None
    assert box_union(a, b) == {"z": (0, 9), "x": (0, 8)}
    assert box_shape(a, {"z": 3, "x": 2}) == {"z": 1, "x": 3}
    assert longest_common_substring("jrc_hela-2", "the hela-3") == "hela-"
    assert split_target_path("/d/crop1/[mito, er]") == ("/d/crop1/{label}", ["mito", "er"])
    assert split_target_path("/d/crop1/[er]/s") == ("/d/crop1/{label}/s", ["er"])
    assert split_target_path("/d/crop1/mito") == ("/d/crop1/mito", ["mito"])
    arrays = {"a": {"shape": [8, 8], "scale": [4, 4]}, "b": {"shape": [1, 8, 8], "scale": [4, 4, 4]}}
    assert is_array_2D(arrays) == {"a": True, "b": False}
    assert is_array_2D(arrays, summary=any) is True
    assert is_array_2D(None) is False
    assert array_has_singleton_dim(arrays) is True
    assert array_has_singleton_dim(arrays, summary=False) == {"a": False, "b": True}
    permute_singleton_dimension(arrays, 1)
    assert arrays["a"] == {"shape": [8, 1, 8], "scale": [4, 4, 4]}
    assert arrays["b"]["shape"] == [8, 1, 8]
    assert torch_max_value(torch.int16) == 32767
    assert torch_max_value(torch.float32) == 1
    found = min_redundant_inds(5, 12, False, torch.Generator().manual_seed(0)).tolist()
    assert sorted(found[:5]) == sorted(found[5:10]) == list(range(5))
    assert len(found) == 12
    assert min_redundant_inds(3, 9, True).max() < 3


def test_figures_of_each_class(dataset):
    batch = next(iter(compat.CellMapDataLoader(dataset, batch_size=2)))
    inside = batch["output"][..., 4:-4, 4:-4]
    figures = get_fig_dict(batch["input"], inside, torch.rand_like(inside), CLASSES)
    assert list(figures) == CLASSES
    image = fig_to_image(figures["er"])
    assert image.ndim == 3
    assert image.std() > 10


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_are_delivered_on_a_device(dataset):
    loader = compat.CellMapDataLoader(dataset, batch_size=2, is_train=False, device="cuda")
    here = compat.CellMapDataLoader(dataset, batch_size=2, is_train=False)
    for there, plain in islice(zip(loader, here, strict=True), 3):
        for name, value in there.items():
            assert value.is_cuda
            assert torch.equal(value.cpu().nan_to_num(-1), plain[name].nan_to_num(-1))
