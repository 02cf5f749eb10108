from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.io.downsampling import downsample_mean, downsample_mode


def windows(data, factors):
    shape = [n // f for n, f in zip(data.shape, factors, strict=True)]
    for index in np.ndindex(*shape):
        yield index, data[tuple(slice(i * f, (i + 1) * f) for i, f in zip(index, factors, strict=True))]


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i4", "u8", "i8", "f4"])
@pytest.mark.parametrize("factors", [(2, 2, 2), (1, 2, 3)])
def test_mean_is_the_mean_rounded_to_nearest(dtype, factors):
    rng = np.random.default_rng(1)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        data = rng.normal(size=(5, 6, 7)).astype(kind)
    else:
        info = np.iinfo(kind)
        data = rng.integers(info.min, info.max, (5, 6, 7), dtype=kind, endpoint=True)
    out = downsample_mean(data, factors)
    assert out.dtype == kind
    assert out.shape == tuple(n // f for n, f in zip(data.shape, factors, strict=True))
    for index, window in windows(data, factors):
        if kind.kind == "f":
            assert out[index] == pytest.approx(window.astype(float).mean(), rel=1e-6)
        else:
            total, n = sum(int(v) for v in window.ravel()), window.size
            assert int(out[index]) == (total + n // 2) // n


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i8"])
@pytest.mark.parametrize("factors", [(2, 2, 2), (1, 2, 2), (3, 1, 2)])
def test_mode_is_the_most_frequent_value_and_of_several_the_first_voxels_or_the_smallest(dtype, factors):
    choices = np.array([0, 1, 7, 100 if dtype == "u1" else 300, np.iinfo(dtype).max], dtype)
    data = choices[np.random.default_rng(2).integers(0, 5, (7, 8, 9))]
    out = downsample_mode(data, factors)
    assert out.dtype == data.dtype
    for index, window in windows(data, factors):
        values, counts = np.unique(window, return_counts=True)
        tied = values[counts == counts.max()]
        first = window.ravel()[0]
        assert out[index] == (first if first in tied else tied.min())


@cache
def blobs(seed):
    """A mask of random blobs of about 60 voxels, periodic, so that no object is cut at the border."""
    noise = np.fft.rfftn(np.random.default_rng(seed).normal(size=(160, 160, 160)))
    waves = np.meshgrid(np.fft.fftfreq(160), np.fft.fftfreq(160), np.fft.rfftfreq(160), indexing="ij")
    field = np.fft.irfftn(noise * np.exp(-2 * (np.pi * 14) ** 2 * sum(k**2 for k in waves)))
    return field > np.quantile(field, 0.6)


@pytest.mark.parametrize("factors", [(1, 2, 2), (2, 2, 1), (2, 2, 2)])
@pytest.mark.parametrize("kind", ["bool", "mask", "mask 255", "ids", "unknown"])
def test_objects_keep_their_volume_over_three_levels(factors, kind):
    inside = blobs(1)
    unknown = np.roll(inside, 37, axis=2) if kind == "unknown" else np.zeros_like(inside)
    data = inside if kind == "bool" else inside.astype("u1") * (255 if kind == "mask 255" else 1)
    if kind == "ids":  # in one of the blobs two objects touch, the larger of which has the larger id
        data = ndimage.label(inside)[0].astype("u4")
        data[(data == 1) & (np.arange(160) > 100)] = 70_001
    data = np.where(unknown, 255, data) if kind == "unknown" else data
    shares = [volume_shares(data)]
    for _ in range(3):
        data = downsample_mode(data, factors)
        shares.append(volume_shares(data))
    assert sum(shares[3].values()) == pytest.approx(sum(shares[0].values()), rel=0.02)
    if kind != "ids":  # of objects of a few hundred voxels, single ones count
        assert shares[3] == pytest.approx(shares[0], rel=0.02)


def volume_shares(data):
    return {int(value): float(np.mean(data == value)) for value in np.unique(data) if value}


def test_mode_of_booleans_and_of_a_constant():
    data = np.zeros((4, 4, 4), bool)
    assert not downsample_mode(data).any()
    data[:2] = True
    assert downsample_mode(data).sum() == 4
    assert data.sum() == 32, "the input stays as it was"


def test_downsampling_refuses_what_has_no_answer():
    with pytest.raises(CellMapTypeError):
        downsample_mean(np.zeros((4, 4), bool), (2, 2))
    with pytest.raises(CellMapTypeError):
        downsample_mode(np.zeros((4, 4)), (2, 2))
    for factors in [(2, 2, 2), (0, 2), (8, 1)]:
        with pytest.raises(CellMapValueError):
            downsample_mean(np.zeros((4, 4)), factors)
