"""The journal of a prediction, by which a run that was killed is resumed and a finished one is recognised.

While a prediction is unfinished, the journal is a folder beside its data. ``settings.json`` holds what is predicted and
a token that was drawn when the output was made: another prediction into the same output is refused, and the difference
named. Each process appends to a file of its own: a block is ``begun``, and it is ``done`` once its chunks are on the
disk, with a stamp of what was read for it. Each line has a checksum over itself and the token, so that a line that was
cut off, damaged, or written for an earlier output does not count, and its block is computed again.

When everything is done, the settings and the counts are an attribute of the output's root group, and the folder is
removed. The end of ``settings.json`` is the moment at which the prediction is finished: until then the folder counts,
and from then on the attribute. An output that is being removed has ``removed.json`` in the folder from the first step
on: then nothing in the output counts, and what is left of it is removed by the next prediction.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellmap_lightning.errors import CellMapFileExistsError, CellMapValueError
from cellmap_lightning.io.records import DamagedRecordError, sealed, unsealed
from cellmap_lightning.prediction.durable import remove, write_text

FOLDER = ".cellmap-prediction"
_LINE = re.compile(r"((begun|done) (\d{10}) ([0-9a-f]{16}|-)((?: \d+)*)) ([0-9a-f]{8})\.")
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
        self._removed = self.folder / "removed.json"
        self._own = self.folder / f"blocks-{rank}.txt"
        self._token: str | None = None

    @property
    def record(self) -> dict[str, Any] | None:
        """What a finished prediction has left in the attributes of its root group; None where nothing is finished.

        ``settings`` are those of `begin`, ``blocks`` is the number of blocks, ``reached`` the number of voxels of each
        class that reach the threshold, and ``input`` a hash over the stamps of what was read.

        Raises:
            CellMapValueError: it is damaged.
        """
        if self._settings.exists() or self._removed.exists():
            return None
        for name, nested in _ATTRIBUTES.items():
            try:
                found = json.loads((self.folder.parent / name).read_text(encoding="utf-8"))
                record = (found["attributes"] if nested else found)["cellmap"]["prediction"]
                if isinstance(record["settings"], dict):
                    found = {key: record[key] for key in ("settings", "blocks", "reached")}
                    found |= {"input": record["input"]} if "input" in record else {}
                    checksum = record.get("checksum")
            except (OSError, ValueError, LookupError, TypeError):
                continue
            if checksum is not None and checksum != record_checksum(found):
                raise CellMapValueError(
                    f"{self.folder.parent / name}: the record of a finished prediction is damaged (its checksum does "
                    "not match); overwrite=True starts over"
                )
            return dict(found)
        return None

    def _begun(self) -> dict[str, Any] | None:
        """The content of ``settings.json``; None where there is none.

        Raises:
            CellMapValueError: it cannot be read, or is damaged.
        """
        if self._removed.exists():
            return None
        try:
            found = unsealed(self._settings.read_text(encoding="utf-8"))
            if not isinstance(found["settings"], dict) or not isinstance(found["token"], str):
                raise DamagedRecordError("no settings and token")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, OSError) as e:
            raise CellMapValueError(
                f"{self._settings} is damaged, or of an earlier version of this package ({e}), so that the prediction "
                "cannot be resumed; overwrite=True starts over"
            ) from e
        return found

    @property
    def settings(self) -> dict[str, Any] | None:
        """What is predicted there; None where nothing is.

        Raises:
            CellMapValueError: they cannot be read.
        """
        found = self._begun() or self.record
        settings: dict[str, Any] | None = None if found is None else found["settings"]
        return settings

    @property
    def token(self) -> str:
        """The token of the unfinished output.

        Raises:
            CellMapFileExistsError: there is none: another process has removed it.
        """
        if self._token is None:
            found = self._begun()
            if found is None:
                raise CellMapFileExistsError(f"{self.folder.parent}: its journal {self._settings} was removed")
            self._token = found["token"]
        return str(self._token)

    def begin(self, settings: Mapping[str, Any], token: str | None = None) -> None:
        """Write the settings, whole or not at all: from then on this is a prediction that can be resumed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._token = token or new_token()
        write_text(self._settings, sealed({"settings": dict(settings), "token": self._token}))

    def disown(self, classes: Sequence[str]) -> None:
        """Note that the output is being removed: from then on nothing in it counts.

        Args:
            classes: names of its groups, which a later process removes if this one is killed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._removed, sealed({"classes": list(classes)}))

    @property
    def disowned(self) -> list[str] | None:
        """The groups of an output whose removal has begun; None where that is not so."""
        try:
            return [str(name) for name in unsealed(self._removed.read_text(encoding="utf-8"))["classes"]]
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError, OSError):
            return []

    def remove(self) -> None:
        """Remove the folder, the settings first: without them nothing in it counts any more."""
        self._token = None
        remove(self._settings)
        if self.folder.exists():
            for path in self.folder.iterdir():
                if path != self._removed:
                    path.unlink(missing_ok=True)
            shutil.rmtree(self.folder)

    def check(self, settings: Mapping[str, Any], assumed: Mapping[str, Any] | None = None) -> None:
        """Check that the settings of what is there are those of this prediction.

        Args:
            settings: what is wanted.
            assumed: settings that the record of a finished prediction may lack.

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

    def _lines(self, word: str) -> dict[int, tuple[str, list[int]]]:
        """Return stamp and notes of each block that this output's journal calls ``begun`` or ``done``."""
        begun = self._begun()
        if begun is None:
            return {}
        found = {}
        for path in sorted(self.folder.glob("blocks-*.txt")):
            for line in path.read_text(encoding="ascii", errors="replace").splitlines():
                match = _LINE.fullmatch(line)
                if match and match[2] == word and match[6] == _checksum(match[1], begun["token"]):
                    found[int(match[3])] = match[4], [int(n) for n in match[5].split()]
        return found

    @property
    def finished(self) -> dict[int, list[int]]:
        """Numbers of the blocks that are done, by any process of any run, and what was noted of each.

        Of a finished prediction the notes are empty: ``record`` has their sums.
        """
        record = self.record
        if record is not None:
            return {number: [] for number in range(record["blocks"])}
        return {number: notes for number, (_, notes) in self._lines("done").items()}

    @property
    def inputs(self) -> dict[int, str]:
        """Stamps of what was read for the blocks that are done; ``-`` where it was not noted."""
        return {number: stamp for number, (stamp, _) in self._lines("done").items()}

    @property
    def unfinished(self) -> set[int]:
        """Those that were begun and never done."""
        return set(self._lines("begun")) - set(self.finished)

    @property
    def complete(self) -> bool:
        """Whether everything is done, the pyramids too."""
        return self.record is not None

    def write(self, word: str, number: int, notes: Sequence[int] = (), stamp: str = "-") -> None:
        """Say that a block is ``begun`` or ``done``, with a stamp of what was read, and note numbers of it."""
        line = " ".join([word, f"{number:010d}", stamp, *(str(n) for n in notes)])
        text = f"\n{line} {_checksum(line, self.token)}.\n"
        handle = os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            # On a line of its own even if the line before was cut off.
            os.write(handle, text.encode("ascii"))
        finally:
            os.close(handle)


def new_token() -> str:
    """Return a token that no other output has."""
    return secrets.token_hex(8)


def _checksum(line: str, token: str) -> str:
    return f"{zlib.crc32(f'{token} {line}'.encode()):08x}"


def record_checksum(record: Mapping[str, Any]) -> str:
    """Return the checksum of the record of a finished prediction."""
    return hashlib.sha256(json.dumps(plain(record), sort_keys=True).encode()).hexdigest()[:16]


def input_hash(inputs: Mapping[int, str]) -> str | None:
    """Return a hash over the stamps of all blocks; None where one of them was not noted."""
    if not inputs or "-" in inputs.values():
        return None
    return hashlib.sha256(" ".join(inputs[number] for number in sorted(inputs)).encode()).hexdigest()[:16]


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: tuples become lists."""
    found: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return found
