"""Predictions of whole volumes: the values, resuming, and errors."""

import os
import shutil
import signal

import lightning as L
import numpy as np
import pytest
import torch
import zarr

from cellmap_lightning.callbacks import make_prediction_writer
from cellmap_lightning.errors import CellMapError, CellMapFileExistsError, CellMapValueError, OutputError
from cellmap_lightning.io.downsampling import downsample_mean, downsample_mode
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.prediction.journal import Journal
from tests.prediction.predictions import (
    SCALE,
    TRANSLATION,
    Convolution,
    Identity,
    contents,
    module,
    predict,
    raw_volume,
    read,
)

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")


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


@pytest.mark.cover(2)
@pytest.mark.parametrize("shape", [(32, 48, 48), (33, 41, 50), (10, 12, 90)], ids=str)
@pytest.mark.parametrize("blend", ["average", "gaussian"])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.75])
def test_an_identity_is_reproduced_by_weighted_means(tmp_path, shape, blend, overlap):
    path, values = raw_volume(tmp_path, shape)
    predict(path, (12, 16, 20), tmp_path / "out.zarr", blend=blend, overlap=overlap, block_size_mb=0.2)
    assert np.abs(read(tmp_path / "out.zarr") - values.astype(np.float32) / 255).max() < 1e-6


@pytest.mark.parametrize(("blend", "mode"), [("average", "constant"), ("gaussian", "gaussian")])
@pytest.mark.parametrize("overlap", [0.25, pytest.param(0.5, marks=pytest.mark.slow), 0.6])
@pytest.mark.parametrize("shape", [pytest.param((33, 41, 50), marks=pytest.mark.slow), (10, 40, 64)], ids=str)
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
    """A value transform of user code, whose repr has its address."""

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


def test_one_process_decides_about_completion(tmp_path):
    """Files that one process sees and another does not, as on a network: none waits where the others do not."""
    path, _ = raw_volume(tmp_path, (16, 16, 16))
    output = predict(path, (12, 16, 16), tmp_path / "out.zarr")._jobs[0].output
    met = []
    assert output.finish(1, 2, lambda: met.append("barrier"), lambda own: met.append(own) or False) is False
    assert met == ["barrier", True]


def test_foreign_files_are_never_replaced(tmp_path):
    path, values = raw_volume(tmp_path, (16, 16, 16))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    for overwrite in (False, True):
        with pytest.raises(CellMapFileExistsError, match="contains no prediction of this package"):
            predict(path, (8, 8, 8), tmp_path / "mine", overwrite=overwrite)
        for output in (path, path / "s0" / "x", path.parent):
            with pytest.raises(CellMapValueError, match="must not be inside of each other"):
                predict(path, (8, 8, 8), output, overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
    assert np.array_equal(read(path.parent, "em"), values)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"classes": ("a", "b"), "model": Identity(1)}, r"must return 2 channels, one for each of \['a', 'b'\], got 1"),
        ({"model": Halved()}, r"must return \[\d, 1, 12, 16, 20\], .*, got \[\d, 1, 2, 4, 6\]; a model"),
        (
            {"context": 6},
            "a context of 6 voxels on either side along z leaves nothing of a patch of 12; give at most 5",
        ),
        ({"overlap": 1.0}, r"overlap must be a fraction of a patch, in \[0, 1\)"),
        ({"levels": 9}, "levels must be from 1 to 6"),
        ({"blend": "max"}, "blend must be one of trim, average, gaussian, got 'max'"),
        ({"shards": [16, 16, 16]}, "shards need zarr_format=3"),
        ({"dtype": "uint16"}, "dtype must be one of uint8, float16, float32, labels, got 'uint16'"),
        ({"region": {"z": [0, 10]}}, "region must be {z: "),
        (
            {"dtype": "uint8", "data": {"raw_value_transforms": None}},
            "returned values from .* and dtype=uint8 stores",
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


def test_full_disk_leaves_finished_blocks(tmp_path):
    path, _ = raw_volume(tmp_path, (33, 41, 50))
    out = tmp_path / "out.zarr"
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of the parent are not there
            predict(path, (12, 16, 20), out, Breaking(out, 9), model_id="m")
        except OutputError as e:
            os._exit(7 if "Finished blocks remain" in str(e) else 8)
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


def test_error_of_the_last_block_is_raised_at_the_end(tmp_path):
    path, _ = raw_volume(tmp_path, (33, 41, 50))
    counting = Identity()
    predict(path, (12, 16, 20), tmp_path / "whole.zarr", counting, dtype="uint8", model_id="m", check_context=False)
    out = tmp_path / "out.zarr"
    with pytest.raises(CellMapValueError, match=r"block \d+: the model returned values from .* and dtype=uint8 stores"):
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
    writers = [make_prediction_writer(str(tmp_path / f"{n}.zarr")) for n in range(2)]
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


def test_limited_prediction_can_be_resumed(tmp_path):
    path, values = raw_volume(tmp_path, (33, 41, 50))
    out = tmp_path / "out.zarr"
    assert not predict(path, (12, 16, 20), out, limit=8).summary.complete
    with pytest.raises(CellMapError):
        read_multiscale(out / "a")
    assert predict(path, (12, 16, 20), out).summary.complete
    assert np.abs(read(out) - values / 255).max() < 1e-6
