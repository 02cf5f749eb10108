"""What is finished of a prediction, in a folder beside its data, so that a run that was killed goes on.

``settings.json`` says what is predicted: another prediction into the same output is refused, and the difference named.
Each process appends to a file of its own: a block is ``begun``, and it is ``done`` once its chunks are there. A line
that a kill has cut off is no line, and the block is computed again. What a process was told to write survives its end;
what the operating system had not yet written when the machine itself failed may be lost.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellmap_lightning.errors import CellMapFileExistsError, CellMapValueError

FOLDER = ".cellmap-prediction"
_LINE = re.compile(r"(begun|done) (\d{10})((?: \d+)*)\.")


class Journal:
    """The journal of one output.

    Args:
        output: folder of the output.
        rank: number of this process, whose file it appends to.
    """

    def __init__(self, output: Path, rank: int = 0) -> None:
        self.folder = output / FOLDER
        self._own = self.folder / f"blocks-{rank}.txt"

    @property
    def settings(self) -> dict[str, Any] | None:
        """What is predicted there; None where nothing is.

        Raises:
            CellMapValueError: the file cannot be read.
        """
        path = self.folder / "settings.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as e:
            raise CellMapValueError(f"{path} cannot be read ({e}); overwrite=True begins anew") from e
        return found

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write the settings, whole or not at all: from then on this is a prediction that can go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / "settings.json.draft"
        draft.write_text(json.dumps(dict(settings), indent=1) + "\n", encoding="utf-8")
        draft.replace(self.folder / "settings.json")

    def check(self, settings: Mapping[str, Any]) -> None:
        """Hold what is there against what is wanted.

        Raises:
            CellMapFileExistsError: they differ; each difference is named.
        """
        there = self.settings or {}
        wanted = json.loads(json.dumps(dict(settings)))  # tuples become lists, as they did on disk
        keys = list(dict.fromkeys([*there, *wanted]))
        differ = [key for key in keys if there.get(key) != wanted.get(key)]
        if differ:
            lines = "\n".join(f"  {key}: {there.get(key)!r} is there, now {wanted.get(key)!r}" for key in differ)
            raise CellMapFileExistsError(
                f"{self.folder.parent} holds another prediction, so this one cannot go on there:\n{lines}\n"
                "choose another output, or replace it with overwrite=True"
            )

    def _said(self, word: str) -> dict[int, list[int]]:
        found = {}
        for path in sorted(self.folder.glob("blocks-*.txt")):
            for line in path.read_text(encoding="ascii", errors="replace").splitlines():
                match = _LINE.fullmatch(line)
                if match and match[1] == word:
                    found[int(match[2])] = [int(n) for n in match[3].split()]
        return found

    @property
    def finished(self) -> dict[int, list[int]]:
        """Numbers of the blocks that are done, by any process of any run, and what was noted of each."""
        return self._said("done")

    @property
    def unfinished(self) -> set[int]:
        """Those that were begun and never done."""
        return set(self._said("begun")) - set(self.finished)

    @property
    def complete(self) -> bool:
        """Whether everything is done, the pyramids too."""
        return (self.folder / "complete").exists()

    @complete.setter
    def complete(self, value: bool) -> None:
        if value:
            (self.folder / "complete").touch()

    def write(self, word: str, number: int, notes: Sequence[int] = ()) -> None:
        """Say that a block is ``begun`` or ``done``, and note numbers of it."""
        line = " ".join([word, f"{number:010d}", *(str(n) for n in notes)])
        handle = os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            # On a line of its own even if the line before was cut off.
            os.write(handle, f"\n{line}.\n".encode("ascii"))
        finally:
            os.close(handle)
