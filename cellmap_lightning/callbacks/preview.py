"""Pictures of batches in the log of a training: raw, targets and predictions."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch

from cellmap_lightning.datamodule import CellMapDataModule
from cellmap_lightning.datasets.source import Draw
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError
from cellmap_lightning.loading.dataloader import CellMapDataLoader
from cellmap_lightning.loading.samples import Samples
from cellmap_lightning.training.model_forward import first_line, inputs_of, names_in, predicted_values
from cellmap_lightning.validation import int_at_least, one_of
from cellmap_lightning.visualization.display import prediction_title
from cellmap_lightning.visualization.figures.canvas import as_pixels
from cellmap_lightning.visualization.figures.sheet import contact_sheet
from cellmap_lightning.visualization.preview import show

log = logging.getLogger(__name__)


class BatchPreview(L.Callback):
    """Draws the first batch of an epoch as `training_step` receives it, with predictions beside the targets.

    The picture goes to every logger that accepts pictures (TensorBoard, wandb); for others, such as the CSV logger, a
    PNG is written to ``previews`` in their folder. The model predicts in evaluation mode after the step, on the first
    process only. Its modes and the random state are restored afterwards, so that training is not changed. Strategies
    that split the model over devices are not supported. A picture that cannot be drawn is logged once, and training
    continues.

    Args:
        every_n_epochs: epochs from one picture to the next; 0 for no pictures.
        samples: maximum number of samples of the batch.
        split: ``train``, or ``val`` for the first validation batch, which is the same in every epoch.
        predictions: draw the predictions of the model.
        input_name: the input to draw and to predict from; by default the ``input_name`` of the module, else the
            first.
        target_name: the target to draw, likewise.
        overlay: ``outline``, or ``fill`` to tint the objects as well.

    Raises:
        CellMapKeyError: there is no such split or overlay.
        CellMapValueError: a number is out of range.

    Example:
        >>> Trainer(callbacks=[BatchPreview(every_n_epochs=5, samples=2)])
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
        int_at_least("BatchPreview: every_n_epochs", every_n_epochs, 0)
        int_at_least("BatchPreview: samples", samples, 1)
        one_of("BatchPreview: split", split, ("train", "val"), CellMapKeyError)
        one_of("BatchPreview: overlay", overlay, ("outline", "fill"), CellMapKeyError)
        self.every_n_epochs, self.samples, self.split, self.predictions = every_n_epochs, samples, split, predictions
        self.input_name, self.target_name, self.overlay = input_name, target_name, overlay
        self._done = -1
        self._warned: set[str] = set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the settings fit the data.

        Raises:
            CellMapKeyError: the data have no array of that name.
            CellMapTypeError: the Trainer runs without a `CellMapDataModule`.
        """
        data: Any = getattr(trainer, "datamodule", None)
        if self.every_n_epochs and not isinstance(data, CellMapDataModule):
            raise CellMapTypeError("BatchPreview needs a CellMapDataModule as the Trainer's datamodule")
        for key, arrays in (("input_name", "input_arrays"), ("target_name", "target_arrays")):
            name = getattr(self, key)
            if self.every_n_epochs and name is not None and name not in getattr(data, arrays):
                names = ", ".join(getattr(data, arrays)) or "none"
                raise CellMapKeyError(f"BatchPreview: {key}={name!r} is not in {arrays}; there are {names}")
        self._done = -1
        self._warned.clear()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw the first batch of an epoch."""
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
        """Draw the first validation batch of an epoch."""
        if self.split == "val" and not trainer.sanity_checking and self._due(trainer):
            self._draw(trainer, pl_module, batch, trainer.val_dataloaders)

    def _due(self, trainer: L.Trainer) -> bool:
        """Return whether a picture is due, at most once per epoch."""
        epoch = trainer.current_epoch
        if not self.every_n_epochs or epoch % self.every_n_epochs or epoch == self._done or not trainer.is_global_zero:
            return False
        self._done = epoch  # before drawing: an error must not repeat for every batch
        return True

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, loader: Any) -> None:
        try:
            self._draw_batch(trainer, pl_module, batch, loader)
        except Exception as error:
            self._warn("a batch is not drawn", error)

    def _draw_batch(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, loader: Any) -> None:
        if not isinstance(loader, CellMapDataLoader) or not isinstance(batch, Mapping):
            raise CellMapTypeError(f"batches of one CellMapDataLoader are drawn, got those of {type(loader).__name__}")
        samples = {name: value[: self.samples] for name, value in batch.items()}
        layout = loader.layout
        inputs = inputs_of(pl_module, layout.inputs, self.input_name)
        targets = names_in(layout.targets, self.target_name or getattr(pl_module, "target_name", None))
        target = targets[0] if targets else None
        predicted = self._predicted(pl_module, samples, inputs, len(layout.classes), target)
        previews = show(loader.source, layout, samples, _draws(loader), predicted, inputs[0], target)
        title = f"{self.split}, epoch {trainer.current_epoch}, step {trainer.global_step}"
        figure = contact_sheet(
            [preview.sample for preview in previews], layout.classes, title=title, max_rows=self.samples,
            overlay=self.overlay, predicted=prediction_title(layout.targets[target].kind if target else None),
        )  # fmt: skip
        self._log(trainer, figure)

    def _log(self, trainer: L.Trainer, figure: Any) -> None:
        """Give the picture to every logger that accepts pictures, and write it to the folder of every other one."""
        name, picture = f"preview/{self.split}", as_pixels(figure)
        file = f"previews/{self.split}-epoch{trainer.current_epoch:04d}.png"
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_image"):  # TensorBoard
                experiment.add_image(name, picture, trainer.global_step, dataformats="HWC")
            elif hasattr(logger, "log_image"):  # wandb
                logger.log_image(name, [picture], step=trainer.global_step)
            else:
                self._save(figure, Path(logger.log_dir or trainer.default_root_dir) / file)
        if not trainer.loggers:
            self._save(figure, Path(trainer.default_root_dir) / file)

    @staticmethod
    def _save(figure: Any, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)

    def _predicted(
        self,
        pl_module: L.LightningModule,
        batch: Mapping[str, Any],
        names: Sequence[str],
        classes: int,
        target: str | None,
    ) -> torch.Tensor | None:
        if not self.predictions or not classes:
            return None
        try:
            with _evaluation_mode(pl_module, pl_module.device):
                return predicted_values(pl_module, batch, names, classes, target)
        except Exception as error:
            self._warn("the pictures show no predictions", error)
            return None

    def _warn(self, message: str, error: Exception) -> None:
        """Log the first error of each kind; a missing picture must not end a training."""
        if message not in self._warned:
            self._warned.add(message)
            log.warning("BatchPreview: %s: %s", message, first_line(error))


def _draws(loader: CellMapDataLoader) -> list[Draw]:
    """Return crop, position and transform of the samples of the first batch of the running pass."""
    view = loader.dataset
    numbers = loader.numbers(0)
    return view.draws(numbers) if isinstance(view, Samples) else []


@contextmanager
def _evaluation_mode(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluate a module; every mode and the random state are restored afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        try:
            module.eval()
            yield
        finally:
            for part, mode in modes:
                part.training = mode
