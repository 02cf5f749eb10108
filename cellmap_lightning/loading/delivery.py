"""The way of batches to the device: copied before or in the step, or gathered from voxels that are there."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import torch

from cellmap_lightning.batches.memory import BatchMemory
from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.loading.prefetch import STREAM_DEVICES, PrefetchDecision
from cellmap_lightning.loading.resident_decision import ResidentRequest
from cellmap_lightning.loading.run import Run
from cellmap_lightning.loading.split_residents import SplitResidents
from cellmap_lightning.loading.trainer_steps import touches_before_transfer
from cellmap_lightning.resident.device_cache import DeviceCache

log = logging.getLogger(__name__)

#: Maps split, memory of a batch, device and request for regions on it to a decision.
PrefetchPolicy = Callable[[str, BatchMemory, torch.device, ResidentRequest], PrefetchDecision]


@dataclass(frozen=True)
class Delivery:
    """The way of the batches of one loader to the device; see docs/device.md.

    Attributes:
        compact: the Trainer's loop gets compact batches, and finishes them on the device.
        decision: prefetching of batches; None without `StreamPrefetch`.
        resident: the voxels on the device; None without them.
    """

    compact: bool = False
    decision: PrefetchDecision | None = None
    resident: DeviceCache | None = None


def plan_delivery(
    split: str,
    source: SampleSource,
    batch_size: int,
    num_workers: int,
    run: Run,
    data: L.LightningDataModule,
    residents: SplitResidents,
    policy: PrefetchPolicy | None,
) -> Delivery:
    """Return the way of the batches of a loader to the device.

    Args:
        split: the split.
        source: its dataset.
        batch_size: samples of a batch.
        num_workers: worker processes of the loader.
        run: the run; only a running Trainer passes batches through `transfer_batch_to_device`.
        data: the data module, whose hooks may be user code.
        residents: the voxels on the device, shared by all splits.
        policy: the policy of `StreamPrefetch`; None without it.
    """
    if not run.is_running:
        return Delivery()
    device, decision = run.device, None
    streams = device.type in STREAM_DEVICES
    touched = streams and touches_before_transfer(run.trainer, data)
    if touched:
        log.info(
            "%s: on_before_batch_transfer is overridden, so that batches are finished on the CPU for it and copied "
            "in the step; override on_after_batch_transfer to get them on the device, which is faster", split,
        )  # fmt: skip
    request = residents.request(split, source, num_workers, touched)
    if policy is not None and not touched:
        decision = policy(split, source.batch_memory(batch_size), device, request)
    resident = residents.of(split, source, batch_size, device, request, decision)
    return Delivery(streams and not touched, decision, resident)
