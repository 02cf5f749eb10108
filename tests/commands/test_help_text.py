"""``--help`` and ``--version`` of every command."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import hydra
import pytest

import cellmap_lightning
from cellmap_lightning.commands.help_text import command_help
from cellmap_lightning.commands.program import CONFIGS
from tests.command_lines import composed, shell_commands

ROOT = Path(__file__).parents[2]
ALL = ["augment", "callbacks", "data", "experiment", "logger", "model", "task", "trainer"]
GROUPS = {"train": ALL, "preview": ALL, "inspect": ALL, "predict": ["data", "trainer"]} | {
    name: [] for name in ("segment", "evaluate", "tune", "submit", "convert", "export")
}


def shown(name, *arguments, cwd):
    """Return the lines that a command prints, and the heavy modules that it has imported."""
    code = (
        f"import sys, json\nsys.argv = ['cellmap-{name}', *{list(arguments)!r}]\n"
        f"from cellmap_lightning.commands.{name}_command import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "print(json.dumps([m for m in ('torch', 'lightning', 'zarr', 'monai') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    *lines, imported = done.stdout.splitlines()
    return lines, json.loads(imported)


def test_every_command_is_covered():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {name.removeprefix("cellmap-") for name in project["scripts"]} == set(GROUPS)


@pytest.mark.parametrize("name", GROUPS)
def test_help(name, tmp_path):
    lines, imported = shown(name, "--help", cwd=tmp_path)
    assert imported == []
    assert re.fullmatch(r"[A-Z][a-z]+ .*\.", lines[0])
    assert lines[2] == "Examples:"
    examples = [line for line in lines[3:6] if line.startswith(f"  cellmap-{name} ")]
    assert len(examples) == 3
    assert max(map(len, lines)) <= 130
    unwrapped = re.sub(r",\n    ", ", ", "\n".join(lines[6:])).splitlines()
    groups = {m[1]: m[2].split(", ") for line in unwrapped if (m := re.fullmatch(r"  (\w+): (.*)", line))}
    assert sorted(groups) == GROUPS[name]
    for group, options in groups.items():
        assert options == sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    assert any(line.startswith("  --cfg job") for line in lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", GROUPS)
def test_examples_compose(name, tmp_path):
    (tmp_path / "my_configs" / "experiment").mkdir(parents=True)
    (tmp_path / "my_configs" / "experiment" / "mito.yaml").write_text("# @package _global_\nname: mito\n")
    with hydra.initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
        header = hydra.compose(name, return_hydra_config=True).hydra.help.header
    commands = shell_commands(header.split("Examples:")[1])
    assert len(commands) == 3
    for command in commands:
        assert command[0] == f"cellmap-{name}"
        composed(command, tmp_path)


def test_options_of_the_user_are_listed(tmp_path):
    folder = tmp_path / "mine" / "model"
    folder.mkdir(parents=True)
    (folder / "my_net.yaml").write_text("_target_: torch.nn.Identity\n")
    lines, _ = shown("train", "--config-dir", "mine", "--help", cwd=tmp_path)
    assert "  model: my_net, unet, unet2d, unet_context, unet_small" in lines


@pytest.mark.parametrize("name", GROUPS)
def test_version(name, tmp_path):
    assert shown(name, "--version", cwd=tmp_path) == ([f"cellmap-lightning {cellmap_lightning.__version__}"], [])


def test_dollar_signs_of_a_header_are_shown():
    assert command_help("costs $1\n", {}, []).startswith("costs $$1\n")
