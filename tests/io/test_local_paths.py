"""Dead links, environment variables, home folders and archives in paths: an error with the path and the remedy."""

import re
import zipfile

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapError, CellMapValueError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.local_paths import expanded
from cellmap_lightning.io.missing_paths import similar_path
from cellmap_lightning.io.store import children, local_path, parse_location
from tests.foreign import write_image

VOXELS = np.zeros((4, 8, 8), np.uint8)


def message(path):
    with pytest.raises(CellMapError) as caught:
        read_image(str(path))
    return str(caught.value)


@pytest.mark.parametrize("inside", ["", "em", "em/s0", "recon-1/em/fibsem"])
@pytest.mark.parametrize("name", ["dead.zarr", "dead.h5", "dead.n5"])
def test_a_dead_link_is_named(tmp_path, name, inside):
    (tmp_path / name).symlink_to(tmp_path / "gone")
    link = f"{tmp_path / name} is a symbolic link to {tmp_path / 'gone'}, which does not exist; restore it, or correct"
    assert link in message(tmp_path / name / inside)
    assert link in similar_path(tmp_path / name / inside)


@pytest.mark.parametrize("inside", ["", "em", "em/s0"])
def test_links_that_lead_back_to_themselves(tmp_path, inside):
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    assert "a link on its path leads back to itself; correct the link" in message(tmp_path / "one" / inside)


@pytest.mark.parametrize("target", ["gone", "/nowhere/mito", "../crop2/mito"])
def test_a_class_whose_link_is_dead_is_a_child(tmp_path, target):
    write_image(tmp_path / "er", VOXELS)
    (tmp_path / "mito").symlink_to(target)
    (tmp_path / "notes.txt").symlink_to(target)
    (tmp_path / "file").write_text("x")
    assert children(tmp_path) == ["er", "mito"]
    assert f"is a symbolic link to {target}, which does not exist" in message(tmp_path / "mito")


@pytest.mark.parametrize("name", ["$DATA/v.zarr/em", "${DATA}/v.zarr", "{}/$DATA/v.zarr", "{}/sub/${DATA}_2/v.zarr"])
@pytest.mark.parametrize("value", [None, "/data"])
def test_variables_are_not_expanded(tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("DATA", value)
    path = name.replace("{}", str(tmp_path))
    unset = "" if value else " (and has no value here)"
    words = f"{path}: $DATA is not expanded in paths{unset}; write the folder itself, or ${{oc.env:DATA}} in a"
    for read in (parse_location, local_path, expanded):
        with pytest.raises(CellMapValueError, match=re.escape(words)):
            read(path)
    with pytest.raises(CellMapValueError, match=r"\$DATA is not expanded"):
        parse_location(f"zip://em::{path}.zip")


@pytest.mark.parametrize("folder", ["$DATA", "${DATA}", "a$DATA", "$", "$1.50"])
def test_a_folder_with_a_dollar_sign_in_its_name(tmp_path, folder):
    write_image(tmp_path / folder / "v.zarr" / "em", VOXELS)
    assert read_image(str(tmp_path / folder / "v.zarr" / "em")).finest.lattice.shape == VOXELS.shape


@pytest.mark.parametrize("form", ["~/v.zarr/em", "file://~/v.zarr/em", "zip://v.zarr/em::~/z.zip"])
def test_the_home_folder(tmp_path, monkeypatch, form):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_image(tmp_path / "v.zarr" / "em", VOXELS)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for file in sorted((tmp_path / "v.zarr").rglob("*")):
            archive.write(file, file.relative_to(tmp_path))
    assert read_image(form).finest.lattice.shape == VOXELS.shape


@pytest.mark.parametrize(
    "form", ["~no-such-user-1/v.zarr", "zip://em::~no-such-user-1/z.zip", "file://~no-such-user-1/v"]
)
def test_the_home_folder_of_another_user(form):
    with pytest.raises(CellMapValueError, match="~no-such-user-1 is the home folder of no user of this machine; write"):
        parse_location(form)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("zip://em::{}/z.zip", "z.zip has no 'em'; did you mean zip://z.zarr/em::{}/z.zip?"),
        ("zip://recon-1/em::{}/z.zip", "did you mean zip://z.zarr/recon-1/em::{}/z.zip?"),
        ("{}/z.zip/z.zarr/em", "{}/z.zip is an archive; give zip://z.zarr/em::{}/z.zip"),
        ("{}/z.zip", "it is an archive: give zip://<path in it>::{}/z.zip"),
        ("zip://z.zarr::{}/z.zip", "did you mean one of the images below it: em"),
        ("zip://::{}/z.zip", "it holds z.zarr: give the path of an image in it"),
    ],
)
def test_an_archive_that_holds_a_folder(tmp_path, path, words):
    write_image(tmp_path / "z.zarr" / "em", VOXELS)
    write_image(tmp_path / "z.zarr" / "recon-1" / "em", VOXELS)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for file in sorted((tmp_path / "z.zarr").rglob("*")):
            archive.write(file, file.relative_to(tmp_path))
    assert words.replace("{}", str(tmp_path)) in message(path.replace("{}", str(tmp_path)))
    assert read_image(f"zip://z.zarr/em::{tmp_path}/z.zip").finest.lattice.shape == VOXELS.shape
