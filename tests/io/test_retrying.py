"""Faults of stores and servers: what passes is tried again, what does not is an error that says where; never a hang."""

import errno
import os

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import FsspecStore, LocalStore

from cellmap_lightning.errors import CellMapValueError, ChunkError, MetadataError
from cellmap_lightning.io import chunks
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import Level, read_array
from cellmap_lightning.io.retrying import COUNTS, RetryPolicy
from tests.io.faults import FaultyStore, serving, transient

SHAPE, CHUNKS = (16, 16, 16), (8, 8, 8)
VALUES = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)
WHOLE = (0, 0, 0), SHAPE
QUICK = RetryPolicy(4, 2.0)


def write(path, zarr_format=2, **how):
    if zarr_format == 2:
        how = {"compressors": numcodecs.Blosc("zstd", 1), **how}
    array = zarr.create_array(path, shape=SHAPE, chunks=CHUNKS, dtype="uint8", zarr_format=zarr_format, **how)
    array[...] = VALUES
    return path


def level(path):
    return Level(path, "s0", (4.0, 4.0, 4.0), (2.0, 2.0, 2.0), (0, 1, 2), 3)


@pytest.fixture
def stored(tmp_path):
    return write(tmp_path / "a")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("cellmap_lightning.io.retrying.FIRST_PAUSE", 0.02)


@pytest.fixture
def through(monkeypatch):
    """Read through another store than the local one."""

    def through(make):
        monkeypatch.setattr(chunks, "open_store", lambda path, most: make(path))

    return through


# -- a server

PASSES = ["503", "429", "500", "reset", "truncated"]


@pytest.mark.parametrize("fault", PASSES)
def test_transient_errors_are_retried(stored, through, fault, caplog):
    COUNTS.reset()
    times = 2 if fault == "reset" else 1  # aiohttp itself asks again once after a reset
    with serving(stored, fault, times=times, only="1.1.1") as (address, asked):
        through(lambda _: FsspecStore.from_url(address, read_only=True))
        assert (ChunkReader(level(stored), "crop1: raw", retry_policy=QUICK).read(*WHOLE) == VALUES).all()
    assert asked["/1.1.1"] == times + 1
    assert asked["/0.0.0"] == 1
    assert (COUNTS.retries, COUNTS.failures) == (1, 0), "counted"
    assert [r.levelname for r in caplog.records if f"{stored}/1.1.1: " in r.message] == ["WARNING"]
    assert "retrying in" in caplog.text


def test_thousands_of_faults_are_a_few_lines(stored, through, caplog):
    COUNTS.reset()
    through(lambda path: FaultyStore(LocalStore(path), lambda key, n: transient() if n % 2 else None))
    reader = ChunkReader(level(stored), retry_policy=QUICK)
    for _ in range(4):
        assert (reader.read(*WHOLE) == VALUES).all()
    assert COUNTS.retries >= 32
    assert sum("retrying in" in r.message for r in caplog.records) == COUNTS.retries.bit_length()


LASTS = {
    "503": (4, "503"),
    "reset": (4, r"ServerDisconnectedError|ClientOSError"),
    "truncated": (4, "ClientPayloadError|ContentLength"),
    "401": (1, "401.*credentials"),
    "silence": (2, "TimeoutError: no answer, or not all of it, in time; read_timeout"),
    "drip": (2, "TimeoutError: no answer, or not all of it, in time; read_timeout"),
}


@pytest.mark.parametrize("fault", LASTS)
def test_permanent_errors_name_the_chunk(stored, through, fault):
    """Object, crop, class, array, level, box, attempts: after a bounded number of requests."""
    attempts, expected_text = LASTS[fault]
    retry_policy = RetryPolicy(2 if fault in ("silence", "drip") else 4, 1.0 if fault in ("silence", "drip") else 10.0)
    with serving(stored, fault, only="1.0.1") as (address, asked):
        through(lambda _: FsspecStore.from_url(address, read_only=True))
        with pytest.raises(ChunkError, match=expected_text) as caught:
            ChunkReader(level(stored), "crop1/mito", retry_policy=retry_policy).read(*WHOLE)
    text = str(caught.value)
    assert text.startswith(f"crop1/mito: {stored}: voxels z[8:16], y[0:8], x[8:16] could not be read")
    assert f"(1.0.1, {attempts} attempt" in text
    assert "level s0, z [32, 64], y [0, 32], x [32, 64] nm" in text
    assert asked["/1.0.1"] == (8 if fault == "reset" else attempts), "aiohttp itself asks again once after a reset"
    assert isinstance(caught.value, OSError)


