"""Raw, mask or model that change during a prediction: no output mixes them, also after kills and restarts."""

import os
import shutil
from pathlib import Path

import lightning as L
import numpy as np
import pytest

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.errors import CellMapFileExistsError, OutputError
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from cellmap_lightning.prediction import job
from cellmap_lightning.prediction.input_stamps import InputStamps
from cellmap_lightning.prediction.journal import Journal
from cellmap_lightning.prediction.prediction_writer import make_prediction_writer
from tests.prediction.predictions import (
    SCALE,
    TRANSLATION,
    Convolution,
    Identity,
    contents,
    predict,
    raw_volume,
    read,
)

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")

SHAPE, PATCH = (48, 40, 50), (12, 16, 20)


def first_chunk(path):
    return path / "s0" / "0" / "0" / "0"


def last_chunk(path):
    return path / "s0" / "2" / "2" / "3"


def edit(chunk):
    """Other bytes in place."""
    other = chunk.parent / "1"
    chunk.write_bytes(other.read_bytes())


def replace(chunk):
    """Another file of the same size and time, as tools leave that keep both."""
    status, content = chunk.stat(), (chunk.parent / "1").read_bytes()
    assert status.st_size == len(content)  # random voxels cannot be compressed
    draft = chunk.with_name("draft")
    draft.write_bytes(content)
    os.utime(draft, ns=(status.st_atime_ns, status.st_mtime_ns))
    draft.replace(chunk)


def retarget(chunk):
    """A link to another file, whose target is exchanged."""
    chunk.unlink()
    chunk.symlink_to(chunk.parent / "1")


CHANGES = {"edited": edit, "replaced": replace, "removed": lambda chunk: chunk.unlink(), "linked": retarget}


@pytest.mark.cover(1)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("blend", ["trim", "gaussian"])
def test_raw_that_changed_between_a_stop_and_the_restart(tmp_path, change, blend):
    path, _ = raw_volume(tmp_path, SHAPE)
    out = tmp_path / "out.zarr"
    given = {"blend": blend, "model_id": "m", "check_context": False}
    predict(path, PATCH, out, limit=8, **given)
    done = Journal(out).finished
    assert 0 < len(done) < 50
    before = contents(out)
    CHANGES[change](first_chunk(path))
    text = rf"raw has changed since block 0 \(.* nm\) was predicted: {path}/.*overwrite=True.*accept_changed_raw=True"
    with pytest.raises(CellMapFileExistsError, match=text):
        predict(path, PATCH, out, **given)
    assert contents(out) == before
    writer = predict(path, PATCH, out, overwrite=True, **given)
    assert writer.summary.complete
    predict(path, PATCH, tmp_path / "whole.zarr", **given)
    assert contents(out) == contents(tmp_path / "whole.zarr")


def test_unread_raw_may_change(tmp_path):
    path, _ = raw_volume(tmp_path, SHAPE)
    out, given = tmp_path / "out.zarr", {"model_id": "m", "check_context": False}
    predict(path, PATCH, out, limit=8, **given)
    edit(last_chunk(path))
    assert predict(path, PATCH, out, **given).summary.complete
    predict(path, PATCH, tmp_path / "whole.zarr", **given)
    assert contents(out) == contents(tmp_path / "whole.zarr")


def test_files_that_were_only_touched_can_be_accepted(tmp_path):
    path, values = raw_volume(tmp_path, SHAPE)
    out, given = tmp_path / "out.zarr", {"model_id": "m", "check_context": False, "overlap": 0.0}
    predict(path, PATCH, out, limit=8, **given)
    first_chunk(path).touch()
    with pytest.raises(CellMapFileExistsError, match="raw has changed"):
        predict(path, PATCH, out, **given)
    assert predict(path, PATCH, out, accept_changed_raw=True, **given).summary.complete
    np.testing.assert_array_equal(read(out), values.astype(np.float32) * np.float32(1 / 255))


def test_a_finished_prediction_of_raw_that_changed(tmp_path):
    path, _ = raw_volume(tmp_path, (16, 16, 32))
    out, given = tmp_path / "out.zarr", {"model_id": "m"}
    predict(path, PATCH, out, **given)
    before = contents(out)
    assert predict(path, PATCH, out, **given).summary.written == 0
    edit(first_chunk(path))
    with pytest.raises(CellMapFileExistsError, match="raw has changed since block 0"):
        predict(path, PATCH, out, **given)
    assert predict(path, PATCH, out, accept_changed_raw=True, **given).summary.written == 0
    assert contents(out) == before
    predict(path, PATCH, out, overwrite=True, **given)
    assert contents(out) != before


@pytest.mark.parametrize("change", ["scale", "model", "mask", "precision"])
def test_changed_model_or_metadata_is_named(tmp_path, change):
    path, _ = raw_volume(tmp_path, SHAPE)
    mask = tmp_path / "mask.zarr" / "m"
    write_multiscale(
        mask, np.ones(SHAPE, np.uint8), scale=SCALE, translation=TRANSLATION, storage=ArrayOptions(chunks=(16, 16, 16))
    )
    out, given = tmp_path / "out.zarr", {"check_context": False, "classes": ("a", "b"), "mask": str(mask)}
    model = Convolution()
    predict(path, PATCH, out, model, limit=8, **given)
    if change == "scale":
        file = path / "s0" / ".zarray"
        file.write_text(file.read_text().replace('"fill_value": 0', '"fill_value": 1'))
        text = "raw metadata: '[0-9a-f]{16}' is there, now"
    elif change == "model":
        model.network[0].weight.data[0] += 1e-3
        text = r"model: 'Convolution [0-9a-f]{16}' is there, now 'Convolution"
    elif change == "mask":
        edit(first_chunk(mask))
        text = rf"raw has changed since block 0 .*{mask}"
    else:
        model = Convolution().half().float()
        text = r"model: 'Convolution [0-9a-f]{16}' is there, now 'Convolution"
    with pytest.raises(CellMapFileExistsError, match=text):
        predict(path, PATCH, out, model, **given)


