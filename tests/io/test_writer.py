"""Multiscale groups: what is written is what zarr, tensorstore and the OME-NGFF models read."""

import json

import numpy as np
import ome_zarr_models.v04.image
import ome_zarr_models.v05.image
import pytest
import zarr

from cellmap_lightning.errors import CellMapError, CellMapFileExistsError, CellMapTypeError, CellMapValueError
from cellmap_lightning.io.downsampling import downsample_mean
from cellmap_lightning.io.writer import ArrayOptions, ImageDescription, write_group, write_multiscale


def open_group(path):
    return zarr.open_group(str(path), mode="r", use_consolidated=False)


def multiscale(path):
    attributes = open_group(path).attrs.asdict()
    return attributes.get("ome", attributes)["multiscales"][0]


def transforms(path):
    return [
        tuple(np.array(t[t["type"]]) for t in dataset["coordinateTransformations"])
        for dataset in multiscale(path)["datasets"]
    ]


@pytest.fixture
def raw():
    return np.random.default_rng(0).integers(0, 256, (18, 20, 23), dtype=np.uint8)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("compressor", ["zstd", "lz4", "gzip", None])
def test_voxels_come_back(tmp_path, raw, zarr_format, compressor):
    path = tmp_path / "em"
    write_multiscale(
        path,
        raw,
        scale=(5.24, 4, 4),
        translation=(0, 0, 0),
        levels=3,
        storage=ArrayOptions(zarr_format=zarr_format, chunks=(8, 8, 8), compressor=compressor),
    )
    group = open_group(path)
    expected = raw
    for level in range(3):
        array = group[f"s{level}"]
        np.testing.assert_array_equal(array[:], expected)
        assert array.chunks == (8, 8, 8)
        assert array.metadata.zarr_format == zarr_format
        expected = downsample_mean(expected)


def test_the_two_formats_on_disk(tmp_path, raw):
    for zarr_format in (2, 3):
        write_multiscale(
            tmp_path / str(zarr_format),
            raw,
            scale=(5.24, 4, 4),
            translation=(0, 0, 0),
            levels=2,
            storage=ArrayOptions(
                zarr_format=zarr_format, chunks=(8, 8, 8), shards=(16, 16, 16) if zarr_format == 3 else None
            ),
            attributes={"note": 1},
        )
    v2, v3 = tmp_path / "2", tmp_path / "3"
    about = json.loads((v2 / "s0/.zarray").read_text())
    assert about["dimension_separator"] == "/"
    assert about["compressor"]["id"] == "blosc"
    assert about["compressor"]["cname"] == "zstd"
    assert (v2 / "s0/0/0/0").is_file()
    assert json.loads((v2 / ".zattrs").read_text())["note"] == 1
    about = json.loads((v3 / "s0/zarr.json").read_text())
    assert about["dimension_names"] == ["z", "y", "x"]
    assert about["codecs"][0]["name"] == "sharding_indexed"
    attributes = json.loads((v3 / "zarr.json").read_text())["attributes"]
    assert set(attributes) == {"ome", "note"}
    assert attributes["ome"]["version"] == "0.5"
    np.testing.assert_array_equal(open_group(v3)["s0"][:], raw)
    assert open_group(v3)["s0"].shards == (16, 16, 16)
    names = {p.name for p in tmp_path.rglob("*")}
    assert ".zmetadata" not in names
    assert "consolidated_metadata" not in json.loads((v3 / "zarr.json").read_text())


def test_other_programs_accept_both(tmp_path, raw):
    for zarr_format in (2, 3):
        write_multiscale(
            tmp_path / str(zarr_format),
            raw,
            scale=(5.24, 4, 4),
            translation=(1, 2, 3),
            levels=2,
            storage=ArrayOptions(zarr_format=zarr_format),
        )
    old = ome_zarr_models.v04.image.Image.from_zarr(open_group(tmp_path / "2"))
    new = ome_zarr_models.v05.image.Image.from_zarr(open_group(tmp_path / "3"))
    assert [d.path for d in old.attributes.multiscales[0].datasets] == ["s0", "s1"]
    assert [d.path for d in new.attributes.ome.multiscales[0].datasets] == ["s0", "s1"]

    tensorstore = pytest.importorskip("tensorstore")
    for driver, folder in (("zarr", "2"), ("zarr3", "3")):
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(tmp_path / folder / "s0") + "/"}}
        np.testing.assert_array_equal(tensorstore.open(spec, read=True).result().read().result(), raw)


