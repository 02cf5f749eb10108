"""An array whose chunks have versions, the region file that is made of it, and ways to damage that."""

import json
import os
from pathlib import Path

import numpy as np

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.region import Region
from cellmap_lightning.cache.region_store import RegionStore

SHAPE, CHUNKS = (20, 24, 40), (10, 12, 20)
COUNT = 8
PAGE = 4096


class Source:
    """An array in memory, and the version of each of its chunks, which a stamp is made of."""

    def __init__(self, shape=SHAPE, chunks=CHUNKS, dtype="uint16", depth=0, key="a"):
        self.chunks, self.depth, self.key = chunks, depth, key
        self.versions = np.zeros([-(-n // c) for n, c in zip(shape, chunks, strict=True)], int)
        kind = np.dtype(dtype)
        # No byte is 0, so that zeros are never right.
        content = np.random.default_rng(1).integers(1, 256, np.prod(shape) * max(1, depth) * kind.itemsize, np.uint8)
        self.data = content.view(kind).reshape(*shape, *([depth] if depth else []))
        self.decoded = []

    def change(self, index, back=False):
        """Write other voxels, or the first ones."""
        place = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, self.chunks, strict=True))
        self.data[place] ^= 0x54
        self.versions[index] += -1 if back else 1

    def decode(self, start, shape):
        self.decoded.append(start)
        return self.data[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]

    def stamp(self, start, shape):
        return 1 + int(self.versions[tuple(a // c for a, c in zip(start, self.chunks, strict=True))])

    def open(self, mode="disk"):
        """The region as a new process finds it, planned, and the store."""
        self.decoded.clear()
        region = Region(
            self.data.shape[:3], self.chunks, self.data.dtype, self.decode, ChunkCache(), self.key, depth=self.depth,
            stamp=self.stamp, identity=lambda: ("damage", self.key), name=f"array {self.key}",
        )  # fmt: skip
        store = RegionStore(mode)
        store.plan([region], False, "test")
        return region, store

    def right(self, region):
        """Return whether a region equals the stored voxels, read in two parts, so that cached ones are read too."""
        found = np.empty_like(self.data)
        half = len(found) // 2
        region.read_into((0, 0, 0), found[:half])
        region.read_into((half, 0, 0), found[half:])
        first = found.tobytes()
        region.read_into((0, 0, 0), found)
        return first == found.tobytes() == self.data.tobytes()

    def run(self):
        """Read everything as a run does, and close; returns how many chunks were decoded."""
        region, store = self.open()
        assert self.right(region)
        count = store.decoded
        assert count == len(self.decoded)
        store.close()
        return count

    @property
    def file(self):
        (file,) = Path(os.environ["CELLMAP_CACHE_DIR"]).rglob(f"{self.open('none')[0].digest()}.region")
        return file

    @property
    def layout(self):
        return self.open("none")[0].layout


def part_of(layout, name):
    """First byte of a part of a region file, and how many bytes are in use there."""
    sizes = {"flags": COUNT, "stamps": 8 * COUNT, "checksums": 4 * COUNT, "reserved": layout.grid[0]}
    return getattr(layout.parts, name), sizes.get(name, layout.nbytes - layout.parts.voxels)


def edit(file, change):
    """Change the bytes of a file in place; it may have another size afterwards."""
    content = bytearray(file.read_bytes())
    changed = change(content)
    content = content if changed is None else changed
    with file.open("r+b") as out:
        out.write(content)
        out.truncate()


def flipped(content, at, size):
    content[at : at + size] = bytes(b ^ 0x5A for b in content[at : at + size])


def zeroed(content, at, size):
    content[at : at + size] = bytes(size)


def one_bit(content, at, size):
    content[at + size // 2] ^= 0x10


def ones(content, at, size):
    content[at : at + size] = b"\1" * size


def random_bytes(content, at, size):
    content[at : at + size] = np.random.default_rng(size).bytes(size)


def rolled(content, at, size):
    """The bytes of neighbours."""
    content[at : at + size] = content[at + 1 : at + size] + content[at : at + 1]


def reboot(content):
    """The header as a machine finds it after a restart."""
    known = json.loads(bytes(content[:PAGE]).rstrip(b"\0"))
    content[:PAGE] = json.dumps(known | {"boot": "an earlier one"}).encode().ljust(PAGE, b"\0")
