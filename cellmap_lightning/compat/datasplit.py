"""`cellmap_data.datasplit`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cellmap_lightning.compat.dataset import Arrays, CellMapDataset, Counts
from cellmap_lightning.compat.multidataset import CellMapMultiDataset
from cellmap_lightning.compat.older_arguments import without_older
from cellmap_lightning.compat.spatial import spatial_transforms as as_axes
from cellmap_lightning.compat.subdataset import CellMapSubset
from cellmap_lightning.compat.transforms import Binarize, NaNtoNum
from cellmap_lightning.crops.options import LabelOptions
from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.splits.datasplit import CellMapDataSplit as DataSplit
from cellmap_lightning.splits.entries import CropRecord
from cellmap_lightning.transforms.normalization import AUTO

__all__ = ["Binarize", "CellMapDataSplit", "CellMapDataset", "CellMapMultiDataset", "CellMapSubset", "NaNtoNum"]


class CellMapDataSplit(DataSplit):
    """A `cellmap_lightning.CellMapDataSplit` with the constructor of cellmap-data: crops are opened at once.

    See docs/migration.md.

    Args:
        input_arrays: ``{name: {"shape": voxels, "scale": nm}}``.
        target_arrays: the same for the targets.
        classes: the classes; None for raw only.
        pad: read crops smaller than a patch: for both splits, or for ``"train"`` or ``"validate"``.
        datasets: ``{"train": [CellMapDataset, ...], "validate": [...]}``, or mappings as in ``dataset_dict``.
        dataset_dict: ``{"train": [{"raw": path, "gt": path}, ...], "validate": [...]}``.
        csv_path: the crops as rows of ``usage, raw, target``, or of five columns.
        spatial_transforms: of the train split.
        train_raw_value_transforms: of its raw; by default stored integers to [0, 1].
        val_raw_value_transforms: likewise of the validation split.
        target_value_transforms: of the targets of both, on stored ids; see `CellMapDataset`.
        class_relation_dict: ``{class: [classes that exclude it]}``.
        force_has_data: has no effect.
        context: has no effect.
        device: has no effect: the loader's counts.
        empty_value: NaN, as in cellmap-data of 2025: unannotated voxels are NaN in targets.
    """

    def __init__(
        self,
        input_arrays: Arrays,
        target_arrays: Arrays | None = None,
        classes: Sequence[str] | None = None,
        pad: bool | str = False,
        datasets: Mapping[str, Sequence[Any]] | None = None,
        dataset_dict: Mapping[str, Sequence[Mapping[str, str]]] | None = None,
        csv_path: str | None = None,
        spatial_transforms: Mapping[str, Any] | None = None,
        train_raw_value_transforms: Callable[..., Any] | str | None = AUTO,
        val_raw_value_transforms: Callable[..., Any] | str | None = AUTO,
        target_value_transforms: Any = None,
        class_relation_dict: Mapping[str, Any] | None = None,
        force_has_data: bool = False,
        context: Any = None,
        device: str | torch.device | None = None,
        empty_value: float = float("nan"),
    ) -> None:
        without_older("CellMapDataSplit", {"empty_value": empty_value})
        if pad not in (True, False, "train", "validate"):
            raise CellMapValueError(
                f"CellMapDataSplit: pad must be True, False, 'train' or 'validate', got {pad!r}; what was given after "
                "classes by position in 2025 is given by name"
            )
        if datasets is not None and dataset_dict is not None:
            raise CellMapTypeError("datasets and dataset_dict both list the crops; give one of them")
        given = datasets if datasets is not None else dataset_dict
        super().__init__(
            csv_path,
            given if given is not None or csv_path is not None else {},
            classes=classes or None,
            input_arrays=input_arrays,
            target_arrays=target_arrays,
            spatial_transforms=as_axes(spatial_transforms, {**input_arrays, **(target_arrays or {})}),
            labels=LabelOptions(unannotated_classes="unknown"),
        )
        self.input_arrays: dict[str, Any] = dict(input_arrays)
        self.target_arrays: dict[str, Any] = dict(target_arrays or {})
        self.pad, self.spatial_transforms = pad, spatial_transforms
        self.train_raw_value_transforms = train_raw_value_transforms
        self.val_raw_value_transforms = val_raw_value_transforms
        self.target_value_transforms, self.class_relation_dict = target_value_transforms, class_relation_dict
        self.force_has_data = force_has_data
        self.classes = list(self.classes) if self.classes is not None else None  # type: ignore[assignment]
        self._combined: dict[str, CellMapMultiDataset] = {}
        #: The crops of each split; what cannot be read is an error here, all in one table.
        self.train_datasets = self._all("train")
        self._validation_datasets = self._all("val")

    @property
    def validation_datasets(self) -> list[CellMapDataset]:
        """The crops of the validation split."""
        return self._validation_datasets

    def _all(self, split: str) -> list[CellMapDataset]:
        return list(self[split].datasets) if self.has_crops(split) else []  # type: ignore[arg-type]

    def _open(self, entry: CropRecord, split: str, plane: str) -> CellMapDataset:
        if entry.target_path is None and self.classes is not None:
            raise CellMapValueError(f"a crop for {split!r} needs a target")
        training = split == "train"
        return CellMapDataset(
            entry.input_path,
            entry.target_path,
            self.classes,
            self.input_arrays,
            self.target_arrays,
            self.pad in (True, "train" if training else "validate"),
            self.spatial_transforms if training else None,
            self.train_raw_value_transforms if training else self.val_raw_value_transforms,  # type: ignore[arg-type]
            self.target_value_transforms,
            self.class_relation_dict,
            quiet=True,
        )

    def _checked(self, dataset: Any, split: str) -> Any:
        return dataset  # whether it augments is its own affair here

    def _together(self, split: str) -> CellMapMultiDataset:
        if split not in self._combined:
            datasets = self.train_datasets if split == "train" else self.validation_datasets
            self._combined[split] = CellMapMultiDataset(datasets, self.classes, self.input_arrays, self.target_arrays)
        return self._combined[split]

    @property
    def train_datasets_combined(self) -> CellMapMultiDataset:
        """The crops of the train split as one."""
        return self._together("train")

    @property
    def validation_datasets_combined(self) -> CellMapMultiDataset:
        """The crops of the validation split as one."""
        return self._together("val")

    @property
    def validation_blocks(self) -> CellMapSubset:
        """Tiles that together cover the validation split once."""
        combined = self.validation_datasets_combined
        return CellMapSubset(combined, combined.validation_indices)

    @property
    def class_counts(self) -> dict[str, Counts]:
        """Foreground voxels of both splits; of one without crops, none."""
        none = dict.fromkeys(self.classes or (), 0.0)
        return {
            usage: self._together(split).class_counts if datasets else Counts(none, none, none)
            for usage, split, datasets in (
                ("train", "train", self.train_datasets), ("validate", "val", self.validation_datasets)
            )
        }  # fmt: skip

    def _invalidate(self) -> None:
        """Drop the joined crops; they are joined again when they are asked for."""
        for multi in self._combined.values():
            multi.close()
        self._combined = {}

    def _changed(self, datasets: Sequence[CellMapDataset], change: Callable[[CellMapDataset], None]) -> None:
        self._invalidate()
        for dataset in datasets:
            change(dataset)

    def set_raw_value_transforms(
        self, train_transforms: Callable[..., Any] | None = None, val_transforms: Callable[..., Any] | None = None
    ) -> None:
        """Exchange the transforms of raw, of both splits."""
        self.train_raw_value_transforms, self.val_raw_value_transforms = train_transforms, val_transforms
        self._changed(self.train_datasets, lambda d: d.set_raw_value_transforms(train_transforms))
        self._changed(self.validation_datasets, lambda d: d.set_raw_value_transforms(val_transforms))

    def set_target_value_transforms(self, transforms: Any) -> None:
        """Exchange the transforms of the targets, of both splits."""
        self.target_value_transforms = transforms
        both = [*self.train_datasets, *self.validation_datasets]
        self._changed(both, lambda d: d.set_target_value_transforms(transforms))

    def set_spatial_transforms(self, spatial_transforms: Mapping[str, Any] | None) -> None:
        """Exchange mirrors, transpositions and rotations of the train split."""
        self.spatial_transforms = spatial_transforms
        self._changed(self.train_datasets, lambda d: d.set_spatial_transforms(spatial_transforms))

    def set_arrays(self, arrays: Arrays, type: str = "target", usage: str = "validate") -> None:  # noqa: A002
        """Exchange the targets (or with ``type="input"`` the inputs) of the crops of one split.

        Args:
            arrays: ``{name: {"shape": voxels, "scale": nm}}``.
            type: ``target`` or ``input``.
            usage: ``train`` or ``validate``.
        """
        key = "target_arrays" if type == "target" else "input_arrays"
        datasets = self.train_datasets if usage == "train" else self.validation_datasets
        setattr(self, key, dict(arrays))
        self._changed(datasets, lambda d: d.rebuild(**{key: arrays}))

    def to(self, device: str | torch.device, non_blocking: bool = True) -> "CellMapDataSplit":
        """Has no effect: the loader's device counts."""
        return self

    def close(self) -> None:
        """Close every dataset."""
        super().close()
        for multi in self._combined.values():
            multi.close()

    def __repr__(self) -> str:
        numbers = f"train={len(self.train_datasets)}, val={len(self.validation_datasets)}"
        return f"CellMapDataSplit({numbers}, classes={list(self.classes or ())})"
