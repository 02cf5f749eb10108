"""Metadata of images as other programs write them: units, overrides, and placement of levels."""

import logging
import shutil

import numpy as np
import pytest

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.crops.image import CellMapImage
from cellmap_lightning.errors import CellMapError, MetadataError
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.io.ngff import Overrides, read_multiscale, shared_metadata
from cellmap_lightning.io.ngff.axes import unit_nm
from tests.foreign import (
    SEMANTIC,
    annotated,
    cube,
    dataset,
    edit,
    ramp,
    sample,
    write_image,
    write_pair,
)

FORMATS = [2, 3]


def image_file(path, zarr_format=2):
    return path / (".zattrs" if zarr_format == 2 else "zarr.json")


def change_image(path, change, zarr_format=2):
    """Change an entry of ``multiscales`` in place."""

    def within(content):
        block = content if zarr_format == 2 else content["attributes"]["ome"]
        change(block["multiscales"][0])

    edit(image_file(path, zarr_format), within)


def steps_of(image, level=0):
    return image["datasets"][level]["coordinateTransformations"]


def warnings_of(caplog):
    return [r.message for r in caplog.records if r.levelno == logging.WARNING and "ngff.notes" in r.name]


def opened(path, scale=(8, 8, 8), shape=(8, 8, 8), **options):
    return CellMapImage(
        str(path), "raw", scale, shape, pad=True, max_upsampling=1e12, overrides=Overrides.parse(**options)
    )


# ------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize(
    ("unit", "factor"),
    [
        ("nanometer", 1), ("nanometre", 1), ("nanometers", 1), ("nm", 1), ("NANOMETER", 1), (" nanometer ", 1),
        ("micrometer", 1e3), ("µm", 1e3), ("\u03bcm", 1e3), ("um", 1e3), ("micron", 1e3), ("microns", 1e3),
        ("angstrom", 0.1), ("Å", 0.1), ("\u212b", 0.1), ("A", 0.1), ("picometer", 1e-3), ("femtometer", 1e-6),
        ("millimeter", 1e6), ("centimeter", 1e7), ("meter", 1e9), ("inch", 2.54e7), ("yottameter", 1e33),
    ],
)  # fmt: skip
def test_units_and_their_spellings(tmp_path, unit, factor):
    path = write_image(tmp_path / "v", ramp(), scale=(8, 4, 2), unit=unit)
    np.testing.assert_allclose(read_multiscale(path).finest.scale, np.multiply((8, 4, 2), factor))


def test_every_length_that_ome_ngff_allows():
    """The units of space that OME-NGFF 0.4 lists, in metres as UDUNITS-2 has them."""
    metres = {
        "angstrom": 1e-10, "attometer": 1e-18, "centimeter": 1e-2, "decimeter": 1e-1, "exameter": 1e18,
        "femtometer": 1e-15, "foot": 0.3048, "gigameter": 1e9, "hectometer": 1e2, "inch": 0.0254, "kilometer": 1e3,
        "megameter": 1e6, "meter": 1, "micrometer": 1e-6, "mile": 1609.344, "millimeter": 1e-3, "nanometer": 1e-9,
        "parsec": 3.0856775814913673e16, "petameter": 1e15, "picometer": 1e-12, "terameter": 1e12, "yard": 0.9144,
        "yoctometer": 1e-24, "yottameter": 1e24, "zeptometer": 1e-21, "zettameter": 1e21,
    }  # fmt: skip
    assert {unit: unit_nm(unit) for unit in metres} == pytest.approx({u: m * 1e9 for u, m in metres.items()}, rel=1e-12)


