"""The data of a Trainer: crops of each split, their loaders, and where their batches are finished."""

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning_utilities.core.apply_func import apply_to_collection

from cellmap_lightning.batches.arrays import ArraySpecs, parse_classes, parse_inputs, parse_targets
from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.batches.memory import BatchMemory
from cellmap_lightning.checkpointing.data_match import RECORD, check_state, data_record
from cellmap_lightning.checkpointing.private_hparams import PrivateHyperparameters
from cellmap_lightning.crops.encodings import MissingLabels, Unknown
from cellmap_lightning.crops.image import MAX_UPSAMPLING, MissingRaw
from cellmap_lightning.crops.labels import Downsample
from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from cellmap_lightning.datasets.multidataset import CellMapMultiDataset
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.io.chunks import Reader
from cellmap_lightning.io.ngff import LevelTranslations
from cellmap_lightning.io.retrying import DEFAULT_RETRY
from cellmap_lightning.loading.dataloader import WORKER_TIMEOUT, CellMapDataLoader
from cellmap_lightning.loading.prefetch import STREAM_DEVICES, PrefetchDecision
from cellmap_lightning.loading.samples import NumberedSamples
from cellmap_lightning.loading.trainer_steps import (
    Stream,
    TrainingSteps,
    touches_before_transfer,
    training_loaders,
    used_loaders,
)
from cellmap_lightning.loading.waiting import WaitTimes
from cellmap_lightning.runtime.location import CacheMode
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from cellmap_lightning.splits.entries import SPLITS
from cellmap_lightning.splits.leakage import Leakage
from cellmap_lightning.splits.options import SplitOptions
from cellmap_lightning.splits.rules import SplitRule
from cellmap_lightning.transforms.intensity import AUTO

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

PrefetchPolicy = Callable[[str, BatchMemory, torch.device], PrefetchDecision]
#: From whether to read into page-locked memory to the samples and batches of a prediction.
PredictionPolicy = Callable[[bool], tuple[NumberedSamples, Iterable[Any]]]


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


