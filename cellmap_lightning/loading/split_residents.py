"""The device cache that the loaders of a data module share."""

import logging

import torch

from cellmap_lightning.batches.memory import device_memory
from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.loading.prefetch import PrefetchDecision
from cellmap_lightning.loading.resident_decision import (
    ResidentDecision,
    ResidentRequest,
    decide_resident,
    resident_bytes,
    resident_text,
)
from cellmap_lightning.resident.device_cache import DeviceCache

log = logging.getLogger(__name__)


class SplitResidents:
    """The device cache of the splits of a data module, created by the first loader that uses it; see docs/device.md.

    Args:
        limit: the setting ``device_cache_bytes``.

    Attributes:
        cache: the device cache; None without one.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.cache: DeviceCache | None = None
        #: Bytes of the regions of each split that uses the cache.
        self._needed: dict[str, int] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"cache": None, "_needed": {}}

    def request(self, split: str, source: SampleSource, num_workers: int, touched: bool) -> ResidentRequest:
        """Return the request for the regions of a split on the device.

        Args:
            split: the split.
            source: its dataset.
            num_workers: worker processes of the loader.
            touched: user code gets batches before their transfer.
        """
        names = " and ".join(source.overriding_types())
        obstacle = ""
        if split == "predict":
            obstacle = "a volume that is predicted is read once"
        elif num_workers:
            obstacle = f"num_workers={num_workers}, and one process uses the device; set num_workers=0"
        elif touched:
            obstacle = "on_before_batch_transfer is overridden, which gets finished batches on the CPU"
        elif names:
            obstacle = f"{names} has a __getitem__ of user code"
        relevant = not obstacle and source.cache in ("auto", "device")
        others = sum(count for name, count in self._needed.items() if name != split)
        return ResidentRequest(source.cache, resident_bytes(source) if relevant else 0, self.limit, others, obstacle)

    def of(
        self,
        split: str,
        source: SampleSource,
        batch_size: int,
        device: torch.device,
        request: ResidentRequest,
        prefetch: PrefetchDecision | None,
    ) -> DeviceCache | None:
        """Return the cache for a loader of a split; None if it does not use one.

        Without a decision of the callback `StreamPrefetch`, only an explicit ``cache=device`` uses the device.

        Args:
            split: the split.
            source: its dataset.
            batch_size: samples of a batch.
            device: the device of the Trainer.
            request: see `request`.
            prefetch: the decision of `StreamPrefetch`.
        """
        if prefetch is not None:
            decision = prefetch.resident
        elif request.cache == "device":
            memory = source.batch_memory(batch_size)
            decision = decide_resident(request, memory, 0, device.type, device_memory(device))
            log.info("%s", resident_text(split, decision))
        else:
            decision = ResidentDecision()
        self._needed.pop(split, None)
        if not decision.enabled:
            return None
        self._needed[split] = request.needed
        if self.cache is None or self.cache.device != device or self.cache.is_foreign:
            if self.cache is not None:
                self.cache.close()
            self.cache = DeviceCache(device, decision.budget)
        self.cache.budget = decision.budget
        return self.cache

    def close(self) -> None:
        """Release the memory of the device."""
        if self.cache is not None:
            self.cache.close()
        self._needed.clear()
