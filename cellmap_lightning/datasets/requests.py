"""Thread-local requests, by which a loader passes a sample's number through ``__getitem__`` of user code."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """A sample of the stream.

    Attributes:
        sample: its number, from which its augmentation follows.
        seed: the loader's seed.
        source: the dataset that it was drawn from; None if user code chooses the position.
        draw: `Draw` of that dataset.
    """

    sample: int
    seed: int
    source: Any = None
    draw: Any = None


_local = threading.local()


def current_request() -> Request | None:
    """Return the current request of the calling thread; None outside of a loader's call."""
    return getattr(_local, "request", None)


@contextmanager
def requesting(request: Request) -> Iterator[None]:
    """Make a request the current one of the calling thread, within a ``with`` block."""
    before = current_request()
    _local.request = request
    try:
        yield
    finally:
        _local.request = before
