"""Data as it comes: damaged, incomplete, refused, changing. Each fault is an error, or a line, that says where."""

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from zarr.storage import LocalStore

from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.errors import CellMapValueError, ChunkError, MetadataError, WorkerError
from cellmap_lightning.io import chunks
from cellmap_lightning.io import retrying as guard
from cellmap_lightning.io.retrying import COUNTS
from cellmap_lightning.io.writer import write_group, write_multiscale
from cellmap_lightning.loading.dataloader import CellMapDataLoader
from cellmap_lightning.loading.options import WORKER_TIMEOUT
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from tests import processes
from tests.io.faults import FaultyStore, transient
from tests.make import make_dataset

SCALE = (8.0, 8.0, 8.0)
SHAPE = [32, 32, 32]
SPEC = {"shape": SHAPE, "scale": list(SCALE)}
RAW = np.random.default_rng(0).integers(1, 255, (96, 96, 96)).astype(np.uint8)
LABELS = (np.indices((64, 64, 64)).sum(axis=0) // 16 % 2).astype(np.uint8)


TURNS = {"transpose": {"axes": ["z", "y", "x"]}, "mirror": {"axes": {"z": 0.5, "x": 0.5}}}


@pytest.fixture(autouse=True)
def own_regions(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    """Raw of 96³ in chunks of 32³, and a crop of 64³ at its corner."""
    path = tmp_path / "volume.zarr"
    write_group(path)
    write_multiscale(path / "raw", RAW, scale=SCALE, translation=(4.0, 4.0, 4.0), chunks=(32, 32, 32))
    for name in ("mito", "er"):
        write_multiscale(
            path / "crop1" / name, LABELS, scale=SCALE, translation=(4.0, 4.0, 4.0), chunks=(32, 32, 32), mode="mode",
            array_attributes=lambda _, data: {
                "cellmap": {"annotation": {
                    "annotation_type": {"type": "semantic_segmentation", "encoding": {"absent": 0, "unknown": 255}},
                    "complement_counts": {"absent": int((data == 0).sum()), "unknown": int((data == 255).sum())},
                }}
            },
        )  # fmt: skip
    return path


def dataset(root, classes=("mito", "er"), **kwargs):
    given = {"read_attempts": 1, "max_workers": 2, "cache": "memory", "raw_value_transforms": None} | kwargs
    return make_dataset(
        root / "raw", f"{root}/crop1/[{','.join(classes)}]", list(classes), {"raw": SPEC}, {"labels": SPEC}, **given
    )


def position(data, start):
    """The position whose patch begins at a voxel."""
    center = [(s + n / 2) * 8.0 for s, n in zip(start, SHAPE, strict=True)]
    place = np.rint((np.asarray(center) - data.placement.first) / data.placement.step).astype(int)
    found = int(np.ravel_multi_index(place, data.placement.counts))
    assert list(data.get_center(found).values()) == pytest.approx(center)
    return found


def chunk(root, index="0/0/0", image="raw"):
    return root / image / "s0" / index


# -- a missing chunk


@pytest.mark.parametrize("cache", ["none", "memory", "disk"])
@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
def test_a_missing_chunk_of_raw_is_an_error_when_a_sample_shows_it(root, caplog, cache, reader):
    """In this run and in the next, which reads the cache; other samples are read."""
    chunk(root, "1/1/1").unlink()
    for _ in range(2):
        with dataset(root, cache=cache, reader=reader) as data:
            assert "crop1: 1 of the 8 chunks of raw that it can show are not stored" in caplog.text, "at setup"
            assert "with missing_raw=error a sample that shows one of them is an error" in caplog.text
            for _ in range(2):
                with pytest.raises(ChunkError) as caught:
                    data[position(data, (32, 32, 32))]
            text = str(caught.value)
            assert text.startswith(
                f"volume/crop1: raw: {root}/raw/s0: voxels z[32:64], y[32:64], x[32:64] are not stored"
            )
            assert f"chunk {chunk(root, '1/1/1')} is missing" in text
            assert "missing_raw=warn" in text
    chunk(root, "1/1/1").write_bytes(chunk(root, "2/2/2").read_bytes())
    with dataset(root, cache=cache, reader=reader) as data:
        assert (data[position(data, (32, 32, 32))]["raw"].numpy() == RAW[64:, 64:, 64:]).all(), "it was fetched again"


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
def test_missing_raw_warn_reads_the_fill_value_and_warns(root, caplog, reader):
    chunk(root, "1/1/1").unlink()
    with dataset(root, missing_raw="warn", reader=reader) as data:
        assert "with missing_raw=warn they show the fill value" in caplog.text
        caplog.clear()
        sample = data[position(data, (32, 32, 32))]
        assert (sample["raw"] == 0).all()
        assert not sample["labels"].isnan().any()
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
        assert f"chunk {chunk(root, '1/1/1')} is missing" in caplog.text
    with dataset(root) as data, pytest.raises(ChunkError):  # a cached fill value does not count as stored
        data[position(data, (32, 32, 32))]


@pytest.mark.parametrize("cache", ["none", "disk", pytest.param("memory", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["binary", "instances", "affinities"])
@pytest.mark.parametrize("spatial", [None, TURNS])
def test_missing_raw_mask_makes_targets_unknown_there_and_nowhere_else(root, cache, kind, spatial):
    """Whatever the sample's turn, targets are unknown exactly where raw has the fill value (which nothing else has)."""
    chunk(root, "1/0/1").unlink()
    for again in range(2):
        target = SPEC | ({"kind": kind} if kind != "binary" else {})
        more = {"offsets": [[1, 0, 0]]} if kind == "affinities" else {}
        data = CellMapDataset(
            root / "raw",
            f"{root}/crop1/[mito]",
            ["mito"],
            {"raw": SPEC},
            {"labels": target | more},
            spatial_transforms=spatial,
            is_train=spatial is not None,
            read=ReadOptions(missing_raw="mask", cache=cache),
            intensity=IntensityOptions(raw_value_transforms=None),
        )
        with data:
            touched = 0
            for start in ((0, 0, 0), (16, 0, 16), (32, 0, 32), (32, 32, 32), (20, 10, 30)):
                for number in range(3 if spatial else 1):
                    at = position(data, start)
                    draws = data.draw([number], True, again)
                    draws[0] = type(draws[0])(number, at, draws[0].turn)
                    batch = data.layout.finish(data.read(draws))
                    hole = batch["raw"][0, 0] == 0
                    found = batch["labels"][0, 0]
                    unknown = found == -1 if kind == "instances" else found.isnan()
                    if kind == "affinities":  # one of the two voxels may be the hidden one
                        assert unknown[hole].all()
                    else:
                        assert torch.equal(unknown, hole)
                    touched += int(hole.sum())
            assert touched


def test_interpolation_from_missing_raw_is_unknown_too(root):
    chunk(root, "1/0/1").unlink()
    spec = {"shape": [16, 16, 16], "scale": [10.0, 10.0, 10.0]}
    data = CellMapDataset(
        root / "raw",
        f"{root}/crop1/[mito]",
        ["mito"],
        {"raw": spec},
        {"labels": spec},
        read=ReadOptions(missing_raw="mask"),
        intensity=IntensityOptions(normalize={"range": [0, 1]}),
        labels=LabelOptions(too_coarse="upsample"),
    )
    whole = np.full_like(RAW, 200)
    write_multiscale(root / "even", whole, scale=SCALE, translation=(4.0, 4.0, 4.0), chunks=(32, 32, 32))
    shutil.copytree(root / "even" / "s0", root / "raw" / "s0", dirs_exist_ok=True)
    chunk(root, "1/0/1").unlink()
    touched = 0
    with data:
        for at in range(0, len(data), max(1, len(data) // 40)):
            sample = data[at]
            affected = sample["raw"][0] != 200
            unknown = sample["labels"][0].isnan()
            assert unknown[affected].all()
            touched += int(affected.sum())
    assert touched


def test_volumes_to_predict_may_have_holes(root, caplog):
    """Programs leave out chunks that hold nothing but the fill value, as around most volumes."""
    chunk(root, "0/0/0").unlink()
    split = CellMapDataSplit(datasets={"predict": [{"raw": str(root / "raw")}]}, input_arrays={"raw": SPEC})
    with split["predict"] as data:
        assert (data[0]["raw"] == 0).all()
    assert "1 of the 27 chunks of raw that it can show are not stored" in caplog.text
    assert "missing_raw=warn" in caplog.text


def test_a_missing_chunk_of_labels_is_background(root, caplog):
    """If nothing contradicts it: there are no counts of the voxels."""
    edit(root / "crop1" / "mito" / "s0" / ".zattrs", lambda c: c["cellmap"]["annotation"].pop("complement_counts"))
    chunk(root, "0/0/0", "crop1/mito").unlink()
    with dataset(root) as data:
        assert (data[position(data, (0, 0, 0))]["labels"][0] == 0).all()
    assert "not stored" not in caplog.text


def test_values_of_missing_raw():
    for value in ("skip", None, True):
        with pytest.raises(CellMapValueError, match="missing_raw must be one of auto, error, warn, fill, mask"):
            CellMapDataSplit(datasets={}, input_arrays={"raw": SPEC}, read=ReadOptions(missing_raw=value))


# -- everything that is wrong, in one report


def test_errors_of_all_crops_are_one_report(root):
    """One error names the faults of raw and classes of all crops."""
    second = root.parent / "second.zarr"
    shutil.copytree(root, second)
    edit(root / "raw" / ".zattrs", lambda c: c["multiscales"][0]["axes"][0].update(unit="lightyear"))
    (root / "crop1" / "mito" / "s0" / ".zarray").write_text("{")
    edit(root / "crop1" / "er" / "s0" / ".zarray", lambda c: c.update(dtype="|O"))
    shutil.rmtree(second / "crop1" / "er")
    entries = [{"raw": str(p / "raw"), "gt": f"{p}/crop1/[mito,er]"} for p in (root, second)]
    split = CellMapDataSplit(
        datasets={"train": entries}, classes=["mito", "er"], input_arrays={"raw": SPEC}, target_arrays={"labels": SPEC}
    )
    with pytest.raises(CellMapValueError) as caught:
        split["train"]
    text = str(caught.value)
    assert text.startswith("2 of the 2 crops for 'train' cannot be used")
    for expected in (
        "3 things are wrong:", "has the unit 'lightyear'", "mito/s0/.zarray: not valid JSON",
        "data type '|O' is not a number", f"but {second}/crop1/er does not exist",
    ):  # fmt: skip
        assert expected in text, text


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_labels_without_any_annotation_are_reported(root, caplog):
    counts = {"absent": 0, "unknown": 64**3}
    edit(
        root / "crop1" / "mito" / "s0" / ".zattrs",
        lambda c: c["cellmap"]["annotation"].update(complement_counts=counts),
    )
    with dataset(root):
        pass
    assert f"crop1, class mito: by its metadata all {64**3} voxels are unknown" in caplog.text


def test_stale_consolidated_metadata_hides_nothing(root):
    """A class that was added after the metadata had been consolidated is found."""
    (root / ".zmetadata").write_text(
        json.dumps({"zarr_consolidated_format": 1, "metadata": {".zgroup": {"zarr_format": 2}}})
    )
    with dataset(root) as data:
        assert set(data.annotated) == {"mito", "er"}
        assert (data[0]["raw"][0].numpy() == RAW[:32, :32, :32]).all()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_unreadable_file_is_named(root):
    """As another user: the metadata, a folder, and a chunk."""
    for folder in (root, *root.parents[:-2]):
        folder.chmod(0o755)
    for path in root.rglob("*"):
        path.chmod(0o755)
    with dataset(root) as data:
        chunk(root).chmod(0)
        os.seteuid(65534)
        try:
            with pytest.raises(ChunkError, match=r"PermissionError.*reading is not allowed"):
                data[position(data, (0, 0, 0))]
        finally:
            os.seteuid(0)
    for path in (root / "raw" / ".zattrs", root / "raw", root / "crop1" / "mito"):
        path.chmod(0)
        os.seteuid(65534)
        try:
            with pytest.raises(MetadataError, match=r"cannot be (read|looked at) \(Permission denied\)"):
                dataset(root)
        finally:
            os.seteuid(0)
            path.chmod(0o755)


# -- worker processes


def loader(data, **kwargs):
    given = {"num_workers": 1, "batch_size": 2, "samples_per_epoch": 8, "persistent_workers": False} | kwargs
    return CellMapDataLoader(data, **given)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_or_stopped_is_an_error_with_its_crop(root, how):
    """SIGKILL is what the system sends when memory runs out."""
    with dataset(root, is_train=True) as data:
        timeout = 20 if how == signal.SIGSTOP else WORKER_TIMEOUT
        batches = loader(data, samples_per_epoch=10**6, timeout=timeout)
        passing = iter(batches)
        next(passing)
        children = [int(p) for t in Path("/proc/self/task").iterdir() for p in (t / "children").read_text().split()]
        workers = [p for p in children if "resource_tracker" not in Path(f"/proc/{p}/cmdline").read_text()]
        # From another thread, while this one waits: torch's handler of signals raises wherever this one is.
        timers = [threading.Timer(0.3, os.kill, (worker, how)) for worker in workers]
        for timer in timers:
            timer.start()
        try:
            with pytest.raises(WorkerError, match=r"a worker process .* with samples of volume/crop1; ") as caught:
                for _ in passing:
                    pass
        finally:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGCONT)
        expected = "delivered nothing for 20 s" if how == signal.SIGSTOP else "killed, perhaps for memory"
        assert expected in str(caught.value)
        assert isinstance(caught.value, RuntimeError)
        passing.close()
        assert len(next(iter(loader(data)))["idx"]) == 2, "and the data can be read again"


def test_a_killed_worker_is_noticed_without_a_signal(root, monkeypatch):
    """The exception of torch's handler of SIGCHLD is lost while Python runs a finalizer."""
    monkeypatch.setattr("cellmap_lightning.loading.workers.CHECK_INTERVAL", 0.5)
    with dataset(root, is_train=True) as data:
        passing = iter(loader(data, samples_per_epoch=10**6))
        next(passing)
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            children = [int(p) for t in Path("/proc/self/task").iterdir() for p in (t / "children").read_text().split()]
            for worker in children:
                if "resource_tracker" not in Path(f"/proc/{worker}/cmdline").read_text():
                    os.kill(worker, signal.SIGKILL)
            with pytest.raises(WorkerError, match="killed, perhaps for memory"):
                for _ in passing:
                    pass
        finally:
            signal.signal(signal.SIGCHLD, before)


class TimesOut:
    """A dataset whose items fail with a text like that of torch's own timeout."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 2:
            raise RuntimeError("the server timed out after 30 s; DataLoader timed out after it")
        return {"index": index}


def test_an_error_about_a_timeout_is_not_a_timeout():
    """It is raised at its place, and no batch is left out."""
    seen = []
    with pytest.raises(RuntimeError, match="the server timed out after 30 s"):
        seen.extend(b["index"].tolist() for b in CellMapDataLoader(TimesOut(), 2, 1, is_train=False))
    assert seen == [[0, 1]]


def test_the_timeout_is_on_by_default(root):
    with dataset(root, is_train=True) as data:
        assert loader(data).timeout == WORKER_TIMEOUT > 0
        assert loader(data, num_workers=0).timeout == 0, "where there is nobody to wait for"


def test_a_fork_with_an_unsafe_reader_is_refused_with_advice(root):
    with (
        dataset(root, is_train=True, reader="tensorstore") as data,
        pytest.raises(CellMapValueError, match="leave multiprocessing_context out, or use 'forkserver' or 'spawn'"),
    ):
        loader(data, multiprocessing_context="fork")


PROGRAM = """
import itertools, os, sys
import numpy as np
from pathlib import Path
from tests.test_faults import dataset, loader, split_of
phase, root = sys.argv[1], Path(sys.argv[2])
if __name__ == "__main__":
    print("ready", flush=True)
    if phase == "setup":
        for number in itertools.count():
            split_of(root)["train"].close()
            if number == 0:
                print("reading", flush=True)
    with dataset(root, cache="disk", is_train=True) as data:
        if phase == "fill":
            for number in itertools.count():
                data.read(data.draw(range(number * 8, number * 8 + 8), True, 0))
                if number == 0:
                    print("reading", flush=True)
                if number % 8 == 7:
                    for file in (root / "raw" / "s0").rglob("[0-9]"):
                        if file.is_file():
                            os.utime(file)  # it is decoded again
                    data.close()
        batches = loader(data, num_workers=2, samples_per_epoch=10**6)
        for number, _ in enumerate(batches):
            if number == 2:
                print("reading", flush=True)
"""


def split_of(root):
    return CellMapDataSplit(
        datasets={"train": [{"raw": str(root / "raw"), "gt": f"{root}/crop1/[mito,er]"}]},
        classes=["mito", "er"],
        input_arrays={"raw": SPEC},
        target_arrays={"labels": SPEC},
        read=ReadOptions(cache="disk"),
    )


@contextlib.contextmanager
def started(tmp_path, root, phase):
    """The program, at the beginning of a phase."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, tmp_path / "program.py", phase, root]
    with processes.started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout.readline().strip() == "ready"
        yield process


def gone(pids, seconds=120):
    end = time.monotonic() + seconds
    while alive := [p for p in pids if Path(f"/proc/{p}").exists()]:
        assert time.monotonic() < end, alive
        time.sleep(0.05)


def interrupt(process, tmp_path, root):
    """Press Ctrl-C: no process, thread or temporary file is left, and voxels that are marked as cached are right."""
    below = processes.descendants(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode not in (0, -signal.SIGKILL), errors
    assert "KeyboardInterrupt" in errors
    gone(below)
    assert list((tmp_path / "tmp").iterdir()) == []
    with dataset(root, cache="disk", is_train=True) as data:
        for number in range(0, 64, 8):
            at = position(data, (number // 2, number // 4, number % 33))
            z, y, x = number // 2, number // 4, number % 33
            found = data.read([type(data.draw([0], True, 0)[0])(0, at, None)]).tensors
            assert (np.asarray(found["raw"])[0, 0] == RAW[z : z + 32, y : y + 32, x : x + 32]).all()


@pytest.mark.parametrize(
    "phase", ["fill", pytest.param("setup", marks=pytest.mark.slow), pytest.param("workers", marks=pytest.mark.slow)]
)
def test_ctrl_c_at_every_phase_leaves_nothing(root, tmp_path, phase):
    with started(tmp_path, root, phase) as process:
        assert process.stdout.readline().strip() == "reading"
        interrupt(process, tmp_path, root)


@pytest.mark.parametrize("count", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_ctrl_c_at_random_moments_leaves_nothing(root, tmp_path, count):
    """Also inside finalizers and while worker processes are started; each moment is drawn from a fixed seed."""
    generator = np.random.default_rng(count)
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        phase, moment = str(generator.choice(["fill", "setup", "workers"])), float(generator.uniform(0, 1.5))
        with started(folder, root, phase) as process:
            time.sleep(moment)
            try:
                interrupt(process, folder, root)
            except BaseException as e:
                e.add_note(f"repetition {number}: {phase}, {moment} s")
                raise
        shutil.rmtree(folder)


@pytest.mark.slow
def test_workers_end_with_a_parent_that_was_killed(root, tmp_path):
    with started(tmp_path, root, "workers") as process:
        assert process.stdout.readline().strip() == "reading"
        below = processes.children(process.pid)
        assert len(below) >= 2
        process.kill()
        process.communicate(timeout=120)
        gone(below)


@pytest.mark.slow
def test_soak_with_faults(root, monkeypatch):
    """100,000 samples, 1 % of whose reads fail: each is right, and nothing grows."""
    monkeypatch.setattr(guard, "FIRST_PAUSE", 0.001)
    count = itertools.count(1)

    def fault(key, number):
        found = next(count)
        return transient() if found % 100 == 0 else ConnectionResetError() if found % 250 == 0 else None

    monkeypatch.setattr(chunks, "open_store", lambda path, most: FaultyStore(LocalStore(path, read_only=True), fault))
    spec = {"shape": [8, 8, 8], "scale": list(SCALE)}
    COUNTS.reset()
    data = CellMapDataset(
        root / "raw",
        f"{root}/crop1/[mito]",
        ["mito"],
        {"raw": spec},
        {"labels": spec},
        is_train=True,
        read=ReadOptions(cache="none", max_workers=2),
        intensity=IntensityOptions(raw_value_transforms=None),
    )
    found = []
    with data:
        for first in range(0, 100_000, 8):
            draws = data.draw(range(first, first + 8), True, 0)
            batch = data.read(draws).tensors
            for row, draw in enumerate(draws):
                z, y, x = data.placement.grid_index(draw.position)
                assert (np.asarray(batch["raw"])[row, 0] == RAW[z : z + 8, y : y + 8, x : x + 8]).all()
            if first % 1000 == 0:
                status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
                descriptors = len(list(Path("/proc/self/fd").iterdir()))
                found.append((int(status["VmRSS"].split()[0]), descriptors, threading.active_count()))
    assert COUNTS.retries > 1000
    assert COUNTS.failures == 0
    early, late = np.median(found[20:40], axis=0), np.median(found[-20:], axis=0)
    assert late[0] < 1.02 * early[0] + 4000, (early, late)
    assert (late[1:] <= early[1:] + 2).all(), (early, late)


# -- silence while closing


def test_a_read_that_stalls_ends_with_its_deadline_and_the_data_can_be_closed(root, no_threads_left, monkeypatch):
    """A pipe stands in for a dead network mount: zarr-python's own store blocks in the system when it opens one."""
    monkeypatch.setattr(chunks, "open_store", lambda path, most: LocalStore(path, read_only=True))
    chunk(root).unlink()
    os.mkfifo(chunk(root))
    try:
        with (
            dataset(root, read_timeout=1.0) as data,
            pytest.raises(ChunkError, match="no answer, or not all of it, in time; read_timeout"),
        ):
            data[position(data, (0, 0, 0))]
    finally:
        os.close(os.open(chunk(root), os.O_WRONLY | os.O_NONBLOCK))


# -- security


def test_package_never_executes_data():
    """No eval, no pickle of data, no unsafe YAML, and checkpoints are loaded as weights."""
    package = Path(__file__).parents[1] / "cellmap_lightning"
    for file in package.rglob("*.py"):
        text = file.read_text()
        if file.name == "testing.py":  # tests of other packages' formats pickle a reader and read that again
            text = text.replace("pickle.loads(pickle.dumps(", "")
        for word in (" eval(", " exec(", "pickle.load", "yaml.load(", "yaml.unsafe", "allow_pickle=True", "shell=True"):
            assert word not in text, (file, word)
        for at in text.split("torch.load(")[1:]:
            # Or the argument of `load_from_checkpoint`.
            call = at.split(")")[0]
            assert "weights_only=True" in call or "weights_only=weights_only is not False" in call, file


def test_a_level_cannot_lead_out_of_the_store(root):
    for name in ("../crop1/mito/s0", "/etc", "s0/../../crop1/mito/s0", ""):
        edit(root / "raw" / ".zattrs", lambda c, name=name: c["multiscales"][0]["datasets"][0].update(path=name))
        with pytest.raises(MetadataError, match="a level's path should be a name inside the image"):
            dataset(root)


def test_cache_files_are_private(root, tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))
    with dataset(root, cache="disk", normalize="zscore", is_train=True) as data:
        data[0]
        _ = data.class_counts, data.crop.foreground_index("mito")
        for path in (tmp_path / "cache").rglob("*"):
            assert path.stat().st_mode & 0o077 == 0, path
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_the_table_of_faults_names_tests_that_exist():
    """`docs/reliability.md` says of each fault which test shows it."""
    tests = Path(__file__).parent
    text = (tests.parent / "docs" / "reliability.md").read_text()
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 40
    for file, name in named:
        assert re.search(rf"^def {name}\(", (tests / file).read_text(), re.MULTILINE), (file, name)
