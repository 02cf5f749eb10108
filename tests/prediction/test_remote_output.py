"""Predictions in a store of objects: the bytes of a local one, resumed after a kill, and owned by one job."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import zarr

from cellmap_lightning.compat.array_writer import ImageWriter
from cellmap_lightning.errors import CellMapFileExistsError, CellMapValueError, OutputError
from cellmap_lightning.io import retrying
from cellmap_lightning.io.object_folder import ObjectFolder, output_path
from cellmap_lightning.io.store import Remote
from cellmap_lightning.prediction import output_lock
from cellmap_lightning.prediction.journal import Journal
from cellmap_lightning.prediction.object_lock import ObjectLock
from cellmap_lightning.prediction.output_checks import check_apart
from cellmap_lightning.prediction.output_lock import FILE, read_owner
from tests import processes
from tests.io.object_server import storing
from tests.prediction.predictions import predict, raw_volume
from tests.prediction.test_output import finish, new, settings, write

pytest.importorskip("s3fs")
pytestmark = pytest.mark.usefixtures("no_threads_left", "quiet_lightning")

OUT = "data/runs/mito.zarr"
kinds = pytest.mark.parametrize(
    ("kind", "dtype", "classes"),
    [("v2", "uint8", ("mito",)), ("v3", "labels", ("mito", "er")), ("sharded", "float16", ("mito",))],
)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(output_lock, "HEARTBEAT", 0.05)
    monkeypatch.setattr(output_lock, "DEAD", 0.5)
    monkeypatch.setattr(retrying, "FIRST_PAUSE", 0.001)


@pytest.fixture
def store():
    with storing() as (options, bucket):
        yield options, bucket


def folder(options, path=OUT):
    return output_path(f"s3://{path}", options)


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@kinds
def test_objects_are_the_files_of_a_local_output(store, tmp_path, kind, dtype, classes):
    options, bucket = store
    local, remote = new(tmp_path / "mito.zarr", kind, dtype, classes), new(folder(options), kind, dtype, classes)
    write(local)
    stored = write(remote)
    assert set(Journal(remote.path).finished) == set(range(len(remote.grid)))
    assert finish(local)
    assert finish(remote)
    assert bucket.under(OUT) == files(local.path)
    array = zarr.open_array(folder(options).__truediv__("mito/s0").store(), mode="r")
    np.testing.assert_array_equal(array[...], stored[0])
    again = new(folder(options), kind, dtype, classes)
    again.open(settings(classes=list(classes)))
    assert again.journal.complete
    again.close()


@pytest.mark.parametrize("kind", ["v2", "v3", "sharded"])
def test_a_prediction_is_the_local_one_and_is_resumed(store, tmp_path, kind):
    options, bucket = store
    path, _ = raw_volume(tmp_path, (20, 30, 40))
    given = {"zarr_format": 2 if kind == "v2" else 3} | ({"shards": [16, 16, 32]} if kind == "sharded" else {})
    predict(path, (8, 8, 16), tmp_path / "local.zarr", **given)
    address = f"s3://{OUT}"
    first = predict(path, (8, 8, 16), address, limit=12, storage_options=options, **given)
    assert not first.summary.complete
    assert any(key.startswith(".cellmap-prediction/blocks-0") for key in bucket.under(OUT))
    last = predict(path, (8, 8, 16), address, storage_options=options, **given)
    assert last.summary.complete
    assert 0 < last.summary.written < last.summary.blocks
    local = {
        str(p.relative_to(tmp_path / "local.zarr")): p.read_bytes()
        for p in (tmp_path / "local.zarr").rglob("*")
        if p.is_file()
    }
    assert bucket.under(OUT) == local
    with pytest.raises(
        CellMapFileExistsError, match=rf"(?s)s3://{OUT} contains another prediction.*dtype: 'float32' is"
    ):
        predict(path, (8, 8, 16), address, storage_options=options, **given | {"dtype": "uint8"})
    assert bucket.under(OUT) == local


KILLED = """
    import sys, json
    import numpy as np
    from cellmap_lightning.io.object_folder import output_path
    from tests.prediction.test_output import new, settings
    output = new(output_path(sys.argv[1], json.loads(sys.argv[2])), sys.argv[3])
    output.open(settings())
    rng = np.random.default_rng(0)
    for number in range(len(output.grid)):
        shape = output.grid[number][1]
        output.write(number, np.full((1, *shape), number + 1, np.uint8), [1])
        print(number, flush=True)
"""


@pytest.mark.parametrize("kind", ["v2", pytest.param("v3", marks=pytest.mark.slow), "sharded"])
def test_a_kill_leaves_what_is_resumed_to_the_same_bytes(store, tmp_path, kind):
    options, bucket = store
    cut = threading.Event()

    def silent(method, path, number):  # from the second chunk of the third block on
        chunks = [path for method, path in bucket.requests if method == "PUT" and re.search(r"mito/s0/(c/)?\d", path)]
        if method == "PUT" and len(chunks) > (6 if kind == "sharded" else 2) and path == chunks[-1]:
            cut.set()
            return -1
        return 0

    bucket.fault = silent
    program = [sys.executable, "-c", textwrap.dedent(KILLED), f"s3://{OUT}", json.dumps(options), kind]
    with processes.started(program, stdout=subprocess.PIPE, text=True) as process:
        assert cut.wait(120)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    bucket.fault = lambda method, path, number: 0
    output = new(folder(options), kind)
    output.open(settings())  # its owner has ended on this machine
    done = set(output.journal.finished)
    assert {0} <= done < set(range(len(output.grid)))
    whole = new(tmp_path / "whole.zarr", kind)
    whole.open(settings())
    for number in range(len(output.grid)):
        block = np.full((1, *output.grid[number][1]), number + 1, np.uint8)
        whole.write(number, block, [1])
        if number not in done:
            output.write(number, block, [1])
    assert finish(output)
    assert finish(whole)
    assert bucket.under(OUT) == files(whole.path)


@pytest.mark.cover(1)
@pytest.mark.parametrize(
    ("method", "part"),
    [("PUT", "mito/s0/0/0/0"), ("PUT", ".cellmap-prediction/blocks-0.txt"), ("GET", FILE), ("PUT", ".zattrs")],
)
@pytest.mark.parametrize("status", [503, 500])
def test_transient_errors_are_retried(store, method, part, status):
    options, bucket = store
    bucket.fault = lambda verb, path, number: status * (verb == method and path == f"{OUT}/{part}" and number <= 2)
    output = new(folder(options))
    write(output)
    assert finish(output)
    assert bucket.requests.count((method, f"{OUT}/{part}")) >= 3
    assert not [key for key in bucket.under(OUT) if key.startswith(".cellmap")]


@pytest.mark.cover(1)
@pytest.mark.parametrize("part", ["mito/s0/0/0/0", FILE, ".cellmap-prediction/settings.json"])
@pytest.mark.parametrize(("status", "reason"), [(403, "permission denied"), (503, r".*ServiceUnavailable.*5 attempts")])
def test_a_refused_write_is_one_sentence(store, part, status, reason):
    options, bucket = store
    bucket.fault = lambda verb, path, number: status * (verb == "PUT" and path == f"{OUT}/{part}")
    output = new(folder(options))
    with pytest.raises(OutputError, match=rf"^s3://{OUT} cannot be [a-z0-9 ]*: {reason}") as error:
        write(output)
    assert "\n" not in str(error.value)
    assert options["secret"] not in str(error.value)
    output.close()
    bucket.fault = lambda verb, path, number: 0
    again = new(folder(options))
    write(again)
    assert finish(again)


def test_a_missing_bucket_is_one_sentence(store):
    options, bucket = store
    bucket.fault = lambda verb, path, number: 403 * (not path.startswith("mine"))
    with pytest.raises(OutputError, match=r"s3://other/a.zarr cannot be begun: permission denied"):
        new(folder(options, "other/a.zarr")).open(settings())


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_objects_are_never_replaced(store, overwrite):
    options, bucket = store
    bucket.objects[f"{OUT}/notes.txt"] = b"mine"
    with pytest.raises(CellMapFileExistsError, match=rf"s3://{OUT} exists and contains no prediction"):
        new(folder(options)).open(settings(), overwrite=overwrite)
    assert bucket.under(OUT) == {"notes.txt": b"mine"}
    bucket.objects.clear()
    bucket.objects[f"{OUT}x/a"] = b"of a neighbour"
    output = new(folder(options))
    write(output)
    assert finish(output)
    other = new(folder(options), levels=1)
    with pytest.raises(CellMapFileExistsError, match="contains another prediction"):
        other.open(settings(model="n"))
    other.open(settings(model="n"), overwrite=True)
    assert not other.journal.finished
    other.close()
    assert bucket.objects[f"{OUT}x/a"] == b"of a neighbour"


def test_an_output_without_a_finished_block_is_discarded(store):
    options, bucket = store
    output = new(folder(options))
    output.open(settings())
    output.discard(alone=True)
    assert bucket.objects == {}


# --------------------------------------------------------------------------------------------------------- the lock


def foreign(bucket, **changed):
    owner = {"token": "a" * 16, "host": "node7", "boot": "another", "pid": 1, "started": 1, "since": "2026-01-01"}
    bucket.objects[f"{OUT}/{FILE}"] = json.dumps(owner | changed).encode()


@pytest.mark.parametrize("conditional", [True, False])
def test_a_second_writer_is_refused(store, conditional):
    options, bucket = store
    bucket.conditional = conditional
    first = new(folder(options))
    first.open(settings())
    with pytest.raises(CellMapFileExistsError, match=rf"another job writes there \(process {os.getpid()} on"):
        new(folder(options)).open(settings())
    first.close()
    assert f"{OUT}/{FILE}" not in bucket.objects
    second = new(folder(options))
    second.open(settings())
    second.close()


@pytest.mark.parametrize("names_condition", [True, False])
def test_of_two_that_create_the_lock_at_once_one_is_refused(store, names_condition):
    options, bucket = store
    bucket.names_condition = names_condition
    lock = ObjectLock(folder(options))

    def race(method, path, number):  # another job is faster, between the look and the write
        if method == "PUT" and number == 1:
            foreign(
                bucket,
                boot=output_lock.new_owner()["boot"],
                pid=os.getpid(),
                started=output_lock.new_owner()["started"],
            )
        return 0

    bucket.fault = race
    with pytest.raises(CellMapFileExistsError, match=r"another job writes there \(process"):
        lock.acquire()
    assert read_owner(folder(options))["token"] == "a" * 16


@pytest.mark.parametrize("lives", [True, False])
def test_an_owner_on_another_machine_lives_while_its_number_grows(store, lives):
    options, bucket = store
    foreign(bucket)
    stop = threading.Event()

    def beat():
        number = 0
        while not stop.wait(0.01):
            number += 1
            foreign(bucket, beat=number)

    thread = threading.Thread(target=beat)
    if lives:
        thread.start()
    lock = ObjectLock(folder(options))
    try:
        if lives:
            with pytest.raises(CellMapFileExistsError, match=r"process 1 on node7, since 2026-01-01"):
                lock.acquire()
        else:
            lock.acquire()
            lock.check()
            assert read_owner(folder(options))["token"] == lock.token
            lock.release()
    finally:
        stop.set()
        if lives:
            thread.join()


@pytest.mark.parametrize("change", ["removed", "taken", "damaged"])
def test_a_lost_lock_stops_the_job(store, change, monkeypatch):
    monkeypatch.setattr(output_lock, "HEARTBEAT", 60)  # none between the change and the check
    options, bucket = store
    output = new(folder(options))
    output.open(settings())
    if change == "taken":
        foreign(bucket)
    elif change == "removed":
        del bucket.objects[f"{OUT}/{FILE}"]
    else:
        bucket.objects[f"{OUT}/{FILE}"] = b"{"
    text = "taken over by another job .process 1 on node7" if change == "taken" else "was removed"
    with pytest.raises(OutputError, match=text):
        output.write(0, np.ones((1, *output.grid[0][1]), np.uint8), [1])
    output.close()
    if change == "taken":  # what is another's stays
        assert read_owner(folder(options))["token"] == "a" * 16


def test_the_heartbeat_continues(store):
    options, bucket = store
    lock = ObjectLock(folder(options))
    lock.acquire()
    done = threading.Event()
    bucket.fault = lambda verb, path, number: (done.set() if verb == "PUT" and number > 3 else None) or 0
    assert done.wait(60)
    lock.check()
    lock.release()


# -------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("address", ["https://host/a.zarr", "zip://a.zarr::/data/a.zip", "az://container/a.zarr"])
def test_addresses_that_cannot_be_written_are_refused(address):
    with pytest.raises(CellMapValueError, match=re.escape(address.partition("::")[0])):
        output_path(address)


def test_a_folder_in_memory_is_an_output(tmp_path):
    place = output_path("memory://runs/mito.zarr")
    assert isinstance(place, ObjectFolder)
    output, local = new(place), new(tmp_path / "mito.zarr")
    write(output)
    write(local)
    assert finish(output)
    assert finish(local)
    assert sorted(files(tmp_path / "mito.zarr")) == sorted(
        key.removeprefix(f"{place.key}/") for key in place.filesystem().find(place.key)
    )
    place.remove_tree()
    assert not place.exists()


@pytest.mark.parametrize("inside", ["", "/deeper", ".."])
def test_raw_is_never_written_to(store, inside):
    raw = Remote("s3://data/runs")
    place = "s3://data" if inside == ".." else f"s3://data/runs{inside}"
    with pytest.raises(CellMapValueError, match="must not be inside of each other"):
        check_apart(output_path(place), raw)
    check_apart(output_path("s3://data/runs2"), raw)


def test_writers_of_patches_need_a_folder():
    with pytest.raises(CellMapValueError, match="only a path of this machine"):
        ImageWriter("s3://data/a.zarr/mito", "mito", [8, 8, 8], {a: [0, 80] for a in "zyx"}, [4, 4, 4])
