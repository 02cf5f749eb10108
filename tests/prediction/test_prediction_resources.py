"""Predictions under kills, their memory, caches and decoding ahead."""

import os
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest

from cellmap_lightning.callbacks import make_prediction_writer
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from cellmap_lightning.prediction.journal import Journal
from tests import processes
from tests.prediction.predictions import SCALE, TRANSLATION, Identity, contents, module, predict, raw_volume, read

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")


PROGRAM = """
import sys, time
import torch
import tests.prediction.predictions as t
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
def test_killed_and_resumed_prediction_has_the_same_bytes(tmp_path, blend, world):
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
import tests.prediction.predictions as t
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
        text=True, check=False, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
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
def test_chunks_are_decoded_ahead(tmp_path, cache):
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 64 * 14)).astype(np.uint8)
    path = tmp_path / "raw.zarr" / "em"  # 14 chunks in a row, and a patch in each
    write_multiscale(path, values, scale=SCALE, translation=TRANSLATION, storage=ArrayOptions(chunks=(64, 64, 64)))
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

    writer = make_prediction_writer(str(tmp_path / "out.zarr"), overlap=0.0)
    run = L.Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[writer], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with module(path, (64, 64, 64), batch_size=1, cache=cache) as data:
        run.predict(Slow(), datamodule=data)
    assert found[0] >= 9  # without anything ahead: 2, the batch and the one that the Trainer fetches before it
    np.testing.assert_array_equal(read(tmp_path / "out.zarr"), values)


def test_damaged_chunk_is_named_and_earlier_blocks_remain(tmp_path):
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
