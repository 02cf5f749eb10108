"""A whole volume, predicted: what is written is what the model says, wherever blocks, ranks and kills fall."""

import datetime as dt
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import zarr
from lightning.pytorch.strategies import DDPStrategy

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.callbacks import PredictionWriter
from cellmap_lightning.errors import CellMapError, CellMapFileExistsError, CellMapValueError, OutputError
from cellmap_lightning.geometry.lattice import AXES
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.writer import downsample_mean, downsample_mode, write_multiscale
from cellmap_lightning.prediction import volumes as predicted
from cellmap_lightning.prediction.blending import Tiling
from cellmap_lightning.prediction.blocks import BlockGrid
from cellmap_lightning.prediction.journal import Journal
from cellmap_lightning.prediction.output import PredictionOutput
from tests import processes
from tests.prediction.test_assembly import Counting

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")

SCALE, TRANSLATION = (10.48, 8.0, 8.0), (5.24, 4.0, 2.0)


class Identity(L.LightningModule):
    """Gives back its input, once for each class."""

    def __init__(self, channels=1):
        super().__init__()
        self.channels = channels
        self.batches = 0

    def predict_step(self, batch, batch_idx):
        self.batches += 1
        return batch["raw"].repeat(1, self.channels, *[1] * (batch["raw"].ndim - 2))


class Convolution(L.LightningModule):
    """Something whose borders differ from its middle."""

    def __init__(self, channels=2):
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(
            torch.nn.Conv3d(1, 4, 5, padding=2), torch.nn.Conv3d(4, channels, 3, padding=1)
        )

    def forward(self, x):
        return self.network(x).sigmoid()

    def predict_step(self, batch, batch_idx):
        # One by one: what a convolution gives may differ in the last bit with the number of samples.
        return {"found": torch.cat([self(x[None]) for x in batch["raw"]])}


def raw_volume(folder, shape, dtype="uint8", **kwargs):
    """Random voxels, and where they are."""
    values = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    path = Path(folder) / "raw.zarr" / "em"
    write_multiscale(path, values, scale=SCALE, translation=TRANSLATION, chunks=(16, 16, 16), **kwargs)
    return path, values


def module(path, patch, classes=("a",), **kwargs):
    spec = {"shape": list(patch), "scale": list(SCALE)}
    given = {"datasets": {"predict": [{"raw": str(path)}]}, "batch_size": 3}
    return CellMapDataModule(list(classes), {"raw": spec}, **(given | kwargs))


def predict(path, patch, output, model=None, classes=("a",), world=1, data=None, limit=None, **kwargs):
    """Run it, or some batches of it; the writer."""
    given = {"chunks": [8, 8, 16], "block_size_mb": 0.02, "dtype": "float32"}
    writer = PredictionWriter(str(output), classes=list(classes), **(given | kwargs))
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork", timeout=dt.timedelta(seconds=300))
    run = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy if world > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[writer],
        default_root_dir=Path(output).parent, limit_predict_batches=limit,
    )  # fmt: skip
    with module(path, patch, classes, **(data or {})) as given_data:
        assert not run.predict(model or Identity(len(classes)), datamodule=given_data)
    return writer


def read(output, name="a", level=0):
    return zarr.open_array(str(Path(output) / name / f"s{level}"), mode="r")[...]


def contents(output, root=True):
    """Every file of the data, with its bytes; without the root's metadata, they hold nothing of blocks."""
    of_root = () if root else (".zattrs", ".zmetadata", "zarr.json")
    return {
        str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(output).rglob("*"))
        if p.is_file() and ".cellmap-prediction" not in p.parts and str(p.relative_to(output)) not in of_root
    }


@pytest.mark.parametrize("shape", [(32, 48, 48), (33, 41, 50), (10, 12, 90)], ids=str)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.7])
def test_an_identity_is_reproduced_bit_for_bit_by_trim(tmp_path, shape, overlap):
    path, values = raw_volume(tmp_path, shape)
    writer = predict(path, (12, 16, 20), tmp_path / "out.zarr", overlap=overlap)
    assert writer.summary.complete
    assert writer.summary.blocks > 1
    found = read(tmp_path / "out.zarr")
    assert found.shape == shape
    with module(path, (12, 16, 20)) as data:
        whole = data.predict_dataset.layout.scaling(torch.from_numpy(values)[None, None], torch.tensor([0]))[0, 0]
    assert np.array_equal(found, whole.numpy())


@pytest.mark.parametrize("shape", [(32, 48, 48), (33, 41, 50), (10, 12, 90)], ids=str)
@pytest.mark.parametrize("blend", ["average", "gaussian"])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.75])
def test_an_identity_is_reproduced_by_weighted_means(tmp_path, shape, blend, overlap):
    path, values = raw_volume(tmp_path, shape)
    predict(path, (12, 16, 20), tmp_path / "out.zarr", blend=blend, overlap=overlap, block_size_mb=0.2)
    assert np.abs(read(tmp_path / "out.zarr") - values.astype(np.float32) / 255).max() < 1e-6


@pytest.mark.parametrize(("blend", "mode"), [("average", "constant"), ("gaussian", "gaussian")])
@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.6])
@pytest.mark.parametrize("shape", [(33, 41, 50), (10, 40, 64)], ids=str)
def test_weighted_means_are_those_of_monai(tmp_path, blend, mode, overlap, shape):
    from monai.inferers import sliding_window_inference

    path, values = raw_volume(tmp_path, shape)
    model = Convolution().eval()
    predict(path, (12, 16, 20), tmp_path / "out.zarr", model, ("a", "b"), blend=blend, overlap=overlap)
    with torch.inference_mode():
        whole = torch.from_numpy(values.astype(np.float32) / 255)[None, None]
        expected = sliding_window_inference(whole, (12, 16, 20), 2, model, overlap=overlap, mode=mode)[0]
    for name, channel in zip("ab", expected.numpy(), strict=True):
        assert np.abs(read(tmp_path / "out.zarr", name) - channel).max() < 1e-5


@pytest.mark.parametrize("blend", ["average", "gaussian"])
def test_a_voxel_has_the_same_bits_in_every_block(tmp_path, blend):
    path, _ = raw_volume(tmp_path, (33, 41, 50))
    for name, block_size_mb in (("small", 0.2), ("large", 8)):
        predict(path, (12, 16, 20), tmp_path / f"{name}.zarr", Convolution(1), blend=blend, block_size_mb=block_size_mb)
    assert len(Journal(tmp_path / "small.zarr").finished) > len(Journal(tmp_path / "large.zarr").finished)
    assert contents(tmp_path / "small.zarr", root=False) == contents(tmp_path / "large.zarr", root=False)


def test_a_region_is_a_cut_out_of_the_whole(tmp_path):
    path, _ = raw_volume(tmp_path, (33, 41, 50))
    for blend in ("trim", "gaussian"):
        given = {"blend": blend, "classes": ("a", "b"), "block_size_mb": 0.3, "overlap": 0.5}
        predict(path, (12, 16, 20), tmp_path / f"{blend}.zarr", Convolution(), **given)
        lower, upper = (5, 8, 3), (29, 41, 40)
        edges = [
            [t + (n - 0.5) * s for t, n, s in zip(TRANSLATION, ends, SCALE, strict=True)] for ends in (lower, upper)
        ]
        region = dict(zip("zyx", zip(*edges, strict=True), strict=True))
        predict(path, (12, 16, 20), tmp_path / f"{blend}-part.zarr", Convolution(), region=region, **given)
        whole, part = (read(tmp_path / f"{name}.zarr") for name in (blend, f"{blend}-part"))
        cut = whole[5:29, 8:41, 3:40]
        # By trim blocks are laid out by themselves: with context as far as the network sees, that changes nothing.
        assert part.shape == cut.shape
        assert np.abs(part - cut).max() < 1e-6
        found = read_multiscale(tmp_path / f"{blend}-part.zarr" / "a").finest.lattice
        assert np.allclose(
            found.origin, [t + n * s for t, n, s in zip(TRANSLATION, lower, SCALE, strict=True)], atol=1e-9
        )
    outside = {"z": [1e5, 2e5], "y": [0, 100], "x": [0, 100]}
    with pytest.raises(CellMapValueError, match=r"the region .* lies outside the volume"):
        predict(path, (12, 16, 20), tmp_path / "nowhere.zarr", region=outside)
    assert not (tmp_path / "nowhere.zarr").exists()


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_other_programs_read_what_is_written(tmp_path, zarr_format):
    import tensorstore
    from ome_zarr_models.v04 import Image as Image04
    from ome_zarr_models.v05 import Image as Image05

    path, values = raw_volume(tmp_path, (64, 70, 72))
    more = {"shards": [16, 16, 16]} if zarr_format == 3 else {}
    out = tmp_path / "out.zarr"
    predict(path, (16, 24, 24), out, classes=("a", "b"), zarr_format=zarr_format, dtype="uint8", **more)
    driver = "zarr" if zarr_format == 2 else "zarr3"
    expected = values
    for level in range(2):
        for name in "ab":
            spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(out / name / f"s{level}")}}
            assert np.array_equal(tensorstore.open(spec, read=True).result()[...].read().result(), expected)
        expected = downsample_mean(expected)
    assert not (out / "a" / "s2").exists(), "the next level would have fewer than 32 voxels"
    model = Image04 if zarr_format == 2 else Image05
    image = model.from_zarr(zarr.open_group(str(out / "a"), mode="r"))
    about = image.attributes if zarr_format == 2 else image.attributes.ome
    assert [d.path for d in about.multiscales[0].datasets] == ["s0", "s1"]
    here, there = read_multiscale(out / "a"), read_multiscale(path)
    assert here.finest.lattice.matches(there.finest.lattice), "centres of voxels, not corners"
    assert np.allclose(here.levels[1].lattice.box.lower, here.levels[0].lattice.box.lower)


def test_labels_are_cellmap_labels(tmp_path):
    path, values = raw_volume(tmp_path, (64, 64, 64))
    out = tmp_path / "out.zarr"
    writer = predict(path, (16, 16, 16), out, dtype="labels", threshold=0.25)
    expected = (values.astype(np.float32) / 255 >= 0.25).astype(np.uint8)
    assert np.array_equal(read(out), expected)
    assert np.array_equal(read(out, level=1), downsample_mode(expected))
    assert writer.summary.fractions == {"a": pytest.approx(expected.mean())}
    annotation = dict(zarr.open_group(str(out / "a"), mode="r").attrs)["cellmap"]["annotation"]
    assert annotation["annotation_type"]["encoding"] == {"absent": 0, "present": 1, "unknown": 255}


def test_float16_and_an_activation(tmp_path):
    path, values = raw_volume(tmp_path, (16, 32, 32))
    predict(path, (8, 16, 16), tmp_path / "out.zarr", dtype="float16", activation="sigmoid", levels=1)
    expected = 1 / (1 + np.exp(values / -255.0))
    assert read(tmp_path / "out.zarr").dtype == np.float16
    assert np.abs(read(tmp_path / "out.zarr") - expected).max() < 1e-3


class Halved(L.LightningModule):
    """A model whose output has voxels twice as large, and sees more than it predicts."""

    def predict_step(self, batch, batch_idx):
        x = batch["raw"][:, :, 4:-4, 4:-4, 4:-4]
        return torch.nn.functional.avg_pool3d(x, 2)


def test_an_output_of_another_shape_and_scale(tmp_path):
    path, values = raw_volume(tmp_path, (33, 41, 50))
    spec = {"shape": [6, 8, 8], "scale": [2 * s for s in SCALE]}
    out = tmp_path / "out.zarr"
    predict(path, (20, 24, 24), out, Halved(), data={"target_arrays": {"labels": spec}}, overlap=0, levels=1)
    found = read(out)
    assert found.shape == (17, 21, 25)
    padded = np.pad(values.astype(np.float32) / 255, ((0, 1), (0, 1), (0, 0)))
    expected = padded.reshape(17, 2, 21, 2, 25, 2).mean((1, 3, 5))
    assert np.abs(found - expected).max() < 1e-6
    lattice = read_multiscale(out / "a").finest.lattice
    assert np.allclose(lattice.box.lower, read_multiscale(path).finest.lattice.box.lower)


def test_slice_by_slice(tmp_path):
    path, values = raw_volume(tmp_path, (9, 41, 50))
    predict(path, (1, 16, 20), tmp_path / "out.zarr", overlap=0.25)
    assert np.abs(read(tmp_path / "out.zarr") - values / 255).max() < 1e-6


def test_two_and_four_processes_write_the_bytes_of_one(tmp_path):
    path, _ = raw_volume(tmp_path, (33, 70, 64))
    for blend in ("trim", "gaussian"):
        given = {"model": Convolution(), "classes": ("a", "b"), "blend": blend, "dtype": "uint8", "block_size_mb": 0.3}
        for world in (1, 2, 4):
            predict(path, (12, 16, 20), tmp_path / f"{blend}{world}.zarr", world=world, **given)
        alone = contents(tmp_path / f"{blend}1.zarr")
        assert len(alone) > 20
        for world in (2, 4):
            assert contents(tmp_path / f"{blend}{world}.zarr") == alone
        predict(path, (12, 16, 20), tmp_path / f"{blend}b.zarr", data={"batch_size": 5}, **given)
        assert contents(tmp_path / f"{blend}b.zarr") == alone, "a model that does not depend on its batch"


def test_a_finished_prediction_is_skipped_and_another_is_refused(tmp_path):
    path, values = raw_volume(tmp_path, (33, 41, 50))
    out = tmp_path / "out.zarr"
    first = predict(path, (12, 16, 20), out, classes=("a", "b"), model=Convolution())
    before = contents(out)
    again = Convolution()
    second = predict(path, (12, 16, 20), out, classes=("a", "b"), model=again, data={"batch_size": 2})
    assert (second.summary.written, second.summary.complete) == (0, True)
    assert second.summary.fractions == first.summary.fractions
    other = Convolution()
    with torch.no_grad():
        other.network[0].bias += 1
    box = {"z": [0, 100], "y": [0, 100], "x": [0, 100]}
    for change, named in (
        ({"model": other}, "model: 'Convolution .*' is there, now 'Convolution "),
        ({"blend": "average"}, "blend: 'trim' is there, now 'average'"),
        ({"region": box}, "shape: .33, 41, 50. is there"),
        ({"dtype": "uint8"}, "dtype: 'float32' is there, now 'uint8'"),
        ({"classes": ("a", "c")}, r"classes: \['a', 'b'\] is there, now \['a', 'c'\]"),
        ({"data": {"normalize": "zscore"}}, "normalization: "),
    ):
        given = {"model": Convolution(), "classes": ("a", "b")} | change
        with pytest.raises(CellMapFileExistsError, match=named):
            predict(path, (12, 16, 20), out, **given)
    with pytest.raises(CellMapFileExistsError, match="patch: "):
        predict(path, (12, 20, 20), out, classes=("a", "b"), model=Convolution())
    assert contents(out) == before
    predict(path, (12, 16, 20), out, classes=("c",), model=Identity(), overwrite=True)
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == ["OME", "c"]
    assert np.abs(read(out, "c") - values / 255).max() < 1e-6


class Doubled:
    """A value transform of somebody's own, written as where it lies in memory."""

    def __call__(self, raw):
        return raw.float() / 255 * 2


@pytest.mark.parametrize("make", [Doubled, lambda: lambda raw: raw.float() / 255], ids=["object", "function"])
def test_a_value_transform_is_the_same_in_the_next_run(tmp_path, make):
    path, _ = raw_volume(tmp_path, (16, 16, 16))
    one, two = make(), make()
    assert str(one) != str(two)
    predict(path, (12, 16, 16), tmp_path / "out.zarr", data={"raw_value_transforms": one})
    again = predict(path, (12, 16, 16), tmp_path / "out.zarr", data={"raw_value_transforms": two})
    assert (again.summary.written, again.summary.complete) == (0, True)
    with pytest.raises(CellMapFileExistsError, match="raw_value_transforms: "):
        predict(path, (12, 16, 16), tmp_path / "out.zarr", data={"raw_value_transforms": "auto"})


def test_whether_everything_is_done_is_said_by_one_process(tmp_path):
    """Files that one process sees and another does not, as on a network: none waits where the others do not."""
    path, _ = raw_volume(tmp_path, (16, 16, 16))
    output = predict(path, (12, 16, 16), tmp_path / "out.zarr")._jobs[0].output
    met = []
    assert output.finish(1, 2, lambda: met.append("barrier"), lambda own: met.append(own) or False) is False
    assert met == ["barrier", True]


def test_what_is_no_prediction_is_never_replaced(tmp_path):
    path, values = raw_volume(tmp_path, (16, 16, 16))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    for overwrite in (False, True):
        with pytest.raises(CellMapFileExistsError, match="holds no prediction of this package"):
            predict(path, (8, 8, 8), tmp_path / "mine", overwrite=overwrite)
        for output in (path, path / "s0" / "x", path.parent):
            with pytest.raises(CellMapValueError, match="must not lie in each other"):
                predict(path, (8, 8, 8), output, overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
    assert np.array_equal(read(path.parent, "em"), values)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"classes": ("a", "b"), "model": Identity(1)}, r"returned 1 channels, and there are 2 classes: \['a', 'b'\]"),
        ({"model": Halved()}, r"returned \[\d, 1, 2, 4, 6\], and \[\d, 1, 12, 16, 20\] was expected"),
        ({"context": 6}, "a context of 6 voxels on either side along z leaves nothing of a patch of 12; at most 5 fit"),
        ({"overlap": 1.0}, r"overlap must be a part of a patch, in \[0, 1\)"),
        ({"levels": 9}, "levels must be from 1 to 6"),
        ({"blend": "max"}, "blend is one of trim, average, gaussian, got 'max'"),
        ({"shards": [16, 16, 16]}, "shards need zarr_format=3"),
        ({"dtype": "uint16"}, "dtype is one of uint8, float16, float32, labels, got 'uint16'"),
        ({"region": {"z": [0, 10]}}, "a region is {z: "),
        (
            {"dtype": "uint8", "data": {"raw_value_transforms": None}},
            "gave values from .* and dtype=uint8 stores",
        ),
    ],
    ids=lambda v: "" if isinstance(v, dict) else v[:20],
)
def test_bad_input_is_an_error_with_both_sides(tmp_path, given, match):
    path, _ = raw_volume(tmp_path, (33, 41, 50))
    with pytest.raises(CellMapError, match=match):
        predict(path, (12, 16, 20), tmp_path / "out.zarr", **given)


class Breaking(L.LightningModule):
    """Makes the output unwritable on the way."""

    def __init__(self, output, after):
        super().__init__()
        self.output, self.after = output, after

    def predict_step(self, batch, batch_idx):
        if batch_idx == self.after:
            limited(self.output)
        return batch["raw"]


