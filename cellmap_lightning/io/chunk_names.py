"""A check that the chunk files of an array have the names that its metadata says.

Zarr reads a chunk that it does not find as the fill value. Files that are named by another convention, as after a copy
that lost ``dimension_separator`` or with the metadata of another version, would all be read so without an error.

Names of chunks: https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html (``dimension_separator``),
https://zarr-specs.readthedocs.io/en/latest/v3/core/v3.0.html#chunk-key-encoding.
"""

import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from cellmap_lightning.errors import CellMapError, MetadataError
from cellmap_lightning.io.ngff.arrays import ArrayInfo
from cellmap_lightning.io.store import NODE_FILES, Remote, StorePath, read_json

#: Entries of a folder that are compared: those of one writer all look alike.
MOST_ENTRIES = 256
#: Stores whose folders are listed, besides those of this machine: elsewhere a folder may have pages of names.
_LISTED = ("zip", "memory")
_NUMBER = r"(?:0|[1-9]\d*)"
#: Names of chunks in one folder: as Zarr writes them, and in any way that looks like indices.
_FLAT = re.compile(rf"(c\.)?{_NUMBER}(\.{_NUMBER})*")
_INDICES = re.compile(r"[cC]?[./\\]?\d+([./\\]\d+)*")
#: What copying programs write before they rename it: ``.0.Ab12Cd`` (rsync), ``0.filepart``, ``0.part``.
_UNFINISHED = re.compile(rf"\.?((?:c\.)?{_NUMBER}(?:\.{_NUMBER})*)\.(?:[A-Za-z]\w*|\w{{6}})")

#: Prefix and separator of chunk names, as in `ArrayInfo`; None for names that no version of Zarr writes.
Style = tuple[str, str]
#: Lists a folder of the array by its key: names, and whether each is a folder.
Listing = Callable[[str], Iterable[tuple[str, bool]]]


def check_chunk_names(info: ArrayInfo, label: str = "") -> bool:
    """Compare the names of an array's files with those that its metadata says.

    Of a local array, and in archives, some entries of its folders are listed: the first, and those on the way to the
    first chunk. Of an array elsewhere, the first and the middle chunk are requested, and if both are missing, under the
    names of the other conventions too.

    Args:
        info: the array.
        label: name of the crop and class, for messages.

    Returns:
        Whether the first chunk of an array that was listed exists.

    Raises:
        MetadataError: there are chunk files under other names, beyond the array, or not copied to their end; the
            message has an example, and the encoding that fits.
    """
    if isinstance(info.path, Remote):
        if info.path.protocol not in _LISTED:
            _check_elsewhere(info, label)
            return False
        listing: Listing = partial(_remote_entries, info.path)
    else:
        listing = partial(_entries, str(info.path))
    wrong, has_first = _Names(info, listing).compare()
    if wrong:
        raise MetadataError(f"{label}: {info.path}: {wrong}" if label else f"{info.path}: {wrong}")
    return has_first


def _example(info: ArrayInfo) -> str:
    return info.prefix + info.separator.join("0" * len(info.shape))


