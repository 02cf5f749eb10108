"""Local and remote locations of data, and the JSON metadata in them.

A location is a `Path` or a `Remote`: an address with storage options. Folders are listed only to return their children
or for an error message; over HTTP nothing can be listed.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Self

from cellmap_lightning.errors import CellMapError, CellMapValueError, MetadataError
from cellmap_lightning.io.files import IrregularFileError, LargeFileError, read_regular
from cellmap_lightning.io.filesystems import FILE_SYSTEMS, PROTOCOLS, is_open
from cellmap_lightning.io.local_paths import expanded, is_folder, reason
from cellmap_lightning.io.stamps import file_stamp
from cellmap_lightning.redaction import HIDDEN, hidden, hide_address, option_secrets, redacted
from cellmap_lightning.runtime.shared_context import SharedContext

#: Bytes of a metadata file at most: those of real volumes have kilobytes, with consolidated metadata megabytes.
MOST_JSON_BYTES = 1 << 24
#: Class names in the attributes of a crop at most.
MOST_CLASS_NAMES = 10_000
#: Metadata files; any of them makes a folder a Zarr node.
NODE_FILES = ("zarr.json", ".zattrs", ".zgroup", ".zarray")
#: The group in which OME-NGFF lists the images of a container; it is neither an image nor a class.
LISTING = "OME"
#: For each node, the time of the last request for a metadata file, and whether one could be read; and for how many
#: seconds this is valid.
_readable: "dict[Remote, tuple[float, bool]]" = {}
READABLE_SECONDS = 5.0


@dataclass(frozen=True)
class Remote:
    """A location with an address, such as ``s3://bucket/vol.zarr/recon-1`` or ``zip://recon-1::/data/vol.zip``.

    It has the methods of `Path` that reading needs, and can be pickled. `options` are never printed.

    Attributes:
        url: the address; fsspec's ``::`` chains two of them.
        options: arguments of fsspec's file system, as JSON.

    Example:
        >>> parse_location("s3://bucket/vol.zarr", {"anon": True}) / "recon-1"
        Remote(url='s3://bucket/vol.zarr/recon-1')
    """

    url: str
    options: str = field(default="{}", repr=False)

    @property
    def protocol(self) -> str:
        """Protocol of the address: the part before ``://``."""
        return self.url.partition("://")[0].lower()

    @property
    def is_archive(self) -> bool:
        """True if it is in a zip file, whose members may decode to much more than their stored size."""
        return self.protocol == "zip"

    @property
    def lists(self) -> bool:
        """True if the store can list folders."""
        return self.protocol not in ("http", "https")

    @property
    def url_parts(self) -> tuple[str, str, str]:
        """Protocol, path, and the address that it is chained to, with ``::`` before it."""
        head, chain, tail = self.url.partition("::")
        protocol, _, path = head.partition("://")
        return protocol, path, chain + tail

    def __truediv__(self, name: str) -> Self:
        protocol, path, tail = self.url_parts
        joined = "/".join(part for part in (path.rstrip("/"), str(name).strip("/")) if part)
        return replace(self, url=f"{protocol}://{joined}{tail}")

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.url_parts[1].rstrip("/").rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Last part of the path without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """Suffix of the last part of the path."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Self:
        """Location above; the topmost one is its own parent."""
        protocol, path, tail = self.url_parts
        above = path.rstrip("/").rpartition("/")[0]
        return replace(self, url=f"{protocol}://{above}{tail}") if above else self

    @property
    def parents(self) -> list[Self]:
        """All locations above, the nearest first."""
        above, here = [], self
        while here.parent != here:
            here = here.parent
            above.append(here)
        return above

    def __str__(self) -> str:
        return self.hide(self.url)

    @property
    def title(self) -> str:
        """Location for messages; for the top of an archive, the archive."""
        _, path, tail = self.url_parts
        return str(self) if path or not tail else self.hide(tail.removeprefix("::"))

    @property
    def identity(self) -> str:
        """Text without secrets that differs for every other location, also for the same address at another endpoint."""
        options = {name: value for name, value in json.loads(self.options).items() if name != "anon"}
        return f"{hide_address(self.url)} {json.dumps(redacted({'storage_options': options}), sort_keys=True)}"

    def hide(self, text: str) -> str:
        """Return a text without secrets: values of secret options, users in addresses, signed queries."""
        return hidden(text, option_secrets(json.loads(self.options)))

    def filesystem(self, asynchronous: bool = False) -> Any:
        """Return the file system of fsspec, which is shared by all similar locations of this process.

        Raises:
            MissingExtraError: the library for such addresses is not installed.
            CellMapValueError: the options do not fit.
        """
        return FILE_SYSTEMS.get(self.url, self.options, asynchronous, self.archive_stamp(), self.hide)

    @property
    def archive(self) -> "StorePath | None":
        """File behind a chained address, such as the zip file; None for an address that is not chained."""
        last = self.url_parts[2].rpartition("::")[2]
        if not last:
            return None
        return Remote(last, self.options) if "://" in last else Path(last)

    def archive_stamp(self) -> bytes:
        """Return the stamp of the local archive that holds the location; empty for any other location."""
        _, chain, last = self.url.rpartition("::")
        return file_stamp(last) if chain and "://" not in last else b""

    @property
    def is_open(self) -> bool:
        """True if it is in a public bucket, and no option sets how to sign requests."""
        return is_open(self.url, self.options)

    @property
    def key(self) -> str:
        """Path in the file system."""
        from fsspec.core import strip_protocol

        _, path, tail = self.url_parts
        return path.strip("/") if tail else str(strip_protocol(self.url))

    def read(self) -> bytes | None:
        """Return the content of the object, or None if it does not exist.

        Raises:
            MetadataError: it cannot be read.
        """
        return read_all([self])[0]

    def exists(self) -> bool:
        """Return whether an object, a Zarr node or, if the store can list, a folder exists."""
        if self.name in NODE_FILES:
            return self.read() is not None
        if any(text is not None for text in read_all([self / name for name in NODE_FILES])):
            return True
        with self.readable_errors():
            try:
                return bool(self.lists and self.filesystem().exists(self.key))
            except Exception as e:
                if _is_forbidden(e):  # nothing may be listed, and `read_all` found no node
                    return False
                raise

    def is_dir(self) -> bool:
        """Return the same as `exists`."""
        return self.exists()

    def children(self) -> list[str]:
        """Return the names of its folders; if the store cannot list, the class names in its metadata."""
        with self.readable_errors():
            try:
                entries = self.filesystem().ls(self.key, detail=True) if self.lists else None
            except (FileNotFoundError, NotADirectoryError):
                return []
            except Exception as e:
                if not _is_forbidden(e):
                    raise
                entries = None
        if entries is None:
            return self._class_names()
        names = (str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory")
        return sorted(name for name in names if name[:1] not in ("", "."))

    def _class_names(self) -> list[str]:
        """Return the class names in the attributes of a crop."""
        attributes = self.attributes()
        block = attributes.get("cellmap") if isinstance(attributes, dict) else None
        annotation = block.get("annotation") if isinstance(block, dict) else None
        names = annotation.get("class_names") if isinstance(annotation, dict) else None
        if not isinstance(names, list):
            return []
        if len(names) > MOST_CLASS_NAMES:
            raise MetadataError(f"{self}: it lists {len(names)} class_names; at most {MOST_CLASS_NAMES} are read")
        return sorted(str(name) for name in names)

    def attributes(self) -> Any:
        """Return the attributes of the node; None where they cannot be read."""
        with contextlib.suppress(CellMapError):
            attributes = read_json(self / ".zattrs")
            if attributes:
                return attributes
        with contextlib.suppress(CellMapError):
            return (read_json(self / "zarr.json") or {}).get("attributes")
        return None

    @contextlib.contextmanager
    def readable_errors(self) -> Iterator[None]:
        """Raise the errors of a store as a `MetadataError` without secrets."""
        try:
            yield
        except CellMapError:
            raise
        except Exception as e:  # stores raise any type
            text = f"{self}: cannot be read ({type(e).__name__}: {e})"
            if isinstance(getattr(e, "cause", e), TypeError) and self.options != "{}":
                text += f"; do storage_options fit? They have {', '.join(json.loads(self.options))}"
            raise MetadataError(self.hide(text)) from None


#: A local or remote location.
StorePath = Path | Remote


def identity_of(path: StorePath) -> str:
    """Return a text that differs for every other location."""
    return path.identity if isinstance(path, Remote) else _real_path(str(path))


def _real_path(path: str) -> str:
    """Return `os.path.realpath`; inside `metadata_cache` each folder on the path is resolved once."""
    above, _, name = path.rpartition("/")
    cache = _cache.value
    if cache is None or not above or not name or name in (".", ".."):
        return os.path.realpath(path)
    folder = cache.folders.get(above)
    if folder is None:
        folder = cache.folders[above] = _real_path(above)
    full = f"{folder.rstrip('/')}/{name}"
    return os.path.realpath(full) if os.path.islink(full) else full  # noqa: PTH114  a Path costs more than the call


def parse_location(path: "str | Path | Remote", options: Mapping[str, Any] | None = None) -> StorePath:
    """Return the location of a path or an address: absolute, with ``~`` expanded, also inside a chained address.

    So the location stays the same after a change of the working directory.

    Args:
        path: the path or the address; ``.zip`` files are read by ``zip://inside::/data/vol.zip``.
        options: ``storage_options`` of an address, such as ``{anon: true}``; they have no effect on a path.

    Raises:
        CellMapValueError: an address of a kind that is not read.
    """
    if isinstance(path, Remote):
        return path
    text = str(path)
    protocol = text.partition("://")[0].lower()
    if "://" not in text or (protocol == "file" and "::" not in text):
        return Path(absolute(text))
    if protocol not in PROTOCOLS:
        raise CellMapValueError(f"{text}: addresses that can be read begin with {', '.join(PROTOCOLS)}, not {protocol}")
    if HIDDEN in text:
        raise CellMapValueError(f"{text}: its credentials were hidden where it was saved; give the whole address again")
    return Remote(absolute(text.rstrip("/")), json.dumps(dict(options or {}), sort_keys=True))


def absolute(path: str) -> str:
    """Return a path or an address with its part on this machine absolute and ``~`` expanded; no link is resolved."""
    if path.startswith("/") and "$" not in path:
        return path
    head, chain, last = path.rpartition("::") if "://" in path else ("", "", path)
    if "://" in last and not last.startswith("file://"):
        return path
    local = expanded(last.removeprefix("file://"))
    return f"{head}{chain}{local if local.is_absolute() else local.absolute()}"


def local_path(path: str | Path) -> Path:
    """Return a local path, with ``~`` expanded, for data that cannot be remote.

    Raises:
        CellMapValueError: it is an address.
    """
    location = parse_location(path)
    if isinstance(location, Remote):
        raise CellMapValueError(f"{location}: only a path of this machine will do here")
    return expanded(str(path).removeprefix("file://"))  # relative paths stay so, for messages


def parts_of(path: str) -> PurePosixPath:
    """Return the path of a location, without protocol and chained address."""
    head = str(path).partition("::")[0]
    return PurePosixPath(head.partition("://")[2] or head)


class _MetadataCache:
    """Contents of remote metadata files (None for missing ones), and resolved local folders."""

    def __init__(self) -> None:
        FILE_SYSTEMS.drop_remote_archives()
        self.contents: dict[Remote, bytes | None] = {}
        self.folders: dict[str, str] = {}


_cache = SharedContext(_MetadataCache)


def metadata_cache() -> contextlib.AbstractContextManager[None]:
    """Read each metadata file of a remote store, and resolve each local folder, once while the context is open."""
    return _cache.open()


def read_all(places: Sequence[Remote]) -> list[bytes | None]:
    """Return the contents of several small objects, read concurrently; None for those that do not exist.

    Some stores answer "forbidden" for objects that do not exist, as S3 does where objects may not be listed. A refused
    object counts as missing if a metadata file of the same node, or of a group above it, can be read.

    Raises:
        MetadataError: an object cannot be read.
    """
    cached = _cache.value.contents if _cache.value is not None else {}
    contents = {p: cached[p] for p in places if p in cached}
    requested = [p for p in places if p not in contents]
    if requested:
        with requested[0].readable_errors():
            texts, refused = _fetch(requested)
        for place, error in refused.items():
            if not _readable_around(place):
                raise MetadataError(
                    place.hide(
                        f"{place}: cannot be read ({error}), and nor can any metadata file beside it or above it: "
                        "either nothing there may be read, or the address is wrong"
                    )
                ) from None
            texts[place] = None
        contents |= texts
        cached.update(texts)
    return [contents[p] for p in places]


def _fetch(places: Sequence[Remote]) -> tuple[dict[Remote, bytes | None], dict[Remote, Exception]]:
    """Return contents of objects in one file system, and errors of the forbidden ones; record readable nodes."""
    from cellmap_lightning.io.retrying import DEFAULT_RETRY, ObjectError, tried

    fs = places[0].filesystem()
    keys = {p.key: p for p in places}
    began = time.monotonic()
    refused: dict[str, ObjectError] = {}
    # In an archive, decoding is bounded, since its directory may be wrong; other stores may not support byte ranges.
    end = MOST_JSON_BYTES + 1 if places[0].is_archive else None

    def read(keys: Sequence[str]) -> dict[str, Any]:
        # Not `cat`, which treats brackets and stars in names as patterns.
        if len(keys) == 1:
            return _one(fs, keys[0], end)
        starts = None if end is None else [0] * len(keys)
        return dict(zip(keys, fs.cat_ranges(list(keys), starts, end, on_error="return"), strict=True))

    texts = {keys[key]: text for key, text in tried(read, list(keys), DEFAULT_RETRY, refused).items()}
    for place, text in texts.items():
        if text is not None and place.name in NODE_FILES:
            _readable[place.parent] = began, True
    return texts, {keys[key]: error for key, error in refused.items()}


def _one(fs: Any, key: str, end: int | None) -> dict[str, Any]:
    try:
        return {key: fs.cat_file(key) if end is None else fs.cat_file(key, 0, end)}
    except Exception as e:
        return {key: e}


def _readable_around(place: Remote) -> bool:
    """Return True if a metadata file of an object's node, or of a group above it, can be read or recently was."""
    node = place.parent
    for here in (node, *node.parents):
        if not here.url_parts[1]:
            continue
        asked, answer = _readable.get(here, (float("-inf"), False))
        if time.monotonic() - asked > READABLE_SECONDS:
            began = time.monotonic()
            with here.readable_errors():
                texts, _ = _fetch([here / name for name in NODE_FILES])
            answer = any(text is not None for text in texts.values())
            _readable[here] = began, answer
        if answer:
            return True
    return False


