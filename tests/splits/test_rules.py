"""Which crops validate: the rules on random crops and on real ones, and all the ways to name crops."""

import csv
import itertools
import logging
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_lightning import CellMapDataModule, CellMapDataset, CellMapError
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.geometry.lattice import Box
from cellmap_lightning.splits.manifests import find_crops, read_manifest
from cellmap_lightning.splits.rules import RULES, Crop, assign, missing_classes, together
from tests.conftest import INPUTS, TARGETS
from tests.make import make_split

GT = "recon-1/labels/groundtruth"
RAW = "recon-1/em/fibsem-uint8"
CLASSES = ["mito", "er", "nuc", "pm", "ves"]
DIVIDING = [rule for rule in RULES if rule != "csv"]


def split(csv_path=None, **kwargs):
    # Datasets here are links to one volume.
    given = {"classes": CLASSES, "input_arrays": INPUTS, "target_arrays": TARGETS, "pad": True, "leakage": "ignore"}
    return make_split(csv_path, **(given | kwargs))


def where(crops):
    return {usage: [entry.where for entry in entries] for usage, entries in crops.entries.items()}


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
        crops.append(Crop(f"{dataset}/crop{n}", dataset, classes, draw(st.sampled_from([box, None]))))
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
def test_a_split_follows_from_seed_and_names_whatever_the_order(crops, data, rule, seed, val_fraction):
    kwargs = {"seed": seed, "val_fraction": val_fraction, "n_folds": 2}
    usages = attempt(crops, rule, **kwargs)
    order = data.draw(st.permutations(range(len(crops))))
    again = attempt([crops[i] for i in order], rule, **kwargs)
    assert again == (usages if isinstance(usages, str) else [usages[i] for i in order])


