"""Instance ids, and targets that are computed from a patch of them."""

import numpy as np
import torch

from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.kinds.registry import make_kind

SCALE = (8.0, 4.0, 4.0)
EVERY = [
    {"kind": "affinities", "offsets": [[1, 0, 0], [0, -3, 2]]},
    {"kind": "sdt", "nm": 20.0},
    {"kind": "boundary", "nm": 12.0},
    {"kind": "lsd", "sigma": 7.0},
    {"kind": "flow", "nm": 18.0},
    {"kind": "skeleton_distance", "nm": 12.0},
]


def blobs(seed, shape, count=12, radius=14.0):
    """Touching instances: balls around random centres, each voxel of the nearest one; 0 between them."""
    rng = np.random.default_rng(seed)
    centers = rng.uniform(0, 1, (count, 3)) * np.multiply(shape, SCALE)
    places = np.stack(np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, SCALE, strict=True)), indexing="ij"), -1)
    distance = np.linalg.norm(places[..., None, :] - centers, axis=-1)
    # Ids that are not consecutive, one of them large.
    return np.where(distance.min(-1) < radius, 3 * distance.argmin(-1) + 1, 0).astype(np.int64)


def computed(spec, ids, first, shape, classes=1, scale=SCALE):
    """The finished target ``[channels, z, y, x]`` of the patch at `first`; ids outside the array are unknown."""
    kind = make_kind("target", Window(shape, scale), classes, spec)
    wide = np.pad(ids, [(m, m) for m in kind.margin], constant_values=-1)
    wide = wide[tuple(slice(f, f + n + 2 * m) for f, n, m in zip(first, shape, kind.margin, strict=True))]
    stored = np.broadcast_to(wide, (classes, *wide.shape))
    if kind.reads == "bits":
        stored = np.stack([wide > 0, wide >= 0], -1).astype(np.uint8) * np.uint8(2**classes - 1)
    out = np.full(*kind.compact(np.dtype(np.int64))[:1], 77, dtype=kind.compact(np.dtype(np.int64))[1])
    kind.encode(stored, out)
    return kind, kind.finish(torch.from_numpy(out)[None])[0].numpy()


def voxel_distances(ids):
    """The coordinates of all voxels, nm, and a function to the distances from one of them to all."""
    places = np.stack(
        np.meshgrid(*(np.arange(n) * s for n, s in zip(ids.shape, SCALE, strict=True)), indexing="ij"), -1
    )
    return places, lambda voxel: np.linalg.norm(places - places[voxel], axis=-1)
