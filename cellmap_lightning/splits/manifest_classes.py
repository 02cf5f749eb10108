"""Names of classes in a manifest that are neither used nor classes of the challenge, as after a typing error."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from cellmap_lightning.transforms.implied import DEFAULT_TABLE, read_table
from cellmap_lightning.validation import did_you_mean, first_few
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)

#: Manifests and names that were reported; a training reads its manifest more than once.
_reported: set[tuple[str, tuple[str, ...]]] = set()


def report_unknown_classes(manifest: str | Path, listed: Iterable[str], used: Sequence[str]) -> None:
    """Warn of listed classes that are not used, and that the challenge does not have; once per process.

    Args:
        manifest: the manifest.
        listed: the classes of its crops.
        used: the classes that are trained or predicted.
    """
    known = {*used, *read_table(DEFAULT_TABLE)}
    unknown = tuple(name for name in dict.fromkeys(listed) if name not in known)
    key = str(Path(manifest).absolute()), unknown
    if not unknown or key in _reported:
        return
    _reported.add(key)
    hints = [(did_you_mean(name, used) or did_you_mean(name, sorted(known))).removeprefix("; ") for name in unknown]
    names = [f"{name!r}" + f" ({hint})" * bool(hint) for name, hint in zip(unknown, hints, strict=True)]
    log.warning(
        "%s lists classes that are not used here, and that are no classes of the challenge: %s",
        Path(manifest).name, first_few(names, 8),
    )  # fmt: skip


def report_lacking_classes(manifest: str | Path, listed: Iterable[str], known: Sequence[str]) -> None:
    """Warn of listed classes that a model does not predict, in one line.

    Args:
        manifest: the manifest.
        listed: the classes of its crops.
        known: the classes that the model predicts.
    """
    lacking = [name for name in dict.fromkeys(listed) if name not in known]
    if lacking:
        log.warning(
            "%s lists %s that the model does not predict: %s",
            Path(manifest).name, plural(len(lacking), "class", "classes"), first_few(lacking, 12),
        )  # fmt: skip
