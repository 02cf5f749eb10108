"""Places where data lies, on this machine or elsewhere, and the JSON under them.

A place is a `Path` or a `Remote`, which is an address with what it takes to read there. Nothing is listed unless
somebody asks what is there, or an error has to say so; over HTTP nothing can be.
"""

import contextlib
import difflib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cellmap_lightning.errors import (
    CellMapError,
    CellMapFileNotFoundError,
    CellMapValueError,
    MetadataError,
    MissingExtraError,
)
from cellmap_lightning.io.files import IrregularFileError, LargeFileError, problem_of_archive, read_regular
from cellmap_lightning.io.stamps import file_stamp
from cellmap_lightning.redaction import HIDDEN, hidden, hide_address, option_secrets, redacted

#: Bytes of a metadata file at most: those of real volumes have kilobytes, with consolidated metadata megabytes.
MOST_JSON_BYTES = 1 << 24
#: Class names in the attributes of a crop at most.
MOST_CLASS_NAMES = 10_000
#: What makes a folder a node of Zarr.
NODE_FILES = ("zarr.json", ".zattrs", ".zgroup", ".zarray")
#: The group in which OME-NGFF lists the images of a container: no image, and no class.
LISTING = "OME"
#: The extra that brings what reads an address.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
_PROTOCOLS = (*_EXTRAS, "zip", "memory")
#: Buckets that anybody may read; others are read with the credentials of the environment.
_OPEN_BUCKETS = ("janelia-cosem-datasets",)
#: Connections to a store at a time.
CONNECTIONS = 64