def limited(output):
    """No file of this process may grow any more, as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))


def test_a_full_disk_leaves_what_is_finished(tmp_path):
    path, _ = raw_volume(tmp_path, (33, 41, 50))
    out = tmp_path / "out.zarr"
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of the parent are not there
            predict(path, (12, 16, 20), out, Breaking(out, 9), model_id="m")
        except OutputError as e:
            os._exit(7 if "What is finished stays" in str(e) else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    writer = predict(path, (12, 16, 20), out, Identity(), model_id="m")
    assert 0 < writer.summary.written < writer.summary.blocks
    predict(path, (12, 16, 20), tmp_path / "whole.zarr", Identity(), model_id="m")
    assert contents(out) == contents(tmp_path / "whole.zarr")


class Late(L.LightningModule):
    """Gives what cannot be stored, in the last batch only."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def predict_step(self, batch, batch_idx):
        return batch["raw"] + (2.0 if batch_idx == self.last else 0.0)


def test_an_error_of_the_last_block_is_met_at_the_end(tmp_path):
    path, _ = raw_volume(tmp_path, (33, 41, 50))
    counting = Identity()
    predict(path, (12, 16, 20), tmp_path / "whole.zarr", counting, dtype="uint8", model_id="m", check_context=False)
    out = tmp_path / "out.zarr"
    with pytest.raises(CellMapValueError, match=r"block \d+: the model gave values from .* and dtype=uint8 stores"):
        predict(path, (12, 16, 20), out, Late(counting.batches - 1), dtype="uint8", model_id="m", check_context=False)
    assert len(Journal(out).finished) == len(Journal(tmp_path / "whole.zarr").finished) - 1
    with pytest.raises(CellMapError):
        read_multiscale(out / "a")
    assert predict(path, (12, 16, 20), out, Late(-1), dtype="uint8", model_id="m").summary.written == 1
    assert contents(out) == contents(tmp_path / "whole.zarr")


def test_too_little_room_is_known_before_anything_is_computed(tmp_path, monkeypatch):
    path, _ = raw_volume(tmp_path, (33, 41, 50))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    model = Identity()
    with pytest.raises(OutputError, match=r"takes .* GB before compression .* check_space=False"):
        predict(path, (12, 16, 20), tmp_path / "out.zarr", model)
    assert model.batches == 0
    predict(path, (12, 16, 20), tmp_path / "out.zarr", check_space=False)


def test_wrong_trainers_are_refused(tmp_path):
    path, _ = raw_volume(tmp_path, (16, 16, 16))
    writers = [PredictionWriter(str(tmp_path / f"{n}.zarr")) for n in range(2)]
    common = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    with module(path, (8, 8, 8)) as data:
        with pytest.raises(CellMapError, match="a Trainer can have one PredictionWriter"):
            L.Trainer(callbacks=writers, **common, **quiet).predict(Identity(), datamodule=data)
        assert data.prediction is None
    with pytest.raises(CellMapError, match="needs a CellMapDataModule"):
        L.Trainer(callbacks=writers[:1], **common, **quiet).predict(Identity(), [1])
    raw = {"raw": str(path)}
    with pytest.raises(CellMapValueError, match="more than once"):
        predict(path, (8, 8, 8), tmp_path / "out.zarr", data={"datasets": {"predict": [raw, raw]}})


def test_a_limit_leaves_the_rest_for_another_time(tmp_path):
    path, values = raw_volume(tmp_path, (33, 41, 50))
    out = tmp_path / "out.zarr"
    assert not predict(path, (12, 16, 20), out, limit=8).summary.complete
    with pytest.raises(CellMapError):
        read_multiscale(out / "a")
    assert predict(path, (12, 16, 20), out).summary.complete
    assert np.abs(read(out) - values / 255).max() < 1e-6


