"""Rules of division, on random crops and on real ones."""

import csv
import itertools
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_lightning import CellMapError
from cellmap_lightning.geometry.lattice import Box
from cellmap_lightning.splits.manifests import read_manifest
from cellmap_lightning.splits.rules import RULES, CandidateCrop, assign, missing_classes, together
from tests.splits.splitting import GT, RAW, split

DIVIDING = [rule for rule in RULES if rule != "csv"]


# -- the rules, on random crops


@st.composite
def random_crops(draw, most=9):
    """Crops in three datasets, some of them overlapping."""
    crops = []
    for n in range(draw(st.integers(2, most))):
        dataset = draw(st.sampled_from("abc"))
        start = draw(st.integers(0, 40))
        box = Box((0, 0, start), (1, 1, start + draw(st.integers(1, 6))))
        classes = draw(st.frozensets(st.sampled_from(["mito", "er", "nuc", "pm", "ld"])))
        crops.append(CandidateCrop(f"{dataset}/crop{n}", dataset, classes, draw(st.sampled_from([box, None]))))
    return crops


def attempt(crops, rule, **kwargs):
    """The usages, or what an impossible request says."""
    try:
        return assign(crops, rule, **kwargs)
    except CellMapError as e:
        return str(e)


numbers = {"seed": st.integers(0, 99), "val_fraction": st.floats(0.05, 0.6), "rule": st.sampled_from(DIVIDING)}


@settings(max_examples=150, deadline=None)
@given(crops=random_crops(), data=st.data(), **numbers)
def test_a_split_depends_on_seed_and_names_but_not_on_order(crops, data, rule, seed, val_fraction):
    kwargs = {"seed": seed, "val_fraction": val_fraction, "n_folds": 2}
    usages = attempt(crops, rule, **kwargs)
    order = data.draw(st.permutations(range(len(crops))))
    again = attempt([crops[i] for i in order], rule, **kwargs)
    assert again == (usages if isinstance(usages, str) else [usages[i] for i in order])


