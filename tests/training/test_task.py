"""A task with targets of every kind, alone and together."""

import math

import pytest
import torch
from torch import nn

from cellmap_lightning import CellMapDataModule, CellMapError
from cellmap_lightning.errors import CellMapTypeError
from cellmap_lightning.training.task import SegmentationTask
from tests.runs import GT, trainer

pytestmark = pytest.mark.usefixtures("quiet_lightning")

PATCH = {"shape": [8, 16, 24], "scale": [10.48, 8, 8]}
OFFSETS = [[1, 0, 0], [0, -1, 0], [0, 0, 3]]
KINDS = {
    "binary": {},
    "labels": {"kind": "labels"},
    "affinities": {"kind": "affinities", "offsets": OFFSETS, "weights": [1, 1, 0.5]},
    "sdt": {"kind": "sdt", "nm": 30},
    "boundary": {"kind": "boundary", "nm": 10},
    "lsd": {"kind": "lsd", "sigma": 10},
    "flow": {"kind": "flow", "nm": 30},
    "skeleton_distance": {"kind": "skeleton_distance", "nm": 20},
}
CHANNELS = {"binary": 2, "labels": 3, "affinities": 6, "sdt": 2, "boundary": 2, "lsd": 20, "flow": 6,
            "skeleton_distance": 2}  # fmt: skip
SCORES = {"sdt": "mae", "lsd": "r2", "skeleton_distance": "r2", "flow": "cosine"}


def data_of(volume, *kinds, **more):
    entry, other = ({"raw": volume.raw_path, "gt": f"{volume.path}/{GT}/crop{n}/[mito,er]"} for n in (2, 4))
    return CellMapDataModule(
        classes=["mito", "er"], input_arrays={"raw": PATCH}, target_arrays={k: {**PATCH, **KINDS[k]} for k in kinds},
        datasets={"train": [entry], "val": [other], "predict": [{"raw": volume.raw_path}]}, batch_size=2,
        batches_per_epoch=2, val_samples=2, **more,
    )  # fmt: skip


def task_of(channels, **kwargs):
    torch.manual_seed(0)
    return SegmentationTask(nn.Conv3d(1, channels, 3, padding=1), ["mito", "er"], **kwargs)


@pytest.mark.parametrize("names", [["affinities", "sdt"], ["labels", "flow", "binary"], ["lsd", "skeleton_distance"]])
def test_all_names_of_several_targets_are_known_before_they_are_logged(volume, tmp_path, names):
    task = task_of(sum(CHANNELS[name] for name in names), target_name=names)
    assert task.metric_names() == []
    with data_of(volume, *names) as data:
        run = trainer(tmp_path)
        run.fit(task, data)
    known = task.metric_names()
    assert set(run.callback_metrics) <= set(known)
    assert len(set(known)) == len(known)
    assert {f"train/{name}_loss" for name in names} < set(known)
    assert ("val/dice" in known) == (names[0] != "lsd")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_scored_and_predicted(volume, tmp_path, kind):
    task = task_of(CHANNELS[kind])
    with data_of(volume, kind) as data:
        run = trainer(tmp_path, limit_predict_batches=1)
        run.fit(task, data)
        logged = {name: float(value) for name, value in run.callback_metrics.items()}
        (predicted,) = trainer(tmp_path, limit_predict_batches=1).predict(task, data)
    score = SCORES.get(kind)
    expected = {"val/loss", "train/loss", "val/score", *({"val/dice"} if score in (None, "mae") else ())}
    assert expected | ({f"val/{score}", f"val/{score}_mito"} if score else set()) <= set(logged)
    assert all(math.isfinite(logged[name]) for name in expected)
    assert set(logged) <= set(task.metric_names())
    low, high = data.target_arrays[kind].kind.value_range
    assert low <= predicted.min() < predicted.max() <= high
    channels = task.output_channels()
    assert predicted.shape == (2, len(channels), *PATCH["shape"])
    assert len({channel["name"] for channel in channels}) == len(channels)
    assert {channel["kind"] for channel in channels} == {kind}


def test_predictions_have_the_activation_of_their_kind(volume, tmp_path):
    task = task_of(3 + 2 + 6 + 2, target_name=["labels", "sdt", "affinities", "binary"])
    with data_of(volume, "binary", "labels", "affinities", "sdt") as data:
        trainer(tmp_path, limit_train_batches=0, limit_val_batches=1).validate(task, data, verbose=False)
        x = torch.randn(1, 1, 8, 16, 24)
        task.trainer.datamodule = data
        output, found = task(x), task.predict_step({"raw": x}, 0)
    expected = [output[:, :3].softmax(1)[:, 1:], output[:, 3:5].tanh(), output[:, 5:].sigmoid()]
    torch.testing.assert_close(found, torch.cat(expected, 1))
    names = [channel["name"] for channel in task.output_channels()]
    # Two targets call their channels mito and er.
    assert names[:4] == ["labels_mito", "labels_er", "mito_sdt", "er_sdt"]
    assert names[4:] == [f"{c}_affinity_{o}" for c in ("mito", "er") for o in ("1_0_0", "0_-1_0", "0_0_3")] + [
        "binary_mito", "binary_er",
    ]  # fmt: skip


