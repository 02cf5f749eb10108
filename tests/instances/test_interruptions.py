"""Connected components out of core: any blocks, halos, processes and deaths give the objects of one piece."""

import contextlib
import os
import signal
import sys

import cc3d
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellmap_lightning.instances.options import SegmentationOptions, StorageOptions
from cellmap_lightning.instances.source import open_source
from cellmap_lightning.instances.volume import VolumeSegmentation
from cellmap_lightning.runtime.scheduling import open_scheduler
from tests.instances.test_volume import files_of, tracks
from tests.instances.volumes import same_partition, write_prediction

SHAPE = (20, 28, 36)
DIED = 77

CASES = {
    "seed": st.integers(0, 10**6),
    "block": st.tuples(*[st.sampled_from([8, 16, 24, 40])] * 3),
    "halo": st.sampled_from([None, 0.0, 3.0, 40.0, 1000.0]),
    "connectivity": st.sampled_from([6, 18, 26]),
    "fill": st.booleans(),
    # Where the runs end, as fractions of the changes of files that a whole run makes.
    "deaths": st.lists(st.floats(0, 0.999), min_size=1, max_size=3),
}


def segment(source, out, options, storage, processes=1):
    with open_scheduler(processes=processes) as opened:
        return VolumeSegmentation(source, out, options, storage).run(opened, lambda text: None)


def dying(changes, *arguments):
    """Segment in a process that ends before its n-th change of a file in the output; return its changes, if it lives.

    It ends as by SIGKILL: nothing is closed, removed or flushed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code, count, out = 1, 0, os.fspath(arguments[1])

        def count_change(event, values):
            nonlocal count
            if event == "open":
                changing = bool(values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            else:
                changing = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
            if changing and str(values[0]).startswith(out):
                if count == changes:
                    os._exit(DIED)
                count += 1

        try:
            os.setsid()
            sys.addaudithook(count_change)
            segment(*arguments)
            os.write(writer, str(count).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    counted = os.read(reader, 32)
    os.close(reader)
    with contextlib.suppress(ProcessLookupError):  # processes that it has started
        os.killpg(child, signal.SIGKILL)
    assert status in (0, DIED)
    return int(counted) if counted else None


def check(folder, seed, block, halo, connectivity, fill, deaths, processes=1):
    """Compare a segmentation that dies and resumes with one that does not, and with the whole volume in memory."""
    mask = tracks(seed, SHAPE)
    path = write_prediction(folder / "p.zarr", mask.astype(np.uint8), kind="mask", chunks=(8, 8, 8))
    source, storage = open_source(str(path), "mito"), StorageOptions(chunks=(8, 8, 8), block=block)
    whole, out = folder / "whole.zarr", folder / "o.zarr"
    changes = dying(-1, source, whole, SegmentationOptions("components", connectivity=connectivity, fill_holes=fill),
                    storage)  # fmt: skip
    assert changes > 20
    options = SegmentationOptions("components", connectivity=connectivity, fill_holes=fill, halo=halo)
    for death in deaths:
        dying(int(death * changes), source, out, options, storage, processes)
    summary = segment(source, out, options, storage, processes)
    assert files_of(out) == files_of(whole)
    assert summary.table.read_bytes() == (folder / "whole-objects.csv").read_bytes()
    labels = zarr.open_array(str(summary.labels / "s0"), mode="r")[...]
    if not fill:
        assert same_partition(labels, cc3d.connected_components(mask, connectivity=connectivity))


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(**CASES)
def test_any_blocks_halos_and_deaths(tmp_path_factory, **case):
    check(tmp_path_factory.mktemp("deaths"), **case)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(**CASES)
def test_many_blocks_halos_and_deaths(tmp_path_factory, **case):
    check(tmp_path_factory.mktemp("deaths"), **case)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(processes=st.integers(2, 3), **CASES)
def test_any_number_of_processes(tmp_path_factory, processes, **case):
    check(tmp_path_factory.mktemp("deaths"), processes=processes, **case)
