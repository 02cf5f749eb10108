"""Networks, tasks and modules of user code with the commands: what works, and messages about what does not."""

import copy
import csv
import json
import math

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from cellmap_lightning.commands.config_values import check_targets
from cellmap_lightning.commands.resolvers import CONFIGS, best_mode, register_resolvers
from tests.commands.test_cli import run_forked, small

PACKAGE = """
from functools import partial

import lightning as L
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits


class Net(nn.Conv3d):
    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 3, padding=1)


class Module(L.LightningModule):
    def __init__(self, network, classes, lr=0.01):
        super().__init__()
        self.network, self.lr = network, lr

    def loss(self, batch):
        logits, target = self.network(batch["raw"]), batch["labels"]
        known = ~target.isnan()
        loss = binary_cross_entropy_with_logits(logits, target.nan_to_num(0), reduction="none")
        return (loss * known).sum() / known.sum().clamp(min=1)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("val/loss", loss, batch_size=len(batch["raw"]))
        self.log("val/dice", 1 / (1 + loss), batch_size=len(batch["raw"]))

    def predict_step(self, batch, batch_idx):
        return self.network(batch["raw"]).sigmoid()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Rising(Module):
    def training_step(self, batch, batch_idx):
        return -self.loss(batch)


class OfTraining(Module):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/only", -self.current_epoch, on_step=False, on_epoch=True)
        return loss


class Silent(Module):
    predict_step = L.LightningModule.predict_step


class OfBatches(Silent):
    def forward(self, batch):
        return self.network(batch["raw"]).sigmoid()


class OfTensors(Silent):
    def forward(self, x):
        return self.network(x)


class Failing(Module):
    def predict_step(self, batch, batch_idx):
        return batch["image"]


class Convolves(Module):
    def training_step(self, batch, batch_idx):
        return self.network(batch["raw"][:, 0]).mean()


class Compares(Module):
    def training_step(self, batch, batch_idx):
        logits = self.network(batch["raw"])[..., 1:]
        return (logits - batch["labels"]).mean()


class Validates(Module):
    def validation_step(self, batch, batch_idx):
        logits = self.network(batch["raw"])[:, :1]
        binary_cross_entropy_with_logits(logits, batch["labels"])


class Nests(Module):
    def training_step(self, batch, batch_idx):
        return binary_cross_entropy_with_logits(self.network(batch["raw"])[:, :, 2:], batch["labels"])


class Masks(Module):
    def training_step(self, batch, batch_idx):
        logits, target = self.network(batch["raw"])[..., 2:], batch["labels"]
        known = target.isfinite()
        return (logits[known] - target[known]).mean()


class TwoOutputs(Module):
    def predict_step(self, batch, batch_idx):
        logits = self.network(batch["raw"])
        return {"labels": logits.sigmoid(), "distance": logits.tanh()}


class Refuses(Module):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("of the user")


class Misspells(Module):
    def training_step(self, batch, batch_idx):
        return self.netwrk(batch["raw"])


class Storing(Module):
    def __init__(self, network, classes, lr=0.01):
        super().__init__(network, classes, lr)
        self.save_hyperparameters()


class StoringOthers(Module):
    def __init__(self, network, classes, lr=0.01, activation=nn.ReLU):
        super().__init__(network, classes, lr)
        self.save_hyperparameters(ignore=["network"])


class StoringFunctions(Module):
    def __init__(self, network, classes, lr=0.01):
        super().__init__(network, classes, lr)
        self.save_hyperparameters({"optimizer": partial(torch.optim.SGD, lr=lr), "lr": lr})


class StoringValues(Module):
    def __init__(self, network, classes, lr=0.01, sizes=(1, 2), scale=torch.ones(3)):
        super().__init__(network, classes, lr)
        self.save_hyperparameters(ignore=["network"])
"""


def write_package(folder):
    """Write a module that commands can import, and files of the user that select its classes."""
    (folder / "modules").mkdir()
    (folder / "modules" / "own_package.py").write_text(PACKAGE)
    for group, content in {
        "model": "_target_: own_package.Net\nin_channels: 1\nout_channels: 2\n",
        "task": "_target_: own_package.Module\nnetwork: ${model}\nclasses: ${data.classes}\n",
    }.items():
        (folder / "mine" / group).mkdir(parents=True)
        (folder / "mine" / group / "own.yaml").write_text(content)


@pytest.fixture
def package(tmp_path, monkeypatch):
    write_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "modules")


def train(volume, tmp_path, *more):
    overrides = small(volume, "model=own", "task=own", "hydra.run.dir=out", *more)
    overrides = [a for a in overrides if not a.startswith(("model.channels", "model.strides"))]
    return run_forked("--config-dir", "mine", *overrides, cwd=tmp_path)


