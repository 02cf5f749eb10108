"""The prediction of one volume: its output, its blocks and their patches."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from cellmap_lightning.batches.arrays import InputArray, TargetArray
from cellmap_lightning.crops.crop import Crop
from cellmap_lightning.errors import CellMapFileExistsError
from cellmap_lightning.geometry.lattice import Lattice, Shape
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.io.object_folder import OutputPath
from cellmap_lightning.prediction.accumulate import BlockMemory, PatchSum
from cellmap_lightning.prediction.assembly import BlockAssembly
from cellmap_lightning.prediction.blending import Tiling
from cellmap_lightning.prediction.block_patches import AHEAD, BlockPlan, patch_placement, reaches_below
from cellmap_lightning.prediction.blocks import BlockGrid, block_shape, output_lattice, voxels_of
from cellmap_lightning.prediction.channels import Targets
from cellmap_lightning.prediction.input_stamps import InputStamps
from cellmap_lightning.prediction.journal import input_hash
from cellmap_lightning.prediction.model_identity import model_fingerprint, transform_name
from cellmap_lightning.prediction.options import PredictionOptions
from cellmap_lightning.prediction.output import PredictionOutput
from cellmap_lightning.prediction.output_checks import check_apart
from cellmap_lightning.prediction.quantize import StoredValues, threshold_of
from cellmap_lightning.prediction.raw_gaps import NamedBox, RawGaps
from cellmap_lightning.prediction.skipping import Skipping
from cellmap_lightning.prediction.volumes import output_windows, passes_by, passing_bytes
from cellmap_lightning.wording import plural, size_text

log = logging.getLogger(__name__)

#: Redundancy of patches from which on a warning is worthwhile, and one that needs no improvement.
HIGH_REDUNDANCY, LOW_REDUNDANCY = 1.5, 1.25


@dataclass(frozen=True, eq=False)
class PredictionJob:
    """The prediction of one volume; see docs/prediction.md.

    Attributes:
        name: name of the volume.
        output: the output on disk.
        plan: the blocks and patches that this process computes.
        blocks: assembles the blocks from patches.
        inputs: stamps of the stored chunks that they are computed from.
        done: number of blocks that were finished before.
    """

    name: str
    output: PredictionOutput
    plan: BlockPlan
    blocks: BlockAssembly
    inputs: InputStamps
    done: int


class JobPlanner:
    """Plans the predictions of the volumes of one run, and creates or opens their outputs; see docs/prediction.md.

    Args:
        options: the options of the prediction.
        trainer: the Trainer, with a `CellMapDataModule`.
        module: the model.
        classes: the classes to write.
        spec: the array whose patches the model returns.
        targets: descriptions of channels; see `channels`.
        named: the crop that is predicted, for messages; None for another box.

    Attributes:
        outputs: the outputs, also one whose planning has failed.
    """

    def __init__(
        self,
        options: PredictionOptions,
        trainer: L.Trainer,
        module: L.LightningModule,
        classes: Sequence[str],
        spec: InputArray | TargetArray,
        targets: Targets,
        named: NamedBox | None = None,
    ) -> None:
        self._named = named
        self.outputs: list[PredictionOutput] = []
        self._options, self._trainer, self._module = options, trainer, module
        self._classes, self._spec, self._targets = tuple(classes), spec, targets
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._data = data
        self._memory = BlockMemory(), BlockMemory()
        # Worker processes need the shared cache of the datamodule, as each of them would decode every chunk again.
        self._passing = data.num_workers == 0 and all(passes_by(crop) for crop in data.predict_dataset.crops)
        self._positions = 0

    def plan(self, path: OutputPath, name: str, crops: Sequence[Crop]) -> tuple[PredictionJob, list[Crop]]:
        """Plan the prediction of a volume.

        Args:
            path: folder of the output.
            name: name of the volume.
            crops: the volume, once for each plane.

        Returns:
            The job, and the volume in each plane, placed for its patches.
        """
        options, trainer, raw = self._options, self._trainer, crops[0].raw
        blending, storage, box = options.blending, options.storage, options.region.box
        check_apart(path, crops[0].raw_at)
        windows = output_windows(self._spec.window, self._spec.flat, crops)
        whole = output_lattice(windows[0], raw.box, [level.lattice for level in raw.levels.values()])
        tilings = [Tiling(whole.shape, w.shape, blending.blend, blending.overlap, blending.context) for w in windows]
        first, shape = ((0, 0, 0), whole.shape) if box is None else voxels_of(whole, box, raw.box, crops[0].input_path)
        values = StoredValues(storage.dtype, [threshold_of(storage.threshold, name) for name in self._classes])
        cut = self._block_cutter(first, shape, tilings, values)
        grid = BlockGrid(whole, first, shape, cut(options.block_size_mb))
        output = PredictionOutput(
            path, self._classes, grid, values, storage.chunk, storage.shard, storage.zarr_format, storage.levels,
            trainer.global_rank, raw.scales, self._targets,
        )  # fmt: skip
        output.untrained = self._data.unannotated
        self.outputs.append(output)
        skips = self._skipping(crops[0], whole)
        inputs = InputStamps(grid, tilings, crops, skips)
        left = self._open(output, inputs, crops, windows[0], tilings)
        # Process 0 logs; all processes come to the same result, so that none waits for another that has stopped.
        computed = [n for n in left if skips is None or not skips.is_masked(grid.box(n))]
        gaps = RawGaps(crops, grid, tilings, box, self._named)
        gaps.check(computed, self._data.splits.read.missing_raw, trainer.global_rank == 0)

        # The decoded chunks that patches still need, if raw is read past the cache.
        ahead = AHEAD * self._data.batch_size
        budget = passing_bytes(crops, np.multiply(grid.block, whole.step), ahead) if self._passing else None
        placed = [
            crop.placed(patch_placement(tiling, whole, window), budget)
            for crop, tiling, window in zip(crops, tilings, windows, strict=True)
        ]
        if skips is not None and options.region.skip_empty:
            skips.raw = next(iter(placed[0].images.values()))
        share = grid.share(left, trainer.global_rank, trainer.world_size, reaches_below(tilings))
        plan = BlockPlan(grid, tilings, self._data.batch_size, share, self._positions, skips, inputs.begin)
        self._positions += plan.positions
        done = len(grid) - len(left)
        if trainer.global_rank == 0:
            self._report(output, plan, done)
            if not done:  # the shape of blocks cannot change later
                self._advise(plan, cut)
        blocks = BlockAssembly(plan, values, len(self._classes), self._memory)
        return PredictionJob(name, output, plan, blocks, inputs, done), placed

    def _block_cutter(
        self, first: Shape, shape: Shape, tilings: Sequence[Tiling], values: StoredValues
    ) -> Callable[[float], Shape]:
        """Return a function from the memory for blocks, in MiB, to the shape of blocks."""
        carries = reaches_below(tilings)

        def patches(axis: int, length: int) -> int:
            # Blocks below each other share their patches, as if they were one block.
            length = shape[0] if carries and axis == 0 else length
            return tilings[0].count(axis, first[axis], shape[axis], length)

        nbytes = partial(self._block_bytes, shape, tilings, values)
        return lambda mib: block_shape(shape, self._options.storage.unit, nbytes, int(mib * 2**20), patches)

    def _block_bytes(self, whole: Shape, tilings: Sequence[Tiling], values: StoredValues, shape: Shape) -> int:
        """Return the memory of blocks of a shape: one is written while the next is computed."""
        channels = len(self._classes)
        # The mean over several planes is stored beside the sum, when the block is written.
        sums = 2 * np.dtype(np.float32).itemsize + values.dtype.itemsize
        voxel = 2 * values.dtype.itemsize if len(tilings) == 1 else sums
        column = (whole[0], *shape[1:]) if reaches_below(tilings) else shape
        planes = [PatchSum.nbytes(column, channels, tiling) for tiling in tilings if tiling.blend != "trim"]
        return channels * voxel * math.prod(shape) + max(planes, default=0)

    def _skipping(self, crop: Crop, whole: Lattice) -> Skipping | None:
        options = self._options.region
        if options.mask is None and not options.skip_empty:
            return None
        return Skipping(options.mask, whole.step, next(iter(crop.images.values())) if options.skip_empty else None)

    def _open(
        self,
        output: PredictionOutput,
        inputs: InputStamps,
        crops: Sequence[Crop],
        window: Window,
        tilings: Sequence[Tiling],
    ) -> list[int]:
        """Create the output, or open that of the same prediction; return the numbers of its unfinished blocks."""
        resume, trainer = self._options.resume, self._trainer
        if trainer.global_rank == 0:
            settings = self._settings(output, crops, window, tilings)
            settings["raw metadata"] = inputs.metadata
            output.open(settings, resume.overwrite, resume.check_space)
            if not resume.accept_changed_raw:
                _check_inputs(output, inputs)
        trainer.strategy.barrier("the output is open")
        output.check_owned()
        done = output.journal.finished
        # Process 0 decides: on a network file system each process might see another state.
        left: list[int] = trainer.strategy.broadcast([n for n in range(len(output.grid)) if n not in done])
        return left

    def _settings(
        self, output: PredictionOutput, crops: Sequence[Crop], window: Window, tilings: Sequence[Tiling]
    ) -> dict[str, Any]:
        """Return everything that the stored bytes depend on, so that only the same prediction is resumed."""
        options, grid, layout = self._options, output.grid, self._data.predict_dataset.layout
        blending, storage, region = options.blending, options.storage, options.region
        lattice, crop, tiling = grid.lattice, crops[0], tilings[0]
        inputs = {name: [list(spec.window.shape), spec.window.scale.tolist()] for name, spec in layout.inputs.items()}
        targets = {name: dict(target) for name, target in self._targets.items()}
        return {
            **({"targets": targets} if targets else {}),
            "model": options.resume.model_id or model_fingerprint(self._module),
            "precision": str(self._trainer.precision),
            "activation": options.channels.activation,
            "key": options.channels.key,
            "raw": str(crop.raw_at.absolute() if isinstance(crop.raw_at, Path) else crop.raw_at),
            "normalization": list(crop.raw.affine),
            "raw_value_transforms": {name: transform_name(t) for name, t in layout.raw_transforms.items()},
            "inputs": inputs,
            "patch": list(window.shape),
            "planes": [crop.plane.name for crop in crops],
            "tta_flips": blending.flips,
            "mask": None if region.mask is None else str(Path(region.mask).absolute()),
            "skip_empty": bool(region.skip_empty),
            "voxel size": list(lattice.step),
            "translation": list(lattice.origin),
            "shape": list(lattice.shape),
            "classes": list(self._classes),
            "blend": blending.blend,
            "overlap": list(tiling.trim) if blending.blend == "trim" else list(tiling.stride),
            "dtype": storage.dtype,
            "threshold": storage.threshold,
            "zarr_format": storage.zarr_format,
            "chunks": list(storage.chunk),
            "shards": list(storage.shard) if storage.shard else None,
            "block": list(grid.block),
            "levels": output.levels,
            "pyramid factors": [list(step) for step in output.pyramid.steps],
            "order": "columns",  # the numbering of blocks, for outputs of versions with another one
        }

    def _report(self, output: PredictionOutput, plan: BlockPlan, done: int) -> None:
        grid = output.grid
        log.info(
            "%s: %s voxels of %s nm, %s as %s, %s before compression; %s of %s, %d of them done; "
            "the model computes %.2f voxels for each that is written%s",
            output.path, list(grid.shape), [round(s, 4) for s in grid.whole.step],
            plural(len(self._classes), "class", "classes"), self._options.storage.dtype, size_text(output.nbytes),
            plural(len(grid), "block"), list(grid.block), done, plan.computed,
            f", {plan.redundancy:.2f} times as many as without blocks" if plan.redundancy > 1.005 else "",
        )  # fmt: skip

    def _advise(self, plan: BlockPlan, cut: Callable[[float], Shape]) -> None:
        """Warn if small blocks make the model compute many patches twice, and name the memory that would help."""
        if plan.redundancy <= HIGH_REDUNDANCY:
            return
        candidates = []
        for mib in (self._options.block_size_mb * 2**n for n in range(1, 7)):
            block = cut(mib)
            candidates.append((plan.patches(block) / plan.patches(plan.grid.shape), mib, block))
            if candidates[-1][0] <= LOW_REDUNDANCY:
                break
        # The smallest size that is about as good as the best.
        best = min(candidates)[0]
        redundancy, mib, block = next(candidate for candidate in candidates if candidate[0] <= 1.05 * best)
        if redundancy < plan.redundancy / 1.1:
            log.warning(
                "block_size_mb=%g allows blocks of %s voxels, so that the model computes %.2f times as many as without "
                "blocks; block_size_mb=%g would allow %s, and make it %.2f times. Other blocks need a new output",
                self._options.block_size_mb, list(plan.grid.block), plan.redundancy, mib, list(block), redundancy,
            )  # fmt: skip


def _check_inputs(output: PredictionOutput, inputs: InputStamps) -> None:
    """Check that the raw chunks that finished blocks were computed from have not changed.

    Raises:
        CellMapFileExistsError: they have changed since.
    """
    record, block = output.journal.record, None
    if record is None:
        block = inputs.changed({number: stamp for number, stamp in output.journal.inputs.items() if stamp != "-"})
    elif "input" in record and input_hash({n: inputs.of(n) for n in range(record["blocks"])}) != record["input"]:
        block = 0
    if block is not None:
        raise CellMapFileExistsError(
            f"{output.path}: {inputs.describe(block)}; replace it with overwrite=True, or accept it with "
            "accept_changed_raw=True if the voxels are the same"
        )
