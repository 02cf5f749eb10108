"""Metadata that a reader cannot open is an error at setup, which names the file, the field, and what would be right."""

import copy
import json
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.errors import CellMapError, MetadataError
from cellmap_lightning.io import openable
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import Level, read_array
from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale
from cellmap_lightning.splits.datasplit import CellMapDataSplit

SCALE = (8.0, 8.0, 8.0)
SPEC = {"raw": {"shape": [16, 16, 16], "scale": list(SCALE)}}
TARGETS = {"labels": SPEC["raw"]}
GONE = object()
B = {"name": "bytes", "configuration": {"endian": "little"}}
BB = {"name": "bytes", "configuration": {"endian": "big"}}
Z = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
G = {"name": "gzip", "configuration": {"level": 1}}
C = {"name": "crc32c"}


def shard(chunk, codecs, index=(B, C), **more):
    settings = {"chunk_shape": chunk, "codecs": codecs, "index_codecs": list(index), "index_location": "end"}
    return {"name": "sharding_indexed", "configuration": settings | more}


def transpose(order):
    return {"name": "transpose", "configuration": {"order": order}}


def blosc(**more):
    settings = {"cname": "lz4", "clevel": 5, "shuffle": "shuffle", "typesize": 2, "blocksize": 0}
    return {"name": "blosc", "configuration": {n: v for n, v in (settings | more).items() if v is not GONE}}


def grid(*chunk, name="regular"):
    return {"name": name, "configuration": {"chunk_shape": list(chunk)}}


