"""Post-processing of `predict_step` outputs: checks, activation, test-time augmentation."""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import torch

from cellmap_lightning.batches.layout import BatchLayout
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, Shape
from cellmap_lightning.prediction.blending import Tiling
from cellmap_lightning.validation import did_you_mean

log = logging.getLogger(__name__)

Activation = Literal["sigmoid", "softmax"]
#: Smallest visible change of a probability: two steps of uint8.
VISIBLE = 2 / 255


class ModelOutput:
    """The conversion of the outputs of `predict_step` to values of patches; see docs/prediction.md.

    Args:
        names: names of the channels.
        array: name of the array that defines the patches.
        shape: voxels of a patch along its own axes.
        layout: layout of the batches.
        key: key of the tensor in a mapping; by default its only entry.
        activation: activation, for models that return logits.
        tta_flips: test-time augmentation: axes of the patch over whose mirrored versions the mean is taken.
        signed: positions of channels from -1 to 1, which are converted to [0, 1].
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
        signed: Sequence[int] = (),
    ) -> None:
        self.names, self.array, self.shape, self.layout = names, array, shape, layout
        self.key, self.activation, self.tta_flips = key, activation, tta_flips
        self.signed = list(signed)

    def values(self, outputs: Any, count: int, patch: Shape) -> torch.Tensor:
        """Return the values of patches, float32 ``[N, C, z, y, x]`` along the axes of the volume.

        Args:
            outputs: the result of `predict_step`.
            count: patches of the batch.
            patch: voxels of a patch along the axes of the volume.

        Raises:
            CellMapKeyError: the outputs are a mapping without ``key``, or with several entries and no ``key``.
            CellMapTypeError: the outputs are no tensor.
            CellMapValueError: the tensor has another shape.
        """
        if isinstance(outputs, Mapping):
            key = self.key if self.key is not None else next(iter(outputs)) if len(outputs) == 1 else None
            if key not in outputs:
                raise CellMapKeyError(_select(self.key, outputs))
            outputs = outputs[key]
        if not isinstance(outputs, torch.Tensor):
            raise CellMapTypeError(
                f"predict_step must return a tensor [N, C, z, y, x] or a mapping of such, got {type(outputs).__name__}"
            )
        channels, got = len(self.names), tuple(outputs.shape)
        if len(got) > 1 and got[0] == count and got[1] != channels:
            raise CellMapValueError(
                f"predict_step must return {channels} channels, one for each of {list(self.names)}, got {got[1]}"
            )
        if got[:2] != (count, channels) or got[2:] not in (patch, tuple(n for n in patch if n != 1)):
            raise CellMapValueError(
                f"predict_step must return {[count, channels, *patch]}, the patch of {self.array!r}, got {list(got)}; "
                "a model whose output has another shape or scale than its input needs target_arrays that define them"
            )
        values = outputs.detach().to(torch.float32)
        if self.activation is not None:
            values = values.sigmoid() if self.activation == "sigmoid" else values.softmax(1)
        if self.signed:
            values = values.clone()  # the output belongs to the model
            values[:, self.signed] = (values[:, self.signed] + 1) / 2
        # In every plane, rows and columns of a flat patch follow the volume's axes in their order.
        return values.reshape(count, channels, *patch)

    def over_flips(
        self, values: torch.Tensor, predict: Callable[[Mapping[str, Any]], torch.Tensor], batch: Mapping[str, Any]
    ) -> torch.Tensor:
        """Return the mean over all mirrored versions of a batch, predicted one after the other.

        Args:
            values: values of the unchanged batch, see `values`.
            predict: returns the values of another batch.
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
                # The axes of a flat patch that are longer than 1 have the same order in the volume.
                extended = [dim for dim in range(2, 5) if values.shape[dim] != 1]
                back = [extended[dim] for dim in _dims(self.shape, axes)]
                values = values + predict(mirrored).flip(back)
                number += 1
        return values / number

    def check_context(
        self,
        tiling: Tiling,
        values: torch.Tensor,
        predict: Callable[[Mapping[str, Any]], torch.Tensor],
        batch: Mapping[str, Any],
    ) -> None:
        """Warn if the outermost voxels of the input change the output inside of the context.

        Along an axis on which a patch holds the whole volume they are its own border, and are left as they are.

        Args:
            tiling: the tiling, with the context of a patch.
            values: values of the unchanged batch, see `values`.
            predict: returns the values of another batch.
            batch: the batch.
        """
        extended = [axis for axis in range(3) if tiling.patch[axis] != 1]
        axes = [axis for axis in extended if tiling.patch[axis] < tiling.volume[axis]]
        if not any(tiling.trim) or not axes:
            return
        inputs = self.layout.inputs
        changed = {}
        for name, value in batch.items():
            dims = _dims(inputs[name].window.shape, (0, 1, 2)) if name in inputs else []
            dims = [dims[extended.index(axis)] for axis in axes] if len(dims) == len(extended) else dims
            changed[name] = _new_border(value, dims)
        # The first voxel that is used may depend on the outermost one of its patch: the next one beyond is missing.
        inner = tuple(
            slice(t, n - t) if axis not in axes else slice(min(t + 1, n // 2), max(n - t - 1, n // 2 + 1))
            for axis, (t, n) in enumerate(zip(tiling.trim, tiling.patch, strict=True))
        )
        change = float((predict(changed) - values)[:, :, *inner].abs().max())
        if change > VISIBLE:
            log.warning(
                "the outermost voxels of a patch change the part of its output that is used by up to %.3g: the "
                "receptive field of the model is larger than the context of %s voxels (z, y, x) on either side, so "
                "that seams between patches may be visible. A larger context or patch reduces the change; "
                "check_context=False disables this check",
                change, list(tiling.trim),
            )  # fmt: skip


def _select(key: str | None, outputs: Mapping[Any, Any]) -> str:
    """Return the message for a mapping of which no entry, or one that is not there, is selected."""
    shapes = [
        f"{name} {list(value.shape) if hasattr(value, 'shape') else type(value).__name__}"
        for name, value in outputs.items()
    ]
    wrong = "" if key is None else f", and key={key!r} is none of them{did_you_mean(key, map(str, outputs))}"
    first = next(iter(outputs), "...")
    return (
        f"predict_step returned {', '.join(shapes) or 'an empty mapping'}{wrong}; select one of them, as with "
        f"key={str(first)!r}; dtype='float32' stores values that are not probabilities"
    )


def _dims(shape: Shape, axes: Sequence[int]) -> list[int]:
    """Return the dimensions of axes of a patch in a batch, which has no axis of length 1; counted from the end."""
    extended = [axis for axis in range(3) if shape[axis] != 1]
    return [extended.index(axis) - len(extended) for axis in axes if axis in extended]


def _new_border(value: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Return a batch whose outermost voxels are replaced by others of it, of realistic values."""
    changed, mirrored = value.clone(), value.flip(list(dims))
    for dim in dims:
        middle = mirrored.select(dim, value.shape[dim] // 2)
        for end in (0, value.shape[dim] - 1):
            changed.select(dim, end).copy_(middle)
    return changed
