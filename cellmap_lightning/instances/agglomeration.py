"""Watershed fragments, agglomerated by their mean affinity or boundary.

1. Fragments: a seeded watershed of the distance to boundaries, with more seeds than objects (see `watershed`).
2. Two fragments that touch have an edge, whose weight is the mean affinity across their contact (or one minus the mean
   boundary along it), minus ``merge_threshold``.
3. The edge of the largest weight is contracted, and parallel edges become their mean, weighted by the size of the
   contacts, until no weight is above 0.

This is average linkage of a signed graph: Bailoni et al., https://arxiv.org/abs/1906.11713, computed by bioimage-cpp.
The reach is the diameter of an object plus that of the fragments.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cellmap_lightning.instances.components import Connectivity, Labels
from cellmap_lightning.instances.libraries import library
from cellmap_lightning.instances.mutex_watershed import Offsets, check_offsets, compact, foreground, is_direct
from cellmap_lightning.instances.watershed import Floats, Mask, distance_watershed, mask_distance

#: A weight that contractions never make positive, of edges between an object and the background.
_NEVER = -1e6


def agglomerate_affinities(
    affinities: Floats,
    offsets: Offsets,
    voxel_size: Sequence[float],
    threshold: float = 0.5,
    merge_threshold: float = 0.5,
    smoothing: float = 0.0,
    seed_distance: float | None = None,
    connectivity: Connectivity = 26,
) -> Labels:
    """Divide the foreground of affinities into objects by agglomeration of fragments.

    Args:
        affinities: ``[C, z, y, x]`` from 0 to 1, of a voxel and that at the offset from it; only those of direct
            neighbours are used.
        offsets: of each channel, in voxels (z, y, x).
        voxel_size: nm.
        threshold: the affinity from which a voxel is foreground, and its mean from which it is inside of a fragment.
        merge_threshold: the mean affinity above which fragments are merged.
        smoothing: see `distance_watershed`.
        seed_distance: see `distance_watershed`.
        connectivity: see `distance_watershed`.

    Returns:
        Numbers from 1, and 0 in the background.

    Raises:
        CellMapValueError: the offsets are invalid.
        MissingExtraError: a library is not installed.

    Example:
        >>> labels = agglomerate_affinities(affinities, offsets, (8, 8, 8), seed_distance=24)  # doctest: +SKIP
    """
    checked = check_offsets(offsets, len(affinities))
    direct = [channel for channel, offset in enumerate(checked) if is_direct(offset)]
    mask = foreground(affinities, checked, threshold)
    inside = (np.mean(affinities[direct], axis=0) >= threshold) & mask
    distance = mask_distance(inside, voxel_size)
    fragments = distance_watershed(mask, voxel_size, distance, smoothing, seed_distance, connectivity=connectivity)
    values, neighbours = np.ascontiguousarray(affinities[direct], np.float32), [list(checked[c]) for c in direct]

    def weights(graph: Any, features: Any) -> Any:
        return features.affinity_features(graph, fragments, values, neighbours, number_of_threads=1)

    return _merge(fragments, weights, merge_threshold, 1.0)


def agglomerate_boundaries(
    boundaries: Floats,
    voxel_size: Sequence[float],
    threshold: float = 0.5,
    merge_threshold: float = 0.5,
    smoothing: float = 0.0,
    seed_distance: float | None = None,
    connectivity: Connectivity = 26,
) -> Labels:
    """Divide the voxels between boundaries into objects by agglomeration of fragments.

    Args:
        boundaries: probabilities ``[z, y, x]`` that a voxel is a boundary.
        voxel_size: nm.
        threshold: the probability below which a voxel is foreground.
        merge_threshold: fragments are merged if one minus the mean probability of their contact is above it.
        smoothing: see `distance_watershed`.
        seed_distance: see `distance_watershed`.
        connectivity: see `distance_watershed`.

    Returns:
        Numbers from 1, and 0 in the background.

    Raises:
        MissingExtraError: a library is not installed.
    """
    mask: Mask = boundaries < threshold
    fragments = distance_watershed(mask, voxel_size, None, smoothing, seed_distance, connectivity=connectivity)
    values = np.ascontiguousarray(boundaries, np.float32)

    def weights(graph: Any, features: Any) -> Any:
        return features.edge_map_features(graph, fragments, values, number_of_threads=1)

    return _merge(fragments, weights, 1 - merge_threshold, -1.0)


def _merge(fragments: Labels, weights: Any, threshold: float, sign: float) -> Labels:
    """Return fragments with the numbers of their clusters.

    Args:
        fragments: numbers from 1, and 0 in the background.
        weights: function that returns the mean value and the size of each edge of a graph.
        threshold: the mean value at which a weight is 0.
        sign: 1 if larger values attract, -1 if they separate.
    """
    if fragments.max(initial=0) < 2:
        return fragments
    graphs = library("bioimage_cpp").graph
    graph = graphs.region_adjacency_graph(fragments, number_of_threads=1)
    features = np.asarray(weights(graph, graphs.features), np.float64)
    signed = sign * (features[:, 0] - threshold)
    edges = np.asarray(graph.uv_ids())
    signed[(edges == 0).any(axis=1)] = _NEVER
    policy = graphs.agglomeration.GaspClusterPolicy(linkage="mean")
    clusters = np.asarray(policy.optimize(graph, signed, edge_sizes=features[:, 1]))
    # The background is a cluster of fragment 0 alone.
    clusters = np.where(np.arange(len(clusters)) == 0, 0, clusters + 1)
    return compact(clusters[fragments].astype(np.uint32))
