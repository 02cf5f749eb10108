"""Versions of the metadata of images, arrays that are not images, and several images in a group."""

import json
import logging
import zipfile

import numpy as np
import pytest
import zarr

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.errors import CellMapError, CellMapKeyError, CellMapValueError, MetadataError
from cellmap_lightning.io.ngff import Overrides, read_multiscale
from cellmap_lightning.io.ngff.notes import volume_of
from cellmap_lightning.io.store import parse_location
from tests.foreign import (
    cube,
    dataset,
    edit,
    ramp,
    write_group,
    write_image,
    write_pair,
)
from tests.io.test_multiscale_metadata import FORMATS, change_image, image_file, opened, warnings_of


def early_cosem(image):
    image.pop("axes")
    image.pop("version")
    for level in image["datasets"]:
        level.pop("coordinateTransformations")
        level["transform"] = {"axes": ["z", "y", "x"], "scale": [8] * 3, "translate": [0] * 3, "units": ["nm"] * 3}


def version_1(image):
    image.update(version="0.1")
    image.pop("axes")
    image["datasets"][0].pop("coordinateTransformations")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (version_1, "OME-NGFF 0.1"),
        (lambda image: image.update(version="0.2", axes=None), "OME-NGFF 0.2"),
        (lambda image: image.update(version="0.3", axes=["z", "y", "x"]), "OME-NGFF 0.3"),
        (lambda image: image.update(version="0.7"), "OME-NGFF 0.7"),
        (lambda image: image.update(version="0.7.dev1", axes=None), "OME-NGFF 0.7.dev1"),
        (lambda image: image.update(version="1.0"), "OME-NGFF 1.0"),
        (early_cosem, "early COSEM metadata"),
        (lambda image: [image.pop("axes"), image.pop("version")], "OME-NGFF 0.1 or 0.2"),
        (lambda image: [image.update(axes=["z", "y", "x"]), image.pop("version")], "OME-NGFF 0.3"),
    ],
)
def test_versions_that_are_not_read_are_named(tmp_path, change, text):
    path = write_image(tmp_path / "v", ramp())
    change_image(path, change)
    with pytest.raises(MetadataError, match=rf"v/\.zattrs: its metadata are {text}.*0\.4, 0\.5 and 0\.6 are read"):
        read_multiscale(path)


def test_version_0_7_in_zarr_3(tmp_path):
    path = write_image(tmp_path / "v", ramp(), zarr_format=3)
    edit(path / "zarr.json", lambda c: c["attributes"]["ome"].update(version="0.7"))
    with pytest.raises(MetadataError, match=r"OME-NGFF 0\.7; 0\.4, 0\.5 and 0\.6 are read"):
        read_multiscale(path)


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_a_level_instead_of_its_image(tmp_path, zarr_format):
    path = write_image(tmp_path / "v.zarr" / "em", ramp(), zarr_format=zarr_format)
    with pytest.raises(MetadataError, match=r"em/s0 is one level of the image .*/em; give its parent"):
        read_multiscale(path / "s0")
    raw, target = write_pair(tmp_path / "b", cube(), zarr_format=zarr_format)
    with pytest.raises(CellMapError, match="give its parent"):
        dataset(raw + "/s0", target)
    with pytest.raises(CellMapError, match="give its parent"):
        dataset(raw, f"{target}/s0")