def _other_names(info: ArrayInfo, key: str, style: Style | None) -> str:
    return (
        f"its chunks are named as {key}, and its metadata name them as {_example(info)}, so that all would be read as "
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
    """The names of an array's files, compared with its metadata.

    Args:
        info: the array.
        listing: lists its folders.
    """

    def __init__(self, info: ArrayInfo, listing: Listing) -> None:
        self.info, self.listing = info, listing
        self.declared = info.prefix, info.separator
        self.grid = [-(-n // f) for n, f in zip(info.shape, info.files, strict=True)]

    def compare(self) -> tuple[str, bool]:
        """Return what is wrong, or an empty text; and whether the first chunk exists."""
        root = list(self.listing(""))
        wrong, has_first = self._flat(root) if self.info.separator == "." else self._nested(root)
        wrong = wrong or self._foreign(root)
        if not wrong and not has_first:
            wrong = self._copies(root)
        return wrong, has_first

    def _flat(self, root: Sequence[tuple[str, bool]]) -> tuple[str, bool]:
        """Of chunks in one folder."""
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
        """Of chunks in folders: the way to the first chunk, or to the first that there is."""
        folder = self.info.prefix.rstrip("/")
        if folder and not any(name == folder and is_folder for name, is_folder in root):
            return "", False
        index: list[int] = []
        for depth in range(len(self.grid) + 3):
            entries = dict(self.listing(folder) if folder else root)
            numbers = sorted(int(name) for name in entries if name.isdigit() and str(int(name)) == name)
            if depth and set(NODE_FILES) & entries.keys():
                return "", False  # an array or a group of its own
            odd = self._odd(folder, entries) if folder else None
            if odd is not None:
                return _other_names(self.info, odd, None), False
            if not numbers:
                return self._unfinished(f"{folder}/".lstrip("/"), entries.keys()), False
            last = str(numbers[-1])
            if depth < len(self.grid) and numbers[-1] >= self.grid[depth]:
                beyond = f"{folder}/{last}".lstrip("/")
                key = self._first_file(beyond) if entries[last] else beyond
                if key is not None:
                    return self._misfit(key, [*index, numbers[-1]]), False
            first = str(numbers[0])
            index.append(numbers[0])
            path = f"{folder}/{first}".lstrip("/")
            if not entries[first]:
                wrong = self._misfit(path, index) if len(index) != len(self.grid) else ""
                return wrong or self._unfinished(f"{folder}/", entries.keys()), not any(index)
            folder = path
        return "", False

    def _odd(self, folder: str, entries: Mapping[str, bool]) -> str | None:
        """A chunk-like key in a folder of chunks that is no index as Zarr writes it; None where there is none."""
        for name, is_folder in entries.items():
            if (name.isdigit() and str(int(name)) == name) or not _INDICES.fullmatch(name):
                continue
            key = f"{folder}/{name}" if not is_folder else self._first_file(f"{folder}/{name}")
            if key is not None:
                return key
        return None

    def _misfit(self, key: str, index: Sequence[int]) -> str:
        """Return what is wrong with the indices of a chunk file, or an empty text."""
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
        """Return the sign of an interrupted copy, or an empty text."""
        for name in names:
            match = _UNFINISHED.fullmatch(name)
            if match is None or match[1] in names or name in NODE_FILES:
                continue
            if self.info.separator == "." and match[1].count(".") != _example(self.info).count("."):
                continue
            return f"{folder}{name} looks like a copy that was interrupted, and there is no {match[1]}: copy it again"
        return ""

    def _foreign(self, root: Sequence[tuple[str, bool]]) -> str:
        """Return the sign of files named by another convention, or an empty text."""
        allowed: set[Style | tuple[()] | None] = {self.declared}
        if self.info.zarr_format == 3 and any(name == ".zarray" for name, _ in root):
            # Both versions in one folder, each with its own files.
            allowed.add(("", str((_quiet_json(self.info.path / ".zarray") or {}).get("dimension_separator", "."))))
        seen: set[Style | tuple[()] | None] = set()
        for name, is_folder in root:
            style = _style(name, is_folder)
            if style == () or style in allowed or style in seen:
                continue
            key = name if not is_folder else self._first_file(name)
            if key is not None:
                return _other_names(self.info, key, style or None)
            seen.add(style)  # folders without files
        return ""

    def _first_file(self, folder: str, depth: int = 0) -> str | None:
        """The key of one chunk-like file below a folder: the first on the way down; None where there are none."""
        for name, is_folder in sorted(self.listing(folder)):
            if name in NODE_FILES or depth > len(self.grid) + 3:
                return None  # an array or a group of its own
            if is_folder and (name.isdigit() or name in ("c", "C")):
                below = self._first_file(f"{folder}/{name}", depth + 1)
                if below is not None:
                    return below
            elif not is_folder and _INDICES.fullmatch(name):
                return f"{folder}/{name}"
        return None

    def _copies(self, root: Sequence[tuple[str, bool]]) -> str:
        """Return the sign of an array copied into itself, or an empty text."""
        for name, is_folder in root:
            if is_folder and _style(name, True) == () and not name.startswith("."):
                entries = dict(self.listing(name))
                if {".zarray", "zarr.json"} & entries.keys() or self._first_file(name) is not None:
                    return f"it holds no first chunk, and {name} in it holds chunks: was the array copied into itself?"
        return ""


def _style(name: str, is_folder: bool) -> Style | tuple[()] | None:
    """The convention that a name follows; None for indices that no version of Zarr writes so; () for anything else."""
    if is_folder:
        if name == "c":
            return "c/", "/"
        if name.isdigit():
            return ("", "/") if str(int(name)) == name else None
        return None if name == "C" else ()
    if _FLAT.fullmatch(name) is not None:
        return ("c." if name.startswith("c") else "", ".")
    return None if _INDICES.fullmatch(name) else ()


def _entries(root: str, folder: str) -> list[tuple[str, bool]]:
    """Names in a folder of this machine; no more than are needed to see how its files are named."""
    # Tens of thousands of arrays are looked at, and a Path costs more than the call.
    try:
        with os.scandir(f"{root}/{folder}" if folder else root) as entries:
            return [(entry.name, entry.is_dir()) for entry in itertools.islice(entries, MOST_ENTRIES)]
    except OSError:  # reading says why
        return []


def _remote_entries(root: Remote, folder: str) -> list[tuple[str, bool]]:
    """Names in a folder of an archive."""
    try:
        place = root / folder if folder else root
        found = place.filesystem().ls(place.key, detail=True)
        return [
            (entry["name"].rstrip("/").rpartition("/")[2], entry["type"] == "directory")
            for entry in found[:MOST_ENTRIES]
        ]
    except Exception:  # stores raise whatever they like; reading says why
        return []


# -- other stores


def _check_elsewhere(info: ArrayInfo, label: str) -> None:
    """Look for two chunks, and if both are missing, for them under the names of the other conventions.

    Raises:
        MetadataError: they are there.
    """
    grid = [-(-n // f) for n, f in zip(info.shape, info.files, strict=True)]
    places = list(dict.fromkeys([tuple(0 for _ in grid), tuple(n // 2 for n in grid)]))
    declared = info.prefix, info.separator
    if any(has_objects(info.path, [_key(declared, place) for place in places])):
        return
    others: list[Style] = [style for style in (("", "."), ("", "/"), ("c/", "/"), ("c.", ".")) if style != declared]
    if info.zarr_format == 3:
        content = _quiet_json(info.path / ".zarray")
        if content is not None:
            others = [style for style in others if style[0]]
    keys = {_key(style, place): style for style in others for place in places}
    for key, is_there in zip(keys, has_objects(info.path, list(keys)), strict=True):
        if is_there:
            where = f"{label}: {info.path}" if label else str(info.path)
            raise MetadataError(f"{where}: {_other_names(info, key, keys[key])}")


def _key(style: Style, place: tuple[int, ...]) -> str:
    return style[0] + style[1].join(map(str, place))


def _quiet_json(path: StorePath) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except CellMapError:
        return None


#: Seconds after which a store that does not answer counts as one that cannot be asked.
LOOK_TIMEOUT = 30.0


def has_objects(path: StorePath, keys: list[str]) -> list[bool]:
    """Return which objects below a remote place have bytes; one that cannot be read counts as missing."""
    assert isinstance(path, Remote)
    from fsspec.asyn import sync

    try:
        fs = path.filesystem()
        if hasattr(fs, "_cat_ranges"):
            files = [(path / key).key for key in keys]
            found = sync(fs.loop, fs._cat_ranges, files, [0] * len(keys), [1] * len(keys), timeout=LOOK_TIMEOUT)
            return [isinstance(part, bytes) and len(part) > 0 for part in found]
        return [bool(fs.exists((path / key).key)) for key in keys]
    except Exception:  # stores raise whatever they like; reading says what is wrong
        return [False] * len(keys)
