"""Chunks that decode to 64 MiB instead of 32 KiB, and a program that reads them and reports what memory that took."""

import bz2
import contextlib
import functools
import gzip
import json
import lzma
import os
import resource
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np

SHAPE = (32, 32, 32)
CHUNK = 32**3
#: Bytes that a bomb decodes to.
BOMB = 1 << 26
#: Bytes that reading one may take: codecs and zarr-python have their own, and decoders allocate some blocks ahead.
MOST_GROWTH = 32 << 20
PLAIN = (np.arange(CHUNK) % 251).astype(np.uint8).reshape(SHAPE)


def rle_zstd(nbytes, sized=False):
    """A Zstandard frame of blocks that repeat a byte, without the number of bytes in its header."""
    head = bytes.fromhex("28b52ffd") + bytes([0x00, 0x50])
    block = (1 << 17 << 3 | 1 << 1).to_bytes(3, "little") + b"x"
    last = (0 << 3 | 1).to_bytes(3, "little")
    return head + block * (nbytes >> 17) + last


def unsized(frame):
    """The same frame without the number of bytes, and with a window of 1 MiB."""
    head = frame[4]
    width = (head >> 5 & 1, 2, 4, 8)[head >> 6]
    return frame[:4] + bytes([head & 4, 0x50]) + frame[5 + (not head >> 5 & 1) + width :]


@functools.cache
def patterns():
    """A frame of compressed blocks, without the number of bytes."""
    return unsized(zstd(bytes(range(256)) * (BOMB >> 8)))


@functools.cache
def zeros(compress, part=1 << 25):
    """Streams behind each other, each of zeros."""
    return compress(bytes(part)) * (BOMB // part)


def shard(stored, count=8):
    """A shard whose index gives all its chunks the same bytes."""
    return stored + np.array([[0, len(stored)]] * count, "<u8").tobytes()


def v2(compressor, filters=()):
    return {
        "zarr_format": 2, "shape": SHAPE, "chunks": SHAPE, "dtype": "|u1", "compressor": compressor,
        "filters": list(filters) or None, "fill_value": 0, "order": "C",
    }  # fmt: skip


def v3(*codecs, chunk=SHAPE):
    chain = [{"name": c, "configuration": SETTINGS.get(c, {})} if isinstance(c, str) else c for c in codecs]
    return {
        "zarr_format": 3, "node_type": "array", "shape": SHAPE, "data_type": "uint8", "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default"}, "codecs": chain,
    }  # fmt: skip


SETTINGS = {
    "gzip": {"level": 1}, "zstd": {"level": 1}, "numcodecs.zlib": {"level": 1}, "numcodecs.bz2": {"level": 1},
    "numcodecs.shuffle": {"elementsize": 2},
}  # fmt: skip


#: zarr-python 3.4 insists on the byte order, also of the index.
INDEX = [{"name": "bytes", "configuration": {"endian": "little"}}]


def sharded(chunk, *codecs):
    inner = v3(*codecs)["codecs"]
    settings = {"chunk_shape": chunk, "codecs": inner, "index_codecs": INDEX, "index_location": "end"}
    return {"name": "sharding_indexed", "configuration": settings}