#: File systems of this process by what they were made with, each with the stamp of its archive.
_filesystems: dict[tuple[Any, ...], tuple[bytes, Any]] = {}
_lock = threading.Lock()
#: Texts of metadata files that were read, while somebody keeps them; None where there is none.
_kept: "dict[Remote, bytes | None] | None" = None
#: Resolved folders of this machine, inside `metadata_cache`.
_folders: dict[str, str] | None = None
#: When a metadata file of a node was last asked for, and whether one could be read.
_readable: "dict[Remote, tuple[float, bool]]" = {}
#: Seconds for which that counts.
READABLE_SECONDS = 5.0


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _filesystems.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class Remote:
    """A place behind an address, such as ``s3://bucket/vol.zarr/recon-1`` or ``zip://recon-1::/data/vol.zip``.

    It behaves as a `Path` as far as reading goes, and can be sent to another process. What is in `options` is never
    shown.

    Attributes:
        url: the address; fsspec's ``::`` chains two of them.
        options: what fsspec's file system is made with, as JSON.
    """

    url: str
    options: str = field(default="{}", repr=False)

    @property
    def protocol(self) -> str:
        """What stands before ``://``."""
        return self.url.partition("://")[0].lower()

    @property
    def is_archive(self) -> bool:
        """Whether it is in a zip file, whose members may decode to much more than they take there."""
        return self.protocol == "zip"

    @property
    def lists(self) -> bool:
        """Whether it can be asked what is there."""
        return self.protocol not in ("http", "https")

    def _parts(self) -> tuple[str, str, str]:
        """Protocol, path, and what the address is chained to."""
        head, chain, tail = self.url.partition("::")
        protocol, _, path = head.partition("://")
        return protocol, path, chain + tail

    def __truediv__(self, name: str) -> "Remote":
        protocol, path, tail = self._parts()
        joined = "/".join(part for part in (path.rstrip("/"), str(name).strip("/")) if part)
        return Remote(f"{protocol}://{joined}{tail}", self.options)

    @property
    def name(self) -> str:
        """The last part."""
        return self._parts()[1].rstrip("/").rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The ending of the last part."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "Remote":
        """The place above; the topmost one is its own."""
        protocol, path, tail = self._parts()
        above = path.rstrip("/").rpartition("/")[0]
        return Remote(f"{protocol}://{above}{tail}", self.options) if above else self

    @property
    def parents(self) -> list["Remote"]:
        """All places above, the nearest first."""
        found, here = [], self
        while here.parent != here:
            here = here.parent
            found.append(here)
        return found

    def __str__(self) -> str:
        return self.hide(self.url)

    @property
    def title(self) -> str:
        """The place, for messages; of the top of an archive, the archive."""
        _, path, tail = self._parts()
        return str(self) if path or not tail else self.hide(tail.removeprefix("::"))

    @property
    def identity(self) -> str:
        """What tells it from every other place: one address may lead elsewhere by another endpoint. No secrets."""
        options = {name: value for name, value in json.loads(self.options).items() if name != "anon"}
        return f"{hide_address(self.url)} {json.dumps(redacted({'storage_options': options}), sort_keys=True)}"

    def hide(self, text: str) -> str:
        """A text without what nobody should see: values of secret options, users in addresses, signed queries."""
        return hidden(text, option_secrets(json.loads(self.options)))

    def filesystem(self, asynchronous: bool = False) -> Any:
        """The file system of fsspec, one for all places like this in this process.

        Raises:
            MissingExtraError: what reads such addresses is not installed.
            CellMapValueError: nothing reads them.
        """
        protocol, path, tail = self._parts()
        key = (protocol, tail, self.options, asynchronous, path.partition("/")[0] if protocol == "s3" else "")
        stamp = self.archive_stamp()
        with _lock:
            made = _filesystems.get(key)
            if made is None or made[0] != stamp:
                wrong = problem_of_archive(self.url)
                if wrong:
                    raise MetadataError(wrong)
                # The listing of an archive that was replaced is dropped, and closed with its last reader.
                made = _filesystems[key] = stamp, self._filesystem(asynchronous)
            return made[1]

    @property
    def archive(self) -> "StorePath | None":
        """The file behind a chained address, such as the zip file; None for an address that is not chained."""
        last = self._parts()[2].rpartition("::")[2]
        if not last:
            return None
        return Remote(last, self.options) if "://" in last else Path(last)

    def archive_stamp(self) -> bytes:
        """Return the stamp of an archive on this machine, for each object in it; empty for any other place."""
        _, chain, last = self.url.rpartition("::")
        return file_stamp(last) if chain and "://" not in last else b""

    def _filesystem(self, asynchronous: bool) -> Any:
        import fsspec

        options = json.loads(self.options)
        last = self.url.rpartition("::")[2]
        protocol = last.partition("://")[0].lower() if "://" in last else "file"
        if protocol in ("s3", "s3a"):
            if self.is_open:
                options["anon"] = True
            options["config_kwargs"] = {"max_pool_connections": CONNECTIONS} | options.get("config_kwargs", {})
        if protocol in ("s3", "s3a", "gs", "gcs"):  # otherwise listings and versions would stay as they were first seen
            options.setdefault("use_listings_cache", False)
        if protocol in _EXTRAS and "::" not in self.url:
            options["asynchronous"] = asynchronous
        given = {protocol: options} if "::" in self.url else options
        try:
            return fsspec.core.url_to_fs(self.url, skip_instance_cache=True, **given)[0]
        except ImportError as e:
            extra = _EXTRAS.get(protocol, protocol)
            raise MissingExtraError(
                f'{protocol}:// needs a library that is not installed: pip install "cellmap-lightning[{extra}]"'
            ) from e
        except (TypeError, ValueError) as e:
            raise CellMapValueError(self.hide(f"{self}: storage_options do not fit: {e}")) from e

    @property
    def is_open(self) -> bool:
        """Whether it is in a bucket that anybody may read, and nobody said how to read it."""
        last = self.url.rpartition("::")[2]
        known = {"anon", "key", "secret", "token", "profile"} & set(json.loads(self.options))
        return not known and last.partition("://")[2].partition("/")[0] in _OPEN_BUCKETS

    @property
    def key(self) -> str:
        """What the file system calls it."""
        _, path, tail = self._parts()
        if tail:
            return path.strip("/")
        return str(self.filesystem()._strip_protocol(self.url))

    def read(self) -> bytes | None:
        """The object, or None where there is none.

        Raises:
            MetadataError: it cannot be read.
        """
        return read_all([self])[0]

    def exists(self) -> bool:
        """Whether there is an object, or a node of Zarr, or, where it can be told, a folder."""
        if self.name in NODE_FILES:
            return self.read() is not None
        if any(text is not None for text in read_all([self / name for name in NODE_FILES])):
            return True
        with self._clear():
            try:
                return bool(self.lists and self.filesystem().exists(self.key))
            except Exception as e:
                if _is_forbidden(e):  # nothing may be listed, and `read_all` found no node
                    return False
                raise

    def is_dir(self) -> bool:
        """See `exists`."""
        return self.exists()

    def children(self) -> list[str]:
        """Names of the folders in it; where nothing can be listed, those of the classes that its metadata names."""
        with self._clear():
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
        """Names of the classes in the attributes of a crop."""
        attributes = self._kept_text(".zattrs") or (self._kept_text("zarr.json") or {}).get("attributes")
        block = attributes.get("cellmap") if isinstance(attributes, dict) else None
        annotation = block.get("annotation") if isinstance(block, dict) else None
        names = annotation.get("class_names") if isinstance(annotation, dict) else None
        if not isinstance(names, list):
            return []
        if len(names) > MOST_CLASS_NAMES:
            raise MetadataError(f"{self}: it lists {len(names)} class_names; at most {MOST_CLASS_NAMES} are read")
        return sorted(str(name) for name in names)

    def _kept_text(self, name: str) -> Any:
        try:
            return read_json(self / name)
        except CellMapError:
            return None

    @contextlib.contextmanager
    def _clear(self) -> Iterator[None]:
        """Whatever a store raises, as an error of ours that hides what it must."""
        try:
            yield
        except CellMapError:
            raise
        except Exception as e:  # stores raise whatever they like
            text = f"{self}: cannot be read ({type(e).__name__}: {e})"
            if isinstance(getattr(e, "cause", e), TypeError) and self.options != "{}":
                text += f"; do storage_options fit? They have {', '.join(json.loads(self.options))}"
            raise MetadataError(self.hide(text)) from None


