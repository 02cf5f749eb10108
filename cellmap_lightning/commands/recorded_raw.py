"""The raw volume that a prediction records, for the pictures of commands that read predictions."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cellmap_lightning.errors import CellMapError, MissingExtraError
from cellmap_lightning.io.ngff import read_attributes
from cellmap_lightning.io.store import parse_location

log = logging.getLogger(__name__)


def recorded_raw(prediction: str) -> str | None:
    """Return the raw volume of a prediction of this package; None if it is not recorded."""
    root = parse_location(prediction)
    for group in (root, root.parent):
        attributes = read_attributes(group)
        part: Any = attributes[0] if attributes is not None else {}
        for key in ("cellmap", "prediction", "settings", "raw"):
            part = part.get(key) if isinstance(part, Mapping) else None
        if isinstance(part, str):
            return part
    return None


def draw_over_raw(draw: Callable[[str | None], None], raw: str | None, prediction: str, picture: Path) -> None:
    """Draw a picture over raw, or without it where the raw volume that a prediction records cannot be read.

    Args:
        draw: draws the picture over a raw volume, or without one.
        raw: the setting ``raw``; None for the volume that the prediction records.
        prediction: the prediction.
        picture: the file, for messages.

    Raises:
        CellMapError: the given raw, or the prediction, cannot be read.
        MissingExtraError: a library is not installed.
    """
    shown = raw or recorded_raw(prediction)
    try:
        draw(shown)
    except CellMapError as e:
        if raw is not None or shown is None or isinstance(e, MissingExtraError):
            raise
        log.info("%s is drawn without raw, which cannot be read (%s); set raw=... to show it", picture, e)
        draw(None)
