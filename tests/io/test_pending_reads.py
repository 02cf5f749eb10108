"""Reads and writes that an error or Ctrl-C has left running end with the program, without a message of asyncio's."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from tests import processes
from tests.io.faults import running
from tests.io.object_server import storing

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent as a signal")

#: Parts of what asyncio and aiohttp report about tasks and connections that nothing has ended.
REPORTS = (
    "left pending",
    "Task was destroyed",
    "never retrieved",
    "never awaited",
    "Unclosed",
    "loop is closed",
    "Exception ignored",
)
#: 64 chunks are read at once; a request is repeated after seconds.
HEAD = """
import asyncio, atexit, gc, itertools, sys, threading, warnings

@atexit.register  # handlers run in the reverse order: this one after that of zarr-python
def report():
    gc.collect()
    tasks = [one for one in gc.get_objects() if issubclass(type(one), asyncio.Task) and not one.done()]
    print("left pending:" if tasks else "all done", *tasks)

warnings.simplefilter("ignore")
from cellmap_lightning.io import retrying
retrying.FIRST_PAUSE = 3.0
url = sys.argv[1]

def until_requests_are_repeated():
    while not retrying.COUNTS.retries:
        threading.Event().wait(0.01)
"""
READER = """
retrying.FIRST_PAUSE = retrying.LONGEST_PAUSE = 20.0  # outlasts the program
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.store import parse_location
reader = ChunkReader(read_multiscale(parse_location(url)).finest)
"""
LOADER = """
from cellmap_lightning import CellMapDataLoader, CellMapDataModule, CellMapError
spec = {"raw": {"shape": [24, 24, 24], "scale": [8, 8, 8]}}
data = CellMapDataModule(None, spec, datasets={"train": [{"raw": url}]}, batch_size=1, batches_per_epoch=50)
"""
PROGRAMS = {
    "an error in the middle of a read": READER + "reader.read((0, 0, 0), (64, 64, 64))",
    "an error that is caught": READER
    + """
try:
    reader.read((0, 0, 0), (64, 64, 64))
except Exception as error:
    print(type(error).__name__)
del reader
""",
    "Ctrl-C in the middle of a read": READER
    + """
try:
    reader.read((0, 0, 0), (64, 64, 64))
except KeyboardInterrupt:
    print("interrupted")
sys.exit(130)
""",
    "a loader that is left unfinished": LOADER
    + """
data.setup("fit")
batches = iter(data.train_dataloader())
try:
    for number in itertools.count():
        next(batches)
except CellMapError as error:
    print(type(error).__name__)
""",
    "an exception in training_step with readers ahead": LOADER
    + """
import lightning as L
import torch
from cellmap_lightning.callbacks import StreamPrefetch

class Failing(L.LightningModule):
    def training_step(self, batch, batch_idx):
        until_requests_are_repeated()
        raise RuntimeError("a step that fails")

    def configure_optimizers(self):
        return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)

callbacks = [StreamPrefetch(enabled=True, depth=3)]
L.Trainer(
    accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=callbacks,
).fit(Failing(), data)
""",
}
#: Exit status, and the end of stdout or the last error.
ENDS = {
    "an error in the middle of a read": (1, "ChunkError"),
    "an error that is caught": (0, "ChunkError"),
    "Ctrl-C in the middle of a read": (130, "interrupted"),
    "a loader that is left unfinished": (0, "ChunkError"),
    "an exception in training_step with readers ahead": (1, "RuntimeError: a step that fails"),
}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image") / "raw.zarr"
    values = np.random.default_rng(0).integers(0, 255, (64, 64, 512)).astype(np.uint8)
    write_multiscale(folder, values, scale=(8, 8, 8), translation=(0, 0, 0), storage=ArrayOptions(chunks=(16, 16, 16)))
    return folder


@contextmanager
def failing(folder, after, refused):
    """Serve a folder whose chunks, after some, are busy (to be requested again) or refused for good.

    Yields the address, and an event that is set when a client has been told to come back.
    """
    asked, busy = [0], threading.Event()

    async def answer(request):
        file = folder / request.path.lstrip("/")
        if file.name.isdigit():
            asked[0] += 1
            if asked[0] > after:
                busy.set()
                # One of the first ten, which zarr-python reads at a time.
                return web.Response(status=400 if refused and asked[0] == after + 5 else 503)
        return web.FileResponse(file) if file.is_file() else web.Response(status=404)

    with running(answer) as address:
        yield address, busy


def ended(program, *arguments, interrupt=None):
    """Run a program, interrupted once an event is set; return its exit status, stdout and stderr."""
    command = [sys.executable, "-c", HEAD + program, *arguments]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    if interrupt is None:
        done = processes.run(command, 300, env=env)
        return done.returncode, done.stdout, done.stderr
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with processes.started(command, env=env, **pipes) as process:
        assert interrupt.wait(300)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if "loader" in kind else []) for kind in PROGRAMS]
)
def test_a_program_that_ends_early_reports_no_tasks(image, kind):
    ctrl_c = "Ctrl-C" in kind
    training = "training_step" in kind
    with failing(image, 150 if training else 5, refused=not ctrl_c and not training) as (address, busy):
        code, out, errors = ended(PROGRAMS[kind], address, interrupt=busy if ctrl_c else None)
    status, end = ENDS[kind]
    assert (code, end in out + errors) == (status, True), errors
    assert busy.is_set()
    assert "all done" in out
    assert not [line for line in (out + errors).splitlines() if any(part in line for part in REPORTS)]


PREDICTION = """
import json
from pathlib import Path
from tests.prediction.predictions import predict
predict(Path(url), (12, 16, 20), "s3://data/out.zarr", storage_options=json.loads(sys.argv[2]), zarr_format=3)
"""


@pytest.mark.parametrize("fault", ["refused", pytest.param("Ctrl-C", marks=pytest.mark.slow)])
def test_a_prediction_that_fails_on_s3_reports_no_tasks(image, fault):
    pytest.importorskip("s3fs")
    busy = threading.Event()
    with storing() as (options, bucket):

        def answer(method, path, number):
            if method != "PUT" or "/s0/c/" not in path:
                return 0
            written = len({p for m, p in bucket.requests if m == "PUT" and "/s0/c/" in p})
            if fault == "refused" and written > 6:
                return 403
            busy.set()
            return 503

        bucket.fault = answer
        code, out, errors = ended(
            PREDICTION, str(image), json.dumps(options), interrupt=busy if fault == "Ctrl-C" else None
        )
    assert code != 0, out
    assert busy.is_set()
    assert not [line for line in (out + errors).splitlines() if any(part in line for part in REPORTS)]
