"""Metadata as the specifications allow it, and one by one every way in which it may be wrong."""

import json

import numpy as np
import ome_zarr_models.v04
import ome_zarr_models.v05
import pytest
import zarr

from cellmap_lightning.errors import CellMapError, CellMapFileNotFoundError, CellMapValueError, MetadataError
from cellmap_lightning.io.ngff import Encoding, read_array, read_encoding, read_multiscale

VERSIONS = ["0.4", "0.5"]
DATA = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)


def two_levels():
    return {"s0": (DATA, (5.24, 4, 4), (10, 20, 30)), "s1": (DATA[::2, ::2, ::2], (10.48, 8, 8), (12.62, 22, 32))}


@pytest.mark.parametrize("version", VERSIONS)
def test_both_versions_say_the_same(write, version):
    image = read_multiscale(write(two_levels(), version=version))
    assert [level.name for level in image.levels] == ["s0", "s1"]
    fine, coarse = (level.lattice for level in image.levels)
    assert (fine.step, fine.origin, fine.shape) == ((5.24, 4, 4), (10, 20, 30), (4, 5, 6))
    assert (coarse.step, coarse.origin, coarse.shape) == ((10.48, 8, 8), (12.62, 22, 32), (2, 3, 3))
    np.testing.assert_allclose(fine.box.lower, (10 - 2.62, 18, 28))
    np.testing.assert_allclose(fine.box.upper, (10 + 3.5 * 5.24, 38, 52))
    assert image.finest.info.zarr_format == (3 if version == "0.5" else 2)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("axes", ["xyz", "czyx", "tczyx", "zyxc", "tyczx"])
def test_any_order_of_axes_and_single_channels(write, version, axes):
    shape = {"z": 4, "y": 5, "x": 6, "c": 1, "t": 1}
    scale, offset = {"z": 5.24, "y": 3, "x": 2, "c": 7, "t": 9}, {"z": 10, "y": 20, "x": 30, "c": 1, "t": 2}
    data = np.zeros([shape[a] for a in axes], np.uint8)
    image = read_multiscale(
        write({"s0": (data, [scale[a] for a in axes], [offset[a] for a in axes])}, version=version, axes=axes)
    )
    lattice = image.finest.lattice
    assert (lattice.step, lattice.origin, lattice.shape) == ((5.24, 3, 2), (10, 20, 30), (4, 5, 6))


@pytest.mark.parametrize("axes", ["czyx", "zyxt"])
def test_more_than_one_channel_is_refused(write, axes):
    shape = [2 if a in "ct" else 4 for a in axes]
    path = write({"s0": (np.zeros(shape, np.uint8), [1] * 4, None)}, axes=axes)
    with pytest.raises(MetadataError, match=r"s0.*non-spatial axis longer than 1"):
        _ = read_multiscale(path).finest


@pytest.mark.parametrize(("unit", "factor"), [("micrometer", 1000), ("angstrom", 0.1), ("nanometer", 1), ("µm", 1000)])
def test_units_are_converted(write, unit, factor):
    lattice = read_multiscale(write(two_levels(), unit=unit)).finest.lattice
    np.testing.assert_allclose(lattice.step, np.multiply((5.24, 4, 4), factor))
    np.testing.assert_allclose(lattice.origin, np.multiply((10, 20, 30), factor))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_images_own_transformations_come_after_the_levels(write, version):
    common = [{"type": "scale", "scale": [2, 3, 4]}, {"type": "translation", "translation": [100, 200, 300]}]
    lattice = read_multiscale(write(two_levels(), version=version, common=common)).finest.lattice
    assert lattice.step == pytest.approx((10.48, 12, 16))
    assert lattice.origin == (120, 260, 420)
    same = read_multiscale(write(two_levels(), version=version, common=[{"type": "scale", "scale": [1, 1, 1]}]))
    assert same.finest.lattice.origin == (10, 20, 30)


def test_without_a_translation_voxel_0_is_at_the_origin(write):
    assert read_multiscale(write({"s0": (DATA, (4, 4, 4), None)})).finest.lattice.origin == (0, 0, 0)


def steps(value, kind="scale"):
    return lambda image: image["datasets"][0].update(coordinateTransformations=[{"type": kind, kind: value}])


def scaled_and(value):
    return lambda image: image["datasets"][0].update(
        coordinateTransformations=[{"type": "scale", "scale": [1, 1, 1]}, {"type": "translation", "translation": value}]
    )


