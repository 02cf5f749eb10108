"""Names of metrics in the code of modules and callbacks that are not of this package."""

import inspect
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any

#: Names by which code logs a metric.
_LOGGING = {"log", "log_dict", "callback_metrics", "log_metrics"}
#: Packages whose classes are not of the user.
_LIBRARIES = ("cellmap_lightning", "lightning", "torch", "torchmetrics", "abc", "builtins")


def own_classes(cls: type) -> list[type]:
    """Return a class and its bases, without those of this package and of the libraries that it is built on."""
    return [c for c in cls.__mro__ if c is not object and c.__module__.partition(".")[0] not in _LIBRARIES]


def logs_metrics(cls: type) -> bool:
    """Return True if the code of a class, without that of its bases, may log a metric."""
    return any(_LOGGING & set(code.co_names) for code in _class_code(cls))


def may_log(name: str, module: Any, callbacks: Sequence[Any]) -> bool:
    """Return True if own code of a training may log a metric that its sanity validation has not logged.

    That is, if it asks for ``sanity_checking``, or has a text that is the name, its beginning, such as ``val/``, or its
    end from a separator on, such as ``/loss``.

    Args:
        name: of the metric.
        module: the module that is trained.
        callbacks: the callbacks of the Trainer.
    """
    for part in (module, *callbacks):
        classes = own_classes(type(part))
        codes = [code for cls in classes for code in _called_code(cls)]
        if any("sanity_checking" in code.co_names for code in codes):
            return True
        values = [constant for code in codes for constant in code.co_consts]
        values += [value for cls in classes for value in vars(cls).values()]
        values += vars(part).values() if classes else ()
        if any(_is_part(text, name) for value in values for text in _texts(value)):
            return True
    return False


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts of a value: itself, the items of a collection, such as the constant keys of a dict in code."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple | list | set | frozenset | dict):
        for item in value:
            yield from _texts(item)


def _is_part(text: str, name: str) -> bool:
    if len(text) < 2:
        return False
    return name.startswith(text) or (text[0] in "/_.-" and name.endswith(text))


def _class_code(cls: type) -> Iterator[CodeType]:
    for member in vars(cls).values():
        for function in (getattr(member, "fget", None), getattr(member, "__func__", None), member):
            unwrapped = inspect.unwrap(function) if callable(function) else None
            if isinstance(unwrapped, FunctionType):
                yield from _nested(unwrapped.__code__)


def _called_code(cls: type) -> list[CodeType]:
    """Return the code of a class, and of the functions of its file that this code names."""
    functions = {
        name: value
        for name, value in vars(sys.modules.get(cls.__module__, object)).items()
        if isinstance(value, FunctionType) and value.__module__ == cls.__module__
    }
    codes = [*_class_code(cls)]
    for code in codes:  # which grows
        for name in functions.keys() & {*code.co_names}:
            codes.extend(_nested(functions.pop(name).__code__))
    return codes


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
