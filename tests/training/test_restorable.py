"""Tasks are loaded from checkpoints of ``cellmap-train`` without arguments."""

import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.training.reconstruction import ReconstructionTask
from cellmap_lightning.training.task import SegmentationTask
from tests.checkpointing.test_data_match import trained  # noqa: F401
from tests.commands.test_cli import run_forked, small
from tests.runs import module, task, trainer

pytestmark = pytest.mark.usefixtures("quiet_lightning")

RUNS = (Path(__file__).parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")


class Mine(SegmentationTask):
    """A subclass in user code."""


class PassingOn(SegmentationTask):
    """A subclass that passes its arguments on."""

    def __init__(self, *args, share=0.25, **kwargs):
        super().__init__(*args, **kwargs)
        self.share = share


class PassingOnTwice(PassingOn):
    """A subclass of it with a required argument, which the checkpoint does not have."""

    def __init__(self, name, **kwargs):
        super().__init__(**kwargs)
        self.name = name


class WithNetwork(SegmentationTask):
    """A subclass whose network has a default."""

    def __init__(self, network=None, **kwargs):
        super().__init__(network or nn.Identity(), **kwargs)


@pytest.fixture(scope="module")
def reconstructed(volume, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ssl")
    raw = f"{volume.path}/recon-1/em/fibsem-uint8"
    (folder / "volumes.csv").write_text(f"train,{raw}\nvalidate,{raw}\n")
    overrides = [a for a in small(volume) if not a.startswith(("data.csv", "data.classes"))]
    code, text = run_forked(
        "experiment=raw_only_ssl", "data.csv_path=volumes.csv", *overrides, "trainer.max_epochs=1",
        "trainer.precision=null", "trainer.limit_val_batches=1", "hydra.run.dir=out", cwd=folder,
    )  # fmt: skip
    assert code == 0, text
    return folder / "out" / "checkpoints" / "last.ckpt"


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_load_from_checkpoint_restores_the_trained_task(volume, trained, tmp_path):  # noqa: F811
    loaded = SegmentationTask.load_from_checkpoint(trained).eval()
    assert type(loaded) is SegmentationTask
    assert loaded.classes == ("mito", "er")
    for name, value in weights(trained).items():
        assert torch.equal(loaded.state_dict()[name], value), name
    # Its outputs are those of the network that the command trained, whose weights are in the checkpoint.
    from hydra.utils import instantiate

    config = torch.load(trained, weights_only=True)["cellmap_config"]
    network = instantiate(config["task"]["network"]).eval()
    network.load_state_dict({n.removeprefix("network."): v for n, v in weights(trained).items() if "network." in n})
    x = torch.rand(2, 1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(loaded(x), network(x))
    # And it trains on, with the optimizer of the configuration.
    optimizer = loaded.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["weight_decay"] == 0.0001
    with module(volume, classes=["mito", "er"], batches_per_epoch=1, val_samples=2) as data:
        trainer(tmp_path, limit_val_batches=0).fit(loaded.train(), data)


def test_load_reconstruction_task(reconstructed):
    loaded = ReconstructionTask.load_from_checkpoint(reconstructed)
    assert (loaded.block, loaded.hidden) == ((8, 8, 8), 0.5)
    for name, value in weights(reconstructed).items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with pytest.raises(CellMapTypeError, match=r"ReconstructionTask; load it with ReconstructionTask.load_from_check"):
        SegmentationTask.load_from_checkpoint(reconstructed)


def test_load_from_checkpoint_arguments(trained, tmp_path):  # noqa: F811
    loaded = SegmentationTask.load_from_checkpoint(
        trained, "cpu", strict=True, weights_only=True, dice_weight=0.25, class_weights={"er": 2.0}
    )
    assert (loaded.dice_weight, loaded.class_weights) == (0.25, {"er": 2.0})
    with trained.open("rb") as file:
        assert SegmentationTask.load_from_checkpoint(file).classes == ("mito", "er")
    in_memory = io.BytesIO(trained.read_bytes())
    assert SegmentationTask.load_from_checkpoint(in_memory).classes == ("mito", "er")
    assert SegmentationTask.load_from_checkpoint(f"file://{trained}").classes == ("mito", "er")
    places = []
    SegmentationTask.load_from_checkpoint(trained, lambda storage, place: places.append(place) or storage)
    assert set(places) == {"cpu"}
    assert type(Mine.load_from_checkpoint(trained)) is Mine
    network = nn.Conv3d(1, 2, 3, padding=1)
    with pytest.raises(RuntimeError, match="Missing key"):
        SegmentationTask.load_from_checkpoint(trained, network=network)
    with pytest.warns(UserWarning, match="Found keys that are"):
        loaded = SegmentationTask.load_from_checkpoint(trained, network=network, strict=False)
    assert loaded.network is network
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        loaded.load_from_checkpoint(trained)


def test_subclasses_that_pass_arguments_on(trained):  # noqa: F811
    loaded = PassingOn.load_from_checkpoint(trained, share=0.5)
    assert (loaded.classes, loaded.share) == (("mito", "er"), 0.5)
    for name, value in weights(trained).items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert PassingOn.load_from_checkpoint(trained).share == 0.25
    assert PassingOnTwice.load_from_checkpoint(trained, name="mine").classes == ("mito", "er")
    assert not isinstance(WithNetwork.load_from_checkpoint(trained).network, nn.Identity), "classes are required"
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'name'"):
        PassingOnTwice.load_from_checkpoint(trained)


def test_checkpoint_without_configuration(volume, tmp_path):
    run = trainer(tmp_path, limit_val_batches=0, limit_train_batches=1)
    with module(volume) as data:
        run.fit(task(), data)
    run.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(CellMapTypeError, match=r"x.ckpt has no configuration of a task .* give network=..., classes="):
        SegmentationTask.load_from_checkpoint(tmp_path / "x.ckpt")
    network = nn.Conv3d(1, 3, 3, padding=1)
    loaded = SegmentationTask.load_from_checkpoint(tmp_path / "x.ckpt", network=network, classes=["mito", "er", "pm"])
    assert torch.equal(loaded.network.weight, weights(tmp_path / "x.ckpt")["network.weight"])


class Harmful:
    """Pickled, it would write a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_untrusted_classes_in_checkpoint_are_refused(trained, tmp_path):  # noqa: F811
    content = torch.load(trained, weights_only=True)
    good = content["cellmap_config"]["task"]
    for key, node in (
        ("network", {"_target_": "os.system", "command": f"touch {tmp_path}/harmed"}),
        ("optimizer", {"_target_": "functools.partial", "_args_": ["x"]}),
        ("scheduler", {"_target_": "tests.training.test_restorable.scheduler", "_partial_": True}),
    ):
        content["cellmap_config"]["task"] = good | {key: node}
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(CellMapValueError, match=rf"task.{key}._target_: .* is not trusted"):
            SegmentationTask.load_from_checkpoint(tmp_path / "other.ckpt")
    assert not (tmp_path / "harmed").exists()
    for allow in ({"trust": ["tests.training.test_restorable"]}, {"trust_checkpoint": True}, {"scheduler": None}):
        SegmentationTask.load_from_checkpoint(tmp_path / "other.ckpt", **allow)
    content["more"] = Harmful(tmp_path / "harmed")
    torch.save(content, tmp_path / "pickled.ckpt")
    for weights_only in (None, True):
        with pytest.raises(CellMapValueError, match=r"pickled.ckpt holds objects that could run code"):
            SegmentationTask.load_from_checkpoint(tmp_path / "pickled.ckpt", weights_only=weights_only)
    assert not (tmp_path / "harmed").exists()
    content["more"] = Path("/tmp")
    torch.save(content, tmp_path / "objects.ckpt")
    loaded = SegmentationTask.load_from_checkpoint(tmp_path / "objects.ckpt", weights_only=False, trust_checkpoint=True)
    assert loaded.classes == ("mito", "er")


def scheduler(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer)


def test_snippet_of_the_docs(volume, trained, tmp_path, monkeypatch):  # noqa: F811
    (code,) = re.findall(r"^```python\n(.*?load_from_checkpoint.*?)^```$", RUNS, re.MULTILINE | re.DOTALL)
    folder = tmp_path / "runs" / "mito" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "best.ckpt").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    names = {"raw": torch.rand(1, 1, 8, 16, 16)}
    exec(code, names)
    assert names["probabilities"].shape == (1, 2, 8, 16, 16)
    assert ((names["probabilities"] >= 0) & (names["probabilities"] <= 1)).all()
