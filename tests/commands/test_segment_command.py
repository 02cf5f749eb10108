"""The command cellmap-segment, and methods of instances in cellmap-submit."""

import os
import shutil
import time

import numpy as np
import pytest
import zarr
from PIL import Image
from scipy import ndimage

from cellmap_lightning.commands.segment import segment
from cellmap_lightning.commands.submit import submit
from cellmap_lightning.errors import CellMapError, CellMapValueError, MissingExtraError
from cellmap_lightning.instances.libraries import library
from cellmap_lightning.instances.options import SourceOptions
from cellmap_lightning.io.writer import write_multiscale
from cellmap_lightning.runtime.scheduling import open_scheduler
from tests.commands.test_cli import run_forked
from tests.evaluation.test_challenge import manifest, row
from tests.instances.test_volume import files_of
from tests.instances.volumes import (
    OFFSETS,
    affinities_of,
    f1,
    probability_of,
    same_partition,
    touching_spheres,
    write_prediction,
)
from tests.processes import descendants

SMALL = ["storage.chunks=[16,16,16]", "storage.block=[32,32,32]"]


@pytest.fixture(scope="module")
def truth():
    return touching_spheres((48, 48, 64))


@pytest.fixture
def prediction(truth, tmp_path):
    return write_prediction(tmp_path / "p.zarr", probability_of(truth), kind="scaled")


def test_the_command_writes_labels_list_and_picture(prediction, truth, tmp_path):
    arguments = ["input=p.zarr", "out=s.zarr", "class=mito", "method=watershed", *SMALL]
    code, text = run_forked(*arguments, cwd=tmp_path, command="segment")
    assert code == 0, text
    labels = zarr.open_array(str(tmp_path / "s.zarr" / "mito" / "s0"), mode="r")[...]
    assert f1(labels, truth) >= 0.95
    assert f"{labels.max()} objects" in text
    assert len((tmp_path / "s-objects.csv").read_text().splitlines()) == labels.max() + 1
    assert (tmp_path / "s.png").stat().st_size > 10_000
    assert [line for line in text.splitlines() if line.endswith((".csv", ".png"))] == ["s-objects.csv", "s.png"]
    code, text = run_forked(*arguments, cwd=tmp_path, command="segment")
    assert code == 0, text
    assert "finished before" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["class=mitos"], "it has no class 'mitos'; did you mean 'mito'?"),
        (["class=mito", "method=watersheds"], "method must be one of components, watershed"),
        (["class=mito", "method=mutex_watershed"], "method=mutex_watershed needs affinities"),
        (["class=mito", "out=segmentation"], "out=segmentation: the name of a segmentation must end with .zarr"),
        (["class=mito", "scheduler=slurm"], "scheduler must be one of threads, processes, dask"),
        (["class=mito", "processes=0"], "processes must be a whole number of at least 1"),
        (["class=mito", "address=tcp://localhost:1"], "only Dask has one; set scheduler=dask"),
        (["class=mito", "tresholds=0.5"], "threshold"),
        (["input=nothing.zarr", "class=mito"], "input=nothing.zarr: it does not exist"),
    ],
)
def test_errors_are_one_sentence(prediction, tmp_path, arguments, message):
    code, text = run_forked("input=p.zarr", "out=s.zarr", *arguments, *SMALL, cwd=tmp_path, command="segment")
    assert code == 1, text
    assert message in text
    assert "Traceback" not in text
    assert not (tmp_path / "s.zarr").exists()


def test_channels_in_groups_are_affinities(truth, tmp_path):
    values = affinities_of(truth)
    for channel, name in enumerate("zyxabc"):
        path = write_prediction(tmp_path / "p.zarr", values[channel], name, kind="scaled")
    settings = {"storage": {"chunks": (16, 16, 16), "block": (48, 48, 64)}, "picture": False}
    summary = segment(
        str(path), tmp_path / "s.zarr", "z",
        source=SourceOptions(kind="affinities", channels=list("zyxabc"), offsets=OFFSETS), **settings,
    )  # fmt: skip
    labels = zarr.open_array(str(summary.labels / "s0"), mode="r")[...]
    assert f1(labels, truth, 30) >= 0.95


