"""The summary of a prediction."""

from collections.abc import Mapping
from dataclasses import dataclass

from cellmap_lightning.wording import large_count, plural


@dataclass
class Summary:
    """Counts and times of a prediction, attribute `PredictionWriter.summary`.

    They are of this process and this run, except ``blocks``, ``finished`` and ``fractions``. See docs/prediction.md.

    Attributes:
        blocks: number of blocks of the whole prediction.
        finished: number of finished blocks.
        written: number of blocks that this process wrote.
        skipped: number of blocks that it skipped, as there is nothing to predict in them.
        voxels: number of voxels that it wrote, of one channel.
        seconds: time from the first batch to the last block.
        waited: the part of ``seconds`` spent waiting for batches.
        stored: the part of ``seconds`` spent blending, and waiting for a block to be written.
        fractions: fraction of the finished voxels of each class that reach the threshold.
        complete: True if all blocks are finished and the pyramids are built.
    """

    blocks: int = 0
    finished: int = 0
    written: int = 0
    skipped: int = 0
    voxels: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    stored: float = 0.0
    fractions: Mapping[str, float] | None = None
    complete: bool = False

    def __str__(self) -> str:
        model = max(0.0, self.seconds - self.waited - self.stored)
        speed = self.voxels / self.seconds if self.seconds else 0
        blocks = (
            f"{self.finished:,} of {plural(self.blocks, 'block')} done, {self.written:,} of them by this run: "
            f"{large_count(self.voxels)} voxels in {self.seconds:.3g} s, {large_count(speed)} per second"
        )
        times = (
            f"of the time: waiting for data {self.waited:.3g} s, model {model:.3g} s, "
            f"blending and writing {self.stored:.3g} s"
        )
        if self.blocks and self.complete and self.finished == self.blocks and not self.written + self.skipped:
            blocks, times = f"complete already: {plural(self.blocks, 'block')}", ""
        lines = [f"{blocks}; {self.skipped} more were skipped" if self.skipped else blocks, *([times] if times else [])]
        lines += [f"{name:<12} {part:.2%} of the voxels are positive" for name, part in (self.fractions or {}).items()]
        return "\n".join(lines)
