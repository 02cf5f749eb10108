"""Chains of codecs: what zarr-python or TensorStore reads is read and equal, and a truncated chunk is an error."""

import json
import subprocess
import sys
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr

from cellmap_lightning.errors import ChunkError, MetadataError
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.integrity import Encoded, Shard
from cellmap_lightning.io.ngff import Level, read_array
from cellmap_lightning.io.retrying import RetryPolicy

# zarr-python's own remarks on chains that are valid.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Combining a `sharding_indexed`"),
    pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in"),
]

ONCE = RetryPolicy(1, 10.0)
SHAPE = (20, 30, 40)
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
BIG = {"name": "bytes", "configuration": {"endian": "big"}}
ZSTD = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
GZIP = {"name": "gzip", "configuration": {"level": 1}}
CRC = {"name": "crc32c"}
BLOSC = {
    "name": "blosc",
    "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "shuffle", "typesize": 2, "blocksize": 0},
}


def transpose(*order):
    return {"name": "transpose", "configuration": {"order": list(order)}}


def shard(chunk, codecs, index=(BYTES, CRC), location="end"):
    settings = {"chunk_shape": chunk, "codecs": codecs, "index_codecs": list(index), "index_location": location}
    return {"name": "sharding_indexed", "configuration": settings}


def values(dtype="uint16"):
    return (np.random.default_rng(0).integers(0, 40, SHAPE) + np.arange(SHAPE[2])).astype(dtype)


def level(path):
    return Level(Path(path), "s0", (4.0, 4.0, 4.0), (0.0, 0.0, 0.0), (0, 1, 2), 3)


def write(path, codecs, chunk=(8, 16, 16), dtype="uint16", by="zarr"):
    meta = {
        "zarr_format": 3, "node_type": "array", "shape": list(SHAPE), "data_type": dtype, "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}, "codecs": codecs,
        "attributes": {},
    }  # fmt: skip
    path.mkdir()
    (path / "zarr.json").write_text(json.dumps(meta))
    if by == "zarr":
        zarr.open_array(path, mode="r+", zarr_format=3)[...] = values(dtype)
    else:
        # In a separate process: TensorStore does not work in a process forked from one that used it.
        np.save(path.parent / "values.npy", values(dtype))
        code = (
            "import sys, numpy, tensorstore as t; p, v = sys.argv[1:]; t.open({'driver': 'zarr3', 'kvstore': {'driver':"
            " 'file', 'path': p}}, open=True).result().write(numpy.load(v)).result()"
        )
        subprocess.run(
            [sys.executable, "-c", code, str(path), str(path.parent / "values.npy")], check=True, timeout=120
        )
    return path


def check(path, expected, readers=("zarr", "tensorstore")):
    for name in readers:
        reader = ChunkReader(level(path), "crop1/mito", name, ONCE)
        assert (reader.read((0, 0, 0), SHAPE) == expected).all(), name
        assert (reader.read((3, 5, 7), (9, 11, 13)) == expected[3:12, 5:16, 7:20]).all(), name
        assert reader.read((0, 0, 0), (1, 1, 1))[0, 0, 0] == expected[0, 0, 0]
        assert reader.missing_chunks((0, 0, 0), SHAPE) == []


FLAT = {
    "checksum before zstd": [BYTES, CRC, ZSTD],
    "checksum before blosc": [BYTES, CRC, BLOSC],
    "checksum before gzip": [BYTES, CRC, GZIP],
    "checksum after blosc": [BYTES, BLOSC, CRC],
    "two checksums": [BYTES, CRC, CRC],
    "two checksums around zstd": [BYTES, CRC, ZSTD, CRC],
    "two checksums after zstd": [BYTES, ZSTD, CRC, CRC],
    "checksum between compressors": [BYTES, ZSTD, CRC, GZIP],
    "compressors twice": [BYTES, GZIP, ZSTD],
    "transposed, with a checksum": [transpose(2, 0, 1), BIG, CRC, ZSTD, CRC],
    "checksum alone": [BYTES, CRC],
}


@pytest.mark.parametrize("chain", FLAT)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_chains_without_shards(tmp_path, chain, dtype):
    path = write(tmp_path / "a", FLAT[chain], dtype=dtype)
    check(path, values(dtype))


