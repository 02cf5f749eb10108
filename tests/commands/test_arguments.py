"""Command lines: unambiguous arguments work, others are reported in a sentence with the right form."""

import shutil

import pytest
import torch
import yaml

from cellmap_lightning.commands.arguments import prepare_arguments
from cellmap_lightning.commands.resolvers import CONFIGS
from tests.commands.test_cli import EXPERIMENT, run, run_forked, small

LIGHTNING = "epoch=0-step=3.ckpt"


@pytest.fixture(scope="module")
def trained(volume, tmp_path_factory):
    """A checkpoint under Lightning's default name, and under others that Hydra's grammar refuses."""
    folder = tmp_path_factory.mktemp("trained")
    code, text = run_forked(*small(volume, "trainer.max_epochs=1", "hydra.run.dir=out"), cwd=folder)
    assert code == 0, text
    for name in (LIGHTNING, "my runs/epoch=0 step=3.ckpt", "it's (1)=a,b.ckpt", "plain.ckpt"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "out" / "checkpoints" / "best.ckpt", folder / name)
    return folder


@pytest.mark.cover(1)
@pytest.mark.parametrize("name", [LIGHTNING, "my runs/epoch=0 step=3.ckpt", "it's (1)=a,b.ckpt", "plain.ckpt"])
@pytest.mark.parametrize("key", ["ckpt", "init_from", "resume"])
def test_checkpoint_paths_with_special_characters(trained, volume, tmp_path, name, key):
    path = f"{key}={trained / name}"
    if key == "ckpt":
        given = [path, f"data.input_path={volume.raw_path}", "region=crop2", "out=out.zarr", "trainer=cpu"]
        code, text = run_forked(*given, "picture=false", cwd=tmp_path, command="predict")
    else:
        code, text = run_forked(*small(volume, path, "trainer.max_epochs=2", "hydra.run.dir=new"), cwd=tmp_path)
    assert code == 0, text
    if key != "ckpt":
        assert yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())[key] == str(trained / name)


def test_arguments_in_a_separate_process(trained, volume, tmp_path):
    done = run(
        *small(volume, f"init_from={trained}/{LIGHTNING}", "trainer.fast_dev_run=true", "hydra.run.dir=new"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    done = run("data.classes=[mito,", "er]", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "write data.classes=[mito,er]" in done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["ckpt=a=b"], ["ckpt='a=b'"]),
        (["ckpt='a=b'"], ["ckpt='a=b'"]),
        (["++init_from=a=b", "+resume=it's=b"], ["++init_from='a=b'", "+resume='it\\'s=b'"]),
        (["resume=auto"], ["resume=auto"]),
        (["ckpt=${oc.env:HOME}/x.ckpt"], ["ckpt=${oc.env:HOME}/x.ckpt"]),
        (["init_from=null"], ["init_from=null"]),
        (["-m", "init_from=a=1.ckpt,b=2.ckpt"], ["-m", "init_from='a=1.ckpt','b=2.ckpt'"]),
        (["-m", "init_from=a.ckpt,b.ckpt"], ["-m", "init_from=a.ckpt,b.ckpt"]),
        (["--config-dir", "mine", "~callbacks", "seed=1"], ["--config-dir", "mine", "~callbacks", "seed=1"]),
        (["seed=1,2", "-m"], ["seed=1,2", "-m"]),
        (["--epochs", "3"], ["--epochs", "3"]),
        (["--cfg", "job"], ["--cfg", "job"]),
        (["data.classes=[mito, er]"], ["data.classes=[mito, er]"]),
        (["name="], ["name="]),
    ],
)
def test_prepared_arguments(given, expected):
    assert prepare_arguments("train", given, CONFIGS) == expected


