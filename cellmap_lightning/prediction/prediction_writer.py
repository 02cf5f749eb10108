"""Write what a model predicts of a whole volume, out of core, so that it can be stopped and go on."""

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tqdm import tqdm

from cellmap_lightning.batches.layout import BatchLayout
from cellmap_lightning.crops.crop import Crop
from cellmap_lightning.errors import CellMapFileExistsError, CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, Shape
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.io.writer import ZarrFormat
from cellmap_lightning.prediction.accumulate import BlockMemory, MeanBlock, PatchSum, StoredBlock
from cellmap_lightning.prediction.assembly import BlockAssembly
from cellmap_lightning.prediction.background_writer import BackgroundWriter
from cellmap_lightning.prediction.blending import Blend, Tiling
from cellmap_lightning.prediction.block_patches import (
    AHEAD,
    BlockBatch,
    BlockEnd,
    BlockPlan,
    BlockSkip,
    BlockStart,
    PatchSamples,
    PlanBatches,
    Step,
    patch_placement,
    reaches_below,
)
from cellmap_lightning.prediction.blocks import BlockGrid, block_shape, output_lattice, parse_region, voxels_of
from cellmap_lightning.prediction.input_stamps import InputStamps
from cellmap_lightning.prediction.journal import input_hash
from cellmap_lightning.prediction.model_identity import model_fingerprint, transform_name
from cellmap_lightning.prediction.model_output import Activation, ModelOutput
from cellmap_lightning.prediction.output import PredictionOutput, check_apart
from cellmap_lightning.prediction.pyramid import Pyramid
from cellmap_lightning.prediction.quantize import OutputType, StoredValues
from cellmap_lightning.prediction.skipping import Skipping
from cellmap_lightning.prediction.volumes import output_windows, passes_by, passing_bytes, volumes_of, volumes_source

log = logging.getLogger(__name__)

#: Tasks of the writing thread that may be under way: a block that is written, and those that are skipped after it.
MOST_TASKS = 3
#: How many times the patches of a volume are computed, for want of memory, that is worth a warning; and that is none.
MUCH, ENOUGH = 1.5, 1.25


@dataclass
class Summary:
    """What a prediction did; of this process and this run, but for ``blocks``, ``finished`` and ``fractions``.

    Attributes:
        blocks: blocks of the whole prediction.
        finished: how many of them are done.
        written: how many this process wrote.
        skipped: how many it left out, as there is nothing to predict in them.
        voxels: voxels that it wrote, of one channel.
        seconds: from the first batch to the last block.
        waited: of these, waiting for batches.
        stored: of these, blending, and waiting for a block to be written.
        fractions: part of the finished voxels of each class that reach the threshold.
        complete: whether all blocks are done and the pyramids built.
    """

    blocks: int = 0
    finished: int = 0
    written: int = 0
    skipped: int = 0
    voxels: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    stored: float = 0.0
    fractions: Mapping[str, float] | None = None
    complete: bool = False

    def __str__(self) -> str:
        model = max(0.0, self.seconds - self.waited - self.stored)
        speed = self.voxels / self.seconds if self.seconds else 0.0
        lines = [
            f"{self.finished} of {self.blocks} blocks are done, {self.written} of them by this run: "
            f"{self.voxels / 1e6:.3g} million voxels in {self.seconds:.3g} s, {speed / 1e6:.3g} million per second"
            + (f"; {self.skipped} more were skipped" if self.skipped else ""),
            f"of the time: waiting for data {self.waited:.3g} s, model {model:.3g} s, "
            f"blending and writing {self.stored:.3g} s",
        ]
        lines += [f"{name:<12} {part:.2%} of the voxels" for name, part in (self.fractions or {}).items()]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Job:
    """One volume that is predicted.

    Attributes:
        name: its name.
        output: where it is written.
        plan: what this process computes of it.
        blocks: puts its blocks together.
        inputs: stamps of what they are computed from.
        done: blocks that were finished before.
    """

    name: str
    output: PredictionOutput
    plan: BlockPlan
    blocks: BlockAssembly
    inputs: InputStamps
    done: int


