"""Many crops as one."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cellmap_lightning.cache.region import RegionStore
from cellmap_lightning.crops.remote_arrays import fetch_counted
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.runtime.thread_pool import ReadPool
from cellmap_lightning.sampling.crop_table import Crops
from cellmap_lightning.sampling.strategies import parse_strategy
from cellmap_lightning.transforms.intensity import Scaling

log = logging.getLogger(__name__)


class CellMapMultiDataset(SampleSource):
    """Crops that share classes and arrays, with one pool of threads and one cache for all of them.

    Args:
        datasets: the crops, all with the same classes, arrays and value transforms.

        strategy: where random samples come from: ``mix``, ``uniform``, ``per_crop``, ``weighted``, ``class_balanced``
            or ``foreground``, or ``{name: one of them, and its options}``; see `strategies`.
        balance_datasets: make raw volumes equally likely, whatever the number and size of their crops.

    Raises:
        CellMapValueError: there is none, or they differ in what they deliver.
        CellMapKeyError: a strategy, or a crop or class that it names, does not exist.
    """

    def __init__(
        self, datasets: Sequence[CellMapDataset], strategy: Any = "mix", balance_datasets: bool = False
    ) -> None:
        if not datasets:
            raise CellMapValueError("a CellMapMultiDataset needs at least one dataset")
        for dataset in datasets:
            if not isinstance(dataset, CellMapDataset):
                raise CellMapTypeError(f"a CellMapMultiDataset joins CellMapDatasets, got {type(dataset).__name__}")
        self._datasets = tuple(datasets)
        first = self._datasets[0]
        for other in self._datasets[1:]:
            for what, a, b in (
                ("classes", first.classes, other.classes),
                ("inputs", _identities(first.layout.inputs), _identities(other.layout.inputs)),
                ("targets", _identities(first.layout.targets), _identities(other.layout.targets)),
                ("is_train", first.is_train, other.is_train),
                ("seed", first.seed, other.seed),
                ("nan_targets", first.layout.nan_targets, other.layout.nan_targets),
                ("spatial_transforms", first.spatial, other.spatial),
                ("intensity_transforms", first.layout.augment, other.layout.augment),
                ("raw_value_transforms", first.layout.raw_transforms, other.layout.raw_transforms),
                ("target_value_transforms", first.layout.target_transforms, other.layout.target_transforms),
                ("cache", first._store.mode, other._store.mode),
                # Of chunks that pass by, crops may need different numbers.
                ("cache_bytes", *((d.cache != "chunks" and d.cache_bytes) for d in (first, other))),
            ):
                if a != b:
                    raise CellMapValueError(f"{other.label} and {first.label} differ in their {what}: {b} and {a}")
        self.seed, self.is_train, self.spatial = first.seed, first.is_train, first.spatial
        dtypes = {d.raw_dtype for d in self._datasets}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        self.layout = dataclasses.replace(
            first.layout,
            raw_dtype=dtype,
            id_dtype=max((d.layout.id_dtype for d in self._datasets), key=lambda kind: kind.itemsize),
            scaling=Scaling.of(self._offsets[:-1], [d.affine for d in self._datasets]),
        )
        self.crops = Crops(self._datasets, self.classes, bool(balance_datasets))
        self.strategy = parse_strategy(strategy).on(self.crops)
        if self.is_train and not self.strategy.uses_weights and any(d.weight is not None for d in self._datasets):
            log.warning("crops have weights, and the strategy %r does not use them; weighted does", self.strategy)
        self._pool = ReadPool(max(d.max_workers for d in self._datasets))
        self._store = RegionStore(first._store.mode, max(d.cache_bytes or 0 for d in self._datasets) or None)
        for dataset in self._datasets:
            dataset.share(self._pool, self._store)
        log.info(
            "%d crops: %d positions; classes %s; %d workers",
            len(self._datasets), len(self), self.annotated_in(), self.max_workers,
        )  # fmt: skip

    @property
    def datasets(self) -> Sequence[CellMapDataset]:
        """The crops, in the order of the positions."""
        return self._datasets

    @property
    def class_counts(self) -> dict[str, float]:
        """Foreground voxels of each class over all crops; see `CellMapDataset.class_counts`."""
        fetch_counted(self._datasets)
        return self._added(dataset.class_counts for dataset in self._datasets)

    @property
    def background_counts(self) -> dict[str, float]:
        """Voxels of each class's annotation where it is not; see `CellMapDataset.background_counts`."""
        fetch_counted(self._datasets)
        return self._added(dataset.background_counts for dataset in self._datasets)

    def _added(self, counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
        found = dict.fromkeys(self.classes, 0.0)
        for crop in counts:
            for name, count in crop.items():
                found[name] += count
        return found

    def set_affine(self, affine: Mapping[str, tuple[float, float]]) -> None:
        """Normalize what is named by other offsets and factors, ``{normalization_key: (offset, factor)}``."""
        for dataset in self._datasets:
            if dataset.normalization_key in affine:
                dataset.set_affine(affine[dataset.normalization_key])
        scaling = Scaling.of(self._offsets[:-1], [d.affine for d in self._datasets])
        self.layout = dataclasses.replace(self.layout, scaling=scaling)

    def annotated_in(self) -> dict[str, int]:
        """In how many crops each class is annotated."""
        return {c: sum(c in d.annotated for d in self._datasets) for c in self.classes}

    def __repr__(self) -> str:
        return f"CellMapMultiDataset({len(self._datasets)} crops, {len(self)} positions)"


def _identities(arrays: Any) -> dict[str, tuple[Any, ...]]:
    return {name: array.identity for name, array in arrays.items()}
