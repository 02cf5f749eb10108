"""Record of the blocks that a conversion has written, so that it can be resumed."""

import json
import threading
from pathlib import Path
from typing import Any

#: File in the group while it is not complete.
NAME = "conversion.journal"
#: 0 and the number of a block of the first level; or a coarser level, and the index of a chunk of it along z, y and x.
Block = tuple[int, ...]


class ConversionJournal:
    """The journal of one group; thread-safe.

    Its first line has everything on which the voxels of the group depend, as JSON, and the further lines a block each.

    Args:
        folder: the group.

    Attributes:
        done: the blocks that earlier runs have written; see `open`.

    Example:
        >>> journal = ConversionJournal(Path("vol.zarr"))
        >>> journal.open({"input": "stack.tif"})
        >>> journal.add((0, 0))
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._lock = folder / NAME, threading.Lock()
        self.done: set[Block] = set()

    @property
    def exists(self) -> bool:
        """True if the group is not complete."""
        return self._file.is_file()

    @property
    def settings(self) -> dict[str, Any] | None:
        """The settings of the first line; empty if they were not written as a whole, None without a journal."""
        if not self.exists:
            return None
        try:
            settings = json.loads(self._file.read_text(encoding="utf-8").partition("\n")[0])
        except ValueError:  # the disk was full, or the process killed
            return {}
        return settings if isinstance(settings, dict) else {}

    def begin(self, settings: dict[str, Any]) -> None:
        """Write the first line, and forget the blocks of an earlier journal; the folder is made if need be."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(f"{_head(settings)}\n", encoding="utf-8")

    def open(self, settings: dict[str, Any]) -> None:
        """Begin, or resume a conversion with the same settings by reading its blocks."""
        if self.settings != json.loads(_head(settings)):
            self.begin(settings)
            return
        head, *lines = self._file.read_text(encoding="utf-8").split("\n")
        for line in lines[:-1]:  # the last line may be cut off
            self.done.add(tuple(map(int, line.split())))
        blocks = (" ".join(map(str, block)) for block in sorted(self.done))
        self._file.write_text("\n".join([head, *blocks, ""]), encoding="utf-8")

    def add(self, block: Block) -> None:
        """Record a block that has been written."""
        with self._lock, self._file.open("a", encoding="utf-8") as file:
            file.write(f"{' '.join(map(str, block))}\n")

    def finish(self) -> None:
        """Remove the journal: the group is complete."""
        self._file.unlink()


def _head(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
