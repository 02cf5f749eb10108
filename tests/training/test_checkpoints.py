"""Files that are given as checkpoints and are none."""

import pytest
import torch

from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.training.checkpoints import read_checkpoint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"usage,raw,target\n", r"is not a checkpoint: it begins with b'usage,ra'; give a \.ckpt file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "is not a checkpoint: it begins with"),
        (b"", "is not a checkpoint: it begins with b''"),
        (b"PK\x03\x04" + bytes(100), "is damaged, or not a checkpoint"),
    ],
    ids=["a CSV", "a picture", "an empty file", "the beginning of one"],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(CellMapValueError, match=message) as e:
        read_checkpoint(tmp_path / "x.ckpt", "ckpt")
    assert "weights_only" not in str(e.value), "torch's advice to run code from the file"


def test_a_checkpoint_without_weights(tmp_path):
    torch.save({"epoch": 1}, tmp_path / "x.ckpt")
    with pytest.raises(CellMapValueError, match="is not a checkpoint of Lightning: it has no 'state_dict'"):
        read_checkpoint(tmp_path / "x.ckpt", "ckpt")


@pytest.mark.parametrize(
    ("inside", "advice"), [("checkpoints/best.ckpt", "did you mean"), ("notes.txt", "it holds no")]
)
def test_a_folder_of_a_run(tmp_path, inside, advice):
    file = tmp_path / "mine" / inside
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    with pytest.raises(CellMapFileNotFoundError, match=f"ckpt={tmp_path}/mine is a folder; {advice}") as e:
        read_checkpoint(tmp_path / "mine", "ckpt")
    assert (str(file) in str(e.value)) == inside.endswith(".ckpt")
