"""What a configuration costs: batches, batches ahead, decoded voxels, and how often classes come."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cellmap_lightning.batches.memory import device_memory
from cellmap_lightning.cache.chunk_cache import DEFAULT_CHUNK_BYTES
from cellmap_lightning.callbacks.stream_prefetch import StreamPrefetch
from cellmap_lightning.datamodule import CellMapDataModule
from cellmap_lightning.datasets.frequencies import class_frequencies
from cellmap_lightning.loading.prefetch import decide
from cellmap_lightning.runtime.location import Location, choose
from cellmap_lightning.splits.entries import SPLITS

#: Samples that ``deep`` draws and reads to see what they show.
SAMPLES = 64


@dataclass(frozen=True)
class Costs:
    """What a configuration costs.

    Attributes:
        batch_size: samples of a batch.
        finished: bytes of each array of a finished batch, in the first split that has crops.
        compact: bytes of each array as it travels.
        prefetch: whether batches are copied ahead, ``{device: reason}``.
        crops: crops that are used in each split.
        samples: positions of each split.
        cache_bytes: bytes of decoded voxels, when all of them have been read.
        cache_room: bytes that may be kept.
        cache_where: the folder, or memory.
        strategy: where training samples come from.
        frequencies: of each class, the share of samples that is drawn for it, and that is from crops that hold it.
        shown: what samples that were read showed, as a table; with ``deep``.
        unknown: why frequencies are not known.
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


def costs(settings: Mapping[str, Any], device_bytes: int, deep: bool) -> Costs:
    """What a configuration costs.

    Args:
        settings: arguments of `CellMapDataModule`.
        device_bytes: memory of a CUDA device that is asked about.
        deep: read some samples, and count voxels where the metadata does not say how many there are.

    Raises:
        CellMapError: the configuration does not fit the data.
    """
    with CellMapDataModule(**settings) as data:
        given = [split for split in SPLITS if data.crops.has_crops(split)]
        sets = {split: data.crops[split] for split in given}
        memory = data.batch_memory(given[0])
        regions = {r.digest(): r.layout.nbytes for s in sets.values() for crop in s.crops for r in crop.regions}
        mode = settings.get("cache", "auto")
        room = settings.get("cache_bytes")
        if mode == "chunks":
            location: Location | None = Location(None, room or DEFAULT_CHUNK_BYTES, "those that were decoded last")
        else:
            location = choose(mode, room) if mode != "none" else None
        wanted = StreamPrefetch().settings
        here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ahead = {"this machine": (here.type, device_memory(here))}
        if here.type == "cpu":
            ahead[f"a CUDA device of {device_bytes / 2**30:.0f} GiB"] = ("cuda", device_bytes)
        decisions = {name: decide(memory, kind, size, wanted) for name, (kind, size) in ahead.items()}
        said = {
            name: f"{'on, ' + str(d.depth) + ' ahead' if d.enabled else 'off'}: {d.reason}"
            for name, d in decisions.items()
        }
        found: dict[str, Any] = {}
        if "train" in sets and sets["train"].layout.targets:
            train = sets["train"]
            found["strategy"] = repr(train.strategy)
            if not deep and not all(crop.labels.counted for crop in train.crops):
                found["unknown"] = "not all metadata says how many voxels classes have; deep=true counts them"
            else:
                held = train.crop_table.counts > 0
                drawn, crop = train.strategy.class_chances, train.strategy.crop_chances
                found["frequencies"] = {
                    name: (float(drawn[i]), float(crop @ held[:, i])) for i, name in enumerate(train.classes)
                }
            first = next(iter(train.layout.targets.values()))
            if deep and first.kind.name == "binary":
                found["shown"] = str(class_frequencies(train, SAMPLES))
        return Costs(
            data.batch_size,
            dict(memory.arrays),
            dict(memory.compact.arrays),
            said,
            {split: len(s.crops) for split, s in sets.items()},
            {split: len(s) for split, s in sets.items()},
            sum(regions.values()) if location else 0,
            location.budget if location else 0,
            str(location.folder or "memory") if location else "nowhere (cache=none)",
            **found,
        )
