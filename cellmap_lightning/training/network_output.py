"""Calls of a network, with one error for an output that does not fit the targets."""

import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor, nn

from cellmap_lightning.errors import CellMapError, CellMapTypeError, CellMapValueError
from cellmap_lightning.training.deep_supervision import scales_of
from cellmap_lightning.training.heads import Head
from cellmap_lightning.validation import first_few
from cellmap_lightning.wording import plural

#: Errors by which layers refuse an input. Others, such as AttributeError, are mistakes in code, whose traceback helps.
_REFUSALS = (RuntimeError, ValueError, IndexError, AssertionError)
_CONVOLUTIONS = {2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}


class NetworkCall:
    """A network with the shape that its output must have.

    Args:
        network: the network.
        inputs: its inputs, ``[N, 1, ...]``.
        targets: ``[N, C, ...]``, one per head.
        heads: the heads, in order of the channels; without any, the output must have the shape of the only target.
    """

    def __init__(
        self, network: nn.Module, inputs: Sequence[Tensor], targets: Sequence[Tensor], heads: Sequence[Head] = ()
    ) -> None:
        self.network, self.inputs, self.targets, self.heads = network, inputs, targets, heads
        channels = sum(head.kind.outputs for head in heads) if heads else targets[0].shape[1]
        self.wanted = [len(targets[0]), channels, *targets[0].shape[2:]]

    @property
    def name(self) -> str:
        """The class of the network."""
        return type(self.network).__name__

    def run(self, forward: Callable[..., Any]) -> Any:
        """Call the network; an error of its layers is raised with the shapes.

        Args:
            forward: called with the inputs, as the network is.

        Raises:
            CellMapValueError: a layer refuses the input.
        """
        try:
            return forward(*self.inputs)
        except _REFUSALS as error:
            if isinstance(error, CellMapError) or is_oom_error(error):
                raise
            shapes = ", ".join(str(list(x.shape)) for x in self.inputs)
            raise CellMapValueError(
                f"{self.name}: the network fails with the input {shapes} ({self._axes}){_line(error)}: "
                f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}; it must return {self.wanted} of "
                f"it{self._dimensions()}"
            ) from error

    def scales(self, output: Any) -> list[Tensor]:
        """Return the scales of an output, the one of full resolution first, after a check of their shapes.

        Args:
            output: of the network; see `scales_of`.

        Raises:
            CellMapTypeError: it is no tensor, and no list of tensors.
            CellMapValueError: it has other axes, channels or voxels than the targets.
        """
        try:
            scales = scales_of(output, self.targets[0].ndim)
        except CellMapTypeError as error:
            keys = f" with the keys {first_few([*output])}" if isinstance(output, dict) else ""
            raise CellMapTypeError(f"{self.name}: {error}{keys}; return the logits alone, {self.wanted}") from None
        several = f"; of the {plural(len(scales), 'output')} that it returns the first is meant" * (len(scales) > 1)
        if scales[0].ndim != len(self.wanted):
            raise CellMapValueError(
                f"{self.name}: the network returns {plural(scales[0].ndim, 'axis', 'axes')}, and the targets have "
                f"{len(self.wanted)}: {self._shapes(scales[0])}{several}"
            )
        self._check_channels(scales[0], several)
        for head, target in zip(self.heads or (None,), self.targets, strict=True):
            self._check_voxels(head.name if head else None, scales[0], target, several)
        if not isinstance(output, Tensor):  # MONAI's stacked outputs are of one size
            self._check_scales(scales)
        return scales

    def _check_scales(self, scales: Sequence[Tensor]) -> None:
        for number, (before, scale) in enumerate(pairwise(scales), 2):
            start = (
                f"{self.name}: the network returns {len(scales)} tensors, which are read as the same output at lower "
                f"and lower resolutions (deep supervision), and number {number} is {list(scale.shape)} where number "
            )
            if scale.ndim != scales[0].ndim or scale.shape[1] != scales[0].shape[1]:
                raise CellMapValueError(f"{start}1 is {list(scales[0].shape)}; return the logits alone, {self.wanted}")
            smaller = [n <= m for n, m in zip(scale.shape[2:], before.shape[2:], strict=True)]
            if not all(smaller) or scale.shape == before.shape:
                raise CellMapValueError(
                    f"{start}{number - 1} is {list(before.shape)}; for several targets return one tensor with the "
                    "channels of all, in the order of task.target_name, or write a module with the losses of both "
                    "(docs/own_module.md); else return the logits alone, or for deep supervision at one resolution "
                    "torch.stack(outputs, 1)"
                )

    @property
    def _axes(self) -> str:
        return "N, C, z, y, x" if self.inputs[0].ndim == 5 else "N, C, y, x"

    def _shapes(self, output: Tensor) -> str:
        shapes = ", ".join(str(list(x.shape)) for x in self.inputs)
        return f"input {shapes} ({self._axes}), output {list(output.shape)}, needed {self.wanted}"

    def _check_channels(self, output: Tensor, several: str) -> None:
        count, needed = output.shape[1], self.wanted[1]
        if count == needed:
            return
        parts = ", ".join(f"{head.name} ({head.kind.name}) {head.kind.outputs}" for head in self.heads)
        raise CellMapValueError(
            f"{self.name}: the network returns {plural(count, 'channel')}, and the targets need {needed}"
            f"{f': {parts}' if parts else ''}; {self._shapes(output)}; set its out_channels to {needed}{several}"
        )

    def _check_voxels(self, name: str | None, output: Tensor, target: Tensor, several: str) -> None:
        got, needed = list(output.shape[2:]), list(target.shape[2:])
        if got == needed:
            return
        which = "the input" if name is None else f"the target {name!r}"
        raise CellMapValueError(
            f"{self.name}: {which} has {needed} voxels, and the network returns {got}; {self._shapes(output)}; "
            f"{self._remedy(name, got, needed)}{several}"
        )

    def _remedy(self, name: str | None, got: Sequence[int], needed: Sequence[int]) -> str:
        """Return how voxels of output and target become the same."""
        key = f"data.target_arrays.{name}"
        factors = [n / m if m else 0.0 for n, m in zip(needed, got, strict=True)]
        if all(factor >= 1 and factor.is_integer() for factor in factors):
            text = "x".join(f"{factor:g}" for factor in factors)
            other = f", or give {key} the shape of the output, and a scale {text} times that of the input"
            return f"upsample the output by {text}{'' if name is None else other}"
        if any(factor < 1 for factor in factors):
            return "crop the output" if name is None else f"crop the output, or give {key} its shape"
        other = f", or give {key} the shape of the output, {list(got)}: targets are then at the centre of the patch"
        return f"pad the convolutions (padding='same'){'' if name is None else other}"

    def _dimensions(self) -> str:
        """Return the remedy for a network of slices that gets volumes, or the other way round."""
        got = self.inputs[0].ndim - 2
        layers = {n for n, kinds in _CONVOLUTIONS.items() if any(isinstance(m, kinds) for m in self.network.modules())}
        if got not in _CONVOLUTIONS or layers != {5 - got}:
            return ""
        if got == 3:
            return "; its layers are those of slices: a patch.shape with a 1, as [1, 64, 64], gives slices"
        return "; its layers are those of volumes: a patch.shape without a 1, as [64, 64, 64], gives volumes"


def _line(error: BaseException) -> str:
    """Return the last line of code outside of torch that an error has passed; "" without one."""
    torch_folder = Path(torch.__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) != Path(__file__)]
    own = [frame for frame in frames if torch_folder not in Path(frame.filename).parents]
    outside = [frame for frame in own if "cellmap_lightning" not in Path(frame.filename).parts]
    return f" in {Path(outside[-1].filename).name}, line {outside[-1].lineno}" if outside else ""