META = {
    2: {
        "zarr_format": 2, "shape": [8, 8, 8], "dtype": "<u2", "chunks": [8, 8, 8], "compressor": None, "filters": None,
        "order": "C", "fill_value": 0,
    },
    3: {
        "zarr_format": 3, "node_type": "array", "shape": [8, 8, 8], "data_type": "uint16", "chunk_grid": grid(8, 8, 8),
        "chunk_key_encoding": {"name": "default"}, "codecs": [B, Z], "fill_value": 0,
    },
}  # fmt: skip
#: Version, change, and what the error says of it; the reader zarr refuses all of them when it opens or first reads.
REFUSED = {
    "v2 no fill_value": (2, {"fill_value": GONE}, "missing 'fill_value'; right would be a value of uint16, such as 0"),
    "v2 empty fill_value": (2, {"fill_value": ""}, "fill_value is ''; right would be a value of uint16"),
    "v2 negative fill_value": (2, {"fill_value": -1}, "fill_value is -1; right would be a value of uint16"),
    "v2 NaN for integers": (2, {"fill_value": "NaN"}, "fill_value is 'NaN'; right would be a value of uint16"),
    "v2 no order": (2, {"order": GONE}, "missing 'order'; right would be 'C' or 'F'"),
    "v2 order K": (2, {"order": "K"}, "order is 'K'; right would be 'C' or 'F'"),
    "v2 zarr_format as text": (2, {"zarr_format": "2"}, "zarr_format is '2'; right would be 2"),
    "v2 type without byte order": (2, {"dtype": "u2"}, "dtype is 'u2'; right would be its type with the byte order, h"),
    "v2 unknown cname": (
        2, {"compressor": {"id": "blosc", "cname": "foo", "clevel": 5, "shuffle": 1, "blocksize": 0}},
        "not supported: 'foo'; expected one of ['blosclz', 'lz4'",
    ),
    "v2 unknown setting": (2, {"compressor": {"id": "zlib", "level": 1, "x": 2}}, "unexpected keyword argument 'x'"),
    "v2 delta without type": (2, {"filters": [{"id": "delta"}]}, 'filters is [{"id": "delta"}]; right would be setti'),
    "v3 fill_value null": (3, {"fill_value": None}, "fill_value is null; right would be a value of uint16, such as 0"),
    "v3 no fill_value": (3, {"fill_value": GONE}, "missing 'fill_value'"),
    "v3 unknown field": (3, {"foo": 1}, "the field 'foo' is not part of the specification; right would be to leave it"),
    "v3 consolidated": (3, {"consolidated_metadata": None}, "the field 'consolidated_metadata' is not part of the sp"),
    "v3 transformers": (3, {"storage_transformers": [{"name": "x"}]}, "storage_transformers is [{"),
    "v3 no key encoding": (3, {"chunk_key_encoding": GONE}, "missing 'chunk_key_encoding'"),
    "v3 key encoding": (3, {"chunk_key_encoding": {"name": "fanout"}}, "right would be {'name': 'default'} or {'name'"),
    "v3 key encoding as text": (3, {"chunk_key_encoding": "default"}, "chunk_key_encoding is 'default'; right would b"),
    "v3 chunk grid": (3, {"chunk_grid": grid(8, 8, 8, name="rectangular")}, "right would be {'name': 'regular'"),
    "v3 bitround": (3, {"codecs": [{"name": "bitround", "configuration": {"keepbits": 3}}, B]}, "'numcodecs.bitround'"),
    "v3 zlib": (3, {"codecs": [B, {"name": "zlib", "configuration": {"level": 1}}]}, "would be 'numcodecs.zlib'"),
    "v3 lz4 in a shard": (3, {"codecs": [shard([4, 4, 4], [B, {"name": "lz4"}])]}, "right would be 'numcodecs.lz4'"),
    "v3 bare name": (3, {"codecs": ["bytes", Z]}, "the codec 'bytes' is a bare name; right would be {\"name\": \"byte"),
    "v3 order as text": (3, {"codecs": [transpose("F"), B]}, "its codecs (transpose, bytes) cannot be read"),
    "v3 order twice": (3, {"codecs": [transpose([0, 0, 1]), B]}, "There must not be duplicates"),
    "v3 no serializer": (3, {"codecs": [Z]}, "0 of its codecs turn an array to bytes (zstd); right would be one"),
    "v3 two serializers": (3, {"codecs": [B, B]}, "2 of its codecs turn an array to bytes (bytes, bytes)"),
    "v3 no codecs": (3, {"codecs": []}, "0 of its codecs turn an array to bytes (there are no codecs)"),
    "v3 shard not divided": (3, {"codecs": [shard([5, 5, 5], [B])]}, "the chunks [5, 5, 5] do not divide their"),
    "v3 index gzip": (3, {"codecs": [shard([4, 4, 4], [B], (B, G))]}, "index_codecs of its shards have 'gzip', af"),
    "v3 index zstd inside": (
        3, {"codecs": [shard([4, 4, 4], [shard([2, 2, 2], [B], (B, Z))])]}, "index_codecs of its shards have 'zstd'"
    ),
    "v3 index without serializer": (3, {"codecs": [shard([4, 4, 4], [B], ())]}, "its codecs (sharding_indexed [bytes]"),
    "v3 type of v2": (3, {"data_type": "<u2"}, "data_type is '<u2'; right would be its name"),
    "v3 type as object": (3, {"data_type": {"name": "uint16"}}, "data_type is {\"name\": \"uint16\"}; right would be"),
    "v3 names of other axes": (3, {"dimension_names": ["z", "y"]}, "right would be a name for each of the 3 axes"),
}  # fmt: skip


def changed(zarr_format, change):
    meta = {**copy.deepcopy(META[zarr_format]), **change}
    return {name: value for name, value in meta.items() if value is not GONE}


def put(path, zarr_format, change):
    path.mkdir(parents=True, exist_ok=True)
    file = path / ("zarr.json" if zarr_format == 3 else ".zarray")
    file.write_text(json.dumps(changed(zarr_format, change)))
    return path


def level(path):
    return Level(Path(path), "s0", SCALE, SCALE, (0, 1, 2), 3)


