"""What a model says of a batch of patches."""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import torch

from cellmap_lightning.batches.layout import BatchLayout
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, Shape
from cellmap_lightning.prediction.blending import Tiling

log = logging.getLogger(__name__)

Activation = Literal["sigmoid", "softmax"]
#: Changes of a probability that can be seen: two steps of uint8.
VISIBLE = 2 / 255


class ModelOutput:
    """Makes what `predict_step` returns the values of patches.

    Args:
        names: of the channels.
        array: name of the array whose patches these are.
        shape: voxels of a patch along its own axes.
        layout: what a batch holds.
        key: where in a mapping the tensor is; by default its only entry.
        activation: for models that give logits.
        tta_flips: axes of the patch over whose mirrored versions the mean is taken.
    """

    def __init__(
        self,
        names: Sequence[str],
        array: str,
        shape: Shape,
        layout: BatchLayout,
        key: str | None = None,
        activation: Activation | None = None,
        tta_flips: str = "",
    ) -> None:
        self.names, self.array, self.shape, self.layout = names, array, shape, layout
        self.key, self.activation, self.tta_flips = key, activation, tta_flips

    def values(self, outputs: Any, count: int, patch: Shape) -> torch.Tensor:
        """What `predict_step` gave, float32 ``[N, C, z, y, x]`` along the axes of the volume.

        Args:
            outputs: what it returned.
            count: patches of the batch.
            patch: voxels of a patch along the axes of the volume.

        Raises:
            CellMapKeyError: a mapping in which it is not said what to take.
            CellMapTypeError: no tensor.
            CellMapValueError: a tensor of another shape.
        """
        if isinstance(outputs, Mapping):
            key = self.key if self.key is not None else next(iter(outputs)) if len(outputs) == 1 else None
            if key not in outputs:
                raise CellMapKeyError(f"predict_step returned {list(outputs)}; say which of them with key=...")
            outputs = outputs[key]
        if not isinstance(outputs, torch.Tensor):
            raise CellMapTypeError(
                f"predict_step must return a tensor [N, C, z, y, x] or a mapping of such, got {type(outputs).__name__}"
            )
        channels, got = len(self.names), tuple(outputs.shape)
        if len(got) > 1 and got[0] == count and got[1] != channels:
            raise CellMapValueError(
                f"predict_step returned {got[1]} channels, and there are {channels} classes: {list(self.names)}"
            )
        if got[:2] != (count, channels) or got[2:] not in (patch, tuple(n for n in patch if n != 1)):
            raise CellMapValueError(
                f"predict_step returned {list(got)}, and {[count, channels, *patch]} was expected: the patch of "
                f"{self.array!r}. A model whose output has another shape or scale than its input needs target_arrays "
                "that say which"
            )
        values = outputs.detach().to(torch.float32)
        if self.activation is not None:
            values = values.sigmoid() if self.activation == "sigmoid" else values.softmax(1)
        # Of a flat patch, rows and columns run along the volume's axes in their order, whatever its plane.
        return values.reshape(count, channels, *patch)

    def over_flips(
        self, values: torch.Tensor, again: Callable[[Mapping[str, Any]], torch.Tensor], batch: Mapping[str, Any]
    ) -> torch.Tensor:
        """The mean over all mirrored versions of a batch, one after the other.

        Args:
            values: of the batch as it is, see `values`.
            again: asks the model about another batch.
            batch: the batch.
        """
        inputs = self.layout.inputs
        thick = [
            n for n, a in enumerate(AXES) if a in self.tta_flips and any(i.window.shape[n] > 1 for i in inputs.values())
        ]
        number = 1
        for count in range(1, len(thick) + 1):
            for axes in combinations(thick, count):
                mirrored = {
                    name: value.flip(_dims(inputs[name].window.shape, axes)) if name in inputs else value
                    for name, value in batch.items()
                }
                # The axes of a flat patch that are longer than 1 lie in the volume in the same order.
                kept = [dim for dim in range(2, 5) if values.shape[dim] != 1]
                back = [kept[dim] for dim in _dims(self.shape, axes)]
                values = values + again(mirrored).flip(back)
                number += 1
        return values / number

    def check_context(
        self,
        tiling: Tiling,
        values: torch.Tensor,
        again: Callable[[Mapping[str, Any]], torch.Tensor],
        batch: Mapping[str, Any],
    ) -> None:
        """Warn where the outermost voxels of the input change what is kept of the output.

        Args:
            tiling: what is kept of a patch.
            values: of the batch as it is, see `values`.
            again: asks the model about another batch.
            batch: the batch.
        """
        if not any(tiling.trim):
            return
        inputs = self.layout.inputs
        other = {
            name: _new_border(value, _dims(inputs[name].window.shape, (0, 1, 2))) if name in inputs else value
            for name, value in batch.items()
        }
        kept = tuple(slice(t, n - t) for t, n in zip(tiling.trim, tiling.patch, strict=True))
        change = float((again(other) - values)[:, :, *kept].abs().max())
        if change > VISIBLE:
            log.warning(
                "the outermost voxels of a patch change what is kept of it by up to %.3g: the model sees further than "
                "the context of %s voxels (z, y, x) on either side, so seams between patches may show. More of it, by "
                "context or a larger patch, makes the change smaller; check_context=False looks for none",
                change, list(tiling.trim),
            )  # fmt: skip


def _dims(shape: Shape, axes: Sequence[int]) -> list[int]:
    """Where the axes of a patch are in a batch of it, which has none of length 1; counted from the end."""
    kept = [axis for axis in range(3) if shape[axis] != 1]
    return [kept.index(axis) - len(kept) for axis in axes if axis in kept]


def _new_border(value: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """A batch whose outermost voxels come from elsewhere in it."""
    found, turned = value.clone(), value.flip(list(dims))
    for dim in dims:
        for end in (0, value.shape[dim] - 1):
            middle = turned.select(dim, value.shape[dim] // 2)
            found.select(dim, end).copy_(middle)
    return found
