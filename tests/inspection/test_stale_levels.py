"""Coarser levels that were not written again after an edit of the finest are a problem of the report."""

import numpy as np
import pytest
from scipy import ndimage

from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.io.downsampling import downsample_mean, downsample_mode
from tests.foreign import SEMANTIC, annotated, write_image

ARRAY = {"shape": [8] * 3, "scale": [16] * 3}
LEVELS = {"s0": ([8] * 3, [0] * 3), "s1": ([16] * 3, [4] * 3), "s2": ([32] * 3, [12] * 3)}
NOISE = np.random.default_rng(0).integers(0, 255, (32, 32, 32), dtype=np.uint8)
TISSUE = ndimage.gaussian_filter(NOISE.astype(float), 2, mode="wrap")
TISSUE = np.uint8(np.clip(128 + 12 * (TISSUE - TISSUE.mean()), 1, 254))


def ball(shift=0):
    z, y, x = np.indices((32, 32, 32))
    return np.uint8((z - 14) ** 2 + (y - 16) ** 2 + (x - 12 - shift) ** 2 <= 64)


def pyramid(finest, downsample):
    levels = {"s0": finest, "s1": downsample(finest)}
    return {**levels, "s2": downsample(levels["s1"])}


def mean(values):
    return downsample_mean(values, (2, 2, 2))


def stale(folder, raw, labels, deep=True, levels=LEVELS, **options):
    write_image(folder / "v.zarr" / "em", raw, levels=levels)
    write_image(folder / "v.zarr" / "crop1" / "mito", labels, levels=levels, **options)
    entry = {"raw": str(folder / "v.zarr" / "em"), "gt": str(folder / "v.zarr" / "crop1" / "[mito]")}
    settings = {"datasets": {"train": [entry]}, "classes": ["mito"]}
    problems = inspect(settings, ARRAY, None, deep=deep).problems
    return {problem.text for problem in problems if problem.kind == "stale"}


def every_second(values):
    return values[::2, ::2, ::2]


WAYS = {
    "mean": mean,
    "first": every_second,
    "last": lambda v: v[1::2, 1::2, 1::2],
    "gaussian": lambda v: np.uint8(ndimage.gaussian_filter(v.astype(float), 1)[::2, ::2, ::2]),
    "maximum": lambda v: v.reshape([n for s in v.shape for n in (s // 2, 2)]).max((1, 3, 5)),
}


@pytest.mark.parametrize("raw", ["noise", "tissue"])
@pytest.mark.parametrize("way", WAYS)
def test_levels_that_agree(tmp_path, way, raw):
    voxels = NOISE if raw == "noise" and way != "maximum" else TISSUE
    of_labels = every_second if way == "gaussian" else WAYS[way]  # masks have no smooth levels
    assert stale(tmp_path, pyramid(voxels, WAYS[way]), pyramid(ball(), of_labels)) == set()


@pytest.mark.parametrize("raw", [NOISE, TISSUE])
@pytest.mark.parametrize(
    "change",
    [lambda v: v[::-1], lambda v: v.T, lambda v: 255 - v, lambda v: np.roll(v, 7, 2), np.zeros_like],
)
def test_raw_that_differs(tmp_path, raw, change):
    levels = pyramid(raw, mean)
    levels["s1"] = np.ascontiguousarray(change(levels["s1"]))
    (text,) = stale(tmp_path, levels, pyramid(ball(), every_second))
    assert text.startswith("raw: level s1 does not show what s0 does (correlation ")
    assert "s2" not in text  # it still shows what the finest does


def test_all_coarser_levels_of_another_volume_are_named(tmp_path):
    old = pyramid(TISSUE, mean)
    (text,) = stale(tmp_path, {**old, "s0": np.ascontiguousarray(TISSUE[::-1])}, pyramid(ball(), every_second))
    assert "level s1 does not show what s0 does" in text
    assert "level s2 does not show what s0 does" in text


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("edit", ["moved", "added", "removed", "emptied"])
def test_labels_that_differ(tmp_path, edit, encoded):
    finest = ball()
    old = {"moved": ball(8), "added": ball(), "removed": ball(), "emptied": np.zeros_like(finest)}[edit]
    if edit == "added":
        finest[24:, 24:, 24:] = 1
    if edit == "removed":
        finest[:, :, 14:] = 0
    old[0, 0, :4] = finest[0, 0, :4] = 1
    levels = {**pyramid(old, every_second), "s0": finest}
    options = {"attributes": annotated(SEMANTIC)} if encoded else {}
    (text,) = stale(tmp_path, pyramid(TISSUE, mean), levels, **options)
    assert text.startswith("mito: level s1 does not show what s0 does (")
    if edit in ("moved", "added"):  # the others are within two of its voxels
        assert "level s2 does not show what s0 does" in text


def test_unknown_voxels_and_ids_agree(tmp_path):
    labels = ball()
    labels[:, :, 20:] = 255
    levels = pyramid(labels, every_second)
    levels["s1"][:, :, 8:10] = 255
    assert stale(tmp_path / "u", pyramid(TISSUE, mean), levels, attributes=annotated(SEMANTIC)) == set()
    ids = ndimage.label(NOISE > 250)[0].astype(np.uint16)
    modes = pyramid(ids, lambda v: downsample_mode(v, (2, 2, 2)))
    assert stale(tmp_path / "ids", pyramid(TISSUE, mean), modes) == set()


def test_only_deep_and_without_a_pyramid(tmp_path):
    turned = {**pyramid(TISSUE, mean), "s1": np.zeros((16, 16, 16), np.uint8)}
    assert stale(tmp_path / "shallow", turned, pyramid(ball(), every_second), deep=False) == set()
    assert stale(tmp_path / "one", {"s0": TISSUE}, {"s0": ball()}, levels={"s0": LEVELS["s0"]}) == set()


@pytest.mark.parametrize("is_turned", [False, True])
def test_large_levels_are_compared_in_blocks(tmp_path, is_turned, monkeypatch):
    monkeypatch.setattr("cellmap_lightning.inspection.stale_levels._WHOLE", 1 << 12)
    monkeypatch.setattr("cellmap_lightning.inspection.stale_levels._BLOCK_VOXELS", 1 << 10)
    raw, labels = pyramid(TISSUE, mean), pyramid(ball(), every_second)
    if is_turned:
        raw["s1"] = np.ascontiguousarray(raw["s1"][::-1])
        labels["s1"] = np.roll(labels["s1"], 6, 2)
    assert len(stale(tmp_path, raw, labels)) == 2 * is_turned
