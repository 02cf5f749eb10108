"""Segmentation as an example of a task; any LightningModule can take its place."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cellmap_lightning.batches.arrays import parse_classes
from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.training.deep_supervision import describe_scales, over_scales, scales_of
from cellmap_lightning.training.head_scores import Scorers, dice_by_class, epoch_scores, loggable, score_names
from cellmap_lightning.training.heads import (
    Head,
    channel_values,
    check_shapes,
    describe_channels,
    kind_of,
    make_heads,
    split_output,
)
from cellmap_lightning.training.masked import MeanOverSamples
from cellmap_lightning.training.network_output import NetworkCall
from cellmap_lightning.training.restorable import RestorableTask
from cellmap_lightning.transforms.kinds.kind import TargetKind
from cellmap_lightning.validation import did_you_mean

log = logging.getLogger(__name__)

#: Bounds of a class weight: beyond them one rare voxel would dominate a batch, or a class would not be learnt at all.
WEIGHT_BOUNDS = (0.1, 50.0)
_WEIGHT_RULES = ("none", "pos_weight", "inverse_sqrt")


def build_optimizers(
    module: nn.Module, optimizer: Callable[..., torch.optim.Optimizer] | None, scheduler: Callable[..., Any] | None
) -> Any:
    """Return an optimizer, or an optimizer and a scheduler, in the form that `configure_optimizers` returns.

    Args:
        module: the module whose trainable parameters are optimized.
        optimizer: from parameters to an optimizer; None for AdamW with a learning rate of 1e-3.
        scheduler: from an optimizer to a scheduler that steps each epoch, or None.

    Raises:
        CellMapValueError: one of them refuses its arguments.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = optimizer or partial(torch.optim.AdamW, lr=1e-3)
    built = _build("optimizer", optimizer, parameters)
    return {"optimizer": built, "lr_scheduler": _build("scheduler", scheduler, built)} if scheduler else built


def _build(name: str, factory: Callable[..., Any], argument: Any) -> Any:
    try:
        return factory(argument)
    except (TypeError, ValueError) as e:
        keywords = getattr(factory, "keywords", {})  # of a partial
        raise CellMapValueError(f"the {name} cannot be created{f' with {keywords}' if keywords else ''}: {e}") from e


def select_array(kind: str, name: str | None, names: Sequence[str]) -> str:
    """Return the named array of a batch, by default the only one.

    Args:
        kind: ``input`` or ``target``.
        name: the setting ``input_name`` or ``target_name``.
        names: arrays of the batch.

    Raises:
        CellMapKeyError: no name is given, and there is not exactly one array.
    """
    if name is not None:
        return name
    if len(names) != 1:
        raise CellMapKeyError(f"the batch has the {kind}s {list(names)}; select one with {kind}_name")
    return names[0]


