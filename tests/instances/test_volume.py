"""Segmentation out of core: any blocks, processes and kills give the objects of the whole volume in memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cc3d
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from cellmap_lightning.errors import (
    CellMapError,
    CellMapFileExistsError,
    CellMapFileNotFoundError,
    CellMapKeyError,
    CellMapValueError,
)
from cellmap_lightning.instances.options import SegmentationOptions, StorageOptions
from cellmap_lightning.instances.segmenter import BlockSegmenter
from cellmap_lightning.instances.source import open_source
from cellmap_lightning.instances.volume import VolumeSegmentation
from cellmap_lightning.runtime.scheduling import ProcessScheduler, SerialScheduler, open_scheduler
from tests.instances.volumes import (
    OFFSETS,
    affinities_of,
    f1,
    probability_of,
    same_partition,
    touching_spheres,
    write_prediction,
)
from tests.processes import started

CHUNK = (16, 16, 16)


def run(source, out, options, storage=None, scheduler=None):
    silent = lambda text: None  # noqa: E731
    storage = storage or StorageOptions(chunks=CHUNK, block=(32, 32, 32), overwrite=True)
    summary = VolumeSegmentation(source, out, options, storage).run(scheduler, silent)
    return zarr.open_array(str(summary.labels / "s0"), mode="r")[...], summary


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tracks(seed, shape=(24, 32, 40), density=0.3):
    """A mask with long thin objects, which cross many blocks, beside single voxels that touch at corners."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < density * 0.2
    for _ in range(12):
        at, walk = rng.integers(0, shape), rng.integers(-1, 2, (60, 3))
        path = np.clip(at + np.cumsum(walk, axis=0), 0, np.subtract(shape, 1))
        mask[tuple(path.T)] = True
    return mask


@pytest.fixture(scope="module")
def truth():
    return touching_spheres((64, 64, 80))


@pytest.fixture(scope="module")
def probabilities(truth, tmp_path_factory):
    return write_prediction(tmp_path_factory.mktemp("p") / "p.zarr", probability_of(truth), kind="scaled")


@pytest.fixture(scope="module")
def affinities(truth, tmp_path_factory):
    attributes = {"kind": "affinities", "offsets": OFFSETS}
    folder = tmp_path_factory.mktemp("a")
    return write_prediction(folder / "a.zarr", affinities_of(truth), attributes=attributes)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    block=st.tuples(*[st.sampled_from([8, 16, 24, 40])] * 3),
    connectivity=st.sampled_from([6, 18, 26]),
    fill=st.booleans(),
)
def test_components_are_those_of_the_whole_volume_for_any_blocks(tmp_path_factory, seed, block, connectivity, fill):
    folder = tmp_path_factory.mktemp("components")
    mask = tracks(seed)
    if fill:
        mask = ndimage.binary_dilation(mask, iterations=2)
        mask &= np.random.default_rng(seed).random(mask.shape) > 0.05
    source = open_source(str(write_prediction(folder / "p.zarr", mask.astype(np.uint8), kind="mask")), "mito")
    storage = StorageOptions(chunks=(8, 8, 8), block=block)
    options = SegmentationOptions("components", connectivity=connectivity, fill_holes=fill)
    labels, summary = run(source, folder / "o.zarr", options, storage)
    expected = cc3d.connected_components(mask, connectivity=connectivity)
    if fill:
        expected = filled(expected)
    assert same_partition(labels, expected)
    # Numbers are those of scipy: by the first voxel of each object.
    firsts = np.unique(labels[labels > 0], return_index=True)
    assert firsts[0].tolist() == list(range(1, summary.objects + 1))
    assert (np.diff(firsts[1]) > 0).all()


def filled(labels):
    """Fill the background that touches a single object and not the border, by scipy."""
    empty, _ = ndimage.label(labels == 0)
    filled = labels.copy()
    for number, box in enumerate(ndimage.find_objects(empty), 1):
        if any(s.start == 0 or s.stop == n for s, n in zip(box, labels.shape, strict=True)):
            continue
        around = tuple(slice(s.start - 1, s.stop + 1) for s in box)
        here = empty[around] == number
        touching = np.unique(labels[around][ndimage.binary_dilation(here) & ~here])
        if len(touching) == 1:
            filled[around][here] = touching[0]
    return filled


