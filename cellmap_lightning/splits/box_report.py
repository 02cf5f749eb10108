"""Report of the classes that lie elsewhere than the other classes of their crop."""

import logging
from collections.abc import Iterable

from cellmap_lightning.crops.crop import Crop

log = logging.getLogger(__name__)

#: Lines of the table at most.
_LINES = 20


def report_boxes(crops: Iterable[Crop], seen: set[str]) -> None:
    """Warn of the classes that lie elsewhere than the other classes of their crop, in one table.

    Args:
        crops: the crops.
        seen: paths of labels that were reported before, to which these are added.
    """
    lines = []
    for crop in crops:
        path = str(crop.target_path)
        if path not in seen:
            lines += [f"  {crop.label}: {found}" for found in crop.class_boxes]
        seen.add(path)
    if lines:
        more = [f"  and {len(lines) - _LINES} more"] if len(lines) > _LINES else []
        log.warning(
            "classes that lie elsewhere than the other classes of their crop: %d. Targets are unknown where a class "
            "does not reach; a wrong translation, scale or order of axes looks like this:\n%s",
            len(lines), "\n".join([*lines[:_LINES], *more]),
        )  # fmt: skip
