"""Raw that is not stored where the patches of a prediction reach: refused inside a box, reported around it."""

import logging
import re

import numpy as np
import pytest

from cellmap_lightning.errors import ChunkError
from cellmap_lightning.geometry.lattice import Box
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from cellmap_lightning.prediction.raw_gaps import NamedBox
from tests.prediction.predictions import SCALE, TRANSLATION, predict, raw_volume, read

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")

SHAPE, PATCH, CHUNK = (64, 64, 64), (16, 16, 16), 16
#: Context of each patch, in voxels.
BLOCKS = {"block_size_mb": 4, "chunks": [16, 16, 16]}
CONTEXT = {"context": 4, "check_context": False, **BLOCKS}


def region(low, high):
    """The box of voxels from one to another, nm."""
    edge = [t - s / 2 for t, s in zip(TRANSLATION, SCALE, strict=True)]
    return {a: [e + low[i] * s, e + high[i] * s] for i, (a, e, s) in enumerate(zip("zyx", edge, SCALE, strict=True))}


#: The chunks 1 and 2 along each axis.
INNER = region((16, 16, 16), (48, 48, 48))


def without(folder, gone):
    """A volume of 4³ chunks without some of them."""
    path, values = raw_volume(folder, SHAPE)
    for file in (path / "s0").glob("*/*/*"):
        if gone(*(int(part) for part in file.parts[-3:])):
            file.unlink()
    return path, values


def is_(count):
    return "is" if count == 1 else "are"


def warnings_of(caplog):
    lines = [r for r in caplog.records if r.name.startswith("cellmap_lightning")]
    return [r.getMessage() for r in lines if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("gone", "count", "example"),
    [
        (lambda z, y, x: True, 8, r"s0/\d/\d/\d"),
        (lambda z, y, x: (z, y, x) == (2, 1, 1), 1, "s0/2/1/1"),
        (lambda z, y, x: z == 1 or x == 0, 4, "s0/1/[12]/[12]"),
    ],
    ids=["everything", "one chunk", "a side and the context"],
)
@pytest.mark.parametrize("blend", ["trim", "gaussian"])
def test_a_gap_inside_the_region_is_an_error(tmp_path, gone, count, example, blend):
    path, _ = without(tmp_path, gone)
    given = CONTEXT if blend == "trim" else {"blend": blend, **BLOCKS}
    with pytest.raises(ChunkError) as caught:
        predict(path, PATCH, tmp_path / "out.zarr", region=INNER, **given)
    text = str(caught.value)
    assert f"{count} of the 8 chunks of raw that its patches reach inside the region {is_(count)} not stored" in text
    assert re.search(rf"level s0 \({re.escape(str(path))}/s0\), as chunk {re.escape(str(path))}/{example};", text)
    assert "csc fetch-data --raw-padding " in text
    assert text.endswith("set missing_raw=warn to predict from the fill value there")
    assert not (tmp_path / "out.zarr").exists(), "nothing was predicted"


@pytest.mark.parametrize("policy", ["warn", "fill", "mask"])
def test_the_override_predicts_from_the_fill_value(tmp_path, caplog, policy):
    path, values = without(tmp_path, lambda z, y, x: (z, y, x) == (2, 1, 1))
    predict(path, PATCH, tmp_path / "out.zarr", region=INNER, data={"missing_raw": policy}, **CONTEXT)
    (first,) = warnings_of(caplog)
    assert "1 of the " in first
    assert f"s0/2/1/1; they show the fill value (missing_raw={policy})" in first
    values = values.copy()
    values[32:48, 16:32, 16:32] = 0
    expected = values[16:48, 16:48, 16:48].astype(np.float32) * np.float32(1 / 255)
    np.testing.assert_array_equal(read(tmp_path / "out.zarr"), expected)


@pytest.mark.parametrize(
    ("gone", "count"),
    [(lambda z, y, x: z == 0, 16), (lambda z, y, x: (z, y, x) == (3, 3, 3), 1), (lambda z, y, x: x in (0, 3), 32)],
)
def test_a_gap_of_the_context_is_one_warning(tmp_path, caplog, gone, count):
    path, _ = without(tmp_path, gone)
    predict(path, PATCH, tmp_path / "out.zarr", region=INNER, **CONTEXT)
    (line,) = warnings_of(caplog)
    share = f"{count} of the 64 chunks ({100 * count / 64:.0f} %)"
    assert f"{share} of raw that its patches reach {is_(count)} not stored, all" in line
    padding = int(re.search(r"csc fetch-data --raw-padding (\d+) fetches them", line).group(1))
    assert 4 <= padding <= PATCH[0]

    def untouched(*index):
        return not all(i * CHUNK < 48 + padding and (i + 1) * CHUNK > 16 - padding for i in index)

    caplog.clear()
    again, _ = without(tmp_path / "again", untouched)
    predict(again, PATCH, tmp_path / "again.zarr", region=INNER, **CONTEXT)
    assert not warnings_of(caplog), "the padding of the message is enough"


