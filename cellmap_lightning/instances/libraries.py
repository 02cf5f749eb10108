"""Optional libraries with the algorithms of instance segmentation."""

import importlib
from typing import Any

from cellmap_lightning.errors import MissingExtraError

_PACKAGES = {"bioimage_cpp": "bioimage-cpp", "cc3d": "connected-components-3d", "scipy": "scipy"}


def library(module: str) -> Any:
    """Return a module of the extra ``instances``, such as ``bioimage_cpp.segmentation``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = _PACKAGES[module.partition(".")[0]]
        raise MissingExtraError(
            f'instance segmentation needs {package}: pip install "cellmap-lightning[instances]"'
        ) from e