SHARDS = {
    "big-endian index": ((8, 16, 16), [shard([4, 8, 8], [BYTES, ZSTD], (BIG, CRC))], "zarr tensorstore"),
    "big-endian index without a checksum": ((8, 16, 16), [shard([4, 8, 8], [BYTES], (BIG,))], "zarr tensorstore"),
    "big-endian index at the start": (
        (8, 16, 16), [shard([4, 8, 8], [BYTES, ZSTD], (BIG,), "start")], "zarr tensorstore"
    ),
    "index with two checksums": ((8, 16, 16), [shard([4, 8, 8], [BYTES, ZSTD], (BYTES, CRC, CRC))], "zarr tensorstore"),
    "transposed index": (
        (8, 16, 16), [shard([4, 8, 8], [BYTES, ZSTD], (transpose(3, 1, 0, 2), BYTES, CRC))], "zarr tensorstore"
    ),
    "checksum before zstd inside": ((8, 16, 16), [shard([4, 8, 8], [BYTES, CRC, ZSTD])], "zarr tensorstore"),
    "two checksums inside": ((8, 16, 16), [shard([4, 8, 8], [BYTES, CRC, CRC])], "zarr tensorstore"),
    "gzip outside": ((8, 16, 16), [shard([4, 8, 8], [BYTES, ZSTD]), GZIP], "zarr"),
    "zstd outside": ((8, 16, 16), [shard([4, 8, 8], [BYTES]), ZSTD], "zarr"),
    "checksum outside": ((8, 16, 16), [shard([4, 8, 8], [BYTES, ZSTD], location="start"), CRC], "zarr"),
    "checksum and blosc outside": ((8, 16, 16), [shard([4, 8, 8], [BYTES, ZSTD]), CRC, BLOSC], "zarr"),
    "transposed before": ((8, 16, 32), [transpose(2, 1, 0), shard([8, 8, 4], [BYTES, ZSTD])], "zarr tensorstore"),
    "turned before": ((8, 16, 32), [transpose(1, 2, 0), shard([8, 16, 4], [BYTES])], "zarr tensorstore"),
    "transposed inside": ((8, 16, 16), [shard([4, 8, 8], [transpose(2, 1, 0), BYTES, ZSTD])], "zarr tensorstore"),
    "nested": ((8, 16, 16), [shard([4, 8, 8], [shard([2, 4, 4], [BYTES, CRC, ZSTD])])], "zarr tensorstore"),
    "nested, big-endian, at the start": (
        (8, 16, 16),
        [shard([4, 8, 8], [shard([2, 4, 4], [BYTES], (BIG, CRC), "start")], (BIG, CRC), "start")],
        "zarr tensorstore",
    ),
    "larger than the array": ((32, 32, 64), [shard([4, 8, 8], [BYTES, ZSTD], (BIG, CRC))], "zarr tensorstore"),
}  # fmt: skip


@pytest.mark.parametrize("chain", SHARDS)
def test_chains_with_shards(tmp_path, chain):
    chunk, codecs, readers = SHARDS[chain]
    path = write(tmp_path / "a", codecs, chunk)
    check(path, values(), readers.split())
    if "tensorstore" not in readers:
        with pytest.raises(MetadataError, match=r"no codec may follow sharding_indexed.*; reader=zarr reads it"):
            ChunkReader(level(path), reader="tensorstore")


@pytest.mark.parametrize("codecs", [[BYTES], [BYTES, ZSTD], [BYTES, CRC, ZSTD]])
def test_a_chain_that_only_tensorstore_reads_is_an_error_that_names_it(tmp_path, codecs):
    """zarr-python compares the shard with its chunks as if nothing had been transposed."""
    path = write(tmp_path / "a", [transpose(2, 1, 0), shard([16, 8, 3], codecs)], (6, 16, 32), by="tensorstore")
    with pytest.raises(MetadataError) as caught:
        ChunkReader(level(path), "crop1: raw")
    assert str(path / "zarr.json") in str(caught.value)
    assert "its codecs (transpose, sharding_indexed [" in str(caught.value)
    assert str(caught.value).endswith("; reader=tensorstore reads it")
    assert read_array(path).chunks == (3, 8, 16)
    check(path, values(), ["tensorstore"])


