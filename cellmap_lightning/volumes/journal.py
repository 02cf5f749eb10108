"""The journal of a prediction, by which a run that was killed is resumed and a finished one is recognised.

While a prediction is unfinished, the journal is a folder beside its data. ``settings.json`` holds what is predicted:
another prediction into the same output is refused, and the difference named. Each process appends to a file of its own:
a block is ``begun``, and it is ``done`` once its chunks are there. A line that a kill has cut off does not count, and
the block is computed again. What a process has written survives its end; what the operating system had not yet written
when the machine itself failed may be lost.

When everything is done, the settings and the counts are an attribute of the output's root group, and the folder is
removed. The end of ``settings.json`` is the moment at which the prediction is finished: until then the folder counts,
and from then on the attribute.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellmap_lightning.errors import CellMapFileExistsError, CellMapValueError

FOLDER = ".cellmap-prediction"
_LINE = re.compile(r"(begun|done) (\d{10})((?: \d+)*)\.")
#: Where the attributes of a group are, in Zarr v2 and v3.
_ATTRIBUTES = {".zattrs": False, "zarr.json": True}


class Journal:
    """The journal of one output.

    Args:
        output: folder of the output.
        rank: number of this process, whose file it appends to.
    """

    def __init__(self, output: Path, rank: int = 0) -> None:
        self.folder = output / FOLDER
        self._settings = self.folder / "settings.json"
        self._own = self.folder / f"blocks-{rank}.txt"

    @property
    def record(self) -> dict[str, Any] | None:
        """What a finished prediction has left in the attributes of its root group; None where nothing is finished.

        ``settings`` are those of `begin`, ``blocks`` is the number of blocks, and ``reached`` the number of voxels of
        each class that reach the threshold.
        """
        if self._settings.exists():
            return None
        for name, nested in _ATTRIBUTES.items():
            try:
                found = json.loads((self.folder.parent / name).read_text(encoding="utf-8"))
                record = (found["attributes"] if nested else found)["cellmap"]["prediction"]
                if isinstance(record["settings"], dict):
                    return {"settings": record["settings"], "blocks": record["blocks"], "reached": record["reached"]}
            except (OSError, ValueError, LookupError, TypeError):
                continue
        return None

    @property
    def settings(self) -> dict[str, Any] | None:
        """What is predicted there; None where nothing is.

        Raises:
            CellMapValueError: the file cannot be read.
        """
        try:
            found: dict[str, Any] = json.loads(self._settings.read_text(encoding="utf-8"))
        except FileNotFoundError:
            record = self.record
            return None if record is None else record["settings"]
        except (ValueError, OSError) as e:
            raise CellMapValueError(f"{self._settings} cannot be read ({e}); overwrite=True starts over") from e
        return found

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write the settings, whole or not at all: from then on this is a prediction that can go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / "settings.json.draft"
        draft.write_text(json.dumps(dict(settings), indent=1) + "\n", encoding="utf-8")
        draft.replace(self._settings)

    def remove(self) -> None:
        """Remove the folder, the settings first: without them nothing in it counts any more."""
        self._settings.unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def check(self, settings: Mapping[str, Any], assumed: Mapping[str, Any] | None = None) -> None:
        """Hold what is there against what is wanted.

        Args:
            settings: what is wanted.
            assumed: settings of a finished prediction whose state of this package did not write them.

        Raises:
            CellMapFileExistsError: they differ; each difference is named.
        """
        there = self.settings or {}
        if self.complete:
            there = there | {key: value for key, value in (assumed or {}).items() if key not in there}
        wanted = plain(settings)
        keys = list(dict.fromkeys([*there, *wanted]))
        differ = [key for key in keys if there.get(key) != wanted.get(key)]
        if differ:
            lines = "\n".join(f"  {key}: {there.get(key)!r} is there, now {wanted.get(key)!r}" for key in differ)
            nothing = "" if self.finished else " without a finished block"
            raise CellMapFileExistsError(
                f"{self.folder.parent} holds another prediction{nothing}, so this one cannot go on there:\n{lines}\n"
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
        """Numbers of the blocks that are done, by any process of any run, and what was noted of each.

        Of a finished prediction the notes are empty: ``record`` has their sums.
        """
        record = self.record
        return self._said("done") if record is None else {number: [] for number in range(record["blocks"])}

    @property
    def unfinished(self) -> set[int]:
        """Those that were begun and never done."""
        return set(self._said("begun")) - set(self.finished)

    @property
    def complete(self) -> bool:
        """Whether everything is done, the pyramids too."""
        # Earlier states of this package kept the folder, and a file in it.
        return self.record is not None or (self.folder / "complete").exists()

    def write(self, word: str, number: int, notes: Sequence[int] = ()) -> None:
        """Say that a block is ``begun`` or ``done``, and note numbers of it."""
        line = " ".join([word, f"{number:010d}", *(str(n) for n in notes)])
        handle = os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            # On a line of its own even if the line before was cut off.
            os.write(handle, f"\n{line}.\n".encode("ascii"))
        finally:
            os.close(handle)


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: tuples become lists."""
    found: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return found
