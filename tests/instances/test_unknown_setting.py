"""The setting ``unknown`` of cellmap-segment: the code of unannotated voxels where the metadata leave it open."""

import logging

import cc3d
import numpy as np
import pytest

from cellmap_lightning.errors import CellMapError, CellMapValueError
from cellmap_lightning.instances.options import SourceOptions
from cellmap_lightning.instances.source import open_source
from cellmap_lightning.io.writer import write_multiscale
from tests.commands.test_cli import run_forked
from tests.instances.test_unknown_voxels import TOP, annotated, attributes, declared, numbered, stored
from tests.instances.volumes import same_partition, write_prediction

TOP_ID = TOP["auto"]


def plain(folder, values, more=None):
    """Write an annotation without metadata of its encoding."""
    settings = {"scale": (8, 8, 8), "translation": (4, 4, 4), "mode": "mode"}
    write_multiscale(folder / "crop1" / "mito", values, attributes=more or {}, **settings)


@pytest.mark.parametrize("unknown", [255, {"mito": 255}, {"er": None, "*": 255}], ids=str)
@pytest.mark.parametrize("values", ["auto", "mask"])
def test_voxels_of_the_code_are_unknown(tmp_path, unknown, values):
    mask = annotated()
    plain(tmp_path, mask)
    labels = stored(numbered(tmp_path, source=SourceOptions(unknown=unknown, values=values)).labels)
    assert ((labels == TOP_ID) == (mask == 255)).all()
    assert same_partition(np.where(mask == 1, labels, 0), cc3d.connected_components(mask == 1, connectivity=26))


@pytest.mark.parametrize(
    ("convert", "code"),
    [
        (lambda m: np.where(m == 255, 128, m * 255).astype(np.uint8), 128),
        (lambda m: np.where(m == 255, -1, m.astype(np.int16)).astype(np.int16), -1),
        (lambda m: np.where(m == 255, 2, m).astype(np.uint16), 2),
    ],
    ids=["0 and 255", "negative", "uint16"],
)
def test_any_stored_value_can_be_the_code(tmp_path, convert, code):
    mask = annotated()
    plain(tmp_path, convert(mask))
    labels = stored(numbered(tmp_path, source=SourceOptions(unknown=code)).labels)
    assert ((labels == TOP_ID) == (mask == 255)).all()
    assert ((labels > 0) == (mask > 0)).all()


def test_null_means_every_value(tmp_path):
    mask = annotated()
    plain(tmp_path, mask)
    labels = stored(numbered(tmp_path, source=SourceOptions(unknown=None, values="mask")).labels)
    assert same_partition(labels, cc3d.connected_components(mask > 0, connectivity=26))


@pytest.mark.parametrize("code", [255, 3, None])
def test_the_metadata_take_precedence(tmp_path, caplog, code):
    mask = annotated()
    declared(tmp_path, mask)  # 7 is unknown
    with caplog.at_level(logging.WARNING):
        labels = stored(numbered(tmp_path, source=SourceOptions(unknown=code)).labels)
    assert ((labels == TOP_ID) == (mask == 255)).all()
    assert f"unknown={'null' if code is None else code} does not apply" in caplog.text
    assert "code of unknown voxels: 7" in caplog.text


@pytest.mark.parametrize(
    ("values", "more", "source", "match"),
    [
        (
            annotated() * 0.5,
            {},
            {"unknown": 1, "values": "probability"},
            "unknown=1 is the value of .* a mask, and the",
        ),
        (annotated(), {}, {"unknown": 255, "kind": "distance"}, "and the values are distances"),
        (
            np.where(annotated() == 1, -3, annotated().astype(np.int16)),
            {},
            {"unknown": 255},
            "from -3 to 0, apart from",
        ),
        (np.arange(24, dtype=np.uint8).reshape(2, 3, 4), {}, {"unknown": 23}, "holds ids of objects already"),
        (annotated(), {}, {"unknown": 2.5}, "unknown must be 'metadata', a stored value or null, got 2.5"),
        (annotated(), attributes("x"), {"unknown": 255}, "needs whole numbers for 'absent' and 'unknown'"),
    ],
    ids=["probabilities", "distances", "no labels", "ids", "no code", "malformed"],
)
def test_what_has_no_unknown_voxels_is_an_error(tmp_path, values, more, source, match):
    plain(tmp_path, values, more)
    with pytest.raises(CellMapError, match=match):
        numbered(tmp_path, source=SourceOptions(**source))


def test_another_code_is_another_segmentation(tmp_path):
    plain(tmp_path, annotated())
    numbered(tmp_path, source=SourceOptions(unknown=255))
    with pytest.raises(CellMapError, match="unknown: 255 is there, now None"):
        numbered(tmp_path, source=SourceOptions(unknown=None, values="mask"))


def test_without_the_setting_a_mask_is_as_before(tmp_path):
    values = (annotated() == 1).astype(np.uint8)
    write_prediction(tmp_path / "p.zarr", values, kind="mask")
    source = open_source(str(tmp_path / "p.zarr"), "mito")
    assert source.unknown((0, 0, 0), values.shape) is None
    assert "unknown" not in source.record
    with pytest.raises(CellMapValueError, match="unknown must be"):
        open_source(str(tmp_path / "p.zarr"), "mito", unknown="255")


def test_the_key_of_the_command(tmp_path):
    mask = annotated()
    plain(tmp_path, mask)
    given = ["input=crop1", "out=t.zarr", "class=mito", "picture=false"]
    code, text = run_forked(*given, cwd=tmp_path, command="segment")
    assert code == 1  # 255 may be present
    code, text = run_forked(*given, "unknown=255", cwd=tmp_path, command="segment")
    assert code == 0, text
    assert ((stored(tmp_path / "t.zarr" / "mito") == TOP_ID) == (mask == 255)).all()
