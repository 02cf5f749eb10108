"""The decision about regions on the device, from numbers alone."""

from dataclasses import dataclass

from cellmap_lightning.batches.memory import BatchMemory
from cellmap_lightning.crops.pieces import described_regions
from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.resident.gather import GATHER_BYTES
from cellmap_lightning.runtime.location import CacheMode

#: Types of device whose memory is not that of the host, so that ``cache=auto`` uses it.
SEPARATE_DEVICES = ("cuda", "xpu")
#: Share of the device's memory that voxels and batches take by default; the rest is for the network.
DEFAULT_SHARE = 0.5


@dataclass(frozen=True)
class ResidentRequest:
    """The numbers that the decision depends on, beside those of a batch; see docs/device.md.

    Attributes:
        cache: the setting ``cache``.
        needed: bytes of the regions of a split, see `resident_bytes`.
        limit: the setting ``device_cache_bytes``.
        others: bytes of the regions of other splits on the same device.
        obstacle: reason why batches of this loader cannot be gathered on the device; "" without one.
    """

    cache: CacheMode
    needed: int
    limit: int | None = None
    others: int = 0
    obstacle: str = ""


@dataclass(frozen=True)
class ResidentDecision:
    """The decision about regions on the device; see docs/device.md.

    Attributes:
        enabled: batches are gathered on the device.
        budget: limit of the voxels of all splits together, bytes.
        reason: the reason, with the numbers.
    """

    enabled: bool = False
    budget: int = 0
    reason: str = "it was not requested"


def resident_bytes(source: SampleSource) -> int:
    """Return the bytes of the voxels that samples of a dataset can be gathered from, by metadata alone."""
    regions = {region.digest(): region for crop in source.crops for region in described_regions(crop)}
    return sum(region.extent_bytes for region in regions.values())


def decide_resident(
    request: ResidentRequest, memory: BatchMemory, depth: int, device_type: str, device_bytes: int | None
) -> ResidentDecision:
    """Decide about regions on the device, as a function of the arguments alone.

    ``cache=device`` holds the crops that fit. ``cache=auto`` does so on a CUDA or XPU device that holds all of them.
    The default budget is half of the device's memory without the batches, ``depth + 2`` compact and one finished, and
    without the temporary memory of a gather.

    Args:
        request: see `ResidentRequest`.
        memory: bytes of a batch.
        depth: batches that are prefetched.
        device_type: type of device, such as ``cuda``.
        device_bytes: total memory of the device; None if it is unknown.
    """

    def off(reason: str) -> ResidentDecision:
        return ResidentDecision(False, 0, reason)

    if request.cache not in ("auto", "device"):
        return off(f"cache={request.cache}")
    if request.obstacle:
        return off(request.obstacle)
    if request.cache == "auto" and device_type not in SEPARATE_DEVICES:
        return off(f"a {device_type} device has no memory of another kind; cache=device uses it all the same")
    if request.limit is not None:
        budget, origin = request.limit, "device_cache_bytes"
    elif device_bytes is None:
        return off(f"the memory of a {device_type} device is unknown; set device_cache_bytes")
    else:
        batches = (depth + 2) * memory.compact.total_bytes + memory.total_bytes + GATHER_BYTES
        budget, origin = max(0, int(DEFAULT_SHARE * device_bytes) - batches), "half of the memory without batches"
    room = max(0, budget - request.others)
    sizes = f"{request.needed / 1e9:.3g} GB of voxels, and {room / 1e9:.3g} GB are free ({origin})"
    if request.needed <= room:
        return ResidentDecision(True, budget, sizes)
    if request.cache == "auto":
        return off(f"{sizes}: too little for all; cache=device holds the crops that fit")
    if budget == 0:
        return off(f"{sizes}: set device_cache_bytes")
    return ResidentDecision(True, budget, f"{sizes}: crops that do not fit are read on the host")


def resident_text(split: str, decision: ResidentDecision) -> str:
    """Return a decision in words, for the log."""
    state = f"on, at most {decision.budget / 1e9:.3g} GB" if decision.enabled else "off"
    return f"device cache for {split}: {state}, {decision.reason}"
