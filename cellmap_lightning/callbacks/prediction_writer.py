"""Write what a model predicts of a whole volume, out of core, so that it can be stopped and go on."""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tqdm import tqdm

from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.sampling.blockwise import BlockBatch, BlockPlan, patch_placement
from cellmap_lightning.sampling.dataset import CellMapDataset
from cellmap_lightning.volumes.blending import Blend, BlockSum, Tiling
from cellmap_lightning.volumes.blocks import BlockGrid, block_shape, output_lattice, parse_region, voxels_of
from cellmap_lightning.volumes.geometry import Shape
from cellmap_lightning.volumes.output import OutputType, PredictionOutput
from cellmap_lightning.volumes.placement import Window
from cellmap_lightning.volumes.writer import ZarrFormat

log = logging.getLogger(__name__)

Activation = Literal["sigmoid", "softmax"]


@dataclass
class Summary:
    """What a prediction did; of this process and this run, but for ``blocks``, ``finished`` and ``fractions``.

    Attributes:
        blocks: blocks of the whole prediction.
        finished: how many of them are done.
        written: how many this process wrote.
        voxels: voxels that it wrote, of one channel.
        seconds: from the first batch to the last block.
        waited: of these, waiting for batches.
        stored: of these, blending and writing.
        fractions: part of the finished voxels of each class that reach the threshold.
        complete: whether all blocks are done and the pyramids built.
    """

    blocks: int = 0
    finished: int = 0
    written: int = 0
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
            f"{self.voxels / 1e6:.3g} million voxels in {self.seconds:.3g} s, {speed / 1e6:.3g} million per second",
            f"of the time: waiting for data {self.waited:.3g} s, model {model:.3g} s, "
            f"blending and writing {self.stored:.3g} s",
        ]
        lines += [f"{name:<12} {part:.2%} of the voxels" for name, part in (self.fractions or {}).items()]
        return "\n".join(lines)