@pytest.mark.parametrize(("connectivity", "objects"), [(6, 6), (18, 1), (26, 1)])
def test_background_between_several_objects_is_no_hole(tmp_path, connectivity, objects):
    mask = np.zeros((16, 16, 32), np.uint8)
    for axis, step in ((0, 1), (1, 1), (2, 1), (0, -1), (1, -1), (2, -1)):
        at = [8, 8, 16]
        at[axis] += step
        mask[tuple(at)] = 1
    source = open_source(str(write_prediction(tmp_path / "p.zarr", mask, kind="mask")), "mito")
    options = SegmentationOptions("components", connectivity=connectivity, fill_holes=True)
    labels, summary = run(source, tmp_path / "o.zarr", options, StorageOptions(chunks=CHUNK, block=CHUNK))
    assert summary.objects == objects
    assert (labels[8, 8, 16] > 0) == (objects == 1)


@pytest.mark.parametrize("method", ["watershed", "mutex_watershed", "agglomeration"])
@pytest.mark.parametrize("block", [(32, 32, 32), (64, 16, 48)])
def test_other_methods_are_exact_where_the_halo_exceeds_their_reach(
    tmp_path, probabilities, affinities, truth, method, block
):
    source = open_source(str(probabilities if method == "watershed" else affinities), "mito")
    options = SegmentationOptions(method, halo=25 * 8, merge_threshold=0.75, strides=(2, 2, 2))  # an odd halo
    expected = BlockSegmenter.of(source, options)(source.read((0, 0, 0), truth.shape))
    labels, _ = run(source, tmp_path / "o.zarr", options, StorageOptions(chunks=CHUNK, block=block))
    assert same_partition(labels, expected)


@pytest.mark.parametrize("method", ["watershed", "mutex_watershed"])
def test_touching_objects_are_separated(tmp_path, probabilities, affinities, truth, method):
    source = open_source(str(probabilities), "mito")
    together, _ = run(source, tmp_path / "c.zarr", SegmentationOptions("components"))
    assert len(np.unique(truth)) > 150
    assert f1(together, truth) < 0.2
    source = open_source(str(probabilities if method == "watershed" else affinities), "mito")
    labels, _ = run(source, tmp_path / "o.zarr", SegmentationOptions(method, halo=128, min_volume=30 * 512))
    assert f1(labels, truth) >= 0.95


def test_the_same_bytes_for_any_blocks_and_processes(tmp_path, probabilities):
    source = open_source(str(probabilities), "mito")
    options = SegmentationOptions("watershed", halo=24 * 8)
    results = []
    for block, processes in (((64, 64, 80), 1), ((32, 64, 48), 2)):
        out = tmp_path / "o.zarr"
        with open_scheduler(processes=processes) as opened:
            run(source, out, options, StorageOptions(chunks=CHUNK, block=block, overwrite=True), opened)
        results.append({name: data for name, data in files_of(out / "mito").items() if name[0] == "s"})
        results[-1]["table"] = (tmp_path / "o-objects.csv").read_bytes()
    assert results[0] == results[1]


class InterruptedStepError(Exception):
    pass


class Interrupting(SerialScheduler):
    """Ends after a number of steps."""

    def __init__(self, steps):
        self.left = steps

    def run(self, step, numbers):
        for item in super().run(step, numbers):
            if self.left == 0:
                raise InterruptedStepError
            self.left -= 1
            yield item


@pytest.fixture(scope="module")
def uninterrupted(probabilities, tmp_path_factory):
    """Options and files of a segmentation without an interruption."""
    whole = tmp_path_factory.mktemp("whole") / "whole.zarr"
    options, storage = SegmentationOptions("components", fill_holes=True), StorageOptions(chunks=CHUNK, block=(32,) * 3)
    run(open_source(str(probabilities), "mito"), whole, options, storage)
    return options, storage, files_of(whole)


@pytest.mark.parametrize("steps", [0, 3, 11, 12, 17, 24, 30])
def test_an_interrupted_segmentation_resumes_with_the_same_bytes(tmp_path, probabilities, uninterrupted, steps):
    source, (options, storage, whole) = open_source(str(probabilities), "mito"), uninterrupted
    out = tmp_path / "o.zarr"
    with pytest.raises(InterruptedStepError):
        run(source, out, options, storage, Interrupting(steps))
    counted = Counting()
    run(source, out, options, storage, counted)
    assert counted.steps == 3 * 12 - steps
    assert files_of(out) == whole
    run(source, out, options, storage, Interrupting(0))  # nothing is left


@pytest.mark.parametrize("change", ["touched", "removed", "replaced"])
def test_an_input_that_changed_before_a_restart_is_an_error(tmp_path, change):
    ids = touching_spheres((32, 32, 64))
    path = write_prediction(tmp_path / "p.zarr", probability_of(ids), kind="scaled")
    storage = StorageOptions(chunks=CHUNK, block=(32, 32, 32))
    with pytest.raises(InterruptedStepError):
        run(open_source(str(path), "mito"), tmp_path / "o.zarr", SegmentationOptions(), storage, Interrupting(1))
    chunk = path / "mito" / "s0" / "0" / "0" / "0"
    if change == "touched":
        os.utime(chunk)
    content = chunk.read_bytes()
    if change != "touched":
        chunk.unlink()
    if change == "replaced":
        chunk.write_bytes(content)
    with pytest.raises(CellMapFileExistsError, match=r"has changed since block 0 was segmented.*overwrite=True"):
        run(open_source(str(path), "mito"), tmp_path / "o.zarr", SegmentationOptions(), storage)


class Counting(SerialScheduler):
    steps = 0

    def run(self, step, numbers):
        for item in super().run(step, numbers):
            self.steps += 1
            yield item


PROGRAM = """
import sys, time
from cellmap_lightning.instances.options import SegmentationOptions, StorageOptions
from cellmap_lightning.runtime.scheduling import SerialScheduler
from cellmap_lightning.instances.source import open_source
from cellmap_lightning.instances.volume import VolumeSegmentation

class Slow(SerialScheduler):
    def run(self, step, numbers):
        for item in super().run(step, numbers):
            time.sleep(0.05)
            yield item

storage = StorageOptions(chunks=(16, 16, 16), block=(32, 32, 32))
source = open_source(sys.argv[1], "mito")
VolumeSegmentation(source, sys.argv[2], SegmentationOptions("components"), storage).run(Slow(), lambda text: None)
"""


@pytest.mark.slow
def test_a_killed_process_resumes_with_the_same_bytes(tmp_path, probabilities):
    rng = np.random.default_rng(0)
    run(open_source(str(probabilities), "mito"), tmp_path / "whole.zarr", SegmentationOptions("components"),
        StorageOptions(chunks=CHUNK, block=(32,) * 3))  # fmt: skip
    out = tmp_path / "o.zarr"
    command, journal = [sys.executable, "-c", PROGRAM, str(probabilities), str(out)], out / ".cellmap-segmentation"
    kills, code = 0, None
    while code != 0:
        with started(command, env=os.environ | {"PYTHONPATH": str(Path.cwd())}) as process:
            if kills < 4:
                while not (journal / "blocks-0.txt").exists() and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(float(rng.uniform(0.1, 0.8)))
                process.send_signal(signal.SIGKILL)
                kills += 1
            code = process.wait(120)
            assert code in (0, -signal.SIGKILL)
    assert files_of(out) == files_of(tmp_path / "whole.zarr")


def test_a_killed_worker_is_one_sentence_and_the_rest_resumes(tmp_path, probabilities):
    source, out = open_source(str(probabilities), "mito"), tmp_path / "o.zarr"
    storage = StorageOptions(chunks=CHUNK, block=(32,) * 3)
    opened = ProcessScheduler(1)
    first = list(opened.run(abs, [0]))
    assert first == [(0, 0)]
    for pid in list(opened._pool._processes):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(CellMapError, match=r"one of 1 processes has ended.*run the same command again"):
        run(source, out, SegmentationOptions("components"), storage, opened)
    opened.close()
    labels, _ = run(source, out, SegmentationOptions("components"), storage)
    assert labels.max() > 0


PARENT = """
import os, time
from cellmap_lightning.runtime.scheduling import ProcessScheduler
from tests.instances.test_volume import process_of

if __name__ == "__main__":
    for _, pid in ProcessScheduler(2).run(process_of, range(4)):
        print(*pid, flush=True)
    print(0, flush=True)
    time.sleep(600)
"""


def process_of(number):
    time.sleep(0.2)
    return [os.getpid()]