class PredictionWriter(L.Callback):
    """Makes `Trainer.predict` write the prediction of a whole volume as OME-NGFF groups ``<output>/<class>``.

    The datamodule, a `CellMapDataModule` with volumes to predict, delivers the patches of one block after the other; a
    block is a box of whole chunks, which one process computes and writes. What was finished is skipped when the same
    prediction is started again. Nothing is returned by `Trainer.predict`: it would be held in memory. Of several
    volumes each goes to ``<output>/<name of the volume>/<class>``.

    An output patch is the first of the datamodule's ``target_arrays``, else the first input: the output of the model
    for that patch, of its shape and scale. `predict_step` returns ``[N, C, z, y, x]`` (without an axis of length 1 if
    the patch has one), or a mapping that has such a tensor. Flat patches are predicted in the planes that the
    datamodule's ``planes`` name; the prediction is the mean over the planes.

    Args:
        output: the Zarr group to write.
        blend: ``trim`` keeps the centres of patches; ``average`` and ``gaussian`` take the weighted mean of patches
            that overlap. See `blending`.
        overlap: part of a patch that it shares with the next one, per axis or for all.
        zarr_format: 2 writes OME-NGFF 0.4, 3 writes OME-NGFF 0.5, with checksums.
        dtype: ``uint8`` stores probabilities as ``round(255 p)``; ``float16`` and ``float32`` what the model gives;
            ``labels`` 1 from ``threshold`` on, else 0.
        overwrite: replace another prediction that is at ``output``. Anything else that is there is refused.
        threshold: see ``dtype``; also what counts as foreground in the summary.
        context: for ``trim``, output voxels on either side that are not kept, instead of ``overlap``.
        region: what is predicted, ``{z: [lower, upper], y: .., x: ..}`` in nm; None for the whole volume. Patches see
            the raw around it.
        classes: names of the channels; by default the datamodule's classes.
        only: those of them that are written; None for all.
        key: where in a mapping the tensor is; by default its only entry.
        activation: ``sigmoid`` or ``softmax`` (over channels), for models that give logits.
        chunks: voxels of a chunk.
        shards: voxels of a shard; Zarr v3 only.
        levels: levels of the pyramid; by default as many as leave the longest axis 32 voxels. They have the voxel sizes
            of raw's levels, and beyond those the finest axes are halved first; see `plan_pyramid`.
        block_size_mb: memory in MiB for two blocks, one of which is written while the other is computed, with the sums
            of overlapping patches. Blocks are whole chunks. Small blocks compute patches twice: a warning names the
            size that would help.
        check_space: refuse to begin where the disk has less room than the rest takes without compression.
        model_id: what tells this model from others; by default a hash of its weights.
        tta_flips: test-time augmentation: axes of the patch, such as ``yx``. The output is the mean over all mirrored
            versions of the input, each mirrored back, after the activation; `predict_step` is called for each of them.
        mask: a multiscale group; blocks in which it has no voxel above 0 are not computed, and left 0.
        skip_empty: leave out blocks in which all voxels of raw have one value, as around the imaged volume.
        check_context: with ``trim``, find out in the first batch how much the border of the input changes what is kept,
            and warn where that is visible: the model then sees further than the context.
        accept_changed_raw: resume, or accept as finished, although files of raw or of the mask were written, replaced
            or touched since, as when they were copied back. Otherwise that is an error.

    Attributes:
        summary: what the last prediction did.
        redundancy: patches that are computed for each that would be if everything were one block.

    Raises:
        CellMapValueError: a setting that cannot be one.
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
        threshold: float = 0.5,
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
        if activation is not None and activation not in get_args(Activation):
            raise CellMapValueError(f"activation is one of {', '.join(get_args(Activation))} or null: {activation!r}")
        if zarr_format not in (2, 3):
            raise CellMapValueError(f"zarr_format is 2 (OME-NGFF 0.4) or 3 (OME-NGFF 0.5), got {zarr_format!r}")
        if not block_size_mb > 0 or not math.isfinite(threshold):
            raise CellMapValueError(
                f"block_size_mb must be positive and threshold a number: {block_size_mb!r}, {threshold!r}"
            )
        StoredValues(dtype, threshold)  # is such a type
        if blend not in get_args(Blend):
            raise CellMapValueError(f"blend is one of {', '.join(get_args(Blend))}, got {blend!r}")
        self.chunks = _lengths("chunks", chunks)
        self.shards = None if shards is None else _lengths("shards", shards)
        if self.shards and (zarr_format == 2 or any(s % c for s, c in zip(self.shards, self.chunks, strict=True))):
            raise CellMapValueError(
                f"shards need zarr_format=3, and must be multiples of the chunks {list(self.chunks)}: "
                f"zarr_format={zarr_format}, {list(self.shards)}"
            )
        self.output, self.blend, self.overlap, self.context = Path(output), blend, overlap, context
        self.zarr_format: ZarrFormat = zarr_format
        self.dtype, self.threshold, self.overwrite = dtype, threshold, bool(overwrite)
        self.region = None if region is None else parse_region({k: list(v) for k, v in region.items()})
        self.classes, self.only, self.key, self.activation = classes, only, key, activation
        self.levels, self.block_size_mb, self.check_space, self.model_id = levels, block_size_mb, check_space, model_id
        self.tta_flips = "".join(axis for axis in AXES if axis in tta_flips)
        if sorted(self.tta_flips) != sorted(tta_flips):
            raise CellMapValueError(
                f"tta_flips are axes of the patch, each of z, y and x at most once, got {tta_flips!r}"
            )
        self.mask, self.skip_empty, self.check_context = mask, bool(skip_empty), bool(check_context)
        self.accept_changed_raw = bool(accept_changed_raw)
        self.summary = Summary()
        self.redundancy = 1.0
        self._jobs: list[_Job] = []
        self._outputs: list[PredictionOutput] = []
        self._close: list[Callable[[], None]] = []

    # -- before the first batch

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Hand the blocks to the datamodule.

        Raises:
            CellMapTypeError: the Trainer runs without a datamodule that can deliver them, or has another such callback.
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

    def _plan(self, trainer: L.Trainer, pl_module: L.LightningModule, pin: bool) -> tuple[PatchSamples, PlanBatches]:
        """Say what is computed, and make or find the outputs. Called when weights and normalization are restored."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        volumes = volumes_of(data.predict_dataset.crops)
        if len(volumes) > 1 and self.region is not None:
            raise CellMapValueError(f"a region is a part of one volume, and 'predict' has {len(volumes)}")
        names = self.classes if self.classes is not None else data.classes
        if not names:
            raise CellMapValueError("what the channels show is not known: give PredictionWriter classes=[...]")
        if data.classes is not None and list(names) != list(data.classes) and set(names) == set(data.classes):
            raise CellMapValueError(
                f"classes={list(names)} are those of the data in another order, so that channels would be exchanged; "
                f"leave classes out, or give {list(data.classes)}"
            )
        self._names = tuple(names)
        wanted = tuple(self.only) if self.only is not None else self._names
        if not wanted or not set(wanted) <= set(self._names):
            raise CellMapKeyError(f"only={list(wanted)} must name some of the channels {list(self._names)}")
        self._wanted, self._kept = wanted, [self._names.index(name) for name in wanted]
        self._jobs, self._outputs = [], []
        # Worker processes share what is kept as the datamodule says, and would each decode every chunk.
        self._passing = data.num_workers == 0 and all(passes_by(crop) for crop in data.predict_dataset.crops)
        self._array = next(iter({**data.target_arrays, **data.input_arrays}.items()))
        memory = BlockMemory(), BlockMemory()
        placed: list[Crop] = []
        for name, planes in volumes.items():
            output = self.output / name if len(volumes) > 1 else self.output
            job, crops = self._job(trainer, pl_module, output, name, planes, memory)
            self._jobs.append(job)
            placed += crops
        self._behind = BackgroundWriter()
        self._source = volumes_source(placed, data.predict_dataset.layout, data.seed)
        # The threads of one volume are those of the module's own dataset.
        self._close = [self._source.close if len(placed) > 1 else placed[0].store.close]
        self._close.insert(0, self._behind.close)
        array, spec = self._array
        self._said = ModelOutput(
            self._names, array, spec.window.shape, self._source.layout, self.key, self.activation, self.tta_flips
        )
        self.redundancy = max(job.plan.redundancy for job in self._jobs)
        total = sum(len(job.plan.grid) for job in self._jobs)
        self.summary = Summary(total, sum(job.done for job in self._jobs))
        self._steps = self._all_steps()
        self._next: tuple[_Job, BlockBatch] | None = None
        self._writing: Future[None] | None = None
        rank = trainer.global_rank
        self._bar = tqdm(
            total=sum(len(job.plan.blocks) for job in self._jobs), desc="predicting", unit="block",
            disable=None if rank == 0 else True, dynamic_ncols=True,
        )  # fmt: skip
        self._close.append(self._bar.close)
        self._unchecked = self.check_context and self.blend == "trim" and rank == 0
        self._began, self._waited = time.perf_counter(), data.waiting.waited
        # Worker processes read for themselves.
        ahead = self._source.decode_ahead if data.num_workers == 0 else None
        self._close.insert(0, self._source.cancel_ahead)
        return PatchSamples(self._source, data.seed, pin), PlanBatches([job.plan for job in self._jobs], ahead)

    def _job(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        path: Path,
        name: str,
        crops: Sequence[Crop],
        memory: tuple[BlockMemory, BlockMemory],
    ) -> tuple["_Job", list[Crop]]:
        """One volume: its output, and its patches in each plane."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        crop = crops[0]
        if isinstance(crop.raw_at, Path):
            check_apart(path, crop.raw_at)
        spec = self._array[1]
        windows = output_windows(spec.window, spec.flat, crops)
        window = windows[0]
        whole = output_lattice(window, crop.raw.box, [level.lattice for level in crop.raw.levels.values()])
        tilings = [Tiling(whole.shape, w.shape, self.blend, self.overlap, self.context) for w in windows]
        first, shape = voxels_of(whole, self.region) if self.region is not None else ((0, 0, 0), whole.shape)
        tiling, values = tilings[0], StoredValues(self.dtype, self.threshold)
        together = reaches_below(tilings)  # then blocks below each other compute no patch twice
        cut = partial(
            block_shape, shape, self.shards or self.chunks, partial(self._block_bytes, shape, tilings, values),
            patches=lambda axis, n: tiling.count(
                axis, first[axis], shape[axis], shape[0] if together and axis == 0 else n
            ),
        )  # fmt: skip
        block = cut(_bytes(self.block_size_mb))
        grid = BlockGrid(whole, first, shape, block)
        rank, world = trainer.global_rank, trainer.world_size
        output = PredictionOutput(
            path, self._wanted, grid, values, self.chunks, self.shards, self.zarr_format, self.levels, rank,
            crop.raw.scales,
        )  # fmt: skip
        self._outputs.append(output)
        skips = None
        if self.mask is not None or self.skip_empty:
            image = next(iter(crop.images.values())) if self.skip_empty else None
            skips = Skipping(self.mask, whole.step, image)
        inputs = InputStamps(grid, tilings, crops, skips)
        if rank == 0:
            settings = self._settings(
                trainer, pl_module, crops, data.predict_dataset.layout, window, grid, tilings, output.pyramid
            )
            output.open(settings | {"raw metadata": inputs.metadata}, self.overwrite, self.check_space)
            if not self.accept_changed_raw:
                self._check_inputs(output, inputs)
        trainer.strategy.barrier("the output is there")
        output.check_owned()
        done = output.journal.finished
        # As one process sees it: on a network file system each might see another state.
        left = trainer.strategy.broadcast([n for n in range(len(grid)) if n not in done])
        ahead = AHEAD * data.batch_size
        kept = passing_bytes(crops, np.multiply(grid.block, whole.step), ahead) if self._passing else None
        placed = [c.placed(patch_placement(t, whole, w), kept) for c, t, w in zip(crops, tilings, windows, strict=True)]
        if skips is not None and self.skip_empty:
            skips.raw = next(iter(placed[0].images.values()))
        start = sum(job.plan.positions for job in self._jobs)
        plan = BlockPlan(
            grid, tilings, data.batch_size, grid.share(left, rank, world, together), start, skips, inputs.begin
        )
        finished = len(grid) - len(left)
        if rank == 0:
            size = f"{output.nbytes / 1e9:.3g} GB before compression"
            log.info(
                "%s: %s voxels of %s nm, %d classes as %s, %s; %d blocks of %s, %d of them done; the model computes "
                "%.2f voxels for each that is written (with one process), %.2f times as many as without blocks",
                path, list(shape), [round(s, 4) for s in whole.step], len(self._wanted), self.dtype, size,
                len(grid), list(block), finished, plan.computed, plan.redundancy,
            )  # fmt: skip
            if not finished:  # later it would be too late
                self._advise(plan, cut)
        blocks = BlockAssembly(plan, values, len(self._kept), memory)
        return _Job(name, output, plan, blocks, inputs, finished), placed

    @staticmethod
    def _check_inputs(output: PredictionOutput, inputs: InputStamps) -> None:
        """Check that what finished blocks were computed from is still there.

        Raises:
            CellMapFileExistsError: it has changed since.
        """
        record = output.journal.record
        if record is None:
            block = inputs.changed({number: s for number, s in output.journal.inputs.items() if s != "-"})
        elif "input" in record and input_hash({n: inputs.of(n) for n in range(record["blocks"])}) != record["input"]:
            block = 0
        else:
            block = None
        if block is not None:
            raise CellMapFileExistsError(
                f"{output.path}: {inputs.describe(block)}; replace it with overwrite=True, or keep it with "
                "accept_changed_raw=True if the voxels are the same"
            )

    def _advise(self, plan: BlockPlan, cut: Callable[[int], Shape]) -> None:
        """Where small blocks make the model compute much twice, say how much memory would help."""
        if plan.redundancy <= MUCH:
            return
        found = []
        for more in (self.block_size_mb * 2**n for n in range(1, 7)):
            block = cut(_bytes(more))
            found.append((plan.patches(block) / plan.patches(plan.grid.shape), more, block))
            if found[-1][0] <= ENOUGH:
                break
        least = min(found)[0]
        then, more, block = next(f for f in found if f[0] <= 1.05 * least)
        if then < plan.redundancy / 1.1:
            log.warning(
                "block_size_mb=%g allows blocks of %s voxels, so that the model computes %.2f times as many as without "
                "blocks; block_size_mb=%g would allow %s, and make it %.2f times. Other blocks need a new output",
                self.block_size_mb, list(plan.grid.block), plan.redundancy, more, list(block), then,
            )  # fmt: skip

    def _block_bytes(self, whole: Shape, tilings: Sequence[Tiling], values: StoredValues, shape: Shape) -> int:
        """What blocks of a shape take in memory: one is written while the next is computed."""
        channels = len(self._wanted)
        # The mean over several planes is stored beside the sum, when the block is written.
        sums = 2 * np.dtype(np.float32).itemsize + values.dtype.itemsize
        voxel = 2 * values.dtype.itemsize if len(tilings) == 1 else sums
        column = (whole[0], *shape[1:]) if reaches_below(tilings) else shape
        planes = [PatchSum.nbytes(column, channels, t) for t in tilings if t.blend != "trim"]
        return channels * voxel * math.prod(shape) + max(planes, default=0)

    def _settings(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        crops: Sequence[Crop],
        layout: BatchLayout,
        window: Window,
        grid: BlockGrid,
        tilings: Sequence[Tiling],
        pyramid: Pyramid,
    ) -> dict[str, Any]:
        """All that the bytes follow from, so that only the same prediction goes on."""
        lattice, crop, tiling = grid.lattice, crops[0], tilings[0]
        inputs = {name: [list(spec.window.shape), spec.window.scale.tolist()] for name, spec in layout.inputs.items()}
        return {
            "model": self.model_id or model_fingerprint(pl_module),
            "precision": str(trainer.precision),
            "activation": self.activation,
            "key": self.key,
            "raw": str(crop.raw_at.absolute() if isinstance(crop.raw_at, Path) else crop.raw_at),
            "normalization": list(crop.raw.affine),
            "raw_value_transforms": {name: transform_name(t) for name, t in layout.raw_transforms.items()},
            "inputs": inputs,
            "patch": list(window.shape),
            "planes": [crop.plane.name for crop in crops],
            "tta_flips": self.tta_flips,
            "mask": None if self.mask is None else str(Path(self.mask).absolute()),
            "skip_empty": self.skip_empty,
            "voxel size": list(lattice.step),
            "translation": list(lattice.origin),
            "shape": list(lattice.shape),
            "classes": list(self._wanted),
            "blend": self.blend,
            "overlap": list(tiling.trim) if self.blend == "trim" else list(tiling.stride),
            "dtype": self.dtype,
            "threshold": self.threshold,
            "zarr_format": self.zarr_format,
            "chunks": list(self.chunks),
            "shards": list(self.shards) if self.shards else None,
            "block": list(grid.block),
            "levels": pyramid.levels,
            "pyramid factors": [list(step) for step in pyramid.steps],
            "order": "columns",  # an output whose blocks are numbered or computed in another way does not go on
        }

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
        """Add the patches of a batch to their block, which a thread writes when it is whole."""
        began = time.perf_counter()
        self._behind.check()
        self._up_to_batch()
        if self._next is None:
            raise CellMapValueError(f"batch {batch_idx} is one more than the blocks have")
        job, now = self._next
        self._next = None
        positions = job.plan.places(now)
        if batch["idx"].tolist() != positions:
            raise CellMapValueError(
                f"batch {batch_idx} holds the patches {batch['idx'].tolist()}, and those of block {now.block} that "
                f"come next are {positions}: the order of batches was changed"
            )
        patch = job.plan.tilings[now.tiling].patch
        values = self._said.values(outputs, len(positions), patch)
        if self.tta_flips or self._unchecked:
            again = partial(self._predicted, trainer, pl_module, batch_idx, len(positions), patch)
            if self._unchecked:
                self._unchecked = False
                self._said.check_context(job.plan.tilings[now.tiling], values, again, batch)
            values = self._said.over_flips(values, again, batch)
        if self.only is not None:
            values = values[:, self._kept]
        found: np.ndarray[Any, np.dtype[np.float32]] = values.cpu().numpy()
        job.blocks.add(now, found)
        self._up_to_batch()
        self._count(trainer, began)
        if trainer.received_sigterm:  # Lightning itself would go on to the end
            raise SIGTERMException

    def _predicted(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch_idx: int,
        count: int,
        patch: Shape,
        batch: Mapping[str, Any],
    ) -> torch.Tensor:
        """What the model gives for another batch."""
        arguments = [batch, batch_idx][: len(inspect.signature(pl_module.predict_step).parameters)]
        return self._said.values(trainer.strategy.predict_step(*arguments), count, patch)

    def _all_steps(self) -> Iterator[tuple["_Job", Step]]:
        """Everything that happens in this process, one volume after the other."""
        for job in self._jobs:
            for step in job.plan.steps():
                yield job, step
            job.blocks.finish()

    def _up_to_batch(self) -> None:
        """Do what comes before the next batch: blocks begin, end, or are skipped."""
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
                    self._behind.give(partial(job.output.skip, number, job.inputs.begin(number)), MOST_TASKS)
                    self.summary.skipped += 1
                    self._bar.update()

    def _end_block(self, job: "_Job", number: int) -> None:
        """A block is whole: write it."""
        block = job.blocks.end()
        if self._writing is not None:
            self._behind.until(self._writing)  # two blocks hold memory, and no more
        self._writing = self._behind.give(partial(self._write, job, number, block), MOST_TASKS)

    def _write(self, job: "_Job", number: int, block: StoredBlock | MeanBlock) -> None:
        """Write a block, in the thread that does so, and let go of its memory."""
        job.inputs.check(number)
        job.output.write(number, *block.finish(), job.inputs.begin(number))
        block.release()
        self.summary.written += 1
        self.summary.voxels += math.prod(job.output.grid[number][1])
        self._bar.update()
        speed = self.summary.voxels / (time.perf_counter() - self._began)
        self._bar.set_postfix_str(f"{speed / 1e6:.3g} Mvoxel/s", refresh=False)

    def _count(self, trainer: L.Trainer, began: float) -> None:
        """Count the time since ``began`` as that of blending and writing."""
        ended = time.perf_counter()
        self.summary.stored += ended - began
        self.summary.seconds = ended - self._began
        self.summary.waited = trainer.datamodule.waiting.waited - self._waited  # type: ignore[attr-defined]

    # -- the end

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the last block; build the pyramids, when every process is done."""
        began = time.perf_counter()
        self._up_to_batch()
        self._behind.wait()
        self._count(trainer, began)
        self._bar.close()
        strategy = trainer.strategy
        fractions: dict[str, float] = {}
        complete, finished = True, 0
        for job in self._jobs:
            output = job.output
            job.inputs.check_all()
            complete &= output.finish(trainer.global_rank, trainer.world_size, strategy.barrier, strategy.broadcast)
            finished += len(output.journal.finished)
            before = f"{job.name}/" if len(self._jobs) > 1 else ""
            fractions |= {f"{before}{name}": part for name, part in output.fractions().items()}
        self.summary.complete, self.summary.finished, self.summary.fractions = complete, finished, fractions
        if trainer.global_rank == 0:
            if not complete:
                log.warning(
                    "%s: %d of %d blocks are done; the same prediction goes on from there",
                    self.output, self.summary.finished, self.summary.blocks,
                )  # fmt: skip
            log.info("%s: %s", self.output, self.summary)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the blocks back: another Trainer may run the datamodule without this callback."""
        self._forget(trainer)
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The same where a run ends early, and ``teardown`` is not called. What is finished stays.

        An output that this run has begun is removed if none of its blocks is finished.
        """
        self._forget(trainer)
        for output in self._outputs if trainer.global_rank == 0 else ():
            output.discard(trainer.world_size == 1)
        self._release()

    def _release(self) -> None:
        """Give the outputs to other jobs."""
        for output in self._outputs:
            output.close()
        self._outputs = []

    def _forget(self, trainer: L.Trainer) -> None:
        datamodule: Any = getattr(trainer, "datamodule", None)
        if getattr(datamodule, "prediction", None) is not None:
            datamodule.prediction = None
        closing, self._close = self._close, []
        for close in closing:
            close()
        self._next = self._writing = None
        for job in self._jobs:
            job.blocks.close()


def _lengths(what: str, value: Sequence[int]) -> Shape:
    found = list(value)
    if len(found) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in found):
        raise CellMapValueError(f"{what} are three positive numbers of voxels (z, y, x), got {value!r}")
    return found[0], found[1], found[2]


def _bytes(mib: float) -> int:
    return int(mib * 2**20)
