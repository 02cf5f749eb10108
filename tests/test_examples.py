"""Public classes have an example or a link to the page that shows them, and examples without data are right."""

import doctest
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import cellmap_lightning
from cellmap_lightning import errors

ROOT = Path(__file__).parents[1]
#: Modules with `__all__`: the package, its public folders, and those of cellmap-data's names.
PUBLIC = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "cellmap_lightning").rglob("*.py"))
    if "\n__all__ = " in path.read_text(encoding="utf-8")
]
#: Objects whose examples need no data, as ``module:name``.
RUN = [
    *(f"errors:{name}" for name, value in vars(errors).items() if inspect.isclass(value)),
    "compat.dataset:Counts", "crops.crop_name:CropName", "flat_options:from_flat", "geometry.resample:Slices",
    "geometry.source:Source", "instances.options:SourceOptions", "io.writer:ArrayOptions",
    "io.writer:ImageDescription", "loading.run:Run", "prediction.options:BlendOptions",
    "prediction.options:ChannelOptions", "prediction.options:OutputOptions", "prediction.options:RegionOptions",
    "prediction.options:ResumeOptions", "prediction.options:PredictionOptions", "loading.options:LoaderOptions",
    "runtime.scheduling:SchedulerOptions",
]  # fmt: skip


def public_classes():
    """Return the classes of the package in each `__all__`, with the errors of the reference."""
    classes = {value for value in vars(errors).values() if inspect.isclass(value)}
    for name in PUBLIC:
        module = import_module(name)
        classes |= {getattr(module, n) for n in module.__all__ if inspect.isclass(getattr(module, n))}
    return sorted({c for c in classes if c.__module__.startswith("cellmap_lightning")}, key=lambda c: c.__qualname__)


def test_the_public_modules_are_met():
    assert {"cellmap_lightning", "cellmap_lightning.callbacks", "cellmap_lightning.compat"} < set(PUBLIC)
    assert set(cellmap_lightning.__all__) - {"batch_memory"} <= {c.__name__ for c in public_classes()}


@pytest.mark.parametrize("cls", public_classes(), ids=lambda cls: cls.__qualname__)
def test_public_classes_have_an_example_or_a_page(cls):
    text = inspect.getdoc(cls) or ""
    pages = re.findall(r"docs/[\w/]+\.md", text)
    assert pages or "Example:" in text
    for page in pages:
        assert (ROOT / page).is_file(), page


@pytest.mark.parametrize("place", RUN)
def test_examples_without_data_are_right(place):
    name, _, attribute = place.partition(":")
    module = import_module(f"cellmap_lightning.{name}")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in doctest.DocTestFinder(recurse=False).find(getattr(module, attribute), attribute, module):
        runner.run(example)
    assert runner.failures == 0
    assert runner.tries or place.startswith("errors:")
