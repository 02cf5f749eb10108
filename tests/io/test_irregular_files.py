"""FIFOs, sockets, devices and sparse files in place of data: an error that names them, at once."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr

from cellmap_lightning.errors import CellMapError, ChunkError, MetadataError
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.files import IrregularFileError, LargeFileError, open_regular, read_regular
from cellmap_lightning.io.ngff import Level, read_array, read_multiscale
from cellmap_lightning.io.store import MOST_JSON_BYTES, parse_location, read_json

ROOT = Path(__file__).parents[2]
SHAPE, CHUNKS = (16, 16, 16), (8, 8, 8)
VALUES = np.random.default_rng(0).integers(1, 255, SHAPE).astype(np.uint8)
#: Seconds for an error that comes at once, on a machine that is busy.
AT_ONCE = 60.0


def fifo(path):
    os.mkfifo(path)


def bound_socket(path):
    here = Path.cwd()
    os.chdir(path.parent)  # the length of an address is bounded
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def link_to(target):
    return lambda path: path.symlink_to(target)


def link_to_fifo(path):
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


KINDS = {
    "fifo": (fifo, "a FIFO"),
    "link to a fifo": (link_to_fifo, "a FIFO"),
    "socket": (bound_socket, "a socket"),
    "endless device": (link_to("/dev/zero"), "a character device"),
    "empty device": (link_to("/dev/null"), "a character device"),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def within(seconds, call):
    """The error that a call raises, in a thread, so that one that never returns is a failure too."""
    raised = []

    def run():
        try:
            call()
        except Exception as e:
            raised.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits"
    assert raised, "no error"
    return raised[0]


def write(path, zarr_format, **how):
    array = zarr.create_array(path, shape=SHAPE, chunks=CHUNKS, dtype="u1", zarr_format=zarr_format, **how)
    array[...] = VALUES
    return path


def level(path):
    return Level(path, "s0", (4.0, 4.0, 4.0), (0.0, 0.0, 0.0), (0, 1, 2), 3)


ARRAYS = {"v2": (2, {}), "v3": (3, {}), "shard": (3, {"shards": SHAPE})}


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("box", [SHAPE, CHUNKS, (3, 4, 5)])
def test_a_chunk_is_read_from_a_regular_file_alone(tmp_path, kind, array, box):
    make, name = kind
    path = write(tmp_path / "a", ARRAYS[array][0], **ARRAYS[array][1])
    chunk = path / ("0.0.0" if array == "v2" else "c/0/0/0")
    chunk.unlink()
    make(chunk)
    reader = ChunkReader(level(path), "crop1: raw")
    error = within(AT_ONCE, lambda: reader.read((0, 0, 0), box))
    assert isinstance(error, ChunkError)
    expected = f"IrregularFileError: it is {name}; only regular files, and links to them, are read ("
    assert f"crop1: raw: {path}: voxels z[0:" in str(error)
    assert expected in str(error)
    assert f"{chunk.relative_to(path)}, 1 attempt in" in str(error)


@pytest.mark.parametrize("array", ARRAYS)
def test_links_to_regular_files_are_followed(tmp_path, array):
    path = write(tmp_path / "a", ARRAYS[array][0], **ARRAYS[array][1])
    for file in [p for p in path.rglob("*") if p.is_file()]:
        target = tmp_path / f"kept-{str(file.relative_to(path)).replace('/', '-')}"
        file.rename(target)
        file.symlink_to(target)
    assert (ChunkReader(level(path)).read((0, 0, 0), SHAPE) == VALUES).all()
    assert (ChunkReader(level(path)).read((0, 0, 0), CHUNKS) == VALUES[:8, :8, :8]).all()


NODES = {
    "attributes of an image": (2, ".zattrs", read_multiscale),
    "an image of v3": (3, "zarr.json", read_multiscale),
    "an array of v2": (2, "s0/.zarray", lambda path: read_array(path / "s0")),
    "attributes of an array": (2, "s0/.zattrs", lambda path: read_array(path / "s0")),
    "an array of v3": (3, "s0/zarr.json", lambda path: read_array(path / "s0")),
}


@pytest.fixture(params=NODES)
def node(request, tmp_path):
    """An image, one of its metadata files, and how it is read."""
    zarr_format, file, read = NODES[request.param]
    path = tmp_path / "image"
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    array = group.create_array("s0", shape=SHAPE, chunks=CHUNKS, dtype="u1")
    steps = [{"type": "scale", "scale": [4, 4, 4]}]
    axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    image = {"version": "0.4", "axes": axes, "datasets": [{"path": "s0", "coordinateTransformations": steps}]}
    group.attrs.update({"ome": {"multiscales": [image]}} if zarr_format == 3 else {"multiscales": [image]})
    array.attrs["note"] = 1
    read(path)
    return path / file, lambda: read(path)


def test_metadata_is_read_from_a_regular_file_alone(node, kind):
    (file, read), (make, name) = node, kind
    file.unlink()
    make(file)
    error = within(AT_ONCE, read)
    assert isinstance(error, MetadataError)
    assert str(error) == f"{file}: it is {name}; only regular files, and links to them, are read"


@pytest.mark.parametrize("size", [MOST_JSON_BYTES + 1, 1 << 31, 1 << 40])
def test_metadata_is_read_up_to_a_limit(node, size):
    file, read = node
    with file.open("r+b") as opened:
        opened.truncate(size)
    error = within(AT_ONCE, read)
    assert isinstance(error, MetadataError)
    assert str(error) == f"{file}: it has {size} bytes; at most {MOST_JSON_BYTES} are read"


def test_metadata_of_the_limit_is_read(tmp_path):
    text = json.dumps({"a": 1})
    (tmp_path / ".zattrs").write_text(text + " " * (MOST_JSON_BYTES - len(text)))
    assert read_json(tmp_path / ".zattrs") == {"a": 1}


def test_a_fifo_in_place_of_an_archive(tmp_path, kind):
    make, name = kind
    make(tmp_path / "vol.zip")
    error = within(AT_ONCE, lambda: read_json(parse_location(f"zip://a/.zattrs::{tmp_path / 'vol.zip'}")))
    assert isinstance(error, CellMapError)
    assert f"{tmp_path / 'vol.zip'}: it is {name}; only regular files, and links to them, are read" in str(error)


@pytest.mark.parametrize("size", [0, 1, 10_000])
def test_files_are_read_whole(tmp_path, size):
    (tmp_path / "a").write_bytes(os.urandom(size))
    assert read_regular(str(tmp_path / "a"), 10_000) == (tmp_path / "a").read_bytes()
    if size:
        with pytest.raises(LargeFileError, match=rf"it has {size} bytes; at most {size - 1} are read"):
            read_regular(str(tmp_path / "a"), size - 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="files of the kernel, which have no size")
def test_a_file_that_is_longer_than_its_size_is_bounded():
    assert Path("/proc/self/status").stat().st_size == 0
    assert read_regular("/proc/self/status", 1 << 20).startswith(b"Name:")
    with pytest.raises(LargeFileError, match="it has more than 100 bytes; at most 100 are read"):
        read_regular("/proc/self/status", 100)


def test_a_refused_file_is_closed(tmp_path, kind):
    make, _ = kind
    make(tmp_path / "a")
    (tmp_path / "folder").mkdir()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(IrregularFileError):
            open_regular(str(tmp_path / "a"))
        with pytest.raises(IsADirectoryError):
            open_regular(str(tmp_path / "folder"))
        with pytest.raises(FileNotFoundError):
            open_regular(str(tmp_path / "nothing"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# -- TensorStore, in a separate process: it does not work in one forked from a process that used it

PROGRAM = """
import json, sys, threading, time
from pathlib import Path
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import Level