def test_missing_chunks_are_reported_by_the_server(stored, through):
    (stored / "0.1.0").unlink()
    with serving(stored) as (address, asked):
        through(lambda _: FsspecStore.from_url(address, read_only=True))
        reader = ChunkReader(level(stored), retry_policy=QUICK)
        assert (reader.read(*WHOLE)[:8, 8:, :8] == 0).all()
    assert asked["/0.1.0"] == 1, "404 is an answer"


def test_a_server_without_byte_ranges_is_distinguished_from_a_damaged_shard(tmp_path, through):
    path = write(tmp_path / "a", 3, shards=(16, 16, 16), compressors=ZstdCodec(level=1))
    with serving(path, "no ranges", times=0) as (address, _):
        through(lambda _: FsspecStore.from_url(address, read_only=True))
        with pytest.raises(ChunkError, match="the server does not support byte ranges, which sharded arrays need"):
            ChunkReader(level(path), retry_policy=QUICK).read((0, 0, 0), (8, 8, 8))


# -- a store


@pytest.mark.parametrize("error", [transient, lambda: OSError(errno.EIO, "Input/output error"), ConnectionResetError])
def test_errors_of_network_file_systems_pass(stored, through, error):
    through(lambda path: FaultyStore(LocalStore(path), lambda key, n: error() if n < 3 else None))
    assert (ChunkReader(level(stored), retry_policy=QUICK).read(*WHOLE) == VALUES).all()


def test_a_refusal_is_an_error_at_once(stored, through):
    denied = PermissionError(errno.EACCES, "Permission denied")
    store = FaultyStore(LocalStore(stored, read_only=True), lambda key, n: denied if key == "0.0.0" else None)
    through(lambda path: store)
    with pytest.raises(ChunkError, match=r"PermissionError.*reading is not allowed.*0\.0\.0, 1 attempt"):
        ChunkReader(level(stored), retry_policy=QUICK).read(*WHOLE)
    assert store.asked["0.0.0"] == 1


def test_a_store_that_stalls_is_asked_again_and_then_given_up(stored, through):
    through(lambda path: FaultyStore(LocalStore(path), lambda key, n: 30.0 if key == "0.0.0" and n == 1 else None))
    assert (ChunkReader(level(stored), retry_policy=RetryPolicy(3, 1.0)).read(*WHOLE) == VALUES).all()
    through(lambda path: FaultyStore(LocalStore(path), lambda key, n: 30.0 if key == "0.0.0" else None))
    with pytest.raises(ChunkError, match=r"no answer.*0\.0\.0, 3 attempts in"):
        ChunkReader(level(stored), retry_policy=RetryPolicy(3, 0.5)).read(*WHOLE)


def test_a_file_that_never_answers_is_given_up(stored, through):
    """A pipe stands in for a dead network mount: zarr-python's own store blocks in the system when it opens one."""
    through(lambda path: LocalStore(path, read_only=True))
    (stored / "0.0.0").unlink()
    os.mkfifo(stored / "0.0.0")
    try:
        with pytest.raises(ChunkError, match="no answer"):
            ChunkReader(level(stored), retry_policy=RetryPolicy(2, 0.5)).read(*WHOLE)
    finally:
        os.close(os.open(stored / "0.0.0", os.O_WRONLY | os.O_NONBLOCK))  # lets go of the threads that wait


def test_the_users_random_numbers_do_not_depend_on_faults(stored, through):
    import random

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002  the user's own
    expected = random.Random(1).random()
    through(lambda path: FaultyStore(LocalStore(path), lambda key, n: transient() if n < 3 else None))
    ChunkReader(level(stored), retry_policy=QUICK).read(*WHOLE)
    assert random.random() == expected


