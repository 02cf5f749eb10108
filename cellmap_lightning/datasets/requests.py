"""The sample that a loader requests while it calls ``__getitem__`` of user code."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """A sample of the stream.

    Attributes:
        sample: its number, which decides its augmentation.
        seed: the loader's seed.
        source: the dataset that the number was drawn from; None where user code chooses the position.
        draw: the `Draw` of that dataset.
    """

    sample: int
    seed: int
    source: Any = None
    draw: Any = None


_local = threading.local()


def current_request() -> Request | None:
    """Return the request of the calling thread, if a loader is calling."""
    return getattr(_local, "request", None)


@contextmanager
def requesting(request: Request) -> Iterator[None]:
    """Make a request the current one of the calling thread."""
    before = current_request()
    _local.request = request
    try:
        yield
    finally:
        _local.request = before
