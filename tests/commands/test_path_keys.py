"""Keys that name paths, of every command: a list, a mapping or a number is an error of one line."""

import pytest
from hydra import compose, initialize_config_dir

from cellmap_lightning.commands.path_keys import check_paths
from cellmap_lightning.commands.resolvers import CONFIGS, register_resolvers
from tests.commands.test_cli import run_forked

ONE, SEVERAL = "must be one path, got", "must be a path or a list of paths, got"
GIVEN = {
    "tune": {"prediction": "p.zarr", "truth": "t", "class": "mito", "out": "o.yaml"},
    "segment": {"input": "p.zarr", "out": "s.zarr"},
    "convert": {"input": "a.tif", "output": "o.zarr"},
    "submit": {"manifest": "m.csv"},
    "export": {"ckpt": "a.ckpt", "out": "o.pt"},
    "predict": {"ckpt": "a.ckpt", "data.input_path": "raw", "out": "o.zarr"},
    "train": {"data.csv_path": "c.csv", "data.classes": "[mito]"},
    "preview": {"data.csv_path": "c.csv", "data.classes": "[mito]"},
    "inspect": {"data.csv_path": "c.csv"},
}


@pytest.mark.parametrize(
    ("command", "key", "value", "message"),
    [
        ("tune", "truth", "{a: b}", SEVERAL), ("tune", "prediction", "7", SEVERAL), ("tune", "out", "[a]", ONE),
        ("segment", "input", "[a,b]", ONE), ("segment", "out", "3", ONE), ("segment", "raw", "{a: b}", ONE),
        ("convert", "input", "[a.tif,b.tif]", ONE), ("convert", "output", "{a: b}", ONE),
        ("submit", "manifest", "[a]", ONE), ("submit", "predictions", "{a: b}", ONE), ("submit", "tuned", "1.5", ONE),
        ("export", "ckpt", "[a,b]", ONE), ("export", "out", "5", ONE),
        ("predict", "ckpt", "[a,b]", ONE), ("predict", "truth", "{a: b}", SEVERAL), ("predict", "tuned", "[a]", ONE),
        ("train", "resume", "[a]", ONE), ("train", "init_from", "{a: b}", ONE), ("train", "data.csv_path", "[a]", ONE),
        ("preview", "out", "[a]", ONE), ("preview", "data.csv_path", "4", ONE),
        ("inspect", "data.csv_path", "[a,b]", ONE),
    ],
)  # fmt: skip
def test_what_is_no_path_is_an_error_of_one_line(tmp_path, command, key, value, message):
    arguments = GIVEN[command] | {key: value}
    code, text = run_forked(*(f"{k}={v}" for k, v in arguments.items()), cwd=tmp_path, command=command)
    assert code == 1, text
    assert f"{key} {message}" in text
    assert "Traceback" not in text
    assert len(text.strip().splitlines()) == 1, text


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")))
def test_paths_of_the_experiments(name):
    """The demo computes its path: a ``_target_``, which writes the crops."""
    register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        check_paths(compose("train", [f"experiment={name}"]), "train")