#: Where data lies.
StorePath = Path | Remote


def identity_of(path: StorePath) -> str:
    """What tells a place from every other one."""
    return path.identity if isinstance(path, Remote) else _real_path(str(path))


def _real_path(path: str) -> str:
    """The same as `os.path.realpath`; inside `metadata_cache` each folder on the way is resolved once."""
    above, _, name = path.rpartition("/")
    known = _folders
    if known is None or not above or not name or name in (".", ".."):
        return os.path.realpath(path)
    folder = known.get(above)
    if folder is None:
        folder = known[above] = _real_path(above)
    full = f"{folder.rstrip('/')}/{name}"
    return os.path.realpath(full) if os.path.islink(full) else full  # noqa: PTH114  a Path costs more than the call


def parse_location(path: "str | Path | Remote", options: Mapping[str, Any] | None = None) -> StorePath:
    """Return where a path or an address leads: absolute, with ``~`` expanded, also inside a chained address.

    So the place stays the same after a change of the working directory.

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
    if protocol not in _PROTOCOLS:
        raise CellMapValueError(
            f"{text}: addresses that can be read begin with {', '.join(_PROTOCOLS)}, not {protocol}"
        )
    if HIDDEN in text:
        raise CellMapValueError(f"{text}: its credentials were hidden where it was noted; give the whole address again")
    return Remote(absolute(text.rstrip("/")), json.dumps(dict(options or {}), sort_keys=True))


def absolute(path: str) -> str:
    """Return a path or an address with its part on this machine absolute and ``~`` expanded; no link is resolved."""
    if path.startswith("/"):
        return path
    head, chain, last = path.rpartition("::") if "://" in path else ("", "", path)
    if "://" in last and not last.startswith("file://"):
        return path
    found = Path(last.removeprefix("file://")).expanduser()
    return f"{head}{chain}{found if found.is_absolute() else found.absolute()}"


def local_path(path: str | Path) -> Path:
    """A path of this machine, with ``~`` expanded, for what is not read from elsewhere.

    Raises:
        CellMapValueError: an address was given.
    """
    found = parse_location(path)
    if isinstance(found, Remote):
        raise CellMapValueError(f"{found}: only a path of this machine will do here")
    return Path(str(path).removeprefix("file://")).expanduser()  # as it was given, for messages


def parts_of(path: str) -> PurePosixPath:
    """A path or an address as names, to look at them."""
    head = str(path).partition("::")[0]
    return PurePosixPath(head.partition("://")[2] or head)


# ---------------------------------------------------------------------------------------------------- metadata


@contextlib.contextmanager
def metadata_cache() -> Iterator[None]:
    """Read each metadata file of a remote store, and resolve each folder, once while the context is open."""
    global _kept, _folders
    with _lock:
        if _kept is None:  # listings of archives elsewhere are read again, as these have no stamps
            for key in [key for key in _filesystems if "://" in key[1]]:
                del _filesystems[key]
        outer, _kept = _kept, {} if _kept is None else _kept
        outer_folders, _folders = _folders, {} if _folders is None else _folders
    try:
        yield
    finally:
        with _lock:
            _kept, _folders = outer, outer_folders


def read_all(places: Sequence[Remote]) -> list[bytes | None]:
    """Read several small objects at a time; None where there is none.

    Some stores answer "forbidden" for what does not exist, as S3 does where objects may not be listed. A refused object
    counts as missing where a metadata file of the same node, or of a group above it, can be read.

    Raises:
        MetadataError: one of them cannot be read.
    """
    found: dict[Remote, bytes | None] = {}
    if _kept is not None:
        found = {p: _kept[p] for p in places if p in _kept}
    wanted = [p for p in places if p not in found]
    if wanted:
        with wanted[0]._clear():
            texts, refused = _fetch(wanted)
        for place, error in refused.items():
            if not _readable_around(place):
                raise MetadataError(
                    place.hide(
                        f"{place}: cannot be read ({error}), and nor can any metadata file beside it or above it: "
                        "either nothing there may be read, or the address is wrong"
                    )
                ) from None
            texts[place] = None
        found |= texts
        if _kept is not None:
            _kept.update(texts)
    return [found[p] for p in places]


def _fetch(places: Sequence[Remote]) -> tuple[dict[Remote, bytes | None], dict[Remote, Exception]]:
    """Read objects of one file system, and note which nodes can be read; the errors of those that are forbidden."""
    from cellmap_lightning.io.retrying import DEFAULT_RETRY, ObjectError, tried

    fs = places[0].filesystem()
    keys = {p.key: p for p in places}
    began = time.monotonic()
    refused: dict[str, ObjectError] = {}
    # Of an archive no more is decoded, whatever its directory says; others may not give parts of objects.
    end = MOST_JSON_BYTES + 1 if places[0].is_archive else None

    def read(keys: Sequence[str]) -> dict[str, Any]:
        # Not `cat`, which takes brackets and stars in names for patterns.
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
    except Exception as e:  # as `cat` returns them
        return {key: e}


def _readable_around(place: Remote) -> bool:
    """Return True if a metadata file of an object's node, or of a group above it, can be read or recently was."""
    node = place.parent
    for here in (node, *node.parents):
        if not here._parts()[1]:
            continue
        asked, answer = _readable.get(here, (float("-inf"), False))
        if time.monotonic() - asked > READABLE_SECONDS:
            began = time.monotonic()
            with here._clear():
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
    """Read the metadata of many images at a time, for whoever opens them next, while somebody keeps them."""
    remote = [node for node in nodes if isinstance(node, Remote)]
    if _kept is None or not remote:
        return
    names = ("zarr.json", ".zattrs", ".zgroup")
    read_all([node / name for node in remote for name in names])
    levels = []
    for node in remote:
        attributes = node._kept_text(".zattrs") or (node._kept_text("zarr.json") or {}).get("attributes", {})
        block = attributes.get("ome", attributes) if isinstance(attributes, dict) else {}
        with contextlib.suppress(AttributeError, KeyError, TypeError, IndexError):
            levels += [node / str(dataset["path"]) for dataset in block["multiscales"][0]["datasets"]]
    if levels:
        read_all([level / name for level in levels for name in ("zarr.json", ".zarray", ".zattrs")])