@pytest.mark.parametrize(
    "more",
    [
        ["~callbacks"],
        ["~logger"],
        pytest.param(["~callbacks", "~logger"], marks=pytest.mark.slow),
        ["~callbacks.recent"],
    ],
)
def test_optional_groups_can_be_removed(volume, tmp_path, more):
    code, text = run_forked(*small(volume, "trainer.max_epochs=1", "hydra.run.dir=out", *more), cwd=tmp_path)
    assert code == 0, text
    assert (tmp_path / "out" / "metrics.csv").exists() == ("~logger" not in more)
    assert (tmp_path / "out" / "checkpoints" / "best.ckpt").exists() == ("~callbacks" not in more)


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        (
            "train",
            ["model=null"],
            "model=null: cellmap-train needs model; select another with model=..., one of unet, ",
        ),
        ("train", ["task=null"], "my_configs/task/mine.yaml is selected by --config-dir my_configs task=mine"),
        ("train", ["logger=null"], "logger=null: a group is left out with ~logger"),
        ("train", ["experiment=null"], "experiment=null: a group is left out with ~experiment"),
        ("train", ["~model"], "~model: cellmap-train needs model; select another with model=..., one of unet, unet2d"),
        ("train", ["~trainer"], "cellmap-train needs trainer"),
        ("preview", ["~data"], "cellmap-preview needs data"),
        (
            "train",
            ["data.classes=[mito,", "membrane]"],
            "write data.classes=[mito,membrane], or put it in quotes: 'data.",
        ),
        ("train", ["patch.shape=[8,", "16,", "16]", "seed=1"], "write patch.shape=[8,16,16]"),
        ("predict", ["region={z:", "[0,", "1]}"], "region={z: [0, 1]}: the shell splits it at its blanks"),
        ("train", ["seed", "=", "3"], "seed: blanks around '=' split it; write seed=3 without them"),
        ("train", ["seed", "=3"], "write seed=3 without them"),
        ("train", ["seed=", "3"], "write seed=3 without them"),
        ("train", ["crops.csv"], "crops.csv: arguments have the form key=value; did you mean data.csv_path=crops.csv?"),
        ("inspect", ["crops.csv"], "did you mean data.csv_path=crops.csv?"),
        ("inspect", ["a/b.zarr/recon-1/em"], "did you mean data.input_path=a/b.zarr/recon-1/em?"),
        ("predict", ["best.ckpt"], "did you mean ckpt=best.ckpt?"),
        ("predict", ["runs/epoch=0.ckpt"], "did you mean ckpt=runs/epoch=0.ckpt?"),
        ("predict", ["epoch=0-step=3.ckpt"], "did you mean ckpt=epoch=0-step=3.ckpt?"),
        ("train", ["best.ckpt"], "did you mean resume=best.ckpt or init_from=best.ckpt?"),
        ("train", ["demo"], "did you mean experiment=demo?"),
        ("train", ["unet_small"], "did you mean model=unet_small?"),
        ("train", ["my_configs/experiment/mito.yaml"], "--config-dir my_configs experiment=mito"),
        ("train", ["nonsense"], "'cellmap-train --cfg job' prints every key"),
        ("preview", ["crops.csv"], "did you mean data.csv_path=crops.csv?"),
        ("segment", ["p.zarr"], "did you mean input=p.zarr?"),
        ("submit", ["predictions"], "'cellmap-submit --cfg job' prints every key"),
        ("train", ["name=a=b"], "name=a=b cannot be read (mismatched input '=' expecting <EOF>)"),
        ("train", ["name=a(b"], "\"name='a(b'\""),
        ("train", ["data.classes={a"], "data.classes={a cannot be read"),
        ("train", ["data.storage_options={key: top=secret"], "data.storage_options=*** cannot be read"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_invalid_arguments_are_reported_in_one_line(tmp_path, command, given, expected):
    code, text = run_forked(*given, cwd=tmp_path, command=command)
    assert code == 1, text
    assert expected in text
    assert "Traceback" not in text
    assert "secret" not in text
    assert len(text.splitlines()) <= 3, text


FILES = {
    "trainer: gpu\n": "replaces all of trainer by a text; an option of a group is selected with trainer=gpu",
    "model: unet_small\n": "defaults:\n  - override /model: unet_small",
    "data: demo\n": "defaults:\n  - override /data: demo",
    "callbacks: none\nlogger: tensorboard\n": "override /callbacks: none",
    "patch:\n\tshape: [8, 16, 16]\n": "x.yaml, line 3: indented with a tab; use blanks, two for each level",
    "patch:\n  shape:\n  \t- 8\n": "line 4: indented with a tab",
    "name: a: b\n": "x.yaml, line 2: a value that contains ': ' needs quotes",
    "patch: {shape: [8, 16, 16]\n": "x.yaml, line 3: expected ',' or '}'",
}


@pytest.mark.cover(1)
@pytest.mark.parametrize(
    "more", [[], ["trainer.max_epochs=1", "model.channels=[4,8]"]], ids=["alone", "with overrides"]
)
@pytest.mark.parametrize("content", FILES)
def test_invalid_experiment_files(volume, tmp_path, content, more):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "x.yaml").write_text(EXPERIMENT + content)
    given = ["--config-dir", "mine", "experiment=x", f"data.csv_path={volume.csv_path}", "data.classes=[mito]", *more]
    if content.startswith("data"):
        given = given[:3]
    code, text = run_forked(*given, cwd=tmp_path)
    assert code == 1, text
    assert FILES[content] in text
    assert "Traceback" not in text
    assert len(text.splitlines()) <= 4, text


@pytest.mark.parametrize("kind", ["a text", "a tab"])
def test_invalid_included_file(volume, tmp_path, kind):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "x.yaml").write_text(EXPERIMENT + "defaults: [base]\n")
    content = "trainer: gpu\n" if kind == "a text" else "patch:\n\tshape: 1\n"
    (tmp_path / "mine" / "experiment" / "base.yaml").write_text(EXPERIMENT + content)
    given = ["--config-dir", "mine", "experiment=x", f"data.csv_path={volume.csv_path}", "data.classes=[mito]"]
    code, text = run_forked(*given, cwd=tmp_path)
    assert code == 1, text
    assert ("override /trainer: gpu" if kind == "a text" else "base.yaml, line 3: indented with a tab") in text
    assert "Traceback" not in text


def test_default_checkpoint_names_need_no_quotes(trained):
    names = [path.name for path in (trained / "out").rglob("*.ckpt")]
    assert {"best.ckpt", "last.ckpt"} <= set(names)
    assert not [name for name in names if "=" in name]
    assert torch.load(trained / LIGHTNING, weights_only=True)["epoch"] == 0
