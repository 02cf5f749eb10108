"""The parts of Lightning's Trainer that a data module depends on: its loaders, count of batches and hooks."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import lightning as L

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.loading.dataloader import CellMapDataLoader


class HoldsPositions(Protocol):
    """The part of a data module that resuming needs; see docs/runs.md.

    Attributes:
        resume_positions: positions from a checkpoint that were not applied yet, one per training loader.
    """

    resume_positions: list[dict[str, int]]


def _leaves(node: Any) -> Iterator[Any]:
    if isinstance(node, Mapping):
        node = list(node.values())
    if isinstance(node, list | tuple):
        for child in node:
            yield from _leaves(child)
    elif node is not None:
        yield getattr(node, "loader", node)  # of a `Stream`


def used_loaders(trainer: L.Trainer | None) -> list[Any]:
    """Return the loaders whose batches the loops of a Trainer take."""
    if trainer is None:
        return []
    stages = (trainer.train_dataloader, trainer.val_dataloaders, trainer.test_dataloaders, trainer.predict_dataloaders)
    return [loader for stage in stages for loader in _leaves(stage)]


def training_loaders(trainer: L.Trainer | None) -> list[CellMapDataLoader]:
    """Return the training loaders of a Trainer that are of this package."""
    loaders = trainer.train_dataloader if trainer is not None else None
    return [loader for loader in _leaves(loaders) if isinstance(loader, CellMapDataLoader)]


def touches_before_transfer(trainer: L.Trainer | None, data: L.LightningDataModule) -> bool:
    """Return True if ``on_before_batch_transfer`` of the module or the data module is user code."""
    name = "on_before_batch_transfer"
    stock = {getattr(L.LightningModule, name), getattr(L.LightningDataModule, name)}
    module = trainer.lightning_module if trainer is not None else None
    return any(getattr(getattr(owner, name, None), "__func__", None) not in stock for owner in (module, data) if owner)


class Stream:
    """An iterable over the batches of a loader that Lightning does not modify, used for predictions.

    It is no `DataLoader`, which Lightning would rebuild to predict and distribute over the ranks itself; and it has no
    length, since a process whose blocks are all finished has no batch. See docs/prediction.md.

    Args:
        loader: the loader.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class TrainingSteps:
    """A Trainer's count of the batches of a training epoch.

    Counting the batches whose step has ended makes resuming exact, also if a signal triggers a checkpoint in the middle
    of a step. A run that is resumed with another batch size has done another number of batches than the checkpoint
    records: without correction its epoch would end too early or too late. See docs/runs.md.

    Args:
        trainer: the Trainer.
        data: the data module of the loader.
    """

    def __init__(self, trainer: L.Trainer, data: HoldsPositions) -> None:
        self._trainer, self.data = trainer, data

    @property
    def done(self) -> int:
        """The number of batches of this epoch whose step has ended."""
        return int(self._current.processed)

    @property
    def ended(self) -> bool:
        """True if the last batch was the last of its epoch."""
        return bool(self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)

    @property
    def alone(self) -> bool:
        """True if the Trainer has one training loader."""
        return len(list(_leaves(self._trainer.train_dataloader))) < 2

    @property
    def _current(self) -> Any:
        return self._trainer.fit_loop.epoch_loop.batch_progress.current

    def continue_from(self, done: int) -> None:
        """Set the count of batches done."""
        current = self._current
        shift = done - current.processed
        # Lightning's four counters of a batch move together.
        for name in ("ready", "started", "processed", "completed"):
            setattr(current, name, getattr(current, name) + shift)

    def restore_positions(self) -> None:
        """Apply the positions that a checkpoint of the data module holds to the training loaders, once."""
        positions, self.data.resume_positions = self.data.resume_positions, []
        loaders = training_loaders(self._trainer)
        if positions and len(positions) != len(loaders):
            raise CellMapValueError(
                f"the checkpoint was saved with {len(positions)} training loaders, got {len(loaders)}; "
                "resume with the loaders of that training"
            )
        for loader, position in zip(loaders, positions, strict=False):
            loader.load_state_dict(position)