@pytest.fixture(scope="module")
def trained(volume, tmp_path_factory):
    """The output of a training of the module, and its checkpoint."""
    folder = tmp_path_factory.mktemp("own")
    write_package(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder / "modules")
        code, text = train(volume, folder, "trainer.max_epochs=1", "final_validation=false")
    assert code == 0, text
    return text, torch.load(folder / "out" / "checkpoints" / "last.ckpt", weights_only=True)


def predict(volume, trained, tmp_path, target, more="trust=[own_package]"):
    """Predict with the checkpoint, after its class was replaced."""
    content = copy.deepcopy(trained[1])
    content["cellmap_config"]["task"]["_target_"] = f"own_package.{target}"
    torch.save(content, tmp_path / "used.ckpt")
    given = ["ckpt=used.ckpt", f"data.input_path={volume.raw_path}", f"out={target}.zarr", "trainer=cpu"]
    region = "region={z:[0,160],y:[0,160],x:[0,160]}"
    more = [more] if isinstance(more, str) else [*dict.fromkeys(more)]
    return run_forked(*given, region, "picture=false", *more, cwd=tmp_path, command="predict")


def test_the_best_metric_is_logged(trained):
    assert "best.ckpt: the highest val/dice; callbacks.checkpoint.mode changes it" in trained[0]


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("target", ["Module", "OfBatches"])
def test_own_modules_predict(volume, trained, tmp_path, target):
    code, text = predict(volume, trained, tmp_path, target)
    assert code == 0, text
    assert (tmp_path / f"{target}.zarr" / "mito" / "s0").is_dir()


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Silent", "Error: Silent has neither predict_step nor forward, so that it cannot predict; define predict"),
        (
            "OfTensors",
            "Error: OfTensors has no predict_step, so its forward was called with the batch, a dict, and failed (",
        ),
        ("Gone", "  task._target_: 'own_package.Gone' (ModuleNotFoundError: "),
    ],
)
def test_modules_that_cannot_predict(volume, trained, tmp_path, target, message):
    code, text = predict(volume, trained, tmp_path, target)
    assert (code, message in text, "Traceback" in text) == (1, True, False), text
    assert not (tmp_path / f"{target}.zarr").exists()


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "trust=[own_package]",
            "select one of them, as with writer.key=labels; writer.dtype=float32 stores values that",
        ),
        ("writer.key=label", ", and writer.key=label is none of them; did you mean 'labels'?; select one of them"),
        ("writer.key=labels", None),
    ],
)
def test_outputs_of_predict_step_are_listed_with_their_shapes(volume, trained, tmp_path, more, message):
    code, text = predict(volume, trained, tmp_path, "TwoOutputs", ["trust=[own_package]", more])
    assert (code, "Traceback" in text) == (0 if message is None else 1, False), text
    if message is not None:
        assert "Error: predict_step returned labels [2, 2, 8, 16, 16], distance [2, 2, 8, 16, 16]" in text
        assert message in text


@pytest.mark.usefixtures("package")
def test_errors_in_predict_step_are_shown_as_they_are(volume, trained, tmp_path):
    code, text = predict(volume, trained, tmp_path, "Failing")
    assert (code, "KeyError: 'image'" in text) == (1, True), text
    assert "has no predict_step" not in text


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (
            "import no_module",
            "trust=[own_package]",
            "classes that cannot be imported:\n  model._target_: 'own_package.Net' (ModuleNotFoundError",
        ),
        (None, "trust=[own_package]", "(ModuleNotFoundError: No module named 'own_package')\nThey need the modules of"),
        (
            "import no_module",
            "trust=[own_package.Module]",
            "could run any code:\n  model._target_: 'own_package.Net' is not trusted\n",
        ),
        (
            "import no_module",
            "trust_checkpoint=true",
            "'own_package.Net' cannot be imported: No module named",
        ),
    ],
)
def test_modules_that_cannot_be_imported(volume, trained, tmp_path, content, more, message):
    file = tmp_path / "modules" / "own_package.py"
    file.unlink()
    if content is not None:
        file.write_text(content + "\n")
    code, text = predict(volume, trained, tmp_path, "Module", more)
    assert (code, message in text, "Traceback" in text) == (1, True, False), text
    assert "Are you sure" not in text, "Hydra logs nothing"


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("target", "objects"),
    [
        ("Storing", "network (Net)"),
        ("StoringOthers", "activation (type)"),
        ("StoringFunctions", "optimizer (partial)"),
        ("StoringValues", None),
    ],
)
def test_hyperparameters_that_checkpoints_cannot_hold(volume, tmp_path, target, objects):
    more = [f"task._target_=own_package.{target}", "trainer.fast_dev_run=true"]
    if target == "StoringOthers":
        more.append("+task.activation={_target_: hydra.utils.get_class, path: torch.nn.ReLU}")
    code, text = train(volume, tmp_path, *more)
    if objects is None:
        assert code == 0, text
        return
    assert code == 1
    assert f"Error: {target}: save_hyperparameters() stores {objects} in the checkpoints" in text
    assert "Traceback" not in text
    assert not (tmp_path / "out" / "checkpoints").exists(), "before the training"