@pytest.mark.parametrize("rule", DIVIDING)
def test_forty_crops_in_another_order(rule):
    """Pairs overlap: what stands for a pair must not be whichever is listed first."""
    crops = [
        CandidateCrop(
            f"d{n % 4}/crop{n}", f"d{n % 4}", frozenset(["mito", "er", "pm"][: n % 4]), Box((0, 0, at), (1, 1, at + 1))
        )
        for n in range(40)
        for at in [n // 8]
    ]
    assert {len(group) for group in together(crops)} == {2}
    for seed in range(5):
        usages = assign(crops, rule, seed=seed, val_fraction=0.3, n_folds=4)
        assert assign(crops[::-1], rule, seed=seed, val_fraction=0.3, n_folds=4) == usages[::-1]


@settings(max_examples=150, deadline=None)
@given(crops=random_crops(), **numbers)
def test_crops_that_overlap_are_not_parted(crops, rule, seed, val_fraction):
    usages = attempt(crops, rule, seed=seed, val_fraction=val_fraction, n_folds=2)
    if isinstance(usages, str):
        return
    assert set(usages) == {"train", "val"}
    for (a, one), (b, other) in itertools.combinations(zip(crops, usages, strict=True), 2):
        if a.dataset == b.dataset and a.box and b.box and a.box.intersects(b.box):
            assert one == other
        if rule == "by_dataset" and a.dataset == b.dataset:
            assert one == other


def lost(groups, in_val):
    """Classes of two groups that val lacks, and classes that train lacks, when these groups validate."""
    held = Counter(name for group in groups for name in group)
    val = {name for group, chosen in zip(groups, in_val, strict=True) if chosen for name in group}
    train = {name for group, chosen in zip(groups, in_val, strict=True) if not chosen for name in group}
    return sum(n > 1 and name not in val for name, n in held.items()), len(set(held) - train)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(crops=random_crops(), rule=st.sampled_from(["random", "stratified"]), seed=st.integers(0, 99))
def test_classes_of_two_crops_are_in_val_and_stay_in_train(crops, rule, seed):
    usages = attempt(crops, rule, seed=seed, val_fraction=0.3)
    if isinstance(usages, str):
        return
    parts = together(crops)
    groups = [frozenset().union(*(crops[i].classes for i in part)) for part in parts]
    found = lost(groups, [usages[part[0]] == "val" for part in parts])
    choices = [c for c in itertools.product([True, False], repeat=len(groups)) if len(set(c)) == 2]
    assert found[0] == 0
    assert found == min(lost(groups, choice) for choice in choices)


@settings(max_examples=100, deadline=None)
@given(crops=random_crops(), n_folds=st.integers(2, 4), seed=st.integers(0, 99))
def test_each_crop_validates_in_one_fold(crops, n_folds, seed):
    if len(together(crops)) < n_folds:
        return
    folds = [assign(crops, "kfold", fold=fold, n_folds=n_folds, seed=seed) for fold in range(n_folds)]
    assert all(sorted(of) == ["train"] * (n_folds - 1) + ["val"] for of in map(list, zip(*folds, strict=True)))


def apart(count, classes=lambda n: ("mito",), datasets=1):
    return [CandidateCrop(f"d{n % datasets}/crop{n}", f"d{n % datasets}", frozenset(classes(n))) for n in range(count)]


@pytest.mark.parametrize("rule", ["random", "stratified"])
@pytest.mark.parametrize(("fraction", "expected"), [(0.01, 1), (0.1, 4), (0.25, 10), (0.99, 39)])
def test_the_fraction_is_met_and_the_seed_counts(rule, fraction, expected):
    crops = apart(40)
    splits = [assign(crops, rule, val_fraction=fraction, seed=seed) for seed in range(5)]
    assert [usages.count("val") for usages in splits] == [expected] * 5
    assert len(set(map(tuple, splits))) > 3


def test_stratified_gives_each_class_its_share():
    crops = apart(
        60, lambda n: [name for name, step in (("mito", 1), ("er", 2), ("nuc", 6), ("ld", 15)) if n % step == 0]
    )
    for seed in range(5):
        usages = assign(crops, "stratified", val_fraction=0.25, seed=seed)
        held = Counter(
            name for crop, usage in zip(crops, usages, strict=True) if usage == "val" for name in crop.classes
        )
        # Of 60, 30, 10 and 4 crops.
        assert held["mito"] == 15
        assert held["er"] in (7, 8)
        assert held["nuc"] in (2, 3)
        assert held["ld"] == 1


def test_whole_datasets():
    crops = apart(40, datasets=8)
    for seed in range(4):
        usages = assign(crops, "by_dataset", val_fraction=0.25, seed=seed)
        chosen = {crop.dataset for crop, usage in zip(crops, usages, strict=True) if usage == "val"}
        assert len(chosen) == 2
        assert usages.count("val") == 10
    for fold in range(8):
        usages = assign(crops, "leave_one_dataset_out", fold=fold)
        assert {c.dataset for c, usage in zip(crops, usages, strict=True) if usage == "val"} == {f"d{fold}"}


def test_another_crop_leaves_most_of_a_random_split_as_it_was():
    before = assign(apart(100), "random", val_fraction=0.2)
    after = assign(apart(101), "random", val_fraction=0.2)
    assert sum(a != b for a, b in zip(before, after[:100], strict=True)) <= 2


def test_golden_split_of_fixed_names():
    """A split that moved with a new release would put crops that a network was trained on into validation."""
    crops = apart(12, lambda n: ("mito", "er") if n % 3 else ("mito",), datasets=3)
    expected = {
        "random": "d2/crop2 d0/crop3 d2/crop8",
        "stratified": "d2/crop2 d0/crop3 d2/crop8",
        "by_dataset": "d1/crop1 d1/crop4 d1/crop7 d1/crop10",
        "kfold": "d0/crop0 d2/crop8 d2/crop11",
    }
    for rule, names in expected.items():
        usages = assign(crops, rule, val_fraction=0.25, n_folds=4)
        assert " ".join(c.name for c, usage in zip(crops, usages, strict=True) if usage == "val") == names


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"split": "stratifed"}, "split must be one of csv, random, .*, got 'stratifed'; did you mean 'stratified'?"),
        ({"split": "csv"}, "split=csv is not a rule"),
        ({"split": "random", "val_fraction": 1}, "val_fraction must be a number between 0 and 1, got 1"),
        ({"split": "random", "val_fraction": 0.0}, "val_fraction must be a number between 0 and 1, got 0.0"),
        ({"split": "random", "val_fraction": "0.1"}, "val_fraction must be a number between 0 and 1, got '0.1'"),
        ({"split": "kfold", "fold": 5}, r"fold must be in \[0, 5\) with n_folds=5, got 5"),
        ({"split": "kfold", "fold": -1}, "fold must be a whole number of at least 0, got -1"),
        ({"split": "kfold", "fold": 1.5}, "fold must be a whole number of at least 0, got 1.5"),
        ({"split": "kfold", "n_folds": 1}, "n_folds must be a whole number of at least 2, got 1"),
        ({"split": "kfold", "n_folds": 9}, "n_folds=9 needs at least 9 crops that do not overlap, got 4"),
        ({"split": "by_dataset"}, "split=by_dataset needs at least 2 datasets, got 1: d0"),
        (
            {"split": "leave_one_dataset_out"},
            "leave_one_dataset_out needs at least two datasets, got d0",
        ),
    ],
)
def test_invalid_and_impossible_splits_are_errors(kwargs, match):
    with pytest.raises(CellMapError, match=match):
        assign(apart(4), **kwargs)