@pytest.mark.parametrize(
    ("attempts", "timeout"), [(0, 1.0), (True, 1.0), (1.5, 1.0), (1, 0), (1, -1), (1, float("inf")), (1, "x")]
)
def test_patience_is_checked(attempts, timeout):
    with pytest.raises(CellMapValueError, match=r"read_(attempts|timeout) must be"):
        RetryPolicy(attempts, timeout)


# -- damage

KINDS = {
    "v2 blosc": (2, {}),
    "v2 zstd": (2, {"compressors": numcodecs.Zstd(1)}),
    "v2 gzip": (2, {"compressors": numcodecs.GZip(1)}),
    "v2 zlib": (2, {"compressors": numcodecs.Zlib(1)}),
    "v2 lz4": (2, {"compressors": numcodecs.LZ4()}),
    "v2 bz2": (2, {"compressors": numcodecs.BZ2()}),
    "v2 lzma": (2, {"compressors": numcodecs.LZMA()}),
    "v2 raw": (2, {"compressors": None}),
    "v2 delta blosc": (2, {"filters": [numcodecs.Delta("u1")]}),
    "v3 zstd": (3, {"compressors": ZstdCodec(level=1)}),
    "v3 zstd checksum": (3, {"compressors": ZstdCodec(level=1, checksum=True)}),
    "v3 blosc": (3, {"compressors": BloscCodec(cname="zstd")}),
    "v3 sharded blosc": (3, {"shards": (16, 16, 16), "compressors": BloscCodec(cname="zstd")}),
    "v3 sharded zstd": (3, {"shards": (16, 16, 16), "compressors": ZstdCodec(level=1)}),
}
DAMAGE = {
    "truncated": lambda b: b[: len(b) // 2],
    "almost whole": lambda b: b[:-1],
    "empty": lambda b: b"",
    "header only": lambda b: b[:7],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_that_is_cut_short_is_never_read_as_something(tmp_path, kind, damage):
    zarr_format, how = KINDS[kind]
    path = write(tmp_path / "a", zarr_format, **how)
    reader = ChunkReader(level(path), "crop1: raw", retry_policy=RetryPolicy(1, 5.0))
    assert (reader.read(*WHOLE) == VALUES).all(), "and what is whole is read"
    assert (reader.read((0, 0, 0), CHUNKS) == VALUES[:8, :8, :8]).all()
    file = next(p for p in sorted(path.rglob("*")) if p.is_file() and p.name not in (".zarray", ".zattrs", "zarr.json"))
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    for box in (WHOLE, ((0, 0, 0), CHUNKS)):
        with pytest.raises(ChunkError, match=r"crop1: raw: .* could not be read: \w+: .+"):
            reader.read(*box)


@pytest.mark.parametrize("compressors", [ZstdCodec(level=1, checksum=True), Crc32cCodec()])
def test_a_flipped_byte_is_noticed_where_a_checksum_is_stored(tmp_path, compressors):
    path = write(tmp_path / "a", 3, compressors=[compressors])
    file = path / "c/0/0/0"
    stored = bytearray(file.read_bytes())
    stored[len(stored) // 2] ^= 1
    file.write_bytes(stored)
    with pytest.raises(ChunkError, match="could not be read"):
        ChunkReader(level(path), retry_policy=RetryPolicy(1, 5.0)).read(*WHOLE)


def test_a_folder_and_a_dead_link_in_place_of_a_chunk(stored):
    (stored / "0.0.0").unlink()
    (stored / "0.0.0").mkdir()
    with pytest.raises(ChunkError, match="a folder stands where the chunk should be a file"):
        ChunkReader(level(stored), retry_policy=RetryPolicy(1, 5.0)).read(*WHOLE)
    (stored / "0.0.0").rmdir()
    (stored / "0.0.0").symlink_to(stored / "elsewhere")
    with pytest.raises(ChunkError, match=r"it is a link to .*elsewhere, which is not there"):
        ChunkReader(level(stored), retry_policy=RetryPolicy(1, 5.0)).read(*WHOLE)


def test_a_chunk_in_the_middle_of_being_written_is_read_when_it_is_whole(stored, through):
    whole = (stored / "0.0.0").read_bytes()
    (stored / "0.0.0").write_bytes(whole[:100])

    def finish(key, number):
        if key == "0.0.0" and number == 3:
            (stored / "0.0.0").write_bytes(whole)

    through(lambda path: FaultyStore(LocalStore(path), finish))
    assert (ChunkReader(level(stored), retry_policy=QUICK).read(*WHOLE) == VALUES).all()


# -- what would decode to too much

BOMBS = {
    "v2 zstd": numcodecs.Zstd(1).encode(bytes(1 << 26)),
    "v2 blosc": bytes(numcodecs.Blosc("zstd", 1).encode(bytes(1 << 26))),
    "v2 bz2": numcodecs.BZ2().encode(bytes(1 << 26)),
    "v2 lzma": numcodecs.LZMA().encode(bytes(1 << 26)),
    "v2 lz4": (10**9).to_bytes(4, "little") + bytes(100),
    "v3 sharded zstd": None,
}
# A Zstandard frame of 18 bytes whose header says 100 GB.
HUGE = (
    bytes.fromhex("28b52ffd") + bytes([0b11100000]) + (100 * 10**9).to_bytes(8, "little") + bytes([0b011, 0, 4]) + b"x"
)


@pytest.mark.parametrize("kind", BOMBS)
def test_a_chunk_that_decodes_to_too_much_is_refused_before_it_does(tmp_path, kind):
    zarr_format, how = KINDS[kind]
    path = write(tmp_path / "a", zarr_format, **how)
    file = path / "0.0.0" if zarr_format == 2 else path / "c/0/0/0"
    bombs = [BOMBS[kind]] if BOMBS[kind] else []
    if kind == "v2 zstd":
        bombs += [HUGE]
    if zarr_format == 3:  # the shard's first chunk becomes the bomb
        shard = file.read_bytes()
        index = np.frombuffer(shard[-(8 * 16 + 4) : -4], "<u8").reshape(-1, 2).copy()
        index[0] = 0, len(HUGE)
        import google_crc32c

        tail = index.tobytes()
        bombs = [HUGE + shard[len(HUGE) : -(8 * 16 + 4)] + tail + int(google_crc32c.value(tail)).to_bytes(4, "little")]
    for bomb in bombs:
        file.write_bytes(bomb)
        for box in (WHOLE, ((0, 0, 0), CHUNKS)):
            with pytest.raises(ChunkError, match=r"it would decode to (more than )?[0-9]+ bytes"):
                ChunkReader(level(path), retry_policy=RetryPolicy(1, 5.0)).read(*box)


def test_metadata_that_requires_too_much_or_objects_is_refused(tmp_path, edit):
    for number, (change, expected_text) in enumerate(
        [
            ({"chunks": [10**4, 10**4, 10**3]}, "have 100000000000 bytes; at most"),
            ({"shape": [10**9, 10**9, 10**9]}, "bytes; at most"),
            ({"dtype": "|O"}, "is not a number"),
            ({"filters": [{"id": "pickle"}]}, "the codec 'pickle' cannot be read; known are"),
            ({"compressor": {"id": "json2"}}, "the codec 'json2' cannot be read"),
            ({"filters": [{"id": "vlen-utf8"}]}, "the codec 'vlen-utf8' cannot be read"),
            ({"dimension_separator": "/../"}, r"with '\.' or '/' between their indices, got '/\.\./'"),
        ]
    ):
        path = write(tmp_path / str(number))
        edit(path / ".zarray", lambda content, change=change: content.update(change))
        with pytest.raises(MetadataError, match=expected_text):
            read_array(path)
    path = write(tmp_path / "v3", 3)
    edit(path / "zarr.json", lambda c: c["codecs"].append({"name": "numcodecs.pickle"}))
    with pytest.raises(MetadataError, match=r"zarr\.json: the codec 'numcodecs\.pickle' cannot be read; known are"):
        read_array(path)
