"""The model of a checkpoint as one module, from finished inputs to activated channels, with its description."""

import hashlib
import logging
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

import cellmap_lightning
from cellmap_lightning.batches.arrays import InputArray, TargetArray, parse_inputs, parse_targets
from cellmap_lightning.checkpointing.checkpoint_config import CONFIG_KEY
from cellmap_lightning.checkpointing.data_match import check_weights, recorded
from cellmap_lightning.checkpointing.trust import check_trusted
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.export.halo import measure_halo
from cellmap_lightning.export.model_card import ModelCard
from cellmap_lightning.export.reach import measure_reach
from cellmap_lightning.prediction.channels import described_channels
from cellmap_lightning.prediction.prediction_writer import PredictionWriter
from cellmap_lightning.training.checkpoints import read_checkpoint
from cellmap_lightning.training.heads import Head, channel_values, describe_channels, make_heads
from cellmap_lightning.training.model_forward import no_predict_step
from cellmap_lightning.training.task import SegmentationTask
from cellmap_lightning.transforms.normalization import Normalize

#: Kinds whose channels are probabilities of classes, which need no further description.
_CLASSES = ("binary", "labels")
#: Voxels of the largest input on which the halo is measured, in double precision and with gradients.
_LARGEST_MEASURED = 64**3

log = logging.getLogger(__name__)


class SegmentationModel(nn.Module):
    """The network of a `SegmentationTask` with the activations of its heads.

    Args:
        network: see `SegmentationTask`.
        heads: the heads of its targets.
        classes: number of classes.

    Example:
        >>> SegmentationModel(task.network, task.heads, 2)(x)  # as task.predict_step  # doctest: +SKIP
    """

    def __init__(self, network: nn.Module, heads: tuple[Head, ...], classes: int) -> None:
        super().__init__()
        self.network = network
        self.heads, self.classes = heads, classes

    def forward(self, x: Tensor) -> Tensor:
        """Return the values of each channel for ``[N, 1, z, y, x]``."""
        return channel_values(self.network(x), self.heads, self.classes, x.ndim)