@pytest.mark.parametrize("unit", ["second", "lightyear", "Mm", 3])
def test_units_that_are_not_lengths_are_refused(tmp_path, unit):
    path = write_image(tmp_path / "v", ramp(), unit=unit)
    with pytest.raises(MetadataError, match=r"\.zattrs: axis 'z' has the unit .*, which is not a length .* set unit="):
        read_multiscale(path)
    assert read_multiscale(path, Overrides.parse("nanometer")).finest.scale == (8, 8, 8)


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize("unit", [None, "", "pixel", "px", "voxel"])
def test_one_warning_per_volume(tmp_path, caplog, unit, zarr_format):
    """For three axes, raw, and two classes of two crops: one line."""
    for crop in ("crop1", "crop2"):
        write_pair(tmp_path, cube(), crop=crop, zarr_format=zarr_format, attributes=annotated(SEMANTIC))
        shutil.copytree(tmp_path / "v.zarr" / crop / "mito", tmp_path / "v.zarr" / crop / "er")
    for path in [tmp_path / "v.zarr" / "em", *(tmp_path / "v.zarr").glob("crop*/*")]:
        for axis in range(3):
            change_image(path, lambda image, a=axis: image["axes"][a].update(unit=unit), zarr_format)
            if unit is None:
                change_image(path, lambda image, a=axis: image["axes"][a].pop("unit"), zarr_format)
    array = {"shape": [16] * 3, "scale": [8] * 3}
    entries = [{"raw": f"{tmp_path}/v.zarr/em", "gt": f"{tmp_path}/v.zarr/crop{n}/[mito,er]"} for n in (1, 2)]
    with (
        CellMapDataModule(["mito", "er"], array, array, datasets={"train": entries}) as data,
        caplog.at_level(logging.WARNING),
    ):
        data.setup("fit")
    (line,) = warnings_of(caplog)
    assert line.startswith(f"{tmp_path}/v.zarr: no unit of length for the axes z, y, x")
    assert "nanometre is assumed; set unit=... or voxel_size=[z, y, x] in nm" in line
    text = str(inspect({"datasets": {"train": entries}}, {}, None))
    assert "images without a unit of length: 3" in text  # the raw volume, and two crops


@pytest.mark.parametrize(("axis", "others", "scale"), [(0, "micrometer", 0.008), (2, "angstrom", 80), (1, "mm", 8e-6)])
def test_an_axis_without_a_unit_has_that_of_the_others(tmp_path, caplog, axis, others, scale):
    path = write_image(tmp_path / "v", ramp(), scale=[scale] * 3, unit=others)
    change_image(path, lambda image: image["axes"][axis].pop("unit"))
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(opened(path).level.scale, [8, 8, 8])
    (line,) = warnings_of(caplog)
    assert f"no unit of length for axis {'zyx'[axis]}" in line
    assert "the unit of the other axes" in line


@pytest.mark.parametrize(
    ("scale", "unit", "text"),
    [
        ((0.0046, 0.0046, 0.0046), "nanometer", "0.0046 x 0.0046 x 0.0046 nm is implausible"),
        ((4600, 4600, 4600), "micrometer", "4.6e+06 x 4.6e+06 x 4.6e+06 nm is implausible"),
        ((1, 1, 1), "nanometer", "its voxel size is 1 x 1 x 1 (1 x 1 x 1 nm)"),
        ((1, 1, 1), "micrometer", "its voxel size is 1 x 1 x 1 (1000 x 1000 x 1000 nm)"),
        ((5000, 8, 8), "nanometer", "differs 625-fold between axes"),
    ],
)
def test_implausible_voxel_sizes(tmp_path, caplog, scale, unit, text):
    path = write_image(tmp_path / "v.zarr" / "em", ramp(), scale=scale, unit=unit)
    with caplog.at_level(logging.WARNING):
        opened(path)
    (line,) = warnings_of(caplog)
    assert text in line
    assert text in str(inspect({"datasets": {"predict": [{"raw": str(path)}]}}, {}, None))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        image = opened(path, voxel_size=[16, 8, 8])
    assert not warnings_of(caplog)
    assert image.level.scale == (16, 8, 8)


@pytest.mark.parametrize("scale", [(8, 8, 8), (50, 4, 4), (0.1, 0.1, 0.1), (1000, 500, 500), (5.24, 4, 4)])
def test_plausible_voxel_sizes_are_not_reported(tmp_path, caplog, scale):
    with caplog.at_level(logging.WARNING):
        opened(write_image(tmp_path / "v", ramp(), scale=scale))
    assert not warnings_of(caplog)


