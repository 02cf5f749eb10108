import numpy as np
import pytest
import torch
import zarr

from cellmap_lightning import CellMapDataset, CellMapError, CellMapMultiDataset, batch_memory
from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.crops.crop_labels import TooCoarseError
from cellmap_lightning.crops.opening import NotAnnotatedError
from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from tests.conftest import CLASSES, INPUTS, TARGETS
from tests.make import make_dataset


def crop(volume, number, names="mito,er,pm"):
    return f"{volume.path}/recon-1/labels/groundtruth/crop{number}/[{names}]"


@pytest.fixture
def dataset(volume):
    with CellMapDataset(volume.raw_path, crop(volume, 2), CLASSES, INPUTS, TARGETS) as dataset:
        yield dataset


def first_voxel(array_path, corner):
    """Fractional index of the voxel of a level whose lower corner lies at ``corner`` nm, from the metadata alone."""
    group, _, level = array_path.rpartition("/")
    steps = zarr.open_group(group, mode="r").attrs["multiscales"][0]["datasets"][int(level[1:])]
    scale, translation = (np.array(t[t["type"]]) for t in steps["coordinateTransformations"])
    assert scale.tolist() == [10.48, 8, 8]
    return (corner - (translation - scale / 2)) / scale


@pytest.mark.parametrize("number", [2, 4])
def test_samples_equal_voxels_read_by_zarr(volume, number):
    """Raw and labels of a position, against slices of the stored arrays at the same nanometres.

    Crop 4 lies on the voxels of the level that is read; crop 2 half a voxel beside them along y, where the linear
    interpolant is the mean of two neighbours.
    """
    raw_path = f"{volume.raw_path}/s1"
    label_path = f"{volume.path}/recon-1/labels/groundtruth/crop{number}/er/s2"
    with CellMapDataset(volume.raw_path, crop(volume, number), CLASSES, INPUTS, TARGETS) as dataset:
        for index in (0, len(dataset) // 2, len(dataset) - 1):
            sample = dataset[index]
            center = np.array([dataset.get_center(index)[a] for a in "zyx"])
            corner = center - np.array([8, 16, 24]) * [10.48, 8, 8] / 2

            start = first_voxel(label_path, corner)
            assert np.abs(start - np.rint(start)).max() < 1e-6
            z, y, x = np.rint(start).astype(int)
            stored = np.asarray(zarr.open_array(label_path, mode="r")[z : z + 8, y : y + 16, x : x + 24])
            labels = sample["labels"][1].numpy()
            np.testing.assert_array_equal(labels[stored != 255], stored[stored != 255])
            assert np.isnan(labels[stored == 255]).all()

            start = first_voxel(raw_path, corner)
            np.testing.assert_allclose(np.round(start, 6) % 1, [0, 0.5 if number == 2 else 0, 0], atol=1e-6)
            z, y, x = np.floor(start + 1e-6).astype(int)
            array = zarr.open_array(raw_path, mode="r")
            stored = np.asarray(array[z : z + 8, y : y + 16, x : x + 24]).astype(np.float32)
            if number == 2:
                stored = np.rint((stored + np.asarray(array[z : z + 8, y + 1 : y + 17, x : x + 24])) / 2)
            np.testing.assert_allclose(sample["raw"][0].numpy() * 255, stored, atol=1e-4)


def test_the_finished_batch(dataset):
    batch = dataset.layout.finish(dataset.read(dataset.draw(range(3), shuffle=True, seed=0)))
    assert list(batch) == ["raw", "labels", "idx"]
    assert batch["raw"].shape == (3, 1, 8, 16, 24)
    assert batch["raw"].dtype == torch.float32
    assert 0 <= batch["raw"].min() < batch["raw"].max() <= 1
    assert batch["labels"].shape == (3, 3, 8, 16, 24)
    assert batch["labels"].dtype == torch.float32
    known = batch["labels"][~batch["labels"].isnan()]
    assert set(known.unique().tolist()) == {0.0, 1.0}
    assert batch["idx"].dtype == torch.int64
    assert batch["idx"].shape == (3,)


def test_the_compact_batch_and_the_bytes_of_both(dataset):
    compact = dataset.read(dataset.draw(range(2), shuffle=True, seed=0))
    assert isinstance(compact, CompactBatch)
    assert compact.tensors["raw"].shape == (2, 1, 8, 16, 24)
    assert compact.tensors["raw"].dtype == torch.uint8
    assert compact.tensors["labels"].shape == (2, 8, 16, 24, 2)
    memory = dataset.batch_memory(2)
    assert memory == batch_memory(INPUTS, TARGETS, CLASSES, 2)
    finished = dataset.layout.finish(compact)
    assert memory.arrays == {n: finished[n].nbytes for n in ("raw", "labels")}
    assert memory.compact.arrays == {n: compact.tensors[n].nbytes for n in ("raw", "labels")}
    assert memory.total_bytes == 4 * 2 * (8 * 16 * 24 + 8 * 16 * 24 * 3)
    assert memory.total_mb == memory.total_bytes / 2**20


def test_finish_passes_finished_batches_through(dataset):
    batch = dataset.layout.finish(dataset.read(dataset.draw([0], shuffle=True, seed=0)))
    again = dataset.layout.finish(batch)
    assert all(again[name] is batch[name] for name in batch)


def test_two_dimensional_patches_lose_the_axis(volume):
    arrays = {"raw": {"shape": [1, 16, 24], "scale": [10.48, 8, 8]}}
    targets = {"labels": {"shape": [1, 16, 24], "scale": [10.48, 8, 8]}}
    with CellMapDataset(volume.raw_path, crop(volume, 2), CLASSES, arrays, targets) as dataset:
        assert dataset[0]["raw"].shape == (1, 16, 24)
        batch = dataset.layout.finish(dataset.read(dataset.draw(range(2), shuffle=True, seed=0)))
        assert batch["raw"].shape == (2, 1, 16, 24)
        assert batch["labels"].shape == (2, 3, 16, 24)


def test_not_annotated_is_nan_and_annotated_but_absent_is_zero(volume):
    missing = next(n for n in (1, 2, 3, 4) if "pm" not in volume.annotated[f"crop{n}"])
    with CellMapDataset(
        volume.raw_path, crop(volume, missing, "mito,er"), CLASSES, INPUTS, TARGETS, read=ReadOptions(pad=True)
    ) as dataset:
        labels = dataset[len(dataset) // 2]["labels"]
    assert labels[2].isnan().all()
    assert not labels[0].isnan().all()


def test_unknown_voxels_are_nan(volume):
    """Unannotated voxels of a class are stored as 255."""
    for name, classes in volume.annotated.items():
        for c in classes:
            path = f"{volume.path}/recon-1/labels/groundtruth/{name}/{c}"
            counts = zarr.open_array(f"{path}/s0", mode="r").attrs["cellmap"]["annotation"]["complement_counts"]
            if counts["unknown"]:
                stored = np.asarray(zarr.open_array(f"{path}/s0", mode="r")[...])
                scale = [2.62, 2, 2]
                spec = {"shape": list(stored.shape), "scale": scale}
                raw = {"raw": {"shape": list(stored.shape), "scale": scale}}
                target = f"{volume.path}/recon-1/labels/groundtruth/{name}/[{c}]"
                with CellMapDataset(
                    volume.raw_path, target, [c], raw, {"labels": spec}, read=ReadOptions(pad=True)
                ) as dataset:
                    assert len(dataset) == 1
                    labels = dataset[0]["labels"][0].numpy()
                np.testing.assert_array_equal(np.isnan(labels), stored == 255)
                np.testing.assert_array_equal(labels == 1, (stored != 0) & (stored != 255))
                return
    pytest.fail("the synthetic volume has no unknown voxels")


def test_padding_outside_the_volume_and_outside_the_crop(volume):
    """A patch larger than the whole volume: raw is 0 outside it, targets are NaN outside the crop."""
    shape = [140, 20, 20]
    arrays = {"raw": {"shape": shape, "scale": [10.48, 8, 8]}}
    with CellMapDataset(
        volume.raw_path, crop(volume, 2), CLASSES, arrays, {"labels": arrays["raw"]}, read=ReadOptions(pad=True)
    ) as dataset:
        sample = dataset[0]
        z = dataset.get_center(0)["z"] - 70 * 10.48 + (np.arange(140) + 0.5) * 10.48
        inside = (z > -2.62) & (z < -2.62 + 128 * 5.24)
        assert (sample["raw"][0].numpy()[~inside] == 0).all()
        assert (sample["raw"][0].numpy()[inside] > 0).any(axis=(1, 2)).all()
        box = dataset.box
        in_crop = (z > box.lower[0]) & (z < box.upper[0])
        assert sample["labels"][:, ~in_crop].isnan().all()
        assert not sample["labels"][1, in_crop].isnan().any()


def test_exclusive_classes_are_known_to_be_absent(volume):
    with CellMapDataset(
        volume.raw_path,
        crop(volume, 2, "mito,er"),
        ["mito", "er", "pm"],
        INPUTS,
        TARGETS,
        labels=LabelOptions(class_relation_dict={"pm": {"mito", "er"}}),
    ) as dataset:
        labels = torch.cat([dataset[i]["labels"] for i in range(0, len(dataset), max(1, len(dataset) // 9))], dim=1)
    either = (labels[0] == 1) | (labels[1] == 1)
    assert either.any()
    assert (labels[2][either] == 0).all()
    assert labels[2][~either].isnan().all()


def test_raw_only(volume):
    with CellMapDataset(volume.raw_path, input_arrays=INPUTS) as dataset:
        assert list(dataset[0]) == ["raw", "idx"]
        assert dataset.classes == ()


def test_value_transforms(volume):
    with (
        CellMapDataset(
            volume.raw_path,
            crop(volume, 2),
            CLASSES,
            INPUTS,
            TARGETS,
            intensity=IntensityOptions(raw_value_transforms=None),
            labels=LabelOptions(target_value_transforms={"er": lambda t: 1 - t}),
        ) as plain,
        CellMapDataset(
            volume.raw_path,
            crop(volume, 2),
            CLASSES,
            INPUTS,
            TARGETS,
            intensity=IntensityOptions(raw_value_transforms=[lambda t: t.float() + 1, lambda t: t * 2]),
        ) as chained,
    ):
        stored = plain[0]["raw"]
        assert stored.max() > 1
        torch.testing.assert_close(chained[0]["raw"], (stored + 1) * 2)
        torch.testing.assert_close(plain[0]["labels"][1], 1 - chained[0]["labels"][1], equal_nan=True)
    with (
        CellMapDataset(
            volume.raw_path,
            crop(volume, 2),
            CLASSES,
            INPUTS,
            TARGETS,
            intensity=IntensityOptions(raw_value_transforms=lambda t: t[..., 1:]),
        ) as cut,
        pytest.raises(CellMapError, match=r"keep the shape \[1, 8, 16, 24\]"),
    ):
        cut[0]


def test_random_value_transforms_follow_the_sample_and_leave_the_global_generator_alone(volume):
    with CellMapDataset(
        volume.raw_path,
        crop(volume, 2),
        CLASSES,
        INPUTS,
        TARGETS,
        intensity=IntensityOptions(raw_value_transforms=lambda t: t.float() + torch.randn_like(t, dtype=torch.float32)),
    ) as dataset:
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        first = dataset[0]["raw"]
        assert torch.equal(torch.rand(3), expected)
        assert torch.equal(dataset[0]["raw"], first)
        assert not torch.equal(dataset[1]["raw"], first)


def test_index_errors_and_negative_indices(dataset):
    assert torch.equal(dataset[-1]["idx"], torch.tensor(len(dataset) - 1))
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError, match=f"position {index:,} is outside its {len(dataset):,} positions"):
            dataset[index]
    with pytest.raises(IndexError):
        dataset.get_center(len(dataset))


def test_get_center_of_idx(dataset):
    batch = dataset.read(dataset.draw([5, 6], shuffle=True, seed=3)).tensors
    for index in batch["idx"]:
        assert dataset.get_center(index) == dataset.get_center(int(index))


def bad(volume, error, match, **changes):
    given = {
        "input_path": volume.raw_path,
        "target_path": crop(volume, 2),
        "classes": CLASSES,
        "input_arrays": INPUTS,
        "target_arrays": TARGETS,
    }
    with pytest.raises(error, match=match) as caught:
        make_dataset(**(given | changes))
    assert isinstance(caught.value, CellMapError)


def test_errors(volume):
    bad(
        volume,
        FileNotFoundError,
        "did you mean 'fibsem-uint8'",
        input_path=str(volume.raw_path).replace("uint8", "uint"),
    )
    bad(
        volume,
        FileNotFoundError,
        "class 'mitoo' is in the bracket",
        target_path=crop(volume, 2, "mitoo"),
        classes=["mitoo"],
    )
    bad(volume, FileNotFoundError, "crop22", target_path=crop(volume, 22))
    bad(volume, NotAnnotatedError, "none of the classes", classes=["golgi"])
    bad(volume, ValueError, "should stand in one bracket", target_path=f"{volume.path}/x[mito")
    bad(volume, ValueError, "each class should be named once", target_path=crop(volume, 2, "mito,mito"))
    bad(volume, ValueError, "once each", classes=["er", "er"])
    bad(volume, TypeError, "list of names", classes="er")
    bad(volume, KeyError, "did you mean 'scale'", input_arrays={"raw": {"shape": [8, 8, 8], "scales": [8, 8, 8]}})
    bad(volume, KeyError, "needs scale", input_arrays={"raw": {"shape": [8, 8, 8]}})
    bad(volume, ValueError, "whole numbers", input_arrays={"raw": {"shape": [8, 8.5, 8], "scale": [8, 8, 8]}})
    bad(volume, ValueError, "positive", input_arrays={"raw": {"shape": [8, 8, 8], "scale": [8, -8, 8]}})
    bad(volume, KeyError, "name 'idx' is taken", input_arrays={"idx": {"shape": [8, 8, 8], "scale": [8, 8, 8]}})
    bad(volume, ValueError, "share the names", input_arrays={"labels": INPUTS["raw"]})
    fine = {"shape": [8, 8, 8], "scale": [1, 1, 1]}
    bad(volume, ValueError, "5.24x finer along z.*at most 2x", input_arrays={"raw": fine})
    bad(volume, TooCoarseError, "2.62x coarser than the 1 nm", target_arrays={"labels": fine})
    large = {"shape": [8, 500, 8], "scale": [10.48, 8, 8]}
    bad(volume, ValueError, "along y.*use a smaller patch, or pad=True", target_arrays={"labels": large})
    bad(volume, ValueError, "lower case|cannot be called", target_value_transforms=[1, 2, 3])
    bad(volume, KeyError, "golgi", target_value_transforms={"golgi": abs})
    bad(volume, KeyError, "has no .'flip'.", spatial_transforms={"flip": {}})


def test_voxel_size_is_another_name_of_scale(volume):
    spec = {"shape": [8, 16, 24], "voxel_size": [10.48, 8, 8]}
    with CellMapDataset(
        volume.raw_path, crop(volume, 2), CLASSES, {"raw": spec}, {"labels": spec}
    ) as other, CellMapDataset(
        volume.raw_path, crop(volume, 2), CLASSES, INPUTS, TARGETS
    ) as usual:  # fmt: skip
        assert all(
            torch.equal(other[0][name].nan_to_num(9), usual[0][name].nan_to_num(9)) for name in ("raw", "labels")
        )
    with pytest.raises(CellMapError, match=r"input_arrays\.raw has scale and voxel_size, which are the same"):
        CellMapDataset(volume.raw_path, input_arrays={"raw": {**INPUTS["raw"], "voxel_size": [8, 8, 8]}})


def test_crops_join_with_one_executor(volume):
    one = CellMapDataset(volume.raw_path, crop(volume, 2), CLASSES, INPUTS, TARGETS)
    two = CellMapDataset(volume.raw_path, crop(volume, 3), CLASSES, INPUTS, TARGETS)
    alone = [one[len(one) - 1], two[0]]
    with CellMapMultiDataset([one, two]) as both:
        assert list(both.datasets) == [one, two]
        assert one.executor is two.executor is both.executor
        assert len(both) == len(one) + len(two)
        for index, sample in ((len(one) - 1, alone[0]), (len(one), alone[1])):
            assert torch.equal(both[index]["raw"], sample["raw"])
        assert both.get_center(len(one)) == two.get_center(0)


def test_crops_that_differ_cannot_join(volume):
    one = CellMapDataset(volume.raw_path, crop(volume, 2), CLASSES, INPUTS, TARGETS)
    two = CellMapDataset(volume.raw_path, crop(volume, 3), ["mito", "er"], INPUTS, TARGETS)
    with pytest.raises(CellMapError, match="differ in their classes"):
        CellMapMultiDataset([one, two])


def plain(tmp_path, raw, **kwargs):
    """A volume of these voxels, read whole."""
    from cellmap_lightning.io.writer import write_multiscale

    path = tmp_path / "raw"
    if not path.exists():
        write_multiscale(path, raw, scale=(8, 8, 8), translation=(0, 0, 0), levels=1)
    inputs = {"raw": {"shape": list(raw.shape), "scale": [8, 8, 8]}}
    return make_dataset(path, input_arrays=kwargs.pop("inputs", inputs), **kwargs)


def test_booleans_are_0_and_1(tmp_path):
    from cellmap_lightning.io.writer import write_multiscale

    raw = np.arange(64).reshape(4, 4, 4) % 3 == 0
    write_multiscale(tmp_path / "raw", raw.astype(np.uint8), scale=(8, 8, 8), translation=(0, 0, 0), levels=1)
    zarr.create_array(tmp_path / "raw" / "s0", data=raw, zarr_format=2, overwrite=True)
    with plain(tmp_path, raw) as dataset:
        np.testing.assert_array_equal(dataset[0]["raw"][0].numpy(), raw)


@pytest.mark.parametrize("dtype", ["uint32", "float64"])
def test_a_window_far_from_zero_is_resolved(tmp_path, dtype):
    raw = (4_000_000_000 + np.arange(64).reshape(4, 4, 4)).astype(dtype)
    with plain(tmp_path, raw, normalize={"range": [4_000_000_000, 4_000_000_063]}) as dataset:
        expected = torch.arange(64).reshape(1, 4, 4, 4) / 63
        torch.testing.assert_close(dataset[0]["raw"], expected)


def test_the_fill_value_must_be_representable(tmp_path):
    raw = np.full((4, 4, 4), 9, np.uint8)
    with pytest.raises(CellMapError, match="maps the stored value -100 to 0, which uint8 cannot represent"):
        plain(tmp_path, raw, normalize={"range": [-100, 200]}, pad=True)
    plain(tmp_path, raw, normalize={"range": [-100, 200]})


def test_transforms_get_no_nan_no_shared_memory_and_separate_seeds(tmp_path, monkeypatch):
    raw = np.full((4, 4, 4), 9, np.float32)
    raw[1, 1, 1] = np.nan
    with plain(tmp_path, raw, raw_value_transforms=lambda v: v.mul_(2) - v.mean()) as dataset:
        compact = dataset.read(dataset.draw([0], False, 0))
        first = dataset.layout.finish(compact)["raw"]
        assert first.isfinite().all()
        assert first.abs().max() > 0
        assert torch.equal(dataset.layout.finish(compact)["raw"], first)
    spec = {"shape": [4, 4, 4], "scale": [8, 8, 8]}
    elsewhere = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", elsewhere.append)
    noise = {"inputs": {"a": spec, "b": spec}, "raw_value_transforms": lambda v: torch.randn(v.shape)}
    with plain(tmp_path, raw, **noise) as dataset:
        sample = dataset[0]
        assert not torch.equal(sample["a"], sample["b"])
        assert torch.equal(dataset[0]["a"], sample["a"])
    assert elsewhere == []


def test_crops_with_different_settings_cannot_join(volume):
    one = CellMapDataset(volume.raw_path, crop(volume, 2), CLASSES, INPUTS, TARGETS)
    mirror = {"mirror": {"axes": {"x": 1}}}
    other = {"raw_value_transforms": None, "nan_targets": False, "seed": 9, "spatial_transforms": mirror}
    for name, value in other.items():
        two = make_dataset(volume.raw_path, crop(volume, 3), CLASSES, INPUTS, TARGETS, **{name: value})
        with pytest.raises(CellMapError, match=f"differ in their {name}"):
            CellMapMultiDataset([one, two])
