"""The journal of a prediction or segmentation, which makes killed runs resumable and identifies finished ones.

The journal of an unfinished prediction is a folder beside its data. ``settings.json`` contains the settings and a
random token of the output: another prediction to the same output is an error that names the differences. Each process
appends to a separate file: a block is ``begun``, and it is ``done`` once its chunks are on the disk, with a stamp of
the chunks that were read for it. Each line has a checksum over itself and the token, so that a line that was truncated,
damaged, or written for an earlier output is ignored, and its block is computed again.

When all blocks are done, the settings and the counts become an attribute of the output's root group, and the folder is
removed. Removing ``settings.json`` is the atomic step that finishes the prediction: before it the folder is valid,
after it the attribute. An output that is being removed has ``removed.json`` in the folder from the first step on: then
nothing in the output is valid, and the next prediction removes the rest.
"""

import hashlib
import json
import os
import re
import secrets
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from cellmap_lightning.errors import CellMapFileExistsError, CellMapValueError
from cellmap_lightning.io.object_folder import ObjectFolder, OutputPath, remove_tree
from cellmap_lightning.io.records import DamagedRecordError, sealed, unsealed
from cellmap_lightning.prediction.durable import remove, write_text

#: File of a journal while the output is unfinished.
SETTINGS = "settings.json"
#: The keys of the record of a finished output, beside an optional ``input``.
_RECORD = {"prediction": ("settings", "blocks", "reached"), "segmentation": ("settings", "blocks", "objects")}
_LINE = re.compile(r"((begun|done|labelled|joined) (\d{10}) ([0-9a-f]{16}|-)((?: \d+)*)) ([0-9a-f]{8})\.")
#: Files with the attributes of a group, in Zarr v2 and v3, and True if they are nested in it.
_ATTRIBUTES = {".zattrs": False, "zarr.json": True}


def journal_folder(work: str) -> str:
    """Return the name of the folder of a journal in an output; for ``work`` see `Journal`."""
    return f".cellmap-{work}"


