"""The bytes of a batch, known from its description alone, before anything is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.sampling.arrays import ArraySpecs, parse_arrays, parse_classes
from cellmap_lightning.transforms.targets import packed_bytes

_FLOAT32 = 4


@dataclass(frozen=True)
class FormMemory:
    """Bytes of one form of a batch.

    Attributes:
        arrays: bytes of each array, inputs and targets; ``idx`` is not counted.
    """

    arrays: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(self.arrays.values())

    @property
    def total_mb(self) -> float:
        """The same in MiB."""
        return self.total_bytes / 2**20


@dataclass(frozen=True)
class BatchMemory(FormMemory):
    """Bytes of a finished batch, and of its compact form.

    Attributes:
        compact: the form that travels to the device.
    """

    compact: FormMemory


def batch_memory(
    input_arrays: ArraySpecs,
    target_arrays: ArraySpecs | None = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 1,
    *,
    raw_dtype: npt.DTypeLike = np.uint8,
) -> BatchMemory:
    """The bytes of a batch.

    Finished, every array is float32, a target with one channel per class: for ``n`` samples,
    ``4 n (sum of input voxels + sum of target voxels x classes)``, the formula of cellmap-data 2025.7. Compact, inputs
    have the stored type and a target has two bits per class and voxel, in whole bytes.

    Args:
        input_arrays: ``{name: {"shape": voxels, "scale": nm}}``.
        target_arrays: the same for the targets; None when there are none.
        classes: names of the classes; None when there are no targets.
        batch_size: samples.
        raw_dtype: the stored type of the inputs.

    Returns:
        Bytes per array and in total, exactly those of the real tensors.
    """
    inputs = parse_arrays(input_arrays, "input_arrays", "input")
    targets = parse_arrays(target_arrays, "target_arrays", "output") if target_arrays and classes else {}
    count = len(parse_classes(classes)) if classes else 0
    finished: dict[str, Any] = {}
    compact: dict[str, Any] = {}
    for name, window in inputs.items():
        voxels = batch_size * int(np.prod(window.shape))
        finished[name] = voxels * _FLOAT32
        compact[name] = voxels * np.dtype(raw_dtype).itemsize
    for name, window in targets.items():
        voxels = batch_size * int(np.prod(window.shape))
        finished[name] = voxels * count * _FLOAT32
        compact[name] = voxels * packed_bytes(count)
    return BatchMemory(finished, FormMemory(compact))