def _is_forbidden(error: Exception) -> bool:
    from cellmap_lightning.io.retrying import is_forbidden

    return is_forbidden(error)


def prefetch_metadata(nodes: Sequence[StorePath]) -> None:
    """Read the metadata of many images concurrently into the `metadata_cache`, if it is open."""
    remote = [node for node in nodes if isinstance(node, Remote)]
    if _cache.value is None or not remote:
        return
    names = ("zarr.json", ".zattrs", ".zgroup")
    read_all([node / name for node in remote for name in names])
    levels = []
    for node in remote:
        attributes = node.attributes()
        block = attributes.get("ome", attributes) if isinstance(attributes, dict) else {}
        with contextlib.suppress(AttributeError, KeyError, TypeError, IndexError):
            levels += [node / str(dataset["path"]) for dataset in block["multiscales"][0]["datasets"]]
    if levels:
        read_all([level / name for level in levels for name in ("zarr.json", ".zarray", ".zattrs")])


def exists(path: StorePath) -> bool:
    """Return whether a location exists.

    Raises:
        MetadataError: a folder on the path may not be read, or the path is not valid.
    """
    try:
        return path.exists()
    except CellMapError:
        raise
    except (OSError, ValueError) as e:
        raise MetadataError(f"{path}: cannot be examined ({reason(e) if isinstance(e, OSError) else e})") from e