def test_signed_distances_are_segmented(truth, tmp_path):
    distance = np.full(truth.shape, -8.0, np.float32)
    for number, box in enumerate(ndimage.find_objects(truth), 1):
        if box is not None:
            here = ndimage.distance_transform_edt(np.pad(truth[box] == number, 1))[1:-1, 1:-1, 1:-1]
            distance[box][here > 0] = 8 * here[here > 0]
    stored = np.rint(128 + np.clip(distance / 64, -1, 1) * 127).astype(np.uint8)
    for name, values, attributes in (("f.zarr", distance, {}), ("u.zarr", stored, {"nm": 64})):
        path = write_prediction(tmp_path / name, values, attributes={"kind": "sdt", **attributes})
        summary = segment(str(path), tmp_path / f"s-{name}", "mito", picture=False, storage={"chunks": (16, 16, 16)})
        labels = zarr.open_array(str(summary.labels / "s0"), mode="r")[...]
        assert f1(labels, truth) >= 0.95, name


def test_a_missing_library_is_a_sentence(monkeypatch):
    import sys

    for module, package in (("bioimage_cpp", "bioimage-cpp"), ("cc3d", "connected-components-3d"), ("scipy", "scipy")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=rf"needs {package}, .*pip install -e \"\.\[instances\]\""):
            library(module)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtraError, match=r"pip install -e \"\.\[dask\]\""), open_scheduler("dask"):
        pass


# -- the picture


def outlined_pixels(path):
    """The number of coloured pixels of a picture; raw and predictions are grey."""
    with Image.open(path) as picture:
        image = np.asarray(picture.convert("RGB")).astype(int)
    return int((np.ptp(image, axis=2) > 40).sum()), image


@pytest.fixture
def raw(truth, tmp_path):
    """Raw of twice the resolution, which is dark at the border of each object."""
    values = np.where(ndimage.grey_erosion(truth, 3) == truth, 200, 20).astype(np.uint8)
    values = values.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    write_multiscale(tmp_path / "raw.zarr", values, scale=(4, 4, 4), translation=(2, 2, 2))
    return tmp_path / "raw.zarr"


@pytest.mark.parametrize("how", ["given", "recorded", "gone", "none"])
def test_the_picture_shows_outlines_over_raw(prediction, raw, tmp_path, how):
    recorded = {"recorded": str(raw), "gone": str(tmp_path / "gone.zarr")}.get(how)
    if recorded is not None:
        zarr.open_group(str(prediction), mode="r+").attrs["cellmap"] = {"prediction": {"settings": {"raw": recorded}}}
    given = {"raw": str(raw)} if how == "given" else {}
    segment(str(prediction), tmp_path / "s.zarr", "mito", method="watershed", storage={"chunks": (16, 16, 16)}, **given)
    coloured, image = outlined_pixels(tmp_path / "s.png")
    filled = how in ("gone", "none")
    assert (coloured > 0.1 * image[..., 0].size) == filled
    assert coloured > 0.01 * image[..., 0].size


@pytest.mark.parametrize("damage", ["attributes", "folder", "array"])
def test_recorded_raw_that_cannot_be_read_is_no_error(prediction, raw, tmp_path, damage, caplog):
    zarr.open_group(str(prediction), mode="r+").attrs["cellmap"] = {"prediction": {"settings": {"raw": str(raw)}}}
    if damage == "attributes":
        (raw / ".zattrs").write_text("{")
    elif damage == "folder":
        shutil.rmtree(raw / "s0")
    else:
        (raw / "s0" / ".zarray").write_text("nothing")
    with caplog.at_level("INFO"):
        segment(str(prediction), tmp_path / "s.zarr", "mito", storage={"chunks": (16, 16, 16)})
    assert (tmp_path / "s.png").stat().st_size > 5000
    assert "s.png is drawn without raw, which cannot be read (" in caplog.text


