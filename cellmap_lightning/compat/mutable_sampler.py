"""`cellmap_data.mutable_sampler`, of 2025."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class MutableSubsetRandomSampler(Sampler[int]):
    """Positions in random order, exchanged for others by `refresh`; see docs/migration.md.

    Args:
        indices_generator: gives the positions, each time it is called; or the positions themselves.
        rng: the generator of the order; by default torch's global one.
    """

    def __init__(
        self, indices_generator: Callable[[], Sequence[int]] | Sequence[int], rng: torch.Generator | None = None
    ) -> None:
        self.indices_generator, self.rng = indices_generator, rng
        self.refresh()

    def refresh(self) -> None:
        """Draw new positions."""
        given = self.indices_generator
        self.indices: list[int] = list(given() if callable(given) else given)

    def __iter__(self) -> Iterator[int]:
        device = "cpu" if self.rng is None else self.rng.device
        order = torch.randperm(len(self.indices), generator=self.rng, dtype=torch.int64, device=device)
        yield from (self.indices[n] for n in order.tolist())

    def __len__(self) -> int:
        return len(self.indices)
