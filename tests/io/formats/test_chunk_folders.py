"""Chunk files of precomputed and N5 volumes under other names than the metadata say are read, or are an error."""

import gzip
import json
import struct

import numpy as np
import pytest

from cellmap_lightning.errors import ChunkError, MetadataError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.readers import open_reader
from tests.io.formats import writers

VOXELS = np.random.default_rng(0).integers(1, 255, (20, 64, 40)).astype(np.uint8)


def chunk_files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("info", "attributes.json"))


def read(path):
    level = read_image(str(path)).finest
    return open_reader(level, "v/crop1").read((0, 0, 0), level.lattice.shape)


def pack(file, content=None):
    packed = gzip.compress(file.read_bytes()) if content is None else content
    file.unlink()
    file.with_name(file.name + ".gz").write_bytes(packed)


@pytest.mark.parametrize("encoding", ["raw", "compressed_segmentation", "png"])
@pytest.mark.parametrize("offset", [(0, 0, 0), (-16, 5, 7)])
def test_chunks_that_end_in_gz(tmp_path, encoding, offset):
    options = {"compressed_segmentation_block_size": [8] * 3} if encoding.startswith("c") else {}
    voxels = VOXELS.astype(np.uint32) if options else VOXELS
    path = writers.precomputed(tmp_path, voxels, offset=offset, encoding=encoding, **options)
    for file in chunk_files(path):
        pack(file)
    np.testing.assert_array_equal(read(path), voxels)
    level = read_image(str(path)).finest
    np.testing.assert_array_equal(open_reader(level).read((3, 30, 20), (9, 9, 15)), voxels[3:12, 30:39, 20:35])
    chunk_files(path)[0].unlink()
    missing = read(path)
    assert ((missing == 0) | (missing == voxels)).all()
    assert (missing == 0).any()
    first = open_reader(read_image(str(path)).finest)
    assert len(first.missing_chunks((0, 0, 0), VOXELS.shape)) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(bytes(9999), mtime=0)[:-9], gzip.compress(bytes(1 << 22), mtime=0)],
    ids=["empty", "no gzip", "cut", "larger than a chunk"],
)
def test_a_damaged_chunk_that_ends_in_gz(tmp_path, content):
    path = writers.precomputed(tmp_path, VOXELS)
    files = chunk_files(path)
    for file in files:
        pack(file, content if file == files[0] else None)
    if not content:  # not stored, as any file of 0 bytes
        assert open_reader(read_image(str(path)).finest).missing_chunks((0, 0, 0), VOXELS.shape)
        return
    with pytest.raises(ChunkError, match=r"v/crop1: .*chunk \S+\.gz (is not a gzip file|is cut off)"):
        read(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda name: f"{name}.br", r"its chunks are named as \S+\.br, but by its info file as 0-32_0-32_0-16"),
        (lambda name: name.replace("_", "."), "its chunks are named as"),
        (lambda name: "_".join(name.split("_")[::-1]), "is not in the grid of the info file"),
        (lambda name: "100-132_0-32_0-16", "is not in the grid of the info file"),
        (lambda name: name.replace("0-32_0-32_0-16", "0-32_0-32_0-16.gz"), "store all chunks with .gz, or all without"),
    ],
)
def test_other_names_in_a_precomputed_volume(tmp_path, change, text):
    path = writers.precomputed(tmp_path, VOXELS)
    np.testing.assert_array_equal(read(path), VOXELS)
    for file in chunk_files(path):
        file.rename(file.with_name(change(file.name)))
    with pytest.raises(MetadataError, match=text) as caught:
        read_image(str(path))
    assert str(path) in str(caught.value)


def test_chunks_without_their_shards(tmp_path):
    path = writers.precomputed(tmp_path, VOXELS)
    info = json.loads((path / "info").read_text())
    info["scales"][0]["sharding"] = {
        "@type": "neuroglancer_uint64_sharded_v1", "preshift_bits": 1, "hash": "identity", "minishard_bits": 1,
        "shard_bits": 1,
    }  # fmt: skip
    (path / "info").write_text(json.dumps(info))
    with pytest.raises(MetadataError, match="no shard"):
        read_image(str(path))


@pytest.mark.parametrize("write", [writers.precomputed, writers.n5])
@pytest.mark.parametrize("left", [0, 1, 3])
def test_few_chunks_and_other_files(tmp_path, write, left):
    """Chunks that were never stored are no reason for an error, nor are files that are no chunks."""
    path = write(tmp_path, VOXELS)
    files = chunk_files(path)
    for file in files[left:]:
        file.unlink()
    for name in (".DS_Store", "notes.txt", "provenance", "mesh"):
        (files[0].parent / name).write_text("x")
    assert (read(path) != 0).any() == bool(left)


def n5_blocks(folder, voxels, block=16, order=(2, 1, 0), name="{}/{}/{}", header=None):
    """Write an N5 dataset block by block; ``order`` gives the folders by their axes of ``[z, y, x]``."""
    folder.mkdir(parents=True)
    attributes = {
        "dimensions": voxels.shape[::-1], "blockSize": [block] * 3, "dataType": str(voxels.dtype),
        "compression": {"type": "raw"}, "pixelResolution": {"dimensions": [4, 4, 8], "unit": "nm"},
    }  # fmt: skip
    (folder / "attributes.json").write_text(json.dumps(attributes))
    for index in np.ndindex(*(-(-n // block) for n in voxels.shape)):
        part = voxels[tuple(slice(i * block, (i + 1) * block) for i in index)]
        file = folder / name.format(*(index[axis] for axis in order))
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = header if header is not None and not any(index) else part.shape[::-1]
        file.write_bytes(struct.pack(">HH3I", 0, 3, *shape) + part.tobytes())
    return folder


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"order": (0, 1, 2)}, "beyond the array, which has .3, 4, 2. blocks .*folders x/y/z"),
        ({"order": (2, 0, 1)}, "beyond the array"),
        ({"name": "{}.{}.{}"}, r"its blocks are named as \d\.\d\.\d, but by attributes.json as 0/0/0"),
        ({"name": "{}/{}/{}.gz"}, r"its blocks are named as 0/0/\d\.gz"),
        ({"name": "{}/{}/{}/0"}, r"its blocks are named as 0/0/\d"),
        ({"name": "{}/{}_{}"}, r"its blocks are named as 0/\d_\d"),
    ],
)
def test_other_names_in_n5(tmp_path, options, text):
    np.testing.assert_array_equal(read(n5_blocks(tmp_path / "right.n5" / "em", VOXELS)), VOXELS)
    path = n5_blocks(tmp_path / "wrong.n5" / "em", VOXELS, **options)
    with pytest.raises(MetadataError, match=text) as caught:
        read_image(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("header", [(8, 16, 32), (16, 16, 8), (16, 8, 16), (4096, 1, 1)])
def test_a_block_of_another_size(tmp_path, header):
    path = n5_blocks(tmp_path / "v.n5" / "em", VOXELS, header=header)
    with pytest.raises(ChunkError, match=r"block 0/0/0 has .* voxels by its header, and the grid \[16, 16, 16\]"):
        read(path)


def test_axes_in_another_order_in_a_cube_of_blocks(tmp_path):
    """The names fit, and the cut blocks at the edge show the order."""
    voxels = VOXELS[:17, :24, :30]
    np.testing.assert_array_equal(read(n5_blocks(tmp_path / "right.n5" / "em", voxels)), voxels)
    with pytest.raises(ChunkError, match="the order of the folders"):
        read(n5_blocks(tmp_path / "wrong.n5" / "em", voxels, order=(0, 1, 2)))