# -- what is best


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        ("val/dice", "max"), ("val/score", "max"), ("val/r2", "max"), ("val/cosine", "max"), ("val/lossless", "max"),
        ("val/loss", "min"), ("train/labels_loss", "min"), ("val/distance_mae", "min"), ("val_loss", "min"),
        ("val/MSE", "min"), ("val/mae_mito", "min"), ("error", "min"),
    ],
)  # fmt: skip
def test_direction_of_a_metric(monitor, mode):
    register_resolvers()
    assert best_mode(monitor) == mode
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        callbacks = hydra.compose("train", overrides=[f"monitor={monitor}"]).callbacks
        given = hydra.compose("train", overrides=[f"monitor={monitor}", "callbacks.checkpoint.mode=max"]).callbacks
        assert (callbacks.checkpoint.mode, given.checkpoint.mode) == (mode, "max")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("more", "best", "word"),
    [
        ([], min, "lowest"),
        (["callbacks.checkpoint.mode=max"], max, "highest"),
        (["task._target_=own_package.Rising"], min, "lowest"),
    ],
    ids=["falling", "falling, the highest", "rising"],
)
def test_best_checkpoint_of_a_loss(volume, tmp_path, more, best, word):
    given = ["trainer.max_epochs=3", "final_validation=false", "monitor=val/loss"]
    code, text = train(volume, tmp_path, *given, *more)
    assert code == 0, text
    assert f"best.ckpt: the {word} val/loss" in text
    with (tmp_path / "out" / "metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert len({*losses}) == 3, "the choice matters"
    content = torch.load(tmp_path / "out" / "checkpoints" / "best.ckpt", weights_only=True)
    assert content["epoch"] == losses.index(best(losses))
    (state,) = [s for s in content["callbacks"].values() if s.get("monitor") == "val/loss"]
    assert math.isclose(float(state["best_model_score"]), best(losses), rel_tol=1e-5)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("more", [[], ["callbacks.checkpoint=null"], ["final_validation=false"]], ids=" ".join)
def test_a_monitor_of_training_alone(volume, tmp_path, more):
    """The final validation, which lacks it, leaves that of the best weights; without it, that of the last epoch."""
    given = ["task._target_=own_package.OfTraining", "trainer.max_epochs=2", "monitor=train/only"]
    code, text = train(volume, tmp_path, *given, *more)
    assert code == 0, text
    with (tmp_path / "out" / "metrics.csv").open() as file:
        values = [float(row["train/only"]) for row in csv.DictReader(file) if row["train/only"]]
    value = json.loads((tmp_path / "out" / "scores.json").read_text())["value"]
    assert value == pytest.approx(values[-1] if more else max(values))
    assert len({*values}) == 2, "the choice matters"


# -- arguments of the option that is replaced


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            ["model._target_=torch.nn.Conv3d"],
            ["model: Conv3d has no argument spatial_dims, channels, strides, num_res_units, act, norm",
             "which model=unet sets for cellmap_lightning.training.unet.UNet; Conv3d takes in_channels, out_channels, ",
             "write _target_: torch.nn.Conv3d and its arguments into my_configs/model/mine.yaml",
             "--config-dir my_configs model=mine; or give them in an experiment with 'override /model: null'"],
        ),
        (
            ["model=unet_small", "model._target_=monai.networks.nets.DynUNet"],
            ["which model=unet_small sets for cellmap_lightning.training.unet.UNet"],
        ),
        (
            ["task._target_=cellmap_lightning.training.reconstruction.ReconstructionTask"],
            ["task: ReconstructionTask has no argument classes, loss, dice_weight, class_weights, weight_batches, ",
             "target_name, which task=segmentation sets for cellmap_lightning.training.task.SegmentationTask"],
        ),
        (
            ["task.optimizer._target_=torch.optim.LBFGS"],
            ["task.optimizer: LBFGS has no argument weight_decay, which task=segmentation sets for torch.optim.AdamW",
             "~task.optimizer.weight_decay leaves it out"],
        ),
        (["model._target_=torch.nn.Conv3d", "+model.kernel_sizes=3"], ["model.kernel_sizes: Conv3d has no argument"]),
        (["+model.spatial_dim=3"], ["model.spatial_dim: UNet has no argument 'spatial_dim'; did you mean"]),
    ],
)  # fmt: skip
def test_arguments_of_the_class_that_is_replaced(volume, tmp_path, overrides, messages):
    given = [a for a in small(volume) if not a.startswith("model.")]
    code, text = run_forked(*given, *overrides, cwd=tmp_path)
    assert code == 1
    for message in messages:
        assert message in text
    assert "Traceback" not in text