@pytest.fixture(autouse=True)
def nothing_remembered():
    openable._results.clear()


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
@pytest.mark.parametrize("case", REFUSED)
def test_the_error_names_the_file_and_the_field(tmp_path, case, reader):
    zarr_format, change, message = REFUSED[case]
    path = put(tmp_path / "s0", zarr_format, change)
    if reader == "tensorstore" and case == "v3 order as text":
        ChunkReader(level(path), reader=reader)
        return
    with pytest.raises(MetadataError) as caught:
        ChunkReader(level(path), "crop1: raw", reader)
    text = str(caught.value)
    assert text.startswith(f"{path}/{'zarr.json' if zarr_format == 3 else '.zarray'}: ")
    if reader == "zarr":
        assert message in text
    assert ("(zarr-python: " if reader == "zarr" else "(TensorStore: ") in text
    assert "object at 0x" not in text


READ = {
    "v2": (2, {}),
    "v2 fill_value null": (2, {"fill_value": None}),
    "v2 fill_value 0.0": (2, {"fill_value": 0.0}),
    "v2 without filters": (2, {"filters": GONE}),
    "v2 an unknown field": (2, {"foo": 1}),
    "v2 a level that nothing writes": (2, {"compressor": {"id": "gzip", "level": 12}}),
    "v2 order F, big endian": (2, {"order": "F", "dtype": ">u2", "compressor": {"id": "lz4", "acceleration": 1}}),
    "v2 bool": (2, {"dtype": "|b1", "fill_value": True, "filters": [{"id": "packbits"}]}),
    "v2 one chunk of a gigabyte": (2, {"shape": [1024] * 3, "chunks": [1024] * 3, "dtype": "|u1"}),
    "v3": (3, {}),
    "v3 a field that may be ignored": (3, {"foo": {"must_understand": False}}),
    "v3 NaN": (3, {"data_type": "float32", "fill_value": "NaN"}),
    "v3 filled with ones": (3, {"fill_value": 1}),
    "v3 shards, most defaults": (
        3, {"codecs": [{"name": "sharding_indexed", "configuration": {"chunk_shape": [4, 4, 4]}}]}
    ),
    "v3 large shards": (
        3, {"shape": [1 << 18] * 3, "chunk_grid": grid(4096, 4096, 4096), "codecs": [shard([64, 64, 64], [B, Z])]}
    ),
    "v3 transposed shards": (
        3, {"chunk_grid": grid(8, 16, 32), "codecs": [transpose([2, 1, 0]), shard([8, 8, 1], [B, Z])]}
    ),
    "v3 thin chunks": (3, {"chunk_grid": grid(1, 1, 8), "codecs": [transpose([2, 1, 0]), B]}),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_arrays_that_zarr_opens_are_not_refused(tmp_path, case):
    ChunkReader(level(put(tmp_path / "s0", *READ[case])))


@pytest.mark.parametrize(
    ("change", "reader", "other"),
    [
        ({"codecs": [B, {"name": "numcodecs.lz4", "configuration": {}}]}, "tensorstore", "zarr"),
        ({"codecs": [shard([4, 4, 4], [B]), G]}, "tensorstore", "zarr"),
        ({"codecs": [transpose("F"), B]}, "zarr", "tensorstore"),
        ({"chunk_grid": grid(2, 8, 8), "codecs": [transpose([2, 1, 0]), shard([8, 4, 2], [B])]}, "zarr", "tensorstore"),
    ],
)
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in")
@pytest.mark.filterwarnings("ignore:Combining a `sharding_indexed`")
def test_arrays_that_only_the_other_reader_opens(tmp_path, change, reader, other):
    path = put(tmp_path / "s0", 3, change)
    with pytest.raises(MetadataError, match=rf"; reader={other} reads it$") as caught:
        ChunkReader(level(path), reader=reader)
    assert "right would be" not in str(caught.value)
    ChunkReader(level(path), reader=other)


# -- at setup


def volume(tmp_path, zarr_format=2):
    path = tmp_path / "volume.zarr"
    storage = ArrayOptions(chunks=(16, 16, 16), zarr_format=zarr_format)
    how = {"scale": SCALE, "translation": (4.0, 4.0, 4.0), "storage": storage}
    write_group(path, zarr_format=zarr_format)
    write_multiscale(path / "raw", np.ones((32, 32, 32), np.uint8), **how)
    write_multiscale(path / "crop1" / "mito", np.ones((32, 32, 32), np.uint8), mode="mode", **how)
    return path


def spoil(path, change, image):
    file = next(f for f in (path / image / "s0" / ".zarray", path / image / "s0" / "zarr.json") if f.exists())
    meta = json.loads(file.read_text()) | change
    file.write_text(json.dumps({name: value for name, value in meta.items() if value is not GONE}))
    return file


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
@pytest.mark.parametrize("kind", ["binary", "instances"])
@pytest.mark.parametrize(
    ("zarr_format", "change"), [(2, {"order": "K"}), (2, {"fill_value": GONE}), (3, {"fill_value": None})]
)
@pytest.mark.parametrize("image", ["raw", "crop1/mito"])
def test_a_crop_is_refused_at_setup(tmp_path, zarr_format, change, image, kind, reader):
    path = volume(tmp_path, zarr_format)
    file = spoil(path, change, image)
    entry = {"raw": str(path / "raw"), "gt": f"{path}/crop1/[mito]"}
    targets = {"labels": TARGETS["labels"] | ({"kind": kind} if kind != "binary" else {})}
    with pytest.raises(MetadataError) as caught:
        CellMapDataset(
            entry["raw"], entry["gt"], ["mito"], SPEC, targets, read=ReadOptions(cache="none", reader=reader)
        )
    assert str(file) in str(caught.value)
    split = CellMapDataSplit(
        datasets={"train": [entry, entry]},
        classes=["mito"],
        input_arrays=SPEC,
        target_arrays=targets,
        read=ReadOptions(cache="none", reader=reader),
    )
    with pytest.raises(CellMapError, match=r"2 of the 2 crops for 'train' cannot be used") as caught:
        split["train"]
    assert str(caught.value).count(str(file)) >= 2


def test_the_module_refuses_it_at_setup(tmp_path):
    path = volume(tmp_path, 3)
    file = spoil(path, {"codecs": [shard([8, 8, 8], [B], (B, G))]}, "raw")
    (tmp_path / "crops.csv").write_text(f'train,{path}/raw,"{path}/crop1/[mito]"\n')
    module = CellMapDataModule(
        classes=["mito"], input_arrays=SPEC, target_arrays=TARGETS, csv_path=str(tmp_path / "crops.csv"), batch_size=1,
        batches_per_epoch=1, cache="none",
    )  # fmt: skip
    module.prepare_data()
    with pytest.raises(CellMapError, match="index_codecs of its shards have 'gzip'") as caught:
        module.setup("fit")
    assert str(file) in str(caught.value)


def test_levels_that_are_not_read_do_not_matter(tmp_path):
    path = volume(tmp_path)
    write_multiscale(
        path / "deep",
        np.ones((32, 32, 32), np.uint8),
        scale=SCALE,
        translation=SCALE,
        levels=2,
        storage=ArrayOptions(chunks=(16, 16, 16)),
    )
    spoil(path, {"order": "K"}, "deep")
    coarse = {"raw": {"shape": [8, 8, 8], "scale": [16, 16, 16]}}
    with CellMapDataset(str(path / "deep"), input_arrays=coarse, read=ReadOptions(cache="none")) as data:
        assert (data[0]["raw"] > 0).all()
    with pytest.raises(MetadataError, match="order is 'K'"):
        CellMapDataset(str(path / "deep"), input_arrays=SPEC, read=ReadOptions(cache="none"))


# -- what it costs


def test_a_kind_is_checked_once(tmp_path, monkeypatch):
    """Arrays that differ in shape and attributes alone are of one kind, in this process and in those it starts."""
    runs = []
    real = openable._run_zarr
    monkeypatch.setattr(openable, "_run_zarr", lambda *given: (runs.append(given), real(*given)))
    for number, fmt in enumerate([2, 3] * 20):
        path = put(tmp_path / str(number), fmt, {"shape": [8 + number] * 3})
        attributes = {"cellmap": {"number": number}}
        if fmt == 2:
            (path / ".zattrs").write_text(json.dumps(attributes))
        else:
            meta = json.loads((path / "zarr.json").read_text())
            (path / "zarr.json").write_text(json.dumps(meta | {"attributes": attributes}))
        reader = ChunkReader(level(path))
    assert len(runs) == 2
    other = put(tmp_path / "other", 2, {"chunks": [4, 4, 4]})
    ChunkReader(level(other))
    assert len(runs) == 3
    openable._results.clear()
    pickle.loads(pickle.dumps(reader))
    assert len(runs) == 3, "another process does not check what this one has checked"


def test_many_threads_check_at_once(tmp_path):
    good = [put(tmp_path / f"g{n}", 3, {"fill_value": n}) for n in range(4)]
    bad = [put(tmp_path / f"b{n}", 2, {"fill_value": -n - 1}) for n in range(4)]

    def check(path):
        try:
            ChunkReader(level(path))
        except MetadataError as e:
            return str(e)
        return ""

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(check, (good + bad) * 8))
    for path, text in zip((good + bad) * 8, texts, strict=True):
        assert bool(text) == (path in bad)