@pytest.mark.parametrize("rule", DIVIDING)
def test_forty_crops_in_another_order(rule):
    """Pairs overlap: what stands for a pair must not be whichever is listed first."""
    crops = [
        Crop(
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
def test_every_class_that_two_crops_hold_is_in_val_and_what_can_stay_in_train_does(crops, rule, seed):
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
    return [Crop(f"d{n % datasets}/crop{n}", f"d{n % datasets}", frozenset(classes(n))) for n in range(count)]


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


def test_the_split_of_these_names_stays_what_it_is():
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
def test_what_cannot_be_had(kwargs, match):
    with pytest.raises(CellMapError, match=match):
        assign(apart(4), **kwargs)


def test_a_dataset_that_is_not_there_cannot_be_left_out():
    with pytest.raises(IndexError, match=r"fold must be in \[0, 3\) with .* the datasets d0, d1, d2, got 3"):
        assign(apart(4, datasets=3), "leave_one_dataset_out", fold=3)


def test_one_group_cannot_be_divided():
    box = Box((0, 0, 0), (2, 2, 2))
    with pytest.raises(ValueError, match="random needs at least 2 crops that do not overlap, got 1: d/a"):
        assign([Crop("d/a", "d", box=box), Crop("d/b", "d", box=box)], "random")


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
        Crop(f"{dataset}/{name}", dataset, frozenset(crop.classes), crop.box)
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


# -- where crops come from


@pytest.fixture
def folder(tmp_path, volume):
    """The challenge's folders: one volume in a folder of its name, one directly below the root."""
    root = tmp_path / "data"
    (root / "jrc_a").mkdir(parents=True)
    (root / "jrc_a" / "jrc_a.zarr").symlink_to(volume.path)
    (root / "jrc_b.zarr").symlink_to(volume.path)
    (root / "notes").mkdir()
    return root


def test_the_folders_of_the_challenge(folder, volume):
    found = find_crops(folder)
    assert len(found) == 2 * len(volume.crops)
    assert found[0].folder == f"{folder}/jrc_a/jrc_a.zarr/{GT}/crop1"
    assert found[-1].raw == f"{folder}/jrc_b.zarr/{RAW}"
    crops = split(search_path=str(folder), split="leave_one_dataset_out", fold=1)
    assert {d.label.split("/")[0] for d in crops["val"].datasets} == {"jrc_b"}
    assert {d.label.split("/")[0] for d in crops["train"].datasets} == {"jrc_a"}
    # The classes that are asked for, and no others.
    assert crops.entries["train"][0].target_path.endswith("/crop1/[mito,er,nuc,ves]")
    assert crops["train"].annotated_in() == {"mito": 5, "er": 4, "nuc": 3, "pm": 3, "ves": 2}


def test_parts_that_imply_a_class_are_read_too(folder):
    crops = split(search_path=folder, split="by_dataset", classes=["er"], infer=["subset"])
    # A part of er, and nuc, which shares a part with it.
    brackets = {Path(e.target_path).name for e in crops.entries["train"]}
    assert brackets == {"[er]", "[er,nuc]", "[er,er_mem,nuc]"}


def test_classes_that_are_listed_and_nowhere_present_count_for_nothing(folder):
    """nuc is annotated in crop1, and none is there."""
    for seed in range(8):
        crops = split(search_path=folder, split="random", only_datasets=["jrc_a"], seed=seed, classes=["nuc"])
        for usage in ("train", "val"):
            counts = [h.voxels["nuc"] for h in crops._division.metadata(crops.entries[usage])]
            assert max(counts) > 0


def test_the_table(folder):
    crops = split(search_path=folder, split="leave_one_dataset_out", classes=["mito", "nuc", "mito_mem"])
    rows = {line.split()[0]: line.split()[1:] for line in crops.table().splitlines()}
    assert rows["class"] == ["train", "voxels", "val", "voxels"]
    assert rows["crops"] == ["5", "5"]
    counts = split(search_path=folder, split="leave_one_dataset_out", classes=["mito", "nuc"])["train"].class_counts
    scale = 10.48 * 8 * 8 / (2.62 * 2 * 2)
    for name, held in (("mito", "5"), ("nuc", "2")):
        assert rows[name] == [held, f"{counts[name] * scale:.3g}"] * 2
    # The attributes of one of the two have been lost.
    assert rows["mito_mem"][1].startswith(">=")


def test_a_csv_and_a_mapping_are_pooled_and_the_rest_stays(volume):
    listing = split(volume.csv_path, split="kfold", n_folds=5, fold=3)
    assert len(listing.entries["val"]) == 1
    paths = {crop: f"{volume.path}/{GT}/{crop}/[mito,er]" for crop in ("crop1", "crop2", "crop3", "crop4")}
    entries = [{"raw": volume.raw_path, "gt": path} for path in paths.values()]
    mapping = {"train": entries[:1], "val": entries[1:3], "test": entries[3:], "predict": [{"raw": volume.raw_path}]}
    seen = set()
    for fold in range(3):
        crops = split(datasets=mapping, split="kfold", n_folds=3, fold=fold, classes=["mito", "er"])
        assert where(crops)["test"] == ["datasets.test[0]"]
        assert where(crops)["predict"] == ["datasets.predict[0]"]
        assert len(crops.entries["train"]) == 2
        seen.update(where(crops)["val"])
    assert seen == {"datasets.train[0]", "datasets.val[0]", "datasets.val[1]"}


def test_what_is_written_reads_as_the_same_split(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    crops = split(search_path="data", split="stratified", val_fraction=0.3)
    crops.write_csv("run/split.csv")
    again = split(tmp_path / "run" / "split.csv")
    for usage in ("train", "val"):
        assert [d.label for d in again[usage].datasets] == [d.label for d in crops[usage].datasets]
    assert again.table() == crops.table()
    with (tmp_path / "run" / "split.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["usage", "raw", "target"]
    assert all(Path(path).is_absolute() for row in rows[1:] for path in row[1:])


def test_the_same_names_are_divided_alike_wherever_they_lie(folder, tmp_path):
    other = tmp_path / "elsewhere"
    shutil.copytree(folder, other, symlinks=True)
    one, two = (split(search_path=root, split="stratified", val_fraction=0.3) for root in (folder, other))
    assert where(one) == where(two)


def test_what_a_csv_cannot_say_is_logged(volume, tmp_path, caplog):
    entry = {"raw": volume.raw_path, "gt": f"{volume.path}/{GT}/crop1/[mito]"}
    crops = split(datasets={"train": [entry, entry | {"invert": True}]}, classes=["mito"])
    with caplog.at_level(logging.WARNING):
        crops.write_csv(tmp_path / "split.csv")
    assert "has no columns for normalize and invert, which are set for datasets.train[1]" in caplog.text


def test_filters(folder):
    def kept(**kwargs):
        crops = split(search_path=folder, split="random", val_fraction=0.5, **kwargs)
        return sorted(text.removeprefix("search_path, ") for usage in where(crops).values() for text in usage)

    assert kept(only_datasets=["jrc_b"]) == [f"jrc_b/crop{n}" for n in range(1, 6)]
    assert kept(only_datasets=["*_a"], only_crops=[1, "crop2"]) == ["jrc_a/crop1", "jrc_a/crop2"]
    assert kept(only_crops=["jrc_a/crop1", "jrc_b/crop[45]"]) == ["jrc_a/crop1", "jrc_b/crop4", "jrc_b/crop5"]
    for kwargs, match in (
        ({"only_datasets": ["jrc_c"]}, "only_datasets: 'jrc_c' matches nothing; did you mean 'jrc_"),
        ({"only_crops": [7]}, "only_crops: '7' matches nothing; there are jrc_a/crop1, jrc_a/crop2"),
        ({"only_crops": []}, "only_crops is an empty list"),
        ({"only_crops": "crop1"}, "only_crops must be a list of names or patterns, got 'crop1'"),
    ):
        with pytest.raises(CellMapError, match=match):
            kept(**kwargs)


def test_filters_of_a_csv(volume):
    crops = split(volume.csv_path, only_crops=["crop[124]"])
    assert [len(crops.entries[usage]) for usage in ("train", "val")] == [2, 1]


def test_a_manifest_names_crops_of_the_folder(folder, tmp_path):
    header = "crop_name,dataset,class_label,voxel_size,translation,shape"
    box = "[2.62;2.0;2.0],[{};1.0;1.0],[10;10;10]"
    rows = [f"{n},jrc_a,{name},{box.format(50 * n)}" for n in (1, 2, 4) for name in ("mito", "er")]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join([header, *rows, f"crop3,jrc_b,mito,{box.format(0)}"]))
    crops = split(search_path=folder, manifest=manifest, split="leave_one_dataset_out", fold=1, classes=["mito", "er"])
    assert [d.label for d in crops["train"].datasets] == ["jrc_a/crop1", "jrc_a/crop2", "jrc_a/crop4"]
    assert [d.label for d in crops["val"].datasets] == ["jrc_b/crop3"]
    # The translation is the centre of voxel 0.
    assert read_manifest(manifest, folder)[0].box.as_dict()["z"] == pytest.approx([48.69, 74.89])
    for text, match in (
        ("a,b\n1,2", "needs rows with the columns crop_name, .*; it has a, b"),
        (header, "it has no rows"),
        (f"{header}\n1,jrc_a,mito,[2;2],[0;0;0],[1;1;1]", r"line 2 cannot be read: three numbers \[z;y;x\] are needed"),
    ):
        manifest.write_text(text)
        with pytest.raises(ValueError, match=match):
            split(search_path=folder, manifest=manifest, split="random")


def test_overlapping_crops_on_disk_stay_together(volume, tmp_path):
    """The same crop under two names is the plainest overlap there is."""
    root = tmp_path / "d.zarr"
    shutil.copytree(volume.path, root)
    shutil.copytree(root / GT / "crop5", root / GT / "crop6")
    shutil.copytree(root / GT / "crop5", root / GT / "crop7")
    for fold in range(5):
        crops = split(search_path=tmp_path, split="kfold", fold=fold, classes=["mito"])
        val = {text.rpartition("/")[2] for text in where(crops)["val"]}
        assert len(val & {"crop5", "crop6", "crop7"}) in (0, 3)


def test_crops_that_will_be_dropped_are_not_counted_on(folder, caplog):
    """Of what is too coarse nothing would be left to validate on."""
    fine = {"labels": {"shape": [8, 8, 8], "scale": [2.62, 1.5, 1.5]}}
    with caplog.at_level(logging.WARNING):
        crops = split(search_path=folder, split="random", target_arrays=fine)
        assert list(crops.entries) == ["train"]
    with pytest.raises(ValueError, match="none of the 10 crops for 'train' is left"):
        crops["train"]


def test_classes_that_cannot_be_on_both_sides_are_named(volume, caplog):
    crops = [("crop1", "mito,ves"), ("crop3", "mito,ecs")]
    entries = [{"raw": volume.raw_path, "gt": f"{volume.path}/{GT}/{crop}/[{names}]"} for crop, names in crops]
    with caplog.at_level(logging.WARNING):
        assert split(datasets={"train": entries}, split="random", classes=["mito", "ves", "ecs"]).has_crops("val")
    assert "split=random: no crop for train holds" in caplog.text


def test_errors_of_sources(folder, volume, tmp_path):
    with pytest.raises(TypeError, match="got csv_path and search_path"):
        split(volume.csv_path, search_path=folder)
    with pytest.raises(TypeError, match="manifest needs search_path too"):
        split(volume.csv_path, manifest="x.csv")
    with pytest.raises(ValueError, match="search_path does not define which crops validate; choose a rule"):
        split(search_path=folder)
    with pytest.raises(FileNotFoundError, match="has no 'dta'; did you mean 'data'"):
        split(search_path=tmp_path / "dta", split="random")
    with pytest.raises(FileNotFoundError, match=r"holds no crops: they are looked for in .*; it has recon-1"):
        split(search_path=folder / "jrc_b.zarr", split="random")
    with pytest.raises(FileNotFoundError, match=r"the manifest .* does not exist"):
        split(search_path=folder, manifest=tmp_path / "m.csv", split="random")
    with pytest.raises(ValueError, match=r"none of the 10 crops of .* annotates any of golgi; they annotate all,"):
        split(search_path=folder, split="random", classes=["golgi"])
    (folder / "jrc_b").mkdir()
    (folder / "jrc_b" / "jrc_b.zarr").symlink_to(volume.path)
    with pytest.raises(ValueError, match="the dataset jrc_b exists twice"):
        split(search_path=folder, split="random")
    ready = CellMapDataset(
        volume.raw_path,
        f"{volume.path}/{GT}/crop1/[mito]",
        ["mito"],
        INPUTS,
        TARGETS,
        is_train=True,
        read=ReadOptions(pad=True),
    )
    with pytest.raises(TypeError, match=r"datasets.train\[0\]: a dataset that was made with is_train=True cannot be"):
        split(datasets={"train": [ready]}, split="random", classes=["mito"]).has_crops("val")


def test_raw_alone_is_divided_by_volume(folder):
    crops = split(search_path=folder, split="by_dataset", classes=None, target_arrays=None)
    assert {usage: len(entries) for usage, entries in crops.entries.items()} == {"train": 1, "val": 1}
    with crops["val"] as val:
        assert list(val[0]) == ["raw", "idx"]


def test_the_datamodule_takes_the_same(folder):
    with CellMapDataModule(
        CLASSES,
        INPUTS,
        TARGETS,
        search_path=str(folder),
        split="leave_one_dataset_out",
        fold=1,
        only_crops=[1, 2, 4],
        leakage="ignore",
    ) as data:
        data.setup("fit")
        assert [d.label for d in data.val_dataset.datasets] == ["jrc_b/crop1", "jrc_b/crop2", "jrc_b/crop4"]
        assert "splits: train, val" in str(data)
