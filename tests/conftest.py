"""Volumes that the tests share, written once; nothing here stands in for the real thing."""

import atexit
import gc
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.batches.layout import BatchLayout
from cellmap_lightning.demo.synthetic import SyntheticVolume, write_volume
from tests import platforms, processes
from tests.cover import cover

# Shells have what they run in the background ignore Ctrl-C, and so would the programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Where Python is set not to write compiled modules beside their source, they go to a folder of this run: otherwise
# each process that a test starts compiles Lightning again, which takes several seconds.
if sys.dont_write_bytecode and sys.pycache_prefix is None:
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="compiled-")
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # neither in the processes of xdist, which start after this

    def _remove_compiled(folder, owner):
        if os.getpid() == owner:  # and not a fork
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(_remove_compiled, sys.pycache_prefix, os.getpid())


INPUTS = {"raw": {"shape": [8, 16, 24], "scale": [10.48, 8, 8]}}
TARGETS = {"labels": {"shape": [8, 16, 24], "scale": [10.48, 8, 8]}}
CLASSES = ["mito", "er", "pm"]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing that tests keep is found by the user's own runs, nor the other way round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLMAP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


#: Seconds that a test that is marked slow may take.
SLOW = 7200


def pytest_xdist_auto_num_workers():
    """Run one test process more than there are cores, since many tests wait for other processes."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their marks
def pytest_collection_modifyitems(items):
    _mark_uncovered(items)
    for item in items:
        if _slow(item) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW))
        if missing := platforms.unmet(item.path, getattr(item, "originalname", item.name)):
            names = ", ".join(missing)
            reason = f"needs {names}, which this system ({platforms.PLATFORM}) does not have or cannot use safely"
            item.add_marker(pytest.mark.skip(reason=reason))


def _mark_uncovered(items: list[pytest.Item]) -> None:
    """Mark as slow what ``pytest.mark.cover(size)`` leaves out, see `tests/cover.py`; what is slow covers nothing."""
    families: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("cover") and not _slow(item):
            families.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for family in families.values():
        mark = family[0].get_closest_marker("cover")
        assert mark is not None
        rows = [_values(item) for item in family]
        chosen = set(cover(rows, *mark.args))
        for number, item in enumerate(family):
            if number not in chosen:
                item.add_marker(pytest.mark.slow)


def _values(item: pytest.Function) -> list[tuple[int, ...]]:
    """Return the objects that each ``parametrize`` and fixture of a test gives: arguments of one are one value."""
    groups, fixtures = [], dict(item.callspec.params)
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        groups.append(tuple(id(fixtures.pop(name)) for name in names))
    return groups + [(id(value),) for value in fixtures.values()]


def _slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def pytest_ignore_collect(collection_path):
    return True if collection_path.suffix == ".py" and not platforms.importable(collection_path) else None


def pytest_collection_finish():
    """Exempt the imported modules and the collected tests from garbage collection, which visits them in 0.4 s."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


_FAILED = pytest.StashKey[bool]()


@pytest.fixture(autouse=True)
def a_failed_test_leaves_no_process(request):
    """End threads and memory of a test, so that it takes no time, memory or descriptor from the next."""
    if not sys.platform.startswith("linux"):
        yield
        return
    before = processes.descendants(os.getpid())
    with processes.marking() as mark:
        yield
        if request.node.stash.get(_FAILED, False):
            processes.kill(processes.left_behind(mark, before))


@pytest.fixture(scope="session", autouse=True)
def predicted_memory_is_real():
    """Every batch that any test finishes has exactly the bytes that were predicted, in both forms, array by array."""
    finish = BatchLayout.finish

    def checked(layout, batch):
        finished = finish(layout, batch)
        if isinstance(batch, CompactBatch):
            memory = layout.memory(len(batch.tensors["idx"]))
            assert {
                n: t.nbytes for n, t in batch.tensors.items() if n not in ("idx", "sample")
            } == memory.compact.arrays
            assert {n: t.nbytes for n, t in finished.items() if n != "idx"} == memory.arrays
        return finished

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchLayout, "finish", checked)
        yield


