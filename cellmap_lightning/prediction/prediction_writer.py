"""A callback that writes the prediction of whole volumes, out of core and resumable."""

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import fields
from functools import partial
from typing import Any, Never

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tqdm import tqdm

from cellmap_lightning.crops.crop import Crop
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.flat_options import from_flat, refuse_flat
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.io.object_folder import output_path
from cellmap_lightning.prediction.accumulate import MeanBlock, StoredBlock
from cellmap_lightning.prediction.background_writer import BackgroundWriter
from cellmap_lightning.prediction.block_patches import (
    BlockBatch,
    BlockEnd,
    BlockSkip,
    BlockStart,
    PatchSamples,
    PlanBatches,
    Step,
)
from cellmap_lightning.prediction.channels import (
    Targets,
    check_flips,
    described_channels,
    signed_positions,
    untrained_text,
)
from cellmap_lightning.prediction.job import JobPlanner, PredictionJob
from cellmap_lightning.prediction.model_output import ModelOutput
from cellmap_lightning.prediction.options import (
    BlendOptions,
    ChannelOptions,
    OutputOptions,
    PredictionOptions,
    RegionOptions,
    ResumeOptions,
)
from cellmap_lightning.prediction.output import PredictionOutput
from cellmap_lightning.prediction.quantize import StoredValues
from cellmap_lightning.prediction.raw_gaps import NamedBox
from cellmap_lightning.prediction.summary import Summary
from cellmap_lightning.prediction.volumes import volumes_of, volumes_source
from cellmap_lightning.validation import did_you_mean, one_of
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)

#: The arguments of `PredictionWriter` that are groups of settings.
_GROUPS: dict[str, type[Any]] = {
    "blending": BlendOptions,
    "channels": ChannelOptions,
    "storage": OutputOptions,
    "region": RegionOptions,
    "resume": ResumeOptions,
}
#: Largest number of unfinished tasks of the writing thread: a block that is written, and skipped ones after it.
TASK_LIMIT = 3


