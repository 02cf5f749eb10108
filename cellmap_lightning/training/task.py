"""Segmentation as an example of a task; any LightningModule can take its place."""

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.training.masked import (
    DiceScore,
    MeanOverSamples,
    masked_bce,
    masked_cross_entropy,
    masked_dice,
    one_against_all,
    probabilities,
)
from cellmap_lightning.training.restorable import RestorableTask
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
    optimizer = optimizer or functools.partial(torch.optim.AdamW, lr=1e-3)
    built = _build("optimizer", optimizer, parameters)
    return {"optimizer": built, "lr_scheduler": _build("scheduler", scheduler, built)} if scheduler else built


def _build(name: str, factory: Callable[..., Any], argument: Any) -> Any:
    try:
        return factory(argument)
    except (TypeError, ValueError) as e:
        keywords = getattr(factory, "keywords", {})  # of a functools.partial
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


def loggable(name: str) -> str:
    """Return a class name as part of a metric name, with the characters that every logger accepts.

    MLflow accepts letters, digits, ``_ . - / :`` and spaces, and keeps metrics as files, so that one must not be the
    folder of another.
    """
    return re.sub(r"[^\w. -]", "_", name)


class SegmentationTask(RestorableTask):
    """Segmentation with binary targets (1, 0, NaN), or with targets of kind ``labels`` and a background channel.

    Args:
        network: from ``[N, 1, z, y, x]`` (or ``[N, 1, y, x]``) to logits with a channel per class; for targets of
            kind ``labels`` with one more, the background, which comes first. With several inputs it is called with
            each of them as an argument.
        classes: names of the channels.
        optimizer: from parameters to an optimizer; by default AdamW with a learning rate of 1e-3.
        scheduler: from an optimizer to a scheduler that steps each epoch, or None.
        dice_weight: weight of the Dice term beside cross entropy, from 0 to 1.
        class_weights: weight of a positive voxel in the cross entropy: ``none``; ``pos_weight``, the ratio of
            negative to positive voxels; ``inverse_sqrt``, its square root; or ``{class: weight}``. Measured on
            ``weight_batches`` batches of the train split, bounded to [0.1, 50] and printed.
        weight_batches: batches on which class weights are measured.
        input_name: the input of the batch, or a list with the inputs of the network in order; by default the only
            one.
        target_name: the target of the batch; by default the only one.

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
        dice_weight: float = 0.5,
        class_weights: str | Mapping[str, float] = "none",
        weight_batches: int = 8,
        input_name: str | Sequence[str] | None = None,
        target_name: str | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.classes = tuple(classes)
        self.optimizer = optimizer
        self.scheduler = scheduler
        if not isinstance(dice_weight, int | float) or not 0 <= dice_weight <= 1:
            raise CellMapValueError(f"dice_weight must be in [0, 1], got {dice_weight!r}")
        self.dice_weight = dice_weight
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
        self.target_name = target_name
        self.register_buffer("pos_weight", torch.ones(len(self.classes), dtype=torch.float32))
        #: Per stage (val, test) and class that occurred last: Dice, and that of the best constant predictor.
        self.scores: dict[str, dict[str, dict[str, float]]] = {}
        self.val_dice = DiceScore(self.classes)
        self.test_dice = DiceScore(self.classes)
        self.val_loss = MeanOverSamples()
        self.test_loss = MeanOverSamples()

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return logits of finished inputs."""
        out: Tensor = self.network(*inputs)
        return out

    def _parts(self, batch: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return the inputs and the target of a batch."""
        data: Any = getattr(self.trainer, "datamodule", None)
        self._check_kind(data, ("binary", "labels"))
        name = select_array("target", self.target_name, list(getattr(data, "target_arrays", [])))
        return self._inputs(batch), batch[name]

    def _inputs(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        if isinstance(self.input_name, tuple):
            return [batch[name] for name in self.input_name]
        data: Any = getattr(self.trainer, "datamodule", None)
        return [batch[select_array("input", self.input_name, list(getattr(data, "input_arrays", [])))]]

    def _check_kind(self, data: Any, kinds: Sequence[str]) -> None:
        targets = getattr(data, "target_arrays", {})
        target = targets.get(select_array("target", self.target_name, list(targets))) if targets else None
        if target is not None and target.kind.name not in kinds:
            raise CellMapValueError(
                f"SegmentationTask needs a target of kind {' or '.join(kinds)} here, got {target.kind.name}; select "
                "another with target_name, or write another task"
            )

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the weighted sum of cross entropy and Dice over the annotated voxels.

        Args:
            logits: ``[N, C, ...]``, or for integer targets ``[N, 1 + C, ...]`` with the background first.
            target: ``[N, C, ...]`` of 1, 0 and NaN, or ``[N, 1, ...]`` integers for classes that exclude each other.
        """
        if not target.is_floating_point():
            known = (target >= 0) & (target <= len(self.classes))
            total = (1 - self.dice_weight) * masked_cross_entropy(logits, target, known)
            if self.dice_weight:
                total = total + self.dice_weight * masked_dice(*one_against_all(logits, target, known))
            return total
        total = (1 - self.dice_weight) * masked_bce(logits, target, self.pos_weight)
        if self.dice_weight:
            total = total + self.dice_weight * masked_dice(logits, target)
        return total

    # -- steps

    def on_fit_start(self) -> None:
        """Measure the class weights once, before training."""
        if self.class_weights == "none":
            return
        self._check_kind(getattr(self.trainer, "datamodule", None), ("binary",))  # a softmax has no positive voxels
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
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise CellMapValueError(f"class_weights={rule!r} needs the Trainer to run with a CellMapDataModule")
        positive = known = torch.zeros(len(self.classes), dtype=torch.float64, device="cpu")
        source, batch_size = data.train_dataset, data.batch_size
        from cellmap_lightning.loading.dataloader import CellMapDataLoader

        # A separate loader of rank 0: the weights must not depend on ranks, nor advance the training stream.
        loader = CellMapDataLoader(
            source, batch_size, samples_per_epoch=self.weight_batches * batch_size, seed=data.seed, rank=0, world=1
        )
        name = select_array("target", self.target_name, list(data.target_arrays))
        for batch in loader:
            target = batch[name]
            axes = [0, *range(2, target.ndim)]
            known = known + (~torch.isnan(target)).sum(axes)
            positive = positive + (target == 1).sum(axes)
        ratio = torch.where(positive > 0, (known - positive) / positive.clamp(min=1), 1.0)
        return (ratio if rule == "pos_weight" else ratio.sqrt()).to(torch.float32)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch, logged as ``train/loss``."""
        x, y = self._parts(batch)
        loss = self.loss(self(*x), y)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add the loss and the counts of a batch."""
        self._evaluate(self.val_dice, self.val_loss, batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add the loss and the counts of a batch."""
        self._evaluate(self.test_dice, self.test_loss, batch)

    def _evaluate(self, dice: DiceScore, loss: MeanOverSamples, batch: Mapping[str, Tensor]) -> None:
        x, y = self._parts(batch)
        logits = self(*x)
        if y.is_floating_point():
            dice.update(logits, y)
        else:
            dice.update(*one_against_all(logits, y, (y >= 0) & (y <= len(self.classes))))
        loss.update(self.loss(logits, y), len(y))

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss``, ``val/dice`` and ``val/dice_<class>``."""
        self._report("val", self.val_dice, self.val_loss)

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss``, ``test/dice`` and ``test/dice_<class>``."""
        self._report("test", self.test_dice, self.test_loss)

    def _report(self, stage: str, dice: DiceScore, loss: MeanOverSamples) -> None:
        if self.trainer.sanity_checking:  # a few tiles are not representative
            dice.reset()
            loss.reset()
            return
        # torchmetrics returns a scalar instead of one element, as with a single class.
        result = {name: value.reshape(-1).tolist() for name, value in dice.compute().items()}
        occurring = [i for i, occurs in enumerate(result["occurs"]) if occurs]
        self.scores[stage] = {
            self.classes[i]: {"dice": result["dice"][i], "constant": result["constant"][i]} for i in occurring
        }
        dice_scores = [result["dice"][i] for i in occurring]
        # The counts are already summed over ranks, so every rank logs the same value and the mean changes nothing.
        self.log(f"{stage}/loss", loss.compute(), sync_dist=True)
        mean = sum(dice_scores) / len(dice_scores) if dice_scores else float("nan")
        self.log(f"{stage}/dice", mean, prog_bar=True, sync_dist=True)
        for name, score in self.scores[stage].items():
            self.log(f"{stage}/dice_{loggable(name)}", score["dice"], sync_dist=True)
        dice.reset()
        loss.reset()

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the probability of each class, ``[N, C, z, y, x]``."""
        return probabilities(self(*self._inputs(batch)), len(self.classes))

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and the scheduler if there is one."""
        return build_optimizers(self, self.optimizer, self.scheduler)
