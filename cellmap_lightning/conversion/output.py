"""The output of a conversion on disk: its lock, and what becomes of an earlier output at the same path.

An output that is not complete has a journal, and one that is complete has a record in its attributes; what has neither
was not written by a conversion, and is never changed. A conversion into masks has both in the group that holds them,
and in each mask.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zarr.errors import ContainsGroupError

from cellmap_lightning.conversion.journal import ConversionJournal
from cellmap_lightning.errors import CellMapFileExistsError, CellMapValueError
from cellmap_lightning.io.files import make_folder
from cellmap_lightning.io.store import Remote, StorePath
from cellmap_lightning.io.writer import ZarrFormat, write_group
from cellmap_lightning.prediction.output_lock import FILE, OutputLock

log = logging.getLogger(__name__)

#: Metadata files of a group, and whether attributes are nested in them.
_NODES = {".zattrs": False, "zarr.json": True, ".zgroup": False, ".zmetadata": False}
#: Settings of a journal in messages, where their names are not those of options.
_IN_WORDS = {"identity": "input", "stamp": "files of the input", "block": "blocks", "masks": "classes"}


def record_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return CellMap's attributes that mark a complete output, by which it can be replaced.

    Args:
        settings: those of its journal.
    """
    written = {"levels": settings["levels"]} if "levels" in settings else {"masks": _masks(settings)}
    return {"conversion": {"input": Path(settings["input"]).name, "settings": _digest(settings), **written}}


def is_complete(group: Path, settings: Mapping[str, Any] | None = None) -> bool:
    """Return True for a group that a conversion has completed.

    Args:
        group: the group.
        settings: everything on which its voxels depend; None for any.
    """
    record = None if ConversionJournal(group).exists else _record(group)
    return record is not None and (settings is None or record.get("settings") == _digest(settings))


def check_output(output: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Check that an output can be begun, resumed or replaced; see `begun`.

    Raises:
        CellMapFileExistsError: it cannot.
    """
    if is_complete(output) and not overwrite:
        raise CellMapFileExistsError(
            f"{output} exists already, a complete conversion; replace it with overwrite=True, or choose another output"
        )
    for group in (output, *(output / name for name in _masks(settings))):
        if (group.exists() or group.is_symlink()) and not _is_empty(group) and not _is_own(group):
            raise _foreign(group)


@contextmanager
def begun(output: Path, settings: Mapping[str, Any], overwrite: bool) -> Iterator[ConversionJournal]:
    """Lock an output, remove an earlier one that is to be replaced, and yield the journal of the output.

    Args:
        output: the group; missing, empty, or written by an earlier conversion.
        settings: everything on which its voxels depend.
        overwrite: replace a complete conversion, and do not resume an incomplete one.

    Raises:
        CellMapFileExistsError: something else is there, or a complete conversion without ``overwrite``; or another job
            writes there.
    """
    check_output(output, settings, overwrite)
    make_folder(output)
    lock = OutputLock(output)
    lock.acquire()
    try:
        check_output(output, settings, overwrite)  # again: another job may have finished just before
        yield opened(output, settings, overwrite)
    finally:
        lock.release()


def opened(group: Path, settings: Mapping[str, Any], overwrite: bool = False) -> ConversionJournal:
    """Return the journal of a group, after the removal of an earlier conversion that cannot be resumed.

    Args:
        group: the group; missing, empty, or written by an earlier conversion.
        settings: everything on which its voxels depend.
        overwrite: do not resume.

    Raises:
        CellMapFileExistsError: there is an array that no conversion has written.
    """
    journal = ConversionJournal(group)
    stored, current = journal.settings, json.loads(json.dumps(settings))
    if stored != current or overwrite:
        if stored is not None and stored != current:
            log.warning("%s: replaces an unfinished conversion, %s", group, _difference(stored, current))
        elif _is_own(group):
            log.info("%s: replaces the conversion that is there", group)
        if _is_own(group):
            _remove(group)
        for number in range(current.get("levels", 0)):
            if (group / f"s{number}").exists():
                raise _foreign(group / f"s{number}")
    journal.open(current)
    return journal


def check_apart(output: Path, source: StorePath) -> None:
    """Check that an output and an input are separate, also by links: the input is never written to.

    Raises:
        CellMapValueError: one of them is inside of the other.
    """
    if isinstance(source, Remote):
        return
    a, b = output.resolve(), source.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise CellMapValueError(
            f"output={output} and input={source} must not be inside of each other; choose another output"
        )


def write_parents(output: Path, zarr_format: ZarrFormat) -> None:
    """Write group metadata into the folders above an output, up to the outermost ``*.zarr``, that have none.

    Metadata that is there is not changed, so that any of them may hold a group of another program.

    Args:
        output: the output.
        zarr_format: 2 or 3.
    """
    parents = output.absolute().parents
    roots = [number for number, parent in enumerate(parents) if parent.suffix == ".zarr"]
    for parent in reversed(parents[: roots[-1] + 1] if roots else ()):
        if not any((parent / name).exists() for name in (*_NODES, ".zarray")):
            with suppress(ContainsGroupError):  # another job writes to the same volume
                write_group(parent, zarr_format=zarr_format)


def _foreign(path: Path) -> CellMapFileExistsError:
    return CellMapFileExistsError(
        f"{path} exists already and is not from a conversion, so it is not changed; remove it, or choose another output"
    )


def _difference(stored: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Return how an unfinished conversion differs from this one, in words."""
    if "input" not in stored:
        return "which was hardly begun, or being removed"
    keys = [key for key in {**stored, **current} if stored.get(key) != current.get(key)]
    return f"whose settings differ ({', '.join(dict.fromkeys(_IN_WORDS.get(key, key) for key in keys))})"


def _is_empty(path: Path) -> bool:
    return path.is_dir() and all(inside.name == FILE for inside in path.iterdir())


def _is_own(group: Path) -> bool:
    """Return True for a group that a conversion has written, complete or not."""
    return group.is_dir() and (ConversionJournal(group).exists or _record(group) is not None)


def _record(group: Path) -> dict[str, Any] | None:
    """Return the record of a complete output; None without one."""
    for name, nested in _NODES.items():
        try:
            content = json.loads((group / name).read_text(encoding="utf-8"))
            record = (content["attributes"] if nested else content)["cellmap"]["conversion"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if isinstance(record, dict):
            return record
    return None


def _remove(group: Path) -> None:
    """Remove the files of an earlier conversion, and no others; its journal last: until then it is unfinished."""
    journal = ConversionJournal(group)
    written = journal.settings if journal.exists else _record(group)
    levels, masks = (written or {}).get("levels"), _masks(written or {})
    if not journal.exists:
        journal.begin({"levels": levels, "masks": masks})
    for name in _NODES:
        (group / name).unlink(missing_ok=True)
    for name in masks:
        if _is_own(group / name):
            _remove(group / name)
        with suppress(OSError):  # it is missing, or holds other files
            (group / name).rmdir()
    for number in range(levels if isinstance(levels, int) else 0):
        if (group / f"s{number}").is_dir():
            shutil.rmtree(group / f"s{number}")
    journal.finish()


def _masks(settings: Mapping[str, Any]) -> list[str]:
    """Return the names of the masks in a group, by its journal or its record; none for an image."""
    names = settings.get("masks")
    listed = names if isinstance(names, list) else []
    return [name for name in listed if isinstance(name, str) and Path(name).name == name and name.strip(".")]


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
