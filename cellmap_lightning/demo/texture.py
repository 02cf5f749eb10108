"""The raw image of the synthetic volume: grey values of materials, with texture, blur and shot noise."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cellmap_lightning.demo.geometry import Array
from cellmap_lightning.demo.scene import Scene
from cellmap_lightning.demo.specimen import RAW_SHAPE, SHADES, Material
from cellmap_lightning.io.downsampling import downsample_mean

Floats = NDArray[np.float32]

#: Raw planes that are painted together; even, because two textures have voxels of twice the size.
_SLAB = 4


def paint_raw(scene: Scene, seed: int, shape: Sequence[int] = RAW_SHAPE) -> NDArray[np.uint8]:
    """Return the raw volume.

    Args:
        scene: the structures.
        seed: of texture and noise.
        shape: raw voxels from the volume's corner; multiples of 4 along z and of 2 along y and x.
    """
    rng = np.random.default_rng([seed, 2])
    # These two vary so slowly that voxels of twice the size are enough; a slab repeats them when it needs them.
    halves = [n // 2 for n in shape]
    clumps = _noise(rng, halves, 3)
    haze = _noise(rng, halves, 2)
    grain = _noise(rng, shape, 1)
    ribosomes = _dots(rng, shape, 60_000)
    image = np.empty(shape, np.float32)

    for start in range(0, shape[0], _SLAB):
        slab = slice(start, start + _SLAB)
        labels, _ = scene.paint((2 * start, 0, 0), [2 * n for n in (_SLAB, *shape[1:])])
        # A raw voxel is the mean of its eight label voxels; its texture is that of the first of them.
        part = downsample_mean(SHADES[labels]).astype(np.float32)
        material = labels[::2, ::2, ::2]
        fine, coarse, clump = grain[slab], _doubled(haze, start), _doubled(clumps, start)
        speckled = 5 * coarse + 5 * fine - 62 * ribosomes[slab]
        part += np.where(material == Material.CYTO, speckled, 0)
        dense = clump + 0.5 * coarse
        dense += np.where(material == Material.NUC_RIM, np.float32(1), np.float32(-0.5))
        chromatin = -38 * np.clip(dense, 0, 1.5) + 7 * fine
        part += np.where(material >= Material.NUC_RIM, chromatin, 0)
        part += np.where((material == Material.MITO_LUM) | (material == Material.ER_LUM), 5 * fine, 0)
        image[slab] = part + 3 * clump
    for axis in range(3):
        _blur(image, axis, 0.7)
    image += rng.standard_normal(shape, dtype=np.float32) * 7
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _doubled(field: Floats, start: int) -> Floats:
    """Return the slab of a half-size field that begins at raw plane ``start``, each voxel repeated along each axis."""
    part = field[start // 2 : (start + _SLAB) // 2]
    return part.repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)


def _blur(field: Floats, axis: int, centre: float) -> None:
    """Blur in place along one axis with ``((1 - centre) / 2, centre, (1 - centre) / 2)``; the ends are repeated."""
    line: Array = np.moveaxis(field, axis, 0)
    shares = line * ((1 - centre) / 2)
    line *= centre
    line[1:] += shares[:-1]
    line[:-1] += shares[1:]
    line[0] += shares[0]
    line[-1] += shares[-1]


def _noise(rng: np.random.Generator, shape: Sequence[int], doublings: int) -> Floats:
    """Return a smooth random field of unit variance: coarse Gaussian noise, doubled with a cubic B-spline.

    Args:
        rng: source of the coarse noise.
        shape: shape of the field in voxels.
        doublings: the field varies over about ``2**doublings`` voxels.
    """
    # Three more coarse voxels than cover the shape: the spline's support at both ends.
    field = rng.standard_normal([-(-n >> doublings) + 3 for n in shape], dtype=np.float32)
    for left in range(doublings - 1, -1, -1):
        for axis, n in enumerate(shape):
            source = np.moveaxis(field, axis, 0)
            fine = np.empty((2 * len(source) - 2, *source.shape[1:]), np.float32)
            fine[::2] = (source[:-1] + source[1:]) * 0.5
            fine[1:-1:2] = source[1:-1] * 0.75 + (source[:-2] + source[2:]) * 0.125
            fine[-1] = fine[-2]
            field = np.moveaxis(fine[: -(-n >> left) + 3], 0, axis)
    field = np.ascontiguousarray(field[tuple(slice(n) for n in shape)])
    field -= field[::3, ::3, ::3].mean()
    field *= 1 / field[::3, ::3, ::3].std()
    return field


def _dots(rng: np.random.Generator, shape: Sequence[int], count: int) -> Floats:
    """Return ribosomes: ``count`` soft spots of about 20 nm and depth 1 at random places."""
    spots = np.zeros(tuple(shape), np.float32)
    at = tuple(rng.integers(0, n, count) for n in shape)
    np.maximum.at(spots, at, rng.uniform(0.5, 1, count).astype(np.float32))
    for axis, centre in ((0, 0.5), (1, 0.5), (2, 0.5), (1, 0.5), (2, 0.5)):
        _blur(spots, axis, centre)
    spots *= 1 / (0.5 * 0.375 * 0.375)
    return spots
