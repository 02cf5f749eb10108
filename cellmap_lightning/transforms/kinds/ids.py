"""Targets that are the stored instance ids."""

from typing import Any

import numpy as np
import torch

from cellmap_lightning.transforms.kinds.kind import UNKNOWN_ID, TargetKind


class Instances(TargetKind):
    """The stored instance id of each class, 0 where it is absent, -1 where unannotated; see docs/targets.md."""

    name = "instances"
    reads = "ids"
    unknown = UNKNOWN_ID
    channels_first = True
    dtype = torch.int64

    def compact(self, id_dtype: np.dtype[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return the shape of ids, and their signed type."""
        return (self.classes, *self.window.shape), id_dtype

    def encode(self, stored: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """Copy the ids of a crop whose type is narrower than that of the batch."""
        out[...] = stored

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Convert the ids to int64."""
        return compact.to(torch.int64)


class StoredIds(Instances):
    """The stored id of each class as float32, 0 where it is absent, NaN where unannotated; see docs/targets.md.

    Value transforms are applied to it. Ids above 2^24 are rounded.
    """

    name = "ids"
    dtype = torch.float32

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Convert the ids to float32."""
        return compact.to(torch.float32).masked_fill_(compact == UNKNOWN_ID, float("nan"))
