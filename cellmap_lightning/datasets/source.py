"""The base of datasets: positions and tiles of crops, random draws, and reading of batches."""

import bisect
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from cellmap_lightning.batches.arrays import InputArray, TargetArray
from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.batches.layout import BatchLayout
from cellmap_lightning.batches.memory import BatchMemory
from cellmap_lightning.cache.region import Region
from cellmap_lightning.cache.region_store import RegionStore
from cellmap_lightning.crops.crop import Crop
from cellmap_lightning.crops.remote_arrays import fetch_counted, fetch_read
from cellmap_lightning.datasets.left_out import report_left_out
from cellmap_lightning.datasets.requests import Request, current_request, requesting
from cellmap_lightning.errors import CellMapIndexError
from cellmap_lightning.geometry.lattice import AXES, FloatArray, Shape
from cellmap_lightning.geometry.sample_map import Warp
from cellmap_lightning.runtime.location import CacheMode
from cellmap_lightning.runtime.rng import PLACE, uniforms
from cellmap_lightning.runtime.thread_pool import FORK_GATE, Closeable, ReadPool
from cellmap_lightning.sampling.class_strategies import ClassBalanced
from cellmap_lightning.sampling.crop_strategies import PerCrop, Uniform
from cellmap_lightning.sampling.crop_table import CropTable
from cellmap_lightning.sampling.strategy import NUMBERS, Strategy
from cellmap_lightning.sampling.tiles import TileOrder, stratified
from cellmap_lightning.sampling.torch_samplers import ClassBalancedSampler, PositionSampler
from cellmap_lightning.transforms.spatial import SpatialTransforms
from cellmap_lightning.wording import plural

#: Bytes to copy, or an equivalent amount of work, that justify another thread.
BYTES_PER_THREAD = 16 << 20


@dataclass(frozen=True, eq=False)
class Draw:
    """Description of one sample: its position and augmentation; see docs/batches.md.

    Attributes:
        sample: its number in the stream.
        position: its position in the source.
        turn: matrix of its affine augmentation; see `geometry.patch_map`.
        advance: for a tile, the distance to the previous tiles, which cover the voxels before it; see
            `Placement.advance`. None for other samples.
        warp: its displacement along the patch's axes; None for none.
    """

    sample: int
    position: int
    turn: FloatArray | None
    advance: FloatArray | None = None
    warp: Warp | None = None


def _fill(region: Region, index: Shape) -> None:
    """Fill a chunk, while forks are blocked."""
    with FORK_GATE:
        region.fill(index)


