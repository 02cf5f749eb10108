"""The compact form of a batch, in which it is sent between processes and to the device before it is finished."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, Protocol

import torch

from cellmap_lightning.errors import CellMapTypeError


class Layout(Protocol):
    """The part of a `BatchLayout` that a compact batch uses."""

    def finish(self, batch: Any) -> dict[str, torch.Tensor]: ...  # noqa: D102


class CompactRequest(list[int]):
    """Numbers of samples that are requested as a compact batch; a plain list requests finished samples.

    `CellMapDataLoader` passes these to its dataset. Other loaders around the same dataset or sampler pass plain lists,
    and therefore get finished samples.
    """


class CompactBatch:
    """A batch in its stored types, opaque to user code: inputs as stored, binary targets as bits.

    `CellMapDataModule` finishes it on the device. Access by key raises an error, since stored integers must not be
    mistaken for training data. See docs/batches.md.

    Args:
        tensors: each input ``[N, 1, z, y, x]``, each target (binary: uint8 ``[N, z, y, x, 2 * ceil(classes / 8)]``),
            ``idx`` int64 ``[N]`` (positions) and ``sample`` int64 ``[N]`` (numbers of the samples, which seed random
            value transforms).
        layout: converts to the finished form; None after transfer between processes.
    """

    __slots__ = ("__weakref__", "layout", "tensors")

    def __init__(self, tensors: Mapping[str, torch.Tensor], layout: Layout | None = None) -> None:
        self.tensors = dict(tensors)
        self.layout = layout

    def gathered(self) -> "CompactBatch":
        """Return the batch with all of its tensors; see `ResidentBatch`."""
        return self

    def finish(self) -> dict[str, torch.Tensor]:
        """Return the finished batch, on the device of the tensors.

        Raises:
            CellMapTypeError: the batch has no layout.
        """
        if self.layout is None:
            raise CellMapTypeError("a compact batch from another process has no layout; use loader.layout.finish")
        return self.layout.finish(self)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "CompactBatch":
        """Return a compact batch of ``function(tensor)`` for each tensor."""
        return CompactBatch({name: function(tensor) for name, tensor in self.tensors.items()}, self.layout)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "CompactBatch":
        """Return the batch on a device; from page-locked memory it is copied asynchronously."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "CompactBatch":
        """Return the batch in page-locked memory."""
        return self.map(torch.Tensor.pin_memory)

    def __getstate__(self) -> dict[str, torch.Tensor]:
        return self.tensors  # a layout may hold functions that cannot be pickled

    def __setstate__(self, state: dict[str, torch.Tensor]) -> None:
        self.tensors, self.layout = state, None

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        return f"CompactBatch({shapes})"

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise CellMapTypeError(
            "this batch is compact: it holds stored values, not training data, until it is on the device; the finished "
            "batch is available in on_after_batch_transfer and in the steps. In a loop without "
            "Trainer, CellMapDataLoader yields finished batches, and loader.layout.finish(batch) converts this one"
        )

    def __getitem__(self, key: Any) -> NoReturn:
        self._refuse()

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        self._refuse()

    def __contains__(self, key: Any) -> NoReturn:
        self._refuse()

    def __iter__(self) -> Iterator[Any]:
        self._refuse()

    def __len__(self) -> int:
        self._refuse()

    keys = values = items = get = pop = update = setdefault = copy = _refuse
