"""Masked reconstruction as a self-supervised task: a network predicts hidden parts of raw, without annotation."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.runtime.rng import HIDE, uniforms
from cellmap_lightning.training.masked import MeanOverSamples
from cellmap_lightning.training.network_output import NetworkCall
from cellmap_lightning.training.restorable import RestorableTask
from cellmap_lightning.training.task import build_optimizers, select_array

#: More positions than any dataset has, so that ``position + epoch * _POSITIONS`` is unique.
_POSITIONS = 1 << 44


class ReconstructionTask(RestorableTask):
    """Masked reconstruction, after He et al., "Masked autoencoders are scalable vision learners" (arXiv:2111.06377).

    Blocks of a sample are replaced by the mean of the visible voxels, and the loss is the mean squared error over the
    hidden voxels. The hidden blocks are a function of (seed, epoch, position), in validation of (seed, position).

    Args:
        network: from ``[N, 1, z, y, x]`` (or ``[N, 1, y, x]``) to the same shape.
        optimizer: from parameters to an optimizer; by default AdamW with a learning rate of 1e-3.
        scheduler: from an optimizer to a scheduler that steps each epoch, or None.
        hidden: fraction of the blocks that is hidden, between 0 and 1; at least one block is hidden and one visible.
        block: edge lengths of a block, voxels, z y x; slices use the last two. Where they do not divide the
            patch, the last blocks are smaller.
        input_name: the input of the batch; by default the only one.
        seed: seed of the hidden blocks.

    Raises:
        CellMapValueError: ``hidden`` or ``block`` is invalid.

    Example:
        >>> network = monai.networks.nets.UNet(3, 1, 1, channels=(16, 32), strides=(2,))
        >>> trainer.fit(ReconstructionTask(network, hidden=0.5), datamodule=data)
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
            raise CellMapValueError(f"hidden must be between 0 and 1 (fraction of the blocks), got {hidden}")
        if not all(isinstance(n, int) and n >= 1 for n in block) or len(block) not in (2, 3):
            raise CellMapValueError(f"block must be whole numbers of voxels (z, y, x), got {block!r}")
        self.network = network
        self.optimizer, self.scheduler = optimizer, scheduler
        self.hidden, self.block = hidden, tuple(block)
        self.input_name = input_name
        self.seed = seed
        self.val_loss = MeanOverSamples()
        self.val_constant = MeanOverSamples()
        self._has_run = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of a partly hidden input."""
        out: Tensor = self.network(x)
        return out

    def hide(self, x: Tensor, positions: Sequence[int], epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Replace blocks of a batch by the mean of the visible voxels.

        Args:
            x: ``[N, 1, ...]``.
            positions: positions of its samples in the dataset.
            epoch: the epoch, which changes the blocks.

        Returns:
            The batch with the hidden blocks replaced, and their mask, boolean ``[N, 1, ...]``.

        Raises:
            CellMapValueError: the patch is a single block, or has more axes than ``block``.
        """
        shape = x.shape[2:]
        if len(self.block) < len(shape):
            raise CellMapValueError(f"block={list(self.block)} has fewer axes than the patch, {list(shape)}")
        block = self.block[-len(shape) :]
        blocks = [-(-n // b) for n, b in zip(shape, block, strict=True)]
        count = math.prod(blocks)
        if count < 2:
            raise CellMapValueError(
                f"block={list(block)} hides all {list(shape)} voxels of the patch; use smaller blocks"
            )
        numbers = [position + epoch * _POSITIONS for position in positions]
        # The blocks with the smallest of one random number per block.
        order = torch.from_numpy(uniforms(self.seed, HIDE, numbers, count)).argsort(1)
        hidden = torch.zeros(order.shape, dtype=torch.bool, device="cpu")
        hidden.scatter_(1, order[:, : min(max(round(self.hidden * count), 1), count - 1)], True)
        mask = hidden.reshape(-1, 1, *blocks).to(x.device)
        for axis, b in enumerate(block, 2):  # from blocks to voxels; the last block of an axis may be cut off
            mask = mask.repeat_interleave(b, axis).narrow(axis, 0, x.shape[axis])
        axes = list(range(1, x.ndim))
        mean = (x * ~mask).sum(axes, keepdim=True) / (~mask).sum(axes, keepdim=True)
        return torch.where(mask, mean.to(x.dtype), x), mask

    # -- steps

    def _output(self, seen: Tensor) -> Tensor:
        """Return the reconstruction of a partly hidden input, after a check of its shape; see `NetworkCall`."""
        call = NetworkCall(self.network, [seen], [seen])
        output = self(seen) if self._has_run else call.run(self)
        (full, *_) = call.scales(output)
        self._has_run = True
        return full

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch, logged as ``train/loss``."""
        x = batch[self._name]
        seen, mask = self.hide(x, batch["idx"].tolist(), self.current_epoch)
        loss = _error(self._output(seen), x, mask)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x))
        return loss

    def metric_names(self) -> list[str]:
        """Return the names of all metrics of a training."""
        return ["val/loss", "val/constant", "train/loss"]

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add the loss of a batch, and that of the constant in the hidden blocks."""
        x = batch[self._name]
        seen, mask = self.hide(x, batch["idx"].tolist())
        self.val_loss.update(_error(self._output(seen), x, mask), len(x))
        self.val_constant.update(_error(seen, x, mask), len(x))

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss``, and ``val/constant`` as the baseline that a trained network is below."""
        if not self.trainer.sanity_checking:
            self.log("val/loss", self.val_loss.compute(), prog_bar=True, sync_dist=True)
            self.log("val/constant", self.val_constant.compute(), sync_dist=True)
        self.val_loss.reset()
        self.val_constant.reset()

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and the scheduler if there is one."""
        return build_optimizers(self, self.optimizer, self.scheduler)

    @property
    def _name(self) -> str:
        data: Any = getattr(self.trainer, "datamodule", None)
        return select_array("input", self.input_name, list(getattr(data, "input_arrays", [])))

    # -- pictures of a run

    def write_samples(self, source: SampleSource, path: Path, title: str | None = None, count: int = 4) -> None:
        """Draw tiles: raw, the partly hidden input, its reconstruction, and raw with the hidden voxels filled in.

        Args:
            source: the samples to choose from.
            path: the PNG to write.
            title: a line at the top.
            count: tiles at most.
        """
        from cellmap_lightning.training.model_forward import inference_at_precision, precision_of
        from cellmap_lightning.visualization.figures import picture_grid

        name = select_array("input", self.input_name, list(source.layout.inputs))
        rows, headers = [], []
        for position in source.select_tiles(min(count, source.tile_count), self.seed):
            x = source[position][name][None].to(self.device)
            with inference_at_precision(self):
                seen, mask = self.hide(x, [position])
                output = self(precision_of(self).convert_input(seen)).to(x.dtype)
            images = [x, seen, output, torch.where(mask, output, x)]
            rows.append([image[0, 0].float().cpu().numpy() for image in images])
            headers.append(source.locate(position)[0].label)
        columns = ["raw", "visible to the network", "reconstruction", "hidden voxels filled in"]
        picture_grid(rows, columns, headers, path=path, title=title)


def _error(output: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error over the hidden voxels."""
    return ((output.float() - x.float()).square() * mask).sum() / mask.sum()