def test_no_thread_stays(tmp_path):
    before = {thread.name for thread in threading.enumerate()}
    ChunkReader(level(put(tmp_path / "a", 3, {})))
    with pytest.raises(MetadataError):
        ChunkReader(level(put(tmp_path / "b", 3, {"codecs": []})))
    assert not {t.name for t in threading.enumerate() if t.name.startswith("cellmap")} - before


def test_setup_does_not_start_tensorstore(tmp_path):
    """A process that is forked after setup may still read with it."""
    array = zarr.create_array(tmp_path / "a", shape=(8, 8, 8), chunks=(4, 4, 4), dtype="u2", zarr_format=3)
    array[...] = 5
    put(tmp_path / "b", 3, {"codecs": [shard([4, 4, 4], [B]), G]})
    program = f"""
import multiprocessing, threading
from pathlib import Path
from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import Level
level = lambda name: Level(Path({str(tmp_path)!r}) / name, "s0", (1.0,) * 3, (0.0,) * 3, (0, 1, 2), 3)
reader = ChunkReader(level("a"), reader="tensorstore")
ChunkReader(level("a"))
try:
    ChunkReader(level("b"), reader="tensorstore")
except MetadataError as e:
    assert "reader=zarr reads it" in str(e), e
else:
    raise AssertionError
assert [t.name for t in threading.enumerate()] == ["MainThread"]
context = multiprocessing.get_context("fork")
process = context.Process(target=lambda: reader.read((0, 0, 0), (8, 8, 8)).sum() == 2560 or exit(3))
process.start()
process.join(120)
assert process.exitcode == 0, process.exitcode
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], check=False, capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# -- against the readers themselves

MORE = {
    **{f"3 no {name}": (3, {name: GONE}) for name in META[3]},
    **{f"2 no {name}": (2, {name: GONE}) for name in META[2]},
    **{
        f"codec {name} {settings}": (3, {"codecs": [B, {"name": name, "configuration": settings}]})
        for name, settings in [
            ("zstd", {}), ("zstd", {"level": 99, "checksum": False}), ("gzip", {}), ("gzip", {"level": 50}),
            ("crc32c", {}), ("numcodecs.zlib", {}), ("numcodecs.shuffle", {"elementsize": 2}), ("lzma", {}),
        ]
    },
    **{f"blosc {k} {v}": (3, {"codecs": [B, blosc(**{k: v})]}) for k, v in [
        ("cname", GONE), ("cname", "foo"), ("clevel", GONE), ("shuffle", GONE), ("shuffle", "x"), ("typesize", GONE),
        ("blocksize", GONE), ("shuffle", "noshuffle"),
    ]},
    "noshuffle": (3, {"codecs": [B, blosc(shuffle="noshuffle", typesize=GONE)]}),
    "zstd alone": (3, {"codecs": [B, {"name": "zstd"}]}),
    "transpose C": (3, {"codecs": [transpose("C"), B]}),
    "transpose short": (3, {"codecs": [transpose([1, 0]), B]}),
    "transpose after": (3, {"codecs": [B, transpose([2, 1, 0])]}),
    "transpose": (3, {"codecs": [transpose([2, 0, 1]), B]}),
    "no endian": (3, {"codecs": [{"name": "bytes"}]}),
    "no endian, one byte": (3, {"codecs": [{"name": "bytes"}], "data_type": "uint8"}),
    "index crc alone": (3, {"codecs": [shard([4, 4, 4], [B], (C,))]}),
    "index big": (3, {"codecs": [shard([4, 4, 4], [B], (BB,))]}),
    "index twice": (3, {"codecs": [shard([4, 4, 4], [B], (B, C, C))]}),
    "index transposed": (3, {"codecs": [shard([4, 4, 4], [B], (transpose([3, 2, 1, 0]), B, C))]}),
    "index transposed wrong": (3, {"codecs": [shard([4, 4, 4], [B], (transpose([2, 1, 0]), B, C))]}),
    "index no endian": (3, {"codecs": [shard([4, 4, 4], [B], ({"name": "bytes"}, C))]}),
    "outside": (3, {"codecs": [shard([4, 4, 4], [B]), C]}),
    "outside, nested": (3, {"codecs": [shard([4, 4, 4], [shard([2, 2, 2], [B]), G])]}),
    "nested not divided": (3, {"codecs": [shard([4, 4, 4], [shard([3, 3, 3], [B])])]}),
    "nothing inside": (3, {"codecs": [shard([4, 4, 4], [])]}),
    "shard with more": (3, {"codecs": [shard([4, 4, 4], [B], foo=1)]}),
    "bool 0": (3, {"data_type": "bool", "fill_value": 0}),
    "bool": (3, {"data_type": "bool", "fill_value": False}),
    "float16": (3, {"data_type": "float16"}),
    "null names": (3, {"dimension_names": [None] * 3}),
    "group": (3, {"node_type": "group"}),
    "v2 bool 0": (2, {"dtype": "|b1"}),
    "v2 0 as text": (2, {"fill_value": "0"}),
    "v2 type by name": (2, {"dtype": "uint16"}),
    "v2 delta": (2, {"filters": [{"id": "delta", "dtype": "<u2"}]}),
    "v2 no filters": (2, {"filters": []}),
    **{f"v2 compressor {c}": (2, {"compressor": c}) for c in (
        {"id": "blosc"}, {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 7}, {"id": "zlib"}, {"id": "lzma"},
        {"id": "bz2", "level": 1}, {"id": "zstd", "level": 1, "checksum": True}, {"id": "lz4", "acceleration": 1},
    )},
}  # fmt: skip


def differing(folder):
    """Cases that a check accepts and the reader refuses, or the other way round."""
    import tensorstore

    found = []
    for name, (zarr_format, change, *_) in {**REFUSED, **READ, **MORE}.items():
        meta = changed(zarr_format, change)
        if np.prod(meta.get("shape", [1])) > 10**6 or any(part in name for part in ("level", "no shape", "no chunks")):
            continue
        path = put(Path(folder) / name.replace("/", "_"), zarr_format, change)
        spec = {"driver": "zarr3" if zarr_format == 3 else "zarr", "kvstore": {"driver": "file", "path": str(path)}}
        for reader in openable.READERS:
            try:
                if reader == "zarr":
                    array = zarr.open_array(path, mode="r+", zarr_format=zarr_format)
                    array[...] = np.ones(array.shape)
                    np.asarray(array[...])
                else:
                    array = tensorstore.open(spec, open=True).result()
                    array.write(np.ones(array.shape, array.dtype.numpy_dtype)).result()
                    array.read().result()
                reads = True
            except Exception:
                reads = False
            if reads != openable._Check(zarr_format, reader).accepts(meta):
                found.append((name, reader, reads))
    return found


def test_the_checks_are_those_of_the_readers(tmp_path):
    program = "import sys; from tests.io.test_openable import differing; print(differing(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)],
        check=False, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_arrays_of_any_number_of_axes(tmp_path):
    for ndim in (1, 2, 4, 6, 12):
        path = put(tmp_path / str(ndim), 2, {"shape": [1] * ndim, "chunks": [1] * ndim})
        openable.check_openable(read_array(path), "zarr")