@pytest.mark.parametrize("policy", ["auto", "error", "warn"])
@pytest.mark.parametrize("corner", [0, 48])
def test_chunks_that_no_patch_reaches_are_not_mentioned(tmp_path, caplog, policy, corner):
    """The context of 4 voxels stays in the chunk beside the region."""
    low = (corner,) * 3
    reach = {0: {0, 1}, 48: {2, 3}}[corner]
    path, _ = without(tmp_path, lambda *index: not set(index) <= reach)
    predict(
        path, PATCH, tmp_path / "out.zarr", region=region(low, tuple(a + CHUNK for a in low)),
        data={"missing_raw": policy}, **CONTEXT,
    )  # fmt: skip
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    ("gone", "place"),
    [
        (lambda z, y, x: True, "inside the volume"),
        (lambda z, y, x: (z, y, x) == (3, 3, 3), "inside the volume"),
        (lambda z, y, x: x == 0, "inside the volume"),
    ],
)
def test_an_explicit_error_is_obeyed(tmp_path, gone, place):
    path, _ = without(tmp_path, gone)
    with pytest.raises(ChunkError, match=rf"{place} (is|are) not stored \(missing_raw=error\)"):
        predict(path, PATCH, tmp_path / "out.zarr", data={"missing_raw": "error"})


def test_an_explicit_error_is_obeyed_around_a_region(tmp_path):
    path, _ = without(tmp_path, lambda z, y, x: z == 0)
    with pytest.raises(ChunkError, match="16 of the 64 chunks of raw that its patches reach around the region"):
        predict(path, PATCH, tmp_path / "out.zarr", region=INNER, data={"missing_raw": "error"}, **CONTEXT)


@pytest.mark.parametrize(
    ("gone", "share", "nearest"),
    [
        (lambda z, y, x: True, "64 of the 64 chunks (100 %)", "s0/[12]/[12]/[12]"),
        (lambda z, y, x: (z, y, x) in ((0, 0, 0), (2, 1, 1)), "2 of the 64 chunks (3 %)", "s0/2/1/1"),
        (lambda z, y, x: z == 3 and y in (0, 3), "8 of the 64 chunks (12 %)", "s0/3/[03]/[12]"),
    ],
)
def test_whole_volumes_are_predicted_with_one_warning(tmp_path, caplog, gone, share, nearest):
    path, _ = without(tmp_path, gone)
    predict(path, PATCH, tmp_path / "out.zarr", **BLOCKS)
    (line,) = warnings_of(caplog)
    assert line.startswith(f"raw: {share} of raw that its patches reach are not stored: level s0")
    assert re.search(rf"nearest to the middle of the volume chunk {re.escape(str(path))}/{nearest}; they show", line)


@pytest.mark.parametrize("missing", [True, False])
def test_blocks_outside_of_a_mask_need_no_raw(tmp_path, missing):
    path, _ = without(tmp_path, lambda z, y, x: z >= 2)
    mask = np.zeros(SHAPE, np.uint8)
    mask[: 48 if missing else 16] = 1
    write_multiscale(
        tmp_path / "mask", mask, scale=SCALE, translation=TRANSLATION, storage=ArrayOptions(chunks=(16,) * 3)
    )
    given = {"mask": str(tmp_path / "mask"), "region": region((0, 0, 0), SHAPE), **CONTEXT, "block_size_mb": 0.05}
    if missing:
        with pytest.raises(ChunkError, match="inside the region are not stored"):
            predict(path, PATCH, tmp_path / "out.zarr", **given)
    else:
        assert predict(path, PATCH, tmp_path / "out.zarr", **given).summary.complete


@pytest.mark.parametrize(
    ("crop", "gone", "error"),
    [
        (((16, 16, 16), (48, 48, 48)), lambda z, y, x: z == 0, False),
        (((16, 16, 16), (48, 48, 48)), lambda z, y, x: z == 1, True),
        (((15, 16, 16), (48, 48, 48)), lambda z, y, x: z == 0, True),
    ],
)
def test_the_margin_of_a_crop_is_context(tmp_path, caplog, monkeypatch, crop, gone, error):
    """The box of a manifest's crop is predicted with a voxel around it, which the download need not have."""
    from cellmap_lightning.prediction import prediction_writer

    path, _ = without(tmp_path, gone)
    low, high = (tuple(region(*crop)[a][end] for a in "zyx") for end in (0, 1))
    planner = prediction_writer.JobPlanner
    named = NamedBox("jrc_a/crop7", Box(low, high))
    monkeypatch.setattr(prediction_writer, "JobPlanner", lambda *args: planner(*args[:-1], named))
    margin = region(tuple(a - 1 for a in crop[0]), tuple(b + 1 for b in crop[1]))
    if error:
        with pytest.raises(ChunkError, match=r"jrc_a/crop7: .* inside the crop .*csc fetch-data --crops 7 --raw-pad"):
            predict(path, PATCH, tmp_path / "out.zarr", region=margin, **CONTEXT)
        return
    predict(path, PATCH, tmp_path / "out.zarr", region=margin, **CONTEXT)
    (line,) = warnings_of(caplog)
    assert "all around the crop" in line
    assert "csc fetch-data --crops 7 --raw-padding" in line
