"""Weak references whose callbacks run in C.

Python prints and drops an exception that is raised while an object is finalised, a KeyboardInterrupt too. It is raised
between two instructions of Python code, so callbacks without Python code cannot lose it; those of `weakref.finalize`
and `weakref.WeakSet` can.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from operator import methodcaller
from typing import Any, Generic, TypeVar

T = TypeVar("T")
A = TypeVar("A")


class WeakGroup(Generic[T]):
    """A set of weak references that objects leave when they are garbage collected."""

    def __init__(self) -> None:
        self._references: set[weakref.ref[T]] = set()

    def add(self, item: T) -> None:
        """Add an object."""
        self._references.add(weakref.ref(item, self._references.discard))

    def discard(self, item: T) -> None:
        """Remove an object if it is there."""
        self._references.discard(weakref.ref(item))

    def __contains__(self, item: T) -> bool:
        return weakref.ref(item) in self._references

    def __iter__(self) -> Iterator[T]:
        # The copy is made without allocating anything that could start the garbage collector meanwhile.
        items = [reference() for reference in self._references.copy()]
        return iter([item for item in items if item is not None])


class _End(weakref.ref[Any]):
    __slots__ = ("run",)
    run: Callable[[], None]


_ends: dict[int, _End] = {}
_exhaust = deque[Any](maxlen=0).extend


def at_end(item: object, function: Callable[[A], object], argument: A) -> Callable[[], None]:
    """Call a function that is implemented in C once an object is garbage collected.

    Args:
        item: the object.
        function: what to call.
        argument: its argument, which is held until then and not longer.

    Returns:
        A function that makes the call at once; the call is made once in all.
    """
    end = _End(item, methodcaller("run"))
    end.run = partial(_exhaust, chain(map(_ends.pop, [id(end)]), map(function, [argument])))
    _ends[id(end)] = end
    return end.run
