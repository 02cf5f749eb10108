"""Soft and external links of HDF5 files: the right voxels, or an error with the link and the remedy."""

import h5py
import numpy as np
import pytest

from cellmap_lightning.errors import CellMapError, CellMapFileNotFoundError
from cellmap_lightning.io.formats.registry import format_children
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.readers import open_reader

VOXELS = np.random.default_rng(0).integers(0, 255, (4, 6, 8)).astype(np.uint8)
LINKS = {
    "soft": h5py.SoftLink("/volumes/raw"),
    "group": h5py.SoftLink("/volumes"),
    "twice": h5py.SoftLink("soft"),
    "volumes/beside": h5py.SoftLink("raw"),
    "dangling": h5py.SoftLink("/volumes/nothing"),
    "lost/inside": h5py.SoftLink("/dangling"),
    "one": h5py.SoftLink("/two"),
    "two": h5py.SoftLink("/one"),
    "self": h5py.SoftLink("self"),
    "external": h5py.ExternalLink("other.h5", "/raw"),
    "outside": h5py.ExternalLink("other.h5", "/"),
    "missing": h5py.ExternalLink("missing.h5", "/raw"),
    "back": h5py.ExternalLink("other.h5", "/back"),
}


@pytest.fixture
def file(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["raw"] = VOXELS
        other["raw"].attrs["resolution"] = [8, 8, 8]
        other["back"] = h5py.ExternalLink("v.h5", "/back")
    with h5py.File(tmp_path / "v.h5", "w") as stored:
        stored["volumes/raw"] = VOXELS
        stored["volumes/raw"].attrs["resolution"] = [8, 8, 8]
        for name, link in LINKS.items():
            stored[name] = link
    return tmp_path / "v.h5"


@pytest.mark.parametrize("name", ["volumes/raw", "soft", "group/raw", "twice", "volumes/beside", "group/beside", ""])
def test_soft_links_are_followed(file, name):
    level = read_image(str(file / name)).finest
    np.testing.assert_array_equal(open_reader(level).read((0, 0, 0), level.lattice.shape), VOXELS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dangling", "dangling is a soft link to /volumes/nothing, and the file has no 'volumes/nothing'; correct the"),
        ("lost/inside", "dangling is a soft link to /volumes/nothing, and the file has no"),
        ("dangling/raw", "dangling is a soft link to /volumes/nothing, and the file has no"),
        ("one", "is a soft link to /one, and the links lead back to themselves; correct one of them"),
        ("self", "self is a soft link to self, and the links lead back to themselves"),
        (
            "external",
            "external is an external link to /raw in {}/other.h5; external links are not followed: give {}/other",
        ),
        ("outside/raw", "links are not followed: give {}/other.h5/raw"),
        ("missing", "missing is an external link to /raw in {}/missing.h5, which does not exist; restore the file"),
        ("back", "back is an external link to /back in {}/other.h5; external links are not followed"),
    ],
)
def test_other_links_are_named(file, name, words):
    with pytest.raises(CellMapError) as caught:
        read_image(str(file / name))
    assert words.replace("{}", str(file.parent)) in str(caught.value)


def test_the_target_of_an_external_link_has_a_way_out(file):
    assert read_image(str(file.parent / "other.h5" / "raw")).finest.lattice.shape == VOXELS.shape
    with pytest.raises(CellMapError, match=r"back is an external link to /back in .*v\.h5"):
        read_image(str(file.parent / "other.h5" / "back"))


def test_links_are_children_so_that_no_class_is_lost_in_silence(file):
    assert set(format_children(file)) == {name.partition("/")[0] for name in LINKS} | {"volumes"}
    assert format_children(file / "group") == ["beside", "raw"]
    assert format_children(file / "dangling") == []


def test_a_name_that_is_no_link_is_answered_with_what_is_there(file):
    with pytest.raises(CellMapFileNotFoundError, match=r"has no dataset 'volumes/row'.*volumes/raw"):
        read_image(str(file / "volumes" / "row"))
