"""The program of docs/lightning_cli.md, with its configuration."""

import re
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse")
pytestmark = pytest.mark.usefixtures("quiet_lightning")

PAGE = (Path(__file__).parents[1] / "docs" / "lightning_cli.md").read_text(encoding="utf-8")
SMALL = {
    "trainer.accelerator": "cpu", "trainer.max_epochs": "1", "trainer.logger": "false",
    "trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false", "data.batches_per_epoch": "2",
    "trainer.enable_checkpointing": "false", "data.val_samples": "2", "data.cache": "memory",
}  # fmt: skip


@pytest.fixture
def main(tmp_path, monkeypatch, volume):
    monkeypatch.setattr("sys.argv", ["run.py"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mito.yaml").write_text(re.search(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1])
    (tmp_path / "crops.csv").write_text(Path(volume.csv_path).read_text())
    for path in Path(volume.csv_path).parent.iterdir():
        if path.is_dir():
            (tmp_path / path.name).symlink_to(path)
    program = {"__name__": "run"}
    exec(re.search(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1], program)
    return program["main"]


def test_the_program_trains(main):
    options = [f"--{key}={value}" for key, value in SMALL.items()]
    cli = main(["fit", "--config", "mito.yaml", *options, "--data.batch_size", "1"])
    with cli.datamodule:
        assert cli.trainer.global_step == 2
        assert cli.datamodule.batch_size == 1
        assert cli.model.classes == ("mito", "er")
        assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.001
        assert "val/dice" in cli.trainer.callback_metrics


def test_a_typo_is_an_error(main, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "mito.yaml", "--data.batch_sise", "1"])
    assert "batch_sise" in capsys.readouterr().err
