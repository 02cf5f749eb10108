"""Options of the splits: division of crops into training, validation and test, and sampling of training data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.sampling.strategies import parse_strategy
from cellmap_lightning.splits.block_options import BlockOptions
from cellmap_lightning.splits.leakage import Leakage, check_leakage_rule
from cellmap_lightning.splits.rules import SplitRule, check_split


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Options of the division of crops into splits, and of the sampling of the train split; see docs/data.md.

    Attributes:
        split: ``csv``: the usages in the CSV, or in ``datasets``. Otherwise its crops for train and val are divided by
            a rule, see `rules.assign`: ``random``, ``stratified``, ``by_dataset``, ``leave_one_dataset_out`` or
            ``kfold``; those for test and predict stay. ``blocks``, or ``{blocks: {...}}`` with `BlockOptions`, cuts
            each crop for train into boxes for training and validation.
        val_fraction: the share of these crops for validation; not used by ``kfold`` and ``leave_one_dataset_out``.
        fold: number of the fold, or of the dataset in alphabetical order, for validation.
        n_folds: number of folds of ``kfold``.
        manifest: the challenge's list of the crops under ``search_path``, see `manifests.read_manifest`; by default,
            all crops that exist.
        only_datasets: names or patterns of the datasets used for train, val and test.
        only_crops: names, numbers or patterns of the crops used for them, see `manifests.Filter`.
        planes: planes of flat patches; each crop has a dataset per plane.
        strategy: sampling strategy of the train split, see `CellMapMultiDataset`.
        balance_datasets: see `CellMapMultiDataset`.
        leakage: annotated crops of the train split that also validate or test: ``error``, ``warn`` or ``ignore``.
            Crops that overlap in part are logged as a warning unless it is ``ignore``.
        held_out: a manifest of crops that must not be trained on, such as the challenge's
            ``test_crop_manifest.csv``; ``leakage`` applies to them too.

    Raises:
        CellMapError: an invalid value.
    """

    split: SplitRule | Mapping[str, Any] = "csv"
    val_fraction: float = 0.1
    fold: int = 0
    n_folds: int = 5
    manifest: str | Path | None = None
    only_datasets: Sequence[str] | None = None
    only_crops: Sequence[str | int] | None = None
    planes: Sequence[str] = ("xy",)
    strategy: Any = "mix"
    balance_datasets: bool = False
    leakage: Leakage = "error"
    held_out: str | Path | None = None

    def __post_init__(self) -> None:
        check_leakage_rule(self.leakage)
        check_split(self.rule, self.val_fraction, self.fold, self.n_folds)
        if self.blocks is not None:
            self._check_blocks()
        parse_strategy(self.strategy)
        planes = self.planes
        if isinstance(planes, str) or not planes or len(set(planes)) != len(list(planes)):
            raise CellMapValueError(f"planes must name xy, xz and yz at most once, got {planes!r}")

    @cached_property
    def blocks(self) -> BlockOptions | None:
        """Options of the split inside of crops; None for another rule."""
        return BlockOptions.parse(self.split)

    @property
    def rule(self) -> SplitRule:
        """Name of the rule."""
        if self.blocks is not None:
            return "blocks"
        return self.split  # type: ignore[return-value]

    def _check_blocks(self) -> None:
        """Refuse options of other rules beside ``blocks``, which would have no effect."""
        for name, setting in (("fold", "split=kfold"), ("n_folds", "split=kfold"), ("val_fraction", "split=random")):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value != default:
                instead = "; set split.blocks.fraction" if name == "val_fraction" else ""
                raise CellMapValueError(
                    f"{name}={value} is an option of rules such as {setting}, and split=blocks does not use it; leave "
                    f"it at {default}{instead}"
                )