# --------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize("zarr_format", FORMATS)
def test_overrides_of_an_image(tmp_path, zarr_format):
    levels = {"s0": ([2, 1, 1], [10, 20, 30]), "s1": ([4, 2, 2], [11, 20.5, 30.5])}
    path = write_image(tmp_path / "v", {"s0": ramp(), "s1": ramp((16,) * 3)}, levels=levels, zarr_format=zarr_format)

    def placed(**overrides):
        return [
            (*level.scale, *level.translation) for level in read_multiscale(path, Overrides.parse(**overrides)).levels
        ]

    assert placed() == [(2, 1, 1, 10, 20, 30), (4, 2, 2, 11, 20.5, 30.5)]
    assert placed(unit="um")[0] == (2000, 1000, 1000, 10000, 20000, 30000)
    assert placed(voxel_size=[16, 8, 8]) == [(16, 8, 8, 80, 160, 240), (32, 16, 16, 88, 164, 244)]
    assert placed(translation=[0, 0, 0]) == [(2, 1, 1, 0, 0, 0), (4, 2, 2, 1, 0.5, 0.5)]
    assert placed(voxel_size=[16, 8, 8], translation=[1, 2, 3])[1] == (32, 16, 16, 9, 6, 7)


def test_overrides_of_an_entry(tmp_path):
    """Of raw and labels alike, or each its own; in a CSV too. The sample is that of right metadata."""
    labels = {"attributes": annotated(SEMANTIC)}
    right = sample(*write_pair(tmp_path / "a", cube(), translation=(40, 0, 0), **labels), pad=True)
    raw, target = write_pair(tmp_path / "b", cube(), scale=(0.008,) * 3, unit=None, **labels)
    own = {"voxel_size": [8, 8, 8], "translation": {"gt": [40, 0, 0]}}
    found = sample(raw, target, pad=True, **own)
    assert np.array_equal(found["labels"], right["labels"], equal_nan=True)
    assert np.array_equal(found["raw"], right["raw"])
    micro = sample(raw, target, pad=True, unit="micrometer", translation={"gt": [40, 0, 0], "raw": [0, 0, 0]})
    assert np.array_equal(micro["labels"], right["labels"], equal_nan=True)
    array = {"shape": [32] * 3, "scale": [8] * 3}
    csv = tmp_path / "crops.csv"
    csv.write_text(f'usage,raw,target,voxel_size,translation\ntrain,{raw},{target},"[8, 8, 8]","{{gt: [40, 0, 0]}}"\n')
    for given in ({"datasets": {"train": [{"raw": raw, "gt": target, **own}]}}, {"csv_path": str(csv)}):
        arrays = {"classes": ["mito"], "input_arrays": {"raw": array}, "target_arrays": {"labels": array}}
        with CellMapDataModule(**arrays, **given) as data:
            data.setup("fit")
            (crop,) = data.splits["train"].datasets
            assert crop.box.as_dict()["z"] == [36, 36 + 256]
            assert np.array_equal(np.asarray(crop[0]["labels"])[0], right["labels"], equal_nan=True)
            text = str(inspect({**given, **arrays}, {"shape": [32] * 3, "scale": [8] * 3}, None))
            assert " 36..292 " in text


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"unit": "parsecc"}, "unit must be a unit of length"),
        ({"voxel_size": [8, 8]}, "voxel_size must be three numbers in nm"),
        ({"voxel_size": [8, 8, 0]}, "voxel_size must be three positive numbers"),
        ({"translation": "x"}, "translation must be three numbers"),
        ({"multiscale": 3}, "multiscale must be the name"),
        ({"unit": {"raw": "nm", "labels": "nm"}}, "must be a value, or {raw: ..., gt: ...}, got the key 'labels'"),
        ({"level_translations": "x"}, "level_translations must be one of auto, stored, got 'x'"),
    ],
)
def test_overrides_that_are_none(tmp_path, given, text):
    raw, target = write_pair(tmp_path, cube())
    with pytest.raises(CellMapError) as caught:
        dataset(raw, target, **given)
    assert text in str(caught.value)
    if "level_translations" not in given:
        with pytest.raises(CellMapError, match=r"^.?datasets.train\[0\]: ") as caught:
            CellMapDataModule(["mito"], {"shape": [8] * 3, "scale": [8] * 3}, datasets={
                "train": [{"raw": raw, "gt": target, **given}]
            })  # fmt: skip
        assert text in str(caught.value)


