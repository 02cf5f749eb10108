"""Classes without any annotation: an error by default, and NaN channels in their place where that is asked for."""

import logging
import math
import pickle

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from cellmap_lightning import CellMapDataModule, compat
from cellmap_lightning.datasets.frequencies import class_frequencies
from cellmap_lightning.errors import CellMapError, CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.training.masked import DiceScore, masked_bce, masked_dice
from cellmap_lightning.training.task import SegmentationTask
from tests.conftest import INPUTS, TARGETS
from tests.make import make_dataset, make_split
from tests.runs import GT, trainer

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")

#: What brackets name, the classes that are asked for, and those of them that nothing annotates.
CASES = {
    "in-no-bracket": ("mito,er", ["mito", "golgi", "er"], ["golgi"]),
    "without-folder": ("mito,golgi,er", ["mito", "golgi", "er"], ["golgi"]),
    "both": ("golgi,mito", ["lyso", "mito", "golgi"], ["lyso", "golgi"]),
}
each_case = pytest.mark.parametrize(("bracket", "classes", "nowhere"), CASES.values(), ids=CASES)


def entries(volume, bracket):
    return {
        split: [{"raw": str(volume.raw_path), "gt": f"{volume.path}/{GT}/crop{n}/[{bracket}]"} for n in numbers]
        for split, numbers in {"train": (2, 3), "val": (4,)}.items()
    }


def module(volume, bracket, classes, **kwargs):
    given = {
        "unannotated_classes": "unknown", "batch_size": 2, "batches_per_epoch": 3, "val_samples": 4,
        "input_arrays": INPUTS, "target_arrays": TARGETS, "datasets": entries(volume, bracket),
    }  # fmt: skip
    return CellMapDataModule(classes, **(given | kwargs))


def warned(caplog, names):
    """The warnings that name any of these classes."""
    return [
        r.getMessage()
        for r in caplog.records
        if r.levelno >= logging.WARNING and any(n in r.getMessage() for n in names)
    ]


def check_channels(target, classes, nowhere):
    assert target.shape[1] == len(classes)
    for number, name in enumerate(classes):
        known = ~torch.isnan(target[:, number])
        assert known.any() != (name in nowhere), name


# -- by default


@pytest.mark.parametrize(
    ("bracket", "match"),
    [
        ("mito,er", r"no crop for 'train' annotates 'golgi'; they annotate er, mito: .* unannotated_classes=unknown"),
        ("mito,golgi,er", "class 'golgi' is in the bracket of the target path, but .* does not exist"),
        ("mito,er,gogli", r"crop2 has no 'gogli', which the bracket .* names; did you mean 'golgi'\?"),
    ],
    ids=["in-no-bracket", "without-folder", "typo"],
)
def test_by_default_it_is_an_error(volume, bracket, match):
    for given in ({"unannotated_classes": "error"}, {}):
        with CellMapDataModule(
            ["mito", "golgi", "er"], INPUTS, TARGETS, datasets=entries(volume, bracket), **given
        ) as data, pytest.raises(CellMapError, match=match):  # fmt: skip
            data.setup("fit")


@pytest.mark.parametrize("value", ["nan", "ignore", None])
def test_what_it_can_be(volume, value):
    for make in (
        lambda: module(volume, "mito", ["mito"], unannotated_classes=value),
        lambda: make_dataset(volume.raw_path, None, None, INPUTS, unannotated_classes=value),
    ):
        with pytest.raises(CellMapValueError, match="unannotated_classes must be one of error, unknown, got"):
            make()


# -- channels and the warning


def together(loader):
    """Targets of all batches of a loader."""
    return torch.cat([batch["labels"] for batch in loader])


@each_case
def test_the_channel_is_nan_and_one_warning_names_the_classes(volume, bracket, classes, nowhere, caplog):
    with module(volume, bracket, classes, val_samples=None) as data:
        data.setup("fit")
        found = warned(caplog, nowhere)
        assert len(found) == 1
        assert all(name in found[0] for name in nowhere)
        assert found[0].startswith("train: ")
        assert ("golgi in volume/crop2, volume/crop3" in found[0]) == ("golgi" in bracket)
        for loader in (data.train_dataloader(), data.val_dataloader()):
            check_channels(together(loader), classes, nowhere)
        assert len(warned(caplog, nowhere)) == 1