def test_a_dataset_that_is_not_there_cannot_be_left_out():
    with pytest.raises(IndexError, match=r"fold must be in \[0, 3\) with .* the datasets d0, d1, d2, got 3"):
        assign(apart(4, datasets=3), "leave_one_dataset_out", fold=3)


def test_one_group_cannot_be_divided():
    box = Box((0, 0, 0), (2, 2, 2))
    with pytest.raises(ValueError, match="random needs at least 2 crops that do not overlap, got 1: d/a"):
        assign([CandidateCrop("d/a", "d", box=box), CandidateCrop("d/b", "d", box=box)], "random")


# -- the real crops of the challenge


@pytest.fixture
def challenge():
    path = Path(__file__).parents[3] / "shared" / "data" / "challenge" / "train_crop_manifest.csv"
    if not path.exists():
        pytest.skip("the challenge's manifest is not here")
    return path


@pytest.fixture
def real_crops(challenge, tmp_path):
    listed = read_manifest(challenge, tmp_path)
    names = [(Path(crop.raw).parents[2].stem, Path(crop.folder).name) for crop in listed]
    return [
        CandidateCrop(f"{dataset}/{name}", dataset, frozenset(crop.classes), crop.box)
        for (dataset, name), crop in zip(names, listed, strict=True)
    ]


def test_real_crops_are_divided_with_every_class_on_both_sides(real_crops):
    assert len(real_crops) == 289
    assert len(together(real_crops)) == 259  # 40 pairs overlap
    held = Counter(name for crop in real_crops for name in crop.classes)
    for rule in ("random", "stratified", "by_dataset"):
        usages = assign(real_crops, rule, val_fraction=0.15)
        assert usages.count("val") == 43
        assert missing_classes(real_crops, usages) == ([], [])
        if rule == "stratified":
            in_val = Counter(n for crop, u in zip(real_crops, usages, strict=True) if u == "val" for n in crop.classes)
            assert all(abs(in_val[name] - 0.15 * n) <= 2 for name, n in held.items())
    folds = [assign(real_crops, "kfold", fold=fold) for fold in range(5)]
    for usages in folds:
        assert missing_classes(real_crops, usages) == ([], [])
        assert usages.count("val") in (57, 58)
    assert all(sorted(of) == ["train"] * 4 + ["val"] for of in map(list, zip(*folds, strict=True)))


def test_the_manifest_alone_is_enough_to_divide(challenge, tmp_path):
    classes = ["mito", "er", "nuc"]
    with challenge.open() as rows:  # the crops must be there, but nothing in them is read
        for row in csv.DictReader(rows):
            crop = tmp_path / row["dataset"] / f"{row['dataset']}.zarr" / GT / f"crop{row['crop_name']}"
            crop.mkdir(parents=True, exist_ok=True)
    crops = split(search_path=tmp_path, manifest=challenge, split="stratified", val_fraction=0.2, classes=classes)
    assert {usage: len(entries) for usage, entries in crops.entries.items()} == {"train": 222, "val": 55}
    first = crops.entries["train"][0]
    assert first.input_path == f"{tmp_path}/jrc_cos7-1a/jrc_cos7-1a.zarr/{RAW}"
    assert first.target_path == f"{tmp_path}/jrc_cos7-1a/jrc_cos7-1a.zarr/{GT}/crop234/[mito,er,nuc]"
    # How many voxels there are only the volumes themselves would say.
    assert crops.table().splitlines()[1].split()[0::2] == ["mito", "-", "-"]
    crops.write_csv(tmp_path / "split.csv")
    again = split(tmp_path / "split.csv", classes=classes)
    assert [e.target_path for e in again.entries["val"]] == [e.target_path for e in crops.entries["val"]]


def test_a_csv_that_was_written_keeps_the_weights(volume, tmp_path):
    entries = [
        {"raw": volume.raw_path, "gt": f"{volume.label_path(crop, '[mito]')}"} | weight
        for crop, weight in zip(volume.crops[:3], ({"weight": 2.5}, {}, {"weight": 0}), strict=True)
    ]
    crops = split(None, classes=["mito"], datasets={"train": entries[:2], "val": entries[2:]})
    crops.write_csv(tmp_path / "split.csv")
    again = split(tmp_path / "split.csv", classes=["mito"])
    assert [e.weight for e in again.entries["train"]] == [2.5, None]
    assert [e.weight for e in again.entries["val"]] == [0]
