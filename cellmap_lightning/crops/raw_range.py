"""Report of float raw whose values are not in the range that the normalization assumes."""

import logging

from cellmap_lightning.errors import CellMapError
from cellmap_lightning.io.ngff import Multiscale
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy
from cellmap_lightning.io.statistics import statistics
from cellmap_lightning.redaction import hide_address
from cellmap_lightning.transforms.assumed_range import contradiction, is_assumed
from cellmap_lightning.transforms.normalization import Normalize

log = logging.getLogger(__name__)

#: Volumes, and what this process has reported about them.
_reported: dict[tuple[str, str], object] = {}


def range_problem(image: Multiscale, rule: Normalize, retry_policy: RetryPolicy = DEFAULT_RETRY) -> str | None:
    """Return how the values of float raw contradict the rule of normalization; None if they do not.

    The values are measured once from a coarse level, and cached outside the data. Voxels that cannot be read are
    reported where samples read them.

    Args:
        image: the raw image.
        rule: the rule of normalization.
        retry_policy: attempts and timeout of each object.
    """
    if not image.present or not is_assumed(rule, image.present[0].array.dtype):
        return None
    try:
        measured = statistics(image, retry_policy)
    except CellMapError:  # also where all voxels are 0
        return None
    return contradiction(measured.percentile(0.5), measured.percentile(99.5))


def report_range(path: str, image: Multiscale, rule: Normalize, retry_policy: RetryPolicy) -> None:
    """Warn of float raw whose values contradict the rule of normalization, once per volume; see `range_problem`."""
    text = range_problem(image, rule, retry_policy)
    if text is not None and first_report(path, text):
        log.warning("raw %s: %s", hide_address(path), text)


def first_report(path: str, text: str) -> bool:
    """Return True if this process has not reported a text about a volume yet; crops are opened by several threads."""
    token = object()
    return _reported.setdefault((path, text), token) is token  # atomic