class SampleSource(Dataset[dict[str, torch.Tensor]]):
    """Samples of crops, read one by one or as batches; see docs/batches.md.

    Args:
        crops: the crops.
        layout: layout of batches.
        seed: seed of everything random.
        is_train: draw samples at random and augment them.
        spatial: the spatial augmentation.
        pool: the reading threads.
        store: cache of decoded voxels.
    """

    def __init__(
        self,
        crops: Sequence[Crop],
        layout: BatchLayout,
        seed: int,
        is_train: bool,
        spatial: SpatialTransforms,
        pool: ReadPool,
        store: RegionStore,
    ) -> None:
        #: The crops, in the order of the positions.
        self.crops = tuple(crops)
        self.layout = layout
        self.seed = seed
        self.is_train = is_train
        self.spatial = spatial
        self._pool = pool
        self._store = store

    @cached_property
    def _offsets(self) -> list[int]:
        """First position of each crop, and the number of positions at the end."""
        return [0, *accumulate(len(d.placement) for d in self.crops)]

    @cached_property
    def _firsts(self) -> npt.NDArray[np.int64]:
        """First position of each crop, as an array."""
        return np.asarray(self._offsets[:-1], np.int64)

    @property
    def first_positions(self) -> list[int]:
        """First position of each crop."""
        return self._offsets[:-1]

    @cached_property
    def _tile_offsets(self) -> list[int]:
        return [0, *accumulate(d.placement.tile_count for d in self.crops)]

    @cached_property
    def strategy(self) -> Strategy:
        """Sampling strategy; for a single crop, any position in it."""
        return PerCrop().bind(self.crop_table)

    @cached_property
    def crop_table(self) -> CropTable:
        """The crops as the arrays from which strategies draw."""
        return CropTable(self.crops, self.classes)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the targets' channels."""
        return self.layout.classes

    def __len__(self) -> int:
        """Return the number of positions."""
        return self._offsets[-1]

    def locate(self, position: int) -> tuple[Crop, int]:
        """Return the crop that holds a position, and the position inside it."""
        number, local = self._split(position)
        return self.crops[number], local

    def _split(self, position: int) -> tuple[int, int]:
        """Return the number of the crop that holds a position, and the position inside it."""
        index = int(position)
        if not -len(self) <= index < len(self):
            raise CellMapIndexError(f"{self}: position {index:,} is outside its {plural(len(self), 'position')}")
        index %= len(self)
        number = bisect.bisect_right(self._offsets, index) - 1
        return number, index - self._offsets[number]

    def get_center(self, position: int) -> dict[str, float]:
        """Return the centre of the patches at a position, ``{axis: nm}``.

        Raises:
            CellMapIndexError: the position does not exist.
        """
        crop, local = self.locate(position)
        return dict(zip(AXES, crop.placement.center(local).tolist(), strict=True))

    def get_crop(self, position: int) -> str:
        """Return the name of the crop that holds a position, as in split.csv and messages.

        Raises:
            CellMapIndexError: the position does not exist.
        """
        return self.locate(position)[0].label

    @property
    def tile_count(self) -> int:
        """Number of tiles: patches that together cover every crop."""
        return self._tile_offsets[-1]

    def tile(self, number: int) -> int:
        """Return the position of a tile."""
        return self._tile(number, number).position

    def _tile(self, sample: int, number: int) -> Draw:
        """Return a tile as a sample."""
        if not 0 <= number < self.tile_count:
            raise CellMapIndexError(f"{self}: tile must be in [0, {self.tile_count}), got {number}")
        crop = bisect.bisect_right(self._tile_offsets, number) - 1
        placement, local = self.crops[crop].placement, number - self._tile_offsets[crop]
        return Draw(sample, self._offsets[crop] + placement.tile(local), None, placement.advance(local))

    def tile_order(self) -> TileOrder:
        """Return all tiles, in an order with every prefix spread over all crops; log once what they leave out."""
        return self._tile_order

    @cached_property
    def _tile_order(self) -> TileOrder:
        report_left_out(self.crops, self.describe())
        return TileOrder([crop.placement.tiles_along for crop in self.crops])

    def select_tiles(self, count: int, seed: int) -> Sequence[int]:
        """Return tiles stratified by class, a function of the crops and the seed; see `stratified`.

        Classes are located once, in coarse levels of the labels.
        """
        if count >= self.tile_count:
            return self.tile_order()
        strata = []
        with tqdm(total=len(self.crops), unit="crop", disable=None, leave=False, delay=1) as bar:
            bar.set_description("locating classes")
            for crop in self.crops if self.classes else ():
                crop.class_tiles  # noqa: B018  a cached property
                bar.update()
        for name in self.classes:
            located, possible = [], []
            for offset, crop in zip(self._tile_offsets, self.crops, strict=False):
                tiles = crop.class_tiles.get(name, ())
                if tiles is None:
                    possible.append(np.arange(offset, offset + crop.placement.tile_count))
                elif len(tiles):
                    located.append(offset + np.asarray(tiles))
            # Crops in which the class may be anywhere are only used if it was not located in any crop.
            if located or possible:
                strata.append(np.concatenate(located or possible))
        return stratified(strata, self.tile_order(), count, seed)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        """Return the finished sample at a position: a batch of one without its first axis.

        In training it has the augmentation of sample ``position`` of the first epoch, or that of the stream's sample
        for which a loader requests it.

        Raises:
            CellMapIndexError: the position does not exist.
        """
        self.locate(position)
        position = int(position) % len(self)
        request = current_request() or Request(position, self.seed)
        draw = request.draw
        if draw is None or request.source is not self or draw.position != position:
            (draw,) = self.augmented([request.sample], [position], request.seed)
        number, local = self._split(position)
        member = self._overriding(number)
        if member is not None:
            local_draw = dataclasses.replace(draw, position=local)
            with requesting(Request(request.sample, request.seed, member, local_draw)):
                sample = member[local]
            return sample | {"idx": torch.tensor(position, dtype=torch.int64, device="cpu")}
        batch = self.read([draw])
        batch.layout = dataclasses.replace(self.layout, seed=request.seed)
        return {name: value[0] for name, value in batch.finish().items()}

    def describe(self) -> str:
        """Return the number of crops and positions, for log lines."""
        return f"{plural(len(self.crops), 'crop')}, {plural(len(self), 'position')} of a patch"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({plural(len(self.crops), 'crop')}, {plural(len(self), 'position')})"

    def overriding_types(self) -> list[str]:
        """Return the names of user-defined classes, of this dataset and its parts, that override ``__getitem__``."""
        return [type(self).__name__] if overrides_items(self) else []

    def _overriding(self, number: int) -> "SampleSource | None":
        """Return the dataset of a crop if it is a subclass of user code that overrides ``__getitem__``."""
        return None

    def set_random_state(self, seed: int | None = None, state: Any = None) -> "SampleSource":
        """Do nothing, since samples are a function of ``seed`` and their numbers alone.

        MONAI's loaders call this (the interface of ``monai.transforms.Randomizable``), and would otherwise search all
        attributes for random transforms.
        """
        return self

    def draw(self, samples: Sequence[int], shuffle: bool, seed: int, strategy: Strategy | None = None) -> list[Draw]:
        """Describe samples by their numbers, as a function of (seed, number) alone.

        Args:
            samples: their numbers.
            shuffle: draw crop and position of each sample at random, with augmentation if the dataset is for training;
                otherwise sample ``n`` is tile ``n``, with unknown targets where previous tiles cover it.
            seed: random seed.
            strategy: sampling strategy; by default `strategy`.
        """
        if not shuffle:
            return [self._tile(n, n) for n in samples]
        turns = self.spatial.turns(seed, samples) if self.is_train else [None] * len(samples)
        places = (strategy or self.strategy).choose(uniforms(seed, PLACE, samples, NUMBERS), turns)
        positions = (self._firsts[places.crops] + places.positions).tolist()
        return self._draws(samples, positions, turns, seed)

    def augmented(self, samples: Sequence[int], positions: Sequence[int], seed: int) -> list[Draw]:
        """Describe samples at some positions, with augmentation if the dataset is for training."""
        turns = self.spatial.turns(seed, samples) if self.is_train else [None] * len(samples)
        return self._draws(samples, positions, turns, seed)

    def _draws(
        self, samples: Sequence[int], positions: Sequence[int], turns: Sequence[FloatArray | None], seed: int
    ) -> list[Draw]:
        warps = self.spatial.warps(seed, samples) if self.is_train else [None] * len(samples)
        return [
            Draw(sample, position, turn, warp=warp)
            for sample, position, turn, warp in zip(samples, positions, turns, warps, strict=True)
        ]

    def get_crop_class_matrix(self) -> npt.NDArray[np.bool_]:
        """Return bool ``[crops, classes]``, True if a crop holds voxels of a class, by counts and not by listing."""
        return self.crop_table.counts > 0

    @property
    def class_counts(self) -> dict[str, float]:
        """Foreground voxels of each class over all crops; see `CropLabels.class_counts`."""
        fetch_counted(self.crops)
        return self._summed(crop.class_counts for crop in self.crops)

    @property
    def background_counts(self) -> dict[str, float]:
        """Voxels where each class is annotated and absent, over all crops; see `CropLabels.background_counts`."""
        fetch_counted(self.crops)
        return self._summed(crop.background_counts for crop in self.crops)

    def _summed(self, counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
        total = dict.fromkeys(self.classes, 0.0)
        for crop in counts:
            for name, count in crop.items():
                total[name] += count
        return total

    @property
    def class_weights(self) -> dict[str, float]:
        """Background over foreground voxels of each class, as for ``pos_weight``; 1 for a class without foreground."""
        counts, background = self.class_counts, self.background_counts
        return {name: background[name] / count if count > 0 else 1.0 for name, count in counts.items()}

    @property
    def validation_indices(self) -> list[int]:
        """Positions of the tiles, which together cover every crop once."""
        return [self.tile(number) for number in range(self.tile_count)]

    def get_weighted_sampler(
        self, batch_size: int = 1, rng: torch.Generator | None = None, samples_per_epoch: int | None = None
    ) -> PositionSampler:
        """Return a sampler of random positions with every class equally often; see `ClassBalancedSampler`.

        Args:
            batch_size: positions of an epoch without ``samples_per_epoch``, as in cellmap-data.
            rng: its initial seed is the sampler's; by default the dataset's seed is.
            samples_per_epoch: positions of an epoch.
        """
        return ClassBalancedSampler(self, samples_per_epoch or batch_size, _seed(rng, self.seed))

    def get_subset_random_sampler(
        self, num_samples: int, weighted: bool = True, rng: torch.Generator | None = None
    ) -> PositionSampler:
        """Return a sampler of random positions, different ones in each pass.

        Args:
            num_samples: positions of a pass.
            weighted: every class equally often; otherwise every voxel equally often.
            rng: see `get_weighted_sampler`.
        """
        strategy = ClassBalanced() if weighted else Uniform()
        return PositionSampler(self, num_samples, _seed(rng, self.seed), strategy)

    def read(self, draws: Sequence[Draw], pin: bool = False) -> CompactBatch:
        """Read samples into one new compact batch, in page-locked memory with ``pin``."""
        batch = self.layout.empty(len(draws), pin)
        self.read_into(draws, {name: tensor.numpy() for name, tensor in batch.tensors.items()})
        batch.tensors["idx"] = torch.tensor([d.position for d in draws], dtype=torch.int64, device="cpu")
        batch.tensors["sample"] = torch.tensor([d.sample for d in draws], dtype=torch.int64, device="cpu")
        return batch

    def read_into(self, draws: Sequence[Draw], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Read samples into the arrays of a compact batch, ``{name: [N, ...]}``."""
        self.prepare()
        # One job copies one array of one sample. Chunks are decoded first, each once even if several samples need it,
        # so that jobs never wait for each other.
        jobs: list[Callable[[], None]] = []
        fills: dict[tuple[int, Shape], Callable[[], None]] = {}
        work = 0  # bytes to copy, or the equivalent of computations
        specs: dict[str, InputArray | TargetArray] = {**self.layout.inputs, **self.layout.targets}
        for row, draw in enumerate(draws):
            crop, local = self.locate(draw.position)
            place = crop.placement.grid_index(local)
            for name, array in arrays.items():
                out, transform = array[row], self.layout.raw_transforms.get(name)
                spec = specs[name]
                jobs.append(
                    partial(crop.read_array, name, place, draw.turn, out, spec, transform, draw.advance, draw.warp)
                )
                missing = crop.missing(name, place, draw.turn, draw.warp)
                work += out.nbytes * (1 if missing is not None else crop.relative_cost(name, draw.turn, draw.warp))
                for region, index in missing or ():
                    fills[id(region), index] = partial(region.fill, index)
        with FORK_GATE:
            if fills:
                self._pool.run(fills.values())
            # Passing a small copy to another thread costs more than the copy, so that threads grow with the work.
            self._pool.run(jobs, threads=max(1, -(-work // BYTES_PER_THREAD)))

    def crop_number(self, position: int) -> int:
        """Return the number of the crop that holds a position."""
        return self._split(position)[0]

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run jobs in the dataset's threads, while forks are blocked; raise the first error of any."""
        if jobs:
            with FORK_GATE:
                self._pool.run(jobs)

    def decode_ahead(self, positions: Sequence[int]) -> None:
        """Start decoding the chunks of some samples in the dataset's threads, and return immediately.

        Without a cache this does nothing. Errors are raised when the samples are read.
        """
        self.prepare()
        fills: dict[tuple[int, Shape], Callable[[], None]] = {}
        for position in positions:
            crop, local = self.locate(position)
            place = crop.placement.grid_index(local)
            for name in self.layout.inputs:
                for region, index in crop.missing(name, place, None) or ():
                    fills[id(region), index] = partial(_fill, region, index)
        if fills:
            self._pool.ahead(fills.values())

    def cancel_ahead(self) -> None:
        """Cancel the work started by `decode_ahead`."""
        self._pool.cancel_ahead()

    def prepare(self) -> None:
        """Plan the cache; must be called before the first read and before worker processes are started."""
        if not self._store.planned:
            if self._store.mode not in ("none", "chunks"):  # these two modes reuse nothing across processes
                fetch_read(self.crops)
            regions = [region for crop in self.crops for region in crop.regions]
            self._store.plan(regions, not self.is_train, self.describe())

    @property
    def cache(self) -> CacheMode:
        """Location of the cache of decoded voxels."""
        return self._store.mode

    @property
    def cache_bytes(self) -> int | None:
        """Limit of the cache in bytes; None for the default."""
        return self._store.budget

    @property
    def is_cached(self) -> bool:
        """True if everything that is read is cached once it was decoded."""
        return all(region.is_cached for crop in self.crops for region in crop.regions)

    def batch_memory(self, batch_size: int = 1) -> BatchMemory:
        """Return the bytes of a batch of ``batch_size`` samples, computed before anything is read."""
        return self.layout.memory(batch_size)

    @property
    def executor(self) -> ThreadPoolExecutor:
        """The reading threads: created at first use, the same until `close`, shared by the crops of a collection."""
        return self._pool.executor

    @property
    def max_workers(self) -> int:
        """Number of reading threads."""
        return self._pool.workers

    def follow(self, reader: Closeable) -> None:
        """Register a reader to close first when the dataset is stopped or closed."""
        self._pool.follow(reader)

    def cancel(self, waiting: int | None = None) -> None:
        """Cancel the reads that have not started, by default all, else those that a thread waits for."""
        self._pool.cancel(waiting)

    def stop(self) -> None:
        """Cancel the reads that have not started, and end the threads and the passes of loaders; the cache stays."""
        self._pool.close()

    def close(self) -> None:
        """Stop and release the cache; threads and cache are created again on the next use."""
        self.stop()
        self._store.close()

    def __enter__(self) -> "SampleSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _seed(rng: torch.Generator | None, otherwise: int) -> int:
    return otherwise if rng is None else rng.initial_seed()


def overrides_items(dataset: SampleSource) -> bool:
    """Return True if a subclass of user code overrides ``__getitem__``."""
    return type(dataset).__getitem__ is not SampleSource.__getitem__
