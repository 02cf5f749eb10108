"""A checkpoint is used with the classes, inputs, voxel sizes and values that it was trained with, or it is an error."""

import logging
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from cellmap_lightning.callbacks import make_prediction_writer
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.training.task import SegmentationTask
from tests.commands.test_cli import run_forked, small
from tests.conftest import CLASSES, INPUTS, TARGETS
from tests.runs import module, task, trainer

pytestmark = [
    pytest.mark.usefixtures("quiet_lightning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

OTHER_ORDER = ["er", "mito", "pm"]
COARSE = {name: {**spec, "scale": [20.96, 16, 16]} for name, spec in (*INPUTS.items(), *TARGETS.items())}


class Foreign(L.LightningModule):
    """A module of another package, which compares nothing itself."""

    def __init__(self, channels=3, classes=()):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Conv3d(1, channels, 3, padding=1)

    def training_step(self, batch, batch_idx):
        return self.network(batch["raw"]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return self.network(batch["raw"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.fixture(scope="module")
def saved(volume, tmp_path_factory):
    """Checkpoints of the example task and of a foreign module, after a step."""
    folder = tmp_path_factory.mktemp("saved")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name, model in (("task", task()), ("foreign", Foreign())):
        keep = ModelCheckpoint(folder, name, enable_version_counter=False, save_top_k=1, every_n_train_steps=1)
        with module(volume, batches_per_epoch=1) as data, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(folder, callbacks=[keep], enable_checkpointing=True, limit_val_batches=0).fit(model, data)
    return folder


def use(how, volume, path, folder, model=None, **kwargs):
    """Load a checkpoint in one of the Trainer's ways."""
    run = trainer(folder, max_epochs=2, limit_val_batches=1, limit_test_batches=1, num_sanity_val_steps=0)
    with module(volume, **({"batches_per_epoch": 1, "leakage": "ignore"} | kwargs)) as data:
        classes = list(data.classes or CLASSES)
        model = model or (task() if "task" in path.name else Foreign())
        if how == "fit":
            run.fit(model, data, ckpt_path=path, weights_only=True)
        elif how == "predict":
            run.callbacks.append(make_prediction_writer(str(folder / "out.zarr"), classes=classes))
            run.predict(model, data, ckpt_path=path, weights_only=True)
        else:
            getattr(run, how)(model, data, ckpt_path=path, weights_only=True, verbose=False)


@pytest.mark.parametrize("how", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("kind", ["task", "foreign"])
def test_other_orders_of_classes_are_refused_in_every_stage(volume, saved, tmp_path, how, kind):
    with pytest.raises(CellMapError, match=r"trained with classes=\['mito', 'er', 'pm'\].*channels would be exchanged"):
        use(how, volume, saved / f"{kind}.ckpt", tmp_path, classes=OTHER_ORDER)
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("how", ["fit", "validate", "predict"])
@pytest.mark.parametrize(
    ("classes", "channels"), [(["mito", "er"], 2), (["mito", "er", "nuc"], 3), (["mito", "er", "pm", "nuc"], 4)]
)
def test_other_classes_are_refused_before_torch_compares_sizes(volume, saved, tmp_path, how, classes, channels):
    model = SegmentationTask(nn.Conv3d(1, channels, 3, padding=1), classes)
    gt = f"{volume.path}/recon-1/labels/groundtruth"
    named = (f"{gt}/crop1/[mito,er,nuc]", f"{gt}/crop2/[mito,er,pm]")
    entries = [{"raw": volume.raw_path, "gt": path} for path in named]
    crops = {"datasets": dict.fromkeys(("train", "val", "predict"), entries)}
    with pytest.raises(CellMapError, match=r"trained with classes=\['mito', 'er', 'pm'\], got classes="):
        use(how, volume, saved / "task.ckpt", tmp_path, model, classes=classes, **crops)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"input_arrays": {"image": INPUTS["raw"]}}, r"trained with the inputs \['raw'\], got \['image'\]"),
        ({"input_arrays": {**INPUTS, "wide": COARSE["raw"]}}, r"got \['raw', 'wide'\]"),
        (
            {"input_arrays": {"raw": COARSE["raw"]}, "target_arrays": {"labels": COARSE["labels"]}},
            r"input 'raw': trained with a voxel size of \[10.48, 8, 8\] nm, got \[20.96, 16, 16\] nm",
        ),
        ({"normalize": "zscore"}, "trained with normalize=dtype invert=False, got normalize=zscore invert=False"),
        ({"normalize": {"range": [0, 200]}}, r"got normalize={range: \[0, 200\]} invert=False"),
        ({"invert": True}, "got normalize=dtype invert=True"),
        ({"raw_value_transforms": None}, "input 'raw': trained with values 'normalized', got 'stored'"),
        ({"target_arrays": {"labels": {**TARGETS["labels"], "kind": "labels"}}}, "kind 'binary', got 'labels'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_other_inputs_and_values_are_refused(volume, saved, tmp_path, caplog, kwargs, text):
    for how in ("fit", "validate"):
        if how != "fit" and "voxel size" in text:
            continue
        with pytest.raises(CellMapError, match=text):
            use(how, volume, saved / "foreign.ckpt", tmp_path, **kwargs)


def test_another_voxel_size_is_a_warning_where_nothing_is_trained(volume, saved, tmp_path, caplog):
    arrays = {"input_arrays": {"raw": COARSE["raw"]}, "target_arrays": {"labels": COARSE["labels"]}}
    use("validate", volume, saved / "task.ckpt", tmp_path, **arrays)
    found = [r.getMessage() for r in caplog.records if "trained with a voxel size of" in r.getMessage()]
    assert [text.partition(": ")[2].partition(":")[0] for text in found] == ["input 'raw'", "target 'labels'"]


def test_volume_with_an_own_rule_keeps_it(volume, tmp_path):
    """The rule of an entry has precedence over that of the module."""
    gt = f"{volume.path}/recon-1/labels/groundtruth/crop2/[mito,er,pm]"
    own = {"raw": volume.raw_path, "gt": gt, "normalize": {"range": [0, 100]}, "invert": True}
    with module(volume, datasets={"train": [own]}) as data:
        run = trainer(tmp_path, limit_val_batches=0)
        run.fit(task(), data)
        run.save_checkpoint(tmp_path / "task.ckpt")
    use("validate", volume, tmp_path / "task.ckpt", tmp_path, normalize="zscore", datasets={"val": [own]})
    text = r"were normalized by \(rule='range', low=0.0, high=100.0, invert=True\), got \(rule='dtype'"
    plain = {"raw": volume.raw_path, "gt": gt}
    for split, how in (("val", "validate"), ("train", "fit")):
        with pytest.raises(CellMapError, match=text):
            use(how, volume, tmp_path / "task.ckpt", tmp_path, datasets={split: [plain]})
    other = plain | {"normalize": "dtype", "invert": False}  # on purpose
    use("validate", volume, tmp_path / "task.ckpt", tmp_path, datasets={"val": [other]})
    with pytest.raises(CellMapError, match=text):
        use("fit", volume, tmp_path / "task.ckpt", tmp_path, datasets={"train": [other]})


def test_changeable_settings_may_differ(volume, saved, tmp_path):
    """Batch size, crops, seed, patch and validation have nothing to do with what weights mean."""
    gt = f"{volume.path}/recon-1/labels/groundtruth/crop4/[mito,er,pm]"
    patch = {"shape": [8, 16, 16], "scale": [10.48, 8, 8]}
    use(
        "fit", volume, saved / "task.ckpt", tmp_path, batch_size=1, val_samples=2, seed=3,
        datasets={"train": [{"raw": volume.raw_path, "gt": gt}], "val": [{"raw": volume.raw_path, "gt": gt}]},
        input_arrays={"raw": patch}, target_arrays={"labels": patch},
    )  # fmt: skip
    use(
        "predict",
        volume,
        saved / "task.ckpt",
        tmp_path,
        target_arrays=None,
        datasets={"predict": [{"raw": volume.raw_path}]},
    )


def test_checkpoints_of_earlier_versions_are_loaded(volume, saved, tmp_path):
    content = torch.load(saved / "task.ckpt", weights_only=True)
    del content["CellMapDataModule"]["trained_on"]
    torch.save(content, tmp_path / "task.ckpt")
    use("fit", volume, tmp_path / "task.ckpt", tmp_path)
    use("validate", volume, tmp_path / "task.ckpt", tmp_path, classes=OTHER_ORDER)  # nothing says that it is another
    del content["CellMapDataModule"]
    torch.save(content, tmp_path / "task.ckpt")
    use("validate", volume, tmp_path / "task.ckpt", tmp_path)


def test_mismatched_weights_are_explained(volume, saved, tmp_path):
    """Also where no classes are recorded, as with the data of another package."""
    model = SegmentationTask(nn.Conv3d(1, 3, 5, padding=2), CLASSES)
    text = r"the weights do not fit the model.*network.weight is \[3, 1, 3, 3, 3\], and \[3, 1, 5, 5, 5\] in the model"
    with pytest.raises(CellMapError, match=text):
        use("validate", volume, saved / "task.ckpt", tmp_path, model)
    with pytest.raises(CellMapError, match=r"pos_weight is \[3\], and \[2\] in the model"):
        SegmentationTask.load_from_checkpoint(
            saved / "task.ckpt", network=nn.Conv3d(1, 2, 3, padding=1), classes=["mito", "er"]
        )


@pytest.mark.parametrize("classes", [OTHER_ORDER, ["pm", "er", "mito"]])
def test_channels_of_a_writer_are_those_of_the_data(volume, saved, tmp_path, classes):
    with module(volume) as data:
        run = trainer(tmp_path, callbacks=[make_prediction_writer(str(tmp_path / "out.zarr"), classes=classes)])
        with pytest.raises(CellMapError, match="are those of the data in another order"):
            run.predict(task(), data)
    assert not (tmp_path / "out.zarr").exists()


# -- the commands


@pytest.fixture(scope="module")
def trained(volume, tmp_path_factory):
    """A run of ``cellmap-train`` of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    code, text = run_forked(*small(volume, "trainer.max_epochs=1", "run.name=mine"), cwd=folder)
    assert code == 0, text
    return folder / "runs" / "mine" / "checkpoints" / "last.ckpt"


def command(volume, cwd, name, trained, *arguments):
    if name == "predict":
        given = [f"ckpt={trained}", f"data.input_path={volume.raw_path}", "out=out.zarr", "trainer=cpu", "region=crop2"]
        return run_forked(*given, *arguments, cwd=cwd, command="predict")
    changed = {a.split("=")[0] for a in arguments}
    given = [a for a in small(volume, f"{name}={trained}", "trainer.max_epochs=2") if a.split("=")[0] not in changed]
    return run_forked(*given, "hydra.run.dir=out", *arguments, cwd=cwd)


@pytest.mark.parametrize("name", ["predict", "resume", "init_from"])
def test_a_command_names_the_right_order(volume, trained, tmp_path, name):
    code, text = command(volume, tmp_path, name, trained, "data.classes=[er,mito]")
    assert code == 1, text
    assert "trained with data.classes=[mito,er], got data.classes=[er,mito]: channels would be exchanged" in text
    assert "Traceback" not in text
    assert not (tmp_path / "out.zarr").exists()
    assert not list(tmp_path.glob("out/metrics*"))


@pytest.mark.parametrize(
    ("name", "argument", "expected"),
    [
        ("predict", "data.classes=[mito]", "give those of the checkpoint, and writer.only writes some of them"),
        ("predict", "data.classes=[mito,er,pm]", "trained with data.classes=[mito,er]"),
        ("predict", "data.normalize=zscore", "with metadata.normalize=... and metadata.invert=..."),
        ("predict", "data.invert=true", "trained with data.normalize=dtype data.invert=false, got"),
        ("predict", "writer.classes=[er,mito]", "are those of the data in another order"),
        ("resume", "data.classes=[mito]", "or init_from=... begins a training of other classes"),
        ("resume", "data.classes=[mito,er,pm]", "trained with data.classes=[mito,er]"),
        (
            "resume",
            "patch.scale=[20.96,16,16]",
            "trained with a voxel size of [10.48, 8, 8] nm, got [20.96, 16, 16] nm",
        ),
        ("resume", "data.normalize={percentile: [1, 99]}", "got data.normalize={percentile: [1, 99]}"),
        (
            "resume",
            "+data.target_arrays.labels.kind=labels",
            "target 'labels': trained with kind 'binary', got 'labels'",
        ),
        ("resume", "model.channels=[4,12]", "the weights do not fit the model, whose classes and network must be"),
    ],
)
def test_command_refuses_data_unlike_those_of_the_checkpoint(volume, trained, tmp_path, name, argument, expected):
    code, text = command(volume, tmp_path, name, trained, argument)
    assert code == 1, text
    assert expected in text
    assert "Traceback" not in text
    assert not (tmp_path / "out.zarr").exists()


def test_a_foreign_task_is_compared_before_the_trainer_starts(volume, tmp_path):
    """Torch would compare sizes first."""
    for group, text in (
        ("task/foreign", "_target_: tests.checkpointing.test_data_match.Foreign\nchannels: 2\n"),
        (
            "callbacks/keep",
            "keep: {_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: kept, filename: kept}\n",
        ),
    ):
        (tmp_path / "mine" / group).parent.mkdir(parents=True)
        (tmp_path / "mine" / f"{group}.yaml").write_text(text)
    own = [
        "--config-dir",
        "mine",
        "task=foreign",
        "callbacks=keep",
        "monitor=train/loss",
        "trainer.limit_val_batches=0",
    ]
    kept = tmp_path / "kept" / "kept.ckpt"
    run_forked(*own, *small(volume, "trainer.max_epochs=1", "hydra.run.dir=first"), cwd=tmp_path)
    for more, expected in (
        (["data.classes=[mito,er,pm]", "task.channels=3"], "trained with data.classes=[mito,er], got data.classes=["),
        (["task.channels=3"], "network.weight is [2, 1, 3, 3, 3], and [3, 1, 3, 3, 3] in the model"),
    ):
        given = [a for a in small(volume, f"resume={kept}", "hydra.run.dir=out") if more[0].split("=")[0] not in a]
        code, text = run_forked(*own, *given, *more, cwd=tmp_path)
        assert code == 1
        assert expected in text
        assert "Traceback" not in text


@pytest.mark.slow
def test_init_from_warns_of_other_values_and_begins_with_other_classes(volume, trained, tmp_path):
    code, text = command(
        volume, tmp_path, "init_from", trained, "data.classes=[mito,er,pm]", "patch.scale=[20.96,16,16]",
        "data.invert=true", "trainer.fast_dev_run=true",
    )  # fmt: skip
    assert code == 0, text
    assert "is initialized: its size depends on the classes" in text
    assert "input 'raw': trained with a voxel size of [10.48, 8, 8] nm, got [20.96, 16, 16] nm" in text
    assert "trained with data.normalize=dtype data.invert=false, got data.normalize=dtype data.invert=true" in text


def test_a_volume_is_inverted_on_purpose(volume, trained, tmp_path):
    code, text = command(volume, tmp_path, "predict", trained, "metadata.invert=true")
    assert code == 0, text
    assert (tmp_path / "out.png").exists()
    code, text = command(volume, tmp_path, "predict", trained)
    assert code == 1
    assert "normalization: [255.0, -0.00392156862745098] is there" in text


def test_a_prediction_at_another_voxel_size_warns(volume, trained, tmp_path):
    code, text = command(volume, tmp_path, "predict", trained, "patch.scale=[20.96,16,16]")
    assert code == 0, text
    assert text.count("trained with a voxel size of [10.48, 8, 8] nm, got [20.96, 16, 16] nm") == 2  # input and target


@pytest.mark.slow
def test_an_earlier_checkpoint_of_the_command_has_its_configuration(volume, trained, tmp_path):
    content = torch.load(trained, weights_only=True)
    del content["CellMapDataModule"]["trained_on"]
    torch.save(content, tmp_path / "old.ckpt")
    code, text = command(volume, tmp_path, "resume", tmp_path / "old.ckpt", "data.classes=[er,mito]")
    assert code == 1
    assert "trained with data.classes=[mito,er]" in text
    del content["cellmap_config"]
    torch.save(content, tmp_path / "older.ckpt")
    code, text = command(volume, tmp_path, "resume", tmp_path / "older.ckpt")
    assert code == 0, text
    assert text.count("are not recorded, and not compared") == 1