@pytest.fixture(scope="session")
def volume(tmp_path_factory) -> SyntheticVolume:
    """The synthetic volume, Zarr v2."""
    return write_volume(tmp_path_factory.mktemp("v2") / "volume.zarr")


@pytest.fixture(scope="session")
def volume_v3(tmp_path_factory) -> SyntheticVolume:
    """The same in Zarr v3."""
    return write_volume(tmp_path_factory.mktemp("v3") / "volume.zarr", zarr_format=3)


@pytest.fixture
def real_volume() -> Path:
    """A real volume that is not part of the project."""
    path = Path(__file__).parents[2] / "shared" / "data" / "vnc.zarr"
    if not path.exists():
        pytest.skip("the real volume is not here")
    return path


def reading_threads() -> list[str]:
    """Return the names of the package's threads, after ending those of earlier tests, held by their tracebacks."""
    if _ours():
        gc.collect()  # which takes its time, and is for those alone
    return _ours()


def _ours() -> list[str]:
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("cellmap"))


@pytest.fixture
def no_threads_left():
    """Fails when a test leaves a thread of this package behind."""
    yield
    assert reading_threads() == []


@pytest.fixture
def quiet_lightning():
    """Leave out Lightning's remarks, see `without_remarks`."""
    with without_remarks():
        yield


@contextmanager
def without_remarks() -> Iterator[None]:
    """Leave out Lightning's remarks on workers, loggers and GPUs, which the tests provoke on purpose."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for text in (
            ".*does not have many workers.*",
            ".*isinstance.treespec.*",
            ".*logging interval.*",
            ".*`Trainer.fit.*",
            ".*You are trying to `self.log.*",
            ".*Checkpoint directory.*exists.*",
            ".*does not pass a `valid` .*",
            ".*requested to overfit.*",
            ".*have overridden `on_.*_batch_transfer`.*",
            ".*`tensorboardX` has been removed.*",
        ):
            warnings.filterwarnings("ignore", text)
        yield


@pytest.fixture
def write(tmp_path):
    """Write an image; returns its path. Levels are ``{name: (array in stored order, scale, translation)}``."""

    def write(
        levels, *, version="0.4", axes="zyx", unit="nanometer", common=None, attributes=None, name="image", **array
    ):
        path = tmp_path / name
        v3 = version == "0.5"
        group = zarr.open_group(path, mode="w", zarr_format=3 if v3 else 2)
        datasets = []
        for level, (data, scale, translation) in levels.items():
            steps = [{"type": "scale", "scale": list(scale)}]
            if translation is not None:
                steps.append({"type": "translation", "translation": list(translation)})
            datasets.append({"path": level, "coordinateTransformations": steps})
            if data is None:
                continue  # listed, and not on disk
            values = np.asarray(data)
            more: dict[str, Any] = {"dimension_names": list(axes)} if v3 else {}
            stored = group.create_array(
                level, shape=values.shape, dtype=values.dtype, chunks=array.get("chunks", values.shape), **more
            )
            stored[...] = values
        kinds = {"c": "channel", "t": "time"}
        described = []
        for a in axes:
            described.append({"name": a, "type": kinds.get(a, "space")})
            if a in "zyx" and unit is not None:
                described[-1]["unit"] = unit
        image = {"version": "0.4", "name": name, "axes": described, "datasets": datasets}
        if common is not None:
            image["coordinateTransformations"] = common
        if v3:
            del image["version"]
            group.attrs.update({"ome": {"version": "0.5", "multiscales": [image]}} | (attributes or {}))
        else:
            group.attrs.update({"multiscales": [image]} | (attributes or {}))
        return path

    return write


@pytest.fixture
def edit():
    """Change the JSON of a metadata file in place: ``edit(file, change)``."""

    def edit(file, change):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return edit
