"""A dataset over many crops."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cellmap_lightning.cache.region_store import RegionStore
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.datasets.source import SampleSource, overrides_items
from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.runtime.thread_pool import ReadPool
from cellmap_lightning.sampling.crop_table import CropTable
from cellmap_lightning.sampling.strategies import parse_strategy
from cellmap_lightning.transforms.normalization import Scaling
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)


class CellMapMultiDataset(SampleSource):
    """A dataset over many crops with the same classes and arrays, which share one thread pool and one cache.

    Args:
        datasets: the crops, all with the same classes, arrays and value transforms.
        strategy: sampling strategy: ``mix``, ``uniform``, ``per_crop``, ``weighted``, ``class_balanced`` or
            ``foreground``, or ``{name: one of them, and its options}``; see docs/sampling.md.
        balance_datasets: make raw volumes equally likely, regardless of the number and size of their crops.
        purpose: the use of the crops in log lines, such as ``validation``; by default ``training`` where they are made
            for it.

    Raises:
        CellMapValueError: there are no datasets, or they have different classes, arrays or options.
        CellMapKeyError: a strategy, or a crop or class that it names, does not exist.

    Example:
        >>> dataset = CellMapMultiDataset([crop1, crop2], strategy="class_balanced")
        >>> batch = dataset.read(dataset.draw(range(4), shuffle=True, seed=0)).finish()  # doctest: +SKIP
    """

    def __init__(
        self,
        datasets: Sequence[CellMapDataset],
        strategy: Any = "mix",
        balance_datasets: bool = False,
        purpose: str | None = None,
    ) -> None:
        _check_joinable(datasets)
        self._datasets = tuple(datasets)
        self._purpose = purpose or ("training" if datasets[0].is_train else None)
        first = self._datasets[0]
        crops = [dataset.crop for dataset in self._datasets]
        dtypes = {crop.raw_dtype for crop in crops}
        layout = dataclasses.replace(
            first.layout,
            raw_dtype=dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32),
            id_dtype=max((d.layout.id_dtype for d in self._datasets), key=lambda kind: kind.itemsize),
        )
        pool = ReadPool(max(d.max_workers for d in self._datasets))
        store = RegionStore(first.cache, max(d.cache_bytes or 0 for d in self._datasets) or None)
        super().__init__(crops, layout, first.seed, first.is_train, first.spatial, pool, store)
        self._scale()
        self.crop_table = CropTable(crops, self.classes, bool(balance_datasets))
        self.strategy = parse_strategy(strategy).bind(self.crop_table)
        if self.is_train and not self.strategy.uses_weights and any(crop.weight is not None for crop in crops):
            log.warning("crops have weights, and the strategy %r does not use them; weighted does", self.strategy)
        for dataset in self._datasets:
            dataset.share(pool, store)
        annotated = ", ".join(f"{name} {number}" for name, number in self.annotated_in().items() if number)
        log.info(
            "%s%s; %s",
            self.describe(),
            f"; crops that annotate each class: {annotated}" if annotated else "",
            plural(self.max_workers, "reading thread"),
        )  # fmt: skip

    def describe(self) -> str:
        """Return the number of crops, their use and the number of positions, for log lines."""
        purpose = f" for {self._purpose}" if self._purpose else ""
        return f"{plural(len(self.crops), 'crop')}{purpose}, {plural(len(self), 'position')} of a patch"

    def _scale(self) -> None:
        scaling = Scaling.of(self.first_positions, [crop.raw.affine for crop in self.crops])
        self.layout = dataclasses.replace(self.layout, scaling=scaling)

    def overriding_types(self) -> list[str]:
        """Names of the classes of user code, among this dataset and its parts, that override ``__getitem__``."""
        parts = {type(dataset).__name__ for dataset in self._datasets if overrides_items(dataset)}
        return sorted({*super().overriding_types(), *parts})

    def _overriding(self, number: int) -> SampleSource | None:
        dataset = self._datasets[number]
        return dataset if overrides_items(dataset) else None

    @property
    def datasets(self) -> Sequence[CellMapDataset]:
        """The crops, in the order of the positions."""
        return self._datasets

    def set_affine(self, affine: Mapping[str, tuple[float, float]]) -> None:
        """Replace offsets and factors of the normalization, ``{normalization_key: (offset, factor)}``."""
        for dataset in self._datasets:
            key = dataset.crop.raw.normalization_key
            if key in affine:
                dataset.set_affine(affine[key])
        self._scale()

    def annotated_in(self) -> dict[str, int]:
        """Return the number of crops in which each class is annotated."""
        return {c: sum(c in crop.annotated for crop in self.crops) for c in self.classes}


def _check_joinable(datasets: Sequence[CellMapDataset]) -> None:
    """Check that there are datasets, and that they share what `_shared_settings` lists.

    Raises:
        CellMapTypeError: one is no `CellMapDataset`.
        CellMapValueError: there are none, or two differ.
    """
    if not datasets:
        raise CellMapValueError("a CellMapMultiDataset needs at least one dataset")
    for dataset in datasets:
        if not isinstance(dataset, CellMapDataset):
            raise CellMapTypeError(f"a CellMapMultiDataset joins CellMapDatasets, got {type(dataset).__name__}")
    first = datasets[0]
    for other in datasets[1:]:
        for name, a, b in _shared_settings(first, other):
            if a != b:
                raise CellMapValueError(f"{other.label} and {first.label} differ in their {name}: {b} and {a}")


def _shared_settings(first: CellMapDataset, other: CellMapDataset) -> list[tuple[str, Any, Any]]:
    """Return the settings that two datasets must share: their names, and the values of both."""
    a, b = first.layout, other.layout
    return [
        ("classes", a.classes, b.classes),
        ("inputs", _identities(a.inputs), _identities(b.inputs)),
        ("targets", _identities(a.targets), _identities(b.targets)),
        ("is_train", first.is_train, other.is_train),
        ("seed", first.seed, other.seed),
        ("nan_targets", a.nan_targets, b.nan_targets),
        ("spatial_transforms", first.spatial, other.spatial),
        ("intensity_transforms", a.augment, b.augment),
        ("raw_value_transforms", a.raw_transforms, b.raw_transforms),
        ("target_value_transforms", a.target_transforms, b.target_transforms),
        ("cache", first.cache, other.cache),
        # Crops may need chunk caches of different sizes.
        ("cache_bytes", first.cache != "chunks" and first.cache_bytes, other.cache != "chunks" and other.cache_bytes),
    ]


def _identities(arrays: Any) -> dict[str, tuple[Any, ...]]:
    return {name: array.identity for name, array in arrays.items()}