@pytest.mark.parametrize("factors", [(2, 2, 2), (1, 2, 2)])
def test_every_level_covers_the_same_box(tmp_path, factors):
    scale, translation, shape = np.array([2.62, 2, 2]), np.array([3132.21, 899, 25863]), np.array([16, 24, 32])
    write_multiscale(
        tmp_path / "a", np.zeros(shape, np.uint8), scale=scale, translation=translation, levels=3, factors=factors
    )
    for level, (s, t) in enumerate(transforms(tmp_path / "a")):
        power = np.array(factors) ** level
        np.testing.assert_allclose(s, scale * power, rtol=1e-12)
        n = open_group(tmp_path / "a")[f"s{level}"].shape
        np.testing.assert_allclose(t - s / 2, translation - scale / 2, atol=1e-9)
        np.testing.assert_allclose(t + (np.array(n) - 0.5) * s, translation + (shape - 0.5) * scale, atol=1e-9)
    about = multiscale(tmp_path / "a")
    assert "coordinateTransformations" not in about, "levels say where they are; an identity on top is redundant"
    assert about["axes"][0] == {"name": "z", "type": "space", "unit": "nanometer"}
    assert about["version"] == "0.4"
    assert about["name"] == "a"


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    ("shape", "axes", "levels"), [((8, 8, 8), ("z", "y", "x"), 2), ((9, 7), ("y", "x"), 3), ((4, 4, 4, 4), "tzyx", 1)]
)
def test_only_levels_have_transformations(tmp_path, zarr_format, shape, axes, levels):
    scale, zero = [2.0] * len(axes), [0.0] * len(axes)
    write_multiscale(
        tmp_path / "a", np.zeros(shape, np.uint8), scale=scale, translation=zero, levels=levels,
        description=ImageDescription(axes=tuple(axes)),
        factors=[2] * len(axes), storage=ArrayOptions(chunks=shape, zarr_format=zarr_format),
    )  # fmt: skip
    image = multiscale(tmp_path / "a")
    assert set(image) == {"name", "axes", "datasets"} | ({"version"} if zarr_format == 2 else set())
    assert [[t["type"] for t in d["coordinateTransformations"]] for d in image["datasets"]] == (
        [["scale", "translation"]] * levels
    )


def test_a_ramp_of_positions_stays_a_ramp_of_positions(tmp_path):
    """Every voxel holds the x of its centre; if translation meant the corner, the levels would disagree."""
    scale, translation = (2.0, 2.0, 2.0), (5.0, 7.0, 11.0)
    x = np.broadcast_to(11 + 2.0 * np.arange(32), (8, 8, 32)).astype(np.float64)
    write_multiscale(tmp_path / "a", x, scale=scale, translation=translation, levels=3)
    for level, (s, t) in enumerate(transforms(tmp_path / "a")):
        values = open_group(tmp_path / "a")[f"s{level}"][0, 0]
        np.testing.assert_allclose(values, t[2] + s[2] * np.arange(len(values)), rtol=1e-12)


def test_a_ragged_last_plane_is_dropped(tmp_path):
    label = np.zeros((4, 4, 5), np.uint8)
    label[..., 4] = 9
    write_multiscale(tmp_path / "a", label, scale=(1, 1, 1), translation=(0, 0, 0), levels=2, mode="mode")
    assert open_group(tmp_path / "a")["s1"].shape == (2, 2, 2)
    assert not open_group(tmp_path / "a")["s1"][:].any()


def test_attributes_of_arrays(tmp_path, raw):
    for zarr_format in (2, 3):
        path = tmp_path / str(zarr_format)
        write_multiscale(
            path,
            raw,
            scale=(1, 1, 1),
            translation=(0, 0, 0),
            levels=2,
            storage=ArrayOptions(zarr_format=zarr_format),
            array_attributes=lambda level, array: {"level": level, "sum": int(array.sum())},
        )
        for level in range(2):
            array = open_group(path)[f"s{level}"]
            assert array.attrs.asdict() == {"level": level, "sum": int(array[:].sum())}