class PredictionWriter(L.Callback):
    """Makes `Trainer.predict` write the prediction of a whole volume as OME-NGFF groups ``<output>/<class>``.

    The datamodule, a `CellMapDataModule` with one volume to predict, delivers the patches of one block after the
    other; a block is a box of whole chunks, which one process computes and writes. What was finished is skipped when
    the same prediction is started again. Nothing is returned by `Trainer.predict`: it would be held in memory.

    An output patch is the first of the datamodule's ``target_arrays``, else the first input: the output of the model
    for that patch, of its shape and scale. `predict_step` returns ``[N, C, z, y, x]`` (without an axis of length 1 if
    the patch has one), or a mapping that has such a tensor.

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
        levels: levels of the pyramid; by default as many as leave every axis 32 voxels.
        block_mb: MiB that the sums of a block may take; what a block has of chunks follows from it.
        check_space: refuse to begin where the disk has less room than the rest takes without compression.
        model_id: what tells this model from others; by default a hash of its weights.

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
        block_mb: float = 256,
        check_space: bool = True,
        model_id: str | None = None,
    ) -> None:
        if activation is not None and activation not in get_args(Activation):
            raise CellMapValueError(f"activation is one of {', '.join(get_args(Activation))} or null: {activation!r}")
        if zarr_format not in (2, 3):
            raise CellMapValueError(f"zarr_format is 2 (OME-NGFF 0.4) or 3 (OME-NGFF 0.5), got {zarr_format!r}")
        if not block_mb > 0 or not math.isfinite(threshold):
            raise CellMapValueError(f"block_mb must be positive and threshold a number: {block_mb!r}, {threshold!r}")
        if dtype not in get_args(OutputType):
            raise CellMapValueError(f"dtype is one of {', '.join(get_args(OutputType))}, got {dtype!r}")
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
        self.levels, self.block_mb, self.check_space, self.model_id = levels, block_mb, check_space, model_id
        self.summary = Summary()
        self.redundancy = 1.0
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
        datamodule.prediction = lambda: self._plan(trainer, pl_module)

    def _plan(self, trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[CellMapDataset, BlockPlan]:
        """Say what is computed, and make or find the output. Called when weights and normalization are restored."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        found = data.predict_dataset.datasets
        if len(found) != 1:
            raise CellMapValueError(
                f"PredictionWriter writes one volume, and 'predict' has {len(found)}: "
                f"{', '.join(d.input_path for d in found)}; give one of them, in one plane"
            )
        dataset: CellMapDataset = found[0]
        if dataset.plane.turn(None) is not None:
            raise CellMapValueError("slices are predicted in the plane xy; use planes=[xy]")
        _check_apart(self.output, Path(dataset.input_path))
        self._name, window = _output_window(data, dataset)
        names = self.classes if self.classes is not None else data.classes
        if not names:
            raise CellMapValueError("what the channels show is not known: give PredictionWriter classes=[...]")
        self._names = tuple(names)
        wanted = tuple(self.only) if self.only is not None else self._names
        if not wanted or not set(wanted) <= set(self._names):
            raise CellMapKeyError(f"only={list(wanted)} must name some of the channels {list(self._names)}")
        self._kept = [self._names.index(name) for name in wanted]
        whole = output_lattice(window, dataset.raw_box, [level.lattice for level in dataset.levels.values()])
        self._tiling = Tiling(whole.shape, window.shape, self.blend, self.overlap, self.context)
        first, shape = voxels_of(whole, self.region) if self.region is not None else ((0, 0, 0), whole.shape)
        # Sums and totals of a block: four bytes where patches share it out, eight where they overlap.
        voxel = 4 * len(wanted) if self.blend == "trim" else 8 * (len(wanted) + 1)
        unit = self.shards or self.chunks
        tiling = self._tiling
        block = block_shape(
            shape, unit, voxel, int(self.block_mb * 2**20),
            lambda axis, length: tiling.count(axis, first[axis], shape[axis], length),
        )  # fmt: skip
        grid = BlockGrid(whole, first, shape, block)
        rank, world = trainer.global_rank, trainer.world_size
        self._output = PredictionOutput(
            self.output, wanted, grid, self.dtype, self.threshold, self.chunks, self.shards, self.zarr_format,
            self.levels, rank,
        )  # fmt: skip
        if rank == 0:
            settings = self._settings(trainer, pl_module, dataset, window, grid)
            self._output.open(settings, self.overwrite, self.check_space)
        trainer.strategy.barrier("the output is there")
        finished = self._output.journal.finished
        own = range(rank, len(grid), world)
        plan = BlockPlan(grid, self._tiling, data.batch_size, [n for n in own if n not in finished])
        self.redundancy = plan.redundancy
        self.summary = Summary(len(grid), len(finished))
        if rank == 0:
            size = f"{self._output.nbytes / 1e9:.3g} GB before compression"
            log.info(
                "%s: %s voxels of %s nm, %d classes as %s, %s; %d blocks of %s, %d of them done; the model computes "
                "%.2f voxels for each that is written, %.2f times as many as without blocks",
                self.output, list(shape), [round(s, 4) for s in whole.step], len(wanted), self.dtype, size,
                len(grid), list(block), len(finished), plan.computed, self.redundancy,
            )  # fmt: skip
        self._written = plan
        self._batches: Iterator[BlockBatch] = plan.batches()
        self._weights = self._tiling.weights()
        self._sum: BlockSum | None = None
        bar = tqdm(
            total=len(plan.blocks), desc="predicting", unit="block", disable=None if rank == 0 else True,
            dynamic_ncols=True,
        )  # fmt: skip
        self._bar = bar
        placed = dataset.placed(patch_placement(self._tiling, whole, window))
        self._close = [bar.close, placed._store.close]
        self._began, self._waited = time.perf_counter(), data.waiting.waited
        return placed, plan

    def _settings(
        self, trainer: L.Trainer, pl_module: L.LightningModule, dataset: CellMapDataset, window: Window, grid: BlockGrid
    ) -> dict[str, Any]:
        """All that the bytes follow from, so that only the same prediction goes on."""
        lattice = grid.lattice
        tiling = self._tiling
        inputs = {
            name: [list(spec.window.shape), spec.window.scale.tolist()] for name, spec in dataset.layout.inputs.items()
        }
        return {
            "model": self.model_id or fingerprint(pl_module),
            "precision": str(trainer.precision),
            "activation": self.activation,
            "key": self.key,
            "raw": str(Path(dataset.input_path).absolute()),
            "normalization": list(dataset.affine),
            "raw_value_transforms": {name: _called(t) for name, t in dataset.layout.raw_transforms.items()},
            "inputs": inputs,
            "patch": list(window.shape),
            "voxel size": list(lattice.step),
            "translation": list(lattice.origin),
            "shape": list(lattice.shape),
            "classes": list(self._output.classes),
            "blend": self.blend,
            "overlap": list(tiling.trim) if self.blend == "trim" else list(tiling.stride),
            "dtype": self.dtype,
            "threshold": self.threshold,
            "zarr_format": self.zarr_format,
            "chunks": list(self.chunks),
            "shards": list(self.shards) if self.shards else None,
            "block": list(grid.block),
            "levels": self._output.levels,
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
        """Add the patches of a batch to their block, and write it when it is whole."""
        began = time.perf_counter()
        now = next(self._batches)
        positions = [self._written.position(part) for part in now.parts]
        if batch["idx"].tolist() != positions:
            raise CellMapValueError(
                f"batch {batch_idx} holds the patches {batch['idx'].tolist()}, and those of block {now.block} that "
                f"come next are {positions}: the order of batches was changed"
            )
        values = self._values(outputs, len(positions))
        grid = self._output.grid
        if now.first or self._sum is None:
            self._sum = BlockSum(grid.whole_start(now.block), grid[now.block][1], len(self._kept), self._weights)
        for part, value in zip(now.parts, values, strict=True):
            self._sum.add(part, value[self._kept])
        if now.last:
            self._output.write(now.block, self._sum.mean())
            self._sum = None
            self.summary.written += 1
            self.summary.voxels += math.prod(grid[now.block][1])
            self._bar.update()
            speed = self.summary.voxels / (time.perf_counter() - self._began)
            self._bar.set_postfix_str(f"{speed / 1e6:.3g} Mvoxel/s", refresh=False)
        ended = time.perf_counter()
        self.summary.stored += ended - began
        self.summary.seconds = ended - self._began
        self.summary.waited = trainer.datamodule.waiting.waited - self._waited  # type: ignore[attr-defined]
        if trainer.received_sigterm:  # Lightning itself would go on to the end
            raise SIGTERMException

    def _values(self, outputs: Any, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """What `predict_step` gave, ``[N, C, z, y, x]``."""
        if isinstance(outputs, Mapping):
            key = self.key if self.key is not None else next(iter(outputs)) if len(outputs) == 1 else None
            if key not in outputs:
                raise CellMapKeyError(f"predict_step returned {list(outputs)}; say which of them with key=...")
            outputs = outputs[key]
        if not isinstance(outputs, torch.Tensor):
            raise CellMapTypeError(
                f"predict_step must return a tensor [N, C, z, y, x] or a mapping of such, got {type(outputs).__name__}"
            )
        patch = self._tiling.patch
        channels, got = len(self._names), tuple(outputs.shape)
        if len(got) > 1 and got[0] == count and got[1] != channels:
            raise CellMapValueError(
                f"predict_step returned {got[1]} channels, and there are {channels} classes: {list(self._names)}"
            )
        if got[:2] != (count, channels) or got[2:] not in (patch, tuple(n for n in patch if n != 1)):
            raise CellMapValueError(
                f"predict_step returned {list(got)}, and {[count, channels, *patch]} was expected: the patch of "
                f"{self._name!r}. A model whose output has another shape or scale than its input needs target_arrays "
                "that say which"
            )
        values = outputs.detach().to(torch.float32)
        if self.activation is not None:
            values = values.sigmoid() if self.activation == "sigmoid" else values.softmax(1)
        found: np.ndarray[Any, np.dtype[np.float32]] = values.reshape(count, channels, *patch).cpu().numpy()
        return found

    # -- the end

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Build the pyramids, when every process is done."""
        self._bar.close()
        strategy = trainer.strategy
        complete = self._output.finish(trainer.global_rank, trainer.world_size, strategy.barrier, strategy.broadcast)
        self.summary.complete = complete
        self.summary.finished = len(self._output.journal.finished)
        self.summary.fractions = self._output.fractions()
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

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The same where a run ends early, and ``teardown`` is not called. What is finished stays."""
        self._forget(trainer)

    def _forget(self, trainer: L.Trainer) -> None:
        datamodule: Any = getattr(trainer, "datamodule", None)
        if getattr(datamodule, "prediction", None) is not None:
            datamodule.prediction = None
        closing, self._close = self._close, []
        for close in closing:
            close()
        self._sum = None


def fingerprint(module: L.LightningModule) -> str:
    """The class of a model and a hash of its weights: the same in every process and run."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{plain.dtype} {list(value.shape)}".encode())
            digest.update(plain.view(torch.uint8).numpy().tobytes())
    return f"{type(module).__qualname__} {digest.hexdigest()[:16]}"


def _called(transform: Any) -> str:
    """A value transform by its name; what it is written as may hold an address, another one in each process."""
    if not callable(transform):
        return str(transform)
    named = transform if hasattr(transform, "__qualname__") else type(transform)
    return f"{named.__module__}.{named.__qualname__}"


def _lengths(what: str, value: Sequence[int]) -> Shape:
    found = list(value)
    if len(found) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in found):
        raise CellMapValueError(f"{what} are three positive numbers of voxels (z, y, x), got {value!r}")
    return found[0], found[1], found[2]


def _output_window(data: Any, dataset: CellMapDataset) -> tuple[str, Window]:
    """Name and patch of the model's output, along the axes of the volume."""
    arrays = {**data.target_arrays, **data.input_arrays}
    name = next(iter(arrays))
    return name, dataset.in_volume(arrays[name].window, arrays[name].flat)


def _check_apart(output: Path, raw: Path) -> None:
    """What is read is never written to."""
    a, b = output.absolute(), raw.absolute()
    if a == b or b in a.parents or a in b.parents:
        raise CellMapValueError(f"the output {output} and the raw volume {raw} must not lie in each other")
