"""A few training steps of each experiment."""

from pathlib import Path

import pytest
import torch

from tests.commands.test_cli import run_forked

SMALL = [
    "trainer.accelerator=cpu", "trainer.precision=null", "trainer.max_epochs=1", "data.batch_size=2",
    "data.batches_per_epoch=2", "data.val_samples=4", "trainer.limit_val_batches=2", "data.cache=memory",
    "hydra.run.dir=out",
]  # fmt: skip
NET = ["model.channels=[4,8]", "model.strides=[2]"]
PATCH = ["patch.shape=[8,16,16]", "patch.scale=[10.48,8,8]"]


def challenge(volume, folder):
    """The volume in the folders of the challenge."""
    (folder / "data" / "jrc_a").mkdir(parents=True)
    (folder / "data" / "jrc_a" / "jrc_a.zarr").symlink_to(volume.path)


def finished(folder, *arguments):
    code, text = run_forked(*arguments, cwd=folder)
    assert code == 0, text
    assert (folder / "out" / "samples.png").stat().st_size > 0
    return text, torch.load(folder / "out" / "checkpoints" / "last.ckpt", weights_only=True)


def test_csc_mito_3d(volume, tmp_path):
    challenge(volume, tmp_path)
    text, saved = finished(tmp_path, "experiment=csc_mito_3d", *SMALL, *NET, *PATCH, "data.val_fraction=0.4")
    assert saved["cellmap_config"]["data"]["classes"] == ["mito"]
    assert "class weights (inverse_sqrt): mito" in text


@pytest.mark.parametrize("command", ["preview", "inspect"])
@pytest.mark.parametrize("source", ["the file of the README", "experiment=csc_mito_3d", "experiment=demo"])
def test_preview_and_inspect_take_experiments(volume, tmp_path, command, source):
    arguments = [source, f"data.csv_path={volume.csv_path}", *PATCH, *NET, "trainer=cpu", "name=mine"]
    if source == "the file of the README":
        text = (Path(__file__).parents[2] / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
        (tmp_path / "my_configs" / "experiment").mkdir(parents=True)
        (tmp_path / "my_configs" / "experiment" / "mito.yaml").write_text(text)
        arguments[0] = "experiment=mito"
        arguments = ["--config-dir", "my_configs", *arguments]
    elif "csc" in source:
        challenge(volume, tmp_path)
        arguments.remove(f"data.csv_path={volume.csv_path}")
    code, text = run_forked(*arguments, *(["samples=2"] if command == "preview" else []), cwd=tmp_path, command=command)
    assert code == 0, text
    assert not (tmp_path / "runs").exists()
    if command == "preview":
        assert "[HYDRA]" not in text
        assert max(map(len, text.splitlines())) <= 80
        assert (tmp_path / "preview-links.txt").read_text().count("neuroglancer") == 2
    else:
        assert "Costs of" in text


@pytest.mark.parametrize("command", ["preview", "inspect"])
def test_preview_and_inspect_refuse_unknown_keys(volume, tmp_path, command):
    code, text = run_forked(f"data.csv_path={volume.csv_path}", "+monitr=val/dice", cwd=tmp_path, command=command)
    assert code == 1
    assert "did you mean 'monitor'?" in text


@pytest.mark.parametrize(("name", "channels"), [("instances_affinities", 6), ("instances_sdt", 4)])
def test_instances(volume, tmp_path, name, channels):
    more = [f"data.csv_path={volume.csv_path}", "trainer.fast_dev_run=true", "hydra.run.dir=out", *NET]
    patch = ["patch.shape=[8,16,16]", "data.batch_size=2"]
    code, text = run_forked(f"experiment={name}", *more, *patch, cwd=tmp_path)
    assert code == 0, text
    assert "shows no predictions" not in text
    assert (tmp_path / "out" / "samples.png").stat().st_size > 0
    assert f"out_channels: {channels}" in (tmp_path / "out" / "config.yaml").read_text()


@pytest.mark.slow
def test_csc_all_2d(volume, tmp_path):
    challenge(volume, tmp_path)
    more = ["patch.shape=[1,32,32]", "patch.scale=[10.48,8,8]", "data.classes=[mito,er,pm]", "data.val_fraction=0.4"]
    _, saved = finished(tmp_path, "experiment=csc_all_2d", *SMALL, *NET, *more)
    assert saved["state_dict"]["network.model.0.conv.unit0.conv.weight"].ndim == 4


@pytest.mark.slow
def test_multiscale_context(volume, tmp_path):
    small = [f"model.{part}.{key}" for part in ("network", "context") for key in ("channels=[4,8]", "strides=[2]")]
    _, saved = finished(
        tmp_path, "experiment=multiscale_context", f"data.csv_path={volume.csv_path}", "data.classes=[mito,er]",
        "trainer=cpu", *SMALL, *PATCH, *small, "data.input_arrays.context.shape=[8,16,16]",
        "data.input_arrays.context.scale=[20.96,16,16]",
    )  # fmt: skip
    assert any(name.startswith("network.context.") for name in saved["state_dict"])


@pytest.mark.slow
def test_self_supervised_pretraining_and_finetuning(volume, tmp_path):
    raw = f"{volume.path}/recon-1/em/fibsem-uint8"
    (tmp_path / "volumes.csv").write_text(f"train,{raw}\nvalidate,{raw}\n")
    _, before = finished(tmp_path, "experiment=raw_only_ssl", "data.csv_path=volumes.csv", *SMALL, *NET, *PATCH)
    (tmp_path / "out").rename(tmp_path / "ssl")
    crops = [f"data.csv_path={volume.csv_path}", "data.classes=[mito]"]
    text, after = finished(
        tmp_path, "experiment=finetune", "init_from=ssl/checkpoints/last.ckpt", *crops, *SMALL, *NET, *PATCH,
        "task.optimizer.lr=0",
    )  # fmt: skip
    # As many channels as before, but they mean something else now: the head is not that of the reconstruction.
    head = {name for name in before["state_dict"] if f"{name.removeprefix('network.')} is initialized" in text}
    assert any(name.endswith("conv.weight") for name in head)
    for name, value in before["state_dict"].items():
        if name not in head:
            assert torch.equal(value, after["state_dict"][name]), name
    assert any(not torch.equal(before["state_dict"][name], after["state_dict"][name]) for name in head)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("init_from=nowhere.ckpt", "there is no such checkpoint"),
        ("seed=0", "init_from=best.ckpt: there is no such checkpoint; checkpoints beside it: "),
    ],
)
def test_finetune_without_checkpoint_is_refused(volume, tmp_path, overrides, expected):
    crops = [f"data.csv_path={volume.csv_path}", "data.classes=[mito]"]
    code, text = run_forked("experiment=finetune", *crops, *SMALL, *NET, *PATCH, overrides, cwd=tmp_path)
    assert code == 1
    assert expected in text
    assert "Traceback" not in text
