"""Options of the split inside of crops."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES
from cellmap_lightning.validation import did_you_mean, int_at_least, one_of

Position = Literal["start", "middle", "end", "random"]
#: Part of a crop for validation, unless it is set.
FRACTION = 0.2


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """Options of ``split: {blocks: ...}``, which cuts each crop into boxes for training and validation.

    Attributes:
        fraction: part of each crop for validation; by default `FRACTION`, and at least the length of a patch.
        axis: the axis along which crops are cut; by default the longest in nm, the first of equals.
        gap_nm: distance between training and validation in nm; by default, and at least for samples without a shared
            voxel, as far as a training patch with its context and augmentation reaches beyond its box.
        position: place of the validation box: ``start``, ``middle``, ``end``, or ``random``, a function of the seed and
            the name of the crop.
        count: number of validation boxes per crop: one in each of so many equal parts.
        crops: names, numbers or patterns of the crops that are cut, see `manifests.Filter`; the others are for
            training as a whole. None for all.

    Raises:
        CellMapError: an invalid value.

    Example:
        >>> BlockOptions.parse({"blocks": {"axis": "z", "fraction": 0.25}})
        BlockOptions(fraction=0.25, axis='z', gap_nm=None, position='end', count=1, crops=None)
    """

    fraction: float | None = None
    axis: str | None = None
    gap_nm: float | None = None
    position: Position = "end"
    count: int = 1
    crops: Sequence[str | int] | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and (not _is_number(self.fraction) or not 0 < self.fraction < 1):
            raise CellMapValueError(
                f"split.blocks.fraction must be a number between 0 and 1, or null; got {self.fraction!r}"
            )
        if self.axis is not None:
            one_of("split.blocks.axis", self.axis, AXES)
        if self.gap_nm is not None and (not _is_number(self.gap_nm) or not 0 <= self.gap_nm < float("inf")):
            raise CellMapValueError(f"split.blocks.gap_nm must be a length in nm, or null; got {self.gap_nm!r}")
        one_of("split.blocks.position", self.position, get_args(Position))
        int_at_least("split.blocks.count", self.count, 1)

    @classmethod
    def parse(cls, split: Any) -> "BlockOptions | None":
        """Create options from the setting ``split``; None where it is another rule.

        Args:
            split: ``blocks`` for the defaults, or ``{blocks: {fraction: ..., axis: ...}}``.

        Raises:
            CellMapKeyError: a key does not exist.
            CellMapTypeError: not a mapping.
            CellMapValueError: an invalid value.
        """
        if split == "blocks":
            return cls()
        if not isinstance(split, Mapping):
            return None
        if list(split) != ["blocks"]:
            raise CellMapKeyError(f"split must be the name of a rule, or {{blocks: {{...}}}}, got {dict(split)!r}")
        options = split["blocks"]
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise CellMapTypeError(
                f"split.blocks must be a mapping such as {{fraction: {FRACTION}, axis: z}}, got {options!r}"
            )
        names = [field.name for field in fields(cls)]
        for key in options:
            if key not in names:
                hint = did_you_mean(key, names, f"; it has {', '.join(names)}")
                raise CellMapKeyError(f"split.blocks has no {key!r}{hint}")
        return cls(**options)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