@pytest.mark.usefixtures("package")
def test_experiment_without_an_option_of_the_model(volume, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir()
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: null\n  - override /task: null\n"
        "model: {_target_: own_package.Net, in_channels: 1, out_channels: 2}\n"
        "task: {_target_: own_package.Module, network: '${model}', classes: '${data.classes}'}\n"
    )
    overrides = [a for a in small(volume, "trainer.fast_dev_run=true") if not a.startswith("model.")]
    code, text = run_forked("--config-dir", "mine", "experiment=own", "hydra.run.dir=out", *overrides, cwd=tmp_path)
    assert code == 0, text
    assert OmegaConf.load(tmp_path / "out" / "config.yaml").model == {
        "_target_": "own_package.Net", "in_channels": 1, "out_channels": 2,
    }  # fmt: skip


def test_messages_need_no_running_command():
    node = {"_target_": "torch.nn.Conv3d", "spatial_dims": 3}
    with pytest.raises(KeyError, match=r"model\.spatial_dims: Conv3d has no argument 'spatial_dims'"):
        check_targets(OmegaConf.create({"model": copy.deepcopy(node)}))


SHAPES = "with a batch of inputs raw [2, 1, 8, 16, 16] and targets labels [2, 2, 8, 16, 16]"


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("target", "row", "variables", "message"),
    [
        ("Convolves", 'return self.network(batch["raw"][:, 0]).mean()', "", "RuntimeError: Given groups=1, "),
        (
            "Compares",
            'return (logits - batch["labels"]).mean()',
            ", where logits is [2, 2, 8, 16, 15]",
            "RuntimeError: The size of tensor a (15)",
        ),
        (
            "Masks",
            "return (logits[known] - target[known]).mean()",
            ", where logits is [2, 2, 8, 16, 14], known is [2, 2, 8, 16, 16], target is [2, 2, 8, 16, 16]",
            "IndexError: The shape of the mask",
        ),
        (
            "Nests",
            'return binary_cross_entropy_with_logits(self.network(batch["raw"])[:, :, 2:], batch["labels"])',
            ", where input is [2, 2, 6, 16, 16], target is [2, 2, 8, 16, 16]",
            "ValueError: Target size (torch.Size(",
        ),
        (
            "Validates",
            'binary_cross_entropy_with_logits(logits, batch["labels"])',
            ", where logits is [2, 1, 8, 16, 16], input is [2, 1, 8, 16, 16], target is [2, 2, 8, 16, 16]",
            "ValueError: Target size (torch.Size(",
        ),
    ],
)
def test_shapes_that_torch_refuses_are_one_error(volume, tmp_path, target, row, variables, message):
    code, text = train(volume, tmp_path, f"task._target_=own_package.{target}")
    assert (code, "Traceback" in text) == (1, False), text
    (line,) = [line for line in text.splitlines() if line.startswith("Error: ")]
    number = next(n for n, content in enumerate(PACKAGE.splitlines(), 1) if content.strip() == row)
    step = "validation_step" if target == "Validates" else "training_step"
    place = f"modules/own_package.py, line {number}, in {step} ({row})"
    assert line.startswith(f"Error: {target}: {place} fails {SHAPES}{variables}: {message}")
    for part in ["docs/own_module.md", "HYDRA_FULL_ERROR=1 shows the traceback"]:
        assert part in line


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("target", ["Refuses", "Misspells", "Compares with HYDRA_FULL_ERROR"])
def test_other_errors_of_a_step_have_a_traceback(volume, tmp_path, monkeypatch, target):
    target, _, variable = target.partition(" with ")
    if variable:
        monkeypatch.setenv(variable, "1")
    code, text = train(volume, tmp_path, f"task._target_=own_package.{target}")
    assert code == (99 if variable else 1)  # with the variable, Hydra raises the error itself
    assert ("own_package.py" in text and "Traceback" in text) != bool(variable)
    assert f"Error: {target}" not in text
    assert "docs/own_module.md" not in text
