"""The ``metrics.csv`` of Lightning's ``CSVLogger``, as series over steps."""

import csv
import math
import re
from collections.abc import Sequence
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
    """The columns of the metrics files of a run.

    Columns such as ``train_loss`` and ``val_dice_mito`` have the names ``train/loss`` and ``val/dice_mito`` here.

    Args:
        paths: the file; or those of all starts of a run, in their order. Of a step that occurs in several files, as
            steps do that are repeated after a resume, the values in the last of them count.

    Attributes:
        x_name: the column of the horizontal axis: ``step``, else ``epoch``, else ``line``, the number of the line.

    Raises:
        CellMapFileNotFoundError: a file does not exist.

    Example:
        >>> Metrics(Path("metrics.csv")).series("train/loss", "train/loss_step").values
    """

    def __init__(self, paths: Path | Sequence[Path]) -> None:
        files = [_rows(path) for path in ([paths] if isinstance(paths, Path) else paths)]
        self.names = list(dict.fromkeys(name for names, _ in files for name in names))
        lines = [row for _, rows in files for row in rows]
        self._file = np.repeat(np.arange(len(files)), [len(rows) for _, rows in files])
        self._values: dict[str, Array] = {}
        self._is_filled: dict[str, BoolArray] = {}
        # Empty cells are missing values; filled ones that are not finite were logged as such, and are counted.
        for name in self.names:
            cells = [line.get(name) or "" for line in lines]
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
            counts = self._counts(self._is_filled[name])
            lost_here = int((counts & ~np.isfinite(values)).sum())
            good = counts & np.isfinite(values) & np.isfinite(self._x)
            if good.any():
                order = np.argsort(self._x[good], kind="stable")
                return Series(self._x[good][order], values[good][order], lost_here)
            # A metric that was never finite is in several columns; do not count it twice.
            lost = max(lost, lost_here)
        return Series(np.zeros(0), np.zeros(0), lost)

    def _counts(self, filled: BoolArray) -> BoolArray:
        """Return which of the rows with a value count: those of the last file that has one at the same step."""
        last = dict(zip(self._x[filled].tolist(), self._file[filled].tolist(), strict=True))  # files are in their order
        is_last = [last.get(x) == file for x, file in zip(self._x.tolist(), self._file.tolist(), strict=True)]
        result: BoolArray = filled & np.array(is_last, dtype=bool)
        return result


def _rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the names of the columns of a file, and its rows."""
    if not path.is_file():
        raise CellMapFileNotFoundError(f"There is no metrics file {path}{similar_path(path)}")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = [name for name in reader.fieldnames or () if name]
        columns = {_slashed(name): name for name in names} | {name: name for name in names if "/" in name}
        return list(columns), [{name: line.get(column) or "" for name, column in columns.items()} for line in reader]


def _slashed(name: str) -> str:
    return re.sub("^(train|val)_", r"\1/", name)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan
