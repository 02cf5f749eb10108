"""A self-supervised task: parts of raw are hidden, and a network says what is there. No annotation is needed."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.runtime.rng import HIDE, uniforms
from cellmap_lightning.training.masked import MeanOverSamples
from cellmap_lightning.training.restorable import RestorableTask
from cellmap_lightning.training.task import made_optimizers

#: More positions than any dataset has: with it epoch and position make one number.
_POSITIONS = 1 << 44


class ReconstructionTask(RestorableTask):
    """Masked reconstruction, after He et al., "Masked autoencoders are scalable vision learners" (arXiv:2111.06377).

    Blocks of a sample are replaced by the mean of the voxels that stay, and the loss is the mean squared error of what
    the network says of the hidden voxels. Which blocks are hidden follows from (seed, epoch, position), in validation
    from (seed, position).

    Args:
        network: from ``[N, 1, z, y, x]`` (or ``[N, 1, y, x]``) to the same shape.
        optimizer: from parameters to an optimizer; by default AdamW with a learning rate of 1e-3.
        scheduler: from an optimizer to a scheduler that steps each epoch, or None.
        hidden: the part of the blocks that is hidden, between 0 and 1; at least one is, and at least one stays.
        block: edge lengths of a block, voxels, z y x; of slices the last two count. Where they do not divide the
            patch, the last blocks are smaller.
        input_name: the input of the batch; by default the only one.
        seed: seed of what is hidden.

    Raises:
        CellMapValueError: ``hidden`` or ``block`` that cannot be one.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        hidden: float = 0.5,
        block: Sequence[int] = (8, 8, 8),
        input_name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < hidden < 1:
            raise CellMapValueError(f"hidden is the part of the blocks that is hidden, between 0 and 1; got {hidden}")
        if not all(isinstance(n, int) and n >= 1 for n in block) or len(block) not in (2, 3):
            raise CellMapValueError(f"block must be whole numbers of voxels (z, y, x), got {block!r}")
        self.network = network
        self.optimizer, self.scheduler = optimizer, scheduler
        self.hidden, self.block = hidden, tuple(block)
        self.input_name = input_name
        self.seed = seed
        self.val_loss = MeanOverSamples()
        self.val_constant = MeanOverSamples()

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of an input of which parts are hidden."""
        out: Tensor = self.network(x)
        return out

    def hide(self, x: Tensor, positions: Sequence[int], epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Hide blocks of a batch.

        Args:
            x: ``[N, 1, ...]``.
            positions: of its samples.
            epoch: in which they are seen.

        Returns:
            The batch with the hidden blocks replaced, and a boolean ``[N, 1, ...]`` that says where.

        Raises:
            CellMapValueError: the patch is a single block.
        """
        shape = x.shape[2:]
        if len(self.block) < len(shape):
            raise CellMapValueError(f"block={list(self.block)} has fewer axes than the patch, {list(shape)}")
        block = self.block[-len(shape) :]
        blocks = [-(-n // b) for n, b in zip(shape, block, strict=True)]
        count = math.prod(blocks)
        if count < 2:
            raise CellMapValueError(f"block={list(block)} leaves nothing of a patch of {list(shape)} voxels to see")
        numbers = [position + epoch * _POSITIONS for position in positions]
        order = torch.from_numpy(uniforms(self.seed, HIDE, numbers, count)).argsort(1)
        chosen = torch.zeros(order.shape, dtype=torch.bool, device="cpu")
        chosen.scatter_(1, order[:, : min(max(round(self.hidden * count), 1), count - 1)], True)
        mask = chosen.reshape(-1, 1, *blocks).to(x.device)
        for axis, b in enumerate(block, 2):
            mask = mask.repeat_interleave(b, axis).narrow(axis, 0, x.shape[axis])
        axes = list(range(1, x.ndim))
        kept = (x * ~mask).sum(axes, keepdim=True) / (~mask).sum(axes, keepdim=True)
        return torch.where(mask, kept.to(x.dtype), x), mask

    # -- steps

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch, logged as ``train/loss``."""
        x = batch[self._name]
        seen, mask = self.hide(x, batch["idx"].tolist(), self.current_epoch)
        loss = _error(self(seen), x, mask)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Loss of a batch, and that of the constant that stands in the hidden blocks."""
        x = batch[self._name]
        seen, mask = self.hide(x, batch["idx"].tolist())
        self.val_loss.update(_error(self(seen), x, mask), len(x))
        self.val_constant.update(_error(seen, x, mask), len(x))

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss``, and ``val/constant``: a network that has learnt nothing is not below it."""
        if not self.trainer.sanity_checking:
            self.log("val/loss", self.val_loss.compute(), prog_bar=True, sync_dist=True)
            self.log("val/constant", self.val_constant.compute(), sync_dist=True)
        self.val_loss.reset()
        self.val_constant.reset()

    def configure_optimizers(self) -> Any:
        """The optimizer, and the scheduler if there is one."""
        return made_optimizers(self, self.optimizer, self.scheduler)

    @property
    def _name(self) -> str:
        data: Any = getattr(self.trainer, "datamodule", None)
        return self._chosen(list(getattr(data, "input_arrays", [])))

    def _chosen(self, names: Sequence[str]) -> str:
        if self.input_name is not None:
            return self.input_name
        if len(names) != 1:
            raise CellMapKeyError(f"the batch has the inputs {list(names)}; say which one with input_name")
        return names[0]

    # -- what a run leaves behind

    def write_samples(self, source: SampleSource, path: Path, title: str | None = None, count: int = 4) -> None:
        """Draw tiles: raw, what the network sees, what it makes of it, and in one picture what it said of the hidden.

        Args:
            source: where the samples come from.
            path: the PNG to write.
            title: a line at the top.
            count: tiles at most.
        """
        from cellmap_lightning.training.model_forward import inference_at_precision, precision_of
        from cellmap_lightning.visualization.figures import picture_grid

        name = self._chosen(list(source.layout.inputs))
        rows, headers = [], []
        for position in source.select_tiles(min(count, source.tile_count), self.seed):
            x = source[position][name][None].to(self.device)
            with inference_at_precision(self):
                seen, mask = self.hide(x, [position])
                made = self(precision_of(self).convert_input(seen)).to(x.dtype)
            images = [x, seen, made, torch.where(mask, made, x)]
            rows.append([image[0, 0].float().cpu().numpy() for image in images])
            headers.append(source.locate(position)[0].label)
        columns = ["raw", "what is shown", "reconstruction", "hidden voxels filled in"]
        picture_grid(rows, columns, headers, path=path, title=title)


def _error(made: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the hidden voxels."""
    return ((made.float() - x.float()).square() * mask).sum() / mask.sum()
