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
from collections.abc import Iterator
from typing import Any

from cellmap_lightning.errors import CellMapError, MetadataError
from cellmap_lightning.volumes.ngff.arrays import ArrayInfo
from cellmap_lightning.volumes.store import NODE_FILES, Remote, StorePath, read_json

#: Entries of a folder that are compared: those of one writer all look alike.
MOST_ENTRIES = 256
_FLAT = re.compile(r"(c\.)?\d+(\.\d+)*")

#: Prefix and separator of chunk names, as in `ArrayInfo`.
Style = tuple[str, str]


def check_chunk_names(info: ArrayInfo, label: str = "") -> bool:
    """Compare the names of an array's files with those that its metadata says.

    Of a local array some entries of its folders are listed; of one elsewhere, the first and the middle chunk are
    requested, and if both are missing, under the names of the other conventions too.

    Args:
        info: the array.
        label: name of the crop and class, for messages.

    Returns:
        Whether the first chunk of a local array exists, if that is known without looking for it.

    Raises:
        MetadataError: there are chunk files under other names; the message has the encoding that fits.
    """
    if isinstance(info.path, Remote):
        example, first = _remote_example(info), False
    else:
        example, first = _local_example(str(info.path), info)
    if example is None:
        return first
    key, style, count = example
    name = f"{label}: " if label else ""
    ndim = len(info.shape)
    if count != ndim:
        raise MetadataError(
            f"{name}{info.path}: its chunk {key} has {count} indices and the array {ndim} axes {list(info.shape)}, so "
            f"that no file would be read as {_example(info)}; shape or chunks in {info.metadata.name} are those of "
            "another array"
        )
    raise MetadataError(
        f"{name}{info.path}: its chunks are named as {key}, and its metadata name them as {_example(info)}, so that "
        f"all would be read as the fill value; {info.metadata.name} needs {_fix(info, style)}"
    )


def _example(info: ArrayInfo) -> str:
    return info.prefix + info.separator.join("0" * len(info.shape))


def _fix(info: ArrayInfo, style: Style) -> str:
    prefix, separator = style
    if info.zarr_format == 2:
        if prefix:
            return "to be that of a Zarr v3 array: the chunks are those of one"
        return f'"dimension_separator": "{separator}"'
    encoding = {"name": "default" if prefix else "v2", "configuration": {"separator": separator}}
    return f'"chunk_key_encoding": {json.dumps(encoding)}'


# -- files of this machine


def _local_example(root: str, info: ArrayInfo) -> tuple[tuple[str, Style, int] | None, bool]:
    """Key, style and number of indices of a chunk under another name than declared, and see `check_chunk_names`."""
    declared = info.prefix, info.separator
    allowed = {declared}
    seen: set[Style] = set()
    first = False
    for name, is_folder in _entries(root):
        if name == ".zarray" and info.zarr_format == 3:  # both versions in one folder, each with its own files
            allowed.add(("", str((read_json(info.path / name) or {}).get("dimension_separator", "."))))
        style = _style(name, is_folder)
        if style is None or style in seen:
            continue
        if style == declared and is_folder and os.path.isfile(info.file([0] * len(info.shape))):  # noqa: PTH113  as below
            seen.add(style)  # as nearly always, and cheaper than a look into the folders
            first = True
            continue
        key = name if not is_folder else _first_file(root, name)
        if key is None:
            continue  # folders without files
        seen.add(style)
        count = len(re.findall(r"\d+", key))
        if style in allowed:
            if style == declared and count != len(info.shape):
                return (key, style, count), False
            continue
        if info.zarr_format == 3 and os.path.lexists(f"{root}/.zarray"):
            continue  # looked at above, in whichever order they are listed
        return (key, style, count), False
    return None, first


# Tens of thousands of arrays are looked at, and a Path costs more than the call.


def _entries(folder: str) -> Iterator[tuple[str, bool]]:
    """Names in a folder, and which are folders; no more than are needed to see how its files are named."""
    try:
        with os.scandir(folder) as entries:
            for entry in itertools.islice(entries, MOST_ENTRIES):
                yield entry.name, entry.is_dir()
    except OSError:  # reading says why
        return


def _style(name: str, is_folder: bool) -> Style | None:
    if is_folder:
        return ("c/", "/") if name == "c" else ("", "/") if name.isdigit() else None
    if _FLAT.fullmatch(name) is None:
        return None
    return ("c." if name.startswith("c") else "", ".")


def _first_file(root: str, name: str) -> str | None:
    """The key of one file below a folder of chunks: the first on the way down; None where there are none."""
    for entry, is_folder in sorted(_entries(f"{root}/{name}")):
        if entry in NODE_FILES:
            return None  # an array or a group of its own
        if is_folder and entry.isdigit():
            below = _first_file(root, f"{name}/{entry}")
            if below is not None:
                return below
        elif not is_folder and _FLAT.fullmatch(entry):
            return f"{name}/{entry}"
    return None


# -- other stores


def _remote_example(info: ArrayInfo) -> tuple[str, Style, int] | None:
    grid = [-(-n // f) for n, f in zip(info.shape, info.files, strict=True)]
    places = list(dict.fromkeys([tuple(0 for _ in grid), tuple(n // 2 for n in grid)]))
    declared = info.prefix, info.separator
    if any(_exists(info.path, [_key(declared, place) for place in places])):
        return None
    others: list[Style] = [style for style in (("", "."), ("", "/"), ("c/", "/"), ("c.", ".")) if style != declared]
    if info.zarr_format == 3:
        content = _quiet_json(info.path / ".zarray")
        if content is not None:
            others = [style for style in others if style[0]]
    keys = {_key(style, place): style for style in others for place in places}
    there = _exists(info.path, list(keys))
    return next(
        ((key, style, len(grid)) for (key, style), is_there in zip(keys.items(), there, strict=True) if is_there), None
    )


def _key(style: Style, place: tuple[int, ...]) -> str:
    return style[0] + style[1].join(map(str, place))


def _quiet_json(path: StorePath) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except CellMapError:
        return None


def _exists(path: StorePath, keys: list[str]) -> list[bool]:
    """Whether there are objects, all asked for at a time; one that cannot be asked for counts as missing."""
    assert isinstance(path, Remote)
    try:
        fs = path.filesystem()
        if hasattr(fs, "_cat_ranges"):
            found = fs.cat_ranges([(path / key).key for key in keys], [0] * len(keys), [1] * len(keys))
            return [isinstance(part, bytes) and len(part) > 0 for part in found]
        return [bool(fs.exists((path / key).key)) for key in keys]
    except Exception:  # stores raise whatever they like; reading says what is wrong
        return [False] * len(keys)
