"""Columns of a CSV of crops: the separator, the header, and the cells of a row in the order that is read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.validation import did_you_mean

_NAMED = ("usage", "raw", "target")
_BRACKETS = re.compile(r"\[[^\]]*\]|\{[^}]*\}")
#: A bracket or brace that a cell opens and does not close, and one that it closes and does not open.
_OPENS, _CLOSES = re.compile(r"[\[{][^\]}]*$"), re.compile(r"^[^\[{]*[\]}]")
#: Quotes of word processors, and single ones, none of which keep the commas of a cell together.
_OTHER_QUOTES, _SINGLE_QUOTES = "“”„‟«»‘’‚‛", "'`"


def delimiter(text: str) -> str:
    """Return the character between the cells: a comma, or the semicolon or tab of a spreadsheet's export."""
    lines = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    # Not inside quotes or brackets, where classes have commas between them.
    first = _BRACKETS.sub("", "".join(next(lines, "").split('"')[::2]))
    return next((c for c in ";\t" if c in first and "," not in first), ",")


def check_quotes(cells: Sequence[str]) -> None:
    """Check that the quotes of a row are those of a CSV, and stand around the cells with commas.

    Args:
        cells: the cells of the row, without blanks around them.

    Raises:
        CellMapValueError: a quote is not closed, is one of a word processor, or is missing around a bracket.
    """
    for cell in cells:
        first, *more = cell.splitlines() or [""]
        if more:
            raise CellMapValueError(
                f'the quote " before {first!r} is not closed, so that its cell has {len(more)} more '
                f'line{"s" * (len(more) > 1)}; close it, as in "…/crop1/[mito,er]"'
            )
    wrong = next((cell[0] for cell in cells if _is_quoted_otherwise(cell)), None)
    if wrong is not None:
        raise CellMapValueError(f'the quote {wrong} is not one of a CSV; use ", as in "…/crop1/[mito,er]"')
    begin = next((number for number, cell in enumerate(cells) if _OPENS.search(cell)), len(cells))
    end = next((n for n, cell in enumerate(cells) if n > begin and _CLOSES.match(cell)), None)
    if end is not None or _opens_classes(cells):
        text = ",".join(cells[begin : end + 1 if end is not None else begin + 1])
        raise CellMapValueError(f'a bracket with commas needs quotes around its cell, as in "{text}"')


def _is_quoted_otherwise(cell: str) -> bool:
    """Return True for a cell in quotes of a word processor, or for a path or a part of a cell in single ones."""
    first = cell[:1]
    if not first or first not in _OTHER_QUOTES + _SINGLE_QUOTES:
        return False
    return first in _OTHER_QUOTES or "/" in cell or not cell.endswith(first)  # 'nm' is a value of YAML


def _opens_classes(cells: Sequence[str]) -> bool:
    """Return True if a bracket of classes is opened and not closed in its cell."""
    last_parts = [cell.rpartition("/")[2] for cell in cells if "," not in cell]
    return any(part.startswith("[") and "]" not in part for part in last_parts)


@dataclass(frozen=True)
class Header:
    """The header of a CSV of crops, or none.

    Attributes:
        names: the names of the columns in lower case; empty without a header.
        options: the names of the optional columns, in their order.
        unnamed: the number of columns without a name behind them.
    """

    names: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    unnamed: int = 0

    @classmethod
    def parse(cls, cells: Sequence[str], options: Sequence[str], usages: Sequence[str]) -> "Header | None":
        """Return the header that the first row is; None for a row of a crop.

        Args:
            cells: the cells of the row.
            options: the names of all optional columns.
            usages: the usages that begin a row of a crop.

        Raises:
            CellMapValueError: a column is unknown, missing or named twice, or a column without a known name stands
                behind an optional one.
        """
        names = tuple(cell.lower() for cell in cells)
        if names[0] != "usage" and (names[0] in usages or ("usage" not in names and not _is_words(names))):
            return None
        while not names[-1] and set(names[:3]) == set(_NAMED):
            names = names[:-1]  # columns without a name at the end of a spreadsheet; values in them are an error
        chosen = tuple(name for name in names if name in options)
        header = cls(names, chosen, len(cells) - len(names))
        others = [name for name in names if name not in options]
        twice = [name for name in (*_NAMED, *chosen) if names.count(name) > 1]
        if twice:
            raise CellMapValueError(f"the header names the column {twice[0]!r} twice; each column is named once")
        if others[:3] == list(_NAMED) or others[:1] != ["usage"] or len(others) not in (2, 3, 5):
            _check_known(names, others, options)
        elif not header.by_name and names[len(names) - len(chosen) :] != chosen:
            raise CellMapValueError(f"the columns {', '.join(chosen)} must be the last ones")
        return header

    @property
    def by_name(self) -> bool:
        """True if the names alone tell which column is which."""
        return {"usage", "raw"} <= set(self.names) <= {*_NAMED, *self.options}

    def arranged(self, cells: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Return the cells of a row as usage, raw and target (or as five columns), and those of the options.

        Raises:
            CellMapValueError: the row has fewer or more cells than the header.
        """
        row = list(cells)
        if not self.names:
            return row, {}
        while len(row) > len(self.names) and not row[-1]:
            row.pop()
        count = len(self.options)
        in_order = self.names == (*_NAMED[: len(self.names) - count], *self.options)
        # Under a header of three columns, rows of five are read too, unless cells stand in columns without a name.
        positional = in_order and (len(row) >= len(self.names) or _without_target(row, self)) and not self.unnamed
        if positional or not self.by_name:
            if len(row) < count + 2:
                raise CellMapValueError(f"{len(row)} cells, and the header names {len(self.names)} columns")
            split = len(row) - count
            return row[:split], dict(zip(self.options, row[split:], strict=True))
        if len(row) > len(self.names):
            raise CellMapValueError(f"{len(row)} cells, and the header names {len(self.names)} columns")
        values = dict(zip(self.names, row + [""] * (len(self.names) - len(row)), strict=True))
        return [values.get(name, "") for name in _NAMED], {name: values[name] for name in self.options}


def _without_target(row: Sequence[str], header: Header) -> bool:
    """Return True for a row for prediction that leaves out the target alone, not the columns behind it."""
    return row[0].lower() == "predict" and len(row) == len(header.names) - 1 and len(header.options) > 0


def _is_words(names: Sequence[str]) -> bool:
    """Return True if the cells are several words, none of them a path, as in a header with other names."""
    return len(names) > 1 and all(re.fullmatch(r"[a-z_][a-z_ ]*", name) for name in names)


def _check_known(names: Sequence[str], others: Sequence[str], options: Sequence[str]) -> None:
    """Raise an error that names the columns that are unknown or missing."""
    known = (*_NAMED, *options)
    unknown = [name for name in others if name not in _NAMED]
    if unknown:
        listed = ", ".join(repr(name) if name else f"number {names.index('') + 1} without a name" for name in unknown)
        hint = did_you_mean(unknown[0], known) if unknown[0] else ""
        raise CellMapValueError(
            f"the header has unknown column{'s' if len(unknown) > 1 else ''} {listed}{hint}; "
            f"columns are {', '.join(known)}"
        )
    missing = [name for name in ("usage", "raw") if name not in names]
    if missing:
        raise CellMapValueError(f"the header has no column {missing[0]!r}; columns are {', '.join(known)}")
