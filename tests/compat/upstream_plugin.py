"""A pytest plugin for the tests of cellmap-data: libraries as these tests expect them, and outcomes as JSON.

They write their data by zarr 2 and by models of metadata that need it; and torchvision may be built for another torch.
`upstream_suite` loads it from a copy.
"""

import contextlib
import importlib.util
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import torch
import zarr
import zarr.core.attributes
from zarr.storage import LocalStore

_SET = zarr.core.attributes.Attributes.__setitem__


class Model(types.SimpleNamespace):
    """A stand-in for any model of ``pydantic_ome_ngff``."""

    def model_dump(self, **_: Any) -> dict[str, Any]:
        """Return what was given, without None."""
        return {key: _plain(value) for key, value in vars(self).items() if value is not None}


class _Address(type(Path())):  # type: ignore[misc]
    """A stand-in for `upath.UPath`."""

    path = property(str)


def _plain(value: Any) -> Any:
    if isinstance(value, Model):
        return value.model_dump()
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _create_dataset(group: Any, name: str, data: Any = None, **given: Any) -> Any:
    given.pop("dtype", None)
    if data is None:
        return group.create_array(name, **given)
    return group.create_array(name, data=data, **given)


def _set_attribute(attributes: Any, key: str, value: Any) -> None:
    _SET(attributes, key, json.loads(json.dumps(value, default=int)))  # counts of numpy


def _declare_models() -> None:
    names = {
        "": (),
        ".v04": (),
        ".v04.axis": ("Axis",),
        ".v04.multiscale": ("Dataset", "MultiscaleMetadata"),
        ".v04.transform": ("VectorScale", "VectorTranslation"),
    }
    for module, models in names.items():
        found: Any = types.ModuleType("pydantic_ome_ngff" + module)
        found.__path__ = []
        for model in models:
            setattr(found, model, type(model, (Model,), {}))
        sys.modules[found.__name__] = found
    paths: Any = types.ModuleType("upath")
    paths.UPath = _Address
    sys.modules["upath"] = paths


def _declare_operators() -> Any:
    """Declare the operators of torchvision, so that its transforms can be imported without its binaries."""
    spec = importlib.util.find_spec("torchvision")
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    source = Path(folders[0], "_meta_registrations.py").read_text(encoding="utf-8")
    for name in sorted(set(re.findall(r'(?:register_meta\(|register_fake\("torchvision::)"?(\w+)"', source))):
        with contextlib.suppress(RuntimeError):  # the library has it
            library.define(f"{name}(Tensor x) -> Tensor")
    return library


zarr.config.set({"default_zarr_format": 2, "array.write_empty_chunks": True})
zarr.DirectoryStore = LocalStore  # type: ignore[attr-defined]
zarr.Group.create_dataset = _create_dataset  # type: ignore[method-assign,assignment]
zarr.core.attributes.Attributes.__setitem__ = _set_attribute  # type: ignore[method-assign]
LocalStore.path = property(lambda store: str(store.root))  # type: ignore[attr-defined]
_declare_models()
OPERATORS = _declare_operators()
OUTCOMES: dict[str, tuple[str, str]] = {}


def pytest_runtest_logreport(report: Any) -> None:
    """Record the outcome of a test."""
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None) if report.failed else None
        OUTCOMES[report.nodeid] = report.outcome, crash.message[:300] if crash else ""


def pytest_collectreport(report: Any) -> None:
    """Record a file that cannot be imported."""
    if report.failed:
        OUTCOMES[report.nodeid] = "failed", str(report.longrepr)[-300:]


def pytest_sessionfinish() -> None:
    """Write the outcomes."""
    Path("outcomes.json").write_text(json.dumps(OUTCOMES, indent=1), encoding="utf-8")
