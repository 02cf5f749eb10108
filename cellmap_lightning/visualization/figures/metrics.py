"""The ``metrics.csv`` of Lightning's ``CSVLogger``, as series over steps."""

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cellmap_lightning.errors import CellMapFileNotFoundError
from cellmap_lightning.io.missing_paths import similar_path
from cellmap_lightning.visualization.figures.canvas import Array, BoolArray


@dataclass(frozen=True, eq=False)
class Series:
    """Finite values of a column; see `Metrics.series`.

    Attributes:
        steps: increasing.
        values: one per step.
        lost: number of values that are not finite.
    """

    steps: Array
    values: Array
    lost: int

    def __len__(self) -> int:
        return len(self.steps)


class Metrics:
    """The columns of a metrics file.

    Columns such as ``train_loss`` and ``val_dice_mito`` have the names ``train/loss`` and ``val/dice_mito`` here.

    Args:
        path: the file.

    Attributes:
        x_name: the column of the horizontal axis: ``step``, else ``epoch``, else ``line``, the number of the line.

    Raises:
        CellMapFileNotFoundError: the file does not exist.

    Example:
        >>> Metrics(Path("metrics.csv")).series("train/loss", "train/loss_step").values
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise CellMapFileNotFoundError(f"There is no metrics file {path}{similar_path(path)}")
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            names = [name for name in reader.fieldnames or () if name]
            columns = {_slashed(name): name for name in names} | {name: name for name in names if "/" in name}
            self.names = list(columns)
            lines = list(reader)
        self._values: dict[str, Array] = {}
        self._is_filled: dict[str, BoolArray] = {}
        # Empty cells are missing values; filled ones that are not finite were logged as such, and are counted.
        for name, column in columns.items():
            cells = [line.get(column) or "" for line in lines]
            self._values[name] = np.array([_number(cell) for cell in cells], dtype=np.float64)
            self._is_filled[name] = np.array([bool(cell.strip()) for cell in cells], dtype=bool)
        usable = [name for name in ("step", "epoch") if name in self.names and np.isfinite(self._values[name]).any()]
        self.x_name = usable[0] if usable else "line"
        self._x = self._values[usable[0]] if usable else np.arange(len(lines), dtype=np.float64)

    def series(self, *names: str) -> Series:
        """Return the first of the columns that has a finite value; an empty series if none has one."""
        lost = 0
        for name in names:
            if name not in self._values:
                continue
            values = self._values[name]
            lost_here = int((self._is_filled[name] & ~np.isfinite(values)).sum())
            good = np.isfinite(values) & np.isfinite(self._x)
            if good.any():
                order = np.argsort(self._x[good], kind="stable")
                return Series(self._x[good][order], values[good][order], lost_here)
            # A metric that was never finite is in several columns; do not count it twice.
            lost = max(lost, lost_here)
        return Series(np.zeros(0), np.zeros(0), lost)


def _slashed(name: str) -> str:
    return re.sub("^(train|val)_", r"\1/", name)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan
