"""Prints the public names of a package as JSON: modules, functions and classes with members, parameters and defaults.

``python public_surface.py PACKAGE`` in an environment that has the package. Names that a package takes from other
packages are left out. So are members that its classes inherit from classes of others, unless ``inherited`` follows.
Attributes that a constructor sets are found in the source of the class.
"""

import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import sys
import warnings
from pathlib import Path
from typing import Any

#: Modules of other packages whose classes set attributes that count as inherited.
INSPECTED = ("torch.utils.data.dataloader", "torch.utils.data.dataset")


def parameters(function: Any) -> dict[str, str]:
    """Return the parameters of a function and their defaults; only plain values are shown."""
    try:
        given = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    plain = (str, int, float, bool, type(None), tuple)
    return {
        p.name: repr(p.default) if p.default is not p.empty and isinstance(p.default, plain) else ""
        for p in given
        if p.name not in ("self", "cls")
    }


def members(cls: type, package: str) -> dict[str, dict[str, str] | None]:
    """Return public members of a class that a package defines (all for ``""``): parameters of methods, else None."""
    found: dict[str, dict[str, str] | None] = {"__init__": parameters(cls.__init__)}  # type: ignore[misc]
    for base in cls.__mro__:
        if not base.__module__.startswith(package or ""):
            continue
        for name, value in vars(base).items():
            if not name.startswith("_"):
                method = value.__func__ if isinstance(value, staticmethod | classmethod) else value
                found.setdefault(name, parameters(method) if inspect.isfunction(method) else None)
        source = (
            inspect.getsource(base) if base.__module__ in INSPECTED or base.__module__.startswith("cellmap") else ""
        )
        for names in re.findall(
            r"^ +((?:self\.\w+(?:: [^=\n]+)?(?:, | = ))*self\.\w+)(?:: [^=\n]+)? = ", source, re.MULTILINE
        ):
            for name in re.findall(r"self\.([a-z]\w*)", names):
                found.setdefault(name, None)
    return found


def surface(package: str, inherited: bool = False) -> dict[str, dict[str, Any]]:
    """Return ``{module: {name: members of a class or parameters of a function}}``."""
    root = importlib.import_module(package)
    own = package.partition(".")[0]
    modules = [package, *(m.name for m in pkgutil.walk_packages(root.__path__, package + "."))]
    found: dict[str, dict[str, Any]] = {}
    for path in modules:
        module = importlib.import_module(path)
        names = found[path.removeprefix(package).lstrip(".")] = {}
        for name, value in vars(module).items():
            if name.startswith("_") or not (getattr(value, "__module__", "") or "").startswith(own):
                continue
            if inspect.isclass(value):
                names[name] = {"members": members(value, "" if inherited else own)}
            elif inspect.isfunction(value):
                names[name] = {"parameters": parameters(value)}
    return found


def declare_operators() -> Any:
    """Declare the operators of torchvision, so that it can be imported without its binaries."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    source = Path(spec.submodule_search_locations[0], "_meta_registrations.py").read_text(encoding="utf-8")
    for name in sorted(set(re.findall(r'(?:register_meta\(|register_fake\("torchvision::)"?(\w+)"', source))):
        try:  # noqa: SIM105  old interpreters run this file
            library.define(f"{name}(Tensor x) -> Tensor")
        except RuntimeError:
            pass
    return library


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    kept = declare_operators()
    print(json.dumps(surface(sys.argv[1], "inherited" in sys.argv[2:])))