class TaskModel(nn.Module):
    """Any other task, called as `Trainer.predict` does, with a batch of its input.

    Args:
        task: the task.
        name: the input.

    Example:
        >>> TaskModel(task, "raw")(x)  # doctest: +SKIP
    """

    def __init__(self, task: L.LightningModule, name: str) -> None:
        super().__init__()
        self.task, self.name = task, name

    def forward(self, x: Tensor) -> Any:
        """Return the output of the task for ``[N, 1, z, y, x]``."""
        return self.task.predict_step({self.name: x}, 0)


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model of a checkpoint, ready to be exported; see docs/export.md.

    Attributes:
        module: from ``[N, 1, z, y, x]`` to ``[N, C, z, y, x]``, in evaluation mode, float32, on the CPU.
        card: its description, with the weights still to be named.
        example: a test input ``[1, 1, z, y, x]``.
        expected: the output for it.
    """

    module: nn.Module
    card: ModelCard
    example: Tensor
    expected: Tensor


def restore_model(path: Path, trust: Any = (), trust_checkpoint: Any = False, stored: str = "uint8") -> TrainedModel:
    """Load the model of a checkpoint of ``cellmap-train``, and measure its output and its halo.

    Args:
        path: the checkpoint; nothing but tensors and plain values is read from it.
        trust: see `check_trusted`.
        trust_checkpoint: see `check_trusted`.
        stored: type of the stored voxels, for which ``affine`` of the description is computed.

    Raises:
        CellMapFileNotFoundError: there is no such checkpoint.
        CellMapTypeError: its task is no LightningModule, or has no usable ``predict_step``.
        CellMapValueError: it is not a checkpoint of ``cellmap-train``, is not trusted, or its network has several
            inputs.
    """
    where = f"ckpt={path}"
    checkpoint = read_checkpoint(path, "ckpt")
    config = checkpoint.get(CONFIG_KEY)
    if not isinstance(config, Mapping) or not {"data", "task"} <= set(config):
        raise CellMapValueError(
            f"{where} has no configuration ({CONFIG_KEY!r}), as those of cellmap-train do; export a checkpoint of it"
        )
    used = {name: config.get(name) for name in ("model", "task")}
    arrays = {name: config["data"].get(name) for name in ("input_arrays", "target_arrays", "classes")}
    check_trusted(used | {"data": arrays}, where, trust, trust_checkpoint)
    task = instantiate(dict(config["task"]), _convert_="all")
    if not isinstance(task, L.LightningModule):
        raise CellMapTypeError(f"{where}: its task is a {type(task).__name__}, which is not a LightningModule")
    check_weights(checkpoint["state_dict"], task, where)
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as e:
        raise CellMapValueError(f"{where}: the weights do not fit the model: {str(e).splitlines()[1].strip()}") from e
    name, spec = _input(parse_inputs(arrays["input_arrays"] or {}), task, where)
    classes = tuple(arrays["classes"] or ("raw",))
    targets = parse_targets(arrays["target_arrays"], len(classes)) if arrays["target_arrays"] else {}
    module, channels, chosen = _module(task, name, classes, targets)
    module = module.float().cpu().eval().requires_grad_(False)
    shape = tuple(n for n in spec.window.shape if n != 1)
    example = torch.rand(
        1, 1, *shape, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu"
    )
    expected = _output(module, example, where)
    named = getattr(task, "network", None)
    network: nn.Module = named if isinstance(named, nn.Module) else module
    halo, exact = _halo(network, shape, where)
    reach = _reach(network, shape)
    card = _card(checkpoint, path, spec, chosen, classes, channels, expected, stored)
    if halo is not None:  # a slice of a volume has no context along its axis
        along = iter(halo)
        halo = tuple(0 if n == 1 else next(along) for n in card.input_shape)
    about = {
        **card.about, "network": type(network).__name__, "halo_limited_by_patch": not exact,
        "parameters": sum(p.numel() for p in network.parameters()),
    }  # fmt: skip
    return TrainedModel(module, _changed(card, halo=halo, reach=reach, about=about), example, expected)


def _halo(network: nn.Module, shape: tuple[int, ...], where: str) -> tuple[tuple[int, ...] | None, bool]:
    """Measure the halo, of large patches on a smaller input; None where the network does not allow it."""
    lengths = list(shape)
    while math.prod(lengths) > _LARGEST_MEASURED:
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        lengths[longest] //= 2
    try:
        return measure_halo(network, tuple(lengths))
    except Exception as e:  # the code of a network can raise anything
        log.warning(
            "%s: the halo is not measured: %s: %s", where, type(e).__name__, next(iter(str(e).splitlines()), "")
        )
        return None, False


def _reach(network: nn.Module, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """Measure what `cellmap-predict` needs for its patches; None where the network does not allow it."""
    try:
        return asdict(measure_reach(network, shape))
    except Exception as e:  # the code of a network can raise anything
        log.info("the reach is not measured: %s", next(iter(str(e).splitlines()), type(e).__name__))
        return None


def _changed(card: ModelCard, **values: Any) -> ModelCard:
    return ModelCard(**(asdict(card) | values))


def _input(inputs: Mapping[str, InputArray], task: Any, where: str) -> tuple[str, InputArray]:
    """Return the input of a network that has a single one."""
    chosen = getattr(task, "input_name", None)
    names = list(inputs) if chosen is None else [chosen] if isinstance(chosen, str) else list(chosen)
    if len(names) != 1 or names[0] not in inputs:
        raise CellMapValueError(
            f"{where}: the network has the inputs {', '.join(map(str, names))}; networks with one input are exported"
        )
    if inputs[names[0]].slices_as_channels:
        raise CellMapValueError(
            f"{where}: the input {names[0]!r} has slices_as: channels; networks of volumes or slices are exported"
        )
    return names[0], inputs[names[0]]


def _module(
    task: L.LightningModule, name: str, classes: tuple[str, ...], targets: Mapping[str, TargetArray]
) -> tuple[nn.Module, list[dict[str, Any]], TargetArray | None]:
    """Return the module to export, the descriptions of its channels, and the target that defines its output."""
    chosen = getattr(task, "target_name", None)
    names = list(targets)[:1] if chosen is None else [chosen] if isinstance(chosen, str) else list(chosen)
    first = next((targets[n] for n in names if n in targets), None)
    if not isinstance(task, SegmentationTask):
        PredictionWriter.check_module(task)
        described = [{"name": n, **description} for n, description in described_channels(task).items()]
        return TaskModel(task, name), described, first
    unknown = [n for n in names if n not in targets]
    if unknown:
        raise CellMapKeyError(f"the task has the target {unknown[0]!r}, which is not among {list(targets)}")
    heads = make_heads({n: targets[n].kind for n in names}, classes, task.loss, task.dice_weight)
    activations = [head.activation for head in heads for _ in describe_channels([head])]
    channels = [
        {**channel, "activated_by": activation}
        for channel, activation in zip(describe_channels(heads), activations, strict=True)
    ]
    return SegmentationModel(task.network, heads, len(classes)), channels, first


def _output(module: nn.Module, x: Tensor, where: str) -> Tensor:
    """Return the output for a test input.

    Raises:
        CellMapTypeError: it is not a tensor ``[N, C, ...]``; or see `no_predict_step`.
    """
    try:
        with torch.no_grad():
            output = module(x)
    except Exception as error:  # the code of a task can raise anything
        unusable = no_predict_step(module.task, error) if isinstance(module, TaskModel) else None
        if unusable is None:
            raise
        raise unusable from error
    if not isinstance(output, Tensor) or output.ndim != x.ndim or len(output) != len(x):
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise CellMapTypeError(f"{where}: the model must return a tensor [N, C, ...] of {x.ndim} axes, got {got}")
    return output.float()


def _card(
    checkpoint: Mapping[str, Any],
    path: Path,
    spec: InputArray,
    target: TargetArray | None,
    classes: tuple[str, ...],
    channels: list[dict[str, Any]],
    expected: Tensor,
    stored: str,
) -> ModelCard:
    """Return the description of a model, with what its checkpoint records."""
    first = 1 if spec.flat else 0
    shape = list(spec.window.shape)
    lengths = iter(expected.shape[2:])
    output_shape = [1 if n == 1 else next(lengths) for n in shape]
    scale = (target or spec).window.scale
    channels, activations = _card_channels(channels, expected.shape[1], classes)
    record = recorded(checkpoint) or {}
    rule = record.get("normalize")
    normalize = None if rule is None else Normalize(**rule)
    return ModelCard(
        weights="model.ts",
        input_shape=tuple(shape[first:]),
        input_voxel_size=tuple(float(s) for s in spec.window.scale[first:]),
        output_shape=tuple(output_shape[first:]),
        output_voxel_size=tuple(float(s) for s in scale[first:]),
        classes=classes,
        channels=tuple(channels),
        normalize=None if normalize is None else _setting(normalize),
        invert=normalize is not None and normalize.invert,
        affine=_affine(normalize, stored),
        about={
            "axes": "yx" if spec.flat else "zyx",
            "input": "float32 [N, 1, z, y, x], normalized; an axis of length 1 is left out",
            "output": "float32 [N, C, z, y, x], activated" + "".join(f" by {a}" for a in sorted(activations)),
            "input_values": next((i.get("values") for i in record.get("inputs", {}).values()), None),
            "checkpoint": {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
            "step": checkpoint.get("global_step"),
            "versions": {
                "cellmap_lightning": cellmap_lightning.__version__, "torch": torch.__version__,
                "python": platform.python_version(),
            },
        },
    )  # fmt: skip


def _card_channels(
    channels: list[dict[str, Any]], count: int, classes: tuple[str, ...]
) -> tuple[list[dict[str, Any]], set[str]]:
    """Return the channels that a card describes, none where they are the classes; then also their activations."""
    if not channels and count != len(classes):
        channels = [{"name": f"channel_{number}"} for number in range(count)]
    if count != len(classes) or any(channel.get("kind") not in _CLASSES for channel in channels):
        return channels, set()
    return [], {channel["activated_by"] for channel in channels if "activated_by" in channel}


def _setting(rule: Normalize) -> Any:
    """Return the setting ``data.normalize`` of a rule."""
    return rule.rule if rule.rule in ("dtype", "zscore") else {rule.rule: [rule.low, rule.high]}


def _affine(rule: Normalize | None, stored: str) -> dict[str, Any] | None:
    """Return offset and factor of stored values; None where the rule depends on the volume.

    Raises:
        CellMapValueError: ``stored`` is not a type of numbers.
    """
    try:
        dtype = np.dtype(stored)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind not in "iuf":
        raise CellMapValueError(f"stored_dtype must be a type of numbers such as uint8 or float32, got {stored!r}")
    if rule is None or rule.needs_statistics:
        return None
    offset, factor = rule.affine(dtype, None)
    return {"dtype": dtype.name, "offset": offset, "factor": factor}