def test_given_raw_that_does_not_exist_is_an_error_before_the_segmentation(prediction, tmp_path):
    for path in (tmp_path / "no.zarr", tmp_path, prediction / "mito" / "s0" / "0"):
        with pytest.raises(CellMapError):
            segment(str(prediction), tmp_path / "s.zarr", "mito", raw=str(path))
        assert not (tmp_path / "s.zarr").exists()


# -- parameters of cellmap-tune


def stored(folder):
    return zarr.open_array(str(folder / "mito" / "s0"), mode="r")[...]


@pytest.mark.parametrize("given", [[], ["class=mito"]])
def test_the_command_takes_a_file_of_tuned_parameters(prediction, tmp_path, given):
    (tmp_path / "t.yaml").write_text("mito:\n  method: watershed\n  threshold: 0.6\n  min_volume: 51200.0\n")
    expected = segment(
        str(prediction), tmp_path / "e.zarr", "mito", method="watershed", threshold=0.6, min_volume=51200,
        picture=False, storage={"chunks": (16, 16, 16), "block": (32, 32, 32)},
    )  # fmt: skip
    arguments = ["input=p.zarr", "out=s.zarr", "tuned=t.yaml", "picture=false", *given, *SMALL]
    code, text = run_forked(*arguments, cwd=tmp_path, command="segment")
    assert code == 0, text
    assert "replaces" not in text
    np.testing.assert_array_equal(stored(tmp_path / "s.zarr"), stored(expected.output))


def test_the_command_line_replaces_tuned_parameters(prediction, tmp_path):
    (tmp_path / "t.yaml").write_text("mito: {method: watershed, threshold: 0.6, min_volume: 51200.0}\n")
    expected = segment(
        str(prediction), tmp_path / "e.zarr", "mito", method="components", threshold=0.9, min_volume=51200,
        picture=False, storage={"chunks": (16, 16, 16), "block": (32, 32, 32)},
    )  # fmt: skip
    arguments = ["input=p.zarr", "out=s.zarr", "tuned=t.yaml", "method=components", "threshold=0.9", "picture=false"]
    code, text = run_forked(*arguments, *SMALL, cwd=tmp_path, command="segment")
    assert code == 0, text
    assert "mito: threshold=0.9 replaces 0.6 of tuned=t.yaml" in text
    assert "mito: method=components replaces watershed of tuned=t.yaml" in text
    np.testing.assert_array_equal(stored(tmp_path / "s.zarr"), stored(expected.output))


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "tuned=t.yaml: there is no such file"),
        ("name: run\n", [], "cellmap-tune writes a mapping of classes"),
        ("mito: {seeds: 5}\n", [], "a key of mito must be one of"),
        ("nuc: {threshold: 0.5}\n", ["class=mito"], "has no parameters of 'mito', but of nuc"),
        ("mitos: {threshold: 0.5}\n", [], "it has no class 'mitos'; did you mean 'mito'"),
        ("{mito: {}, nuc: {}}\n", [], "has parameters of mito, nuc; choose one with class=..."),
        ("mito: {method: mutex_watershed}\n", [], "needs affinities"),
    ],
)
def test_invalid_files_of_parameters(prediction, tmp_path, content, arguments, message):
    if content is not None:
        (tmp_path / "t.yaml").write_text(content)
    overrides = ["input=p.zarr", "out=s.zarr", "tuned=t.yaml", *arguments, *SMALL]
    code, text = run_forked(*overrides, cwd=tmp_path, command="segment")
    assert code == 1, text
    assert message in text
    assert "Traceback" not in text
    assert not (tmp_path / "s.zarr").exists()


# -- submissions