class SegmentationTask(RestorableTask):
    """Segmentation with one or several targets of any kind that a network can predict; see docs/targets.md.

    The channels of the network, the activation, the loss and the scores follow from the kinds of the targets. With
    several targets the network has the sum of their channels, in the order of ``target_name``.

    Args:
        network: from ``[N, 1, z, y, x]`` (or ``[N, 1, y, x]``) to logits with the channels of the targets: one per
            class for presence, and one more, the background, which comes first, for targets of kind ``labels``. With
            several inputs it is called with each of them as an argument. A network with deep supervision returns a
            list of outputs, the one of full resolution first, or MONAI's stacked tensor.
        classes: names of the classes.
        optimizer: from parameters to an optimizer; by default AdamW with a learning rate of 1e-3.
        scheduler: from an optimizer to a scheduler that steps each epoch, or None.
        dice_weight: weight of the Dice term beside cross entropy, from 0 to 1, for kinds that are probabilities; None
            for 0.5. It is not combined with ``loss``.
        class_weights: weight of a positive voxel in the cross entropy of binary targets: ``none``; ``pos_weight``, the
            ratio of negative to positive voxels; ``inverse_sqrt``, its square root; or ``{class: weight}``. Measured on
            ``weight_batches`` batches of the train split, bounded to [0.1, 50] and printed.
        weight_batches: batches on which class weights are measured.
        input_name: the input of the batch, or a list with the inputs of the network in order; by default the only
            one.
        target_name: the target of the batch, or a list of targets; by default the only one.
        loss: losses by name and weight, such as ``{bce: 1, dice: 1}`` or ``{focal: {weight: 1, gamma: 2}}``; with
            several targets ``{target: {loss: weight}}``. See `losses`. By default cross entropy and Dice, and for
            distances, descriptors and vectors the mean squared error.

    Raises:
        CellMapValueError: ``dice_weight`` or ``class_weights`` is invalid.
        CellMapKeyError: ``class_weights`` names an unknown class.

    Example:
        >>> network = monai.networks.nets.UNet(3, 1, 2, channels=(16, 32), strides=(2,))
        >>> trainer.fit(SegmentationTask(network, ["mito", "er"]), datamodule=data)
    """

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str],
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        dice_weight: float | None = None,
        class_weights: str | Mapping[str, float] = "none",
        weight_batches: int = 8,
        input_name: str | Sequence[str] | None = None,
        target_name: str | Sequence[str] | None = None,
        loss: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.classes = parse_classes(classes)
        self.optimizer = optimizer
        self.scheduler = scheduler
        if dice_weight is not None and (not isinstance(dice_weight, int | float) or not 0 <= dice_weight <= 1):
            raise CellMapValueError(f"dice_weight must be in [0, 1], got {dice_weight!r}")
        if dice_weight is not None and loss is not None:
            raise CellMapValueError(
                f"dice_weight={dice_weight} and loss={dict(loss)} are both given; leave dice_weight out, or give the "
                "weights of bce and dice in loss"
            )
        self.dice_weight = 0.5 if dice_weight is None else dice_weight
        self.loss = loss
        if isinstance(class_weights, str):
            if class_weights not in _WEIGHT_RULES:
                raise CellMapValueError(
                    f"class_weights must be {', '.join(_WEIGHT_RULES)} or {{class: weight}}, got {class_weights!r}"
                    + did_you_mean(class_weights, _WEIGHT_RULES)
                )
        else:
            unknown = sorted(set(class_weights) - set(self.classes))
            if unknown:
                raise CellMapKeyError(f"class_weights names {unknown}, which are not among {list(self.classes)}")
        self.class_weights = class_weights
        self.weight_batches = weight_batches
        self.input_name = input_name if input_name is None or isinstance(input_name, str) else tuple(input_name)
        self.target_name = target_name if target_name is None or isinstance(target_name, str) else tuple(target_name)
        self.register_buffer("pos_weight", torch.ones(len(self.classes), dtype=torch.float32))
        #: Per stage (val, test) and class that occurred last: Dice, and that of the best constant predictor.
        self.scores: dict[str, dict[str, dict[str, float]]] = {}
        self.val_loss = MeanOverSamples()
        self.test_loss = MeanOverSamples()
        self._heads: tuple[Head, ...] = ()
        self._has_run = self._has_scales = False

    def forward(self, *inputs: Tensor) -> Any:
        """Return the output of the network for finished inputs."""
        return self.network(*inputs)

    # -- targets

    def setup(self, stage: str) -> None:
        """Create the heads of the targets that the data module has.

        Raises:
            CellMapError: a target cannot be trained, or its loss is invalid; see `make_heads`.
        """
        self._heads = ()
        arrays = getattr(self._data, "target_arrays", None) or {}
        chosen = self.target_name is not None or len(arrays) == 1
        if chosen and set(self._target_names) <= set(arrays):
            self._set_heads({name: arrays[name].kind for name in self._target_names})

    @property
    def heads(self) -> tuple[Head, ...]:
        """The parts of the output, one per target; empty before the first batch."""
        return self._heads

    def output_channels(self) -> list[dict[str, Any]] | None:
        """Return a description of each channel that `predict_step` returns; None where the targets are unknown.

        Each has a unique ``name``, its ``class``, its ``kind`` and the numbers of the kind, ``range`` and whether it is
        ``directional``.
        """
        return describe_channels(self._heads) if self._heads else None

    @property
    def _data(self) -> Any:
        return getattr(self._trainer, "datamodule", None)

    @property
    def _target_names(self) -> tuple[str, ...]:
        if isinstance(self.target_name, tuple):
            return self.target_name
        return (select_array("target", self.target_name, list(getattr(self._data, "target_arrays", []))),)

    def _set_heads(self, kinds: Mapping[str, TargetKind]) -> None:
        self._heads = make_heads(kinds, self.classes, self.loss, self.dice_weight)
        self.val_scores = Scorers(self._heads).to(self.device)
        self.test_scores = Scorers(self._heads).to(self.device)

    def _parts(self, batch: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the inputs and the targets of a batch."""
        targets = [batch[name] for name in self._target_names]
        if not self._heads:  # data of another package, whose targets have no specification
            kinds = [kind_of(target, self.classes) for target in targets]
            self._set_heads(dict(zip(self._target_names, kinds, strict=True)))
        return self._inputs(batch), targets

    def _inputs(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        if isinstance(self.input_name, tuple):
            return [batch[name] for name in self.input_name]
        return [batch[select_array("input", self.input_name, list(getattr(self._data, "input_arrays", [])))]]

    def _outputs(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs of the network, the one of full resolution first; see `NetworkCall`."""
        call = NetworkCall(self.network, inputs, targets, self._heads)
        # Once it has run, an error of a layer is no matter of shapes.
        output = self(*inputs) if self._has_run else call.run(self)
        scales = call.scales(output)
        self._has_run = True
        if len(scales) > 1 and not self._has_scales:  # in training alone, with some networks
            self._has_scales = True
            log.info("%s: %s", call.name, describe_scales(scales))
        return scales

    def losses(self, output: Any, targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the loss of each target over the annotated voxels.

        Args:
            output: of the network: logits ``[N, C, ...]``, or several scales of it; see `deep_supervision`.
            targets: ``[N, C, ...]`` with NaN where unannotated, or ``[N, 1, ...]`` integers for classes that exclude
                each other, in the order of the heads.

        Raises:
            CellMapValueError: the channels or voxels of the output are not those of the targets.
        """
        scales = scales_of(output, targets[0].ndim)
        check_shapes(scales[0], targets, self._heads)
        parts = zip(*(split_output(scale, self._heads) for scale in scales), strict=True)
        return {
            head.name: over_scales(partial(self._loss, head), list(part), target)
            for head, part, target in zip(self._heads, parts, targets, strict=True)
        }

    def _loss(self, head: Head, output: Tensor, target: Tensor) -> Tensor:
        return head.loss(output, target, self.pos_weight if head.kind.name == "binary" else None)

    # -- steps

    def on_fit_start(self) -> None:
        """Measure the class weights once, before training."""
        if self.class_weights == "none":
            return
        kinds = {head.name: head.kind.name for head in self._heads}
        if kinds and "binary" not in kinds.values():  # a softmax has no positive voxels
            raise CellMapValueError(
                f"class_weights={self.class_weights!r} need a target of kind binary, got {kinds}; use "
                "class_weights=none"
            )
        if isinstance(self.class_weights, str):
            weights = self._measured_weights(self.class_weights)
        else:
            listed = [float(self.class_weights.get(c, 1.0)) for c in self.classes]
            weights = torch.tensor(listed, dtype=torch.float32, device="cpu")
        bounded = weights.clamp(*WEIGHT_BOUNDS).to(self.device)
        self.pos_weight = bounded
        text = ", ".join(f"{c} {w:.3g}" for c, w in zip(self.classes, bounded.tolist(), strict=True))
        log.info("class weights (%s): %s", self.class_weights if isinstance(self.class_weights, str) else "given", text)

    def _measured_weights(self, rule: str) -> Tensor:
        """Return the ratio of negative to positive voxels in a few batches; 1 for a class that does not occur."""
        data = self._data
        if data is None:
            raise CellMapValueError(f"class_weights={rule!r} needs the Trainer to run with a CellMapDataModule")
        positive = known = torch.zeros(len(self.classes), dtype=torch.float64, device="cpu")
        source, batch_size = data.train_dataset, data.batch_size
        from cellmap_lightning.loading.dataloader import CellMapDataLoader
        from cellmap_lightning.loading.options import LoaderOptions

        # A separate loader of rank 0: the weights must not depend on ranks, nor advance the training stream.
        loader = CellMapDataLoader(
            source, batch_size, samples_per_epoch=self.weight_batches * batch_size, seed=data.seed,
            options=LoaderOptions(rank=0, world=1),
        )  # fmt: skip
        binary = [head.name for head in self._heads if head.kind.name == "binary"]
        name = binary[0] if binary else self._target_names[0]
        for batch in loader:
            target = batch[name]
            axes = [0, *range(2, target.ndim)]
            known = known + (~torch.isnan(target)).sum(axes)
            positive = positive + (target == 1).sum(axes)
        ratio = torch.where(positive > 0, (known - positive) / positive.clamp(min=1), 1.0)
        return (ratio if rule == "pos_weight" else ratio.sqrt()).to(torch.float32)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch, logged as ``train/loss``; of several targets each as ``train/<target>_loss``."""
        x, targets = self._parts(batch)
        losses = self.losses(self._outputs(x, targets), targets)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(targets[0]))
        if len(losses) > 1:
            for name, value in losses.items():
                self.log(f"train/{loggable(name)}_loss", value, batch_size=len(targets[0]))
        return loss

    def metric_names(self) -> list[str]:
        """Return the names of all metrics of a training; none before the targets are known."""
        targets = [f"train/{loggable(head.name)}_loss" for head in self._heads] if len(self._heads) > 1 else []
        scores = [f"val/{name}" for name in score_names(self._heads)]
        return [*scores, "val/loss", "train/loss", *targets] if self._heads else []

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add the loss and the counts of a batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add the loss and the counts of a batch."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Mapping[str, Tensor]) -> None:
        x, targets = self._parts(batch)
        output = self._outputs(x, targets)[0]
        loss = torch.stack(list(self.losses(output, targets).values())).sum()
        getattr(self, f"{stage}_scores").update(self._heads, split_output(output, self._heads), targets)
        getattr(self, f"{stage}_loss").update(loss, len(targets[0]))

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss``, and the scores of docs/targets.md, such as ``val/dice`` and ``val/dice_<class>``."""
        self._report("val", self.val_loss)

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss`` and the scores, as `on_validation_epoch_end` does."""
        self._report("test", self.test_loss)

    def _report(self, stage: str, loss: MeanOverSamples) -> None:
        scorers: Scorers | None = getattr(self, f"{stage}_scores", None)
        if self.trainer.sanity_checking or scorers is None:  # a few tiles are not representative
            if scorers is not None:
                scorers.reset()
            loss.reset()
            return
        # The counts are already summed over ranks, so every rank logs the same value and the mean changes nothing.
        results = scorers.compute(self._heads)
        self.log(f"{stage}/loss", loss.compute(), sync_dist=True)
        for name, value in epoch_scores(self._heads, results).items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "dice", sync_dist=True)
        self.scores.pop(stage, None)
        dice = dice_by_class(self.classes, results)
        if dice is not None:
            self.scores[stage] = dice
        loss.reset()

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the values of each channel after its activation, ``[N, C, z, y, x]``; see `output_channels`."""
        inputs = self._inputs(batch)
        return channel_values(self(*inputs), self._heads, len(self.classes), inputs[0].ndim)

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and the scheduler if there is one."""
        return build_optimizers(self, self.optimizer, self.scheduler)