GZIP, ZLIB, BZ2, ZSTD = ({"id": i, "level": 1} for i in ("gzip", "zlib", "bz2", "zstd"))
LZMA: dict[str, Any] = {"id": "lzma", "format": 1, "check": -1, "preset": 1, "filters": None}
BLOSC = {"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 0, "blocksize": 0}
LZ4 = {"id": "lz4", "acceleration": 1}
SHUFFLE = {"id": "shuffle", "elementsize": 2}


def gzipped(data):
    return gzip.compress(data, 6)


def blosc_of_zeros():
    return bytes(numcodecs.Blosc("lz4", 1).encode(bytes(BOMB)))


def lz4_of_zeros():
    return bytes(numcodecs.LZ4().encode(bytes(BOMB)))


def zstd(data):
    return bytes(numcodecs.Zstd(1).encode(data))


def shuffled(data):
    return bytes(numcodecs.Shuffle(2).encode(data + bytes(len(data) % 2)))


#: Metadata and stored bytes of each.
BOMBS = {
    "v2 gzip": (v2(GZIP), lambda: gzipped(bytes(BOMB))),
    "v2 gzip, several members": (v2(GZIP), lambda: zeros(gzipped)),
    "v2 zlib": (v2(ZLIB), lambda: zlib.compress(bytes(BOMB))),
    "v2 bz2": (v2(BZ2), lambda: zeros(bz2.compress)),
    "v2 lzma": (v2(LZMA), lambda: zeros(lzma.compress)),
    "v2 zstd without a size": (v2(ZSTD), lambda: rle_zstd(BOMB)),
    "v2 zstd of compressed blocks without a size": (v2(ZSTD), patterns),
    "v2 zstd of compressed blocks around anything": (v2(ZSTD, [GZIP]), patterns),
    "v3 zstd of compressed blocks without a size": (v3("bytes", "zstd"), patterns),
    "v2 zstd without a size, behind one that has it": (v2(ZSTD), lambda: zstd(b"x") + rle_zstd(BOMB)),
    "v2 gzip inside of zstd": (v2(ZSTD, [GZIP]), lambda: zstd(zeros(gzipped))),
    "v2 zstd inside of gzip": (v2(GZIP, [ZSTD]), lambda: gzipped(rle_zstd(BOMB))),
    "v2 zstd inside of zstd": (v2(ZSTD, [ZSTD]), lambda: zstd(rle_zstd(BOMB))),
    "v2 zstd around anything": (v2(ZSTD, [GZIP]), lambda: rle_zstd(BOMB)),
    "v2 blosc inside of gzip": (v2(GZIP, [BLOSC]), lambda: gzipped(blosc_of_zeros())),
    "v2 lz4 inside of gzip": (v2(GZIP, [LZ4]), lambda: gzipped(lz4_of_zeros())),
    "v2 shuffled gzip": (v2(None, [GZIP, SHUFFLE]), lambda: shuffled(zeros(gzipped))),
    "v2 shuffled lz4": (v2(None, [LZ4, {**SHUFFLE, "elementsize": 1}]), lz4_of_zeros),
    "v2 filters and gzip": (v2(GZIP, [{"id": "delta", "dtype": "|u1"}]), lambda: zeros(gzipped)),
    "v3 gzip": (v3("bytes", "gzip"), lambda: zeros(gzipped)),
    "v3 zstd without a size": (v3("bytes", "zstd"), lambda: rle_zstd(BOMB)),
    "v3 zlib": (v3("bytes", "numcodecs.zlib"), lambda: zlib.compress(bytes(BOMB))),
    "v3 bz2": (v3("bytes", "numcodecs.bz2"), lambda: zeros(bz2.compress)),
    "v3 gzip inside of zstd": (v3("bytes", "gzip", "zstd"), lambda: zstd(zeros(gzipped))),
    "v3 gzip around anything": (v3("bytes", "zstd", "gzip"), lambda: zeros(gzipped)),
    "v3 shuffled gzip": (v3("bytes", "gzip", "numcodecs.shuffle"), lambda: shuffled(zeros(gzipped))),
    "shard of gzip": (v3(sharded([16] * 3, "bytes", "gzip")), lambda: shard(zeros(gzipped))),
    "shard of zstd without a size": (v3(sharded([16] * 3, "bytes", "zstd")), lambda: shard(rle_zstd(BOMB))),
    "shard of shuffled gzip": (
        v3(sharded([16] * 3, "bytes", "gzip", "numcodecs.shuffle")), lambda: shard(shuffled(zeros(gzipped)))
    ),
    "shard inside of a shard": (
        v3(sharded([16] * 3, sharded([8] * 3, "bytes", "gzip"))), lambda: shard(shard(zeros(gzipped)))
    ),
    "gzip around a shard": (v3(sharded([16] * 3, "bytes", "zstd"), "gzip"), lambda: zeros(gzipped)),
}  # fmt: skip


def write(path, metadata, stored):
    """Write an array of one chunk."""
    v3 = metadata["zarr_format"] == 3
    chunk = path / ("c/0/0/0" if v3 else "0.0.0")
    chunk.parent.mkdir(parents=True)
    (path / ("zarr.json" if v3 else ".zarray")).write_text(json.dumps(metadata))
    chunk.write_bytes(stored)


def lying_zip(path, names):
    """Write a zip file of members whose directory says that each has 1000 bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, size in names.items():
            archive.writestr(name, bytes(size))
    content = path.read_bytes()
    for size in set(names.values()):
        content = content.replace(size.to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    path.write_bytes(content)


def main(root):
    """Read each of the arrays in a folder, and print what came of it: the error, and the bytes that memory grew by."""
    from cellmap_lightning.io.chunks import ChunkReader
    from cellmap_lightning.io.ngff import Level
    from cellmap_lightning.io.retrying import RetryPolicy
    from cellmap_lightning.io.store import parse_location

    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    def read(place, shape):
        level = Level(place, "s0", (4.0, 4.0, 4.0), (0.0, 0.0, 0.0), (0, 1, 2), 3)
        return ChunkReader(level, retry_policy=RetryPolicy(1, 30.0)).read((0, 0, 0), shape)

    def begin():
        """Forget the highest use of memory so far, where the system can, and return the present one."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return peak()

    def peak():
        with contextlib.suppress(OSError):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    for place in sorted(root.glob("plain*")):  # loads and allocates what any read does
        assert (read(place, SHAPE) == PLAIN).all()
        assert (read(place, (9, 8, 7)) == PLAIN[:9, :8, :7]).all()
    places = {p.name: p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith("plain")}
    places |= {p.name: parse_location(f"zip://a::{p}") for p in sorted(root.glob("*.zip"))}
    results = {}
    for name, place in places.items():
        for what, shape in {"whole": SHAPE, "part": (9, 8, 7)}.items():
            before, error = begin(), ""
            try:
                read(place, shape)
            except Exception as e:
                error = f"{type(e).__name__}: {e}"
            results[f"{name}, {what}"] = error, peak() - before
    print(json.dumps(results))


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(Path(__file__).parents[2]))
    main(Path(sys.argv[1]))