class Company(L.LightningModule):
    """A model whose output depends on what else is in its batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def predict_step(self, batch, batch_idx):
        self.seen += batch["idx"].tolist()
        return batch["raw"] * (1 + batch["raw"].mean())


@pytest.mark.parametrize(("blend", "overlap"), [("trim", 0.25), ("average", 0.25), ("gaussian", 0.5), ("average", 0.7)])
def test_a_run_that_goes_on_makes_the_same_batches(tmp_path, blend, overlap):
    path, _ = raw_volume(tmp_path, (70, 41, 50))
    given = {"blend": blend, "overlap": overlap, "block_size_mb": 0.06, "check_context": False}
    model = Company()
    predict(path, (12, 16, 20), tmp_path / "once.zarr", model, **given)
    once, out = contents(tmp_path / "once.zarr"), tmp_path / "out.zarr"
    batches = -(-len(model.seen) // 3)
    for limit, world in ((1, 1), (batches // 7, 1), (batches // 9, 2), (batches // 5, 1)):
        predict(path, (12, 16, 20), out, Company(), limit=limit, world=world, **given)
        assert not Journal(out).complete
    predict(path, (12, 16, 20), out, Company(), **given)
    assert contents(out) == once


@pytest.mark.parametrize("blend", ["average", "gaussian"])
def test_blocks_below_each_other_share_their_patches(tmp_path, blend):
    path, _ = raw_volume(tmp_path, (70, 41, 50))
    model = Company()
    out, shape, patch = tmp_path / "out.zarr", (70, 41, 50), (12, 16, 20)
    predict(path, patch, out, model, blend=blend, block_size_mb=0.06)
    block, tiling = Journal(out).settings["block"], Tiling(shape, patch, blend)
    assert block[0] < 70 / 3
    assert block[1] < 41 or block[2] < 50
    columns = tiling.count(1, 0, 41, block[1]) * tiling.count(2, 0, 50, block[2])
    assert len(model.seen) == tiling.count(0, 0, 70, 70) * columns
    assert len(set(model.seen)) == len(tiling.parts((0, 0, 0), shape))


@pytest.mark.parametrize(("blend", "limit"), [("trim", 50), ("gaussian", 70)])
def test_processes_share_out_what_is_left(tmp_path, blend, limit, monkeypatch):
    # The end would remove the journal; a process that is done still waits for the others.
    monkeypatch.setattr(PredictionOutput, "finish", lambda _, rank, world, barrier, broadcast: bool(barrier()))
    path, _ = raw_volume(tmp_path, (70, 41, 50))
    out, given = tmp_path / "out.zarr", {"blend": blend, "block_size_mb": 0.06}
    predict(path, (12, 16, 20), out, limit=limit, **given)
    before = set(Journal(out).finished)
    lattice = read_multiscale(path).finest.lattice
    grid = BlockGrid(lattice, (0, 0, 0), (70, 41, 50), tuple(Journal(out).settings["block"]))
    left = [number for number in range(len(grid)) if number not in before]
    assert 2 < len(before) < len(grid) - 4
    predict(path, (12, 16, 20), out, world=2, **given)
    files = [out / ".cellmap-prediction" / f"blocks-{rank}.txt" for rank in range(2)]
    done = [{int(n) for n in re.findall(r"done (\d+)", file.read_text())} - before for file in files]
    assert done == [set(grid.share(left, rank, 2, blend != "trim")) for rank in range(2)]
    whole = [set(grid.share(range(len(grid)), rank, 2, blend != "trim")) - before for rank in range(2)]
    assert done != whole, "the blocks of a run that goes on, not those of one that begins"
    assert abs(len(done[0]) - len(done[1])) <= 1


def test_where_small_blocks_cost_much_the_memory_that_helps_is_named(tmp_path, caplog):
    path, _ = raw_volume(tmp_path, (40, 64, 64))
    given = {"blend": "gaussian", "chunks": [8, 8, 8], "levels": 1}
    few = predict(path, (16, 16, 16), tmp_path / "few.zarr", block_size_mb=0.1, **given)
    said = [r.getMessage() for r in caplog.records if "block_size_mb" in r.getMessage()]
    found = re.search(
        r"model computes ([\d.]+) times .* block_size_mb=([\d.]+) would allow .* make it ([\d.]+) times", said[0]
    )
    assert float(found[1]) == pytest.approx(few.redundancy, abs=0.01)
    caplog.clear()
    more = predict(path, (16, 16, 16), tmp_path / "more.zarr", block_size_mb=float(found[2]), **given)
    assert float(found[3]) == pytest.approx(more.redundancy, abs=0.01)
    assert more.redundancy <= 1.25 < 1.5 < few.redundancy
    assert not [r for r in caplog.records if "block_size_mb" in r.getMessage()]
    assert contents(tmp_path / "few.zarr", root=False) == contents(tmp_path / "more.zarr", root=False)
    predict(path, (16, 16, 16), tmp_path / "late.zarr", block_size_mb=0.1, limit=9, **given)
    caplog.clear()
    assert predict(path, (16, 16, 16), tmp_path / "late.zarr", block_size_mb=0.1, **given).summary.complete
    assert not [r for r in caplog.records if "block_size_mb" in r.getMessage()], "other blocks could not go on there"


def test_a_block_that_is_skipped_changes_nothing_below_it(tmp_path):
    path, _ = raw_volume(tmp_path, (64, 32, 32))
    wanted = np.ones((64, 32, 32), np.uint8)
    wanted[16:32], wanted[40:48, :16] = 0, 0
    mask = tmp_path / "mask.zarr"
    write_multiscale(mask, wanted, scale=SCALE, translation=TRANSLATION, chunks=(16, 16, 16))
    given = {"blend": "gaussian", "chunks": [8, 16, 16], "block_size_mb": 0.05, "model": Convolution(), "levels": 1}
    given["classes"] = ("a", "b")
    predict(path, (12, 16, 20), tmp_path / "whole.zarr", **given)
    writer = predict(path, (12, 16, 20), tmp_path / "part.zarr", mask=str(mask), **given)
    whole, part = read(tmp_path / "whole.zarr", "b"), read(tmp_path / "part.zarr", "b")
    assert 0 < writer.summary.skipped < writer.summary.blocks
    computed = part != 0
    assert np.array_equal(part[computed], whole[computed])
    assert computed[wanted > 0].all()
    assert not computed[16:32].any()


def test_a_real_volume_comes_back_as_it_is(real_volume, tmp_path):
    path = real_volume / "recon-1" / "em" / "fibsem-uint8"
    level = read_multiscale(path).finest
    spec = {"raw": {"shape": [8, 128, 128], "scale": list(level.scale)}}
    with CellMapDataModule(["a"], spec, datasets={"predict": [{"raw": str(path)}]}, batch_size=4) as data:
        run = L.Trainer(
            accelerator="cpu", devices=1, logger=False, callbacks=[PredictionWriter(str(tmp_path / "out.zarr"))],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        run.predict(Identity(), datamodule=data)
    assert np.array_equal(read(tmp_path / "out.zarr"), zarr.open_array(str(level.path), mode="r")[...])
    assert read_multiscale(tmp_path / "out.zarr" / "a").finest.lattice.matches(level.lattice)


def in_numbers(path):
    return read(path.parent, path.name).astype(np.float32) / 255


class Sided(L.LightningModule):
    """A model that is the same for no mirrored input: each voxel is that behind it, along every axis."""

    def predict_step(self, batch):
        x = batch["raw"]
        for dim in range(2, x.ndim):
            x = torch.cat([x.narrow(dim, 1, x.shape[dim] - 1), x.narrow(dim, x.shape[dim] - 1, 1)], dim)
        return {"found": x}


def test_mirrored_inputs_are_averaged(tmp_path):
    path, _ = raw_volume(tmp_path, (20, 24, 28))
    whole = in_numbers(path)

    def behind(values, axes):
        for axis in axes:
            values = np.concatenate([np.delete(values, 0, axis), np.take(values, [-1], axis)], axis)
        return values

    for tta_flips in ("", "y", "zx", "zyx"):
        out = tmp_path / f"tta_flips{tta_flips}.zarr"
        predict(path, (20, 24, 28), out, Sided(), overlap=0, tta_flips=tta_flips)
        expected = np.mean(
            [
                np.flip(behind(np.flip(whole, axes), (0, 1, 2)), axes)
                for axes in (
                    tuple(axis for axis, chosen in zip([AXES.index(a) for a in tta_flips], bits, strict=True) if chosen)
                    for bits in product((0, 1), repeat=len(tta_flips))
                )
            ],
            axis=0,
        )
        assert np.abs(read(out) - expected).max() < 1e-6
    flat = tmp_path / "flat.zarr"
    predict(path, (1, 24, 28), flat, Sided(), overlap=0, tta_flips="zyx")
    both = [np.flip(behind(np.flip(whole, axes), (1, 2)), axes) for axes in ((), (1,), (2,), (1, 2))]
    assert np.abs(read(flat) - np.mean(both, axis=0)).max() < 1e-6
    with pytest.raises(CellMapFileExistsError, match="tta_flips: 'zyx' is there, now 'zy'"):
        predict(path, (20, 24, 28), tmp_path / "flipszyx.zarr", Sided(), overlap=0, tta_flips="yz")
    for wrong in ("w", "xx", [1]):
        with pytest.raises(CellMapValueError, match="tta_flips are axes"):
            PredictionWriter(str(tmp_path / "no.zarr"), tta_flips=wrong)


class Blur(L.LightningModule):
    """A model of slices: each pixel is the mean of itself and its two neighbours along the rows."""

    def predict_step(self, batch, batch_idx):
        assert batch["raw"].ndim == 4
        x = torch.nn.functional.pad(batch["raw"], (1, 1, 0, 0), mode="replicate")
        return (x[..., :-2] + x[..., 1:-1] + x[..., 2:]) / 3


def isotropic(folder, shape):
    values = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    path = Path(folder) / "iso.zarr" / "em"
    write_multiscale(path, values, scale=(8, 8, 8), translation=(4, 0, 2), chunks=(16, 16, 16))
    return path, values.astype(np.float32) / 255


@pytest.mark.parametrize("blend", ["trim", "gaussian"])
def test_slices_in_every_plane_and_their_mean(tmp_path, blend):
    path, values = isotropic(tmp_path, (21, 34, 40))
    along = {"xy": 2, "xz": 2, "yz": 1}  # the volume's axis that is a patch's row

    def expected(plane):
        padded = np.pad(values, [(1, 1) if axis == along[plane] else (0, 0) for axis in range(3)], mode="edge")
        n = values.shape[along[plane]]
        return sum(np.take(padded, range(k, k + n), along[plane]) for k in range(3)) / 3

    spec = {"input_arrays": {"raw": {"shape": [16, 20], "scale": [8, 8]}}, "batch_size": 3}
    given = (
        {"blend": blend, "block_size_mb": 0.05, "context": 2}
        if blend == "trim"
        else {"blend": blend, "block_size_mb": 0.05}
    )
    identity = blend == "gaussian"  # whose patches see no further than they reach
    for planes in (["xz"], ["yz"], ["xy", "xz", "yz"]):
        out = tmp_path / f"{'-'.join(planes)}.zarr"
        writer = predict_spec(path, spec | {"planes": planes}, out, Identity() if identity else Blur(), **given)
        assert writer.summary.complete
        wanted = values if identity else np.mean([expected(plane) for plane in planes], axis=0)
        assert np.abs(read(out) - wanted).max() < 1e-6
    again = predict_spec(path, spec | {"planes": planes}, out, Identity() if identity else Blur(), **given)
    assert again.summary.written == 0
    with pytest.raises(CellMapFileExistsError, match="planes: "):
        predict_spec(path, spec | {"planes": ["xy"]}, out, Identity() if identity else Blur(), **given)


def predict_spec(path, data, output, model, world=1, **kwargs):
    """The same, of arrays that are given whole."""
    data = {"classes": ["a"], "datasets": {"predict": [{"raw": str(path)}]}} | data
    writer = PredictionWriter(str(output), **({"chunks": [8, 8, 16], "dtype": "float32"} | kwargs))
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork", timeout=dt.timedelta(seconds=300))
    run = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy if world > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[writer],
    )  # fmt: skip
    with CellMapDataModule(**data) as module:
        run.predict(model, datamodule=module)
    return writer


def test_planes_share_the_chunks_that_their_voxels_are_made_of(tmp_path):
    """No level has voxels of 11 nm: each plane keeps voxels of its own, made of the same chunks."""
    path, _ = raw_volume(tmp_path, (40, 50, 60))
    caches = []

    class Looks(Identity):
        def predict_step(self, batch, batch_idx):
            source = writer._source
            caches.append({id(image.region.cache) for c in source.crops for image in c.images.values()})
            assert caches[-1] == {id(source._store.chunks)}
            return super().predict_step(batch, batch_idx)

    writer = PredictionWriter(str(tmp_path / "out.zarr"), classes=["a"], check_context=False)
    run = L.Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[writer], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    arrays = {"input_arrays": {"raw": {"shape": [16, 16], "scale": [11, 11]}}, "planes": ["xy", "xz", "yz"]}
    with CellMapDataModule(classes=["a"], datasets={"predict": [{"raw": str(path)}]}, **arrays) as data:
        run.predict(Looks(), datamodule=data)
    assert caches
    assert writer._source._store.chunks.nbytes == 0, "it is given back at the end"


def test_what_is_decoded_ahead_is_there_when_it_is_asked_for(tmp_path, monkeypatch):
    """As many chunks are decoded ahead as lie side by side in a block: both have room."""
    path = tmp_path / "raw.zarr" / "em"
    values = np.zeros((256, 256, 512), np.uint8)
    values[:, ::7] = 3  # so that all chunks have files
    write_multiscale(path, values, scale=SCALE, translation=TRANSLATION, chunks=(32, 32, 32))
    monkeypatch.setattr(predicted, "LEAST_CHUNK_BYTES", 1)
    monkeypatch.setattr("cellmap_lightning.io.chunks.LEAST_CHUNK", 32)
    writer = PredictionWriter(str(tmp_path / "out.zarr"), chunks=(64, 64, 64), block_size_mb=1000, check_context=False)
    run = L.Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[writer], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with module(path, (64, 64, 64), batch_size=8) as data:
        run.predict(Identity(), datamodule=data)
    assert writer._source._store.chunks.decoded <= 1.3 * 8 * 8 * 16


def test_planes_whose_voxels_differ_have_no_mean(tmp_path):
    path, _ = raw_volume(tmp_path, (16, 16, 16))
    data = {"input_arrays": {"raw": {"shape": [8, 8], "scale": [8, 8]}}, "planes": ["xy", "xz"]}
    with pytest.raises(CellMapValueError, match=r"theirs differ .*xy has \[10.48, 8.0, 8.0\] nm; xz has"):
        predict_spec(path, data, tmp_path / "out.zarr", Identity())
    assert not (tmp_path / "out.zarr").exists()


def test_several_volumes_in_one_run(tmp_path):
    volumes = [raw_volume(tmp_path / name, shape) for name, shape in (("one", (20, 24, 28)), ("two", (9, 30, 17)))]
    paths = []
    for (path, _), name in zip(volumes, ("jrc_one", "jrc_two"), strict=True):
        paths.append(path.parent.rename(tmp_path / f"{name}.zarr") / path.name)
    entries = {"datasets": {"predict": [{"raw": str(path)} for path in paths]}}
    for world in (1, 2):
        out = tmp_path / f"out{world}"
        writer = predict(paths[0], (8, 16, 16), out, data=entries, world=world, levels=1)
        if world == 1:
            assert writer.summary.complete
            assert set(writer.summary.fractions) == {"jrc_one/a", "jrc_two/a"}
        for path in paths:
            assert np.abs(read(out / path.parent.stem) - in_numbers(path)).max() < 1e-6
            lattice = read_multiscale(out / path.parent.stem / "a").finest.lattice
            assert lattice.matches(read_multiscale(path).finest.lattice)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert predict(paths[0], (8, 16, 16), out, data=entries, levels=1).summary.written == 0
    box = {"z": [0, 50], "y": [0, 50], "x": [0, 50]}
    with pytest.raises(CellMapValueError, match="a region is a part of one volume"):
        predict(paths[0], (8, 16, 16), tmp_path / "no", data=entries, region=box)
    (tmp_path / "copy").mkdir()
    other = shutil.copytree(paths[0].parent, tmp_path / "copy" / "jrc_one.zarr") / "em"
    entries = {"datasets": {"predict": [{"raw": str(path)} for path in (paths[0], other)]}}
    with pytest.raises(CellMapValueError, match="would all be written to 'jrc_one'"):
        predict(paths[0], (8, 16, 16), tmp_path / "no", data=entries)


def test_several_volumes_share_the_memory_of_one(tmp_path, monkeypatch):
    memories = []

    class Noted(Counting):
        def __init__(self):
            super().__init__()
            memories.append(self)

    monkeypatch.setattr("cellmap_lightning.prediction.prediction_writer.BlockMemory", Noted)
    raw = [raw_volume(tmp_path / name, (20, 24, 28))[0] for name in "abc"]
    paths = [path.parent.rename(tmp_path / f"{n}.zarr") / path.name for n, path in enumerate(raw)]
    entries = {"datasets": {"predict": [{"raw": str(path)} for path in paths]}}
    assert predict(paths[0], (8, 16, 16), tmp_path / "out", data=entries, levels=1, blend="gaussian").summary.complete
    assert [(m.held, m.most <= most) for m, most in zip(memories, (2, 1), strict=True)] == [(0, True), (0, True)]


def hollow(folder):
    """A volume of which three quarters are empty, and a mask of it, half as fine, of one corner."""
    values = np.zeros((32, 64, 64), np.uint8)
    values[:, :32, :32] = np.random.default_rng(0).integers(1, 256, (32, 32, 32))
    values[:, 32:, 32:] = 7  # as empty as black
    raw, mask = Path(folder) / "v.zarr" / "em", Path(folder) / "mask.zarr"
    write_multiscale(raw, values, scale=(8, 8, 8), translation=(4, 4, 4), chunks=(16, 16, 16))
    wanted = np.zeros((16, 32, 32), np.uint8)
    wanted[:8, :16, 16:] = 1
    write_multiscale(mask, wanted, scale=(16, 16, 16), translation=(8, 8, 8), chunks=(16, 16, 16))
    return raw, mask, values.astype(np.float32) / 255


@pytest.mark.parametrize("world", [1, 2])
def test_blocks_without_anything_in_them_are_skipped(tmp_path, world):
    raw, mask, values = hollow(tmp_path)
    data = {"input_arrays": {"raw": {"shape": [16, 16, 16], "scale": [8, 8, 8]}}, "batch_size": 2}
    given = {"chunks": [16, 16, 16], "block_size_mb": 0.01, "overlap": 0, "levels": 2}
    model = Identity()
    writer = predict_spec(raw, data, tmp_path / "a.zarr", model, world, skip_empty=True, **given)
    expected = np.zeros_like(values)
    expected[:, :32, :32] = values[:, :32, :32]
    assert np.abs(read(tmp_path / "a.zarr") - expected).max() < 1e-6
    files = [p for p in (tmp_path / "a.zarr" / "a" / "s0").rglob("*") if p.is_file() and p.name[0] != "."]
    assert len(files) == 8, "nothing is written of what is skipped"
    if world == 1:
        assert model.batches == 8
        assert (writer.summary.blocks, writer.summary.finished, writer.summary.complete) == (32, 32, True)
        assert writer.summary.skipped == 24
        assert "24 more were skipped" in str(writer.summary)
        assert writer.summary.fractions["a"] == pytest.approx((expected >= 0.5).mean())
        writer = predict_spec(raw, data, tmp_path / "b.zarr", Identity(), mask=str(mask), **given)
        assert writer.summary.skipped == 28
        kept = np.zeros_like(values)
        kept[:16, :32, 32:] = values[:16, :32, 32:]
        assert np.abs(read(tmp_path / "b.zarr") - kept).max() < 1e-6
        again = predict_spec(raw, data, tmp_path / "b.zarr", Identity(), mask=str(mask), **given)
        assert (again.summary.written, again.summary.skipped, again.summary.complete) == (0, 0, True)
        with pytest.raises(CellMapFileExistsError, match="mask: "):
            predict_spec(raw, data, tmp_path / "b.zarr", Identity(), **given)
        with pytest.raises(CellMapError, match="nowhere"):
            predict_spec(raw, data, tmp_path / "c.zarr", Identity(), mask=str(tmp_path / "nowhere"), **given)
        outside = predict_spec(raw, data, tmp_path / "d.zarr", Identity(), mask=str(mask), skip_empty=True, **given)
        assert outside.summary.skipped == 32
        assert outside.summary.complete
        assert not read(tmp_path / "d.zarr").any()


def test_a_model_that_sees_further_than_the_context_is_named(tmp_path, caplog):
    path, _ = raw_volume(tmp_path, (24, 32, 32))
    given = {"classes": ("a", "b"), "model": Convolution()}  # 3 voxels on either side
    for context, said in ((1, True), (2, True), (4, False)):
        caplog.clear()
        predict(path, (16, 16, 16), tmp_path / f"{context}.zarr", context=context, **given)
        found = "sees further than the context of [" in caplog.text
        assert found == said, context
    caplog.clear()
    predict(path, (16, 16, 16), tmp_path / "quiet.zarr", context=1, check_context=False, **given)
    assert "sees further" not in caplog.text


def test_a_level_that_is_not_there_is_known_before_anything_is_computed(tmp_path):
    path, _ = raw_volume(tmp_path, (16, 16, 16), levels=2)
    shutil.rmtree(path / "s0")
    model = Identity()
    with pytest.raises(CellMapError, match="s0 are listed but not on disk"):
        predict(path, (8, 8, 8), tmp_path / "out.zarr", model, data={"max_upsampling": 1.0})
    assert model.batches == 0
    assert not (tmp_path / "out.zarr").exists()


PROGRAM = """
import sys, time
import torch
import tests.prediction.test_prediction as t
torch.set_num_threads(1)

