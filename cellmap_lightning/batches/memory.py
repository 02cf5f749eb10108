"""Memory of a batch, computed from its specification before anything is read."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cellmap_lightning.errors import CellMapMemoryError


@dataclass(frozen=True)
class FormMemory:
    """Bytes of one form of a batch; see docs/batches.md.

    Attributes:
        arrays: bytes of each input and target; ``idx`` is not counted.
    """

    arrays: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(self.arrays.values())

    @property
    def total_mb(self) -> float:
        """MiB of all arrays together."""
        return self.total_bytes / 2**20


@dataclass(frozen=True)
class BatchMemory(FormMemory):
    """Bytes of a finished batch, and of its compact form; see `batch_memory`; see docs/batches.md.

    Attributes:
        compact: bytes of the form that is sent to the device.
    """

    compact: FormMemory


def device_memory(device: torch.device) -> int | None:
    """Return the total memory of a device in bytes, for a CPU that of the machine; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).total_memory)
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def gpu_memory() -> int | None:
    """Return the total memory of the current CUDA device in bytes; None without one."""
    return device_memory(torch.device("cuda")) if torch.cuda.is_available() else None


def check_fits(memory: BatchMemory, batch_size: int, device: torch.device, total: int | None, what: str) -> None:
    """Refuse a batch that is larger than a device's memory, before anything is read.

    A batch exists in both forms while it is finished.

    Args:
        memory: bytes of the batch.
        batch_size: samples in it.
        device: device on which it is finished.
        total: bytes of the device's memory; None if unknown.
        what: origin of the batch, for the message.

    Raises:
        CellMapMemoryError: the batch cannot fit.
    """
    needed = memory.total_bytes + memory.compact.total_bytes
    if total is None or needed <= total:
        return
    largest = max(memory.arrays, key=lambda name: memory.arrays[name])
    fits = total * batch_size // needed
    advice = f"at most batch_size={fits} fits" if fits else "not even one sample fits"
    # Lightning's batch size tuner recognizes running out of memory by these words.
    word = "DefaultCPUAllocator: can't allocate memory" if device.type == "cpu" else "CUDA out of memory"
    raise CellMapMemoryError(
        f"{what}: a batch of {batch_size} takes {memory.total_mb:.0f} MiB finished and {memory.compact.total_mb:.0f} "
        f"MiB compact, and the whole memory of {device} is {total / 2**20:.0f} MiB (torch would report: {word}); "
        f"{advice}; most is for {largest!r}, which a smaller shape or fewer classes make smaller"
    )