def read_json(path: StorePath) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if the file does not exist.

    Raises:
        MetadataError: the file cannot be read, is not JSON, or holds something other than an object.
    """
    try:
        text = _text(path)
        if text is None:
            return None
        content = json.loads(text)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except CellMapError:
        raise
    except OSError as e:
        raise MetadataError(f"{path}: cannot be read ({reason(e)})") from e
    except (ValueError, RecursionError) as e:
        raise MetadataError(f"{path}: not valid JSON ({e})") from e
    if not isinstance(content, dict):
        raise MetadataError(f"{path}: should hold a JSON object, holds {type(content).__name__}")
    return content


def _text(path: StorePath) -> bytes | None:
    if not isinstance(path, Remote):
        try:
            return read_regular(str(path), MOST_JSON_BYTES)
        except (IrregularFileError, LargeFileError) as e:
            raise MetadataError(f"{path}: {e}") from None
    text = path.read()
    if text is not None and len(text) > MOST_JSON_BYTES:
        raise MetadataError(f"{path}: it has more than {MOST_JSON_BYTES} bytes; at most {MOST_JSON_BYTES} are read")
    return text


def children(path: StorePath) -> list[str]:
    """Return the names of the folders in ``path``, such as the classes of a crop, except for `LISTING`."""
    try:
        if isinstance(path, Remote):
            names = path.children()
        else:
            names = sorted(p.name for p in path.iterdir() if is_folder(p) and not p.name.startswith("."))
    except (OSError, CellMapError):
        return []
    return [name for name in names if name != LISTING]