class Slow(t.Convolution):
    def predict_step(self, batch, batch_idx):
        time.sleep(0.01)
        return super().predict_step(batch, batch_idx)

path, out, blend, world = sys.argv[1:]
print("ready", flush=True)
t.predict(path, (12, 16, 20), out, Slow(), ("a", "b"), blend=blend, dtype="uint8", block_size_mb=0.3, world=int(world))
"""


@pytest.mark.parametrize(
    ("blend", "world"),
    [("gaussian", 1), *(pytest.param("trim", world, marks=pytest.mark.slow) for world in (1, 2))],
)
def test_killed_at_any_moment_and_run_again_it_leaves_the_same_bytes(tmp_path, blend, world):
    path, _ = raw_volume(tmp_path, (33, 70, 64))
    (tmp_path / "program.py").write_text(PROGRAM)
    rng = np.random.default_rng([world, len(blend)])

    def start(out):
        command = [sys.executable, "-W", "ignore", tmp_path / "program.py", path, out, blend, str(world)]
        root = str(Path(__file__).parents[2])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        return processes.started(
            list(map(str, command)), cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finished():
        return len(Journal(out).finished) if out.exists() else 0

    whole, out, done = tmp_path / "whole.zarr", tmp_path / "out.zarr", [0]
    with start(whole) as process:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    # Blocks after which it is killed, and some time after that.
    for more in (3,) if blend == "gaussian" else (0, 1, 0, 2):
        with start(out) as process:
            process.stdout.readline()
            end = time.monotonic() + 120
            while finished() < done[-1] + more and process.poll() is None:
                assert time.monotonic() < end
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))
        done.append(finished())
    assert done == sorted(done)
    assert done[-1] >= 3
    with start(out) as process:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert contents(out) == contents(whole)


MEMORY = """
import sys, threading, time
from pathlib import Path
import torch
import tests.prediction.test_prediction as t
torch.set_num_threads(1)
path, out = sys.argv[1:]