def test_a_class_that_only_validation_lacks_is_named_there(volume, caplog):
    crops = entries(volume, "mito,er")
    crops["val"][0]["gt"] = crops["val"][0]["gt"].replace("mito,er", "mito")
    with module(volume, "", ["mito", "er", "lyso"], datasets=crops) as data:
        data.setup("fit")
    assert [text.partition(";")[0] for text in warned(caplog, ["lyso", "er,", "er;"])] == [
        "train: no crop annotates lyso",
        "val: no crop annotates er",
    ]


def test_a_folder_that_one_crop_lacks(volume, caplog):
    """The class is NaN in that crop, and annotated in the other."""
    crops = {"train": entries(volume, "mito,er")["train"]}
    crops["train"][1]["gt"] = crops["train"][1]["gt"].replace("mito,er", "er,nucleolus,mito")
    with module(volume, "", ["mito", "er"], datasets=crops) as data:
        data.setup("fit")
        assert data.train_dataset.annotated_in() == {"mito": 2, "er": 2}
    (text,) = warned(caplog, ["nucleolus"])
    assert "no crop annotates" not in text
    assert "nucleolus in volume/crop3)" in text


def test_a_misspelt_class_is_answered_with_what_is_there(volume, caplog):
    with module(volume, "mito,er", ["mito", "err"]) as data:
        data.setup("fit")
    (text,) = warned(caplog, ["err"])
    assert "no crop annotates err (did you mean 'er'?)" in text


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("binary", {}), ("ids", {}), ("instances", {}), ("labels", {}), ("sdt", {"nm": 50}),
        ("affinities", {"offsets": [[0, 0, 1]]}),
    ],
)  # fmt: skip
def test_in_every_kind_of_target(volume, kind, more, caplog):
    if kind == "sdt":
        pytest.importorskip("scipy")
    targets = {"labels": {**TARGETS["labels"], "kind": kind, **more}}
    with module(volume, "mito,golgi,er", ["golgi", "mito", "er"], target_arrays=targets) as data:
        data.setup("fit")
        found = together(data.train_dataloader())
    if kind == "labels":
        assert set(found.unique().tolist()) <= {-100, 2, 3}
        assert len(found.unique()) == 3
        assert "no voxel is background" in warned(caplog, ["golgi"])[0]
        return
    unknown = found == -1 if kind == "instances" else found.isnan()
    assert unknown[:, 0].all()
    assert not unknown[:, 1].all()
    assert not unknown[:, 2].all()


def test_what_is_implied_of_a_class_stays_known(volume):
    """A class without a folder that other classes exclude: 0 where one of them is present, and NaN elsewhere."""
    with module(volume, "mito,golgi,er", ["golgi", "mito", "er"], class_relation_dict={"golgi": ["mito"]}) as data:
        data.setup("fit")
        golgi, mito, _ = together(data.train_dataloader()).unbind(1)
    assert (golgi[mito == 1] == 0).all()
    assert golgi[mito != 1].isnan().all()


# -- counts, weights, sampling


@each_case
def test_counts_weights_and_sampling(volume, bracket, classes, nowhere):
    with module(volume, bracket, classes) as data:
        data.setup("fit")
        dataset = data.train_dataset
        assert list(dataset.class_counts) == classes
        assert all((dataset.class_counts[name] == 0) == (name in nowhere) for name in classes)
        assert all(dataset.class_weights[name] == 1 for name in nowhere)
        assert all(math.isfinite(weight) for weight in dataset.class_weights.values())
        for strategy in ("mix", "class_balanced", "foreground"):
            rows = {row.name: row for row in class_frequencies(dataset, 12, strategy=strategy).rows}
            for name in classes:
                assert (rows[name].expected_drawn == 0) == (name in nowhere), (strategy, name)
                assert (rows[name].drawn == 0) >= (name in nowhere)
        assert sum(dataset.strategy.class_chances) == pytest.approx(1)


