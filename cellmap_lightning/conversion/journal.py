"""Record of the blocks that a conversion has written, so that it can be resumed."""

import json
import threading
from pathlib import Path
from typing import Any

from cellmap_lightning.errors import CellMapFileExistsError

#: File in the group while it is not complete.
NAME = "conversion.journal"
#: 0 and the number of a block of the first level; or a coarser level, and the index of a chunk of it along z, y and x.
Block = tuple[int, ...]


class ConversionJournal:
    """The journal of one image; thread-safe.

    Args:
        folder: the group.
        settings: everything on which its voxels depend.

    Attributes:
        done: the blocks that earlier runs have written.

    Raises:
        CellMapFileExistsError: the folder exists, and is not an unfinished conversion with the same settings.

    Example:
        >>> journal = ConversionJournal(Path("vol.zarr"), {"input": "stack.tif"})
        >>> journal.add((0, 0))
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._file, self._lock = folder / NAME, threading.Lock()
        self.done: set[Block] = set()
        head = json.dumps(settings, sort_keys=True)
        self.resumed = folder.exists()
        if not self.resumed:
            folder.mkdir(parents=True)
            self._file.write_text(f"{head}\n")
            return
        if not self._file.is_file():
            raise CellMapFileExistsError(f"{folder} exists already; choose another output")
        first, *lines = self._file.read_text().split("\n")
        if first != head:
            raise CellMapFileExistsError(
                f"{folder} is an unfinished conversion of another input or with other settings ({first}); finish it "
                "with these, remove it, or choose another output"
            )
        for line in lines[:-1]:  # the last line may be cut off
            self.done.add(tuple(map(int, line.split())))
        self._file.write_text("\n".join([head, *(" ".join(map(str, block)) for block in sorted(self.done)), ""]))

    def add(self, block: Block) -> None:
        """Record a block that has been written."""
        with self._lock, self._file.open("a") as file:
            file.write(f"{' '.join(map(str, block))}\n")

    def finish(self) -> None:
        """Remove the journal: the image is complete."""
        self._file.unlink()
