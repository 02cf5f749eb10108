"""The README: its program runs, its configuration composes, and the files in its map exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import cellmap_lightning
from cellmap_lightning.commands.config_values import check_target, target_nodes
from cellmap_lightning.splits.entries import read_csv

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = Path(cellmap_lightning.__file__).parent
COMMAND = Path(sys.executable).with_name("cellmap-train")


def block(language, number=0):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[number]


def run(*command, cwd):
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, check=False, capture_output=True, text=True, timeout=590,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program_runs(volume, tmp_path):
    # The volume that the program would write, which this session has written already.
    (tmp_path / "demo_data").mkdir()
    (tmp_path / "demo_data" / "demo.zarr").symlink_to(volume.path)
    (tmp_path / "program.py").write_text(block("python"), encoding="utf-8")
    printed = run(sys.executable, "program.py", cwd=tmp_path)
    assert re.fullmatch(r"tensor\(0\.\d+.*\)", printed.splitlines()[-1])


def test_the_version_of_torch_is_the_constraint():
    version = re.search(r"torch ([\d.]+\d) among them", README)[1]
    assert f"torch=={version}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture
def my_configs(tmp_path):
    folder = tmp_path / "my_configs"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mito.yaml").write_text(block("yaml"), encoding="utf-8")
    return folder


def test_the_experiment_composes_and_fits_its_targets(my_configs, tmp_path):
    printed = run(COMMAND, "--config-dir", my_configs, "experiment=mito", "--cfg", "job", "--resolve", cwd=tmp_path)
    cfg = OmegaConf.to_container(OmegaConf.create(printed))
    given = OmegaConf.to_container(OmegaConf.create(block("yaml")))
    for key in ("name", "patch", "task.class_weights", "task.optimizer.lr", "trainer.max_epochs", "data.classes"):
        assert OmegaConf.select(OmegaConf.create(cfg), key) == OmegaConf.select(OmegaConf.create(given), key)
    assert cfg["data"]["spatial_transforms"]["rotate"] == {"axes": {"z": [-180, 180]}}
    assert cfg["data"]["target_arrays"]["labels"] == cfg["patch"]
    nodes = dict(target_nodes(cfg))
    assert {"data", "trainer", "task", "model"} <= set(nodes)
    for where, node in nodes.items():
        check_target(where, node)


def test_the_csv_can_be_read(tmp_path):
    (tmp_path / "crops.csv").write_text(block("csv"), encoding="utf-8")
    entries = read_csv(tmp_path / "crops.csv")
    assert {split: len(found) for split, found in entries.items()} == {"train": 1, "val": 1, "predict": 1}
    assert entries["train"][0].input_path == str(tmp_path / "jrc_a.zarr/recon-1/em/fibsem-uint8")
    assert entries["train"][0].target_path.endswith("crop1/[mito,er]")
    assert entries["predict"][0].target_path is None


def test_the_short_map_names_what_exists():
    text = README.split("\n## Map\n")[1].split("```")[1]
    named = re.findall(r"[\w/]+\.py|[\w]+/", text)
    assert len(named) > 15
    for name in named:
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), name


def test_the_experiments_are_named():
    text = re.search(r"Experiments that come with it: (.*?)\.\n\[", README, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", text)) == {p.stem for p in (ROOT / "configs" / "experiment").glob("*.yaml")}


def test_the_groups_of_the_configuration_are_named():
    line = next(line for line in README.splitlines() if line.startswith("configs/"))
    named = set(line.split("groups:")[1].replace(",", " ").split())
    assert named == {p.name for p in (ROOT / "configs").iterdir() if p.is_dir()}