def test_a_strategy_for_a_class_without_annotation_is_refused(volume):
    strategy = {"name": "foreground", "classes": ["golgi"]}
    with (
        module(volume, "mito", ["mito", "golgi"], strategy=strategy) as data,
        pytest.raises(CellMapValueError, match="strategy foreground: no crop holds a voxel of golgi"),
    ):
        data.train_dataset.strategy.prepare()


def test_crops_without_any_annotation_are_left_out_and_at_least_one_is_needed(volume, caplog):
    crops = {"train": [*entries(volume, "mito")["train"], *entries(volume, "golgi")["val"]]}
    with module(volume, "", ["mito", "golgi"], datasets=crops) as data:
        data.setup("fit")
        assert [d.label for d in data.train_dataset.datasets] == ["volume/crop2", "volume/crop3"]
    assert "1 of the 3 crops for 'train' are left out" in caplog.text
    with module(volume, "golgi", ["golgi"]) as data, pytest.raises(CellMapValueError, match="none of the 2 crops"):
        data.setup("fit")


@pytest.mark.parametrize("rule", ["random", "stratified"])
def test_a_rule_does_not_count_on_what_is_not_there(volume, rule, caplog):
    crops = {"train": [e for n in ("train", "val") for e in entries(volume, "mito,golgi")[n]]}
    given = {"classes": ["mito", "golgi"], "input_arrays": INPUTS, "target_arrays": TARGETS, "pad": True}
    split = make_split(datasets=crops, split=rule, val_fraction=0.3, unannotated_classes="unknown", **given)
    assert len(split.entries["val"]) == 1
    assert "holds golgi" not in caplog.text
    row = next(line for line in split.table().splitlines() if line.startswith("golgi"))
    assert row.split() == ["golgi", "0", "0", "0", "0"]
    again = pickle.loads(pickle.dumps(split))
    assert again["train"].annotated_in() == {"mito": 2, "golgi": 0}
    again.close()
    split.close()


# -- losses and scores


@pytest.mark.parametrize("values", [1.0, 0.0, None], ids=["present", "absent", "mixed"])
def test_losses_and_scores_without_that_class_are_those_of_the_others(values):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, 4, generator=generator, dtype=torch.float32)
    target = torch.randint(0, 2, logits.shape, generator=generator).float()
    if values is not None:
        target[:, 2] = values
    target[:, 1] = torch.nan
    others = [0, 2]
    for loss in (masked_bce, masked_dice):
        torch.testing.assert_close(loss(logits, target), loss(logits[:, others], target[:, others]))
    score = DiceScore(["a", "b", "c"])
    score.update(logits, target)
    assert score.compute()["occurs"].tolist() == [True, False, values != 0]


# -- a Trainer


@pytest.mark.parametrize(
    ("case", "weights"), list(zip(CASES, ["none", "pos_weight", "inverse_sqrt"], strict=True)), ids=list(CASES)
)
def test_a_trainer_fits_and_validates(volume, tmp_path, case, weights):
    bracket, classes, nowhere = CASES[case]
    torch.manual_seed(0)
    task = SegmentationTask(nn.Conv3d(1, len(classes), 3, padding=1), classes, class_weights=weights, weight_batches=2)
    run = trainer(tmp_path)
    with module(volume, bracket, classes) as data:
        run.fit(task, datamodule=data)
        run.validate(task, datamodule=data, verbose=False)
    assert all(p.isfinite().all() for p in task.parameters())
    assert set(task.scores["val"]) == set(classes) - set(nowhere)
    scores = [score["dice"] for score in task.scores["val"].values()]
    assert float(run.callback_metrics["val/dice"]) == pytest.approx(np.mean(scores))
    assert torch.isfinite(run.callback_metrics["val/loss"])
    for name in nowhere:
        assert task.pos_weight[classes.index(name)] == 1
        assert f"val/dice_{name}" not in run.callback_metrics


@pytest.mark.parametrize("tolerated", [True, False])
def test_inspection(volume, tolerated):
    data = {
        "datasets": entries(volume, "mito,golgi,er"), "classes": ["mito", "golgi", "er", "lyso"],
        "unannotated_classes": "unknown" if tolerated else "error", "batch_size": 1,
    }  # fmt: skip
    found = inspect(data, {"shape": [8, 16, 24], "scale": [10.48, 8, 8]}, None)
    problems = {(p.kind, p.where) for p in found.problems}
    assert ("empty", "lyso") in problems
    assert (("empty", "golgi") in problems) == tolerated
    assert ("unreadable" in {kind for kind, _ in problems}) != tolerated
    assert (found.refused is None) == tolerated
    assert (found.costs is not None) == tolerated
    assert ('unannotated_classes: "unknown"' in found.proposal.yaml) == tolerated