class Rewriting(Identity):
    """Rewrites a chunk of raw while it predicts."""

    def __init__(self, chunk, at):
        super().__init__()
        self.chunk, self.at = chunk, at

    def predict_step(self, batch, batch_idx):
        if batch_idx == self.at:
            edit(self.chunk)
        return super().predict_step(batch, batch_idx)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("when", ["in its block", "after its block"])
def test_raw_that_changes_while_it_is_predicted(tmp_path, when, workers):
    path, _ = raw_volume(tmp_path, SHAPE)
    out = tmp_path / "out.zarr"
    given = {"data": {"num_workers": workers, "cache": "disk"}, "check_context": False}
    model = Identity()
    predict(path, PATCH, tmp_path / "before.zarr", model, **given)
    at = 0 if when == "in its block" else model.batches - 1
    text = rf"raw has changed since block \d+ .* predicted: {first_chunk(path)}.*would mix both"
    with pytest.raises(OutputError, match=text):
        predict(path, PATCH, out, Rewriting(first_chunk(path), at), **given)
    if when == "in its block":
        assert not out.exists()  # nothing of it is worth anything
    else:
        assert not Journal(out).complete


class SeesAll(Identity):
    """Each voxel of its output depends on all of its input."""

    def predict_step(self, batch, batch_idx):
        given = super().predict_step(batch, batch_idx).double()
        return (given + given.mean(dim=tuple(range(1, given.ndim)), keepdim=True)).float()


WAYS = {
    "trim": {"blend": "trim"},
    "gaussian": {"blend": "gaussian"},
    "coarser": {"scale": (21.0, 16.0, 16.0)},
    "off the lattice": {"scale": (9.3, 7.1, 8.3)},
    "slices": {"patch": (16, 20), "scale": (10.48, 10.48), "planes": ["xy", "xz"]},
}


@pytest.mark.parametrize("way", [*list(WAYS)[:-1], pytest.param("slices", marks=pytest.mark.slow)])
def test_unstamped_chunks_do_not_influence_a_block(tmp_path, monkeypatch, way):
    """Other voxels in all chunks that are in no stamp of a block change nothing."""
    path = tmp_path / "raw.zarr" / "em"
    values = np.random.default_rng(0).integers(0, 256, (40, 48, 52)).astype(np.uint8)
    write_multiscale(path, values, scale=SCALE, translation=TRANSLATION, storage=ArrayOptions(chunks=(4, 4, 4)))
    stamped = set()

    class Noting(InputStamps):
        def begin(self, block):
            for reader, start, shape in self._reads(block):
                stamped.update(reader.level.array.file(index) for index in reader.files(start, shape))
            return super().begin(block)

    monkeypatch.setattr(job, "InputStamps", Noting)
    given = {"patch": PATCH, "scale": SCALE, "blend": "trim"} | WAYS[way]
    spec = {"shape": list(given["patch"]), "scale": list(given["scale"])}
    more = {"planes": given["planes"]} if "planes" in given else {}

    def run(out):
        writer = make_prediction_writer(
            str(out), blend=given["blend"], classes=["a"], chunks=(8, 8, 16), dtype="float32",
            region={axis: [170.0, 230.0] for axis in "zyx"}, check_context=False,
        )  # fmt: skip
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[writer],
        )  # fmt: skip
        with CellMapDataModule(
            ["a"], {"raw": spec}, datasets={"predict": [{"raw": str(path)}]}, batch_size=3, cache="none", **more
        ) as data:
            trainer.predict(SeesAll(), datamodule=data)

    run(tmp_path / "out.zarr")
    files = [file for file in (path / "s0").rglob("*") if file.is_file() and not file.name.startswith(".")]
    others = [file for file in files if str(file) not in stamped]
    assert len(others) > 50
    content = others[0].read_bytes()
    for file in others[1:]:
        file.write_bytes(content)
    run(tmp_path / "again.zarr")
    assert contents(tmp_path / "out.zarr", root=False) == contents(tmp_path / "again.zarr", root=False)
    assert read(tmp_path / "out.zarr").any()


def test_moved_raw_is_another_prediction(tmp_path):
    """The same volume at another place is another prediction, by its path."""
    path, _ = raw_volume(tmp_path, SHAPE)
    out, given = tmp_path / "out.zarr", {"model_id": "m", "check_context": False}
    predict(path, PATCH, out, limit=8, **given)
    shutil.copytree(tmp_path / "raw.zarr", tmp_path / "copy.zarr")
    with pytest.raises(CellMapFileExistsError, match=r"raw: '.*raw.zarr/em' is there, now '.*copy.zarr/em'"):
        predict(Path(str(path).replace("raw.zarr", "copy.zarr")), PATCH, out, **given)