def test_a_level_further_down(tmp_path):
    path = write_image(tmp_path / "v.zarr" / "em", {"a/s0": ramp()}, levels={"a/s0": ([8] * 3, None)})
    with pytest.raises(MetadataError, match=r"em/a/s0 is one level of the image .*/em; give its parent, .*/em$"):
        read_multiscale(path / "a" / "s0")


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize(
    ("attributes", "corner"),
    [
        ({"resolution": [8, 4, 4], "offset": [80, 40, 40]}, (80, 40, 40)),
        ({"resolution": [8, 4, 4]}, (0, 0, 0)),
        ({"voxel_size": [8, 4, 4], "offset": [0, 0, 0]}, (0, 0, 0)),
        ({}, None),
    ],
)
def test_plain_arrays(tmp_path, attributes, corner, zarr_format):
    """As funlib and gunpowder write them, with the corner of voxel 0; the settings replace both."""
    array = zarr.create_array(
        f"{tmp_path}/v.zarr/raw", shape=(32, 32, 32), chunks=(16,) * 3, dtype="u1", zarr_format=zarr_format,
        attributes=attributes,
    )  # fmt: skip
    array[...] = ramp()
    if corner is None:
        with pytest.raises(MetadataError, match=r"without OME-NGFF metadata, .* set voxel_size=\[z, y, x\] in nm"):
            read_multiscale(f"{tmp_path}/v.zarr/raw")
    else:
        lattice = read_multiscale(f"{tmp_path}/v.zarr/raw").finest.lattice
        assert (lattice.step, lattice.box.lower) == ((8, 4, 4), corner)
    image = opened(f"{tmp_path}/v.zarr/raw", (8, 4, 4), (32,) * 3, voxel_size=[8, 4, 4], translation=[84, 42, 42])
    assert image.bounding_box["z"] == [80, 80 + 256]
    center = {a: sum(sides) / 2 for a, sides in image.bounding_box.items()}
    assert np.array_equal(image[center].numpy(), ramp())


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_several_images_in_a_group(tmp_path, caplog, zarr_format):
    path = write_image(tmp_path / "v", {"s0": ramp(), "t0": 255 - ramp()}, zarr_format=zarr_format)

    def several(content):
        block = content if zarr_format == 2 else content["attributes"]["ome"]
        first = block["multiscales"][0]
        other = json.loads(json.dumps(first))
        first["name"], other["name"], other["datasets"][0]["path"] = "raw", "inverse", "t0"
        block["multiscales"].append(other)

    edit(image_file(path, zarr_format), several)
    with caplog.at_level(logging.WARNING):
        assert opened(path).level.name == "s0"
    (line,) = warnings_of(caplog)
    assert "lists 2 images (raw, inverse); the first one is read; set multiscale=<name>" in line
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert opened(path, multiscale="inverse").level.name == "t0"
        assert opened(path, multiscale="raw").level.name == "s0"
    assert not warnings_of(caplog)
    with pytest.raises(MetadataError, match="lists no image 'x'; it lists raw, inverse"):
        opened(path, multiscale="x")


def other_place(image):
    image["datasets"][0]["coordinateTransformations"][1]["translation"] = [64, 0, 0]


def other_scale(image):
    image["datasets"][0]["coordinateTransformations"][0]["scale"] = [8, 8, 4]


def other_unit(image):
    image["axes"][2]["unit"] = "micrometer"


def moved_whole(image):
    image["coordinateTransformations"] = [{"type": "translation", "translation": [0, 8, 0]}]


def notation_alone(image):
    image.update(name="x", type="mean", coordinateTransformations=[{"type": "scale", "scale": [1, 1.0, 1]}])
    image["datasets"][0]["coordinateTransformations"][0]["scale"] = [8, 8.0, 8]


def with_both(path, zarr_format, change):
    """Add the list of images of the other version of OME-NGFF, changed."""

    def add(content):
        block = content if zarr_format == 2 else content["attributes"]
        old = zarr_format == 2
        images = json.loads(json.dumps(block["multiscales"] if old else block["ome"]["multiscales"]))
        images[0].pop("version", None)
        if not old:
            images[0]["version"] = "0.4"
        change(images[0])
        block.update({"ome": {"version": "0.5", "multiscales": images}} if old else {"multiscales": images})

    edit(image_file(path, zarr_format), add)


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize("change", [other_place, other_scale, other_unit, moved_whole, notation_alone])
def test_the_metadata_of_the_zarr_format_apply(tmp_path, caplog, change, zarr_format):
    path = write_image(tmp_path / "v", ramp(), translation=(0, 0, 0), zarr_format=zarr_format)
    with_both(path, zarr_format, change)
    with caplog.at_level(logging.WARNING):
        level = opened(path).level
    assert (level.scale, level.translation) == ((8, 8, 8), (0, 0, 0))
    lines = warnings_of(caplog)
    assert len(lines) == (change is not notation_alone)
    read = (
        "'multiscales' is read, as the group is Zarr v2"
        if zarr_format == 2
        else "'ome' is read, as the group is Zarr v3"
    )
    assert all("in 'multiscales' (OME-NGFF 0.4) and in 'ome'" in line and read in line for line in lines)


