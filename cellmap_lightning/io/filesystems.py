"""File systems of fsspec, cached per process."""

import json
import os
import threading
from collections.abc import Callable
from typing import Any

from cellmap_lightning.errors import CellMapValueError, MetadataError, MissingExtraError, missing_extra
from cellmap_lightning.io.files import problem_of_archive

#: The extra that installs the library for each protocol.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
#: Protocols of addresses that can be read.
PROTOCOLS = (*EXTRAS, "zip", "memory")
#: Public buckets; others are read with the credentials of the environment.
_OPEN_BUCKETS = ("janelia-cosem-datasets",)
#: Connections to a store at a time.
CONNECTIONS = 64


class FileSystems:
    """A cache of file systems by the arguments that they were created with, each with the stamp of its archive."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop all file systems, as a forked child must: their threads and connections are those of the parent."""
        self._lock = threading.Lock()
        self._cached: dict[tuple[Any, ...], tuple[bytes, Any]] = {}

    def get(self, url: str, options: str, asynchronous: bool, stamp: bytes, hide: Callable[[str], str]) -> Any:
        """Return the file system of an address.

        Args:
            url: the address.
            options: arguments of the file system, as JSON.
            asynchronous: for use in an event loop.
            stamp: stamp of the archive that the address is chained to; with another one it is opened again.
            hide: removes secrets from a message.

        Raises:
            MissingExtraError: the library for such addresses is not installed.
            CellMapValueError: the options do not fit.
            MetadataError: the archive is not a regular file.
        """
        head, chain, tail = url.partition("::")
        protocol, _, path = head.partition("://")
        bucket = path.partition("/")[0] if protocol == "s3" else ""
        key = (protocol, chain + tail, options, asynchronous, bucket)
        with self._lock:
            cached = self._cached.get(key)
            if cached is None or cached[0] != stamp:
                problem = problem_of_archive(url)
                if problem:
                    raise MetadataError(problem)
                # The listing of an archive that was replaced is dropped, and closed with its last reader.
                cached = self._cached[key] = stamp, _create(url, options, asynchronous, hide)
            return cached[1]

    def drop_remote_archives(self) -> None:
        """Drop the file systems of remote archives, whose listings may be stale: they have no stamps."""
        with self._lock:
            for key in [key for key in self._cached if "://" in key[1]]:
                del self._cached[key]


def is_open(url: str, options: str) -> bool:
    """Return whether an address is in a public bucket, and no option sets how to sign requests."""
    signing = {"anon", "key", "secret", "token", "profile"} & set(json.loads(options))
    return not signing and url.rpartition("::")[2].partition("://")[2].partition("/")[0] in _OPEN_BUCKETS


def _create(url: str, options: str, asynchronous: bool, hide: Callable[[str], str]) -> Any:
    import fsspec

    settings = json.loads(options)
    last = url.rpartition("::")[2]
    protocol = last.partition("://")[0].lower() if "://" in last else "file"
    if protocol in ("s3", "s3a"):
        if is_open(url, options):
            settings["anon"] = True
        settings["config_kwargs"] = {"max_pool_connections": CONNECTIONS} | settings.get("config_kwargs", {})
    if protocol in ("s3", "s3a", "gs", "gcs"):  # cached listings and versions would become stale
        settings.setdefault("use_listings_cache", False)
    if protocol in EXTRAS and "::" not in url:
        settings["asynchronous"] = asynchronous
    arguments = {protocol: settings} if "::" in url else settings
    try:
        return fsspec.core.url_to_fs(url, skip_instance_cache=True, **arguments)[0]
    except ImportError as e:
        if protocol in EXTRAS:
            raise missing_extra(EXTRAS[protocol], f"{protocol}:// needs a library") from e
        raise MissingExtraError(hide(f"{protocol}:// needs a library that is not installed: {e}")) from e
    except (TypeError, ValueError) as e:
        raise CellMapValueError(hide(f"{hide(url)}: storage_options do not fit: {e}")) from e


#: The file systems of this process.
FILE_SYSTEMS = FileSystems()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=FILE_SYSTEMS.reset)
