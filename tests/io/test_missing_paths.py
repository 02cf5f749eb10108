"""Names that were probably meant, in messages about files and folders that do not exist."""

import subprocess
import sys
import unicodedata

import pytest

from cellmap_lightning.errors import CellMapFileNotFoundError
from cellmap_lightning.evaluation.challenge import class_names
from cellmap_lightning.export.bioimageio import PackageOptions
from cellmap_lightning.export.model_card import read_card
from cellmap_lightning.instances.tuned import read_tuned
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.missing_paths import missing, similar_path
from cellmap_lightning.splits.entries import read_csv
from cellmap_lightning.splits.manifests import manifest_rows
from cellmap_lightning.training.checkpoints import read_checkpoint
from cellmap_lightning.transforms.histogram import measure_quantiles
from cellmap_lightning.transforms.implied import read_table
from cellmap_lightning.visualization.figures.metrics import Metrics


@pytest.fixture
def folder(tmp_path):
    for name in ("crops.csv", "raw.tif", "best.ckpt", "tuned.yaml", "notes.txt", ".hidden.csv", "zarr.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / "runs" / "mito").mkdir(parents=True)
    (tmp_path / "runs" / "mito" / "split.csv").write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("crop.csv", "crops.csv"), ("Crops.CSV", "crops.csv"), ("crops.cvs", "crops.csv"), ("raw.tiff", "raw.tif"),
        ("RAW.TIF", "raw.tif"), ("bset.ckpt", "best.ckpt"), ("tune.yml", "tuned.yaml"), ("run", "runs"),
    ],
)  # fmt: skip
def test_files_and_folders_are_suggested(folder, name, meant):
    assert similar_path(folder / name) == f" (did you mean '{meant}'?)"
    text = str(missing(folder / name, "the file"))
    assert text == f"the file {folder / name} does not exist: {folder} has no '{name}'; did you mean '{meant}'?"


@pytest.mark.parametrize("name", ["mito.csv", "labels.tif", "last.ckpt", "hidden.csv", "zarr.jso"])
def test_a_suffix_alone_makes_no_names_similar(folder, name):
    """Nor are hidden files suggested, nor metadata."""
    assert similar_path(folder / name) == ""
    listed = "best.ckpt, crops.csv, notes.txt, raw.tif, runs, tuned.yaml"
    assert str(missing(folder / name, "it")).endswith(f"{folder} has no '{name}'; it has {listed}")


@pytest.mark.parametrize("inside", ["split.csv", "a/b/split.csv"])
def test_a_folder_above_is_suggested(folder, inside):
    text = similar_path(folder / "runs" / "mitos" / inside)
    assert text == f" ({folder / 'runs'} has no 'mitos'; did you mean 'mito'?)"


def test_the_working_directory_has_a_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(CellMapFileNotFoundError) as caught:
        read_csv("crop.csv")
    assert str(caught.value) == (
        "the CSV of crops crop.csv does not exist: the working directory has no 'crop.csv'; did you mean 'crops.csv'?"
    )
    assert similar_path("crop.csv") == " (did you mean 'crops.csv'?)"


#: What reads a file, and the name of the file.
READERS = {
    "csv": (read_csv, "crops.csv"),
    "csv in a file": (lambda path: read_csv(path / "x.csv"), "crops.csv"),
    "manifest": (manifest_rows, "test_crop_manifest.csv"),
    "checkpoint": (lambda path: read_checkpoint(path, "ckpt"), "best.ckpt"),
    "card": (lambda path: read_card(path, "ckpt"), "cellmap.yaml"),
    "tuned": (read_tuned, "tuned.yaml"),
    "cover": (lambda path: PackageOptions(cover=str(path)), "cover.png"),
    "metrics": (Metrics, "metrics.csv"),
    "class table": (read_table, "classes.csv"),
    "list of classes": (class_names, "tested_classes.csv"),
    "image": (read_image, "raw.tif"),
    "quantiles": (measure_quantiles, "raw.tif"),
}


@pytest.mark.parametrize("reader", READERS)
def test_each_kind_of_file_is_suggested(tmp_path, reader):
    read, name = READERS[reader]
    (tmp_path / name).write_text("x")
    wrong = tmp_path / (name[0] + name[1:].replace(name[2], "", 1))
    assert not wrong.exists()
    with pytest.raises(CellMapFileNotFoundError, match=rf"did you mean '{name}'\?"):
        read(wrong)


@pytest.mark.parametrize(
    ("command", "arguments", "meant"),
    [
        ("convert", ["input=raw.tiff", "output=o.zarr"], "raw.tif"),
        ("convert", ["input=Raw.tif", "output=o.zarr"], "raw.tif"),
    ],
)
def test_commands_suggest_files(folder, command, arguments, meant):
    code = f"from cellmap_lightning.commands.{command}_command import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert f"did you mean '{meant}'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("stored", "given"), [("NFD", "NFC"), ("NFC", "NFD")])
@pytest.mark.parametrize("name", ["zelle_\u00e4.zarr", "\u00e9chantillon", "\u30ac"])
def test_names_in_another_unicode_form(tmp_path, stored, given, name):
    """As macOS wrote them: both look alike, so that a suggestion would repeat the name."""
    (tmp_path / unicodedata.normalize(stored, name)).mkdir()
    path = tmp_path / unicodedata.normalize(given, name)
    expected = f"differs in its Unicode form ({stored}): rename it, or copy the name from the folder"
    for text in (str(missing(path / "em", "image")), similar_path(path)):
        assert expected in text
        assert "did you mean" not in text
