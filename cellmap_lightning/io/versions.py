"""Versions of objects in stores elsewhere: what their servers say that changes when an object is written again."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from cellmap_lightning.io.store import CONNECTIONS, Remote

#: What servers call it: HTTP and S3, Google, and fsspec's own memory.
_NAMES = ("ETag", "etag", "Last-Modified", "LastModified", "VersionId", "generation", "updated", "created")


def versions(places: Sequence[Remote]) -> list[str]:
    """Return the version of each object: its entity tag, time and number, as far as the server sends them.

    Objects are asked for concurrently, each with one request for its headers. In an archive, the version is that of the
    archive. An empty text stands for a server that sends nothing, or refuses such requests.

    Args:
        places: objects that exist.

    Raises:
        MetadataError: a server does not answer, also when it is asked again.
    """
    found: dict[Remote, str] = {}
    groups: dict[int, tuple[Any, dict[str, Remote]]] = {}
    objects = [_object_of(place) for place in places]
    for thing in {thing for thing in objects if thing is not None}:
        fs = thing.filesystem()
        groups.setdefault(id(fs), (fs, {}))[1][thing.key] = thing
    for fs, keys in groups.values():
        first = next(iter(keys.values()))
        with first._clear():
            answers = _asked_again(fs, list(keys))
        found |= {keys[key]: _version(answer) for key, answer in answers.items()}
    return [found[thing] if thing is not None else "" for thing in objects]


def _object_of(place: Remote) -> Remote | None:
    """The object that a server is asked for; None for archives on this machine, whose files have stamps."""
    archive = place.archive
    if archive is None:
        return place
    return archive if isinstance(archive, Remote) else None


def _asked_again(fs: Any, keys: Sequence[str]) -> dict[str, Any]:
    """Headers or entries of objects; None for those that the server does not describe.

    Raises:
        ObjectError: it does not answer.
    """
    from cellmap_lightning.io.retrying import DEFAULT_RETRY, passes, tried

    def ask(keys: Sequence[str]) -> dict[str, Any]:
        answers = _ask(fs, keys, DEFAULT_RETRY.timeout / 2)
        # What will not pass, such as a method that is not allowed, is no fault: reading says what is wrong.
        return {
            key: FileNotFoundError(key) if isinstance(answer, Exception) and not passes(answer) else answer
            for key, answer in answers.items()
        }

    return dict(tried(ask, keys, DEFAULT_RETRY))


def _ask(fs: Any, keys: Sequence[str], seconds: float) -> dict[str, Any]:
    if not getattr(fs, "async_impl", False):
        return {key: _or_error(partial(fs.info, key)) for key in keys}
    from fsspec.asyn import sync
    from fsspec.implementations.http import HTTPFileSystem

    describe: Callable[[str], Awaitable[Any]] = fs._info
    if isinstance(fs, HTTPFileSystem):  # whose own method asks twice, and takes every error for a missing file
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
    except Exception as e:  # stores raise whatever they like
        return e


def _version(answer: Mapping[str, Any] | None) -> str:
    found = [(name, str(answer[name])) for name in _NAMES if answer.get(name)] if answer is not None else []
    return repr(found) if found else ""
