"""Values shared by the whole process while a context is open."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class SharedContext(Generic[T]):
    """A value, such as a cache, that exists while any thread of the process has the context open; contexts nest.

    Args:
        create: creates the value when the outermost context is entered.

    Attributes:
        value: the value; None outside of all contexts.

    Example:
        >>> cache = SharedContext(dict)
        >>> with cache.open():
        ...     cache.value["key"] = 1
    """

    def __init__(self, create: Callable[[], T]) -> None:
        self.value: T | None = None
        self._create = create
        self._depth = 0
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset_lock)

    def _reset_lock(self) -> None:
        self._lock = threading.Lock()  # the thread that may hold the old one is not in the child

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Open the context; the value is dropped when the last open one is closed."""
        with self._lock:
            if self._depth == 0:
                self.value = self._create()
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if self._depth == 0:
                    self.value = None