# -- the names of cellmap-data


@each_case
def test_a_split_of_cellmap_data(volume, tmp_path, bracket, classes, nowhere, caplog):
    lines = [
        f'{usage},{e["raw"]},"{e["gt"]}"'
        for usage, split in (("train", "train"), ("validate", "val"))
        for e in entries(volume, bracket)[split]
    ]
    (tmp_path / "crops.csv").write_text("\n".join(lines))
    spec = {"shape": (8, 16, 24), "scale": (10.48, 8, 8)}
    split = compat.CellMapDataSplit(
        {"raw": spec}, {"labels": spec}, classes, True, csv_path=str(tmp_path / "crops.csv")
    )
    (text,) = warned(caplog, nowhere)
    assert all(name in text for name in nowhere)
    for dataset in (split.train_datasets_combined, split.validation_blocks):
        loader = compat.CellMapDataLoader(dataset, classes, 2, is_train=False)
        check_channels(together(loader.loader), classes, nowhere)
    assert all(split.class_counts["train"][name] == 0 for name in nowhere)
    for weighted in (False, True):
        loader = compat.CellMapDataLoader(
            split.train_datasets_combined, classes, 2, weighted_sampler=weighted, samples_per_epoch=4
        )
        assert together(loader.loader).shape[:2] == (4, len(classes))
    for name in nowhere:
        assert type(split.train_datasets[0].target_sources[name]).__name__ == "EmptyImage"
    split.close()


@pytest.mark.parametrize("bracket", ["mito,golgi", "golgi,mito", "mito,golgi,lyso"])
def test_a_dataset_of_cellmap_data(volume, bracket, caplog):
    spec = {"shape": (8, 16, 24), "scale": (10.48, 8, 8)}
    target = f"{volume.path}/{GT}/crop2/[{bracket}]"
    with compat.CellMapDataset(volume.raw_path, target, ["golgi", "mito"], {"raw": spec}, {"labels": spec}) as dataset:
        assert dataset[0]["labels"][0].isnan().all()
        assert not dataset[0]["labels"][1].isnan().any()
    (text,) = warned(caplog, ["golgi"])
    assert text.startswith("volume/crop2: ")
    target = f"{volume.path}/{GT}/crop99/[{bracket}]"
    with pytest.raises(CellMapFileNotFoundError):
        compat.CellMapDataset(volume.raw_path, target, ["golgi", "mito"], {"raw": spec}, {"labels": spec})


class Loop(L.LightningModule):
    """A program written for cellmap-data: with a masked loss and loaders."""

    def __init__(self, channels):
        super().__init__()
        self.network = nn.Conv3d(1, channels, 1)
        self.losses = []

    def training_step(self, batch, batch_idx):
        target = batch["labels"]
        known = ~target.isnan()
        loss = nn.functional.binary_cross_entropy_with_logits(self.network(batch["raw"])[known], target[known])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_with_a_split_of_cellmap_data(volume, tmp_path):
    classes, spec = ["mito", "golgi", "lyso", "er"], {"shape": (8, 16, 24), "scale": (10.48, 8, 8)}
    crops = entries(volume, "mito,golgi,er")
    given = {"train": crops["train"], "validate": crops["val"]}
    split = compat.CellMapDataSplit({"raw": spec}, {"labels": spec}, classes, True, dataset_dict=given)
    train = compat.CellMapDataLoader(
        split.train_datasets_combined, classes, 2, weighted_sampler=True, samples_per_epoch=6
    )
    val = compat.CellMapDataLoader(split.validation_blocks, classes, 2, is_train=False)
    task = Loop(len(classes))
    trainer(tmp_path, limit_val_batches=3).fit(task, train.loader, val.loader)
    assert len(task.losses) >= 6
    assert np.isfinite(task.losses).all()
    split.close()
    del train, val
