"""`cellmap_data.dataset`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cellmap_lightning.compat.empty_image import EmptyImage
from cellmap_lightning.compat.image import CellMapImage
from cellmap_lightning.compat.older_arguments import seed_of, without_older
from cellmap_lightning.compat.older_attributes import OlderAttributes
from cellmap_lightning.compat.spatial import Arrays
from cellmap_lightning.compat.spatial import spatial_transforms as as_axes
from cellmap_lightning.compat.utils.geometry import box_intersection, box_shape
from cellmap_lightning.compat.utils.misc import split_target_path
from cellmap_lightning.compat.value_transforms import on_floats
from cellmap_lightning.crops.options import CropOptions
from cellmap_lightning.crops.unannotated import report_unannotated
from cellmap_lightning.datasets.dataset import CellMapDataset as Dataset
from cellmap_lightning.errors import CellMapTypeError
from cellmap_lightning.geometry.lattice import AXES

__all__ = [
    "Arrays",
    "CellMapDataset",
    "CellMapImage",
    "Counts",
    "EmptyImage",
    "box_intersection",
    "box_shape",
    "split_target_path",
]


class Counts(dict[str, Any]):
    """Foreground voxels by class, and once more under ``"totals"``.

    Args:
        foreground: ``{class: voxels}`` of what is annotated.
        totals: the same of all classes.
        totals_total: ``{class: voxels of the annotated volume}``.

    Example:
        >>> counts = Counts({"mito": 3.0}, {"mito": 3.0}, {"mito": 64.0})
        >>> counts["mito"], counts["totals_total"], list(counts)
        (3.0, {'mito': 64.0}, ['mito'])
    """

    def __init__(
        self, foreground: Mapping[str, float], totals: Mapping[str, float], totals_total: Mapping[str, float]
    ) -> None:
        super().__init__(foreground)
        self._more = {"totals": dict(totals), "totals_total": dict(totals_total)}

    def __missing__(self, key: str) -> dict[str, float]:
        return self._more[key]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self._more

    def get(self, key: str, default: Any = None) -> Any:
        """As `dict.get`, for ``totals`` and ``totals_total`` too."""
        try:
            return self[key]
        except KeyError:
            return default


def _as_ids(arrays: Arrays | None) -> Arrays | None:
    """Return target arrays of stored ids, on which value transforms of cellmap-data are defined."""
    return {name: {"kind": "ids", **spec} for name, spec in arrays.items()} if arrays else arrays


class CellMapDataset(OlderAttributes, Dataset):
    """A `cellmap_lightning.CellMapDataset` with the constructor of cellmap-data; see docs/migration.md.

    Args:
        raw_path: the raw multiscale group.
        target_path: the label groups, ``".../crop1/[mito,er]"``.
        classes: the targets' channels, in order.
        input_arrays: ``{name: {"shape": voxels, "scale": nm}}``.
        target_arrays: the same for the targets.
        pad: read crops smaller than a patch.
        spatial_transforms: mirrors, transpositions and rotations; with any, samples are augmented.
        raw_value_transforms: a callable on stored raw as float32 ``[z, y, x]``; None for these values themselves.
        target_value_transforms: a callable on stored ids as float32 ``[z, y, x]``, 0 in the background and NaN where
            unannotated, or one per class. Without any, targets are 0, 1 and NaN.
        class_relation_dict: ``{class: [classes that exclude it]}``.
        force_has_data: has no effect: a crop that cannot be read is an error.
        device: has no effect: the loader's counts.
        seed: of everything random; None for 0.
        rng: gives the seed, as in cellmap-data of 2025.
        **more: see `cellmap_lightning.CellMapDataset`.

    A class in the bracket that has no folder is not annotated, and a warning names it; ``quiet`` leaves that to the
    split that the crop belongs to.
    """

    def __init__(
        self,
        raw_path: str,
        target_path: str | None,
        classes: Sequence[str] | None,
        input_arrays: Arrays,
        target_arrays: Arrays | None = None,
        pad: bool = False,
        spatial_transforms: Mapping[str, Any] | None = None,
        raw_value_transforms: Callable[..., Any] | None = None,
        target_value_transforms: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = None,
        class_relation_dict: Mapping[str, Any] | None = None,
        force_has_data: bool = False,
        device: str | torch.device | None = None,
        seed: int | None = None,
        rng: torch.Generator | None = None,
        **more: Any,
    ) -> None:
        if not isinstance(pad, bool):
            raise CellMapTypeError(
                f"CellMapDataset: pad must be True or False, got {pad!r}; what was given after target_arrays by "
                "position in 2025 is given by name"
            )
        context = more.get("context")
        more, seed = without_older("CellMapDataset", more), seed_of(rng, seed)
        self._arguments = {
            "raw_path": raw_path,
            "target_path": target_path,
            "classes": classes,
            "input_arrays": input_arrays,
            "target_arrays": target_arrays,
            "pad": pad,
            "spatial_transforms": spatial_transforms,
            "raw_value_transforms": raw_value_transforms,
            "target_value_transforms": target_value_transforms,
            "class_relation_dict": class_relation_dict,
            "force_has_data": force_has_data,
            "seed": seed,
            "context": context,
            **more,
        }
        quiet = more.pop("quiet", False)
        super().__init__(
            raw_path,
            target_path,
            classes,
            input_arrays,
            target_arrays if target_value_transforms is None else _as_ids(target_arrays),
            as_axes(spatial_transforms, {**input_arrays, **(target_arrays or {})}),
            more.pop("is_train", bool(spatial_transforms)),
            seed,
            more.pop("plane", "xy"),
            *CropOptions.of(
                pad=pad,
                raw_value_transforms=on_floats(raw_value_transforms),
                target_value_transforms=target_value_transforms,
                class_relation_dict=class_relation_dict,
                **{"unannotated_classes": "unknown", **more},
            ),
        )
        if self.crop.without_folder and not quiet:
            report_unannotated(self.label, [], [], {name: [self.label] for name in self.crop.without_folder})
        self.context, self.pad = context, pad
        self.raw_path, self.raw_only = self.input_path, not classes
        self.spatial_transforms = spatial_transforms
        self.input_arrays, self.target_arrays = dict(input_arrays), dict(target_arrays or {})
        self.spatial_transforms_config = spatial_transforms
        self.raw_value_transforms, self.target_value_transforms = raw_value_transforms, target_value_transforms
        self.class_relation_dict, self.force_has_data = class_relation_dict, force_has_data

    @property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Names of the classes, in the order of the targets' channels."""
        return list(self.layout.classes)

    def rebuild(self, **changed: Any) -> None:
        """Build the dataset again with some arguments changed."""
        arguments = self._arguments | changed
        self.close()
        self.__dict__.clear()  # what was computed goes too
        self.__init__(**arguments)  # type: ignore[misc]

    def set_raw_value_transforms(self, transforms: Callable[..., Any] | None) -> None:
        """Exchange the transform of raw."""
        self.rebuild(raw_value_transforms=transforms)

    def set_target_value_transforms(self, transforms: Any) -> None:
        """Exchange the transform of targets."""
        self.rebuild(target_value_transforms=transforms)

    def set_spatial_transforms(self, transforms: Mapping[str, Any] | None) -> None:
        """Exchange mirrors, transpositions and rotations."""
        self.rebuild(spatial_transforms=transforms)

    @property
    def bounding_box(self) -> dict[str, list[float]]:
        """The box of the crop, ``{axis: [lower, upper]}`` in nm."""
        return self.box.as_dict()

    @property
    def sampling_box(self) -> dict[str, list[float]]:
        """Lowest and highest centre of a patch, ``{axis: [lower, upper]}`` in nm."""
        return self.placement.centers.as_dict()

    @property
    def input_sources(self) -> dict[str, CellMapImage]:
        """An image of each input."""
        path = self.input_path
        return {
            name: CellMapImage(path, name, s["scale"], s["shape"], self.pad, 0.0, "linear")
            for name, s in self.input_arrays.items()
        }

    @property
    def target_sources(self) -> dict[str, CellMapImage | EmptyImage]:
        """An image of each class, for the first target; unannotated classes are empty."""
        found: dict[str, CellMapImage | EmptyImage] = {}
        spec = next(iter(self.target_arrays.values()), None)
        for name in self.classes if spec is not None and self.target_path is not None else ():
            if name in self.annotated:
                path = str(self.target_path.of(name))  # type: ignore[union-attr]
                found[name] = CellMapImage(path, name, spec["scale"], spec["shape"], self.pad)  # type: ignore[index]
            else:
                found[name] = EmptyImage("", name, spec["scale"], spec["shape"])  # type: ignore[index]
        return found

    @property
    def class_counts(self) -> Counts:
        """Foreground voxels; see `Counts`."""
        found, whole = super().class_counts, dict.fromkeys(self.classes, 0.0)
        for name in found:
            finest, window = self.crop.label_images[name].finest, self.crop.target_window
            whole[name] = float(np.prod(finest.array.shape) * np.prod(finest.scale) / np.prod(window.scale))
        return Counts(found, dict.fromkeys(self.classes, 0.0) | found, whole)

    def get_indices(self, chunk_size: Mapping[str, float]) -> list[int]:
        """Positions that are a step apart along each axis, the last one included.

        Args:
            chunk_size: the step, ``{axis: nm}``; without an axis, a voxel.
        """
        along = []
        for axis, step, count in zip(AXES, self.placement.step, self.placement.counts, strict=True):
            stride = max(1, round(chunk_size.get(axis, step) / step))
            along.append(sorted({*range(0, count, stride), count - 1}))
        grid = np.meshgrid(*along, indexing="ij")
        return [int(n) for n in np.ravel_multi_index(grid, self.placement.counts).ravel()]

    def verify(self) -> bool:
        """Return True: the constructor refuses a crop without a position."""
        return len(self) > 0

    def to(self, device: str | torch.device, non_blocking: bool = True) -> "CellMapDataset":
        """Has no effect: the loader's device counts."""
        return self