def test_nothing_is_replaced_unasked(tmp_path, raw):
    kwargs = {"scale": (1, 1, 1), "translation": (0, 0, 0)}
    write_multiscale(tmp_path / "a", raw, levels=2, **kwargs)
    with pytest.raises(CellMapFileExistsError) as caught:
        write_multiscale(tmp_path / "a", raw, **kwargs)
    assert isinstance(caught.value, CellMapError)
    assert isinstance(caught.value, FileExistsError)
    write_multiscale(tmp_path / "a", raw[::-1], overwrite=True, **kwargs)
    np.testing.assert_array_equal(open_group(tmp_path / "a")["s0"][:], raw[::-1])
    assert not (tmp_path / "a/s1").exists()

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(CellMapFileExistsError, match="not removed"):
            write_multiscale(tmp_path / name, raw, overwrite=True, **kwargs)
    assert (tmp_path / "thesis/chapter1.tex").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": (1, 1)},
        {"scale": (1, 0, 1)},
        {"translation": (0, 0, float("nan"))},
        {"levels": 0},
        {"levels": 6},
        {"mode": "median"},
        {"description": ImageDescription(axes=("y", "x"))},
        {"description": ImageDescription(axes=("z", "x", "x"))},
        {"storage": ArrayOptions(chunks=(8, 8))},
        {"storage": ArrayOptions(zarr_format=3, chunks=(8, 8), shards=(16, 16))},
        {"attributes": {"multiscales": []}},
    ],
    ids=str,
)
def test_contradictions_leave_nothing_behind(tmp_path, raw, wrong):
    with pytest.raises(CellMapValueError):
        write_multiscale(tmp_path / "a", raw, **{"scale": (1, 1, 1), "translation": (0, 0, 0), **wrong})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"zarr_format": 4}, r"zarr_format must be one of 2, 3, got 4"),
        ({"shards": (64, 64, 64)}, r"shards need zarr_format=3: Zarr v2 has no sharding"),
        (
            {"zarr_format": 3, "chunks": (8, 8, 8), "shards": (12, 8, 8)},
            r"shards \(12, 8, 8\) must be multiples of chunks",
        ),
        ({"zarr_format": 3, "chunks": (8, 8, 8), "shards": (8, 8)}, r"shards \(8, 8\) must be multiples of chunks"),
        ({"zarr_format": 3, "shards": (64, 0, 64)}, r"shards \(64, 0, 64\) must be multiples of chunks"),
        ({"chunks": (0, 8, 8)}, r"chunks \(0, 8, 8\) must be positive"),
        ({"compressor": "zip"}, r"compressor must be one of zstd, lz4, gzip, None, got 'zip'"),
    ],
    ids=str,
)
def test_contradictions_of_the_storage(wrong, match):
    with pytest.raises(CellMapValueError, match=match):
        ArrayOptions(**wrong)


@pytest.mark.parametrize(
    ("flat", "match"),
    [
        (
            {"chunks": (8, 8, 8)},
            r"^write_multiscale: .* 'chunks'; use storage=ArrayOptions\(chunks=\.\.\.\)",
        ),
        ({"zarr_format": 3}, r"use storage=ArrayOptions\(zarr_format=\.\.\.\)"),
        ({"axes": "zyx"}, r"use description=ImageDescription\(axes=\.\.\.\)"),
        ({"level": 2}, r"no argument 'level'; did you mean 'levels'\?"),
    ],
)
def test_flat_options_name_their_dataclass(tmp_path, raw, flat, match):
    with pytest.raises(CellMapTypeError, match=match):
        write_multiscale(tmp_path / "a", raw, scale=(1, 1, 1), translation=(0, 0, 0), **flat)
    assert not (tmp_path / "a").exists()


def test_name_and_unit_of_the_image(tmp_path, raw):
    description = ImageDescription(name="em", unit="micrometer")
    write_multiscale(tmp_path / "a", raw, scale=(1, 1, 1), translation=(0, 0, 0), description=description)
    about = multiscale(tmp_path / "a")
    assert about["name"] == "em"
    assert {axis["unit"] for axis in about["axes"]} == {"micrometer"}


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_groups_are_made_once_and_their_attributes_merged(tmp_path, zarr_format):
    write_group(tmp_path / "g", {"a": 1, "b": 1}, zarr_format)
    write_group(tmp_path / "g", {"b": 2}, zarr_format)
    write_group(tmp_path / "g", zarr_format=zarr_format)
    assert open_group(tmp_path / "g").attrs.asdict() == {"a": 1, "b": 2}
    with pytest.raises(CellMapFileExistsError):
        write_group(tmp_path / "g", zarr_format=5 - zarr_format)
    zarr.create_array(str(tmp_path / "array"), shape=(1,), dtype="u1", zarr_format=zarr_format)
    (tmp_path / "file").write_text("")
    for name in ("array", "file"):
        with pytest.raises(CellMapFileExistsError):
            write_group(tmp_path / name, zarr_format=zarr_format)


def test_an_interrupted_write_is_no_multiscale(tmp_path, raw):
    def stop(level, array):
        if level:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        write_multiscale(tmp_path / "a", raw, scale=(1, 1, 1), translation=(0, 0, 0), levels=2, array_attributes=stop)
    assert "multiscales" not in open_group(tmp_path / "a").attrs
    write_multiscale(tmp_path / "a", raw, scale=(1, 1, 1), translation=(0, 0, 0), overwrite=True)
