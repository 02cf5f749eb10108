"""Records: small files with measurements, cached between runs in the user's cache folder.

A record contains its key, the stamp of the measured files, and a checksum. It is used only if all three match,
otherwise the caller measures again and replaces it. A damaged record is reported once.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.runtime.location import cache_folder

log = logging.getLogger(__name__)

#: Bytes of a record at most; those of large indices have less than a megabyte.
MOST_BYTES = 1 << 26
#: Seconds after which a draft is taken to be left by a killed process.
STALE_DRAFT_SECONDS = 3600.0
_FORMAT = 2
_NAME = re.compile(r"[0-9a-f]{32}\.json")
_DRAFT = re.compile(r"\.[0-9a-f]{32}\..+")
_HEAD, _MIDDLE, _END = '{"checksum": "', '", "content": ', "}"
_DIGITS = 64
_T = TypeVar("_T")
#: Damaged records that were reported and not yet replaced.
_reported: set[Path] = set()
#: Folders from which this process has removed drafts of killed processes.
_swept: set[Path] = set()


class DamagedRecordError(CellMapValueError):
    """A text that is truncated, changed, or not a record."""


@dataclass(frozen=True)
class RecordKey:
    """The key of a measurement.

    Attributes:
        kind: the measurement, such as ``statistics``.
        identity: all values that the result depends on besides the content of files: the array, settings, limits.
        of: the source, for listings.

    Example:
        >>> recall(RecordKey("count", ("/data/a.zarr", 255), "/data/a.zarr"), lambda: stamp, count_in)
    """

    kind: str
    identity: tuple[object, ...]
    of: str

    @property
    def checksum(self) -> str:
        """Text that differs for every other key."""
        return hashlib.sha256(repr((_FORMAT, self.kind, self.identity)).encode()).hexdigest()

    @property
    def path(self) -> Path:
        """File of the record."""
        return cache_folder() / f"{self.checksum[:32]}.json"


# ------------------------------------------------------------------------------------------------ texts


def sealed(content: Mapping[str, Any]) -> str:
    """Return the JSON text of a mapping, with the SHA-256 checksum of the content before it.

    Args:
        content: values that `json` can write; its keys are texts.
    """
    body = json.dumps(dict(content))
    return f"{_HEAD}{_checksum(body)}{_MIDDLE}{body}{_END}"


def unsealed(text: str) -> dict[str, Any]:
    """Return the content of a text that `sealed` made. White space around it does not matter.

    Raises:
        DamagedRecordError: any character of it was changed, added or lost.
    """
    text = text.strip()
    body_at = len(_HEAD) + _DIGITS + len(_MIDDLE)
    checksum, body = text[len(_HEAD) : len(_HEAD) + _DIGITS], text[body_at : -len(_END)]
    if text != f"{_HEAD}{checksum}{_MIDDLE}{body}{_END}":
        raise DamagedRecordError(f"not a sealed record, it begins with {text[:20]!r}; expected {_HEAD!r}")
    if checksum != _checksum(body):
        raise DamagedRecordError(f"its checksum is {_checksum(body)[:12]}..., but {checksum[:12]}... is stored in it")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise DamagedRecordError(f"its content is not valid JSON ({e})") from e
    if not isinstance(content, dict):
        raise DamagedRecordError(f"its content is {type(content).__name__}; expected an object")
    return content


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()


# ------------------------------------------------------------------------------------------------ files


def recall(key: RecordKey, stamp: Callable[[], str], parse: Callable[[Mapping[str, Any]], _T]) -> _T | None:
    """Return a measurement that was cached before; None where it has to be made.

    Args:
        key: what is measured.
        stamp: computes the stamp of the files as they are now; not called where nothing is cached.
        parse: makes the result from the content that `remember` was given, and checks it.
    """
    path = key.path
    try:
        content = _read(path)
        if content is None:
            return None
        if content.get("format") != _FORMAT or content.get("key") != key.checksum:
            raise DamagedRecordError(f"it is the record of another measurement ({content.get('kind')!r})")
        measured, measured_from = content.get("measured"), content.get("stamp")
        if not isinstance(measured, dict) or not isinstance(measured_from, str):
            raise DamagedRecordError("it holds no measurement")
        if measured_from != stamp():
            log.info("%s of %s: its files have changed since they were measured; measuring again", key.kind, key.of)
            return None
        try:
            return parse(measured)
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise DamagedRecordError(f"its values are not those of {key.kind} ({e!r})") from e
    except DamagedRecordError as e:
        if path not in _reported:
            _reported.add(path)
            log.warning("%s: damaged (%s); %s is measured again and the record replaced", path, e, key.kind)
        return None


def remember(key: RecordKey, stamp: str, measured: Mapping[str, Any]) -> None:
    """Cache a measurement, atomically: readers and other writers see a whole record or none.

    If the folder cannot be written to, a warning is logged.

    Args:
        key: its key.
        stamp: the stamp of the files, taken before they were read.
        measured: the result, as `sealed` takes it.
    """
    path = key.path
    text = sealed(
        {"format": _FORMAT, "key": key.checksum, "kind": key.kind, "of": key.of, "stamp": stamp, "measured": measured}
    )
    if len(text) > MOST_BYTES:
        log.info("%s of %s: %d bytes are too many to be cached; at most %d", key.kind, key.of, len(text), MOST_BYTES)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _sweep(path.parent)
        handle, draft = tempfile.mkstemp(".draft", f".{path.stem}.", path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            _replace(Path(draft), path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)  # noqa: PTH108  as mkstemp names it
            raise
        _reported.discard(path)
    except OSError as e:
        log.warning(
            "measurements cannot be cached in %s (%s); they will be repeated", path.parent, e.strerror or e
        )  # fmt: skip


def _read(path: Path) -> dict[str, Any] | None:
    """Read a record without following links or blocking on pipes; None if it does not exist.

    Raises:
        DamagedRecordError: it is not a record.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except OSError as e:
        reason = "a link" if e.errno == errno.ELOOP else f"unreadable ({e.strerror})"
        raise DamagedRecordError(f"it is {reason}; expected a file") from e
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise DamagedRecordError("it is not a regular file")
    with os.fdopen(handle, "rb") as file:
        if status.st_size > MOST_BYTES:
            raise DamagedRecordError(f"it has {status.st_size} bytes; at most {MOST_BYTES} are read")
        try:
            return unsealed(file.read(status.st_size + 1).decode())
        except (UnicodeDecodeError, OSError) as e:
            raise DamagedRecordError(f"it cannot be read ({e})") from e


