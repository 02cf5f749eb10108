"""Sampling strategies: expected shares of crops and classes, and determinism by seed and number."""

import csv
import logging
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cellmap_lightning import (
    CellMapDataModule,
    CellMapDataset,
    CellMapError,
    CellMapMultiDataset,
)
from cellmap_lightning.crops import counts
from cellmap_lightning.crops.options import LabelOptions, ReadOptions
from cellmap_lightning.datasets.frequencies import class_frequencies
from cellmap_lightning.sampling.strategies import parse_strategy
from cellmap_lightning.sampling.strategy import Chooser
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from cellmap_lightning.splits.options import SplitOptions
from tests.sampling.bare import write_bare
from tests.sampling.sampled_crops import CLASSES, CROPS, MANY, SPEC, chi_square, choose, make, share

MANIFEST = Path(__file__).parents[3] / "shared" / "data" / "challenge" / "train_crop_manifest.csv"
STRATEGIES = ["uniform", "per_crop", "weighted", "class_balanced", "foreground", "mix"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_crops_and_classes_come_as_often_as_expected(volume, strategy):
    with make(volume, strategy) as dataset:
        found, used = choose(dataset), dataset.strategy
        assert used.crop_chances.sum() == pytest.approx(1)
        chi_square(share(found.crops, len(CROPS)), used.crop_chances, MANY)
        if used.class_chances.any():
            chi_square(share(found.classes, len(CLASSES)), used.class_chances, MANY)
        else:
            assert (found.classes == -1).all()
        for crop, d in enumerate(dataset.crops):
            own = found.positions[found.crops == crop]
            assert own.min() >= 0
            assert own.max() < len(d.placement)


def test_expected_shares_of_each_strategy(volume):
    with make(volume) as dataset:
        volumes, held = dataset.crop_table.volumes, dataset.crop_table.counts > 0
        assert held.tolist() == [
            [True, True, False, False],
            [True, True, True, False],
            [True, True, False, True],
            [True, False, False, False],
        ]  # nuc is annotated in crop1, and pm in crop2, and neither is there

        def on(given):
            return parse_strategy(given).bind(dataset.crop_table)

        np.testing.assert_allclose(on("uniform").crop_chances, volumes / volumes.sum())
        np.testing.assert_allclose(on("per_crop").crop_chances, 1 / 4)
        np.testing.assert_allclose(on("weighted").crop_chances, volumes**0.5 / (volumes**0.5).sum())
        for weights in ({"crop2": 3, 5: 0}, {"volume/crop2": 3, "crop5": 0}, [1, 3, 1, 0]):
            np.testing.assert_allclose(on({"name": "weighted", "weights": weights}).crop_chances, [0.2, 0.6, 0.2, 0])
        np.testing.assert_allclose(on("class_balanced").class_chances, 1 / 4)
        rare = on("foreground").class_chances
        counted = dataset.crop_table.counts.sum(axis=0) / (volumes @ dataset.crop_table.annotated)
        assert np.argsort(rare).tolist() == np.argsort(-counted).tolist()
        np.testing.assert_allclose(
            on({"name": "foreground", "fraction": 0.5, "classes": {"mito": 3, "pm": 1}}).class_chances,
            [0.375, 0, 0, 0.125],
        )
        mix = on({"name": "mix", "parts": {"class_balanced": 3, "uniform": 1}})
        np.testing.assert_allclose(
            mix.crop_chances, 0.75 * on("class_balanced").crop_chances + 0.25 * on("uniform").crop_chances
        )
        assert repr(dataset.strategy) == "mix of 67% class_balanced, 33% foreground (100%, jitter 0.5)"


@pytest.mark.parametrize("strategy", ["class_balanced", "foreground", "mix"])
def test_the_report_of_class_frequencies(volume, strategy):
    with make(volume, strategy) as dataset:
        found = class_frequencies(dataset, 500)
        for row in found.rows:
            for wanted, got in ((row.expected_drawn, row.drawn), (row.expected_crop, row.crop)):
                assert abs(wanted - got) <= 4 * found.error(wanted)
            if strategy == "class_balanced":
                assert row.expected_voxels is not None
                # The share of a patch that is one class varies by at most this much from patch to patch.
                assert abs(row.expected_voxels - row.voxels) < 4 * found.error(row.expected_voxels)
            else:
                assert row.expected_voxels is None
            if strategy == "foreground":
                assert row.shown_if_drawn == 1
        lines = str(found).splitlines()
        assert len(lines) == 2 + len(CLASSES)
        assert lines[0].startswith(strategy)
        assert len({len(line) for line in lines[1:]}) == 1
        uniform = class_frequencies(dataset, 500, strategy="uniform")
        rarest = found.rows[CLASSES.index("pm")]
        assert rarest.shown > uniform.rows[CLASSES.index("pm")].shown


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_function_of_seed_and_number_alone(volume, strategy):
    turns = {"mirror": {"axes": {"x": 0.5}}, "rotate": {"axes": {"z": [-180, 180]}}}
    with (
        make(volume, strategy, spatial_transforms=turns) as dataset,
        make(volume, strategy, spatial_transforms=turns) as b,
    ):

        def draws(source, numbers, seed=3):
            return [(d.sample, d.position) for d in source.draw(numbers, True, seed)]

        numbers = [7, 1_000_003, 0, 12, 5]
        torch_state, numpy_state, python_state = (
            torch.get_rng_state(),
            np.random.get_state()[1].copy(),  # noqa: NPY002
            random.getstate(),
        )
        singles = {n: draws(b, [n])[0] for n in reversed(numbers)}
        assert draws(dataset, numbers) == [singles[n] for n in numbers]
        assert draws(pickle.loads(pickle.dumps(dataset)), numbers) == [singles[n] for n in numbers]
        assert draws(dataset, numbers, seed=4) != [singles[n] for n in numbers]
        assert torch.equal(torch_state, torch.get_rng_state())
        assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002
        assert python_state == random.getstate()


def test_another_process_draws_the_same(volume, tmp_path):
    with make(volume, "mix") as dataset:
        (tmp_path / "dataset").write_bytes(pickle.dumps(dataset))
        expected = [d.position for d in dataset.draw(range(50), True, 0)]
    code = (
        "import pickle, pathlib, sys\n"
        "d = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "print([x.position for x in reversed(d.draw(range(49, -1, -1), True, 0))])\n"
        "d.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "dataset"], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == str(expected)


def test_voxels_are_counted_only_if_a_strategy_needs_counts(volume, monkeypatch):
    """mito_mem of crop5 has lost its attributes, so its voxels would have to be counted."""
    asked = []
    real = counts.foreground
    monkeypatch.setattr(
        "cellmap_lightning.crops.crop_labels.foreground", lambda *args: asked.append(args[3]) or real(*args)
    )
    crops, classes = {5: "mito,mito_mem"}, ["mito", "mito_mem"]
    for strategy in ("uniform", "per_crop", "weighted"):
        with make(volume, strategy, crops=crops, classes=classes) as dataset:
            dataset.draw(range(10), True, 0)
    assert asked == []
    with make(volume, "class_balanced", crops=crops, classes=classes) as dataset:
        dataset.draw(range(10), True, 0)
    assert [label.rpartition("/")[2] for label in asked] == classes


# ---------------------------------------------------------------------------------------------- volumes of metadata


def bare(tmp_path, sizes, strategy="mix", classes=("a", "b"), foreground=None, raws=1, balance=False, stored=True):
    """Crops of 8 nm voxels, ``[crops]`` edge lengths, in ``raws`` volumes; ``foreground[crop][class]`` voxels."""
    datasets = []
    spec = {"shape": [8, 8, 8], "scale": [8, 8, 8]}
    for number, size in enumerate(sizes):
        raw = tmp_path / f"v{number % raws}.zarr" / "raw"
        if not raw.exists():
            write_bare(raw, [max(sizes) if classes else size] * 3, [8, 8, 8])
        crop = tmp_path / f"v{number % raws}.zarr" / f"crop{number}"
        for name in classes:
            there = 1 if foreground is None else foreground[number][classes.index(name)]
            write_bare(crop / name, [size] * 3, [8, 8, 8], foreground=there)
            if not stored:
                shutil.rmtree(crop / name / "s0" / "0")
        target = f"{crop}/[{','.join(classes)}]" if classes else None
        datasets.append(
            CellMapDataset(
                raw,
                target,
                list(classes) or None,
                {"raw": spec},
                {"labels": spec},
                is_train=True,
                read=ReadOptions(pad=True),
                labels=LabelOptions(missing_labels="error" if stored else "unknown"),
            )
        )
    return CellMapMultiDataset(datasets, strategy, balance)


def test_uniform_warns_when_few_crops_give_most_of_the_samples(tmp_path, caplog):
    with bare(tmp_path, [400] + [64] * 39, "uniform") as dataset, caplog.at_level(logging.WARNING):
        dataset.draw(range(5), True, 0)
        dataset.draw(range(5), True, 0)
    (record,) = [r for r in caplog.records if "strategy uniform" in r.message]
    assert "2 of the 40 crops give 87 % of the samples (v0/crop0, " in record.message
    caplog.clear()
    with bare(tmp_path / "even", [64] * 40, "uniform") as dataset, caplog.at_level(logging.WARNING):
        dataset.draw(range(5), True, 0)
    assert "strategy uniform" not in caplog.text


@pytest.mark.skipif(not MANIFEST.exists(), reason="the challenge's manifest is not here")
def test_uniform_on_the_crops_of_the_challenge(tmp_path, caplog):
    """Their real shapes and voxel sizes: five of 289 hold two thirds of the volume, and by its root a good third."""
    rows = {row["crop_name"]: row for row in csv.DictReader(MANIFEST.read_text().splitlines())}
    spec = {"shape": [8, 8, 8], "scale": [8, 8, 8]}
    datasets = []
    for name, row in rows.items():
        scale, origin, shape = (
            [float(n) for n in row[key].strip("[]").split(";")] for key in ("voxel_size", "translation", "shape")
        )
        raw = write_bare(tmp_path / name / "raw", shape, scale, origin)
        write_bare(tmp_path / name / f"crop{name}" / "nuc", shape, scale, origin, foreground=1)
        target = f"{tmp_path / name}/crop{name}/[nuc]"
        datasets.append(
            CellMapDataset(
                raw,
                target,
                ["nuc"],
                {"raw": spec},
                {"labels": spec},
                is_train=True,
                read=ReadOptions(pad=True, max_upsampling=1e9),
                labels=LabelOptions(too_coarse="upsample"),
            )
        )
    with CellMapMultiDataset(datasets, "uniform") as dataset, caplog.at_level(logging.WARNING):
        dataset.draw(range(5), True, 0)
        assert "strategy uniform: 14 of the 289 crops give 93 % of the samples" in caplog.text
        largest = np.sort(dataset.strategy.crop_chances)[-5:].sum()
        assert largest == pytest.approx(2 / 3, abs=0.02)
        balanced = parse_strategy("class_balanced").bind(dataset.crop_table)
        assert np.sort(balanced.crop_chances)[-5:].sum() < 0.4


@pytest.mark.parametrize("strategy", ["uniform", "per_crop", "weighted", "class_balanced"])
def test_balanced_volumes(tmp_path, strategy):
    """Two volumes, one with three crops and one with two: half of the samples from each, b is in one crop of each."""
    there = [[1, 1], [1, 1], [1, 0], [1, 0], [1, 0]]
    with bare(tmp_path, [64, 128, 64, 64, 200], strategy, foreground=there, raws=2, balance=True) as dataset:
        chances = dataset.strategy.crop_chances
        assert chances[::2].sum() == pytest.approx(0.5)
        chi_square(share(choose(dataset).crops, 5), chances, MANY)
    with bare(tmp_path / "not", [64, 128, 64, 64, 200], strategy, foreground=there, raws=2) as dataset:
        assert abs(dataset.strategy.crop_chances[::2].sum() - 0.5) > 0.005


def test_without_class_voxels_the_mix_samples_by_volume(tmp_path, caplog):
    for classes, name in (((), "raw"), (("a",), "absent")):
        caplog.clear()
        with (
            bare(tmp_path / name, [64, 128], classes=classes, foreground=[[0], [0]], raws=2) as dataset,
            caplog.at_level(logging.INFO),
        ):
            dataset.draw(range(5), True, 0)
            np.testing.assert_allclose(
                dataset.strategy.crop_chances, np.sqrt([64**3, 128**3]) / np.sqrt([64**3, 128**3]).sum()
            )
        assert "strategy mix: no class has a voxel in 2 crops" in caplog.text


def test_counts_of_the_metadata_that_are_not_stored_are_announced(tmp_path, caplog):
    with bare(tmp_path, [64], "foreground", classes=("a",), stored=False) as dataset, caplog.at_level(logging.WARNING):
        assert len(dataset.draw(range(20), True, 0)) == 20
    assert [r.message for r in caplog.records if "counts voxels" in r.message] == [
        "v0/crop0: the metadata counts voxels of 'a', and none is stored: it is sampled anywhere in the crop"
    ]


def test_errors(volume, tmp_path):
    crops = {1: "mito,er"}
    for strategy, match in (
        ("class_balance", "strategy 'class_balance' does not exist; did you mean 'class_balanced'"),
        ("x", "strategy 'x' does not exist; there are uniform, per_crop, weighted, class_balanced, foreground, mix"),
        (3, "strategy must be one of uniform, .*, got 3"),
        ({"fraction": 1}, "strategy must be one of"),
        ({"name": "foreground", "fracton": 1}, "option 'fracton' does not exist; did you mean 'fraction'"),
        ({"name": "uniform", "jitter": 1}, "strategy uniform has no options, got 'jitter'"),
        ({"name": "foreground", "fraction": 2}, "fraction must be between 0 and 1, got 2"),
        ({"name": "foreground", "jitter": True}, "jitter must be between 0 and 1, got True"),
        ({"name": "foreground", "classes": ["mitto"]}, "class 'mitto' does not exist; did you mean 'mito'"),
        ({"name": "foreground", "classes": []}, "classes is empty"),
        ({"name": "foreground", "classes": {"mito": -1}}, "weight of 'mito' must be a number of at least 0, got -1"),
        ({"name": "weighted", "weights": {"crop11": 1}}, "crop 'crop11' does not exist; did you mean 'crop1'"),
        ({"name": "weighted", "weights": {"crop1": "x"}}, "weight of 'crop1' must be a number of at least 0, got 'x'"),
        ({"name": "weighted", "weights": [1, 2]}, "weights must have one value for each of the 1 crops, got 2"),
        ({"name": "weighted", "weights": [0]}, "every crop has the weight 0"),
        ({"name": "mix", "parts": {"mix": 1}}, "a mix cannot be a part of a mix"),
        ({"name": "mix", "parts": {"uniform": 0}}, "every part has the share 0"),
        ({"name": "mix", "parts": 1}, "parts must be"),
    ):
        with pytest.raises(CellMapError, match=match):
            make(volume, strategy, crops=crops).close()
    with pytest.raises(CellMapError, match="class_balanced needs classes, and nothing is annotated here"):
        bare(tmp_path, [64], "class_balanced", classes=())
    with (
        bare(tmp_path / "b", [64], "class_balanced", foreground=[[0, 0]]) as dataset,
        pytest.raises(CellMapError, match="class_balanced: no crop holds a voxel of a, b"),
    ):
        dataset.draw([0], True, 0)
    with (
        bare(tmp_path / "c", [64], {"name": "foreground", "classes": ["b"]}, foreground=[[1, 0]]) as dataset,
        pytest.raises(CellMapError, match="foreground: no crop holds a voxel of b"),
    ):
        dataset.draw([0], True, 0)


def test_weights_of_the_csv_and_of_entries(volume, tmp_path, caplog):
    base = f"{volume.path}/recon-1/labels/groundtruth"
    rows = "\n".join(f'train,{volume.raw_path},"{base}/crop{n}/[mito]",{w}' for n, w in ((1, 3), (2, ""), (3, 0)))
    (tmp_path / "crops.csv").write_text(f"usage,raw,target,weight\n{rows}\n")
    common = (["mito"], {"raw": SPEC}, {"labels": SPEC})
    split = CellMapDataSplit(
        tmp_path / "crops.csv",
        None,
        None,
        *common,
        read=ReadOptions(pad=True),
        options=SplitOptions(strategy="weighted"),
    )
    np.testing.assert_allclose(split["train"].strategy.crop_chances, [0.75, 0.25, 0])
    split.close()
    for strategy, warned in (("mix", True), ({"name": "mix", "parts": {"weighted": 1, "foreground": 1}}, False)):
        caplog.clear()
        split = CellMapDataSplit(
            tmp_path / "crops.csv",
            None,
            None,
            *common,
            read=ReadOptions(pad=True),
            options=SplitOptions(strategy=strategy),
        )
        assert split["train"].strategy.crop_chances[2] > 0
        split.close()
        assert ("crops have weights, and the strategy mix of" in caplog.text) == warned
    entries = [{"raw": volume.raw_path, "gt": f"{base}/crop{n}/[mito]", "weight": w} for n, w in ((1, 1), (2, 4))]
    split = CellMapDataSplit(
        None, {"train": entries}, None, *common, read=ReadOptions(pad=True), options=SplitOptions(strategy="weighted")
    )
    np.testing.assert_allclose(split["train"].strategy.crop_chances, [0.2, 0.8])
    split.close()
    (tmp_path / "bad.csv").write_text(
        f"usage,raw,target,weight\n{rows.replace('],3', '],many')}\n".replace('",3', '",many')
    )
    with pytest.raises(CellMapError, match=r"line 2  the weight 'many' should be a number"):
        CellMapDataSplit(tmp_path / "bad.csv", None, None, *common)
    with pytest.raises(CellMapError, match="weight must be a number of at least 0, got -1"):
        CellMapDataSplit(None, {"train": [{**entries[0], "weight": -1}]}, None, *common)


def test_the_datamodule_draws_its_training_by_it(volume):
    common = {"input_arrays": {"raw": SPEC}, "target_arrays": {"labels": SPEC}, "csv_path": volume.csv_path}
    with CellMapDataModule(["mito", "er"], **common) as data:
        assert repr(data.train_dataset.strategy).startswith("mix")
    with CellMapDataModule(["mito", "er"], strategy="per_crop", balance_datasets=True, **common) as data:
        assert repr(data.train_dataset.strategy) == "per_crop"
        assert data.train_dataset.crop_table.balance
        assert not data.val_dataset.crop_table.balance
    with pytest.raises(CellMapError, match="did you mean 'foreground'"):
        CellMapDataModule(["mito"], strategy="forground", **common)


def test_choices_at_the_ends_of_the_unit_interval():
    """A row without weight is never chosen, first, last or between, in the last row as in the first."""
    weights = np.array([[0, 1, 0, 3, 0]] * 48, float)
    choose = Chooser(weights)
    rows = np.repeat(np.arange(48), 3)
    u = np.tile([0, 0.25, np.nextafter(1, 0)], 48)
    assert choose(rows, u).reshape(48, 3).tolist() == [[1, 3, 3]] * 48