class CellMapDataModule(PrivateHyperparameters, L.LightningDataModule):
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
        raw_value_transforms: see `IntensityOptions`.
        target_value_transforms: see `LabelOptions`.
        class_relation_dict: see `LabelOptions`.
        samples_per_epoch: samples of a training epoch over all ranks.
        batches_per_epoch: batches of a training epoch instead, over all ranks; 1000 when neither is given.
        val_samples: tiles to validate on during ``fit``, in which every class that occurs has its share, the same in
            every epoch and on any number of ranks; None for all. `Trainer.validate` and ``test`` go through all tiles.
        pad: read crops smaller than a patch, with the raw around them; targets are NaN outside the crop.
        seed: everything random follows from it and from the number of the sample.
        normalize: how stored values become an input, see `IntensityOptions`; an entry of ``datasets`` can have its own.
        invert: exchange dark and bright, likewise.
        infer: see `LabelOptions`.
        class_table: see `LabelOptions`.
        label_downsample: see `LabelOptions`.
        unknown: see `LabelOptions`.
        nan_targets: see `LabelOptions`.
        planes: where patches of two lengths lie, any of ``xy``, ``xz`` and ``yz``.
        too_coarse: crops whose labels are coarser than asked for: ``drop`` (logged), ``upsample``, or ``error``.
        max_upsampling: how many times finer than raw's finest level an input may be.
        max_workers: reading threads per split; see `CellMapDataset`.
        cache: where decoded voxels are kept: ``auto``, ``disk``, ``memory``, ``chunks`` or ``none``; see
            `CellMapDataset`.
        cache_bytes: bytes that are kept at most, by all splits together; see `CellMapDataset`.
        reader: what decodes: ``zarr`` or ``tensorstore``.
        storage_options: of addresses such as ``s3://bucket/vol.zarr``, see `CellMapDataset`; an entry of ``datasets``
            can have its own.
        missing_raw: chunks of raw that are not stored: ``auto``, ``error``, ``warn``, ``fill`` or ``mask``; see
            `CellMapDataSplit`.
        missing_labels: chunk files of labels that are missing, or have 0 bytes, although the metadata promise voxels in
            them: ``error`` or ``unknown``; see `CellMapDataset`.
        level_translations: where levels of a pyramid lie whose translations are missing: ``auto`` or ``stored``; see
            `CellMapDataset`.
        read_attempts: how many times an object is asked for at most; see `CellMapDataset`.
        read_timeout: seconds after which it is given up, with all attempts.
        pin_memory: read into page-locked memory; by default on CUDA devices.
        persistent_workers: see `CellMapDataLoader`.
        prefetch_factor: see `CellMapDataLoader`.
        timeout: see `CellMapDataLoader`.
        multiprocessing_context: see `CellMapDataLoader`.
        drop_last: leave out an incomplete last training batch.
        split: which crops validate: ``csv`` (as the CSV says), or by a rule ``random``, ``stratified``, ``by_dataset``,
            ``leave_one_dataset_out`` or ``kfold``; see `CellMapDataSplit`, as for all that follow. ``seed`` counts.
        val_fraction: the part of the crops that validates.
        fold: which fold, or which dataset, validates.
        n_folds: number of folds.
        search_path: the crops instead of a CSV: the folder of the challenge's data.
        manifest: the challenge's list of these crops.
        only_datasets: names or patterns of the datasets that are wanted.
        only_crops: names, numbers or patterns of the crops that are wanted.
        strategy: where training samples come from: ``mix`` (two thirds ``class_balanced``, one third ``foreground``),
            ``uniform``, ``per_crop``, ``weighted``, or ``{name: one of them, and its options}``; see `strategies`.
        balance_datasets: make raw volumes equally likely in training, whatever the number and size of their crops.
        leakage: annotated crops that are trained on and also validate or test: ``error``, ``warn`` or ``ignore``; see
            `CellMapDataSplit`.
        held_out: a manifest of crops that nothing is to be trained on, likewise.

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
        val_samples: int | None = 256,
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
        storage_options: Mapping[str, Any] | None = None,
        missing_raw: MissingRaw = "auto",
        missing_labels: MissingLabels = "error",
        level_translations: LevelTranslations = "auto",
        read_attempts: int = DEFAULT_RETRY.attempts,
        read_timeout: float = DEFAULT_RETRY.timeout,
        pin_memory: bool | None = None,
        persistent_workers: bool | None = None,
        prefetch_factor: int | None = None,
        timeout: float = WORKER_TIMEOUT,
        multiprocessing_context: str | None = None,
        drop_last: bool | None = None,
        split: SplitRule = "csv",
        val_fraction: float = 0.1,
        fold: int = 0,
        n_folds: int = 5,
        search_path: str | None = None,
        manifest: str | None = None,
        only_datasets: Sequence[str] | None = None,
        only_crops: Sequence[str | int] | None = None,
        strategy: Any = "mix",
        balance_datasets: bool = False,
        leakage: Leakage = "error",
        held_out: str | None = None,
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
        self._said: tuple[int, int] | None = None
        #: Set by `PredictionWriter`: what `Trainer.predict` reads instead of tiles.
        self.prediction: PredictionPolicy | None = None
        #: The positions of the training loaders that a checkpoint holds, until these have them.
        self.resume_positions: list[dict[str, int]] = []
        #: Seconds that steps waited for batches of this module, over all of its loaders.
        self.waiting = WaitTimes()
        #: The crops of each split.
        self.crops = CellMapDataSplit(
            csv_path,
            _instantiated(datasets),
            search_path,
            self.classes,
            input_arrays,
            target_arrays,
            spatial_transforms,
            seed,
            SplitOptions(
                split=split,
                val_fraction=val_fraction,
                fold=fold,
                n_folds=n_folds,
                manifest=manifest,
                only_datasets=only_datasets,
                only_crops=only_crops,
                planes=planes,
                strategy=strategy,
                balance_datasets=balance_datasets,
                leakage=leakage,
                held_out=held_out,
            ),
            ReadOptions(
                pad=pad,
                max_workers=max_workers,
                cache=cache,
                cache_bytes=cache_bytes,
                reader=reader,
                missing_raw=missing_raw,
                max_upsampling=max_upsampling,
                read_attempts=read_attempts,
                read_timeout=read_timeout,
                storage_options=storage_options,
                level_translations=level_translations,
            ),
            LabelOptions(
                target_value_transforms=target_value_transforms,
                class_relation_dict=class_relation_dict,
                infer=infer,
                class_table=class_table,
                label_downsample=label_downsample,
                unknown=unknown,
                missing_labels=missing_labels,
                nan_targets=nan_targets,
                too_coarse=too_coarse,
            ),
            IntensityOptions(
                raw_value_transforms=raw_value_transforms,
                normalize=normalize,
                invert=invert,
                intensity_transforms=intensity_transforms,
            ),
        )

    @property
    def trainer(self) -> L.Trainer | None:
        """The Trainer that runs, or ran last.

        Raises:
            CellMapTypeError: when it is set to a Trainer of the package ``pytorch_lightning``.
        """
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:
        if type(trainer).__module__.startswith("pytorch_lightning."):
            raise CellMapTypeError(
                "this Trainer is that of the package pytorch_lightning, whose classes are not those of lightning; use "
                "'import lightning as L' (or 'import lightning.pytorch as pl') for Trainer, module and callbacks"
            )
        self._trainer = trainer

    # -- datasets

    def setup(self, stage: str | None = None) -> None:
        """Build the datasets that a stage needs and that do not exist yet; splits without crops are left out.

        Raises:
            CellMapError: what is wrong with the data, all crops in one table.
        """
        self.resume_positions = []  # of a run that ended before it began
        for split in _STAGES.get(str(getattr(stage, "value", stage)) if stage is not None else None, SPLITS):
            if self.crops.has_crops(split):
                self.crops[split]

    @property
    def train_dataset(self) -> CellMapMultiDataset:
        """Crops to train on."""
        return self.crops["train"]

    @property
    def val_dataset(self) -> CellMapMultiDataset:
        """Crops to validate on."""
        return self.crops["val"]

    @property
    def test_dataset(self) -> CellMapMultiDataset:
        """Crops to test on."""
        return self.crops["test"]

    @property
    def predict_dataset(self) -> CellMapMultiDataset:
        """Volumes to predict."""
        return self.crops["predict"]

    def batch_memory(self, split: str = "train") -> BatchMemory:
        """The bytes of a batch, known before anything is read.

        Raises:
            CellMapKeyError: there are no crops for that split.
        """
        return self.crops[split].batch_memory(self.batch_size)

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
        self._say_what_is_left_out(samples, world)
        return self._loader("train", samples)

    def _say_what_is_left_out(self, samples: int, world: int) -> None:
        """One line, on one rank, until something about it changes: a Trainer can build a loader for every epoch."""
        together = world * (1 if self.drop_last is False else self.batch_size)
        left = samples % together
        if self._said == (samples, together) or not left or not (self.trainer is None or self.trainer.is_global_zero):
            return
        self._said = samples, together
        log.info(
            "train: an epoch of %d samples is %d global batches of %d (ranks: %d, samples of each: %d); "
            "%d samples of it make no complete one and are left out",
            samples, samples // together, together, world, together // world, left,
        )  # fmt: skip

    def val_dataloader(self) -> CellMapDataLoader:
        """Tiles of the val split, the same each time: ``val_samples`` of them during ``fit``, otherwise all."""
        if not self.crops.has_crops("val"):
            raise CellMapKeyError(
                f"no crops were given for 'val': {self.crops.source} has none; add some (in a CSV with the usage "
                "'validate'), or train without validation by limit_val_batches=0"
            )
        fitting = self._running and self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if self.val_samples is None or not fitting:
            return self._loader("val", None)
        return self._loader("val", None, self.crops["val"].select_tiles(self.val_samples, self.seed))

    def test_dataloader(self) -> CellMapDataLoader:
        """Tiles that cover the test split."""
        return self._loader("test", None)

    def predict_dataloader(self) -> CellMapDataLoader | Stream:
        """Tiles that cover the volumes to predict, in the order z, y, x; with `PredictionWriter`, its blocks."""
        if self.prediction is not None and self._running:
            return Stream(self._loader("predict", None, prediction=self.prediction))
        return self._loader("predict", None, range(self.crops["predict"].tile_count))

    def _loader(
        self,
        split: str,
        samples: int | None,
        tiles: Sequence[int] | None = None,
        prediction: PredictionPolicy | None = None,
    ) -> CellMapDataLoader:
        dataset = self.crops[split]
        device, decision = self._device, None
        pin = device.type == "cuda" if self.pin_memory is None else self.pin_memory
        blocks = None if prediction is None else prediction(pin)
        if self.num_workers == 0:
            # The dataset reads with threads of its own: what Lightning says about processes would make it slower.
            warnings.filterwarnings("ignore", f".*'{split}_dataloader' does not have many workers")
        # Only a Trainer that runs passes batches through `transfer_batch_to_device`.
        running = self._running
        streams = running and device.type in STREAM_DEVICES
        if streams and touches_before_transfer(self.trainer, self):
            log.info(
                "%s: on_before_batch_transfer is overridden, so that batches are finished on the CPU for it and copied "
                "in the step; on_after_batch_transfer gets them on the device, which is faster", split,
            )  # fmt: skip
            streams = False
        elif self.prefetch is not None and running:
            decision = self.prefetch(split, dataset.batch_memory(self.batch_size), device)
        steps = None
        if running and split == "train" and self.trainer is not None:
            steps = TrainingSteps(self.trainer, self)
        return CellMapDataLoader(
            dataset if blocks is None else blocks[0],
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            samples_per_epoch=samples,
            is_train=split == "train",
            seed=self.seed,
            finish=self._finishes if streams else True,
            drop_last=self.drop_last if split == "train" else False,
            rank=self.trainer.global_rank if self.trainer is not None else None,
            world=self._world if self.trainer is not None else None,
            pin_memory=pin,
            device=device,
            decision=decision,
            waiting=self.waiting,
            steps=steps,
            persistent_workers=self.persistent_workers,
            prefetch_factor=self.prefetch_factor,
            timeout=self.timeout,
            multiprocessing_context=self.multiprocessing_context,
            tiles=tiles,
            batch_sampler=blocks[1] if blocks is not None else None,
        )

    def _finishes(self, loader: CellMapDataLoader) -> bool:
        """Return False for loaders of the Trainer's loop, which hands batches to `transfer_batch_to_device`."""
        hands_over = self._running and isinstance(getattr(self.trainer, "datamodule", None), CellMapDataModule)
        return not (hands_over and any(one is loader for one in used_loaders(self.trainer)))

    @property
    def _running(self) -> bool:
        return self.trainer is not None and self.trainer.state.status == TrainerStatus.RUNNING

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
        began = time.perf_counter()
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        if self.trainer is not None:
            # Several loaders make a list or a mapping of batches.
            batch = apply_to_collection(batch, CompactBatch, self._finished)
        self.waiting.moved += time.perf_counter() - began
        return batch

    def _finished(self, batch: CompactBatch) -> Any:
        # Lightning converts what a loader yields to the precision before it is moved: here it is only float32 by now.
        return self.trainer.precision_plugin.convert_input(batch.finish())  # type: ignore[union-attr]

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """How each volume was normalized, and what the channels and values of batches mean; see `data_record`.

        While training also the positions of the training loaders in their streams of samples. Lightning keeps them
        itself, and does not restore them where ``configure_optimizers`` has had the loaders made.
        """
        affine = {path: list(affine) for path, affine in self.crops.normalization.items()}
        state: dict[str, Any] = {"normalization": affine, RECORD: data_record(self)}
        loaders = training_loaders(self.trainer)
        if any(isinstance(one.steps, TrainingSteps) and one.steps.data is self for one in loaders):
            state["positions"] = [one.state_dict() for one in loaders]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Normalize the volumes of the checkpoint as they were, and resume training at its next sample.

        Raises:
            CellMapValueError: the checkpoint was trained with other classes, inputs or values; see `check_data`.
        """
        check_state(state_dict, self)
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        self.resume_positions = list(state_dict.get("positions", ())) if fitting else []
        affine = state_dict.get("normalization", {})
        self.crops.restore_normalization({path: (float(o), float(f)) for path, (o, f) in affine.items()})

    # -- the end

    def on_exception(self, exception: BaseException) -> None:
        """Cancel queued reads and end every thread: Lightning calls no ``teardown`` after this.

        The datasets stay, and so does what they decoded: a later run makes new threads.
        """
        self.crops.stop()

    def close(self) -> None:
        """End every thread and drop what is cached. A later use makes new ones."""
        self.crops.close()

    def __enter__(self) -> "CellMapDataModule":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # A Trainer takes hold of the copy itself, and cannot always be pickled.
        return self.__dict__ | {"_trainer": None}

    def __str__(self) -> str:
        given = [split for split in SPLITS if self.crops.has_crops(split)]
        return f"CellMapDataModule({self.crops.source}; splits: {', '.join(given)}; classes: {self.classes})"
