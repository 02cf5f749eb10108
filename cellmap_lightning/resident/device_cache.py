"""The regions on one device, within a limit of bytes: whole crops; the least recently used make room."""

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cellmap_lightning.cache.region import Region
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.resident.region import DeviceRegion
from cellmap_lightning.validation import int_at_least

log = logging.getLogger(__name__)

#: Batches during which a crop stays after its last use. With crops picked at random, replacing one that is in use by
#: another would upload chunks for each sample, more than the sample itself. It also covers batches that are described
#: and not gathered yet, whose regions would otherwise be held beyond the limit.
IDLE_BATCHES = 256


class DeviceCache:
    """Regions of crops on a device; see docs/device.md.

    One cache serves all loaders of a process. The batches of crops that it does not hold are read on the host.

    Args:
        device: the device.
        budget: limit of the voxels, bytes.
        idle_batches: batches after its last use from which a crop may be removed to make room for another.

    Attributes:
        nbytes: bytes of the regions on the device.
        uploaded: bytes that were copied to it.

    Raises:
        CellMapValueError: ``budget`` or ``idle_batches`` is not a whole number of at least 0.

    Example:
        >>> cache = DeviceCache(torch.device("cuda"), 8 << 30)  # doctest: +SKIP
        >>> loader = CellMapDataLoader(dataset, batch_size=4, resident=cache)  # doctest: +SKIP
    """

    def __init__(self, device: torch.device | str, budget: int, idle_batches: int = IDLE_BATCHES) -> None:
        self.device = torch.device(device)
        self.budget = int_at_least("device_cache_bytes", budget, 0)
        self.idle_batches = int_at_least("idle_batches", idle_batches, 0)
        self.nbytes = 0
        self.uploaded = 0
        self._regions: dict[str, DeviceRegion] = {}
        #: Crops as the digests of their regions, with the batch that used each last; the least recently used first.
        self._crops: dict[frozenset[str], int] = {}
        self._batches = 0
        self._reported = False
        self._lock = threading.RLock()
        self._last: torch.Event | None = None
        self._pid = os.getpid()

    @property
    def is_foreign(self) -> bool:
        """True in a process that was forked from the one that uses the device."""
        return self._pid != os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        raise CellMapError("a device cache cannot be sent to another process; use num_workers=0")

    def admit(self, crops: Sequence[Sequence[Region]]) -> list[Mapping[int, DeviceRegion] | None]:
        """Return the regions on the device for the crops of a batch, by the identity of each region.

        Memory is allocated here, whole regions at a time; their chunks are uploaded by the batches that need them.

        Args:
            crops: the regions of each crop.

        Returns:
            For each crop its regions; None if they do not fit.

        Raises:
            CellMapError: the process was forked from the one that uses the device.
        """
        if self.is_foreign:
            raise CellMapError("a device cache cannot be used in a forked process; use num_workers=0")
        with self._lock:
            self._batches += 1
            return [self._admit(regions) for regions in crops]

    def _admit(self, regions: Sequence[Region]) -> Mapping[int, DeviceRegion] | None:
        crop = frozenset(region.digest() for region in regions)
        new = {region.digest(): region for region in regions if region.digest() not in self._regions}
        needed = sum(region.extent_bytes for region in new.values())
        if not self._make_room(needed, crop) or not self._allocate(new):
            if not self._reported:
                self._reported = True
                log.info(
                    "the device cache has no room for %s (%.2f GB; %.2f of %.2f GB are used): samples of crops that do "
                    "not fit are read on the host",
                    next(iter(regions)).name, needed / 1e9, self.nbytes / 1e9, self.budget / 1e9,
                )  # fmt: skip
            return None
        self._crops.pop(crop, None)
        self._crops[crop] = self._batches  # the last of the dictionary
        return {id(region): self._regions[region.digest()] for region in regions}

    def _make_room(self, needed: int, wanted: frozenset[str]) -> bool:
        """Remove idle crops until some bytes are free; return False, with nothing removed, if that is not enough."""
        excess = self.nbytes + needed - self.budget
        if excess <= 0:
            return True
        removed: list[frozenset[str]] = []
        for crop, last in self._crops.items():
            if self._batches - last <= self.idle_batches:
                return False  # later ones were used more recently
            removed.append(crop)
            used = wanted.union(*(other for other in self._crops if other not in removed))
            free = set(self._regions) - used
            if sum(self._regions[digest].nbytes for digest in free) >= excess:
                break
        else:
            return False
        for crop in removed:
            del self._crops[crop]
        # Not released: batches that were described before still hold them, until they are gathered.
        self.nbytes -= sum(self._regions.pop(digest).nbytes for digest in free)
        return True

    def _allocate(self, regions: Mapping[str, Region]) -> bool:
        """Allocate regions; return False, with none allocated, where the device has less memory than the budget."""
        allocated: dict[str, DeviceRegion] = {}
        try:
            for digest, region in regions.items():
                allocated[digest] = DeviceRegion(region, self.device)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            log.warning(
                "%s has no memory left for decoded voxels (%.2f of %.2f GB): the device cache grows no further; "
                "set device_cache_bytes to less",
                self.device, self.nbytes / 1e9, self.budget / 1e9,
            )  # fmt: skip
            self.budget = self.nbytes
            return False
        self._regions |= allocated
        self.nbytes += sum(held.nbytes for held in allocated.values())
        return True

    @contextmanager
    def queueing(self) -> Iterator[None]:
        """Hold the cache while work is queued on the current stream, after the work of other streams on it."""
        with self._lock:
            stream = None if self.device.type == "cpu" else torch.accelerator.current_stream(self.device)
            if stream is not None and self._last is not None:
                stream.wait_event(self._last)
            yield
            if stream is not None:
                self._last = stream.record_event()

    def upload(self, staged: Iterable[tuple[DeviceRegion, tuple[int, int, int], torch.Tensor]]) -> None:
        """Copy chunks to the device; inside `queueing`."""
        for held, chunk, voxels in staged:
            self.uploaded += held.upload(chunk, voxels)

    def close(self) -> None:
        """Release all memory. The cache can be used again; batches that were not gathered before cannot."""
        if self.is_foreign:
            return
        with self._lock:
            for held in self._regions.values():
                held.release()
            self._regions.clear()
            self._crops.clear()
            self.nbytes, self._reported = 0, False

    def __repr__(self) -> str:
        return f"DeviceCache({self.device}, {self.nbytes / 1e9:.2f} of {self.budget / 1e9:.2f} GB)"