WRONG = {
    "no datasets": (lambda image: image.pop("datasets"), "datasets"),
    "empty datasets": (lambda image: image.update(datasets=[]), "datasets"),
    "datasets not a list": (lambda image: image.update(datasets={"path": "s0"}), "datasets"),
    "dataset not an object": (lambda image: image.update(datasets=["s0"]), "path"),
    "no path": (lambda image: image["datasets"][0].pop("path"), "path"),
    "path not a string": (lambda image: image["datasets"][0].update(path=3), "path"),
    "empty path": (lambda image: image["datasets"][0].update(path=""), "path"),
    "path leads out": (lambda image: image["datasets"][0].update(path="../image/s0"), r"\.\./image/s0"),
    "path leads out later": (lambda image: image["datasets"][0].update(path="s0/../../x"), "path"),
    "path is absolute": (lambda image: image["datasets"][0].update(path="/s0"), "path"),
    "no transformations": (lambda image: image["datasets"][0].pop("coordinateTransformations"), "no scale"),
    "no scale": (steps([1, 2, 3], "translation"), "no scale"),
    "transformations not a list": (
        lambda image: image["datasets"][0].update(coordinateTransformations={"type": "scale"}), "should be a list"),
    "transformations a number": (lambda image: image.update(coordinateTransformations=7), "should be a list"),
    "transformation not an object": (
        lambda image: image["datasets"][0]["coordinateTransformations"].append("scale"), "scale or translation"),
    "scale too short": (steps([4, 4]), "3 numbers"),
    "scale too long": (steps([4, 4, 4, 4]), "3 numbers"),
    "scale zero": (steps([4, 0, 4]), "positive"),
    "scale negative": (steps([4, -4, 4]), "positive"),
    "scale NaN": (steps([4, float("nan"), 4]), "3 numbers"),
    "scale infinite": (steps([4, float("inf"), 4]), "3 numbers"),
    "scale of text": (steps(["4", "4", "4"]), "3 numbers"),
    "scale of booleans": (steps([True, True, True]), "3 numbers"),
    "scale null": (steps(None), "3 numbers"),
    "scale a number": (steps(4), "3 numbers"),
    "translation too short": (scaled_and([1, 2]), "3 numbers"),
    "translation NaN": (scaled_and([1, 2, float("nan")]), "3 numbers"),
    "scale in a file": (
        lambda image: image["datasets"][0].update(coordinateTransformations=[{"type": "scale", "path": "there"}]),
        "3 numbers"),
    "unknown transformation": (
        lambda image: image["datasets"][0]["coordinateTransformations"].append({"type": "rotation", "rotation": []}),
        "scale or translation"),
    "image scale wrong": (
        lambda image: image.update(coordinateTransformations=[{"type": "scale", "scale": [1]}]), "3 numbers"),
    "coarse level first": (lambda image: image["datasets"].reverse(), "finest first"),
    "no axes": (lambda image: image.pop("axes"), "axes"),
    "axes of version 0.3": (lambda image: image.update(axes=["z", "y", "x"]), "axes"),
    "axis without a name": (lambda image: image["axes"][0].pop("name"), "axes"),
    "axis missing": (lambda image: image["axes"].pop(0), "z, y and x"),
    "axis twice": (lambda image: image["axes"][0].update(name="y"), "once each"),
    "unknown unit": (lambda image: image["axes"][0].update(unit="lightyear"), "lightyear"),
    "unit a list": (lambda image: image["axes"][0].update(unit=["nanometer"]), "unit"),
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_image_is_refused_with_the_file_named(write, edit, what, version):
    change, words = WRONG[what]
    path = write(two_levels(), version=version)
    file = path / ("zarr.json" if version == "0.5" else ".zattrs")
    edit(file, lambda c: change((c["attributes"]["ome"] if version == "0.5" else c)["multiscales"][0]))
    with pytest.raises(MetadataError, match=words) as caught:
        read_multiscale(path)
    assert str(file) in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[" * 100_000, b"[1]", b'"multiscales"', b"null"])
def test_bad_json_is_refused_with_the_file_named(write, content):
    path = write(two_levels())
    for file in (path / "s0" / ".zarray", path / ".zattrs"):
        file.write_bytes(content)
        with pytest.raises(MetadataError, match="JSON") as caught:
            _ = read_multiscale(path).finest
        assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "attributes", [{}, {"multiscales": None}, {"multiscales": []}, {"multiscales": ["s0"]}, {"ome": 3}]
)
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_group_without_an_image_lists_its_contents(tmp_path, attributes, zarr_format):
    group = zarr.open_group(tmp_path / "g", mode="w", zarr_format=zarr_format)
    group.attrs.update(attributes)
    group.create_group("em")
    with pytest.raises(MetadataError, match=r"no OME-NGFF multiscale image .*it holds em") as caught:
        read_multiscale(tmp_path / "g")
    assert str(tmp_path / "g") in str(caught.value)


def test_attributes_that_are_no_object(write, edit):
    path = write(two_levels(), version="0.5")
    edit(path / "s0" / "zarr.json", lambda c: c.update(attributes=[1]))
    with pytest.raises(MetadataError, match="attributes should be an object"):
        _ = read_multiscale(path).finest
    edit(path / "zarr.json", lambda c: c.update(attributes=[1]))
    with pytest.raises(MetadataError, match="attributes should be an object"):
        read_multiscale(path)


ARRAY_WRONG = {
    "shape": [None, "4", [4, 5], [4, 5, 0], [4, 5, -6], [4, 5, 6.5], [4, 5, 6, 7]],
    "chunks": [None, [4, 5], [0, 5, 6]],
    "dtype": [None, "|O", "<U5", "<M8[ns]", "<c8", [["a", "|u1"]], "wrong", {}],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in ARRAY_WRONG.items() for v in values])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_wrong_array_is_refused_with_the_file_named(write, edit, key, value, version):
    path = write(two_levels(), version=version)
    file = path / "s0" / ("zarr.json" if version == "0.5" else ".zarray")

    def change(content):
        if version == "0.4" or key == "shape":
            content[key] = value
        elif key == "chunks":
            content["chunk_grid"]["configuration"]["chunk_shape"] = value
        else:
            content["data_type"] = value

    edit(file, change)
    with pytest.raises(MetadataError) as caught:
        _ = read_multiscale(path).finest
    assert str(path / "s0") in str(caught.value)


