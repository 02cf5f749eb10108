"""Parameters of a segmentation for each class, as ``cellmap-tune`` writes them: ``{class: {method: ..., ...}}``."""

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cellmap_lightning.errors import CellMapError, CellMapFileNotFoundError, CellMapKeyError, CellMapValueError
from cellmap_lightning.instances.options import SegmentationOptions
from cellmap_lightning.io.missing_paths import similar_path
from cellmap_lightning.validation import did_you_mean, one_of

log = logging.getLogger(__name__)

#: Options of a segmentation by name.
Parameters = Mapping[str, Any]
#: Keys of `open_source` that a file may have beside those of `SegmentationOptions`.
SOURCE_KEYS = ("kind", "offsets", "channels")
OPTION_KEYS = tuple(field.name for field in fields(SegmentationOptions))
_FORM = "cellmap-tune writes a mapping of classes, such as mito: {method: watershed, threshold: 0.6}"


def read_tuned(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read the parameters of each class.

    Args:
        path: a file of ``cellmap-tune``, or several of them, one after the other.

    Returns:
        Fields of `SegmentationOptions`, and `SOURCE_KEYS`, of each class.

    Raises:
        CellMapFileNotFoundError: there is no such file.
        CellMapValueError: it is another kind of file, has an unknown key, or a value is invalid.

    Example:
        >>> read_tuned("mito.yaml")  # doctest: +SKIP
        {'mito': {'method': 'watershed', 'threshold': 0.6, 'seed_distance': 160.0, 'min_volume': 51200.0}}
    """
    where = f"tuned={path}"
    if not Path(path).is_file():
        raise CellMapFileNotFoundError(
            f"{where}: there is no such file{similar_path(path)}; give the one that cellmap-tune has written"
        )
    try:
        # OmegaConf's reader refuses a class that occurs twice, and reads 1e6 as a number.
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as e:
        raise CellMapValueError(f"{where} cannot be read ({' '.join(str(e).split())}); {_FORM}") from e
    if not isinstance(content, dict) or not content or not all(isinstance(v, dict) for v in content.values()):
        raise CellMapValueError(f"{where}: it has no parameters of classes; {_FORM}")
    tuned = {str(name): {str(key): value for key, value in entry.items()} for name, entry in content.items()}
    for name, parameters in tuned.items():
        for key in parameters:
            one_of(f"{where}: a key of {name}", key, (*OPTION_KEYS, *SOURCE_KEYS))
        try:
            SegmentationOptions(**{key: value for key, value in parameters.items() if key in OPTION_KEYS})
        except CellMapError as e:
            raise CellMapValueError(f"{where}, {name}: {e}") from e
    return tuned


def parameters_of(tuned: Mapping[str, Parameters], name: str, path: str | Path) -> dict[str, Any]:
    """Return the parameters of a class.

    Raises:
        CellMapKeyError: the file has none.
    """
    if name not in tuned:
        hint = did_you_mean(name, tuned, f"; run cellmap-tune with class={name}")
        raise CellMapKeyError(f"tuned={path}: it has no parameters of {name!r}, but of {', '.join(tuned)}{hint}")
    return dict(tuned[name])


def with_explicit(parameters: Parameters, explicit: Parameters, name: str, path: str | Path) -> dict[str, Any]:
    """Return the parameters of a class, replaced by those that are given explicitly, which is logged."""
    for key, value in explicit.items():
        if key in parameters and parameters[key] != value:
            log.info("%s: %s=%s replaces %s of tuned=%s", name, key, value, parameters[key], path)
    return {**parameters, **explicit}
