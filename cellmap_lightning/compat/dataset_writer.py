"""`cellmap_data.dataset_writer`."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cellmap_lightning.batches.arrays import InputArray
from cellmap_lightning.compat.array_writer import ImageWriter as Writers
from cellmap_lightning.compat.image import CellMapImage
from cellmap_lightning.compat.image_writer import ImageWriter, check_patch
from cellmap_lightning.compat.older_arguments import without_older
from cellmap_lightning.compat.patch_writer import CellMapDatasetWriter as Writer
from cellmap_lightning.compat.utils.geometry import box_shape, box_union
from cellmap_lightning.errors import CellMapTypeError
from cellmap_lightning.loading.dataloader import CellMapDataLoader as DataLoader

__all__ = ["CellMapDatasetWriter", "CellMapImage", "ImageWriter", "box_shape", "box_union"]


class CellMapDatasetWriter(Writer):
    """A `patch_writer.CellMapDatasetWriter` with the constructor, the attributes and the shapes of cellmap-data.

    See docs/migration.md.

    Slices along z are ``[1, y, x]``; slices along y and x keep their axis of length 1, ``[1, z, 1, x]`` and
    ``[1, z, y, 1]``, which programs squeeze for a 2D model and put back before they write.

    Args:
        raw_path: the raw multiscale group.
        target_path: the Zarr group to write, one group per class in it.
        classes: the classes that are written.
        input_arrays: ``{name: {"shape": voxels, "scale": nm}}`` of the inputs.
        target_arrays: the same of the model's output; one array.
        target_bounds: ``{target array: {axis: [lower, upper]}}`` in nm; None for the whole volume.
        overwrite: replace what is there.
        device: no effect: batches are on the CPU.
        raw_value_transforms: a callable on stored raw ``[1, z, y, x]`` in its stored type, so that
            ``ToDtype(scale=True)`` gives [0, 1], as the default of `CellMapDataSplit` does; None for stored values.
        model_classes: the channels of the model's output, where it gives more than ``classes``.
        axis_order: ``zyx``.
        context: no effect.
        **more: see `patch_writer.CellMapDatasetWriter`.
    """

    image_writer: type[Writers] = ImageWriter

    def __init__(
        self,
        raw_path: str | None = None,
        target_path: str | None = None,
        classes: Sequence[str] | None = None,
        input_arrays: Any = None,
        target_arrays: Any = None,
        target_bounds: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
        overwrite: bool = False,
        device: Any = None,
        raw_value_transforms: Any = None,
        model_classes: Sequence[str] | None = None,
        axis_order: str = "zyx",
        context: Any = None,
        **more: Any,
    ) -> None:
        if not isinstance(overwrite, bool):
            raise CellMapTypeError(
                f"CellMapDatasetWriter: overwrite must be True or False, got {overwrite!r}; what was given after "
                "target_bounds by position in 2025 is given by name"
            )
        empty = {name: more.pop(name) for name in ("empty_value",) if name in more}
        super().__init__(
            more.pop("input_path", raw_path), target_path, classes, input_arrays, target_arrays, target_bounds,
            raw_value_transforms=raw_value_transforms, overwrite=overwrite, model_classes=model_classes,
            **without_older("CellMapDatasetWriter", {**more, "axis_order": axis_order}), **empty,
        )  # fmt: skip
        self.classes, self.model_classes = list(self.classes), list(self.model_classes)  # type: ignore[assignment]
        self.input_arrays, self.target_arrays = dict(input_arrays), dict(target_arrays)
        self.target_bounds, self.overwrite = dict(target_bounds or {}), overwrite
        self.raw_value_transforms, self.axis_order, self.context = raw_value_transforms, axis_order, context

    @cached_property
    def input_sources(self) -> dict[str, CellMapImage]:
        """An image of each input."""
        return {
            name: CellMapImage(self.raw_path, name, s["scale"], s["shape"], True, 0.0, "linear")
            for name, s in self.input_arrays.items()
        }

    def __setitem__(self, idx: Any, arrays: Mapping[str, Any]) -> None:
        """Write what a model gives for the patch at a position, or for several.

        Raises:
            CellMapTypeError: a single number, or values that are no arrays.
        """
        written = {name: v for name, v in arrays.items() if name in (self.array, *self.model_classes)}
        for name, values in written.items():
            for value in values.values() if isinstance(values, Mapping) else (values,):
                check_patch(value, name)
                if not isinstance(value, torch.Tensor | np.ndarray | Sequence) or isinstance(value, str):
                    raise CellMapTypeError(
                        f"{name}: Unsupported batched value type {type(value).__name__}; give an array or a tensor, "
                        "for several positions with a first axis for them"
                    )
        super().__setitem__(idx, arrays)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """Return the inputs at a position, and ``idx``."""
        return _with_thin_axes(super().__getitem__(idx), self._dataset.layout.inputs, 1)

    def _loader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return _Loader(*args, **kwargs)


class _Loader(DataLoader):
    """Batches of a writer, in the same shapes."""

    def __iter__(self) -> Any:
        inputs = self.source.layout.inputs
        batches: Iterator[dict[str, torch.Tensor]] = super().__iter__()
        return (_with_thin_axes(batch, inputs, 2) for batch in batches)


def _with_thin_axes(
    arrays: Mapping[str, torch.Tensor], inputs: Mapping[str, InputArray], lead: int
) -> dict[str, torch.Tensor]:
    """Put back the axes of length 1 behind the first axis in space.

    Args:
        arrays: a sample, or a batch.
        inputs: descriptions of the inputs in it.
        lead: axes before those in space, the last one being the channel.
    """
    found = dict(arrays)
    for name, spec in inputs.items():
        shape = spec.window.shape
        if 1 in shape and shape[0] != 1 and not spec.slices_as_channels:
            found[name] = found[name].reshape(*found[name].shape[:lead], *shape)
    return found