def own():  # what belongs to this process and to no file
    return sum(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))

def run(n):
    t.predict(
        f"{path}/{n}/raw.zarr/em", (32, 32, 32), f"{out}/{n}.zarr", t.Identity(), blend="gaussian",
        overlap=0.25, chunks=[32, 32, 32], block_size_mb=2, levels=2,
    )

run("small")
before, most, going = own(), 0, True

def watch():
    global most
    while going:
        most = max(most, own())
        time.sleep(0.003)

watcher = threading.Thread(target=watch)
watcher.start()
run("large")
going = False
watcher.join()
print("peak", most - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_volume(tmp_path):
    for name, shape in (("small", (48, 64, 64)), ("large", (128, 320, 320))):
        raw_volume(tmp_path / name, shape)
    (tmp_path / "program.py").write_text(MEMORY)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", tmp_path / "program.py", tmp_path, tmp_path], cwd=root, capture_output=True,
        text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("peak")[1]) * 1024
    assert read(tmp_path / "large.zarr").nbytes > 50e6
    assert peak < 25e6, "after a small volume a large one takes hardly more, and far less than its own 52 MB"


@pytest.mark.parametrize(
    ("given", "kept"),
    [({}, "chunks"), ({"cache": "disk"}, "disk"), ({"num_workers": 1}, "auto"), ({"cache": "memory"}, "memory")],
)
def test_a_volume_of_this_machine_is_not_copied_to_the_cache(tmp_path, monkeypatch, given, kept):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))
    path, values = raw_volume(tmp_path, (33, 41, 50))
    writer = predict(path, (12, 16, 20), tmp_path / "out.zarr", data=given)
    np.testing.assert_allclose(read(tmp_path / "out.zarr"), values / 255, rtol=1e-6)
    assert writer._source.cache == kept
    copied = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size > values.nbytes // 2]
    assert bool(copied) == (kept in ("disk", "auto"))


