"""The data module: crops of each split, their loaders, and the transfer of batches to the device."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection

from cellmap_lightning.batches.arrays import ArraySpecs, parse_classes, parse_inputs, parse_targets
from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.batches.memory import BatchMemory
from cellmap_lightning.checkpointing.data_state import data_state, load_data_state
from cellmap_lightning.checkpointing.private_hparams import PrivateHyperparameters
from cellmap_lightning.crops.encodings import MissingLabels, Unknown
from cellmap_lightning.crops.image import MAX_UPSAMPLING, MissingRaw
from cellmap_lightning.crops.labels import Downsample
from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from cellmap_lightning.crops.unannotated import UnannotatedClasses
from cellmap_lightning.datasets.multidataset import CellMapMultiDataset
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError
from cellmap_lightning.flat_options import from_flat
from cellmap_lightning.io.chunks import Reader
from cellmap_lightning.io.ngff import LevelTranslations
from cellmap_lightning.io.retrying import DEFAULT_RETRY
from cellmap_lightning.loading.dataloader import CellMapDataLoader
from cellmap_lightning.loading.delivery import PrefetchPolicy, plan_delivery
from cellmap_lightning.loading.epoch import DroppedSamples, check_epoch_settings, epoch_samples
from cellmap_lightning.loading.options import WORKER_TIMEOUT, LoaderOptions
from cellmap_lightning.loading.run import Run
from cellmap_lightning.loading.samples import NumberedSamples
from cellmap_lightning.loading.split_residents import SplitResidents
from cellmap_lightning.loading.trainer_steps import Stream, TrainingSteps, used_loaders
from cellmap_lightning.loading.waiting import WaitTimes
from cellmap_lightning.loading.weight_check import WeightCheck
from cellmap_lightning.runtime.location import CacheMode
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from cellmap_lightning.splits.entries import SPLITS
from cellmap_lightning.splits.hydra_entries import instantiate_entries
from cellmap_lightning.splits.leakage import Leakage
from cellmap_lightning.splits.options import SplitOptions
from cellmap_lightning.splits.proposed_validation import no_validation, python_setting
from cellmap_lightning.splits.rules import SplitRule
from cellmap_lightning.transforms.normalization import AUTO
from cellmap_lightning.validation import int_at_least, not_negative, one_of

_STAGES: dict[str, tuple[str, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}

#: Maps ``pin_memory`` to the samples and batches of a prediction.
PredictionPolicy = Callable[[bool], tuple[NumberedSamples, Iterable[Any]]]


class CellMapDataModule(PrivateHyperparameters, L.LightningDataModule):
    """Crops of CellMap volumes for `Trainer.fit`, `validate`, `test` and `predict`.

    Datasets are created once per split, when a stage first needs them, and their threads persist through every
    ``setup`` and ``teardown`` until `close`.

    Example:
        >>> data = CellMapDataModule(  # doctest: +SKIP
        ...     classes=["mito", "er"],
        ...     input_arrays={"raw": {"shape": [128, 128, 128], "scale": [8, 8, 8]}},
        ...     target_arrays={"label": {"shape": [128, 128, 128], "scale": [8, 8, 8]}},
        ...     csv_path="datasplit.csv",
        ...     batch_size=4,
        ... )
        >>> L.Trainer().fit(module, data)  # doctest: +SKIP

    Args:
        classes: channels of the targets, in order; None for raw only.
        input_arrays: ``{name: {"shape": voxels, "scale": nm}}`` (z, y, x) of the inputs, or one bare description.
        target_arrays: the same for the targets; concentric with the inputs. None for raw only.
        csv_path: CSV of the crops, see `CellMapDataSplit`.
        datasets: the crops instead of a CSV, ``{split: [{"raw": path, "gt": path}, ...]}``; an entry may also be a
            `CellMapDataset`, or a mapping whose ``_target_`` returns one.
        batch_size: samples per batch and rank.
        num_workers: worker processes per loader; the dataset reads with threads, so 0 is usually fastest.
        spatial_transforms: augmentation of the train split, see `SpatialTransforms`.
        intensity_transforms: random changes of normalized raw of the train split, see `IntensityTransforms`.
        raw_value_transforms: see `IntensityOptions`.
        target_value_transforms: see `LabelOptions`.
        class_relation_dict: see `LabelOptions`.
        samples_per_epoch: samples per training epoch over all ranks.
        batches_per_epoch: batches per training epoch instead, over all ranks; by default 1000.
        val_samples: tiles to validate on during ``fit``, with a share of every class that occurs, the same in
            every epoch and on any number of ranks; None for all. `Trainer.validate` and ``test`` use all tiles.
        pad: read crops smaller than a patch, with the raw around them; targets are NaN outside the crop.
        seed: seed of everything random, together with the number of the sample.
        normalize: normalization of stored values, see `IntensityOptions`; an entry of ``datasets`` may override it.
        invert: exchange dark and bright, likewise.
        infer: see `LabelOptions`.
        class_table: see `LabelOptions`.
        label_downsample: see `LabelOptions`.
        unknown: see `LabelOptions`.
        nan_targets: see `LabelOptions`.
        planes: orientations of patches with two lengths, any of ``xy``, ``xz`` and ``yz``.
        too_coarse: crops with labels coarser than requested: ``drop`` (logged), ``upsample``, or ``error``.
        max_upsampling: largest ratio of raw's finest voxel size to that of an input.
        max_workers: reading threads per split; see `ReadOptions`.
        cache: cache of decoded voxels: ``auto``, ``device``, ``disk``, ``memory``, ``chunks`` or ``none``; see
            `ReadOptions`.
        cache_bytes: largest size of the cache, for all splits together; see `ReadOptions`.
        device_cache_bytes: largest size of the voxels on the device, likewise.
        reader: the decoding library, ``zarr`` or ``tensorstore``.
        storage_options: options of addresses such as ``s3://bucket/vol.zarr``, see `ReadOptions`; an entry of
            ``datasets`` may override them.
        missing_raw: chunks of raw that are not stored: ``auto``, ``error``, ``warn``, ``fill`` or ``mask``; see
            `ReadOptions`.
        missing_labels: chunk files of labels that are missing, or have 0 bytes, although the metadata promise voxels in
            them: ``error`` or ``unknown``; see `LabelOptions`.
        unannotated_classes: classes that no crop annotates: ``error`` or ``unknown`` (their targets are NaN); see
            `LabelOptions`.
        level_translations: position of pyramid levels without a translation: ``auto`` or ``stored``; see
            `ReadOptions`.
        read_attempts: largest number of requests for an object; see `ReadOptions`.
        read_timeout: timeout of reading an object, in seconds, over all attempts.
        pin_memory: read into page-locked memory; by default on CUDA devices.
        persistent_workers: as torch's argument, see `CellMapDataLoader`.
        prefetch_factor: likewise.
        timeout: likewise, in seconds.
        multiprocessing_context: likewise.
        drop_last: drop an incomplete last training batch; by default unless the epoch is shorter than one batch.
        split: rule that selects the crops to validate on: ``csv`` (column of the CSV), ``random``, ``stratified``,
            ``by_dataset``, ``leave_one_dataset_out`` or ``kfold``; or ``blocks``, which cuts each crop into boxes for
            training and validation. See `SplitOptions`, as for all below. Depends on ``seed``.
        val_fraction: fraction of the crops to validate on.
        fold: the fold, or the dataset, to validate on.
        n_folds: number of folds.
        search_path: the crops instead of a CSV: the folder of the challenge's data.
        manifest: the challenge's list of these crops.
        only_datasets: names or patterns of the datasets to use.
        only_crops: names, numbers or patterns of the crops to use.
        strategy: sampling strategy of the training: ``uniform``, ``per_crop``, ``weighted``, ``foreground``,
            ``class_balanced``, ``mix`` (by default two thirds ``class_balanced``, one third ``foreground``), or
            ``{name: one of them, and its options}``; see `strategies`.
        balance_datasets: draw from all raw volumes equally often in training, for any number and size of their crops.
        leakage: reaction to annotated crops in both training and validation or test: ``error``, ``warn`` or
            ``ignore``; see `CellMapDataSplit`.
        held_out: a manifest of crops that must not be trained on, likewise.

    Raises:
        CellMapError: the arguments contradict each other. Errors in the data are raised by ``setup``.
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
        device_cache_bytes: int | None = None,
        reader: Reader = "zarr",
        storage_options: Mapping[str, Any] | None = None,
        missing_raw: MissingRaw = "auto",
        missing_labels: MissingLabels = "error",
        unannotated_classes: UnannotatedClasses = "error",
        level_translations: LevelTranslations = "auto",
        read_attempts: int = DEFAULT_RETRY.attempts,
        read_timeout: float = DEFAULT_RETRY.timeout,
        pin_memory: bool | None = None,
        persistent_workers: bool | None = None,
        prefetch_factor: int | None = None,
        timeout: float = WORKER_TIMEOUT,
        multiprocessing_context: str | None = None,
        drop_last: bool | None = None,
        split: SplitRule | Mapping[str, Any] = "csv",
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
        settings = dict(locals())  # the options of a crop and of the splits are picked from these by their names
        super().__init__()
        check_epoch_settings(samples_per_epoch, batches_per_epoch)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("samples_per_epoch", samples_per_epoch, 1),
            ("batches_per_epoch", batches_per_epoch, 1),
            ("val_samples", val_samples, 1),
        ):
            if value is not None:
                int_at_least(name, value, least)
        if input_arrays is None:
            raise CellMapTypeError("input_arrays is missing; give {name: {shape: voxels, scale: nm}}")
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
        self.timeout = not_negative("timeout", timeout)
        self.multiprocessing_context = multiprocessing_context
        self.drop_last = drop_last
        #: Set by `StreamPrefetch`.
        self.prefetch: PrefetchPolicy | None = None
        #: Set by `PredictionWriter`: the batches of `Trainer.predict`, instead of tiles.
        self.prediction: PredictionPolicy | None = None
        #: Positions of the training loaders from a checkpoint, until they are applied.
        self.resume_positions: list[dict[str, int]] = []
        #: Classes that no crop of the training of a loaded checkpoint annotates.
        self.unannotated: tuple[str, ...] = ()
        #: Seconds that steps waited for batches of this module, over all of its loaders.
        self.waiting = WaitTimes()
        self._dropped = DroppedSamples()
        self._weights = WeightCheck()
        #: Voxels on the device, shared by the loaders of all splits.
        self.residents = SplitResidents(device_cache_bytes)
        #: The crops of each split.
        self.splits = CellMapDataSplit(
            csv_path,
            instantiate_entries(datasets),
            search_path,
            self.classes,
            input_arrays,
            target_arrays,
            spatial_transforms,
            seed,
            from_flat(SplitOptions, settings),
            from_flat(ReadOptions, settings),
            from_flat(LabelOptions, settings),
            from_flat(IntensityOptions, settings),
        )

    @property
    def trainer(self) -> L.Trainer | None:
        """The Trainer that runs, or ran last.

        Raises:
            CellMapTypeError: on assignment of a Trainer of the package ``pytorch_lightning``, or of one whose
                `PredictionWriter` cannot use its module.
        """
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:
        if type(trainer).__module__.startswith("pytorch_lightning."):
            raise CellMapTypeError(
                "the Trainer must be of the package lightning, whose classes are not those of pytorch_lightning; use "
                "'import lightning as L' (or 'import lightning.pytorch as pl') for Trainer, module and callbacks"
            )
        self._trainer = trainer
        if trainer is not None and trainer.state.fn == TrainerFn.PREDICTING:
            # Lightning's own check comes before any hook of the callback, and asks for forward.
            writers = [c for c in trainer.callbacks if hasattr(c, "check_module")]  # type: ignore[attr-defined]
            for writer in writers:
                writer.check_module(trainer.lightning_module)
            self.splits.counts_later = bool(writers)  # their plan knows what the patches reach

    # -- datasets

    def setup(self, stage: str | None = None) -> None:
        """Create the datasets that a stage needs and that do not exist yet, for splits with crops.

        Raises:
            CellMapKeyError: an unknown stage.
            CellMapError: the data are invalid; the message has one table of all crops.
        """
        self.resume_positions = []  # left by a run that ended before its first batch
        name = getattr(stage, "value", stage)  # Lightning passes an enum
        for split in SPLITS if name is None else _STAGES[one_of("stage", name, _STAGES, CellMapKeyError)]:
            if self.splits.has_crops(split):
                self.splits[split]  # created on first access

    @property
    def train_dataset(self) -> CellMapMultiDataset:
        """The crops to train on."""
        return self.splits["train"]

    @property
    def val_dataset(self) -> CellMapMultiDataset:
        """The crops to validate on."""
        return self.splits["val"]

    @property
    def test_dataset(self) -> CellMapMultiDataset:
        """The crops to test on."""
        return self.splits["test"]

    @property
    def predict_dataset(self) -> CellMapMultiDataset:
        """The volumes to predict."""
        return self.splits["predict"]

    def batch_memory(self, split: str = "train") -> BatchMemory:
        """Return the bytes of a batch, before anything is read.

        Raises:
            CellMapKeyError: the split has no crops.
        """
        return self.splits[split].batch_memory(self.batch_size)

    # -- loaders

    def train_dataloader(self) -> CellMapDataLoader:
        """Return a loader of random samples of the train split."""
        run = self._run
        samples = epoch_samples(self.samples_per_epoch, self.batches_per_epoch, self.batch_size, run.world)
        self._dropped.report(samples, 1 if self.drop_last is False else self.batch_size, run)
        return self._loader("train", samples)

    def val_dataloader(self) -> CellMapDataLoader:
        """Return a loader of the tiles of the val split: the same ``val_samples`` during ``fit``, otherwise all."""
        if not self.splits.has_crops("val"):
            raise CellMapKeyError(no_validation(self.splits, python_setting, "Trainer(limit_val_batches=0)"))
        run = self._run
        if self.val_samples is None or not (run.is_running and run.is_fit):
            return self._loader("val", None)
        return self._loader("val", None, self.splits["val"].select_tiles(self.val_samples, self.seed))

    def test_dataloader(self) -> CellMapDataLoader:
        """Return a loader of tiles that cover the test split."""
        return self._loader("test", None)

    def predict_dataloader(self) -> CellMapDataLoader | Stream:
        """Return a loader of tiles that cover the volumes to predict, in the order z, y, x.

        With `PredictionWriter`, return the patches of its blocks instead.
        """
        if self.prediction is not None and self._run.is_running:
            return Stream(self._loader("predict", None, prediction=self.prediction))
        return self._loader("predict", None, range(self.splits["predict"].tile_count))

    def _loader(
        self,
        split: str,
        samples: int | None,
        tiles: Sequence[int] | None = None,
        prediction: PredictionPolicy | None = None,
    ) -> CellMapDataLoader:
        dataset, run = self.splits[split], self._run
        pin = run.device.type == "cuda" if self.pin_memory is None else self.pin_memory
        blocks = None if prediction is None else prediction(pin)
        if self.num_workers == 0:
            # The dataset reads with its own threads: Lightning's advice to add processes would make it slower.
            warnings.filterwarnings("ignore", f".*'{split}_dataloader' does not have many workers")
        delivery = plan_delivery(
            split, dataset, self.batch_size, self.num_workers, run, self, self.residents, self.prefetch
        )
        steps = None
        if run.is_running and split == "train" and run.trainer is not None:
            steps = TrainingSteps(run.trainer, self)
        return CellMapDataLoader(
            dataset if blocks is None else blocks[0],
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            samples_per_epoch=samples,
            is_train=split == "train",
            seed=self.seed,
            finish=self._finishes if delivery.compact else True,
            drop_last=self.drop_last if split == "train" else False,
            pin_memory=pin,
            persistent_workers=self.persistent_workers,
            prefetch_factor=self.prefetch_factor,
            timeout=self.timeout,
            multiprocessing_context=self.multiprocessing_context,
            tiles=tiles,
            batch_sampler=blocks[1] if blocks is not None else None,
            options=LoaderOptions(
                rank=run.rank,
                world=None if run.rank is None else run.world,
                device=run.device,
                decision=delivery.decision,
                waiting=self.waiting,
                steps=steps,
                resident=delivery.resident,
            ),
        )

    def _finishes(self, loader: CellMapDataLoader) -> bool:
        """Return False for loaders of the Trainer's loop, which passes batches to `transfer_batch_to_device`."""
        transfers = self._run.is_running and isinstance(getattr(self.trainer, "datamodule", None), CellMapDataModule)
        return not (transfers and any(used is loader for used in used_loaders(self.trainer)))

    @property
    def _run(self) -> Run:
        return Run(self.trainer)

    # -- batches

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return a batch on the device, finished there if it was transferred compact.

        Finished here and not in ``on_after_batch_transfer``: a hook of that name on a datamodule would replace the
        module's.
        """
        began = time.perf_counter()
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        if self.trainer is not None:
            self._weights.at_batch(self.trainer)
            # Several loaders make a list or a mapping of batches.
            batch = apply_to_collection(batch, CompactBatch, self._finished)
        self.waiting.moved += time.perf_counter() - began
        return batch

    def _finished(self, batch: CompactBatch) -> Any:
        # Lightning converts a batch to the Trainer's precision before the transfer, when it was still compact.
        return self.trainer.precision_plugin.convert_input(batch.finish())  # type: ignore[union-attr]

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the normalization of each volume, and the meaning of channels and values; see `data_record`.

        While training also the positions of the training loaders in their streams of samples. Lightning saves them too,
        but does not restore them if ``configure_optimizers`` had the loaders created.
        """
        return data_state(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the normalization of the volumes in a checkpoint, and resume training at its next sample.

        Raises:
            CellMapValueError: the checkpoint was trained with other classes, inputs or values; see `check_data`.
        """
        load_data_state(self, state_dict)

    # -- shutdown

    def teardown(self, stage: str) -> None:
        """Warn once about weights that are NaN after a training without `LossMonitor`."""
        if stage == "fit" and self.trainer is not None:
            self._weights.at_end(self.trainer)

    def on_exception(self, exception: BaseException) -> None:
        """Cancel queued reads, end every thread and free the device: Lightning calls no ``teardown`` after this.

        The datasets and their caches on the host remain; a later run starts new threads.
        """
        self.splits.stop()
        self.residents.close()

    def close(self) -> None:
        """End every thread and drop the caches. The module can be used again."""
        self.splits.close()
        self.residents.close()

    def __enter__(self) -> "CellMapDataModule":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # A Trainer cannot always be pickled, and attaches itself to a copy.
        return self.__dict__ | {"_trainer": None}

    def __str__(self) -> str:
        splits = [split for split in SPLITS if self.splits.has_crops(split)]
        return f"CellMapDataModule({self.splits.source}; splits: {', '.join(splits)}; classes: {self.classes})"