class Journal:
    """The journal of one output; see docs/prediction.md.

    Args:
        output: folder of the output.
        rank: rank of this process, which has a separate file to append to.
        work: the kind of the output, ``prediction`` or ``segmentation``.
    """

    def __init__(self, output: OutputPath, rank: int = 0, work: str = "prediction") -> None:
        self.work = work
        self.folder = output / journal_folder(work)
        self._settings = self.folder / SETTINGS
        self._removed = self.folder / "removed.json"
        self._log = self.folder / f"blocks-{rank}.txt"
        self._token: str | None = None
        #: The lines of this process in a remote store, whose objects are not appended to but replaced.
        self._lines_written: str | None = None

    @property
    def record(self) -> dict[str, Any] | None:
        """The record of a finished prediction in the attributes of its root group; None if it is unfinished.

        ``settings`` are those of `begin`, ``blocks`` is the number of blocks, ``reached`` the number of voxels of each
        class that reach the threshold, and ``input`` a hash over the stamps of the chunks that were read.

        Raises:
            CellMapValueError: the record is damaged.
        """
        # While the folder is valid, the attribute is incomplete, or of an earlier prediction.
        if self._settings.exists() or self._removed.exists():
            return None
        for name, nested in _ATTRIBUTES.items():
            try:
                content = json.loads((self.folder.parent / name).read_text(encoding="utf-8"))
                stored = (content["attributes"] if nested else content)["cellmap"][self.work]
                if not isinstance(stored["settings"], dict):
                    continue
                record = {key: stored[key] for key in _RECORD[self.work]}
                record |= {"input": stored["input"]} if "input" in stored else {}
                checksum = stored.get("checksum")
            except (OSError, ValueError, LookupError, TypeError):
                continue
            if checksum is not None and checksum != record_checksum(record):
                raise CellMapValueError(
                    f"{self.folder.parent / name}: the record of a finished {self.work} is damaged (its checksum "
                    "does not match); overwrite=True starts over"
                )
            return record
        return None

    def _begun(self) -> dict[str, Any] | None:
        """Return the content of ``settings.json``; None if it does not exist.

        Raises:
            CellMapValueError: it cannot be read, or is damaged.
        """
        if self._removed.exists():
            return None
        try:
            content = unsealed(self._settings.read_text(encoding="utf-8"))
            if not isinstance(content["settings"], dict) or not isinstance(content["token"], str):
                raise DamagedRecordError("no settings and token")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, OSError) as e:
            raise CellMapValueError(
                f"{self._settings} is damaged, or of an earlier version of this package ({e}), so that the {self.work} "
                "cannot be resumed; overwrite=True starts over"
            ) from e
        return content

    @property
    def settings(self) -> dict[str, Any] | None:
        """The settings of the prediction in the output; None if there is no prediction.

        Raises:
            CellMapValueError: they cannot be read.
        """
        record = self._begun() or self.record
        return None if record is None else dict(record["settings"])

    @property
    def token(self) -> str:
        """The token of the unfinished output.

        Raises:
            CellMapFileExistsError: another process has removed the journal.
        """
        if self._token is None:
            content = self._begun()
            if content is None:
                raise CellMapFileExistsError(f"{self.folder.parent}: its journal {self._settings} was removed")
            self._token = content["token"]
        return str(self._token)

    def make_folder(self) -> None:
        """Create the folder, which marks the output as one of this package."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.folder, ObjectFolder):  # folders of remote stores exist with their first object
            (self.folder / "marker.txt").write_text(f"a {self.work} of cellmap_lightning is being written here\n")

    def begin(self, settings: Mapping[str, Any], token: str | None = None) -> None:
        """Write the settings atomically: from then on the prediction can be resumed."""
        self.make_folder()
        self._token = token or new_token()
        write_text(self._settings, sealed({"settings": dict(settings), "token": self._token}))

    def mark_removed(self, classes: Sequence[str]) -> None:
        """Mark the output as being removed: from then on nothing in it is valid.

        Args:
            classes: names of its groups, which a later process removes if this one is killed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._removed, sealed({"classes": list(classes)}))

    @property
    def removed_classes(self) -> list[str] | None:
        """The groups of an output whose removal has begun; None for any other output."""
        try:
            return [str(name) for name in unsealed(self._removed.read_text(encoding="utf-8"))["classes"]]
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError, OSError):
            return []

    def remove(self) -> None:
        """Remove the folder, the settings first: without them nothing in it is valid."""
        self._token = self._lines_written = None
        remove(self._settings)
        if self.folder.exists():
            for path in self.folder.iterdir():
                if path != self._removed:  # last, as it invalidates the groups that are not removed yet
                    path.unlink(missing_ok=True)
            remove_tree(self.folder)

    def check(self, settings: Mapping[str, Any], assumed: Mapping[str, Any] | None = None) -> None:
        """Check that the settings of the prediction in the output are those of this prediction.

        Args:
            settings: the settings of this prediction.
            assumed: settings that the record of a finished prediction may lack.

        Raises:
            CellMapFileExistsError: they differ; each difference is named.
        """
        stored = self.settings or {}
        if self.complete:  # a finished output is also accepted from versions that did not record them
            stored = {**(assumed or {}), **stored}
        current = plain(settings)
        keys = list(dict.fromkeys([*stored, *current]))
        differ = [key for key in keys if stored.get(key) != current.get(key)]
        if differ:
            lines = "\n".join(f"  {key}: {stored.get(key)!r} is there, now {current.get(key)!r}" for key in differ)
            unfinished = "" if self.finished else " without a finished block"
            raise CellMapFileExistsError(
                f"{self.folder.parent} contains another {self.work}{unfinished}, so this one cannot be resumed there:\n"
                f"{lines}\nchoose another output, or replace it with overwrite=True"
            )

    def _lines(self, word: str) -> dict[int, tuple[str, list[int]]]:
        """Return stamp and notes of each block with a valid line that begins with a word."""
        begun = self._begun()
        if begun is None:
            return {}
        lines = {}
        files: list[OutputPath] = [*self.folder.glob("blocks-*.txt")]
        for path in sorted(files, key=str):
            for line in path.read_text(encoding="ascii", errors="replace").splitlines():
                # The checksum depends on the token, so that lines of a removed output are ignored.
                match = _LINE.fullmatch(line)
                if match and match[2] == word and match[6] == _checksum(match[1], begun["token"]):
                    lines[int(match[3])] = match[4], [int(n) for n in match[5].split()]
        return lines

    @property
    def finished(self) -> dict[int, list[int]]:
        """The numbers of the finished blocks, by any process of any run, and the notes of each.

        The notes of a finished prediction are empty: ``record`` has their sums.
        """
        record = self.record
        if record is not None:
            return {number: [] for number in range(record["blocks"])}
        return {number: notes for number, (_, notes) in self._lines("done").items()}

    def reached(self, word: str) -> dict[int, list[int]]:
        """Return the notes of the blocks with a finished step, ``labelled`` or ``joined``."""
        return {number: notes for number, (_, notes) in self._lines(word).items()}

    @property
    def inputs(self) -> dict[int, str]:
        """The stamps of the chunks that were read for finished blocks; ``-`` if they were not recorded."""
        return {number: stamp for number, (stamp, _) in self._lines("done").items()}

    @property
    def unfinished(self) -> set[int]:
        """The blocks that were begun and not finished."""
        return set(self._lines("begun")) - set(self.finished)

    @property
    def complete(self) -> bool:
        """True if everything is finished, including the pyramids."""
        return self.record is not None

    def write(self, word: str, number: int, notes: Sequence[int] = (), stamp: str = "-") -> None:
        """Append a line about a block, with the stamp of its chunks and notes.

        Args:
            word: ``begun`` or ``done``; of a segmentation also ``labelled`` and ``joined``.
            number: number of the block.
            notes: whole numbers.
            stamp: stamp of the chunks that were read for it.
        """
        line = " ".join([word, f"{number:010d}", stamp, *(str(n) for n in notes)])
        text = f"\n{line} {_checksum(line, self.token)}.\n"
        if isinstance(self._log, ObjectFolder):
            if self._lines_written is None:
                self._lines_written = self._log.read_text("ascii", "replace") if self._log.exists() else ""
            self._log.write_text(self._lines_written + text)
            self._lines_written += text
            return
        handle = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            # It begins with a line break, in case a kill has truncated the line before.
            os.write(handle, text.encode("ascii"))
        finally:
            os.close(handle)


def new_token() -> str:
    """Return a random token, unique to an output."""
    return secrets.token_hex(8)


def _checksum(line: str, token: str) -> str:
    return f"{zlib.crc32(f'{token} {line}'.encode()):08x}"


def record_checksum(record: Mapping[str, Any]) -> str:
    """Return the checksum of the record of a finished prediction."""
    return hashlib.sha256(json.dumps(plain(record), sort_keys=True).encode()).hexdigest()[:16]


def input_hash(inputs: Mapping[int, str]) -> str | None:
    """Return a hash over the stamps of all blocks; None if one of them was not recorded."""
    if not inputs or "-" in inputs.values():
        return None
    return hashlib.sha256(" ".join(inputs[number] for number in sorted(inputs)).encode()).hexdigest()[:16]


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as after a JSON round trip: tuples become lists."""
    result: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return result
