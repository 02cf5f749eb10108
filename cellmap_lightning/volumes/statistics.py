"""What the stored values of a volume are like: measured once, from a coarse level, and kept outside the data."""

import hashlib
import json
import logging
import os
import threading
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.volumes.chunks import ChunkReader
from cellmap_lightning.volumes.guard import PATIENT, Patience
from cellmap_lightning.volumes.location import cache_folder
from cellmap_lightning.volumes.ngff import Level, Multiscale
from cellmap_lightning.volumes.store import identity_of, read_json

log = logging.getLogger(__name__)

#: Voxels that are looked at: enough for the 0.1th percentile of a volume, quick to read.
ENOUGH_VOXELS = 1 << 22
_LEAST_VOXELS = 1 << 16
_VERSION = 1
_lock = threading.Lock()
_known: dict[str, "Statistics"] = {}


@dataclass(frozen=True)
class Statistics:
    """Stored values of a volume, voxels that were never written left out.

    Attributes:
        mean: mean.
        std: standard deviation.
        quantiles: 1001 values, the 0th to the 100th percentile in steps of 0.1.
    """

    mean: float
    std: float
    quantiles: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """The stored value below which ``percent`` of the voxels lie."""
        return float(np.interp(percent, np.linspace(0, 100, len(self.quantiles)), self.quantiles))


def fingerprint(level: Level, *more: object) -> str:
    """A name for what was measured: the array, its shape and type, the time of its metadata, and what else matters."""
    info = level.array
    where: tuple[object, ...] = (identity_of(info.path), info.checksum)
    if isinstance(info.path, Path):
        where = (str(info.path.resolve()), (info.path / info.metadata.name).stat().st_mtime_ns)
    parts = (_VERSION, *where, info.shape, str(info.dtype), *more)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def recall(name: str) -> dict[str, object] | None:
    """What was kept under a fingerprint, or None."""
    return read_json(cache_folder() / f"{name}.json")


def remember(name: str, content: dict[str, object], level: Level) -> None:
    """Keep a measurement of a level, whole or not at all. A folder that cannot be written to costs only time."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
        part.touch(0o600)
        of = level.path.resolve() if isinstance(level.path, Path) else level.path
        part.write_text(json.dumps({"of": str(of), **content}))
        part.replace(folder / f"{name}.json")
    except OSError as e:
        log.warning("measurements cannot be kept in %s (%s); they will be made again", folder, e.strerror)


def statistics(image: Multiscale, patience: Patience = PATIENT) -> Statistics:
    """Statistics of a volume's stored values, from the coarsest level that has enough of them.

    Voxels of value 0 are left out: chunks that were never written read as 0. A level that is larger than needed is
    looked at in evenly spaced chunks.

    Args:
        image: the volume.
        patience: how long an object is tried for.

    Raises:
        CellMapValueError: the volume holds nothing but zeros.
    """
    level = _measured_level(image)
    name = fingerprint(level, "statistics")
    with _lock:
        found = _kept(name)
        if found is None:
            found = _known[name] = _measure(level, patience)
            remember(name, asdict(found), level)
        return found


def known_statistics(image: Multiscale) -> Statistics | None:
    """The same if it was measured before, by this process or another; None where voxels would have to be read."""
    with _lock:
        return _kept(fingerprint(_measured_level(image), "statistics"))


def _measured_level(image: Multiscale) -> Level:
    sizes = [(int(np.prod(level.array.shape)), level) for level in image.present]
    enough = [pair for pair in sizes if pair[0] >= min(_LEAST_VOXELS, sizes[0][0])]
    return min(enough, key=lambda pair: pair[0])[1]


def _kept(name: str) -> Statistics | None:
    if name not in _known:
        kept = recall(name)
        if kept is None:
            return None
        _known[name] = Statistics(kept["mean"], kept["std"], tuple(kept["quantiles"]))  # type: ignore[arg-type]
    return _known[name]


def _measure(level: Level, patience: Patience) -> Statistics:
    reader = ChunkReader(level, patience=patience, empty="missing")  # as other chunks that are missing
    grid = [range(0, n, c) for n, c in zip(reader.shape, reader.chunks, strict=True)]
    corners = list(product(*grid))
    wanted = max(1, ENOUGH_VOXELS // int(np.prod(reader.chunks)))
    if len(corners) > wanted:
        corners = [corners[i] for i in np.linspace(0, len(corners) - 1, wanted).round().astype(int)]
    parts = []
    for z, y, x in corners:
        dz, dy, dx = (min(c, n - o) for c, n, o in zip(reader.chunks, reader.shape, (z, y, x), strict=True))
        values = reader.read((z, y, x), (dz, dy, dx)).ravel()
        parts.append(values[(values != 0) & np.isfinite(values)])
    found = np.concatenate(parts).astype(np.float64)
    if not len(found):
        raise CellMapValueError(f"{level.path} holds nothing but zeros, so it cannot be normalized by its values")
    return Statistics(
        float(found.mean()), float(found.std()), tuple(np.percentile(found, np.linspace(0, 100, 1001)).tolist())
    )