def exists(path: StorePath) -> bool:
    """Whether there is anything at a place.

    Raises:
        MetadataError: a folder on the way may not be looked into, or the path cannot be one.
    """
    try:
        return path.exists()
    except CellMapError:
        raise
    except (OSError, ValueError) as e:
        raise MetadataError(f"{path}: cannot be looked at ({getattr(e, 'strerror', None) or e})") from e


def read_json(path: StorePath) -> dict[str, Any] | None:
    """The object in a JSON file, or None when there is no such file.

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
        raise MetadataError(f"{path}: cannot be read ({e.strerror})") from e
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
    """Names of the folders in ``path``, such as the classes of a crop; that which lists the images is left out."""
    try:
        if isinstance(path, Remote):
            names = path.children()
        else:
            names = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except (OSError, CellMapError):
        return []
    return [name for name in names if name != LISTING]


def missing(path: StorePath, what: str) -> CellMapFileNotFoundError:
    """The error for a path that is not there: how far it exists, and what stands there instead."""
    if isinstance(path, Remote):
        return _missing_remote(path, what)
    found = path
    while not exists(found) and found != found.parent:
        found = found.parent
    text = f"{what} {path} does not exist"
    if found != path:
        lost = path.relative_to(found).parts[0]
        text += f": {found} has no {lost!r}{_instead(lost, children(found))}"
    return CellMapFileNotFoundError(text)


def _missing_remote(path: Remote, what: str) -> CellMapFileNotFoundError:
    text = f"{what} {path} does not exist"
    if not path.lists:
        return CellMapFileNotFoundError(f"{text}: the server has none of {', '.join(NODE_FILES)} there")
    protocol, inside, tail = path._parts()
    above = path.parents
    if tail and inside:  # the archive itself
        above.append(Remote(f"{protocol}://{tail}", path.options))
    for place in above:
        names = children(place)
        if names:
            lost = inside.removeprefix(place._parts()[1]).strip("/").partition("/")[0]
            return CellMapFileNotFoundError(f"{text}: {place.title} has no {lost!r}{_instead(lost, names)}")
    return CellMapFileNotFoundError(
        f"{text}: the store has none of {', '.join(NODE_FILES)} there, and nothing may be listed there or above"
    )


def _instead(lost: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(lost, names, 3, 0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; it has {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}" if names else ""