@pytest.fixture
def crop(truth, tmp_path):
    folder = tmp_path / "predictions" / "jrc_a.zarr"
    folder.mkdir(parents=True)
    write_prediction(folder / "crop7", probability_of(truth), kind="scaled")
    return manifest(tmp_path, row(7, "mito", (8.0, 8.0, 8.0), (4.0, 4.0, 4.0), truth.shape))


def test_submissions_segment_classes_by_their_methods(crop, truth, tmp_path):
    arguments = tmp_path / "predictions", crop, tmp_path / "s.zarr"
    submit(*arguments)
    assert f1(zarr.open_array(str(tmp_path / "s.zarr" / "crop7" / "mito"), mode="r")[...], truth) < 0.2
    settings = {"mito": {"method": "watershed", "seed_distance": 32}}
    submit(*arguments, instances=settings, overwrite=True)
    assert f1(zarr.open_array(str(tmp_path / "s.zarr" / "crop7" / "mito"), mode="r")[...], truth) >= 0.95
    assert (tmp_path / "s-instances" / "jrc_a" / "crop7" / "mito.zarr" / "mito" / "s0").is_dir()


def test_submissions_segment_from_the_command_line(crop, truth, tmp_path):
    overrides = [f"manifest={crop}", "out=s.zarr", "instances={mito: {method: watershed}}"]
    code, text = run_forked(*overrides, cwd=tmp_path, command="submit")
    assert code == 0, text
    assert f1(zarr.open_array(str(tmp_path / "s.zarr" / "crop7" / "mito"), mode="r")[...], truth) >= 0.95


@pytest.mark.parametrize(
    ("instances", "message"),
    [
        ({"mitos": {"method": "watershed"}}, "did you mean 'mito'"),
        ({"mito": {"methods": "watershed"}}, "did you mean 'method'"),
        ({"mito": "watershed"}, r"instances.mito must be .*\{method: watershed\}"),
        ({"mito": {"method": "watersheds"}}, "did you mean 'watershed'"),
        ({"mito": {"method": "agglomeration"}}, "needs affinities or boundary"),
    ],
)
def test_invalid_methods_of_submissions(crop, tmp_path, instances, message):
    with pytest.raises(CellMapValueError, match=message):
        submit(tmp_path / "predictions", crop, tmp_path / "s.zarr", instances=instances)
    assert not (tmp_path / "s.zarr").exists()


def test_submissions_take_tuned_parameters(crop, truth, tmp_path):
    (tmp_path / "t.yaml").write_text("mito: {method: watershed, threshold: 0.6, min_volume: 51200.0}\n")
    code, text = run_forked(f"manifest={crop}", "out=s.zarr", "tuned=t.yaml", cwd=tmp_path, command="submit")
    assert code == 0, text
    labels = zarr.open_array(str(tmp_path / "s.zarr" / "crop7" / "mito"), mode="r")[...]
    assert f1(labels, truth) >= 0.95
    assert np.bincount(labels.ravel())[1:].min() >= 100  # 51200 nm3
    overrides = [f"manifest={crop}", "out=o.zarr", "tuned=t.yaml", "threshold=0.9", "min_volume=0"]
    overrides += ["instances={mito: {method: components}}"]
    code, text = run_forked(*overrides, cwd=tmp_path, command="submit")
    assert code == 0, text
    assert "method=components replaces watershed" in text
    assert "threshold=0.9 replaces 0.6" in text
    assert "min_volume=0 replaces 51200.0" in text
    submit(tmp_path / "predictions", crop, tmp_path / "e.zarr", threshold=0.9)
    replaced, expected = (
        zarr.open_array(str(tmp_path / name / "crop7" / "mito"), mode="r")[...] for name in ("o.zarr", "e.zarr")
    )
    assert same_partition(replaced, expected)