class PredictionWriter(L.Callback):
    """Makes `Trainer.predict` write the prediction of a whole volume as OME-NGFF groups ``<output>/<class>``.

    The datamodule, a `CellMapDataModule` with volumes to predict, delivers the patches of one block after the other; a
    block is a box of whole chunks, which one process computes and writes. Finished blocks are skipped when the same
    prediction is started again. `Trainer.predict` returns nothing, as the predictions would fill the memory. Each of
    several volumes is written to ``<output>/<name of the volume>/<class>``.

    An output patch is the first of the datamodule's ``target_arrays``, else the first input: the output of the model
    for that patch, of its shape and scale. `predict_step` returns ``[N, C, z, y, x]`` (without an axis of length 1 if
    the patch has one), or a mapping that has such a tensor. Flat patches are predicted in the planes that the
    datamodule's ``planes`` name; the prediction is the mean over the planes.

    Example:
        >>> writer = PredictionWriter("prediction.zarr", BlendOptions("gaussian"))  # doctest: +SKIP
        >>> L.Trainer(callbacks=[writer]).predict(module, datamodule=data)  # doctest: +SKIP

    Args:
        output: the Zarr group to write: a path, or an address such as ``s3://bucket/mito.zarr``.
        blending: patches, blending and test-time augmentation.
        channels: the channels of the model, and those to write.
        storage: dtype, chunks and levels of the output.
        region: the part of the volume, and the blocks that are skipped.
        resume: outputs that exist.
        block_size_mb: memory in MiB for two blocks (one is written while the other is computed), with the sums
            of overlapping patches. Blocks are whole chunks. Small blocks compute patches twice: a warning names the
            size that would help.
        storage_options: arguments of fsspec's file system for an address; by default the credentials of the
            environment.
        flat: none; options that are given flat are an error that names their dataclass.

    Attributes:
        summary: the summary of the last prediction.
        names: the channels that it writes.
        redundancy: number of patches that are computed, divided by their number if everything were one block.
        named: the crop of a manifest that is predicted, whose raw must be stored without a margin; None without one.

    Raises:
        CellMapTypeError: names of classes are no list.
        CellMapValueError: an option is invalid.
    """

    def __init__(
        self,
        output: str,
        blending: BlendOptions | None = None,
        *,
        channels: ChannelOptions | None = None,
        storage: OutputOptions | None = None,
        region: RegionOptions | None = None,
        resume: ResumeOptions | None = None,
        block_size_mb: float = 256,
        storage_options: Mapping[str, Any] | None = None,
        **flat: Never,
    ) -> None:
        refuse_flat(PredictionWriter, flat, _GROUPS)
        self.options = PredictionOptions(
            blending or BlendOptions(), channels or ChannelOptions(), storage or OutputOptions(),
            region or RegionOptions(), resume or ResumeOptions(), block_size_mb,
        )  # fmt: skip
        self.output, self.threshold = output_path(output, storage_options), self.options.storage.threshold
        self.classes, self.only = self.options.channels.classes, self.options.channels.only
        self.summary = Summary()
        self.names: list[str] = []
        self.redundancy = 1.0
        self.named: NamedBox | None = None
        self._jobs: list[PredictionJob] = []
        self._outputs: list[PredictionOutput] = []
        self._closers: list[Callable[[], None]] = []

    # -- before the first batch

    @staticmethod
    def check_module(module: L.LightningModule) -> None:
        """Check that a module can predict: its own ``predict_step``, or ``forward``, which the inherited one calls.

        Raises:
            CellMapTypeError: it has neither.
        """
        for name in ("predict_step", "forward"):
            if name in vars(module) or getattr(type(module), name) is not getattr(L.LightningModule, name):
                return
        raise CellMapTypeError(
            f"{type(module).__name__} has neither predict_step nor forward, so that it cannot predict; define "
            "predict_step(self, batch, batch_idx), which returns a tensor [N, C, z, y, x]"
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Replace the batches of the datamodule by those of the blocks.

        Raises:
            CellMapTypeError: the Trainer runs without a `CellMapDataModule`, or has another such callback.
        """
        if stage != TrainerFn.PREDICTING.value:
            return
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "prediction"):
            raise CellMapTypeError("PredictionWriter needs a CellMapDataModule as the Trainer's datamodule")
        if datamodule.prediction is not None:
            raise CellMapTypeError("a Trainer can have one PredictionWriter: each batch is a part of its output")
        trainer.predict_loop.return_predictions = False
        datamodule.prediction = partial(self._plan, trainer, pl_module)

    def _channel_names(self, data: Any, described: Sequence[str]) -> list[str]:
        """Return the names of the model's channels: as given, as the model describes them, else the classes.

        Raises:
            CellMapValueError: they are unknown, or in another order than the datamodule's.
        """
        names = self.classes if self.classes is not None else described or data.classes
        if not names:
            raise CellMapValueError("the classes of the channels are unknown; give PredictionWriter classes=[...]")
        if data.classes is not None and list(names) != list(data.classes) and set(names) == set(data.classes):
            raise CellMapValueError(
                f"classes={list(names)} are those of the data in another order, so that channels would be exchanged; "
                f"leave classes out, or give {list(data.classes)}"
            )
        return list(names)

    def _chosen_names(self, names: list[str]) -> list[str]:
        """Return the names of the channels to write.

        Raises:
            CellMapKeyError: ``only`` is empty, or names another channel.
        """
        if self.only is None:
            return names
        if not self.only or not set(self.only) <= set(names):
            raise CellMapKeyError(f"only={list(self.only)} must name some of the channels {names}")
        return list(self.only)

    def _check_thresholds(self, names: Sequence[str]) -> None:
        """Check that thresholds are those of channels.

        Raises:
            CellMapKeyError: the model has no such channel.
        """
        for name in self.threshold if isinstance(self.threshold, Mapping) else ():
            one_of("threshold: a channel", name, names, CellMapKeyError)

    def _plan(self, trainer: L.Trainer, pl_module: L.LightningModule, pin: bool) -> tuple[PatchSamples, PlanBatches]:
        """Plan the blocks, and create or open the outputs. Called when weights and normalization are restored."""
        options, rank = self.options, trainer.global_rank
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        volumes = volumes_of(data.predict_dataset.crops)
        if len(volumes) > 1 and options.region.region is not None:
            raise CellMapValueError(f"a region needs a single volume to predict, got {len(volumes)}")
        names, targets = self._plan_channels(data, pl_module)
        array, spec = next(iter({**data.target_arrays, **data.input_arrays}.items()))

        check_flips(options.blending.flips, self.names, targets)
        planner = JobPlanner(options, trainer, pl_module, self.names, spec, targets, self.named)
        placed = self._plan_jobs(planner, volumes)
        self._source = source = volumes_source(placed, data.predict_dataset.layout, data.seed)
        self._model_output = ModelOutput(
            names, array, spec.window.shape, source.layout, options.channels.key, options.channels.activation,
            options.blending.flips,
            signed_positions(names, targets, StoredValues(options.storage.dtype)),
        )  # fmt: skip
        self._background = BackgroundWriter()
        self._bar = self._progress_bar(rank)
        # The threads of one volume belong to the datamodule's own dataset.
        close_source = source.close if len(placed) > 1 else placed[0].store.close
        self._closers = [source.cancel_ahead, self._background.close, close_source, self._bar.close]

        self._reset_progress(data.waiting.waited)
        self._context_unchecked = options.blending.check_context and options.blending.blend == "trim" and rank == 0
        # Worker processes decode ahead themselves.
        ahead = source.decode_ahead if data.num_workers == 0 else None
        return PatchSamples(source, data.seed, pin), PlanBatches([job.plan for job in self._jobs], ahead)

    def _plan_channels(self, data: Any, pl_module: L.LightningModule) -> tuple[list[str], Targets]:
        """Choose the channels to write.

        Returns:
            The names of the model's channels, and the descriptions of those that are not classes of the data.

        Raises:
            CellMapKeyError: a channel to write, or one with a threshold, is not a channel of the model.
            CellMapValueError: the channels are unknown, or in another order than the datamodule's.
        """
        described = described_channels(pl_module)
        names = self._channel_names(data, list(described))
        targets = {name: described[name] for name in names if name in described and name not in (data.classes or ())}
        self.names = self._chosen_names(names)
        self._check_thresholds(names)
        untrained = [name for name in self.names if name in data.unannotated]
        if untrained:
            log.warning("%s: %s", self.output, untrained_text(untrained))
        self._written_channels = [names.index(name) for name in self.names]
        return names, targets

    def _plan_jobs(self, planner: JobPlanner, volumes: Mapping[str, Sequence[Crop]]) -> list[Crop]:
        """Plan the volumes, given by name in each plane; return them in each plane, placed for their patches."""
        # Before the first is planned: an output whose planning fails is released too.
        self._jobs, self._outputs = [], planner.outputs
        placed: list[Crop] = []
        for name, planes in volumes.items():
            job, crops = planner.plan(self.output / name if len(volumes) > 1 else self.output, name, planes)
            self._jobs.append(job)
            placed += crops
        return placed

    def _progress_bar(self, rank: int) -> "tqdm[Any]":
        """Return the bar that counts blocks, which the first process shows if there are any."""
        blocks = sum(len(job.plan.blocks) for job in self._jobs)
        return tqdm(
            total=blocks, desc="predicting", unit="block", dynamic_ncols=True,
            disable=None if rank == 0 and blocks else True,
        )  # fmt: skip

    def _reset_progress(self, waited: float) -> None:
        """Reset summary, steps and times; ``waited``: seconds that the datamodule has waited for batches so far."""
        self.redundancy = max(job.plan.redundancy for job in self._jobs)
        self.summary = Summary(sum(len(job.plan.grid) for job in self._jobs), sum(job.done for job in self._jobs))
        self._steps = self._all_steps()
        self._next: tuple[PredictionJob, BlockBatch] | None = None
        self._writing: Future[None] | None = None
        self._began, self._waited_before = time.perf_counter(), waited

    # -- batches

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the patches of a batch to their block, which a thread writes once it is complete."""
        began = time.perf_counter()
        self._background.check()
        self._advance()
        if self._next is None:
            raise CellMapValueError(f"batch {batch_idx}: the blocks have only {plural(batch_idx, 'batch', 'batches')}")
        job, step = self._next
        self._next = None
        positions = job.plan.choose(step)
        if batch["idx"].tolist() != positions:
            raise CellMapValueError(
                f"batch {batch_idx} holds the patches {batch['idx'].tolist()}, and those of block {step.block} that "
                f"come next are {positions}: the order of batches was changed"
            )
        patch = job.plan.tilings[step.tiling].patch
        values = self._model_output.values(outputs, len(positions), patch)
        if self.options.blending.flips or self._context_unchecked:
            predict = partial(self._predict, trainer, pl_module, batch_idx, len(positions), patch)
            if self._context_unchecked:
                self._context_unchecked = False
                self._model_output.check_context(job.plan.tilings[step.tiling], values, predict, batch)
            values = self._model_output.over_flips(values, predict, batch)
        if self.only is not None:
            values = values[:, self._written_channels]
        patches: np.ndarray[Any, np.dtype[np.float32]] = values.cpu().numpy()
        job.blocks.add(step, patches)
        self._advance()
        self._count_time(trainer, began)
        if trainer.received_sigterm:  # Lightning itself would continue to the end
            raise SIGTERMException

    def _predict(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch_idx: int,
        count: int,
        patch: Shape,
        batch: Mapping[str, Any],
    ) -> torch.Tensor:
        """Return the values that the model predicts for a modified batch."""
        arguments = [batch, batch_idx][: len(inspect.signature(pl_module.predict_step).parameters)]
        return self._model_output.values(trainer.strategy.predict_step(*arguments), count, patch)

    def _all_steps(self) -> Iterator[tuple[PredictionJob, Step]]:
        """Yield the steps of this process, one volume after the other."""
        for job in self._jobs:
            for step in job.plan.steps():
                yield job, step
            job.blocks.finish()

    def _advance(self) -> None:
        """Do the steps before the next batch: blocks begin, end, or are skipped."""
        while self._next is None:
            following = next(self._steps, None)
            if following is None:
                return
            job, step = following
            match step:
                case BlockBatch():
                    self._next = job, step
                case BlockStart():
                    job.blocks.begin(step)
                case BlockEnd(number):
                    self._end_block(job, number)
                case BlockSkip(number):
                    self._background.submit(partial(job.output.skip, number, job.inputs.begin(number)), TASK_LIMIT)
                    self.summary.skipped += 1
                    self._bar.update()

    def _end_block(self, job: PredictionJob, number: int) -> None:
        """Have a complete block written in the background."""
        block = job.blocks.end()
        if self._writing is not None:
            self._background.wait_for(self._writing)  # memory for two blocks only
        self._writing = self._background.submit(partial(self._write, job, number, block), TASK_LIMIT)

    def _write(self, job: PredictionJob, number: int, block: StoredBlock | MeanBlock) -> None:
        """Write a block and release its memory, in the background thread."""
        job.inputs.check(number)
        job.output.write(number, *block.finish(), job.inputs.begin(number))
        block.release()
        self.summary.written += 1
        self.summary.voxels += math.prod(job.output.grid[number][1])
        self._bar.update()
        speed = self.summary.voxels / (time.perf_counter() - self._began)
        self._bar.set_postfix_str(f"{speed / 1e6:.3g} Mvoxel/s", refresh=False)

    def _count_time(self, trainer: L.Trainer, began: float) -> None:
        """Count the time since ``began`` as that of blending and writing."""
        ended = time.perf_counter()
        self.summary.stored += ended - began
        self.summary.seconds = ended - self._began
        self.summary.waited = trainer.datamodule.waiting.waited - self._waited_before  # type: ignore[attr-defined]

    # -- the end

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the last block, and build the pyramids when every process is done."""
        began = time.perf_counter()
        self._advance()
        self._background.wait()
        self._count_time(trainer, began)
        self._bar.close()
        strategy = trainer.strategy
        fractions: dict[str, float] = {}
        complete, finished = True, 0
        for job in self._jobs:
            output = job.output
            job.inputs.check_all()
            complete &= output.finish(trainer.global_rank, trainer.world_size, strategy.barrier, strategy.broadcast)
            finished += len(output.journal.finished)
            prefix = f"{job.name}/" if len(self._jobs) > 1 else ""
            fractions |= {f"{prefix}{name}": part for name, part in output.fractions().items()}
        self.summary.complete, self.summary.finished, self.summary.fractions = complete, finished, fractions
        if trainer.global_rank == 0:
            if not complete:
                log.warning(
                    "%s: %d of %s done; start the same prediction again to resume it",
                    self.output, self.summary.finished, plural(self.summary.blocks, "block"),
                )  # fmt: skip
            log.info("%s: %s", self.output, self.summary)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the batches of the datamodule, and release memory, threads and outputs."""
        self._close(trainer)
        self._release_outputs()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Do as `teardown`, which is not called if a run ends early. Finished blocks remain.

        An output that this run has begun is removed if none of its blocks is finished.
        """
        self._close(trainer)
        for output in self._outputs if trainer.global_rank == 0 else ():
            output.discard(trainer.world_size == 1)
        self._release_outputs()

    def _release_outputs(self) -> None:
        """Release the locks, so that other jobs can write to the outputs."""
        for output in self._outputs:
            output.close()
        self._outputs = []

    def _close(self, trainer: L.Trainer) -> None:
        datamodule: Any = getattr(trainer, "datamodule", None)
        if getattr(datamodule, "prediction", None) is not None:
            datamodule.prediction = None
        closers, self._closers = self._closers, []
        for close in closers:
            close()
        self._next = self._writing = None
        for job in self._jobs:
            job.blocks.close()


def make_prediction_writer(
    output: str, *, block_size_mb: float = 256, storage_options: Mapping[str, Any] | None = None, **settings: Any
) -> PredictionWriter:
    """Return a `PredictionWriter` from flat settings, as those of ``writer`` in configs/predict.yaml.

    Args:
        output: the Zarr group to write.
        block_size_mb: see `PredictionWriter`.
        storage_options: see `PredictionWriter`.
        settings: the fields of `BlendOptions`, `ChannelOptions`, `OutputOptions`, `RegionOptions` and `ResumeOptions`.

    Raises:
        CellMapTypeError: a setting is unknown.
        CellMapValueError: a setting is invalid.
    """
    known = [setting.name for kind in _GROUPS.values() for setting in fields(kind)]
    for name in settings:
        if name not in known:
            raise CellMapTypeError(f"PredictionWriter: it has no setting {name!r}{did_you_mean(name, known)}")
    groups: dict[str, Any] = {group: from_flat(kind, settings) for group, kind in _GROUPS.items()}
    return PredictionWriter(output, block_size_mb=block_size_mb, storage_options=storage_options, **groups)


def _flat_signature() -> inspect.Signature:
    """Return the signature of `make_prediction_writer` with each setting, for checks of configurations."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    settings = [
        inspect.Parameter(setting.name, keyword, default=setting.default)
        for kind in _GROUPS.values()
        for setting in fields(kind)
    ]
    first = list(inspect.signature(make_prediction_writer).parameters.values())[:-1]
    return inspect.Signature([*first, *settings])


make_prediction_writer.__signature__ = _flat_signature()  # type: ignore[attr-defined]