@pytest.mark.slow
def test_processes_end_with_the_one_that_was_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py")]
    with started(command, env=os.environ | {"PYTHONPATH": str(Path.cwd())}, stdout=subprocess.PIPE) as process:
        pids = set()
        for line in process.stdout:
            if line.strip() == b"0":
                break
            pids.add(int(line))
        assert pids
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_objects_are_filtered_by_volume(tmp_path):
    mask = np.zeros((32, 32, 64), np.uint8)
    mask[2, 2, 2], mask[8:12, 8:12, 20:44], mask[20:30, 20:30, 20:50] = 1, 1, 1
    source = open_source(str(write_prediction(tmp_path / "p.zarr", mask, kind="mask")), "mito")
    storage = StorageOptions(chunks=CHUNK, block=(32, 32, 32), overwrite=True)
    volumes = {}
    for least, most in ((0, None), (2 * 512, None), (2 * 512, 384 * 512), (0, 383 * 512)):
        options = SegmentationOptions("components", min_volume=least, max_volume=most)
        labels, summary = run(source, tmp_path / "o.zarr", options, storage)
        volumes[least, most] = np.bincount(labels.ravel())[1:].tolist()
        assert summary.objects == len(volumes[least, most])
    assert list(volumes.values()) == [[1, 384, 3000], [384, 3000], [384], [1]]


def test_the_table_has_the_measures_of_each_object(tmp_path):
    mask = np.zeros((32, 48, 64), np.uint8)
    mask[0:3, 4:8, 10:40], mask[20:22, 44:48, 60:64] = 1, 1
    path = write_prediction(tmp_path / "p.zarr", mask, kind="mask", voxel_size=(16, 8, 4))
    storage = StorageOptions(chunks=CHUNK, block=(16, 16, 16))
    run(open_source(str(path), "mito"), tmp_path / "o.zarr", SegmentationOptions("components"), storage)
    rows = (tmp_path / "o-objects.csv").read_text().splitlines()
    columns = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    first = {"id": "1", "class": "mito", "voxels": "360", "volume_nm3": "184320"}
    first |= {"center_z_nm": "20", "center_y_nm": "48", "center_x_nm": "102"}
    first |= {"min_z_nm": "-4", "max_z_nm": "44", "min_y_nm": "32", "max_y_nm": "64"}
    first |= {"min_x_nm": "42", "max_x_nm": "162", "border_area_nm2": str(120 * 8 * 4)}
    assert columns[0] == first
    assert columns[1]["border_area_nm2"] == str(2 * 4 * 16 * 4 + 2 * 4 * 16 * 8)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_labels_are_ome_ngff_image_labels(tmp_path, probabilities, zarr_format):
    from ome_zarr_models import v04, v05

    storage = StorageOptions(chunks=CHUNK, block=(32,) * 3, zarr_format=zarr_format)
    source = open_source(str(probabilities), "mito")
    labels, summary = run(source, tmp_path / "o.zarr", SegmentationOptions("components", threshold=0.9), storage)
    group = zarr.open_group(str(summary.labels), mode="r", zarr_format=zarr_format)
    (v04 if zarr_format == 2 else v05).image_label.ImageLabel.from_zarr(group)
    annotation = group.attrs["cellmap"]["annotation"]
    assert annotation["annotation_type"]["type"] == "instance_segmentation"
    coarse = group["s1"][...]
    assert group["s1"].dtype == np.uint32
    assert set(np.unique(coarse)) <= set(np.unique(labels))
    with pytest.raises(CellMapValueError, match="ids of objects already"):
        open_source(str(tmp_path / "o.zarr"), "mito")


# -- errors


@pytest.mark.parametrize(("name", "hint"), [("mitto", "did you mean 'mito'"), ("nuc", "it has mito"), ("", "choose")])
def test_a_class_that_is_not_there_is_an_error(tmp_path, probabilities, name, hint):
    if not name:
        write_prediction(probabilities.parent / "two.zarr", np.zeros((32,) * 3, np.uint8), "mito", kind="mask")
        probabilities = write_prediction(
            probabilities.parent / "two.zarr", np.zeros((32,) * 3, np.uint8), "nuc", kind="mask"
        )
    with pytest.raises(CellMapError, match=hint):
        open_source(str(probabilities), name or None)


def test_an_input_that_does_not_exist_is_an_error(tmp_path):
    for path in (tmp_path / "no.zarr", tmp_path / "no" / "p.zarr"):
        with pytest.raises(CellMapFileNotFoundError, match="does not exist"):
            open_source(str(path), "mito")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(CellMapKeyError, match="it has none"):
        open_source(str(tmp_path / "empty.zarr"), "mito")