@pytest.mark.parametrize("cache", ["auto", "disk"])
def test_chunks_are_decoded_before_they_are_asked_for(tmp_path, cache):
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 64 * 14)).astype(np.uint8)
    path = tmp_path / "raw.zarr" / "em"  # 14 chunks in a row, and a patch in each
    write_multiscale(path, values, scale=SCALE, translation=TRANSLATION, chunks=(64, 64, 64))
    found = []

    class Slow(Identity):
        def predict_step(self, batch, batch_idx):
            deadline = time.monotonic() + 120
            while batch_idx == 0 and decoded() < 9 and time.monotonic() < deadline:
                time.sleep(0.01)
            found.append(decoded())
            return super().predict_step(batch, batch_idx)

    def decoded():
        store = writer._source._store
        return store.chunks.decoded if cache == "auto" else store.decoded

    writer = PredictionWriter(str(tmp_path / "out.zarr"), overlap=0.0)
    run = L.Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[writer], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with module(path, (64, 64, 64), batch_size=1, cache=cache) as data:
        run.predict(Slow(), datamodule=data)
    assert found[0] >= 9  # without anything ahead: 2, the batch and the one that the Trainer fetches before it
    np.testing.assert_array_equal(read(tmp_path / "out.zarr"), values)


def test_a_damaged_chunk_is_named_when_it_is_needed_and_what_is_before_it_stays(tmp_path):
    path, values = raw_volume(tmp_path, (16, 16, 320))
    damaged = path / "s0" / "0" / "0" / "17"
    stored = damaged.read_bytes()
    damaged.write_bytes(stored[:20])
    given = {"overlap": 0.0, "chunks": (16, 16, 16), "block_size_mb": 0.01, "dtype": "uint8"}
    with pytest.raises(CellMapError, match=r"(?s)x\[272:288\].*cut short"):
        predict(path, (16, 16, 16), tmp_path / "out.zarr", data={"batch_size": 1, "read_attempts": 1}, **given)
    done = len(Journal(tmp_path / "out.zarr").finished)
    assert 12 <= done <= 17
    damaged.write_bytes(stored)
    writer = predict(path, (16, 16, 16), tmp_path / "out.zarr", data={"batch_size": 1}, **given)
    assert writer.summary.written == 20 - done
    np.testing.assert_array_equal(read(tmp_path / "out.zarr"), values)
