"""The automatic context of ``cellmap-predict``: the patches and the blending that show no seams, at the least cost."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf
from torch import nn

from cellmap_lightning.batches.arrays import InputArray, TargetArray, parse_inputs, parse_targets
from cellmap_lightning.commands.patch_plan import PatchNeeds, PatchPlan, plan_patch
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.export.exported_task import ExportedTask
from cellmap_lightning.export.model_card import ModelCard, parse_reach
from cellmap_lightning.export.reach import Reach, measure_reach
from cellmap_lightning.export.trained_model import TaskModel
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.io.store import parse_location
from cellmap_lightning.prediction.blending import Tiling
from cellmap_lightning.prediction.blocks import output_lattice, parse_region, voxels_of
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)

#: Voxels that the network computes for each one that is written, with patches that overlap by half: larger contexts
#: are replaced by blending.
DEAREST = 8.0


class ContextError(CellMapValueError):
    """The reach of a network cannot be used; the message says why."""


def reach_of_task(cfg: DictConfig, task: L.LightningModule) -> Reach | ContextError | None:
    """Return the reach of the network of a task, or the reason why it has none; None where it is not needed.

    Args:
        cfg: the configuration of a prediction, see `effective_config`.
        task: the task.
    """
    if not _is_automatic(cfg):
        return None
    try:
        spec = _arrays(cfg)[0]
        if isinstance(task, ExportedTask):
            return _recorded_reach(task.card)
        return measure_reach(
            _network(task, next(iter(cfg.data.input_arrays))), [n for n in spec.window.shape if n != 1]
        )
    except ContextError as e:
        return e
    except Exception as e:  # the code of a network can raise anything
        return ContextError(next(iter(str(e).splitlines()), type(e).__name__))


def _recorded_reach(card: ModelCard) -> Reach:
    """Return the reach that the description of an exported model records.

    A description with a halo alone does not say what other patches would cost: the patch stays as it is.

    Raises:
        ContextError: it has neither.
    """
    if card.reach is not None:
        return parse_reach(card.reach)
    if card.halo is None:
        raise ContextError("the description of the exported model has neither reach nor halo")
    halo = tuple(h for h, n in zip(card.halo, card.input_shape, strict=True) if n != 1)
    return Reach(halo, (1,) * len(halo), 0.0, ())


@dataclass(frozen=True)
class _Choice:
    """What is logged about the context of a prediction.

    Attributes:
        text: the choice, in which ``{patch}`` is that of the patch.
        patch: the patch, voxels.
        computed: voxels that the network computes for each one of the output; None if it is not logged.
        level: the level of the log record.
    """

    text: str
    patch: Shape | None = None
    computed: float | None = None
    level: int = logging.INFO


def set_context(cfg: DictConfig, reach: Reach | ContextError | None) -> None:
    """Replace ``auto`` in the configuration of a prediction, and log what it becomes; see `set_contexts`."""
    set_contexts([cfg], reach)


def set_contexts(configs: Sequence[DictConfig], reach: Reach | ContextError | None) -> None:
    """Replace ``auto`` in the configurations of predictions, and log what it becomes, once for all that agree.

    Where the reach of the network is finite, patches are as large as the memory and the volume allow at the least
    cost, and are trimmed by their context: the prediction is that of the whole volume at once. Layers that normalize
    by the statistics of a patch change its output with its size; there the patch of the training is used, and patches
    that overlap by half are blended.

    Args:
        configs: the configurations; their blending, context, patch and batch size are changed in place.
        reach: see `reach_of_task`.

    Raises:
        CellMapValueError: the context is neither auto nor numbers.
    """
    choices: dict[tuple[int, str], list[_Choice]] = {}
    for cfg in configs:
        choice = _choose(cfg, reach)
        if choice is not None:
            choices.setdefault((choice.level, choice.text), []).append(choice)
    for (level, text), alike in choices.items():
        some = f" of {len(alike)} of {plural(len(configs), 'crop')}" if len(alike) < len(configs) else ""
        patches = [choice.patch for choice in alike if choice.patch is not None]
        costs = [f"{cost:.1f}" for cost in sorted(choice.computed for choice in alike if choice.computed is not None)]
        cost = f": {_ends(costs)} times the voxels of the output" if costs else ""
        log.log(level, "context%s: %s%s", some, text.replace("{patch}", _patch_range(patches)), cost)


def _ends(texts: Sequence[str]) -> str:
    """Return the first and the last of sorted values, or the only one."""
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def _patch_range(patches: Sequence[Shape]) -> str:
    """Return the lengths of patches along z, y, x, of several the least and the largest ones."""
    if not patches:
        return ""
    axes = list(zip(*patches, strict=True))
    return _ends([str([min(lengths) for lengths in axes]), str([max(lengths) for lengths in axes])])


def _choose(cfg: DictConfig, reach: Reach | ContextError | None) -> _Choice | None:
    """Replace ``auto`` in the configuration of one prediction; return what is logged, None if nothing is chosen."""
    writer = cfg.writer
    if isinstance(writer.context, str) and writer.context != "auto":
        raise CellMapValueError(
            f"writer.context must be auto, a number of voxels or three of them (z, y, x), got {writer.context!r}"
        )
    automatic = _is_automatic(cfg)
    blends = writer.blend == "auto"
    writer.blend = "trim" if blends else writer.blend
    writer.context = None if writer.context == "auto" else writer.context
    if not automatic or reach is None:
        return None
    try:
        if isinstance(reach, ContextError):
            raise reach
        needs = _needs(cfg, reach)
    except ContextError as e:
        return _Choice(f"an eighth of a patch on either side, as the reach of the network is not known: {e}")
    plan = plan_patch(needs)
    if blends and (reach.statistics or plan is None or plan.computed > DEAREST):
        return _blend(cfg, needs, reach)
    if plan is not None:
        return _trim(cfg, needs, plan)
    return _Choice(
        f"the network needs {list(needs.context)} voxels (z, y, x) on either side, and a patch of {{patch}} has no "
        "more: an eighth of a patch is used; give a larger patch.shape, or writer.blend=gaussian",
        needs.patch, None, logging.WARNING,
    )  # fmt: skip


def _trim(cfg: DictConfig, needs: PatchNeeds, plan: PatchPlan) -> _Choice:
    """Use patches with a context that is computed and not written."""
    cfg.writer.context = max(plan.context) if len(set(plan.context)) == 1 else list(plan.context)
    _use_patch(cfg, needs, plan.patch)
    if not any(plan.context):
        return _Choice("none is needed, as one patch of {patch} voxels (z, y, x) is the volume", plan.patch)
    return _Choice(
        f"each patch of {{patch}} voxels (z, y, x) is computed with {list(plan.context)} voxels of context on either "
        "side, which the network needs",
        plan.patch, plan.computed,
    )  # fmt: skip


def _blend(cfg: DictConfig, needs: PatchNeeds, reach: Reach) -> _Choice:
    """Use patches that overlap by half and are blended, of the size of the training."""
    cfg.writer.blend = "gaussian"
    _use_patch(cfg, needs, needs.patch)
    if reach.statistics:
        reason = f"{' and '.join(reach.statistics)} normalizes by the whole patch, so that no context is large enough"
    else:
        reason = f"the network needs {list(needs.context)} voxels of context, for which the patch is too small"
    return _Choice(
        f"{reason}; patches of {{patch}} voxels (z, y, x) that overlap by half are blended (writer.blend=gaussian)",
        needs.patch, _computed_by_blending(needs),
    )  # fmt: skip


def predicted_voxels(cfg: DictConfig) -> int:
    """Return the number of voxels that a prediction writes, of one channel.

    Args:
        cfg: the configuration of a prediction, see `effective_config`.
    """
    data: Any = OmegaConf.to_container(cfg.data, resolve=True)
    inputs = parse_inputs(data.get("input_arrays") or {})
    specs = data.get("target_arrays")
    targets = parse_targets(specs, len(data.get("classes") or ())) if specs else {}
    output: InputArray | TargetArray = next(iter(targets.values()), next(iter(inputs.values())))
    z, y, x = _predicted_part(cfg, output.window)[2]
    return z * y * x


def _computed_by_blending(needs: PatchNeeds) -> float:
    tiling = Tiling(needs.volume, needs.patch, "gaussian")
    lengths = [tiling.count(axis, needs.first[axis], n, n) * needs.patch[axis] for axis, n in enumerate(needs.length)]
    return math.prod(lengths) / math.prod(needs.length)


def _is_automatic(cfg: DictConfig) -> bool:
    """Return True if context and blending depend on the network: nothing in their place is given."""
    writer = cfg.writer
    return writer.context == "auto" and writer.overlap is None and writer.blend in ("auto", "trim")


def _arrays(cfg: DictConfig) -> tuple[InputArray, InputArray | TargetArray]:
    """Return the input of the network, and the array that defines its output.

    Raises:
        ContextError: they do not allow one context for all.
    """
    data: Any = OmegaConf.to_container(cfg.data, resolve=True)
    inputs = parse_inputs(data.get("input_arrays") or {})
    specs = data.get("target_arrays")
    targets = parse_targets(specs, len(data.get("classes") or ())) if specs else {}
    if len(inputs) != 1:
        raise ContextError(f"the network has the inputs {', '.join(inputs)}")
    source = next(iter(inputs.values()))
    output = next(iter(targets.values()), source)
    if source.slices_as_channels or (source.flat and list(data.get("planes") or ["xy"]) != ["xy"]):
        raise ContextError("slices are predicted as channels or in several planes")
    if source.window.scale.tolist() != output.window.scale.tolist():
        raise ContextError("output and input have different voxel sizes")
    return source, output


def _network(task: L.LightningModule, name: str) -> nn.Module:
    """Return the network of a task with one input; its whole prediction, as exported, where it has none of that name.

    Raises:
        ContextError: it has neither.
    """
    network = getattr(task, "network", None)
    if isinstance(network, nn.Module):
        return network
    if type(task).predict_step is L.LightningModule.predict_step:
        raise ContextError(f"{type(task).__name__} has neither a network nor a predict_step that can be measured")
    return TaskModel(task, name)


def _needs(cfg: DictConfig, reach: Reach) -> PatchNeeds:
    """Return what limits the choice of patches."""
    source, output = _arrays(cfg)
    window = output.window
    margin = [(n - m) // 2 for n, m in zip(source.window.shape, window.shape, strict=True)]
    measured = iter(zip(reach.halo, reach.step, strict=True))
    context, steps = [], []
    for n, inside in zip(source.window.shape, margin, strict=True):
        halo, step = (0, 1) if n == 1 else next(measured)
        # Patches whose starts differ by multiples of the step see the strides of the network alike.
        context.append(math.ceil(max(0, halo - inside) / step) * step)
        steps.append(step)
    volume, first, length = _predicted_part(cfg, window)
    batch = 1 if cfg.adjustable.batch_size else cfg.data.batch_size
    return PatchNeeds(
        volume, first, length, window.shape, _shape(context), _shape(steps), reach.voxel_bytes,
        cfg.patch.memory_mb * 2**20 / batch,
        fixed=not cfg.adjustable.patch or not reach.voxel_bytes or source.flat,
    )  # fmt: skip


def _predicted_part(cfg: DictConfig, window: Window) -> tuple[Shape, Shape, Shape]:
    """Return the voxels of the output of the whole volume, and the first and the number of those to predict."""
    metadata: Any = OmegaConf.to_container(cfg.metadata, resolve=True)
    options = {key: value for key, value in metadata.items() if key not in ("normalize", "invert")}
    image = read_image(parse_location(cfg.input_path, _storage(cfg)), Overrides.parse(**options))
    whole = output_lattice(window, image.finest.lattice.box, [level.lattice for level in image.levels])
    region = OmegaConf.to_container(cfg.writer.region) if cfg.writer.region else None
    if region is None:
        return whole.shape, (0, 0, 0), whole.shape
    return whole.shape, *voxels_of(whole, parse_region(region), image.finest.lattice.box, str(cfg.input_path))


def _storage(cfg: DictConfig) -> Mapping[str, Any] | None:
    options = OmegaConf.select(cfg, "data.storage_options")
    return OmegaConf.to_container(options, resolve=True) if options else None  # type: ignore[return-value]


def _shape(lengths: Sequence[int]) -> Shape:
    z, y, x = lengths
    return z, y, x


def _use_patch(cfg: DictConfig, needs: PatchNeeds, patch: Shape) -> None:
    """Enlarge the arrays of the data to a patch, and reduce the batch size to what the memory allows."""
    added = [n - m for n, m in zip(patch, needs.patch, strict=True)]
    if any(added):
        for arrays in (cfg.data.input_arrays, cfg.data.target_arrays or {}):
            for array in arrays.values():
                array.shape = [n + more for n, more in zip(array.shape, added, strict=True)]
    if cfg.adjustable.batch_size and needs.voxel_bytes:
        allowed = int(needs.memory / (math.prod(patch) * needs.voxel_bytes))
        cfg.data.batch_size = max(1, min(cfg.data.batch_size, allowed))
