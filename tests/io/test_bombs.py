"""Chunks that decode to much more than their array says take no more memory than others."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import fsspec
import numcodecs
import numpy as np
import pytest
import zarr

from cellmap_lightning.errors import ChunkError, MetadataError
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.integrity import DamagedError, SizeError
from cellmap_lightning.io.ngff import Level, read_array
from cellmap_lightning.io.retrying import RetryPolicy
from cellmap_lightning.io.store import MOST_JSON_BYTES, metadata_cache, parse_location, read_all, read_json
from cellmap_lightning.io.streams import LZMA_MEMORY, decode_stream
from tests.io import bombs

ROOT = Path(__file__).parents[2]
ARCHIVES = ["honest.zip", "lying.zip"]
BOXES = ["whole", "part"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the results of reading all bombs, in a separate process."""
    root = tmp_path_factory.mktemp("bombs")
    for name, (metadata, stored) in bombs.BOMBS.items():
        bombs.write(root / name, metadata, stored())
    bombs.write(root / "plain2", bombs.v2(bombs.GZIP), gzip.compress(bombs.PLAIN.tobytes()))
    bombs.write(root / "plain3", bombs.v3("bytes", "gzip"), gzip.compress(bombs.PLAIN.tobytes()))
    raw = json.dumps(bombs.v2(None))
    with zipfile.ZipFile(root / "honest.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/.zarray", raw)
        archive.writestr("a/0.0.0", bytes(bombs.BOMB))
    bombs.lying_zip(root / "lying.zip", {"a/0.0.0": bombs.BOMB})
    with zipfile.ZipFile(root / "lying.zip", "a") as archive:
        archive.writestr("a/.zarray", raw)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tests/io/bombs.py", root],
        check=False, capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

    return json.loads(done.stdout)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("kind", [*bombs.BOMBS, *ARCHIVES])
def test_a_bomb_is_an_error_and_takes_no_memory(results, kind, box):
    error, growth = results[f"{kind}, {box}"]
    assert growth < bombs.MOST_GROWTH, f"{growth >> 20} MiB"
    assert error.startswith("ChunkError: "), error
    assert "could not be read: " in error
    assert "reshape" not in error, "it was decoded first, within a peak of one before it"


