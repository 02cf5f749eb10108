"""Meaning of stored predictions: recorded by every writer, else inferred from values, for submissions and scores."""

import json

import numpy as np
import pytest

from cellmap_lightning.commands.submit import submit
from cellmap_lightning.compat.array_writer import ImageWriter
from cellmap_lightning.errors import CellMapValueError, MetadataError
from cellmap_lightning.evaluation.evaluate import evaluate
from cellmap_lightning.io.meanings import check_values, meaning_of
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.writer import write_multiscale
from cellmap_lightning.prediction.output import PredictionOutput
from tests.evaluation.test_challenge import manifest, predicted, read, row

SHAPE, STEP = (16, 16, 16), (8, 8, 8)


def ball():
    z, y, x = np.indices(SHAPE)
    return (z - 8) ** 2 + (y - 8) ** 2 + (x - 8) ** 2 < 30


def by_image_writer(path, data, dtype, **more):
    box = {axis: [-4, 124] for axis in "zyx"}
    writer = ImageWriter(str(path), path.name, STEP, box, SHAPE, dtype=dtype, **more)
    writer[dict.fromkeys("zyx", 60.0)] = data


def recorded(path):
    return json.loads((path / ".zattrs").read_text())["cellmap"]["prediction"]


def there(folder):
    return folder / "predictions" / "jrc_a.zarr" / "crop7"


def submitted(folder, name="er", **more):
    path = manifest(folder, row(7, name, STEP, (0, 0, 0), SHAPE))
    submit(folder / "predictions", path, folder / "submission.zarr", overwrite=True, **more)
    return read(folder / "submission.zarr" / "crop7" / name)


@pytest.mark.parametrize("writer", ["ImageWriter", "others"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "bool"])
@pytest.mark.parametrize("name", ["er", "mito"])
def test_a_mask_is_not_an_empty_prediction(tmp_path, writer, dtype, name):
    mask = ball()
    if writer == "ImageWriter":
        by_image_writer(there(tmp_path) / name, mask.astype(np.float32), dtype)
    else:
        predicted(tmp_path, name, mask.astype(dtype), (0, 0, 0), STEP)
    np.testing.assert_array_equal(submitted(tmp_path, name)[...], mask)


@pytest.mark.parametrize(
    ("dtype", "given", "kind", "one"),
    [
        ("uint8", lambda m: m.astype(np.float32), "mask", None),
        ("uint8", lambda m: m, "mask", None),
        ("uint8", lambda m: np.where(m, 200.25, 3.5), "scaled", 255),
        ("uint16", lambda m: np.where(m, 60000.5, 3.0), "scaled", 65535),
        ("uint8", lambda m: m * 7, None, None),  # an id, or a probability of 3 %
        ("float32", lambda m: np.where(m, 0.9, 0.1), "probability", 1),
        ("float32", lambda m: np.where(m, 4.0, -4.0), None, None),
    ],
)
def test_an_image_writer_records_what_the_values_show(tmp_path, dtype, given, kind, one):
    by_image_writer(tmp_path / "er", given(ball()), dtype)
    expected = {"class_name": "er", "values": kind, "probability_1": one}
    assert recorded(tmp_path / "er") == {key: value for key, value in expected.items() if value is not None}


@pytest.mark.parametrize("kind", ["probability", "scaled", "mask", "ids"])
def test_an_image_writer_records_the_given_meaning(tmp_path, kind):
    by_image_writer(tmp_path / "er", ball() * 1, "uint8", values=kind)
    assert recorded(tmp_path / "er")["values"] == kind
    with pytest.raises(CellMapValueError, match="values must be one of"):
        by_image_writer(tmp_path / "pm", ball(), "uint8", values="logits")


@pytest.mark.parametrize(
    ("patches", "kind"),
    [
        ((1, 130.5, 255), "scaled"),
        ((130.5, 1, 0), "scaled"),
        ((255, 0.25, 1), "scaled"),
        ((0, 1), "mask"),
        ((1, 2, 1), None),
        ((2, 1), None),
    ],
)
@pytest.mark.parametrize("reopened", [False, True])
def test_patches_add_up_to_one_meaning(tmp_path, patches, kind, reopened):
    box = {axis: [0, 8 * len(patches)] for axis in "zyx"}
    new = lambda: ImageWriter(str(tmp_path / "er"), "er", (8, 8, 8), box, (1, 1, 1), dtype="uint8")  # noqa: E731
    writer = new()
    for number, value in enumerate(patches):
        writer.write((number, 0, 0), np.full((1, 1, 1), value))
        writer = new() if reopened else writer
    if reopened and patches[0] == 255:
        kind = None  # 255 alone may be an id, and what is written later cannot tell any more
    assert recorded(tmp_path / "er").get("values") == kind


@pytest.mark.parametrize(
    ("dtype", "kind", "one"), [("uint8", "scaled", 255), ("float32", "probability", 1), ("float16", "probability", 1)]
)
def test_predictions_record_what_they_are(tmp_path, dtype, kind, one):
    from cellmap_lightning.geometry.lattice import Lattice
    from cellmap_lightning.prediction.blocks import BlockGrid
    from cellmap_lightning.prediction.quantize import StoredValues

    grid = BlockGrid(Lattice((0, 0, 0), STEP, SHAPE), (0, 0, 0), SHAPE, SHAPE)
    output = PredictionOutput(tmp_path / "pred.zarr", ["er"], grid, StoredValues(dtype), chunks=(16, 16, 16))
    output.open({"classes": ["er"]})
    output.write(0, (ball() * one).astype(dtype)[None], [0])
    assert output.finish(0, 1, lambda: None)
    assert recorded(tmp_path / "pred.zarr" / "er") == {"class_name": "er", "values": kind, "probability_1": one}
    image = read_multiscale(tmp_path / "pred.zarr" / "er")
    assert (meaning_of(image, "er").kind, meaning_of(image, "er").one) == (kind, one)


