"""The data of a Trainer: crops of each split, their loaders, and where their batches are finished."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerStatus

from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.sampling.arrays import (
    ArraySpecs,
    BatchLayout,
    CompactBatch,
    parse_classes,
    parse_inputs,
    parse_targets,
)
from cellmap_lightning.sampling.dataloader import CellMapDataLoader
from cellmap_lightning.sampling.datasplit import SPLITS, CellMapDataSplit
from cellmap_lightning.sampling.labels import Downsample, Unknown
from cellmap_lightning.sampling.memory import BatchMemory
from cellmap_lightning.sampling.multidataset import CellMapMultiDataset
from cellmap_lightning.sampling.prefetch import STREAM_DEVICES, PrefetchDecision
from cellmap_lightning.transforms.intensity import AUTO
from cellmap_lightning.volumes.chunks import Reader
from cellmap_lightning.volumes.image import MAX_UPSAMPLING
from cellmap_lightning.volumes.location import CacheMode

log = logging.getLogger(__name__)

#: Batches of an epoch when nothing else is said, over all ranks.
DEFAULT_BATCHES_PER_EPOCH = 1000

_STAGES: dict[str | None, tuple[str, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: SPLITS,
}
#: The split behind each of a Trainer's running stages.
_RUNNING = {"train": "train", "sanity_check": "val", "validate": "val", "test": "test", "predict": "predict"}

PrefetchPolicy = Callable[[str, BatchMemory, torch.device], PrefetchDecision]


def _instantiated(datasets: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The same with every entry that names a ``_target_`` made into what it names."""
    if not isinstance(datasets, Mapping):
        return datasets

    def made(entry: Any) -> Any:
        if isinstance(entry, Mapping) and "_target_" in entry:
            from hydra.utils import instantiate  # under Hydra this has happened before

            return instantiate(entry, _convert_="all")
        return entry

    return {
        split: [made(entry) for entry in entries]
        if isinstance(entries, Sequence) and not isinstance(entries, str)
        else entries
        for split, entries in datasets.items()
    }