def test_columns_of_a_csv(tmp_path):
    csv = tmp_path / "crops.csv"
    for header, cells, text in (
        ("usage,raw,target,unit", "parsecc", "line 2 .* unit must be a unit of length"),
        ("usage,raw,target,voxel_size", '"[8, 8"', "line 2 .* voxel_size cannot be read from '\\[8, 8'"),
        ("usage,unit,a,raw,b,target", "x", "the columns unit must be the last ones"),
    ):
        csv.write_text(f"{header}\ntrain,r,t,{cells}\n")
        with pytest.raises(CellMapError, match=f"(?s){text}"):
            CellMapDataModule(["mito"], {"shape": [8] * 3, "scale": [8] * 3}, csv_path=str(csv))


# ---------------------------------------------------------------------------------------------------- placement


def pyramid(factors, levels=4, size=(32, 48, 64)):
    """Means of blocks of a ramp along x, y and z: ``[(factor, values)]``."""
    z, y, x = np.indices(size).astype(float)
    data = 10000 * z + 100 * y + x
    found = [(np.ones(3, int), data)]
    for _ in range(levels - 1):
        factor, data = found[-1]
        fz, fy, fx = factors
        n = np.array(data.shape) // factors
        data = data[: n[0] * fz, : n[1] * fy, : n[2] * fx]
        data = data.reshape(n[0], fz, n[1], fy, n[2], fx).mean((1, 3, 5))
        found.append((factor * factors, data))
    return found


@pytest.mark.parametrize("factors", [(2, 2, 2), (1, 2, 2), (3, 3, 3), (1, 4, 4)])
@pytest.mark.parametrize("stored", ["none", "equal", "zero"])
@pytest.mark.parametrize("zarr_format", FORMATS)
def test_levels_without_translations(tmp_path, caplog, factors, stored, zarr_format):
    """Each level says which place it shows, and it is where it is."""
    made = pyramid(factors, 3)
    origin = np.array([40.0, 8.0, 4.0]) if stored == "equal" else np.zeros(3)
    translation = None if stored == "none" else origin.tolist()
    step = np.array([8.0, 4.0, 4.0])
    levels = {str(k): ((step * f).tolist(), translation) for k, (f, _) in enumerate(made)}
    arrays = {str(k): data for k, (_, data) in enumerate(made)}
    path = write_image(tmp_path / "v.zarr" / "em", arrays, levels=levels, zarr_format=zarr_format)
    with caplog.at_level(logging.WARNING):
        image = read_multiscale(path)
        for level, (_, data) in zip(image.levels, made, strict=True):
            at = np.array([1, 2, 3])
            where = np.add(level.translation, at * level.scale)
            fine = (where - origin) / step
            assert data[tuple(at)] == pytest.approx(10000 * fine[0] + 100 * fine[1] + fine[2])
        for k in range(3):
            got = opened(path, image.levels[k].scale, (2, 2, 2))
            assert got.level.name == str(k)
    (line,) = set(warnings_of(caplog))
    assert "have no separate translations" in line
    assert "level_translations=stored" in line
    assert "pyramids whose levels" in str(inspect({"datasets": {"predict": [{"raw": str(path)}]}}, {}, None))
    stored = read_multiscale(path, Overrides.parse(level_translations="stored"))
    assert {level.translation for level in stored.levels} == {tuple(origin)}


@pytest.mark.parametrize("level_translations", ["auto", "stored"])
def test_the_setting_reaches_raw_and_labels(tmp_path, level_translations):
    fine, coarse = cube(size=64), cube(size=32)
    levels = {"s0": ([4] * 3, None), "s1": ([8] * 3, None)}
    raw = {"s0": ramp((64,) * 3), "s1": ramp()}
    write_image(tmp_path / "v.zarr" / "em", raw, levels=levels)
    paths = write_pair(tmp_path, {"s0": fine, "s1": coarse}, levels=levels, attributes=annotated(SEMANTIC))
    array = {"shape": [32] * 3, "scale": [8] * 3}
    given = {"datasets": {"train": [dict(zip(("raw", "gt"), paths, strict=True))]}}
    with CellMapDataModule(["mito"], array, array, **given, level_translations=level_translations) as data:
        data.setup("fit")
        (crop,) = data.splits["train"].datasets
        (level,) = crop.levels.values()
        expected = (2.0, 2.0, 2.0) if level_translations == "auto" else (0.0, 0.0, 0.0)
        assert level.translation == expected
        assert next(iter(crop.crop.labels.stacks.values())).lattices[0].origin == expected