@pytest.mark.parametrize("codec", ["gzip", "zlib", "bz2", "lzma"])
def test_a_stream_is_decoded_up_to_a_limit(codec):
    data = np.random.default_rng(0).integers(0, 9, 100_000).astype("u1").tobytes()
    stored = bytes(numcodecs.get_codec({"id": codec}).encode(data))
    assert decode_stream(codec, stored, len(data)) == data
    assert decode_stream(codec, np.frombuffer(stored, "u1"), 1 << 40) == data
    with pytest.raises(SizeError, match="it would decode to more than 99999 bytes, which a chunk has at most"):
        decode_stream(codec, stored, len(data) - 1)
    for cut in (len(stored) - 1, len(stored) // 2, 3):
        with pytest.raises(DamagedError, match=r"it is cut short: its stream does not end in the [0-9]+ bytes"):
            decode_stream(codec, stored[:cut], len(data))
    with pytest.raises(DamagedError, match="it cannot be decoded"):
        decode_stream(codec, b"\x07" * 99, 10)


COMPRESS = {"gzip": gzip.compress, "bz2": bz2.compress, "lzma": lzma.compress, "zlib": zlib.compress}
ENDINGS = {
    "nothing": b"",
    "zeros": bytes(40_000),
    "something else": b"no stream",
    "the same again": None,
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("codec", COMPRESS)
@pytest.mark.parametrize("count", [1, 2, 3000])
def test_bytes_after_a_stream_are_read_as_by_numcodecs(codec, ending, count):
    if count == 3000 and codec == "lzma":
        pytest.skip("slow in the library")
    stored = COMPRESS[codec](b"some bytes") * count
    stored += stored if ENDINGS[ending] is None else ENDINGS[ending]
    try:
        expected = bytes(numcodecs.get_codec({"id": codec}).decode(stored))
    except Exception:
        with pytest.raises(DamagedError):
            decode_stream(codec, stored, 1 << 20)
    else:
        assert decode_stream(codec, stored, 1 << 20) == expected


def test_many_streams_in_a_chunk_take_time_in_proportion(tmp_path):
    """The decoder of each stream copies what follows it, so all that follows is not given to it."""
    stored = gzip.compress(b"") * 100_000
    began = time.process_time()
    assert decode_stream("gzip", stored, 10) == b""
    assert time.process_time() - began < 3


def test_a_header_of_lzma_cannot_ask_for_gigabytes():
    stored = lzma.compress(bytes(100), lzma.FORMAT_ALONE, preset=6)
    huge = stored[:1] + (0xFFFFFFFF).to_bytes(4, "little") + stored[5:]
    assert decode_stream("lzma", lzma.compress(bytes(100), preset=9 | lzma.PRESET_EXTREME), 100) == bytes(100)
    assert decode_stream("lzma", stored, 100) == bytes(100)
    with pytest.raises(DamagedError, match="Memory usage limit exceeded"):
        decode_stream("lzma", huge, 100)
    assert LZMA_MEMORY < 1 << 30


GOOD = {
    "gzip, members and zeros": (bombs.GZIP, lambda d: gzip.compress(d[:999]) + gzip.compress(d[999:]) + bytes(512)),
    "bz2, two streams": (bombs.BZ2, lambda d: bz2.compress(d[:999]) + bz2.compress(d[999:])),
    "lzma, two streams": (bombs.LZMA, lambda d: lzma.compress(d[:999]) + lzma.compress(d[999:])),
    "zlib": (bombs.ZLIB, zlib.compress),
    "zstd, two frames": (bombs.ZSTD, lambda d: bombs.zstd(d[:999]) + bombs.zstd(d[999:])),
    "zstd without a size": (bombs.ZSTD, lambda d: raw_zstd([d])),
    "zstd without a size, small blocks": (
        bombs.ZSTD, lambda d: raw_zstd([d[i : i + 9] for i in range(0, len(d), 9)])
    ),
    "zstd without a size, two frames": (bombs.ZSTD, lambda d: raw_zstd([d[:999]]) + raw_zstd([d[999:]])),
    "zstd without a size, compressed": (bombs.ZSTD, lambda d: bombs.unsized(bombs.zstd(d))),
    "zstd without a size, two compressed frames": (
        bombs.ZSTD, lambda d: bombs.unsized(bombs.zstd(d[:999])) + bombs.unsized(bombs.zstd(d[999:]))
    ),
    "stored": (None, bytes),
    "gzip, not compressed": (bombs.GZIP, lambda d: gzip.compress(d, 0)),
}  # fmt: skip


def raw_zstd(blocks):
    """A Zstandard frame without the number of bytes, of blocks that are not compressed."""
    frame = bytes.fromhex("28b52ffd") + bytes([0x00, 0x50])
    for number, block in enumerate(blocks):
        frame += (len(block) << 3 | (number == len(blocks) - 1)).to_bytes(3, "little") + block
    return frame


def level(path):
    return Level(path, "s0", (4.0, 4.0, 4.0), (0.0, 0.0, 0.0), (0, 1, 2), 3)


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("shape", [bombs.SHAPE, (9, 8, 7)])
def test_other_ways_to_write_a_chunk_stay_readable(tmp_path, kind, shape):
    compressor, encode = GOOD[kind]
    bombs.write(tmp_path / "a", bombs.v2(compressor), encode(bombs.PLAIN.tobytes()))
    found = ChunkReader(level(tmp_path / "a"), retry_policy=RetryPolicy(1, 30.0)).read((0, 0, 0), shape)
    assert (found == bombs.PLAIN[tuple(map(slice, shape))]).all()


CHAINS = {
    "v2 gzip and zstd": (2, [numcodecs.GZip(1)], numcodecs.Zstd(1)),
    "v2 blosc and bz2": (2, [numcodecs.Blosc()], numcodecs.BZ2(1)),
    "v2 lz4, shuffled": (2, [numcodecs.LZ4(), numcodecs.Shuffle(1)], None),
    "v2 three compressors": (2, [numcodecs.Zlib(1), numcodecs.LZMA(preset=0)], numcodecs.GZip(1)),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_chains_of_compressors_stay_readable(tmp_path, chain):
    zarr_format, filters, compressor = CHAINS[chain]
    array = zarr.create_array(
        tmp_path / "a", shape=bombs.SHAPE, chunks=bombs.SHAPE, dtype="u1", zarr_format=zarr_format, filters=filters,
        compressors=compressor,
    )  # fmt: skip
    array[...] = bombs.PLAIN
    assert (ChunkReader(level(tmp_path / "a")).read((0, 0, 0), bombs.SHAPE) == bombs.PLAIN).all()


@pytest.mark.parametrize("size", [1 << 40, 1 << 31])
@pytest.mark.parametrize("kind", ["v2 gzip", "v2 zstd", "v2 raw", "v3 gzip", "shard", "v3 raw", "shuffled"])
@pytest.mark.parametrize("shape", [bombs.SHAPE, (9, 8, 7)])
def test_the_size_of_a_file_is_checked_before_it_is_read(tmp_path, kind, size, shape):
    """A sparse file takes no space on disk."""
    metadata = {
        "v2 gzip": bombs.v2(bombs.GZIP), "v2 zstd": bombs.v2(bombs.ZSTD), "v2 raw": bombs.v2(None),
        "v3 gzip": bombs.v3("bytes", "gzip"), "v3 raw": bombs.v3("bytes"),
        "shard": bombs.v3(bombs.sharded([16] * 3, "bytes", "gzip")),
        "shuffled": bombs.v2(None, [bombs.GZIP, bombs.SHUFFLE]),
    }[kind]  # fmt: skip
    bombs.write(tmp_path / "a", metadata, b"x")
    chunk = tmp_path / "a" / ("0.0.0" if kind.startswith("v2") or kind == "shuffled" else "c/0/0/0")
    with chunk.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(ChunkError, match=rf"LargeFileError: it has {size} bytes; at most [0-9]+ are read .*1 attempt"):
        ChunkReader(level(tmp_path / "a")).read((0, 0, 0), shape)


@pytest.mark.parametrize("codecs", [["bytes", "gzip"], ["bytes", "zstd"], ["bytes", "crc32c", "gzip"]])
def test_the_index_of_a_shard_cannot_be_compressed(tmp_path, codecs):
    metadata = bombs.v3(bombs.sharded([16] * 3, "bytes"))
    metadata["codecs"][0]["configuration"]["index_codecs"] = bombs.v3(*codecs)["codecs"]
    bombs.write(tmp_path / "a", metadata, gzip.compress(bytes(1 << 20)))
    with pytest.raises(MetadataError, match=r"zarr\.json: index_codecs of its shards have '(gzip|zstd)'"):
        ChunkReader(level(tmp_path / "a"))


NUMBER = {"decode_dtype": "|u1", "encode_dtype": "<f8"}
FILTERS = {
    "a type of a million bytes": ([{"id": "astype", **NUMBER, "encode_dtype": "|V1000000"}], None, "is not a number"),
    "a string": ([{"id": "delta", "dtype": "|S4096", "astype": "|S4096"}], None, "is not a number"),
    "many that make more": ([{"id": "astype", **NUMBER}] * 5, None, r"makes [0-9]+ bytes of a chunk; at most [0-9]+"),
    "behind a compressor": ([bombs.GZIP, {"id": "astype", **NUMBER}], bombs.GZIP, "stands after a compressor"),
    "bits behind a compressor": ([bombs.GZIP, {"id": "packbits"}], None, "stands after a compressor"),
    "hundreds": ([{"id": "delta", "dtype": "|u1"}] * 300, None, "it lists 300 codecs; at most 16 are read"),
    "raw lzma": ([], {**bombs.LZMA, "filters": [{"id": 33, "dict_size": 3 << 29}]}, "'lzma' has filters"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILTERS)
def test_filters_cannot_multiply_a_chunk(tmp_path, kind):
    filters, compressor, message = FILTERS[kind]
    bombs.write(tmp_path / "a", bombs.v2(compressor, filters), b"")
    with pytest.raises(MetadataError, match=rf"\.zarray: .*{message}"):
        read_array(tmp_path / "a")


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("lying", [False, True])
@pytest.mark.parametrize("size", [1 << 27, 1 << 25, (1 << 24) + 1])
def test_metadata_in_an_archive_is_bounded(tmp_path, size, lying, several):
    if lying:
        bombs.lying_zip(tmp_path / "a.zip", {"a/.zattrs": size})
    else:
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/.zattrs", bytes(size))
    place = parse_location(f"zip://a/.zattrs::{tmp_path / 'a.zip'}")
    tracemalloc.start()
    try:
        with pytest.raises(MetadataError) as caught, metadata_cache():
            _ = several and read_all([place, place.parent / "zarr.json"]), read_json(place)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 80 << 20
    assert ".zattrs" in str(caught.value)
    assert lying or "it has more than 16777216 bytes; at most 16777216 are read" in str(caught.value)


@pytest.mark.parametrize("kind", ["v2 gzip", "v3 gzip", "v2 raw"])
def test_a_remote_object_that_is_too_large_is_not_decoded(kind):
    metadata = {"v2 gzip": bombs.v2(bombs.GZIP), "v3 gzip": bombs.v3("bytes", "gzip"), "v2 raw": bombs.v2(None)}[kind]
    place = parse_location(f"memory://{kind.replace(' ', '-')}")
    v3 = kind.startswith("v3")
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/{place.name}/{'zarr.json' if v3 else '.zarray'}", json.dumps(metadata).encode())
    memory.pipe(f"/{place.name}/{'c/0/0/0' if v3 else '0.0.0'}", bytes(2_000_000))
    with pytest.raises(ChunkError, match=r"LargeFileError: it has 2000000 bytes; at most 1114112 are read .*1 attempt"):
        ChunkReader(level(place)).read((0, 0, 0), bombs.SHAPE)


@pytest.mark.parametrize("name", [".zattrs", "zarr.json", ".zarray"])
def test_a_remote_metadata_object_that_is_too_large_is_not_parsed(name):
    place = parse_location("memory://large") / name
    fsspec.filesystem("memory").pipe(f"/large/{name}", b"{}" + b" " * MOST_JSON_BYTES)
    with pytest.raises(MetadataError, match=rf"large/{name}: it has more than 16777216 bytes; at most 16777216 are"):
        read_json(place)
