"""`cellmap_data.multidataset`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cellmap_lightning.compat.dataset import Arrays, CellMapDataset, Counts
from cellmap_lightning.datasets.multidataset import CellMapMultiDataset as MultiDataset
from cellmap_lightning.errors import CellMapTypeError, CellMapValueError


class CellMapMultiDataset(MultiDataset):
    """A `cellmap_lightning.CellMapMultiDataset` with the constructor of cellmap-data; any voxel is equally likely.

    See docs/migration.md.

    Args:
        datasets: the crops.
        classes: their classes.
        input_arrays: their inputs.
        target_arrays: their targets.

    Raises:
        CellMapValueError: the crops were made for other classes.
    """

    def __init__(
        self,
        datasets: Sequence[CellMapDataset],
        classes: Sequence[str] | None = None,
        input_arrays: Arrays | None = None,
        target_arrays: Arrays | None = None,
    ) -> None:
        if any(isinstance(dataset, str) for dataset in datasets):
            raise CellMapTypeError(
                f"CellMapMultiDataset: datasets must be crops, got {datasets!r}; the classes came first in 2025, and "
                "datasets come first now: give arguments by name"
            )
        super().__init__(datasets, "uniform")
        if classes is not None and list(classes) != self.classes:
            raise CellMapValueError(f"the crops were made for {self.classes}, not for {list(classes)}")
        first = datasets[0]
        self.input_arrays = dict(input_arrays if input_arrays is not None else first.input_arrays)
        self.target_arrays = dict(target_arrays if target_arrays is not None else first.target_arrays)

    @property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Names of the classes, in the order of the targets' channels."""
        return list(self.layout.classes)

    @property
    def cumulative_sizes(self) -> list[int]:
        """Number of positions up to the end of each crop, as in `torch.utils.data.ConcatDataset`."""
        return self._offsets[1:]

    @property
    def class_counts(self) -> Counts:
        """Foreground voxels over all crops; see `Counts`."""
        found = super().class_counts
        whole: list[Any] = [dataset.class_counts["totals_total"] for dataset in self.datasets]
        return Counts(found, found, self._summed(whole))

    def verify(self) -> bool:
        """Return True if there is a position."""
        return len(self) > 0

    def rebuild(self, change: Callable[[CellMapDataset], None]) -> None:
        """Change every crop, and join them again."""
        datasets, arrays = list(self.datasets), (self.input_arrays, self.target_arrays)
        classes = self.classes
        self.close()
        for dataset in datasets:
            assert isinstance(dataset, CellMapDataset)
            change(dataset)
        self.__dict__.clear()
        self.__init__(datasets, classes, *arrays)  # type: ignore[misc]

    def set_raw_value_transforms(self, transforms: Callable[..., Any] | None) -> None:
        """Exchange the transform of raw."""
        self.rebuild(lambda dataset: dataset.set_raw_value_transforms(transforms))

    def set_target_value_transforms(self, transforms: Any) -> None:
        """Exchange the transform of targets."""
        self.rebuild(lambda dataset: dataset.set_target_value_transforms(transforms))

    def set_spatial_transforms(self, transforms: Mapping[str, Any] | None) -> None:
        """Exchange mirrors, transpositions and rotations."""
        self.rebuild(lambda dataset: dataset.set_spatial_transforms(transforms))

    def to(self, device: str | torch.device, non_blocking: bool = True) -> "CellMapMultiDataset":
        """Has no effect: the loader's device counts."""
        return self