@pytest.mark.parametrize("method", ["mutex_watershed", "agglomeration"])
def test_probabilities_are_no_affinities(tmp_path, probabilities, method):
    source = open_source(str(probabilities), "mito")
    with pytest.raises(
        CellMapValueError, match=rf"method={method} needs affinities.*use method=components or watershed"
    ):
        VolumeSegmentation(source, tmp_path / "o.zarr", SegmentationOptions(method))


@pytest.mark.parametrize("method", ["components", "watershed"])
def test_affinities_are_no_probabilities(tmp_path, affinities, method):
    source = open_source(str(affinities), "mito")
    assert BlockSegmenter.of(source, SegmentationOptions()).method == "mutex_watershed"
    with pytest.raises(CellMapValueError, match=rf"method={method} needs probability.*use method=mutex_watershed or"):
        VolumeSegmentation(source, tmp_path / "o.zarr", SegmentationOptions(method))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([[-1, 0, 0]], "there are 1, and 6 channels"),
        ([[-1, 0]] * 6, "use three whole voxels"),
        ([[0, 0, 0]] * 6, "no neighbour"),
        ([[2, 0, 0]] * 6, "direct neighbour"),
    ],
)
def test_offsets_that_do_not_fit_are_an_error(affinities, offsets, message):
    with pytest.raises(CellMapValueError, match=message):
        open_source(str(affinities), "mito", offsets=offsets)


def test_without_seeds_there_is_one_sentence_and_no_output(tmp_path, probabilities):
    source = open_source(str(probabilities), "mito")
    for options in (
        SegmentationOptions("watershed", threshold=1.5),
        SegmentationOptions("watershed", threshold=1.5, seed_depth=1e4),
    ):
        with pytest.raises(CellMapValueError, match=r"there are no seeds.*use a lower threshold"):
            run(source, tmp_path / "o.zarr", options)
        assert not (tmp_path / "o.zarr").exists()


def test_more_objects_than_ids_are_an_error(tmp_path):
    mask = np.zeros((32, 32, 32), np.uint8)
    mask[::2, ::2, ::2] = 1  # 4096 objects
    path = write_prediction(tmp_path / "p.zarr", mask, kind="mask")
    source, storage = open_source(str(path), "mito"), {"chunks": CHUNK, "block": (32, 32, 32)}
    for number, mask_ids in enumerate(("uint8", "uint8", "uint8")):
        with pytest.raises(CellMapValueError, match="4,096 objects, and ids=uint8 ends at 255; use ids=auto"):
            run(source, tmp_path / f"{number}.zarr", SegmentationOptions(), StorageOptions(ids=mask_ids, **storage))
    labels, _ = run(source, tmp_path / "o.zarr", SegmentationOptions(), StorageOptions(ids="uint16", **storage))
    assert labels.dtype == np.uint16
    assert labels.max() == 4096


@pytest.mark.parametrize("content", ["{}", "", '{"settings": {}}'])
def test_an_unfinished_prediction_is_an_error(tmp_path, content):
    path = write_prediction(tmp_path / "p.zarr", np.zeros((32,) * 3, np.uint8), kind="mask")
    (path / ".cellmap-prediction").mkdir()
    (path / ".cellmap-prediction" / "settings.json").write_text(content)
    with pytest.raises(CellMapValueError, match="not finished; run the same cellmap-predict again"):
        open_source(str(path), "mito")


def test_another_output_is_replaced_only_when_asked(tmp_path, probabilities):
    source, out = open_source(str(probabilities), "mito"), tmp_path / "o.zarr"
    storage = {"chunks": CHUNK, "block": (64, 64, 80)}
    run(source, out, SegmentationOptions("components"), StorageOptions(**storage))
    with pytest.raises(
        CellMapFileExistsError, match=r"(?s)another segmentation.*method: 'components' is there.*overwrite"
    ):
        run(source, out, SegmentationOptions("watershed"), StorageOptions(**storage))
    run(source, out, SegmentationOptions("watershed"), StorageOptions(overwrite=True, **storage))
    other = tmp_path / "other.zarr"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(CellMapFileExistsError, match="contains no segmentation of this package"):
        run(source, other, SegmentationOptions(), StorageOptions(overwrite=True, **storage))
    assert (other / "mine.txt").read_text() == "mine"
    with pytest.raises(CellMapValueError, match="inside of each other"):
        run(source, probabilities / "inside.zarr", SegmentationOptions(), StorageOptions(**storage))