@pytest.mark.parametrize(
    ("chunk", "codecs", "chunks"),
    [
        ((8, 16, 32), [transpose(2, 1, 0), shard([8, 8, 4], [BYTES])], (4, 8, 8)),
        ((8, 16, 32), [transpose(1, 2, 0), shard([16, 8, 2], [BYTES])], (2, 16, 8)),
        ((8, 16, 32), [transpose(1, 2, 0), transpose(2, 1, 0), shard([2, 8, 16], [BYTES])], (2, 16, 8)),
        ((8, 16, 32), [shard([2, 4, 8], [transpose(2, 1, 0), BYTES])], (2, 4, 8)),
        ((8, 16, 32), [shard([2, 4, 8], [BYTES]), CRC], (8, 16, 32)),  # decoded whole
        ((8, 16, 32), [transpose(2, 1, 0), BYTES], (8, 16, 32)),
    ],
)
def test_chunks_are_along_the_axes_of_the_array(tmp_path, chunk, codecs, chunks):
    path = tmp_path / "a"
    path.mkdir()
    meta = {
        "zarr_format": 3, "node_type": "array", "shape": list(SHAPE), "data_type": "uint16", "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default"}, "codecs": codecs,
    }  # fmt: skip
    (path / "zarr.json").write_text(json.dumps(meta))
    info = read_array(path)
    assert (info.chunks, info.files) == (chunks, chunk)


@pytest.mark.parametrize(
    ("codecs", "expected"),
    [
        ([BYTES], Encoded("", 2 * 2048)),
        ([BYTES, CRC, CRC], Encoded("", 2 * 2048 + 8)),
        ([BYTES, CRC, ZSTD, CRC], Encoded("zstd", 2 * 2048 + 4, tail=4)),
        ([BYTES, ZSTD, CRC, GZIP], Encoded("gzip", 2 * 2048 + 4, exact=False)),
        ([BYTES, ZSTD, {"name": "numcodecs.crc32"}], Encoded("zstd", 2 * 2048, head=4)),
        ([BYTES, ZSTD, {"name": "numcodecs.shuffle"}], Encoded("zstd", 2 * 2048, opaque=True)),
        ([{"name": "numcodecs.packbits"}, BYTES], Encoded("", 1 + 2048 // 4)),
        (
            [{"name": "numcodecs.astype", "configuration": {"encode_dtype": "u1", "decode_dtype": "u2"}}, BYTES, BLOSC],
            Encoded("blosc", 2048),
        ),
        (
            [shard([4, 8, 8], [BYTES, CRC], (BIG,)), CRC],
            Encoded("", 2 * 2048 + 16 * 8 + 4, False, 4, shard=Shard((2, 2, 2), Encoded("", 516), True, 0, ">u8")),
        ),
    ],
)
def test_stored_sizes(tmp_path, codecs, expected):
    (tmp_path / "zarr.json").write_text(
        json.dumps(
            {
                "zarr_format": 3, "node_type": "array", "shape": list(SHAPE), "data_type": "uint16", "codecs": codecs,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [8, 16, 16]}},
            }
        )
    )  # fmt: skip
    assert read_array(tmp_path).encoded == expected


N = numcodecs
FILTERS = {
    "checksum and zstd": (N.Zstd(1), [N.CRC32()], "u2"),
    "checksum alone": (None, [N.Fletcher32()], "u2"),
    "delta": (None, [N.Delta("<u2")], "u2"),
    "narrower": (N.Blosc(), [N.FixedScaleOffset(0, 1, "<u2", "u1")], "u2"),
    "astype": (None, [N.AsType("u1", "<u2")], "u2"),
    "shuffle and adler32": (N.LZ4(), [N.Shuffle(2), N.Adler32()], "u2"),
    "bits": (N.Zstd(1), [N.PackBits()], "?"),
}


@pytest.mark.parametrize("chain", FILTERS)
def test_filters_of_v2(tmp_path, chain):
    compressor, filters, dtype = FILTERS[chain]
    array = zarr.create_array(
        tmp_path / "a", shape=SHAPE, chunks=(8, 16, 16), dtype=dtype, zarr_format=2, compressors=compressor,
        filters=filters, fill_value=0,
    )  # fmt: skip
    data = values("uint16") % 2 if dtype == "?" else values("uint16")
    array[...] = data.astype(dtype)
    check(tmp_path / "a", data, ["zarr"])
    file = tmp_path / "a" / "0.0.0"
    for cut in (lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b[:3]):
        whole = file.read_bytes()
        file.write_bytes(cut(whole))
        with pytest.raises(ChunkError):
            ChunkReader(level(tmp_path / "a"), retry_policy=ONCE).read((0, 0, 0), (8, 16, 16))
        file.write_bytes(whole)