def others(folder, values, block=None, name="er"):
    attributes = {} if block is None else {"attributes": {"cellmap": {"prediction": block}}}
    predicted(folder, name, values, (0, 0, 0), STEP, **attributes)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (ball().astype(np.uint8), "mask"),
        (np.zeros(SHAPE, np.uint16), "mask"),
        ((ball() * 255).astype(np.uint8), "scaled"),
        ((ball() * 300).astype(np.uint16), "ids"),
        ((ball() * 3).astype(np.int64), "ids"),
        ((ball() * 300).astype(np.float32), "ids"),
        (np.where(ball(), 0.75, np.nan).astype(np.float32), "probability"),
    ],
)
def test_values_decide_where_nothing_is_recorded(tmp_path, caplog, values, kind):
    others(tmp_path, values)
    with caplog.at_level("INFO", "cellmap_lightning.io.meanings"):
        found = submitted(tmp_path)
    lines = [r.getMessage() for r in caplog.records if r.name.endswith("meanings")]
    assert len(lines) == 1
    assert "jrc_a/crop7/er" in lines[0]
    assert lines[0].endswith(f"read as {kind}")
    np.testing.assert_array_equal(found[...], np.nan_to_num(values) > 0)
    assert dict(found.attrs)["cellmap"] == {"prediction": {"class_name": "er", "values": "mask"}}


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ((ball() * 200).astype(np.uint8), ("scaled", "ids")),
        (np.where(ball(), 1, 255).astype(np.uint8), ("scaled", "mask")),
        ((ball() * 60000).astype(np.uint16), ("scaled", "ids")),
        ((ball() * 200).astype(np.float32), ("ids", "scaled")),
        (np.where(ball(), 3.5, -2).astype(np.float32), ("probability", "scaled")),
        (np.where(ball(), 3, -2).astype(np.int32), ("probability",)),
    ],
)
def test_ambiguous_values_are_an_error_that_names_the_setting(tmp_path, values, settings):
    others(tmp_path, values)
    with pytest.raises(MetadataError) as e:
        submitted(tmp_path)
    for text in ("jrc_a/crop7/er", "er/s0", str(values.dtype), f"to {values.max():g}", "{er: "):
        assert text in str(e.value)
    assert " or ".join(f"values={kind}" for kind in settings) in str(e.value)
    assert not (tmp_path / "submission.zarr").exists()
    for setting in (settings[0], {"er": settings[0]}, {"*": settings[0]}):
        assert submitted(tmp_path, values=setting).shape == SHAPE


@pytest.mark.parametrize(
    ("setting", "present", "numbers"),
    [("scaled", (200,), 1), ("mask", (100, 200), 1), ("ids", (100, 200), 2), ("probability", (100, 200), 1)],
)
def test_the_setting_decides(tmp_path, setting, present, numbers):
    values = np.zeros(SHAPE, np.uint8)
    values[4:8], values[8:12] = 100, 200
    others(tmp_path, values, name="mito")
    found = submitted(tmp_path, "mito", values=setting)[...]
    np.testing.assert_array_equal(found > 0, np.isin(values, present))
    assert len(np.unique(found)) - 1 == numbers


@pytest.mark.parametrize("setting", ["labels", None, {"er": "id"}])
def test_settings_that_are_none(setting):
    with pytest.raises(CellMapValueError, match="values must be one of auto, probability, scaled, mask, ids"):
        check_values(setting)


@pytest.mark.parametrize(
    ("block", "match"),
    [
        ({"values": "logits"}, "records cellmap.prediction.values='logits'; it must be one of"),
        ({"values": ["mask"]}, "must be one of"),
        ({"values": "scaled", "probability_1": 0}, "probability_1=0; it must be a positive number"),
        ({"values": "scaled", "probability_1": "255"}, "must be a positive number"),
        ({"values": "mask"}, r"record values=mask \(0 to 1\), but it holds values from 0 to 200"),
        ({"values": "probability", "probability_1": 1}, r"record values=probability"),
    ],
)
def test_metadata_that_are_wrong(tmp_path, block, match):
    others(tmp_path, (ball() * 200).astype(np.uint8), block)
    with pytest.raises(MetadataError, match=match):
        submitted(tmp_path)


def test_records_of_earlier_versions(tmp_path):
    others(tmp_path, (ball() * 200).astype(np.uint8), {"class_name": "er", "probability_1": 255})
    np.testing.assert_array_equal(submitted(tmp_path)[...], ball())
    np.testing.assert_array_equal(submitted(tmp_path, threshold=0.8)[...], 0)


@pytest.mark.parametrize(
    ("stored", "setting"),
    [(lambda m: m.astype(np.uint8), "auto"), (lambda m: (m * 200).astype(np.uint8), "ids"), (lambda m: m, "auto")],
)
def test_scores_of_masks(tmp_path, stored, setting):
    truth = tmp_path / "crops" / "crop1" / "er"
    truth.parent.mkdir(parents=True)
    write_multiscale(truth, ball().astype(np.uint8), scale=STEP, translation=(0, 0, 0))
    others(tmp_path, stored(ball()))
    (score,) = evaluate(there(tmp_path), tmp_path / "crops", ["er"], values=setting)
    assert (score.voxels.dice, score.voxels.tp) == (1, ball().sum())
