"""Volumes of touching objects of known identity, and predictions that a network would make of them."""

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from cellmap_lightning.io.meanings import prediction_attributes
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale

#: Offsets of the affinities in tests.
OFFSETS = [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [-4, 0, 0], [0, -4, 0], [0, 0, -4]]


def touching_spheres(shape=(96, 96, 96), radius=7.0, spacing=11.5, seed=0):
    """Ids of spheres on a jittered lattice, divided where they overlap."""
    rng = np.random.default_rng(seed)
    axes = [np.arange(spacing / 2, n, spacing) for n in shape]
    centers = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    centers = centers + rng.uniform(-0.8, 0.8, centers.shape)
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    distance, nearest = cKDTree(centers).query(voxels)
    return np.where(distance < radius, nearest + 1, 0).reshape(shape).astype(np.uint32)


def probability_of(ids, seed=0, blur=0.7, noise=0.1):
    """The foreground, blurred and noisy, as uint8: it has no boundary between objects that touch."""
    rng = np.random.default_rng(seed)
    values = ndimage.gaussian_filter((ids > 0).astype(np.float32), blur)
    values = ndimage.gaussian_filter(values + rng.normal(0, noise, ids.shape), 0.5)
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def affinities_of(ids, offsets=OFFSETS, seed=0, blur=0.5, noise=0.1, gaps=0.02):
    """Affinities ``[C, z, y, x]`` as uint8: blurred, noisy, and with a part of the boundaries missing."""
    rng = np.random.default_rng(seed)
    channels = []
    for offset in offsets:
        other = np.zeros_like(ids)
        here = tuple(slice(max(0, -n), min(0, -n) or None) for n in offset)
        there = tuple(slice(max(0, n), min(0, n) or None) for n in offset)
        other[here] = ids[there]
        same = ((ids == other) & (ids > 0)).astype(np.float32)
        same[(rng.random(ids.shape) < gaps) & (ids > 0)] = 1
        values = ndimage.gaussian_filter(same, blur) + rng.normal(0, noise, ids.shape)
        channels.append(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))
    return np.stack(channels)


def same_partition(a, b):
    """True if two arrays have the same objects, with any numbers."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]).astype(np.int64), axis=1)
    return (
        pairs.shape[1] == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))
        and not (pairs[0] == 0)[pairs[1] > 0].any()
    )


def f1(labels, truth, smallest=1):
    """F1 at an intersection over union of 0.5; predictions of fewer voxels are left out."""
    pairs, counts = np.unique(np.stack([labels.ravel(), truth.ravel()]).astype(np.int64), axis=1, return_counts=True)
    sizes = np.bincount(labels.ravel()), np.bincount(truth.ravel())
    both = (pairs > 0).all(axis=0) & (sizes[0][pairs[0]] >= smallest)
    union = sizes[0][pairs[0]] + sizes[1][pairs[1]] - counts
    hits = int((both & (counts > 0.5 * union)).sum())
    return 2 * hits / (int((sizes[0][1:] >= smallest).sum()) + int((sizes[1][1:] > 0).sum()))


def write_prediction(path, values, name="mito", voxel_size=(8, 8, 8), kind=None, attributes=None, chunks=(32, 32, 32)):
    """Write a prediction of one class, ``[z, y, x]``, or channels ``[c, z, y, x]``, as a group with the class."""
    import zarr

    from cellmap_lightning.io.writer import write_group

    if not path.exists():
        write_group(path)
    block = dict(attributes or {})
    if kind is not None and values.ndim == 3:
        block = {**prediction_attributes(name, kind, values.dtype)["prediction"], **block}
    if values.ndim == 3:
        write_multiscale(
            path / name, values, scale=voxel_size, translation=(4, 4, 4), storage=ArrayOptions(chunks=chunks),
            attributes={"cellmap": {"prediction": block}},
        )  # fmt: skip
        return path
    scale = [{"type": "scale", "scale": [1, *voxel_size]}, {"type": "translation", "translation": [0, 4, 4, 4]}]
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    datasets = [{"path": "s0", "coordinateTransformations": scale}]
    multiscales = [{"version": "0.4", "name": name, "axes": axes, "datasets": datasets}]
    write_group(path / name, {"multiscales": multiscales, "cellmap": {"prediction": block}})
    array = zarr.create_array(
        str(path / name / "s0"), shape=values.shape, dtype=values.dtype, chunks=(1, *chunks), zarr_format=2,
        chunk_key_encoding={"name": "v2", "separator": "/"},
    )  # fmt: skip
    array[...] = values
    return path