@pytest.mark.parametrize("cut", [lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b[:7]])
@pytest.mark.parametrize("chain", [*FLAT, *SHARDS])
def test_a_truncated_chunk_is_an_error_with_any_chain(tmp_path, chain, cut):
    chunk, codecs, _ = SHARDS[chain] if chain in SHARDS else ((8, 16, 16), FLAT[chain], "")
    path = write(tmp_path / "a", codecs, chunk)
    file = path / "c/0/0/0"
    file.write_bytes(cut(file.read_bytes()))
    reader = ChunkReader(level(path), "crop1: raw", retry_policy=ONCE)
    with pytest.raises(ChunkError, match=r"crop1: raw: .* could not be read: \w+: .+"):
        reader.read((0, 0, 0), tuple(min(a, b) for a, b in zip(chunk, SHAPE, strict=True)))


@pytest.mark.parametrize("codecs", [[BYTES], [BYTES, CRC], [BYTES, ZSTD], [BYTES, CRC, BLOSC]])
@pytest.mark.parametrize("index", [(BYTES,), (BIG,), (transpose(3, 1, 0, 2), BIG)])
def test_a_chunk_that_is_cut_short_inside_of_a_shard_is_an_error(tmp_path, codecs, index):
    """The index, which has no checksum here, gives it fewer bytes than it has."""
    path = write(tmp_path / "a", [shard([4, 8, 8], codecs, index)])
    file = path / "c/0/0/0"
    numbers = read_array(path).encoded.shard.index_type
    whole = bytearray(file.read_bytes())
    entries = np.frombuffer(whole[-128:], numbers).copy()
    shape = (2, 2, 2, 2)
    order = index[0]["configuration"]["order"] if len(index) > 1 else [0, 1, 2, 3]
    view = entries.reshape([shape[a] for a in order]).transpose(np.argsort(order))  # a view of the numbers
    view[0, 0, 0, 1] -= 1
    file.write_bytes(bytes(whole[:-128]) + entries.tobytes())
    for box in ((8, 16, 16), (4, 8, 8)):
        with pytest.raises(ChunkError, match=r"could not be read: (DamagedError|SizeError|ValueError|RuntimeError)"):
            ChunkReader(level(path), retry_policy=ONCE).read((0, 0, 0), box)
    assert (ChunkReader(level(path), retry_policy=ONCE).read((4, 8, 8), (4, 8, 8)) == values()[4:8, 8:16, 8:16]).all()


@pytest.mark.parametrize(
    ("codecs", "message"),
    [
        ([shard([4, 8], [BYTES])], "chunk_shape of a shard should be 3 positive whole numbers"),
        ([shard([4, 8, 0], [BYTES])], "chunk_shape of a shard should be 3 positive whole numbers"),
        ([shard([4, 8, 8], "bytes")], "codecs should be a list, got 'bytes'"),
        ([shard([4, 8, 8], [{"name": "numcodecs.pickle"}])], "the codec 'numcodecs.pickle' cannot be read"),
        ([shard([4, 8, 8], [BYTES], location="middle")], "index_location of a shard should be 'start' or 'end'"),
        ([{"name": "zstd", "configuration": [1]}], "the configuration of the codec 'zstd' should be an object"),
        ([shard([1] * 3, [shard([1] * 3, [shard([1] * 3, [shard([1] * 3, [shard([1] * 3, [BYTES])])])])])], "inside"),
    ],
)
def test_malformed_chains_are_refused_with_the_file(tmp_path, codecs, message):
    meta = {
        "zarr_format": 3, "node_type": "array", "shape": list(SHAPE), "data_type": "uint16", "codecs": codecs,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [8, 16, 16]}},
    }  # fmt: skip
    (tmp_path / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(MetadataError, match=r"zarr\.json: ") as caught:
        read_array(tmp_path)
    assert message in str(caught.value)
