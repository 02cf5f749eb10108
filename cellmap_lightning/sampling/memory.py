"""The bytes of a batch, known from its description alone, before anything is read."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FormMemory:
    """Bytes of one form of a batch.

    Attributes:
        arrays: bytes of each array, inputs and targets; ``idx`` is not counted.
    """

    arrays: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(self.arrays.values())

    @property
    def total_mb(self) -> float:
        """The same in MiB."""
        return self.total_bytes / 2**20


@dataclass(frozen=True)
class BatchMemory(FormMemory):
    """Bytes of a finished batch, and of its compact form.

    Attributes:
        compact: the form that travels to the device.
    """

    compact: FormMemory