def _replace(draft: Path, path: Path) -> None:
    """Move a draft to its path. A folder there is renamed, and not removed, since it may hold files."""
    try:
        draft.replace(path)
    except OSError:
        if path.is_symlink() or not path.is_dir():
            raise
        aside = path.with_name(f"{path.name}.folder-{time.time_ns()}")
        path.rename(aside)
        with contextlib.suppress(OSError):  # removed if it is empty
            aside.rmdir()
        draft.replace(path)


def _sweep(folder: Path) -> None:
    """Remove the drafts of processes that were killed, once per process and folder."""
    if folder not in _swept:
        _swept.add(folder)
        for path in drafts(folder):
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- listing


def records(folder: Path) -> Iterator[Path]:
    """Yield the files of records in a folder, damaged ones and those of older versions included."""
    yield from (entry for entry in _entries(folder) if _NAME.fullmatch(entry.name))


def drafts(folder: Path) -> Iterator[Path]:
    """Yield the drafts of processes that were killed while writing."""
    for entry in _entries(folder):
        if _DRAFT.fullmatch(entry.name):
            with contextlib.suppress(OSError):
                if time.time() - entry.lstat().st_mtime > STALE_DRAFT_SECONDS:
                    yield entry


def _entries(folder: Path) -> list[Path]:
    try:
        entries = list(folder.iterdir())
    except OSError:
        return []
    return [entry for entry in entries if entry.is_file() and not entry.is_symlink()]


def source_of(path: Path) -> str:
    """Return the source of the measurement in a record; "" where it is damaged."""
    try:
        content = _read(path) or {}
    except DamagedRecordError:
        return ""
    source = content.get("of")
    return source if isinstance(source, str) else ""