found = {}
def look(path):
    reader = ChunkReader(Level(path, "s0", (4.0,) * 3, (0.0,) * 3, (0, 1, 2), 3), "crop1: raw", "tensorstore")
    for ahead in (False, True):
        try:
            begun = reader.begin((0, 0, 0), (16, 16, 16)) if ahead else None
            found[f"{path.name}, {ahead}"] = begun is not None, str(reader.read((0, 0, 0), (16, 16, 16), begun).sum())
        except Exception as e:
            found[f"{path.name}, {ahead}"] = False, f"{type(e).__name__}: {e}"

def run():
    for path in sorted(Path(sys.argv[1]).iterdir()):
        look(path)

thread = threading.Thread(target=run, daemon=True)
thread.start()
thread.join(60)
print(json.dumps(found), flush=True)
import os
os._exit(0)
"""


def sparse(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


MORE = {
    "folder": (Path.mkdir, "DamagedError: a folder stands where the chunk should be a file"),
    "dead link": (link_to("elsewhere"), "DamagedError: it is a link to elsewhere, which is not there"),
    "sparse": (sparse, "LargeFileError: it has 1099511627776 bytes; at most "),
}
PLACES = {name: (make, f"IrregularFileError: it is {what}; only") for name, (make, what) in KINDS.items()} | MORE


@pytest.fixture(scope="module")
def by_tensorstore(tmp_path_factory):
    pytest.importorskip("tensorstore")
    root = tmp_path_factory.mktemp("ts")
    for array in ARRAYS:
        for name, (make, _) in (PLACES | {"whole": (None, "")}).items():
            path = write(root / f"{array}, {name}", ARRAYS[array][0], **ARRAYS[array][1])
            chunk = path / ("0.0.0" if array == "v2" else "c/0/0/0")
            if make is not None:
                chunk.unlink()
                make(chunk)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, root], check=False, capture_output=True, text=True, timeout=120, cwd=ROOT
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("place", [*PLACES, "whole"])
def test_tensorstore_reads_regular_files_alone(by_tensorstore, array, place, ahead):
    """A read ahead is not begun where it would block one of its threads."""
    key = f"{array}, {place}, {ahead}"
    assert key in by_tensorstore, "it waits"
    begun, text = by_tensorstore[key]
    if place == "whole":
        assert (begun, text) == (ahead, str(VALUES.sum(dtype=int)))
    else:
        assert text.startswith("ChunkError: crop1: raw: ")
        assert f"could not be read: {PLACES[place][1]}" in text
