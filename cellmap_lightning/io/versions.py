"""Versions of remote objects: values in the answers of servers that change when an object is written again."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from cellmap_lightning.io.filesystems import CONNECTIONS
from cellmap_lightning.io.store import Remote

#: Names of the version: of HTTP and S3, of Google, and of fsspec's memory file system.
_NAMES = ("ETag", "etag", "Last-Modified", "LastModified", "VersionId", "generation", "updated", "created")


def versions(places: Sequence[Remote]) -> list[str]:
    """Return the version of each object: its entity tag, time and number, as far as the server sends them.

    Objects are requested concurrently, each with one request for its headers. In an archive, the version is that of the
    archive. It is "" where the server sends none, or refuses such requests.

    Args:
        places: objects that exist.

    Raises:
        MetadataError: a server does not answer, after retries.
    """
    by_object: dict[Remote, str] = {}
    groups: dict[int, tuple[Any, dict[str, Remote]]] = {}
    objects = [_object_of(place) for place in places]
    for remote in {remote for remote in objects if remote is not None}:
        fs = remote.filesystem()
        groups.setdefault(id(fs), (fs, {}))[1][remote.key] = remote
    for fs, keys in groups.values():
        first = next(iter(keys.values()))
        with first.readable_errors():
            answers = _with_retries(fs, list(keys))
        by_object |= {keys[key]: _version(answer) for key, answer in answers.items()}
    return [by_object[remote] if remote is not None else "" for remote in objects]


def _object_of(place: Remote) -> Remote | None:
    """Return the object that is requested; None for local archives, whose files have stamps."""
    archive = place.archive
    if archive is None:
        return place
    return archive if isinstance(archive, Remote) else None


def _with_retries(fs: Any, keys: Sequence[str]) -> dict[str, Any]:
    """Return headers or entries of objects; None for those that the server does not describe.

    Raises:
        ObjectError: it does not answer.
    """
    from cellmap_lightning.io.retrying import DEFAULT_RETRY, is_transient, tried

    def ask(keys: Sequence[str]) -> dict[str, Any]:
        answers = _ask(fs, keys, DEFAULT_RETRY.timeout / 2)
        # A permanent error, such as a method that is not allowed, means no version: reading reports real problems.
        return {
            key: FileNotFoundError(key) if isinstance(answer, Exception) and not is_transient(answer) else answer
            for key, answer in answers.items()
        }

    return dict(tried(ask, keys, DEFAULT_RETRY))


def _ask(fs: Any, keys: Sequence[str], seconds: float) -> dict[str, Any]:
    if not getattr(fs, "async_impl", False):
        return {key: _or_error(partial(fs.info, key)) for key in keys}
    from fsspec.asyn import sync
    from fsspec.implementations.http import HTTPFileSystem

    describe: Callable[[str], Awaitable[Any]] = getattr(fs, "_info", fs.info)
    if isinstance(fs, HTTPFileSystem):  # its method sends two requests, and treats every error as a missing file
        describe = partial(_headers, fs)

    async def ask_all() -> list[Any]:
        free = asyncio.Semaphore(CONNECTIONS)

        async def one(key: str) -> Any:
            async with free, asyncio.timeout(seconds):
                return await describe(key)

        return await asyncio.gather(*map(one, keys), return_exceptions=True)

    return dict(zip(keys, sync(fs.loop, ask_all), strict=True))


async def _headers(fs: Any, url: str) -> Mapping[str, Any]:
    session = await fs.set_session()
    options = {"allow_redirects": True} | fs.kwargs
    options["headers"] = dict(options.get("headers", {})) | {"Accept-Encoding": "identity"}
    async with session.head(fs.encode_url(url), **options) as response:
        response.raise_for_status()
        headers: Mapping[str, Any] = response.headers
        return headers


def _or_error(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as e:  # stores raise any type
        return e


def _version(answer: Mapping[str, Any] | None) -> str:
    values = [(name, str(answer[name])) for name in _NAMES if answer.get(name)] if answer is not None else []
    return repr(values) if values else ""
