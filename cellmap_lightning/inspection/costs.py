"""Costs of a configuration: memory of batches, prefetching, the cache, and frequencies of classes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cellmap_lightning.batches.memory import BatchMemory, device_memory
from cellmap_lightning.cache.chunk_cache import DEFAULT_CHUNK_BYTES
from cellmap_lightning.callbacks.stream_prefetch import StreamPrefetch
from cellmap_lightning.datamodule import CellMapDataModule
from cellmap_lightning.datasets.frequencies import class_frequencies
from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.loading.prefetch import decide
from cellmap_lightning.runtime.location import Location, choose
from cellmap_lightning.splits.entries import SPLITS

#: Samples that ``deep`` draws and reads to count the classes in them.
SAMPLES = 64


@dataclass(frozen=True)
class Costs:
    """Costs of a configuration.

    Attributes:
        batch_size: samples of a batch.
        finished: bytes of each array of a finished batch, in the first split that has crops.
        compact: bytes of each array as it is transferred to the device.
        prefetch: whether batches are copied to the device ahead, ``{device: reason}``.
        crops: number of crops in use in each split.
        samples: number of positions in each split.
        cache_bytes: bytes of decoded voxels when all of them have been read.
        cache_room: bytes that the cache may take.
        cache_where: its folder, or memory.
        strategy: the sampling strategy of training.
        frequencies: for each class, the share of samples drawn for it, and of those from crops that have it.
        shown: classes in samples that were read, as a table; with ``deep``.
        unknown: the reason if frequencies are not known.

    Example:
        >>> inspect(data, patch, None).costs.finished
    """

    batch_size: int
    finished: Mapping[str, int]
    compact: Mapping[str, int]
    prefetch: Mapping[str, str]
    crops: Mapping[str, int]
    samples: Mapping[str, int]
    cache_bytes: int
    cache_room: int
    cache_where: str
    strategy: str | None = None
    frequencies: Mapping[str, Sequence[float]] | None = None
    shown: str | None = None
    unknown: str | None = None


def compute_costs(
    data: CellMapDataModule, settings: Mapping[str, Any], device_bytes: int, deep: bool, counts: bool
) -> Costs:
    """Compute the costs of a configuration.

    Args:
        data: its data module.
        settings: the arguments of the data module.
        device_bytes: memory of the CUDA device for which prefetching is decided.
        deep: read some samples.
        counts: count voxels where the metadata has no counts.

    Raises:
        CellMapError: the configuration does not fit the data.
    """
    splits = {split: data.splits[split] for split in SPLITS if data.splits.has_crops(split)}
    memory = data.batch_memory(next(iter(splits)))
    location = _cache_location(settings)
    # Crops and splits may share a region, which is cached once.
    regions = {r.digest(): r.layout.nbytes for s in splits.values() for crop in s.crops for r in crop.regions}
    sampling: dict[str, Any] = {}
    if "train" in splits and splits["train"].layout.targets:
        sampling = dict(_sampling(splits["train"], deep, counts))
    left_out = {split: len(data.splits.left_out.get(split, ())) for split in splits}
    return Costs(
        batch_size=data.batch_size,
        finished=dict(memory.arrays),
        compact=dict(memory.compact.arrays),
        prefetch=_prefetch(memory, device_bytes),
        crops={split: len(data.splits.entries[split]) - left_out[split] for split in splits},
        samples={split: len(s) for split, s in splits.items()},
        cache_bytes=sum(regions.values()) if location else 0,
        cache_room=location.budget if location else 0,
        cache_where=str(location.folder or "memory") if location else "nowhere (cache=none)",
        **sampling,
    )


def _cache_location(settings: Mapping[str, Any]) -> Location | None:
    """Return folder and budget of the cache; None without a cache."""
    mode, budget = settings.get("cache", "auto"), settings.get("cache_bytes")
    if mode == "none":
        return None
    if mode == "chunks":
        return Location(None, budget or DEFAULT_CHUNK_BYTES, "the chunks decoded last")
    return choose(mode, budget)


def _prefetch(memory: BatchMemory, device_bytes: int) -> dict[str, str]:
    """Return the decision on copying batches ahead, on this machine and, if it has no GPU, on a CUDA device."""
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    devices = {"this machine": (here.type, device_memory(here))}
    if here.type == "cpu":
        devices[f"a CUDA device of {device_bytes / 2**30:.0f} GiB"] = ("cuda", device_bytes)
    requested = StreamPrefetch().settings
    decisions = {name: decide(memory, kind, size, requested) for name, (kind, size) in devices.items()}
    return {
        name: f"{f'on, {decision.depth} ahead' if decision.enabled else 'off'}: {decision.reason}"
        for name, decision in decisions.items()
    }


def _sampling(train: SampleSource, deep: bool, counts: bool) -> Iterator[tuple[str, Any]]:
    """Yield attributes of `Costs` on strategy and frequencies of classes."""
    yield "strategy", repr(train.strategy)
    if not counts and not all(crop.labels.counted for crop in train.crops):
        yield "unknown", "some metadata has no voxel counts of classes; deep=true counts them"
    else:
        has_class = train.crop_table.counts > 0
        drawn, crop = train.strategy.class_chances, train.strategy.crop_chances
        yield (
            "frequencies",
            {name: (float(drawn[i]), float(crop @ has_class[:, i])) for i, name in enumerate(train.classes)},
        )
    first = next(iter(train.layout.targets.values()))
    if deep and first.kind.name == "binary":
        yield "shown", str(class_frequencies(train, SAMPLES))
