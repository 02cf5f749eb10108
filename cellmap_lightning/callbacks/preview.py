"""Log pictures of batches: raw, targets and what the model says of them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch

from cellmap_lightning.datamodule import CellMapDataModule
from cellmap_lightning.datasets.source import Draw
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.loading.dataloader import CellMapDataLoader
from cellmap_lightning.loading.samples import Samples
from cellmap_lightning.training.model_forward import class_probabilities, first_line, names_in
from cellmap_lightning.visualization.figures.canvas import as_pixels
from cellmap_lightning.visualization.figures.sheet import contact_sheet
from cellmap_lightning.visualization.preview import show

log = logging.getLogger(__name__)


class BatchPreview(L.Callback):
    """Draws the first batch of an epoch as `training_step` saw it, with predictions beside the targets.

    The picture goes to every logger that takes pictures (TensorBoard, wandb); for others, such as the CSV logger, a PNG
    is written to ``previews`` in their folder. The model is asked in evaluation mode after the step, on the first
    process alone, and training goes on as if it had not been: neither its modes nor random numbers change. Not for
    strategies that split the model over devices. What cannot be drawn is logged once, and training continues.

    Args:
        every_n_epochs: how often; 0 for never.
        samples: of the batch, at most.
        split: ``train``, or ``val`` for the first validation batch, which is the same in every epoch.
        predictions: whether to ask the model.
        input_name: the input that is shown and predicted from; by default the module's own ``input_name``, else the
            first.
        target_name: the target that is shown, likewise.
        overlay: ``outline``, or ``fill`` to tint the insides as well.

    Raises:
        CellMapKeyError: there is no such split or overlay.
        CellMapValueError: a number that cannot be one.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        samples: int = 4,
        split: str = "train",
        predictions: bool = True,
        input_name: str | None = None,
        target_name: str | None = None,
        overlay: Any = "outline",
    ) -> None:
        for name, value, least in (("every_n_epochs", every_n_epochs, 0), ("samples", samples, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise CellMapValueError(
                    f"BatchPreview: {name} must be a whole number of at least {least}, got {value!r}"
                )
        if split not in ("train", "val"):
            raise CellMapKeyError(f"BatchPreview: split is train or val, got {split!r}")
        if overlay not in ("outline", "fill"):
            raise CellMapKeyError(f"BatchPreview: overlay is outline or fill, got {overlay!r}")
        self.every_n_epochs, self.samples, self.split, self.predictions = every_n_epochs, samples, split, predictions
        self.input_name, self.target_name, self.overlay = input_name, target_name, overlay
        self._done = -1
        self._warned: set[str] = set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse settings that do not fit the data.

        Raises:
            CellMapKeyError: the data have no array of that name.
            CellMapTypeError: the Trainer runs without a `CellMapDataModule`.
        """
        data: Any = getattr(trainer, "datamodule", None)
        if self.every_n_epochs and not isinstance(data, CellMapDataModule):
            raise CellMapTypeError("BatchPreview needs a CellMapDataModule as the Trainer's datamodule")
        for key, there in (("input_name", "input_arrays"), ("target_name", "target_arrays")):
            name = getattr(self, key)
            if self.every_n_epochs and name is not None and name not in getattr(data, there):
                listed = ", ".join(getattr(data, there)) or "none"
                raise CellMapKeyError(f"BatchPreview: {key}={name!r} is not in {there}; there are {listed}")
        self._done = -1
        self._warned.clear()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The first one of an epoch is drawn."""
        if self.split == "train" and self._due(trainer):
            self._draw(trainer, pl_module, batch, trainer.train_dataloader)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Likewise."""
        if self.split == "val" and not trainer.sanity_checking and self._due(trainer):
            self._draw(trainer, pl_module, batch, trainer.val_dataloaders)

    def _due(self, trainer: L.Trainer) -> bool:
        epoch = trainer.current_epoch
        if not self.every_n_epochs or epoch % self.every_n_epochs or epoch == self._done or not trainer.is_global_zero:
            return False
        self._done = epoch
        return True

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, loader: Any) -> None:
        try:
            self._draw_batch(trainer, pl_module, batch, loader)
        except Exception as error:
            self._warn("a batch is not drawn", error)

    def _draw_batch(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, loader: Any) -> None:
        if not isinstance(loader, CellMapDataLoader) or not isinstance(batch, Mapping):
            raise CellMapTypeError(f"batches of one CellMapDataLoader are drawn, not those of {type(loader).__name__}")
        some = {name: value[: self.samples] for name, value in batch.items()}
        module: Any = pl_module
        inputs, targets = loader.layout.inputs, loader.layout.targets
        names = names_in(inputs, self.input_name or getattr(module, "input_name", None))
        target_name = next(iter(names_in(targets, self.target_name or getattr(module, "target_name", None))), None)
        predicted = self._predicted(pl_module, some, names, len(loader.layout.classes))
        shown = show(loader.source, loader.layout, some, _draws(loader), predicted, names[0], target_name)
        name = f"preview/{self.split}"
        title = f"{self.split}, epoch {trainer.current_epoch}, step {trainer.global_step}"
        figure = contact_sheet(
            [one.sample for one in shown], loader.layout.classes, title=title, max_rows=self.samples,
            overlay=self.overlay,
        )  # fmt: skip
        picture = as_pixels(figure)
        file = f"{self.split}-epoch{trainer.current_epoch:04d}.png"
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_image"):
                experiment.add_image(name, picture, trainer.global_step, dataformats="HWC")
            elif hasattr(logger, "log_image"):
                logger.log_image(name, [picture], step=trainer.global_step)
            else:
                self._save(figure, Path(logger.log_dir or trainer.default_root_dir) / "previews" / file)
        if not trainer.loggers:
            self._save(figure, Path(trainer.default_root_dir) / "previews" / file)

    @staticmethod
    def _save(figure: Any, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)

    def _predicted(
        self, pl_module: L.LightningModule, batch: Mapping[str, Any], names: Sequence[str], classes: int
    ) -> torch.Tensor | None:
        if not self.predictions or not classes:
            return None
        try:
            with _as_if_nothing_happened(pl_module, pl_module.device):
                return class_probabilities(pl_module, batch, names, classes)
        except Exception as error:
            self._warn("the pictures show no predictions", error)
            return None

    def _warn(self, what: str, error: Exception) -> None:
        """Log an error, the first of each kind: a picture is no reason to end a training."""
        if what not in self._warned:
            self._warned.add(what)
            log.warning("BatchPreview: %s: %s", what, first_line(error))


def _draws(loader: CellMapDataLoader) -> list[Draw]:
    """How the first batch of the pass under way was drawn."""
    view = loader.dataset
    numbers = loader.numbers(0)
    return view.draws(numbers) if isinstance(view, Samples) else []


@contextmanager
def _as_if_nothing_happened(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every mode and the random numbers are what they were."""
    modes = [(part, part.training) for part in module.modules()]
    other = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(other, device_type="cuda" if device.type == "cpu" else device.type):
        try:
            module.eval()
            yield
        finally:
            for part, mode in modes:
                part.training = mode
