"""The position in the stream of samples, saved in checkpoints and restored by resumed runs."""

import itertools
import math
from collections.abc import Mapping
from typing import Any, Protocol

from cellmap_lightning.errors import CellMapKeyError
from cellmap_lightning.loading.sampler import StreamSampler


class Steps(Protocol):
    """A Trainer's own count of the training batches of an epoch; see docs/runs.md.

    Attributes:
        done: batches whose step has ended.
        ended: True if the last of them was the last of its epoch.
        alone: True if the Trainer has one training loader.
    """

    @property
    def done(self) -> int: ...  # noqa: D102

    @property
    def ended(self) -> bool: ...  # noqa: D102

    @property
    def alone(self) -> bool: ...  # noqa: D102

    def continue_from(self, done: int) -> None:
        """Set the count of batches done, in batches of the current size."""

    def restore_positions(self) -> None:
        """Apply the positions of a checkpoint to the training loaders, unless that was done already."""


class StreamPosition:
    """The position of a loader in its stream of samples.

    A position counts samples, not batches, so that a run can be resumed with another batch size or number of ranks.
    See docs/runs.md.

    Args:
        sampler: the loader's own sampler.
        batch_size: largest number of samples in a batch, per rank.
        drop_last: an incomplete last batch is dropped.
        steps: the Trainer's count of batches; None to count the batches that were delivered.
    """

    def __init__(self, sampler: StreamSampler, batch_size: int, drop_last: bool, steps: Steps | None) -> None:
        self.sampler, self.batch_size, self.drop_last, self.steps = sampler, batch_size, drop_last, steps
        #: Batches that the running pass has delivered.
        self.delivered = 0
        self.running = False
        #: The state that the next pass continues from.
        self._resume: dict[str, int] | None = None
        self._steps_before = 0
        #: The argument of the last `set_epoch`; -1 if there was no call.
        self._set_epoch = -1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"steps": None}  # a Trainer cannot always be pickled

    def start(self) -> None:
        """Begin a pass, in the middle of its epoch if a run is resumed there."""
        sampler = self.sampler
        resume, self._resume = self._resume, None
        skip = 0
        if resume is not None:
            if resume["over"]:
                later = sampler.next_epoch > resume["epoch"]
            elif resume["epoch"] == sampler.next_epoch:
                later, skip = False, resume["samples"]
            else:
                # With max_steps, Lightning counts an epoch too many if a checkpoint was saved at the end of one.
                later = self.batches_left(resume["samples"]) == 0
            if later:
                # Its samples follow those of the epoch in the state.
                sampler.begin_at(sampler.next_epoch, resume["first"] + sampler.count)
        sampler.start(skip)
        self.delivered, self.running = 0, True
        self._steps_before = self.steps.done if self.steps is not None else 0

    def numbers(self, batch: int) -> list[int]:
        """Return the numbers of the samples of a batch of the running pass, else of the next one; counted from 0."""
        sampler = self.sampler
        epoch, skip = sampler.epoch, sampler.skip
        if not self.running:
            sampler.epoch, sampler.skip = sampler.next_epoch, 0
        try:
            return list(itertools.islice(sampler.numbers(), batch * self.batch_size, (batch + 1) * self.batch_size))
        finally:
            sampler.epoch, sampler.skip = epoch, skip

    def batches_left(self, samples: int) -> int:
        """Return the number of batches of this rank left in an epoch after ``samples`` over all ranks."""
        left = self.sampler.left(samples)
        return left // self.batch_size if self.drop_last else math.ceil(left / self.batch_size)

    def epoch_of(self, epoch: int) -> int:
        """Return the epoch of the next pass, when a Trainer or a loop sets one.

        A Trainer sets it before the first batch, when it has restored its own count: the positions of a checkpoint are
        applied here. Lightning applies them too, but not if the module's ``configure_optimizers`` had the loaders
        created early (Lightning issue 20550).
        """
        if self.steps is not None:
            self.steps.restore_positions()
        self._set_epoch = epoch
        resume = self._resume
        if resume is None or resume["given"] < 0:
            return epoch
        if epoch == resume["given"]:
            return resume["epoch"]  # a shorter loader beside others has several passes in an epoch of the Trainer
        resume["over"] = 1
        return epoch

    def state(self) -> dict[str, int]:
        """Return the state, see `CellMapDataLoader.state_dict`."""
        if self._resume is not None:
            return {key: value for key, value in self._resume.items() if key != "over"}
        sampler = self.sampler
        epoch, samples = sampler.next_epoch, 0
        if self.running:
            done = self.delivered if self.steps is None else self.steps.done - self._steps_before
            epoch, samples = sampler.epoch, sampler.skip + done * self.batch_size * sampler.num_replicas
        return {
            "epoch": epoch, "first": sampler.first(epoch), "samples": min(samples, sampler.count),
            "count": sampler.count, "given": self._set_epoch,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            CellMapKeyError: keys of the state are missing.
        """
        missing = sorted({"epoch", "first", "samples"} - set(state))
        if missing:
            raise CellMapKeyError(
                f"the state of a loader lacks {', '.join(missing)}; it must have epoch, first and samples"
            )
        sampler = self.sampler
        epoch, first, samples = (int(state[name]) for name in ("epoch", "first", "samples"))
        count, set_epoch = (int(state.get(name, -1)) for name in ("count", "given"))
        # The Trainer may have ended the epoch before its last sample, by limit_train_batches. Or epochs are shorter
        # now: then this one has ended, and the next one begins after the samples that are done.
        ended = self.steps is not None and self.steps.ended and self.batches_left(samples) > 0
        if samples > sampler.count or ended:
            if count != sampler.count:
                first += samples - sampler.count
            samples = sampler.count
        sampler.begin_at(epoch, first)
        sampler.resume_at(epoch)
        self._resume = {
            "epoch": epoch, "first": first, "samples": samples, "count": sampler.count, "given": set_epoch,
            "over": int(ended),
        }  # fmt: skip
        self.running = False
        if self.steps is not None and self.steps.alone:
            self.steps.continue_from(self.batches_left(0) - self.batches_left(samples))
