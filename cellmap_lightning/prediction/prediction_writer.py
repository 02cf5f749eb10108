"""A callback that writes the prediction of whole volumes, out of core and resumable."""

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tqdm import tqdm

from cellmap_lightning.crops.crop import Crop
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.io.writer import ZarrFormat
from cellmap_lightning.prediction.accumulate import MeanBlock, StoredBlock
from cellmap_lightning.prediction.background_writer import BackgroundWriter
from cellmap_lightning.prediction.blending import Blend
from cellmap_lightning.prediction.block_patches import (
    BlockBatch,
    BlockEnd,
    BlockSkip,
    BlockStart,
    PatchSamples,
    PlanBatches,
    Step,
)
from cellmap_lightning.prediction.blocks import parse_region
from cellmap_lightning.prediction.channels import check_flips, described_channels, signed_positions
from cellmap_lightning.prediction.job import JobPlanner, PredictionJob
from cellmap_lightning.prediction.model_output import Activation, ModelOutput
from cellmap_lightning.prediction.options import PredictionOptions, parse_flips, parse_lengths
from cellmap_lightning.prediction.output import PredictionOutput
from cellmap_lightning.prediction.quantize import DEFAULT_THRESHOLD, OutputType, StoredValues, Threshold
from cellmap_lightning.prediction.summary import Summary
from cellmap_lightning.prediction.volumes import volumes_of, volumes_source
from cellmap_lightning.validation import one_of