@pytest.mark.parametrize("ragged", ["floor", "ceil"])
@pytest.mark.parametrize("factor", [2, 3])
def test_ragged_levels_are_the_same_box(tmp_path, caplog, ragged, factor):
    size = (29, 31, 37)
    round_ = np.floor if ragged == "floor" else np.ceil
    arrays, levels = {}, {}
    for k in range(3):
        f = factor**k
        arrays[f"s{k}"] = ramp(tuple(round_(np.divide(size, f)).astype(int)))
        levels[f"s{k}"] = ([4.0 * f] * 3, [2.0 * (f - 1)] * 3)
    with caplog.at_level(logging.WARNING):
        opened(write_image(tmp_path / "v", arrays, levels=levels), (4, 4, 4))
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    "levels",
    [
        {"s0": ([4] * 3, [0] * 3), "s1": ([8] * 3, [20, 2, 2])},  # elsewhere
        {"s0": ([4] * 3, [0] * 3), "s1": ([8, 8, 16], [2, 2, 6])},  # twice as long along x
        {"s0": ([4] * 3, [0] * 3), "s1": ([8] * 3, [4, 4, 4])},  # corners for centres
    ],
)
def test_levels_that_cover_other_boxes_are_reported(tmp_path, caplog, levels):
    path = write_image(tmp_path / "v", {"s0": ramp(), "s1": ramp((16,) * 3)}, levels=levels)
    with caplog.at_level(logging.WARNING):
        opened(path, (4, 4, 4))
    (line,) = warnings_of(caplog)
    assert "level s1 covers" in line
    assert "level s0 covers" in line
    assert "pyramids whose levels cover different boxes" in str(
        inspect({"datasets": {"predict": [{"raw": str(path)}]}}, {}, None)
    )


def test_levels_that_are_placed_and_still_cover_other_boxes(tmp_path, caplog):
    """No translations, and a voxel size that the number of voxels contradicts: both are reported."""
    levels = {"s0": ([4] * 3, None), "s1": ([8, 8, 8], None)}
    path = write_image(tmp_path / "v.zarr" / "em", {"s0": ramp(), "s1": ramp((32, 16, 16))}, levels=levels)
    with caplog.at_level(logging.WARNING), shared_metadata():
        opened(path, (4, 4, 4))
    placed, different = warnings_of(caplog)
    assert "have no separate translations" in placed
    assert "level s1 covers" in different


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize("where", ["level", "image"])
@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        (["translation", "scale"], "translation, then scale"),
        (["scale", "scale"], "scale, then scale"),
        (["scale", "translation", "translation"], "scale, then translation, then translation"),
        (["scale", "translation", "scale"], "scale, then translation, then scale"),
    ],
)
def test_transformations_in_another_order(tmp_path, kinds, text, where, zarr_format):
    path = write_image(tmp_path / "v", ramp(), translation=(80, 80, 80), zarr_format=zarr_format)
    steps = [{"type": kind, kind: [8.0] * 3} for kind in kinds]

    def change(image):
        target = image["datasets"][0] if where == "level" else image
        target["coordinateTransformations"] = steps

    change_image(path, change, zarr_format)
    with pytest.raises(MetadataError, match=f"level 's0': its coordinateTransformations are {text}; OME-NGFF 0.4"):
        read_multiscale(path)


def test_an_image_may_be_moved_as_a_whole(tmp_path):
    path = write_image(tmp_path / "v", ramp(), translation=(8, 8, 8))
    change_image(
        path, lambda i: i.update(coordinateTransformations=[{"type": "translation", "translation": [16, 0, 0]}])
    )
    assert read_multiscale(path).finest.translation == (24, 8, 8)


def test_the_scale_of_other_axes_does_not_matter(tmp_path):
    path = write_image(tmp_path / "v", ramp()[None, None], levels={"s0": ([8] * 5, None)})

    def change(image):
        image["axes"] = [{"name": n, "type": t} for n, t in (("T", "time"), ("C", "channel"))] + image["axes"][2:]
        for name, axis in zip("ZYX", image["axes"][2:], strict=False):
            axis["name"] = name
        image["axes"] += [{"name": n, "type": "space", "unit": "nanometer"} for n in "ZYX"][len(image["axes"]) - 2 :]
        steps_of(image)[0]["scale"][0] = 0.0

    change_image(path, change)
    assert read_multiscale(path).finest.scale == (8, 8, 8)