def test_the_loss_of_several_targets_is_the_sum_of_theirs(volume, tmp_path):
    loss = {"sdt": {"smooth_l1": 2.0}, "affinities": {"balanced_bce": 1.0, "dice": 0.5}}
    both = task_of(8, target_name=["affinities", "sdt"], loss=loss)
    with data_of(volume, "sdt", "affinities") as data:
        run = trainer(tmp_path)
        run.fit(both, data)
        logged = {name: float(value) for name, value in run.callback_metrics.items()}
        batch = next(iter(data.val_dataloader()))
        losses = both.losses(both(batch["raw"]), [batch["affinities"], batch["sdt"]])
        # One head alone, with the same weights.
        alone = task_of(2, target_name="sdt", loss={"smooth_l1": 2.0})
        alone.network.load_state_dict({name: value[6:] for name, value in both.network.state_dict().items()})
        trainer(tmp_path).validate(alone, data, verbose=False)
        torch.testing.assert_close(alone.losses(alone(batch["raw"]), [batch["sdt"]])["sdt"], losses["sdt"])
    assert logged["train/loss"] == pytest.approx(logged["train/affinities_loss"] + logged["train/sdt_loss"])
    assert {"val/affinities_dice", "val/affinities_dice_mito", "val/sdt_dice", "val/sdt_mae"} <= set(logged)
    mean = (logged["val/affinities_dice"] + logged["val/sdt_dice"]) / 2
    assert logged["val/dice"] == pytest.approx(mean)
    assert logged["val/score"] == pytest.approx(mean)
    assert both.scores["val"].keys() <= {"mito", "er"}


class Scales(nn.Module):
    """Three outputs, each of half the resolution of the one before."""

    def __init__(self, stacked):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv3d(1, 2, 3, 2**n, padding=1) for n in range(3))
        self.stacked = stacked

    def forward(self, x):
        outputs = [layer(x) for layer in self.layers]
        if not self.stacked:
            return outputs if self.training else outputs[0]
        same = [nn.functional.interpolate(output, x.shape[2:]) for output in outputs]
        return torch.stack(same, 1) if self.training else same[0]


@pytest.mark.parametrize("stacked", [False, True])
def test_every_scale_of_deep_supervision_is_trained(volume, tmp_path, stacked):
    task = SegmentationTask(Scales(stacked), ["mito", "er"])
    before = [layer.weight.detach().clone() for layer in task.network.layers]
    with data_of(volume, "binary") as data:
        run = trainer(tmp_path)
        run.fit(task, data)
        (predicted, *_) = trainer(tmp_path, limit_predict_batches=1).predict(task, data)
    assert all((layer.weight != old).all() for layer, old in zip(task.network.layers, before, strict=True))
    assert predicted.shape == (2, 2, *PATCH["shape"])
    assert math.isfinite(run.callback_metrics["val/dice"])


@pytest.mark.parametrize(
    ("kinds", "channels", "settings", "match"),
    [
        (["affinities"], 2, {}, r"the network returns 2 channels, and the targets need 6: affinities \(affinities\) 6"),
        (["sdt", "lsd"], 22 + 1, {"target_name": ["sdt", "lsd"]}, r"need 22: sdt \(sdt\) 2, lsd \(lsd\) 20"),
        (["labels"], 2, {}, r"returns 2 channels, and the targets need 3: labels \(labels\) 3"),
        (["sdt", "lsd"], 22, {}, r"the batch has the targets \['sdt', 'lsd'\]; select one with target_name"),
        (["sdt"], 2, {"loss": {"bce": 1}}, "loss of sdt: a loss for outputs with tanh must be one of mse"),
        (["sdt", "lsd"], 22, {"target_name": ["sdt", "lsd"], "loss": {"l1": 1}}, r"must be \{target: .* sdt, lsd"),
        (["flow"], 6, {"class_weights": "pos_weight"}, r"class_weights='pos_weight' need a target of kind bin"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_targets_are_refused(volume, tmp_path, kinds, channels, settings, match):
    with data_of(volume, *kinds) as data, pytest.raises(CellMapError, match=match):
        trainer(tmp_path).fit(task_of(channels, **settings), data)


def test_a_target_of_other_voxels_than_the_output_is_refused(volume, tmp_path):
    with (
        data_of(volume, "binary") as data,
        pytest.raises(CellMapError, match=r"'binary' has \[8, 16, 24\] voxels, and"),
    ):
        trainer(tmp_path).fit(SegmentationTask(nn.Conv3d(1, 2, 3, stride=2, padding=1), ["mito", "er"]), data)


def test_dice_weight_and_loss_exclude_each_other():
    with pytest.raises(CellMapError, match=r"dice_weight=0.5 and loss=\{'bce': 1\} are both given; leave dice_weight"):
        task_of(2, dice_weight=0.5, loss={"bce": 1})


@pytest.mark.parametrize("classes", ["mito", "mito,er", ["mito", 3]])
def test_classes_that_are_no_list_of_names(classes):
    """A text would be read as one class for each of its letters."""
    with pytest.raises(CellMapTypeError, match="classes must be a list of names, got"):
        SegmentationTask(nn.Conv3d(1, 1, 1), classes)
