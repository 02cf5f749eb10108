"""The compact form of a batch: what travels between processes and to the device, before it is finished."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, Protocol

import torch

from cellmap_lightning.errors import CellMapTypeError


class Layout(Protocol):
    """Makes the finished form of a batch; see `BatchLayout`."""

    def finish(self, batch: Any) -> dict[str, torch.Tensor]: ...  # noqa: D102


class CompactRequest(list[int]):
    """Numbers of samples that are requested as a compact batch; a plain list requests finished samples.

    `CellMapDataLoader` sends these to its dataset. A loader that others build around the same dataset or sampler sends
    plain lists, and therefore gets finished samples.
    """


class CompactBatch:
    """A batch in its stored types, opaque to user code: inputs as stored, binary targets as bits.

    `CellMapDataModule` finishes it when it is on the device. Access by key raises an error: stored integers must not be
    taken for training data.

    Args:
        tensors: each input ``[N, 1, z, y, x]``, each target (binary: uint8 ``[N, z, y, x, 2 * ceil(classes / 8)]``),
            ``idx`` int64 ``[N]`` (positions) and ``sample`` int64 ``[N]`` (numbers of the samples, which seed random
            value transforms).
        layout: makes the finished batch; None while it travels between processes.
    """

    __slots__ = ("__weakref__", "layout", "tensors")

    def __init__(self, tensors: Mapping[str, torch.Tensor], layout: Layout | None = None) -> None:
        self.tensors = dict(tensors)
        self.layout = layout

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
        """Return the batch on a device, where it is copied asynchronously from page-locked memory."""
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
            "Trainer, CellMapDataLoader yields finished batches, and loader.layout.finish(batch) makes one of this"
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
