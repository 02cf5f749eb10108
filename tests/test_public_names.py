"""The names that an editor completes in the public modules."""

import subprocess
import sys
from importlib import import_module

import pytest

MODULES = [
    "cellmap_lightning",
    "cellmap_lightning.callbacks",
    "cellmap_lightning.compat",
    "cellmap_lightning.compat.transforms",
    "cellmap_lightning.compat.utils",
    "cellmap_lightning.errors",
    "cellmap_lightning.testing",
    "cellmap_lightning.visualization.figures",
]


@pytest.mark.parametrize("name", MODULES)
def test_dir_lists_the_public_names_alone(name):
    module = import_module(name)
    assert [entry for entry in dir(module) if not entry.startswith("__")] == sorted(module.__all__)
    assert {"__all__", "__doc__", "__name__"} <= set(dir(module))
    for entry in module.__all__:
        assert getattr(module, entry).__module__.startswith("cellmap_lightning")


def test_dir_imports_nothing():
    code = "import sys, cellmap_lightning as c; dir(c); print('torch' in sys.modules, '__version__' in dir(c))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("name", MODULES[:2])
def test_a_wrong_name_lists_the_public_ones(name):
    with pytest.raises(AttributeError, match=r"has no attribute 'Anything'; it has \w+, \w+"):
        _ = import_module(name).Anything
