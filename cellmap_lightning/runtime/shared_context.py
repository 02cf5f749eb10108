"""Values shared by the whole process while a context is open."""

import contextlib
import os
import threading
from collections import Counter
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
        #: Number of open contexts of each thread, by its identifier.
        self._depths: Counter[int] = Counter()
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        # Only the thread that forked exists in the child: others may hold the old lock, and never close their contexts.
        self._lock = threading.Lock()
        thread = threading.get_ident()
        self._depths = Counter({thread: self._depths[thread]} if self._depths[thread] else {})
        if not self._depths:
            self.value = None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Open the context; the value is dropped when the last open one is closed."""
        owner = threading.get_ident()
        with self._lock:
            if not self._depths:
                self.value = self._create()
            self._depths[owner] += 1
        try:
            yield
        finally:
            with self._lock:
                self._depths[owner] -= 1
                self._depths += Counter()  # keeps positive counts only
                if not self._depths:
                    self.value = None