class CellMapDataModule(L.LightningDataModule):
    """Crops of CellMap volumes for `Trainer.fit`, `validate`, `test` and `predict`.

    Datasets are built once per split, when a stage first needs them, and keep their threads through every ``setup`` and
    ``teardown`` until `close`.

    Args:
        classes: the targets' channels, in order; None for raw only.
        input_arrays: ``{name: {"shape": voxels, "scale": nm}}`` (z, y, x) of the inputs, or one bare description.
        target_arrays: the same for the targets; concentric with the inputs. None for raw only.
        csv_path: the crops, see `CellMapDataSplit`.
        datasets: the crops instead of a CSV, ``{split: [{"raw": path, "gt": path}, ...]}``; an entry may also be a
            `CellMapDataset`, or a mapping whose ``_target_`` makes one.
        batch_size: samples of a batch, per rank.
        num_workers: worker processes per loader; the dataset reads with threads of its own, so 0 is the fast way.
        spatial_transforms: augmentation of the train split, see `SpatialTransforms`.
        intensity_transforms: random blur, contrast, brightness, gamma and noise of the train split, see
            `IntensityTransforms`.
        raw_value_transforms: see `CellMapDataset`.
        target_value_transforms: see `CellMapDataset`.
        class_relation_dict: see `CellMapDataset`.
        samples_per_epoch: samples of a training epoch over all ranks.
        batches_per_epoch: batches of a training epoch instead, over all ranks; 1000 when neither is given.
        val_samples: validate on this many tiles at most, spread over all crops, the same each time; by default all.
        pad: read crops smaller than a patch, with the raw around them; targets are NaN outside the crop.
        seed: everything random follows from it and from the number of the sample.
        normalize: how stored values become an input, see `CellMapDataset`; an entry of ``datasets`` can have its own.
        invert: exchange dark and bright, likewise.
        infer: see `CellMapDataset`.
        class_table: see `CellMapDataset`.
        label_downsample: see `CellMapDataset`.
        unknown: see `CellMapDataset`.
        nan_targets: see `CellMapDataset`.
        planes: where patches of two lengths lie, any of ``xy``, ``xz`` and ``yz``.
        too_coarse: crops whose labels are coarser than asked for: ``drop`` (logged), ``upsample``, or ``error``.
        max_upsampling: how many times finer than raw's finest level an input may be.
        max_workers: reading threads per split; see `CellMapDataset`.
        cache: where decoded voxels are kept: ``auto``, ``disk``, ``memory`` or ``none``; see `CellMapDataset`.
        cache_bytes: bytes that are kept at most, by all splits together; see `CellMapDataset`.
        reader: what decodes: ``zarr`` or ``tensorstore``.
        pin_memory: read into page-locked memory; by default on CUDA devices.
        persistent_workers: see `CellMapDataLoader`.
        prefetch_factor: see `CellMapDataLoader`.
        timeout: see `CellMapDataLoader`.
        multiprocessing_context: see `CellMapDataLoader`.
        drop_last: leave out an incomplete last training batch.
        strategy: where training samples come from: ``mix`` (two thirds ``class_balanced``, one third ``foreground``),
            ``uniform``, ``per_crop``, ``weighted``, or ``{name: one of them, and its options}``; see `strategies`.
        balance_datasets: make raw volumes equally likely in training, whatever the number and size of their crops.

    Raises:
        CellMapError: the arguments contradict each other. What is wrong with the data is met in ``setup``.
    """

    def __init__(
        self,
        classes: Sequence[str] | None = None,
        input_arrays: ArraySpecs | None = None,
        target_arrays: ArraySpecs | None = None,
        csv_path: str | None = None,
        datasets: Mapping[str, Sequence[Any] | None] | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        spatial_transforms: Mapping[str, Any] | None = None,
        raw_value_transforms: Any = AUTO,
        target_value_transforms: Any = None,
        class_relation_dict: Mapping[str, Any] | None = None,
        samples_per_epoch: int | None = None,
        batches_per_epoch: int | None = None,
        val_samples: int | None = None,
        pad: bool = True,
        seed: int = 0,
        intensity_transforms: Mapping[str, Any] | None = None,
        normalize: Any = "dtype",
        invert: bool = False,
        infer: Sequence[str] = (),
        class_table: str | None = None,
        label_downsample: Downsample = "stored",
        unknown: Unknown = "metadata",
        nan_targets: bool = True,
        planes: Sequence[str] = ("xy",),
        too_coarse: Literal["drop", "upsample", "error"] = "drop",
        max_upsampling: float = MAX_UPSAMPLING,
        max_workers: int | None = None,
        cache: CacheMode = "auto",
        cache_bytes: int | None = None,
        reader: Reader = "zarr",
        pin_memory: bool | None = None,
        persistent_workers: bool | None = None,
        prefetch_factor: int | None = None,
        timeout: float = 0,
        multiprocessing_context: str | None = None,
        drop_last: bool | None = None,
        strategy: Any = "mix",
        balance_datasets: bool = False,
    ) -> None:
        super().__init__()
        if samples_per_epoch is not None and batches_per_epoch is not None:
            raise CellMapTypeError("samples_per_epoch and batches_per_epoch are two ways to say one thing; give one")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("samples_per_epoch", samples_per_epoch, 1),
            ("batches_per_epoch", batches_per_epoch, 1),
            ("val_samples", val_samples, 1),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise CellMapValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if input_arrays is None:
            raise CellMapTypeError("input_arrays is needed: {name: {shape: voxels, scale: nm}}")
        self.classes = parse_classes(classes) if classes is not None else None
        self.input_arrays = parse_inputs(input_arrays)
        self.target_arrays = parse_targets(target_arrays, len(self.classes)) if target_arrays and self.classes else {}
        self.batch_size = batch_size  # plain, so that Lightning's BatchSizeFinder can change it
        self.num_workers = num_workers
        self.samples_per_epoch = samples_per_epoch
        self.batches_per_epoch = batches_per_epoch
        self.val_samples = val_samples
        self.seed = seed
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.prefetch_factor = prefetch_factor
        self.timeout = timeout
        self.multiprocessing_context = multiprocessing_context
        self.drop_last = drop_last
        #: Set by `StreamPrefetch`: from (split, memory, device) to a decision.
        self.prefetch: PrefetchPolicy | None = None
        self._layouts: dict[str, BatchLayout] = {}
        self.split = CellMapDataSplit(
            csv_path,
            _instantiated(datasets),
            self.classes,
            input_arrays,
            target_arrays,
            spatial_transforms,
            raw_value_transforms,
            target_value_transforms,
            class_relation_dict,
            pad,
            max_workers,
            seed,
            intensity_transforms=intensity_transforms,
            normalize=normalize,
            invert=invert,
            infer=infer,
            class_table=class_table,
            label_downsample=label_downsample,
            unknown=unknown,
            nan_targets=nan_targets,
            planes=planes,
            too_coarse=too_coarse,
            max_upsampling=max_upsampling,
            cache=cache,
            cache_bytes=cache_bytes,
            reader=reader,
            strategy=strategy,
            balance_datasets=balance_datasets,
        )

    # -- datasets

    def setup(self, stage: str | None = None) -> None:
        """Build the datasets that a stage needs and that do not exist yet; splits without crops are left out.

        Raises:
            CellMapError: what is wrong with the data, all crops in one table.
        """
        for split in _STAGES.get(str(getattr(stage, "value", stage)) if stage is not None else None, SPLITS):
            if self.split.given(split):
                self.split[split]

    @property
    def train_dataset(self) -> CellMapMultiDataset:
        """Crops to train on."""
        return self.split["train"]

    @property
    def val_dataset(self) -> CellMapMultiDataset:
        """Crops to validate on."""
        return self.split["val"]

    @property
    def test_dataset(self) -> CellMapMultiDataset:
        """Crops to test on."""
        return self.split["test"]

    @property
    def predict_dataset(self) -> CellMapMultiDataset:
        """Volumes to predict."""
        return self.split["predict"]

    def batch_memory(self, split: str = "train") -> BatchMemory:
        """The bytes of a batch, known before anything is read.

        Raises:
            CellMapKeyError: there are no crops for that split.
        """
        return self.split[split].batch_memory(self.batch_size)

    # -- loaders

    def train_dataloader(self) -> CellMapDataLoader:
        """Random samples of the train split."""
        world = self._world
        if self.samples_per_epoch is not None:
            samples = self.samples_per_epoch
        else:
            samples = (self.batches_per_epoch or DEFAULT_BATCHES_PER_EPOCH) * self.batch_size
        if samples < world * self.batch_size:
            raise CellMapValueError(
                f"an epoch of {samples} samples has no complete batch of {self.batch_size} for each of {world} ranks; "
                "raise samples_per_epoch or batches_per_epoch"
            )
        return self._loader("train", samples)

    def val_dataloader(self) -> CellMapDataLoader:
        """Tiles of the val split, the same each time."""
        if not self.split.given("val"):
            raise CellMapKeyError(
                f"no crops were given for 'val': {self.split.source} has none; add some (in a CSV with the usage "
                "'validate'), or train without validation by limit_val_batches=0"
            )
        count = self.val_samples
        return self._loader("val", None if count is None else min(count, self.split["val"].tile_count))

    def test_dataloader(self) -> CellMapDataLoader:
        """Tiles that cover the test split."""
        return self._loader("test", None)

    def predict_dataloader(self) -> CellMapDataLoader:
        """Tiles that cover the volumes to predict."""
        return self._loader("predict", None)

    def _loader(self, split: str, samples: int | None) -> CellMapDataLoader:
        dataset = self.split[split]
        device = self._device
        if self.num_workers == 0:
            # The dataset reads with threads of its own: what Lightning says about processes would make it slower.
            warnings.filterwarnings("ignore", f".*'{split}_dataloader' does not have many workers")
        # Only a Trainer that runs passes batches through `transfer_batch_to_device`.
        running = self.trainer is not None and self.trainer.state.status == TrainerStatus.RUNNING
        streams = running and device.type in STREAM_DEVICES
        decision = None
        if self.prefetch is not None and running:
            decision = self.prefetch(split, dataset.batch_memory(self.batch_size), device)
        loader = CellMapDataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            samples_per_epoch=samples,
            is_train=split == "train",
            seed=self.seed,
            finish=not streams,
            drop_last=self.drop_last if split == "train" else False,
            rank=self.trainer.global_rank if self.trainer is not None else None,
            world=self._world if self.trainer is not None else None,
            pin_memory=device.type == "cuda" if self.pin_memory is None else self.pin_memory,
            prefetch_to=device if decision is not None and decision.enabled else None,
            decision=decision,
            floats_as_integers=streams,
            persistent_workers=self.persistent_workers,
            prefetch_factor=self.prefetch_factor,
            timeout=self.timeout,
            multiprocessing_context=self.multiprocessing_context,
        )
        self._layouts[split] = loader.layout
        return loader

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    # -- batches

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch, and finish it there if it travelled compact.

        Finished here and not in ``on_after_batch_transfer``: a hook of that name on a datamodule would hide the user's
        own.
        """
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        if not isinstance(batch, CompactBatch):
            return batch
        if self.trainer is None:
            raise CellMapValueError(
                "a compact batch can only be finished while a Trainer runs; use layout.finish(batch)"
            )
        stage = self.trainer.state.stage
        split = _RUNNING.get(stage.value if stage is not None else "")
        if split is None or split not in self._layouts:
            raise CellMapKeyError(f"no loader of this module delivers batches in the stage {stage!r}")
        # Lightning converts what a loader yields to the precision before it is moved: here it is only float32 by now.
        return self.trainer.precision_plugin.convert_input(self._layouts[split].finish(batch))

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """How each volume was normalized, so that a prediction from the checkpoint sees the same numbers."""
        return {"normalization": {path: list(affine) for path, affine in self.split.normalization.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Normalize the volumes of the checkpoint as they were."""
        affine = state_dict.get("normalization", {})
        self.split.restore_normalization({path: (float(o), float(f)) for path, (o, f) in affine.items()})

    # -- the end

    def on_exception(self, exception: BaseException) -> None:
        """Cancel queued reads: an interpreter that exits would otherwise run them all first."""
        self.split.cancel()

    def close(self) -> None:
        """End every thread and drop what is cached. A later use makes new ones."""
        self.split.close()

    def __enter__(self) -> "CellMapDataModule":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        given = [split for split in SPLITS if self.split.given(split)]
        return f"CellMapDataModule({self.split.source}; splits: {', '.join(given)}; classes: {self.classes})"