@pytest.mark.parametrize("change", [early_cosem, version_1, lambda image: image.update(axes=["z", "y", "x"])])
def test_older_metadata_give_way_in_zarr_2_too(tmp_path, caplog, change):
    path = write_image(tmp_path / "v", ramp(), translation=(0, 0, 0))
    with_both(path, 2, lambda image: None)
    change_image(path, change)
    with caplog.at_level(logging.WARNING):
        assert opened(path).level.scale == (8, 8, 8)
    assert not warnings_of(caplog)


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_the_metadata_of_the_other_format_alone_are_read(tmp_path, caplog, zarr_format):
    path = write_image(tmp_path / "v", ramp(), translation=(0, 0, 0), zarr_format=zarr_format)
    with_both(path, zarr_format, other_place)
    own = "multiscales" if zarr_format == 2 else "ome"
    edit(
        image_file(path, zarr_format),
        lambda content: (content if zarr_format == 2 else content["attributes"]).pop(own) and None,
    )
    with caplog.at_level(logging.WARNING):
        assert opened(path).level.translation == (64, 0, 0)
    assert not warnings_of(caplog)


def test_an_image_below_is_suggested(tmp_path):
    write_group(tmp_path / "v.zarr", {"bioformats2raw.layout": 3})
    write_image(tmp_path / "v.zarr" / "0", ramp())
    with pytest.raises(MetadataError, match="did you mean one of the images below it: 0"):
        read_multiscale(tmp_path / "v.zarr")


@pytest.mark.parametrize(
    ("place", "volume"),
    [
        ("/data/a.zarr/recon-1/em", "/data/a.zarr"),
        ("/data/b.n5/em", "/data/b.n5"),
        ("/data/c/em", "/data/c/em"),
        ("s3://bucket/x/a.zarr/em", "s3://bucket/x/a.zarr"),
        ("zip://em::/data/a.zip", "/data/a.zip"),
    ],
)
def test_the_volume_of_an_image(place, volume):
    assert volume_of(parse_location(place)) == volume


def test_zip_archives_are_volumes(tmp_path, caplog):
    path = write_image(tmp_path / "em", ramp(), unit=None)
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        for file in path.rglob("*"):
            archive.write(file, f"em/{file.relative_to(path)}")
    with caplog.at_level(logging.WARNING):
        opened(f"zip://em::{tmp_path}/v.zip")
    (line,) = warnings_of(caplog)
    assert line.startswith(f"{tmp_path}/v.zip: no unit")


def test_keys_of_entries(tmp_path):
    raw, target = write_pair(tmp_path, cube())
    with pytest.raises(CellMapKeyError, match=r"has no 'voxelsize'; did you mean 'voxel_size'"):
        CellMapDataModule(["mito"], {"shape": [8] * 3, "scale": [8] * 3}, datasets={
            "train": [{"raw": raw, "gt": target, "voxelsize": [8] * 3}]
        })  # fmt: skip
    with pytest.raises(CellMapValueError):
        CellMapDataModule(["mito"], {"shape": [8] * 3, "scale": [8] * 3}, datasets={}, level_translations="no")


@pytest.mark.parametrize("key", ["_ARRAY_DIMENSIONS", "axis_names", "axes", "dimension_names"])
@pytest.mark.parametrize("names", ["xyz", "zyx", "yxz"])
def test_plain_arrays_with_named_axes(tmp_path, key, names):
    data = ramp((10, 12, 14))
    stored = data.transpose(["zyx".index(name) for name in names])
    options = {"dimension_names": list(names)} if key == "dimension_names" else {"attributes": {key: list(names)}}
    zarr_format = 3 if key == "dimension_names" else 2
    array = zarr.create_array(
        f"{tmp_path}/raw", shape=stored.shape, dtype="u1", chunks=(8, 8, 8), zarr_format=zarr_format, **options
    )
    array[...] = stored
    image = opened(tmp_path / "raw", (8, 8, 8), data.shape, voxel_size=[8, 8, 8])
    center = {a: sum(sides) / 2 for a, sides in image.bounding_box.items()}
    assert np.array_equal(image[center].numpy(), data)


def test_plain_arrays_of_other_axes_are_refused(tmp_path):
    zarr.create_array(
        f"{tmp_path}/raw", shape=(8, 8, 8), dtype="u1", zarr_format=2, attributes={"_ARRAY_DIMENSIONS": ["t", "y", "x"]}
    )
    with pytest.raises(MetadataError, match="the axes z, y and x are needed once each"):
        opened(tmp_path / "raw", voxel_size=[8, 8, 8])


@pytest.mark.parametrize("unit", ["lightyear", 3])
def test_a_voxel_size_makes_any_unit_good(tmp_path, unit):
    path = write_image(tmp_path / "v", ramp(), unit=unit)
    assert read_multiscale(path, Overrides.parse(voxel_size=[8, 8, 8])).finest.scale == (8, 8, 8)