log = logging.getLogger(__name__)

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
        >>> writer = PredictionWriter("prediction.zarr", blend="gaussian")  # doctest: +SKIP
        >>> L.Trainer(callbacks=[writer]).predict(module, datamodule=data)  # doctest: +SKIP

    Args:
        output: the Zarr group to write.
        blend: ``trim`` uses the centres of patches; ``average`` and ``gaussian`` take the weighted mean of overlapping
            patches (sliding window). See `blending`.
        overlap: part of a patch that it shares with the next one, per axis or for all.
        zarr_format: 2 writes OME-NGFF 0.4, 3 writes OME-NGFF 0.5, with checksums.
        dtype: ``uint8`` stores probabilities as ``round(255 p)``, and values v from -1 to 1, such as signed distances,
            as ``round(255 (v + 1) / 2)``; ``float16`` and ``float32`` the output of the model; ``labels`` 1 from
            ``threshold`` on, else 0.
        overwrite: replace another prediction at ``output``. Anything else at that path is an error.
        threshold: see ``dtype``; also the threshold of foreground in the summary. One for all channels, or
            ``{channel: threshold}`` with 0.5 for the others.
        context: for ``trim``, output voxels (halo) on either side that are discarded, instead of ``overlap``.
        region: the box to predict, ``{z: [lower, upper], y: .., x: ..}`` in nm; None for the whole volume. Patches
            include the raw around it.
        classes: names of the channels; by default those that the module's ``output_channels`` gives, else the
            datamodule's classes.
        only: those of them to write; None for all.
        key: key of the tensor in a mapping; by default its only entry.
        activation: ``sigmoid`` or ``softmax`` (over channels), for models that return logits.
        chunks: voxels of a chunk.
        shards: voxels of a shard; Zarr v3 only.
        levels: levels of the pyramid; by default as many as leave the longest axis 32 voxels. They have the voxel sizes
            of raw's levels, and beyond those the finest axes are halved first; see `plan_pyramid`.
        block_size_mb: memory in MiB for two blocks (one is written while the other is computed), with the sums
            of overlapping patches. Blocks are whole chunks. Small blocks compute patches twice: a warning names the
            size that would help.
        check_space: raise an error if the disk has less free space than the rest takes without compression.
        model_id: identity of the model; by default a hash of its weights.
        tta_flips: test-time augmentation: axes of the patch, such as ``yx``. The output is the mean over all mirrored
            versions of the input, each mirrored back, after the activation; `predict_step` is called for each of them.
        mask: a multiscale group; blocks in which it has no voxel above 0 are not computed, and left 0.
        skip_empty: skip blocks in which all voxels of raw have one value, as around the imaged volume.
        check_context: with ``trim``, measure in the first batch how much the border of the input changes the part of
            the output that is used, and warn if that is visible: the receptive field is then larger than the context.
        accept_changed_raw: resume, or accept as finished, although files of raw or of the mask were written, replaced
            or touched since, as when they were copied back. Otherwise that is an error.

    Attributes:
        summary: the summary of the last prediction.
        names: the channels that it writes.
        redundancy: number of patches that are computed, divided by their number if everything were one block.

    Raises:
        CellMapValueError: an option is invalid.
    """

    def __init__(
        self,
        output: str,
        blend: Blend = "trim",
        overlap: float | Sequence[float] | None = None,
        zarr_format: ZarrFormat = 2,
        dtype: OutputType = "uint8",
        overwrite: bool = False,
        *,
        threshold: Threshold = DEFAULT_THRESHOLD,
        context: int | Sequence[int] | None = None,
        region: Mapping[str, Sequence[float]] | None = None,
        classes: Sequence[str] | None = None,
        only: Sequence[str] | None = None,
        key: str | None = None,
        activation: Activation | None = None,
        chunks: Sequence[int] = (64, 64, 64),
        shards: Sequence[int] | None = None,
        levels: int | None = None,
        block_size_mb: float = 256,
        check_space: bool = True,
        model_id: str | None = None,
        tta_flips: str | Sequence[str] = "",
        mask: str | None = None,
        skip_empty: bool = False,
        check_context: bool = True,
        accept_changed_raw: bool = False,
    ) -> None:
        self.options = PredictionOptions(
            blend=blend,
            overlap=overlap,
            context=context,
            zarr_format=zarr_format,
            dtype=dtype,
            threshold=threshold,
            region=None if region is None else parse_region({axis: list(ends) for axis, ends in region.items()}),
            key=key,
            activation=activation,
            chunks=parse_lengths("chunks", chunks),
            shards=None if shards is None else parse_lengths("shards", shards),
            levels=levels,
            block_size_mb=block_size_mb,
            model_id=model_id,
            tta_flips=parse_flips(tta_flips),
            mask=mask,
            skip_empty=bool(skip_empty),
            overwrite=bool(overwrite),
            check_space=check_space,
            accept_changed_raw=bool(accept_changed_raw),
        )
        self.output, self.threshold = Path(output), threshold
        self.classes, self.only = classes, only
        self.check_context = bool(check_context)
        self.summary = Summary()
        self.names: list[str] = []
        self.redundancy = 1.0
        self._jobs: list[PredictionJob] = []
        self._outputs: list[PredictionOutput] = []
        self._closers: list[Callable[[], None]] = []

    # -- before the first batch

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
        if len(volumes) > 1 and options.region is not None:
            raise CellMapValueError(f"a region needs a single volume to predict, got {len(volumes)}")
        targets = described_channels(pl_module)
        names = self._channel_names(data, list(targets))
        targets = {name: targets[name] for name in names if name in targets and name not in (data.classes or ())}
        self.names = written = list(self.only) if self.only is not None else names
        if not written or not set(written) <= set(names):
            raise CellMapKeyError(f"only={written} must name some of the channels {names}")
        self._check_thresholds(names)
        self._written_channels = [names.index(name) for name in written]
        array, spec = next(iter({**data.target_arrays, **data.input_arrays}.items()))

        check_flips(options.tta_flips, written, targets)
        planner = JobPlanner(options, trainer, pl_module, written, spec, targets)
        self._jobs, self._outputs = [], planner.outputs
        placed: list[Crop] = []
        for name, planes in volumes.items():
            job, crops = planner.plan(self.output / name if len(volumes) > 1 else self.output, name, planes)
            self._jobs.append(job)
            placed += crops
        self._source = source = volumes_source(placed, data.predict_dataset.layout, data.seed)
        self._model_output = ModelOutput(
            names, array, spec.window.shape, source.layout, options.key, options.activation, options.tta_flips,
            signed_positions(names, targets, StoredValues(options.dtype)),
        )  # fmt: skip
        self._background = BackgroundWriter()
        self._bar = tqdm(
            total=sum(len(job.plan.blocks) for job in self._jobs), desc="predicting", unit="block",
            disable=None if rank == 0 else True, dynamic_ncols=True,
        )  # fmt: skip
        # The threads of one volume belong to the datamodule's own dataset.
        close_source = source.close if len(placed) > 1 else placed[0].store.close
        self._closers = [source.cancel_ahead, self._background.close, close_source, self._bar.close]

        self.redundancy = max(job.plan.redundancy for job in self._jobs)
        self.summary = Summary(sum(len(job.plan.grid) for job in self._jobs), sum(job.done for job in self._jobs))
        self._steps = self._all_steps()
        self._next: tuple[PredictionJob, BlockBatch] | None = None
        self._writing: Future[None] | None = None
        self._context_unchecked = self.check_context and options.blend == "trim" and rank == 0
        self._began, self._waited_before = time.perf_counter(), data.waiting.waited
        # Worker processes decode ahead themselves.
        ahead = source.decode_ahead if data.num_workers == 0 else None
        return PatchSamples(source, data.seed, pin), PlanBatches([job.plan for job in self._jobs], ahead)

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
            raise CellMapValueError(f"batch {batch_idx}: the blocks have only {batch_idx} batches")
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
        if self.options.tta_flips or self._context_unchecked:
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
                    "%s: %d of %d blocks are done; start the same prediction again to resume it",
                    self.output, self.summary.finished, self.summary.blocks,
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
