"""Target paths: brackets of classes, and brackets in names of folders."""

import shutil

import pytest

from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.splits.entries import read_csv
from tests.foreign import SEMANTIC as KIND
from tests.foreign import annotated, cube, sample, write_pair


@pytest.mark.parametrize(
    ("path", "before", "names", "after"),
    [
        ("/d/v.zarr/crop1/[mito,er]", "/d/v.zarr/crop1", ("mito", "er"), ""),
        ("/d/v.zarr/crop1/[mito, er]/labels", "/d/v.zarr/crop1", ("mito", "er"), "labels"),
        ("/d/v.zarr/crop1/mito", "/d/v.zarr/crop1", ("mito",), ""),
        ("/d/[2024] mito/v.zarr/crop1/[er]", "/d/[2024] mito/v.zarr/crop1", ("er",), ""),
        ("/d/[2024] mito/v.zarr/crop1/er", "/d/[2024] mito/v.zarr/crop1", ("er",), ""),
        ("/d/[2024]/v.zarr/crop1/er", "/d/[2024]/v.zarr/crop1", ("er",), ""),
        ("/d/[a,b]/v.zarr/crop1/[er,pm]", "/d/[a,b]/v.zarr/crop1", ("er", "pm"), ""),
        ("/d/x]y[/v.zarr/crop1/[er]/s", "/d/x]y[/v.zarr/crop1", ("er",), "s"),
        ("/d/[x] v.zarr/crop [1]/[er]", "/d/[x] v.zarr/crop [1]", ("er",), ""),
        ("/d/v.zarr/[crop1]/[er]", "/d/v.zarr/[crop1]", ("er",), ""),
        ("/d/crop [1]/[er]", "/d/crop [1]", ("er",), ""),
        ("[er]", "", ("er",), ""),
        ("zip://crop1/[er,pm]::/data/[1] v.zip", "zip://crop1::/data/[1] v.zip", ("er", "pm"), ""),
        ("zip://crop1/er::/data/v.zip", "zip://crop1::/data/v.zip", ("er",), ""),
        ("s3://b/[x] y/v.zarr/crop1/[er]/l", "s3://b/[x] y/v.zarr/crop1", ("er",), "l"),
    ],
)
def test_where_the_classes_stand(path, before, names, after):
    target = TargetPath.parse(path)
    assert (target.before, target.names, target.after) == (before, names, after)
    assert TargetPath.parse(str(target)) == target


@pytest.mark.parametrize("path", ["/d/crop1/[mito", "/d/crop1/mito]", "/d/crop1/x[mito]", "/d/[2024]/crop1/[a][b]"])
def test_malformed_brackets_are_refused(path):
    with pytest.raises(CellMapValueError, match="one bracket that is the last part of the path"):
        TargetPath.parse(path)


@pytest.mark.parametrize(
    ("bracket", "message"),
    [
        ("[]", r"the bracket is empty; name the classes in it"),
        ("[ , ]", r"the bracket is empty; name the classes in it"),
        ("[mito,,er]", r"name 2 of 3 in the bracket \[mito,,er\] is empty"),
        ("[mito, er, ]", r"name 3 of 3 in the bracket \[mito, er, \] is empty; remove"),
        ("[mito,er,mito]", r"names 'mito' twice; each class should be named once"),
    ],
)
def test_brackets_with_empty_or_repeated_names_are_refused(bracket, message):
    with pytest.raises(CellMapValueError, match=message):
        TargetPath.parse(f"/d/crop1/{bracket}")


@pytest.mark.parametrize("folder", ["[2024] mito", "[mito]", "a[b"])
def test_folders_with_brackets_are_read(tmp_path, folder):
    raw, target = write_pair(tmp_path / folder, cube(), attributes=annotated(KIND))
    assert sample(raw, target)["labels"].sum() == 16**3
    assert sample(raw, target.replace("/[mito]", "/mito") if "/[mito]/" not in target else target)["labels"].any()
    csv = tmp_path / folder / "crops.csv"
    csv.write_text(f'train,v.zarr/em,"v.zarr/crop1/[mito]"\nval,{raw},{target}\n')
    entries = [entry for of_split in read_csv(csv).values() for entry in of_split]
    assert [entry.target.names for entry in entries] == [("mito",)] * 2
    shutil.copytree(tmp_path / folder / "v.zarr" / "crop1" / "mito", tmp_path / folder / "v.zarr" / "crop1" / "er")
    bad = tmp_path / folder / "bad.csv"
    bad.write_text("train,v.zarr/em,v.zarr/crop1/[mito,er]\n")
    with pytest.raises(CellMapValueError, match="needs quotes"):
        read_csv(bad)


@pytest.mark.parametrize("target", ["gone", "/nowhere/mito", "../crop2/mito"])
def test_a_class_behind_a_dead_link_is_named_with_the_link(tmp_path, target):
    (tmp_path / "crop1" / "er").mkdir(parents=True)
    (tmp_path / "crop1" / "mito").symlink_to(target)
    path = TargetPath.parse(f"{tmp_path}/crop1/[er,mito]")
    assert path.existing("er") == tmp_path / "crop1" / "er"
    with pytest.raises(CellMapFileNotFoundError) as caught:
        path.existing("mito")
    link = f"{tmp_path}/crop1/mito is a symbolic link to {target}, which does not exist; restore it, or correct the"
    assert f"class 'mito' cannot be read: {link}" in str(caught.value)