def test_the_mask_of_a_semantic_class_is_that_of_its_tuned_objects(truth, tmp_path):
    values = probability_of(truth)
    values[20:24] = 0  # two objects
    for name in ("er", "nuc"):
        write_prediction(tmp_path / "predictions" / "jrc_a.zarr" / "crop7", values, name, kind="scaled")
    rows = [row(7, name, (8.0, 8.0, 8.0), (4.0, 4.0, 4.0), truth.shape) for name in ("er", "nuc")]
    (tmp_path / "t.yaml").write_text("er: {method: components, threshold: 0.6, min_volume: 51200.0}\n")
    submit(tmp_path / "predictions", manifest(tmp_path, *rows), tmp_path / "s.zarr", tuned=tmp_path / "t.yaml")
    mask = zarr.open_array(str(tmp_path / "s.zarr" / "crop7" / "er"), mode="r")[...]
    objects, _ = ndimage.label(values >= 0.6 * 255, np.ones((3, 3, 3)))
    large = np.bincount(objects.ravel()) >= 100
    large[0] = False
    np.testing.assert_array_equal(mask, large[objects])


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("mitos: {threshold: 0.5}\n", {}, "tuned=.*: a class must be one of mito, got 'mitos'; did you mean 'mito'"),
        ("mito: {tresholds: 0.5}\n", {}, "did you mean 'threshold'"),
        ("[1, 2]\n", {}, "cellmap-tune writes a mapping of classes"),
        ("mito: {method: agglomeration}\n", {}, "needs affinities or boundary"),
        ("mito: {threshold: 0.5}\n", {"instances": "a.b"}, "instances=a.b numbers the objects of every class, and"),
        ("mito: {threshold: 0.5}\n", {"instances": {"mito": "watershed"}}, "instances.mito must be a mapping"),
    ],
)
def test_invalid_tuned_parameters_of_submissions(crop, tmp_path, content, more, message):
    (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(CellMapError, match=message):
        submit(tmp_path / "predictions", crop, tmp_path / "s.zarr", tuned=tmp_path / "t.yaml", **more)
    assert not (tmp_path / "s.zarr").exists()


# -- Dask


@pytest.mark.slow
def test_a_dask_worker_that_is_killed_is_replaced(prediction, tmp_path):
    """A worker that ends in the middle costs the blocks that it had begun; the bytes are the same."""
    import threading

    settings = {"method": "watershed", "halo": 192.0, "picture": False}
    storage = {"chunks": (16, 16, 16), "block": (16, 16, 16)}
    whole = segment(str(prediction), tmp_path / "whole.zarr", "mito", storage=storage, **settings)
    from cellmap_lightning.instances.options import SegmentationOptions, StorageOptions
    from cellmap_lightning.instances.source import open_source
    from cellmap_lightning.instances.volume import VolumeSegmentation

    volume = VolumeSegmentation(
        open_source(str(prediction), "mito"), tmp_path / "o.zarr", SegmentationOptions("watershed", halo=192.0),
        StorageOptions(**storage),
    )  # fmt: skip
    killed = []

    def kill_worker(journal, pids):
        while not journal.exists() or journal.read_text().count("labelled") < 4:
            time.sleep(0.02)
        os.kill(pids[0], 9)
        killed.append(pids[0])

    with open_scheduler("dask", 2) as opened:
        pids = list(opened._client.run(os.getpid).values())
        assert set(pids) <= descendants(os.getpid())
        journal = tmp_path / "o.zarr" / ".cellmap-segmentation" / "blocks-0.txt"
        thread = threading.Thread(target=kill_worker, args=(journal, pids))
        thread.start()
        summary = volume.run(opened)
        thread.join(60)
    assert len(killed) == 1
    assert summary.objects == whole.objects
    assert files_of(summary.output) == files_of(whole.output)


def test_an_address_at_which_nothing_answers(tmp_path):
    pytest.importorskip("distributed")
    for address in ("tcp://127.0.0.1:1", "nonsense://x", "tcp://127.0.0.1:99999"):
        with pytest.raises(CellMapError, match="no Dask scheduler answers"), open_scheduler("dask", 1, address):
            pass
