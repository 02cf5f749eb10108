"""Division of the crops of CSVs, mappings, folders and manifests."""

import csv
import logging
import shutil
from pathlib import Path

import pytest

from cellmap_lightning import CellMapDataModule, CellMapDataset, CellMapError
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.splits.manifests import find_crops, read_manifest
from tests.conftest import INPUTS, TARGETS
from tests.splits.splitting import CLASSES, GT, RAW, split


def where(crops):
    return {usage: [entry.where for entry in entries] for usage, entries in crops.entries.items()}


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


def test_a_written_csv_gives_the_same_split(folder, tmp_path, monkeypatch):
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


def test_the_same_names_are_divided_alike_in_any_folder(folder, tmp_path):
    other = tmp_path / "elsewhere"
    shutil.copytree(folder, other, symlinks=True)
    one, two = (split(search_path=root, split="stratified", val_fraction=0.3) for root in (folder, other))
    assert where(one) == where(two)


def test_settings_without_a_csv_column_are_logged(volume, tmp_path, caplog):
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