def test_a_grid_of_irregular_chunks_is_refused(write, edit):
    path = write(two_levels(), version="0.5")
    edit(path / "s0" / "zarr.json", lambda c: c.update(chunk_grid={"name": "rectangular"}))
    with pytest.raises(MetadataError, match="regular chunk grid"):
        _ = read_multiscale(path).finest


@pytest.mark.parametrize("version", VERSIONS)
def test_a_level_that_is_not_on_disk(write, version):
    path = write({"s0": (None, (4, 4, 4), None), "s1": (DATA, (8, 8, 8), (2, 2, 2))}, version=version)
    image = read_multiscale(path)
    assert image.finest.name == "s1"
    with pytest.raises(CellMapFileNotFoundError, match=r"'s0' is listed in .*image but .*s0 does not exist"):
        _ = image.levels[0].lattice
    path = write({"s0": (None, (4, 4, 4), None)}, version=version, name="empty")
    with pytest.raises(CellMapFileNotFoundError, match="none of its levels is on disk"):
        _ = read_multiscale(path).finest


def test_a_typo_is_answered_with_what_is_there(write):
    path = write(two_levels(), name="fibsem-uint8")
    with pytest.raises(CellMapFileNotFoundError, match=r"has no 'fibsem-unit8'; did you mean 'fibsem-uint8'\?"):
        read_multiscale(path.parent / "fibsem-unit8")
    with pytest.raises(CellMapFileNotFoundError, match="it has fibsem-uint8"):
        read_multiscale(path.parent / "quite" / "another")
    with pytest.raises(FileNotFoundError):
        read_multiscale(path.parent / "fibsem-unit8")


def test_addresses_are_refused_and_file_addresses_are_paths(write):
    path = write(two_levels())
    assert read_multiscale(f"file://{path}").path == path
    with pytest.raises(CellMapValueError, match="s3://"):
        read_multiscale("s3://bucket/image")


def test_an_array_has_its_inner_chunks(tmp_path):
    array = zarr.create_array(
        tmp_path / "a", shape=(8, 8, 8), chunks=(2, 4, 4), shards=(4, 8, 8), dtype=">u2", zarr_format=3
    )
    assert array.shards == (4, 8, 8)
    info = read_array(tmp_path / "a")
    assert (info.chunks, info.dtype, info.zarr_format) == ((2, 4, 4), np.uint16, 3)
    assert read_array(tmp_path) is None


SEMANTIC = {"type": "semantic_segmentation", "encoding": {"absent": 0, "present": 1, "unknown": 255}}
INSTANCE = {"type": "instance_segmentation", "encoding": {"absent": 0, "unknown": 255}}


def encoding(write, edit, group=None, array=None):
    path = write(two_levels(), attributes={"cellmap": group} if group is not None else None)
    if array is not None:
        (path / "s0" / ".zattrs").write_text(json.dumps({"cellmap": array}))
    image = read_multiscale(path)
    both = [read_encoding(image, level) for level in image.levels]
    assert both[0] == both[1], "a level without attributes has its finest level's"
    return both[0]


