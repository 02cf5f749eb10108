"""Warnings of ``cellmap-convert`` and ``cellmap-segment`` about empty sections that cut objects of a mask."""

import numpy as np
import pytest

from cellmap_lightning.commands.segment import segment
from cellmap_lightning.conversion import empty_sections
from cellmap_lightning.conversion.convert import convert
from cellmap_lightning.conversion.options import ConversionOptions
from cellmap_lightning.crops.section_gaps import unknown_setting

WHERE = "cellmap_lightning.conversion.empty_sections"


def mask(*empty, value=255):
    """An object through all of 12 sections but the empty ones."""
    voxels = np.zeros((12, 32, 32), np.uint8)
    voxels[:, 8:20, 8:20] = value
    voxels[list(empty)] = 0
    return voxels


@pytest.fixture
def converted(tmp_path, caplog):
    """A function that converts a mask, and returns its path and the warnings."""

    def convert_mask(voxels, classes=None, translation=(0, 0, 0)):
        np.save(tmp_path / "mask.npy", voxels)
        settings = {"voxel_size": [50, 8, 8], "translation": list(translation), "workers": 1, "overwrite": True}
        caplog.clear()
        out = convert(
            ConversionOptions(
                input=str(tmp_path / "mask.npy"), output=str(tmp_path / "crop1"), classes=classes or {255: "mito"},
                **settings,
            )
        )  # fmt: skip
        return out, [r.getMessage() for r in caplog.records if r.name == WHERE and r.levelname == "WARNING"]

    return convert_mask


@pytest.mark.parametrize(
    ("empty", "translation", "sections"),
    [
        ((5,), (0, 0, 0), "5 (z 225..275 nm)"),
        ((1, 7, 10), (400, 0, 0), "1 (z 425..475 nm), 7 (z 725..775 nm), 10 (z 875..925 nm)"),
        ((4, 5, 6), (0, 80, 0), "4 to 6 (z 175..325 nm)"),
    ],
)
def test_empty_sections_are_one_line_with_the_remedy(converted, empty, translation, sections):
    out, (text,) = converted(mask(*empty), translation=translation)
    assert text.startswith(f"{out}: no voxel of mito in section {sections}, counted from 0")
    assert "fill them with 128" in text
    assert "'classes={255:mito,128:unknown}' overwrite=True" in text
    assert "\n" not in text


@pytest.mark.parametrize("ends", [(), (0,), (0, 1, 11)])
def test_masks_without_a_gap_have_no_warning(converted, ends):
    assert converted(mask(*ends))[1] == []


@pytest.mark.parametrize("empty", [(5,), (1, 7), (3, 4)])
def test_the_remedy_makes_the_warning_go(converted, empty):
    voxels = mask(*empty)
    voxels[list(empty)] = 128
    assert converted(voxels, {255: "mito", 128: "unknown"})[1] == []


@pytest.mark.parametrize(
    ("second", "lines"), [((5,), ["mito, er in section 5"]), ((), ["mito in section 5"]), ((8,), ["mito", "er"])]
)
def test_classes_with_the_same_empty_sections_share_a_line(converted, second, lines):
    voxels = mask(5, value=1)
    voxels[:, 22:30, 22:30] = 2
    voxels[list(second), 22:30, 22:30] = 0
    texts = converted(voxels, {1: "mito", 2: "er"})[1]
    assert len(texts) == len(lines)
    assert all(f"no voxel of {line}" in text for text, line in zip(texts, lines, strict=True))


@pytest.mark.parametrize(
    ("label_map", "expected"),
    [
        ({255: "mito"}, (128, "'classes={255:mito,128:unknown}'")),
        ({1: "mito", 128: "er"}, (255, "'classes={1:mito,128:er,255:unknown}'")),
        ({1: "mito", 7: "unknown"}, (7, "'classes={1:mito,7:unknown}'")),
    ],
)
def test_the_proposed_value_is_free(label_map, expected):
    assert unknown_setting(label_map) == expected


@pytest.mark.parametrize("empty", [(5,), (4, 5), (2, 8)])
def test_segmenting_an_annotation_names_them(converted, tmp_path, caplog, empty):
    out, _ = converted(mask(*empty))
    caplog.clear()
    segment(str(out), tmp_path / "objects.zarr", "mito", method="components", picture=False)
    (text,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert text.startswith(f"{out / 'mito'}: no voxel of mito in section {empty[0]} ")
    assert "'classes={255:mito,128:unknown}'" in text


def test_masks_too_wide_to_hold_are_reported(converted, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("cellmap_lightning.crops.section_gaps._MOST_VOXELS", 12 * 32 * 32 - 1)
    assert converted(mask(5))[1] == []
    assert "not searched for empty sections; cellmap-inspect deep=true does" in caplog.text
    assert empty_sections.log.name == WHERE
