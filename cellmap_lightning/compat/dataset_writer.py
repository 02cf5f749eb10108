"""`cellmap_data.dataset_writer`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from cellmap_lightning.batches.arrays import InputArray
from cellmap_lightning.loading.dataloader import CellMapDataLoader as DataLoader
from cellmap_lightning.prediction.dataset_writer import CellMapDatasetWriter as DatasetWriter


class CellMapDatasetWriter(DatasetWriter):
    """A `cellmap_lightning.CellMapDatasetWriter` whose inputs have the shapes of cellmap-data.

    Slices along z are ``[1, y, x]``; slices along y and x keep their axis of length 1, ``[1, z, 1, x]`` and
    ``[1, z, y, 1]``, which programs squeeze for a 2D model and put back before they write.
    """

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
        lead: axes before those in space, of which the last one is the channel.
    """
    found = dict(arrays)
    for name, spec in inputs.items():
        shape = spec.window.shape
        if 1 in shape and shape[0] != 1 and not spec.slices_as_channels:
            found[name] = found[name].reshape(*found[name].shape[:lead], *shape)
    return found
