"""`cellmap_data.subdataset`, of 2025."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import Subset

from cellmap_lightning.compat.dataset import CellMapDataset
from cellmap_lightning.compat.multidataset import CellMapMultiDataset
from cellmap_lightning.compat.mutable_sampler import MutableSubsetRandomSampler
from cellmap_lightning.compat.utils.misc import min_redundant_inds


class CellMapSubset(Subset[dict[str, torch.Tensor]]):
    """Some positions of a dataset; see docs/migration.md.

    Args:
        dataset: the dataset.
        indices: the positions.
    """

    dataset: CellMapDataset | CellMapMultiDataset
    indices: Sequence[int]

    def __init__(self, dataset: CellMapDataset | CellMapMultiDataset, indices: Sequence[int]) -> None:
        super().__init__(dataset, indices)

    def __getattr__(self, name: str) -> Any:
        # Classes, arrays, counts and weights are the dataset's.
        if name.startswith("_") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def get_random_subset_indices(
        self, num_samples: int, rng: torch.Generator | None = None, **kwargs: Any
    ) -> Sequence[int]:
        """Return random positions of the dataset among those of the subset.

        Args:
            num_samples: how many; each is there once before any is there twice, which is warned of.
            rng: generator of the draw.
            **kwargs: no effect.
        """
        if num_samples > len(self.indices):
            warnings.warn(
                f"CellMapSubset: Sampling with replacement: {num_samples} samples of {len(self.indices)} positions; "
                "ask for at most as many samples as there are positions",
                UserWarning,
                stacklevel=2,
            )
        return [self.indices[n] for n in min_redundant_inds(len(self.indices), num_samples, False, rng).tolist()]

    def get_subset_random_sampler(
        self, num_samples: int, rng: torch.Generator | None = None
    ) -> MutableSubsetRandomSampler:
        """Random positions of the subset, counted in it; others after `refresh`.

        Args:
            num_samples: how many; each is there once before any is there twice.
            rng: generator of the draw.
        """
        draw = partial(min_redundant_inds, len(self.indices), num_samples, False, rng)
        return MutableSubsetRandomSampler(lambda: draw().tolist(), rng)

    def set_raw_value_transforms(self, transforms: Callable[..., Any] | None) -> None:
        """Exchange the transform of raw."""
        self.dataset.set_raw_value_transforms(transforms)

    def set_target_value_transforms(self, transforms: Any) -> None:
        """Exchange the transform of targets."""
        self.dataset.set_target_value_transforms(transforms)

    def set_spatial_transforms(self, transforms: Mapping[str, Any] | None) -> None:
        """Exchange mirrors, transpositions and rotations."""
        self.dataset.set_spatial_transforms(transforms)

    def to(self, device: str | torch.device, non_blocking: bool = True) -> "CellMapSubset":
        """Has no effect: the loader's device counts."""
        return self
