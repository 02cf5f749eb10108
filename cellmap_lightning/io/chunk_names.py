"""A check that the chunk files of an array are named as its metadata declares.

Zarr reads a missing chunk as the fill value. Files that are named by another convention, as after a copy that lost
``dimension_separator`` or with the metadata of another version, would all be read as missing, without an error.

Names of chunks: https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html (``dimension_separator``),
https://zarr-specs.readthedocs.io/en/latest/v3/core/v3.0.html#chunk-key-encoding.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from cellmap_lightning.errors import CellMapError, MetadataError
from cellmap_lightning.io.folder_entries import LISTED, archive_entries, local_entries
from cellmap_lightning.io.ngff.arrays import ArrayInfo
from cellmap_lightning.io.store import NODE_FILES, Remote, StorePath, read_json
from cellmap_lightning.io.stored_array import StoredArray

_NUMBER = r"(?:0|[1-9]\d*)"
#: Names of chunks in one folder: as Zarr writes them, and in any way that looks like indices.
_FLAT = re.compile(rf"(c\.)?{_NUMBER}(\.{_NUMBER})*")
_INDICES = re.compile(r"[cC]?[./\\]?\d+([./\\]\d+)*")
#: Temporary names of copying programs: ``.0.Ab12Cd`` (rsync), ``0.filepart``, ``0.part``.
_UNFINISHED = re.compile(rf"\.?((?:c\.)?{_NUMBER}(?:\.{_NUMBER})*)\.(?:[A-Za-z]\w*|\w{{6}})")

#: Prefix and separator of chunk names, as in `ArrayInfo`; None for names that no version of Zarr writes.
Style = tuple[str, str]
#: A function that lists a folder of the array by its key: names, and whether each is a folder.
Listing = Callable[[str], Iterable[tuple[str, bool]]]


def check_chunk_names(info: StoredArray, label: str = "") -> bool:
    """Compare the names of an array's files with its metadata.

    For local arrays and archives, some entries are listed of the array's folder and of those on the path to the first
    chunk. For other remote arrays, the first and the middle chunk are requested; if both are missing, the names of the
    other conventions are tried.

    Args:
        info: the array.
        label: name of the crop and class, for messages.

    Returns:
        Whether the first chunk exists; False for arrays that are not listed. Always True for other formats than Zarr:
            `io.formats.chunk_folders` checks those that have chunk files when they are opened.

    Raises:
        MetadataError: there are chunk files with other names, beyond the array, or of an interrupted copy; the message
            has an example and the metadata that fit.
    """
    if not isinstance(info, ArrayInfo):
        return True
    if isinstance(info.path, Remote):
        if info.path.protocol not in LISTED:
            _check_elsewhere(info, label)
            return False
        listing: Listing = partial(archive_entries, info.path)
    else:
        listing = partial(local_entries, str(info.path))
    wrong, has_first = _Names(info, listing).compare()
    if wrong:
        raise MetadataError(f"{label}: {info.path}: {wrong}" if label else f"{info.path}: {wrong}")
    return has_first


def _example(info: ArrayInfo) -> str:
    return info.key([0] * len(info.shape))


def _other_names(info: ArrayInfo, key: str, style: Style | None) -> str:
    return (
        f"its chunks are named as {key}, but by its metadata as {_example(info)}, so that all would be read as "
        f"the fill value; {_fix(info, style)}"
    )


def _fix(info: ArrayInfo, style: Style | None) -> str:
    if style is None:
        return "no version of Zarr names them so: copy the array again, or rename them"
    prefix, separator = style
    if info.zarr_format == 2:
        if prefix:
            return f"{info.metadata.name} needs to be that of a Zarr v3 array: the chunks are those of one"
        return f'{info.metadata.name} needs "dimension_separator": "{separator}"'
    encoding = {"name": "default" if prefix else "v2", "configuration": {"separator": separator}}
    return f'{info.metadata.name} needs "chunk_key_encoding": {json.dumps(encoding)}'


class _Names:
    """A comparison of the names of an array's files with its metadata.

    Args:
        info: the array.
        listing: the function that lists its folders.
    """

    def __init__(self, info: ArrayInfo, listing: Listing) -> None:
        self.info, self.listing = info, listing
        self.declared = info.prefix, info.separator
        self.grid = [-(-n // f) for n, f in zip(info.shape, info.files, strict=True)]

    def compare(self) -> tuple[str, bool]:
        """Return the problem, or "", and whether the first chunk exists."""
        root = list(self.listing(""))
        wrong, has_first = self._flat(root) if self.info.separator == "." else self._nested(root)
        wrong = wrong or self._foreign(root)
        if not wrong and not has_first:
            wrong = self._copies(root)
        return wrong, has_first

    def _flat(self, root: Sequence[tuple[str, bool]]) -> tuple[str, bool]:
        """Compare chunks that are all in one folder."""
        names = {name for name, is_folder in root if not is_folder}
        for name in names:
            parts = name.removeprefix(self.info.prefix).split(".")
            if not name.startswith(self.info.prefix) or not all(map(str.isdigit, parts)) or not _FLAT.fullmatch(name):
                continue
            index = [int(part) for part in parts]
            wrong = self._misfit(name, index)
            if wrong:
                return wrong, False
        return self._unfinished("", names), _example(self.info) in names

    def _nested(self, root: Sequence[tuple[str, bool]]) -> tuple[str, bool]:
        """Compare chunks in nested folders, on the path to the first one that exists."""
        folder = self.info.prefix.rstrip("/")
        if folder and not any(name == folder and is_folder for name, is_folder in root):
            return "", False
        index: list[int] = []
        for depth in range(len(self.grid) + 3):
            entries = dict(self.listing(folder) if folder else root)
            if depth and set(NODE_FILES) & entries.keys():
                return "", False  # another array or group
            odd = self._odd(folder, entries) if folder else None
            if odd is not None:
                return _other_names(self.info, odd, None), False
            numbers = sorted(int(name) for name in entries if _is_index(name))
            if not numbers:
                return self._unfinished(f"{folder}/".lstrip("/"), entries.keys()), False
            beyond = self._beyond(folder, entries, depth, numbers[-1])
            if beyond is not None:
                return self._misfit(beyond, [*index, numbers[-1]]), False
            index.append(numbers[0])
            path = f"{folder}/{numbers[0]}".lstrip("/")
            if not entries[str(numbers[0])]:  # a file: the end of the path
                wrong = self._misfit(path, index) if len(index) != len(self.grid) else ""
                return wrong or self._unfinished(f"{folder}/", entries.keys()), not any(index)
            folder = path
        return "", False

    def _beyond(self, folder: str, entries: Mapping[str, bool], depth: int, last: int) -> str | None:
        """Return the key of a chunk beyond the grid, below the largest index in a folder; None without one."""
        if depth >= len(self.grid) or last < self.grid[depth]:
            return None
        path = f"{folder}/{last}".lstrip("/")
        return self._first_file(path) if entries[str(last)] else path

    def _odd(self, folder: str, entries: Mapping[str, bool]) -> str | None:
        """Return a key in a folder of chunks that resembles an index, but not as Zarr writes it; None without one."""
        for name, is_folder in entries.items():
            if _is_index(name) or not _INDICES.fullmatch(name):
                continue
            key = f"{folder}/{name}" if not is_folder else self._first_file(f"{folder}/{name}")
            if key is not None:
                return key
        return None

    def _misfit(self, key: str, index: Sequence[int]) -> str:
        """Return the problem with the indices of a chunk file, or ""."""
        name = self.info.metadata.name
        if len(index) > len(self.grid) or (len(index) < len(self.grid) and self.info.separator == "."):
            return (
                f"its chunk {key} has {len(index)} indices and the array {len(self.grid)} axes "
                f"{list(self.info.shape)}, so that no file would be read as {_example(self.info)}; shape or chunks in "
                f"{name} are those of another array"
            )
        if any(i >= n for i, n in zip(index, self.grid, strict=False)):
            return (
                f"its chunk {key} lies beyond the array, whose shape {list(self.info.shape)} has {self.grid} chunk "
                f"files along its axes: shape, chunks or the order of axes in {name} are those of another array"
            )
        if len(index) < len(self.grid):
            return f"its chunk {key} has {len(index)} indices and the array {len(self.grid)} axes"
        return ""

    def _unfinished(self, folder: str, names: Collection[str]) -> str:
        """Return the sign of an interrupted copy, or ""."""
        for name in names:
            match = _UNFINISHED.fullmatch(name)
            if match is None or match[1] in names or name in NODE_FILES:
                continue
            if self.info.separator == "." and match[1].count(".") != _example(self.info).count("."):
                continue
            return f"{folder}{name} looks like a copy that was interrupted, and {match[1]} is missing: copy it again"
        return ""

    def _foreign(self, root: Sequence[tuple[str, bool]]) -> str:
        """Return the sign of files named by another convention, or ""."""
        allowed: set[Style | tuple[()] | None] = {self.declared}
        if self.info.zarr_format == 3 and any(name == ".zarray" for name, _ in root):
            # Both versions of Zarr in one folder, each with separate files.
            allowed.add(("", str((_quiet_json(self.info.path / ".zarray") or {}).get("dimension_separator", "."))))
        seen: set[Style | tuple[()] | None] = set()
        for name, is_folder in root:
            style = _style(name, is_folder)
            if style == () or style in allowed or style in seen:
                continue
            key = name if not is_folder else self._first_file(name)
            if key is not None:
                return _other_names(self.info, key, style or None)
            seen.add(style)  # only folders without files
        return ""

    def _first_file(self, folder: str, depth: int = 0) -> str | None:
        """Return the key of the first file below a folder that is named like a chunk; None without one."""
        for name, is_folder in sorted(self.listing(folder)):
            if name in NODE_FILES or depth > len(self.grid) + 3:
                return None  # another array or group
            if is_folder and (name.isdigit() or name in ("c", "C")):
                below = self._first_file(f"{folder}/{name}", depth + 1)
                if below is not None:
                    return below
            elif not is_folder and _INDICES.fullmatch(name):
                return f"{folder}/{name}"
        return None

    def _copies(self, root: Sequence[tuple[str, bool]]) -> str:
        """Return the sign of an array copied into itself, or ""."""
        for name, is_folder in root:
            if is_folder and _style(name, True) == () and not name.startswith("."):
                entries = dict(self.listing(name))
                if {".zarray", "zarr.json"} & entries.keys() or self._first_file(name) is not None:
                    return f"it holds no first chunk, and {name} in it holds chunks: was the array copied into itself?"
        return ""


def _style(name: str, is_folder: bool) -> Style | tuple[()] | None:
    """Return the convention of a name; None for indices that no version of Zarr writes; () for all other names."""
    if is_folder:
        if name == "c":
            return "c/", "/"
        if name.isdigit():
            return ("", "/") if _is_index(name) else None
        return None if name == "C" else ()
    if _FLAT.fullmatch(name) is not None:
        return ("c." if name.startswith("c") else "", ".")
    return None if _INDICES.fullmatch(name) else ()


def _is_index(name: str) -> bool:
    """Return whether a name is a number as Zarr writes it, without leading zeros."""
    return name.isdigit() and str(int(name)) == name


# -- other stores


def _check_elsewhere(info: ArrayInfo, label: str) -> None:
    """Request two chunks of a remote array, and if both are missing, the names of the other conventions.

    Raises:
        MetadataError: a chunk has the name of another convention.
    """
    grid = [-(-n // f) for n, f in zip(info.shape, info.files, strict=True)]
    indices = list(dict.fromkeys([tuple(0 for _ in grid), tuple(n // 2 for n in grid)]))
    declared = info.prefix, info.separator
    if any(has_objects(info.path, [info.key(index) for index in indices])):
        return
    others: list[Style] = [style for style in (("", "."), ("", "/"), ("c/", "/"), ("c.", ".")) if style != declared]
    if info.zarr_format == 3:
        content = _quiet_json(info.path / ".zarray")
        if content is not None:
            others = [style for style in others if style[0]]
    keys = {prefix + sep.join(map(str, index)): (prefix, sep) for prefix, sep in others for index in indices}
    for key, exists in zip(keys, has_objects(info.path, list(keys)), strict=True):
        if exists:
            where = f"{label}: {info.path}" if label else str(info.path)
            raise MetadataError(f"{where}: {_other_names(info, key, keys[key])}")


def _quiet_json(path: StorePath) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except CellMapError:
        return None


#: Timeout of requests for the existence of objects, in seconds.
LOOK_TIMEOUT = 30.0


def has_objects(path: StorePath, keys: list[str]) -> list[bool]:
    """Return whether each object below a remote location has bytes; one that cannot be read counts as missing."""
    assert isinstance(path, Remote)
    from fsspec.asyn import sync

    try:
        fs = path.filesystem()
        files = [(path / key).key for key in keys]
        cat_ranges = getattr(fs, "_cat_ranges", None)  # of asynchronous file systems
        if cat_ranges is None:
            return [bool(fs.exists(file)) for file in files]
        first_bytes = sync(fs.loop, cat_ranges, files, [0] * len(keys), [1] * len(keys), timeout=LOOK_TIMEOUT)
        return [isinstance(content, bytes) and len(content) > 0 for content in first_bytes]
    except Exception:  # stores raise any type; reading reports the error
        return [False] * len(keys)