def test_encodings(write, edit):
    def block(kind, **more):
        return {"annotation": {"class_name": "mito", "annotation_type": kind, **more}}

    assert encoding(write, edit, block(SEMANTIC)) == Encoding(0, 255)
    assert encoding(write, edit, array=block(SEMANTIC)) == Encoding(0, 255)
    assert encoding(write, edit, block(INSTANCE)) == Encoding(0, 255, ambiguous=True)
    assert encoding(write, edit, array=block(INSTANCE, complement_counts={"absent": 5, "unknown": 0})) == Encoding(
        0, None
    )
    assert encoding(write, edit, array=block(INSTANCE, complement_counts={"absent": 5, "unknown": 9})) == Encoding(
        0, 255
    )
    # The count of the finest array says so of the class, wherever the type stands.
    assert encoding(write, edit, block(INSTANCE), {"annotation": {"complement_counts": {"unknown": 0}}}) == Encoding(
        0, None
    )
    # In a semantic segmentation 255 is no instance.
    assert encoding(write, edit, array=block(SEMANTIC, complement_counts={"absent": 5, "unknown": 0})) == Encoding(
        0, 255
    )
    other = {"type": "semantic_segmentation", "encoding": {"absent": 7, "unknown": None}}
    assert encoding(write, edit, block(other)) == Encoding(7, None)
    assert encoding(write, edit, block(SEMANTIC), block(other)) == Encoding(7, None), "the array's own comes first"


@pytest.mark.parametrize(
    "group", [None, 3, {"annotation": 3}, {"annotation": {}}, {"annotation": {"annotation_type": 3}}]
)
def test_without_an_encoding_the_metadata_decide_nothing(write, edit, group):
    assert encoding(write, edit, group, group) is None


@pytest.mark.parametrize(
    "codes",
    [
        {},
        {"absent": None},
        {"absent": "no"},
        {"absent": 0.5},
        {"absent": 0, "unknown": 2.5},
        {"absent": float("nan")},
        {"absent": 0, "unknown": float("inf")},
        7,
        [0, 255],
    ],
)
def test_a_wrong_encoding_is_refused(write, edit, codes):
    kind = {"type": "semantic_segmentation", "encoding": codes}
    with pytest.raises(MetadataError, match=r"image: the annotation's encoding needs whole numbers"):
        encoding(write, edit, {"annotation": {"annotation_type": kind}})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("axes", ["zyx", "czyx", "tczyx"])
@pytest.mark.parametrize("common", [None, [{"type": "scale", "scale": None}]])
def test_metadata_accepted_by_ome_zarr_models_is_accepted(write, version, axes, common):
    extra = len(axes) - 3
    data = DATA.reshape([1] * extra + [4, 5, 6])
    if common:
        common = [{"type": "scale", "scale": [1.0] * len(axes)}]
    levels = {
        "s0": (data, [1] * extra + [5.24, 4, 4], [0] * extra + [10, 20, 30]),
        "s1": (data[..., ::2, ::2, ::2], [1] * extra + [10.48, 8, 8], [0] * extra + [12.62, 22, 32]),
    }
    path = write(levels, version=version, axes=axes, common=common)
    oracle = ome_zarr_models.v05.Image if version == "0.5" else ome_zarr_models.v04.Image
    group = oracle.from_zarr(zarr.open_group(path, mode="r"))
    image = read_multiscale(path)
    listed = group.ome_attributes.multiscales[0].datasets
    assert [d.path for d in listed] == [level.name for level in image.levels]
    assert image.finest.lattice.step == (5.24, 4, 4)
    assert image.finest.lattice.origin == (10, 20, 30)


@pytest.mark.parametrize("version", VERSIONS)
def test_metadata_written_by_ome_zarr_models_is_read(tmp_path, version):
    from pydantic_zarr import v2, v3

    module, arrays = (ome_zarr_models.v05, v3) if version == "0.5" else (ome_zarr_models.v04, v2)
    more = {"dimension_names": ("z", "y", "x")} if version == "0.5" else {}
    spec = arrays.ArraySpec.from_array(np.zeros((4, 5, 6), np.uint8), **more)
    image = module.Image.new(
        array_specs=[spec],
        paths=["scale0"],
        axes=[module.axes.Axis(name=a, type="space", unit="micrometer") for a in "zyx"],
        scales=[[0.00524, 0.004, 0.004]],
        translations=[[1, 2, 3]],
        global_scale=[2, 2, 2],
    )
    image.to_zarr(zarr.storage.LocalStore(tmp_path / "image"), path="")
    lattice = read_multiscale(tmp_path / "image").finest.lattice
    assert lattice.step == pytest.approx((10.48, 8, 8))
    assert lattice.origin == pytest.approx((2000, 4000, 6000))
    assert lattice.shape == (4, 5, 6)


def test_every_error_is_of_one_family():
    assert issubclass(MetadataError, CellMapError)
    assert issubclass(CellMapFileNotFoundError, CellMapError)
