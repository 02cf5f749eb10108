"""Region files: layout, ownership, validity of flags, eviction and full disks."""

import json
import math
import os
import resource
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning.cache.locks import NoRoomError
from cellmap_lightning.cache.mapped import EMPTY, FILLED, SYNCED, Layout
from cellmap_lightning.cache.shared_memory import RegionFolder, boot
from cellmap_lightning.errors import CacheError
from tests.cache.region_files import FORK, KEY, LAYOUT, OTHER, put

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes share memory so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture
def folder(tmp_path):
    return RegionFolder(tmp_path / "regions")


def reopened(folder, layout=LAYOUT, key=KEY, name=""):
    """The mapping of a region, as a new process finds it."""
    return RegionFolder(folder.folder).attach(key, layout, name)


# -- layout


@pytest.mark.parametrize("itemsize", [1, 2, 4, 6, 8])
def test_the_parts_of_a_region_are_on_separate_pages(itemsize):
    rng = np.random.default_rng(itemsize)
    for _ in range(100):
        shape = tuple(rng.integers(1, 300, 3).tolist())
        grid = tuple(-(-n // int(rng.integers(1, 70))) for n in shape)
        layout = Layout(shape, grid, itemsize)
        flags, stamps, checksums, reserved, voxels, end = layout.parts
        count = math.prod(grid)
        assert all(part % 4096 == 0 for part in layout.parts)
        assert flags >= 4096
        assert stamps >= flags + count
        assert checksums >= stamps + 8 * count
        assert reserved >= checksums + 4 * count
        assert voxels >= reserved + grid[0]
        assert end >= voxels + math.prod(layout.room) * itemsize
        assert layout.nbytes == end
        assert all(a >= b for a, b in zip(layout.room, shape, strict=True))
        assert math.prod(layout.room) <= 1.5 * math.prod(shape) + 70 * shape[0] * (shape[1] + 1)


def test_chunks_of_a_mapping_do_not_touch(folder):
    """Flags, stamps and voxels are written apart from each other, and read back by another mapping."""
    mapped = folder.attach(KEY, LAYOUT)
    assert mapped.voxels.shape == (*LAYOUT.shape, 2)
    assert (mapped.flags == EMPTY).all()
    for number, index in enumerate(np.ndindex(LAYOUT.grid)):
        put(mapped, index, number + 1)
    other = reopened(folder)
    assert (other.flags == FILLED).all()
    assert (other.stamps == 99).all()
    numbers = 1 + np.arange(12).reshape(2, 3, 2).repeat(5, 0).repeat(4, 1).repeat(7, 2)
    np.testing.assert_array_equal(other.voxels[..., 0], numbers)
    np.testing.assert_array_equal(other.voxels[..., 1], numbers)


# -- files


def test_files_are_for_this_user_alone(folder):
    old = os.umask(0)
    try:
        folder.attach(KEY, LAYOUT)
    finally:
        os.umask(old)
    assert folder.path(KEY).stat().st_mode & 0o777 == 0o600
    assert (folder.folder / "locks").stat().st_mode & 0o777 == 0o600


def test_a_file_that_others_may_read_is_refused(folder):
    folder.attach(KEY, LAYOUT)
    for mode in (0o644, 0o660, 0o602):
        folder.path(KEY).chmod(mode)
        with pytest.raises(CacheError, match=f"{KEY}.region belongs to another user, or others may read or write it"):
            reopened(folder)
    folder.path(KEY).chmod(0o600)
    reopened(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(folder):
    folder.path(KEY).touch(0o600)
    os.chown(folder.path(KEY), 12345, 12345)
    with pytest.raises(CacheError, match=r"belongs to another user.*set CELLMAP_CACHE_DIR"):
        folder.attach(KEY, LAYOUT)
    assert folder.path(KEY).stat().st_size == 0, "nothing was written to it"


def test_a_link_is_not_followed(folder, tmp_path):
    """Another user could have pointed it to a file that this user needs."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"keep this")
    precious.chmod(0o600)
    folder.path(KEY).symlink_to(precious)
    with pytest.raises(CacheError):
        folder.attach(KEY, LAYOUT)
    assert precious.read_bytes() == b"keep this"


def header(**changes):
    known = {"format": 2, "key": KEY, "shape": [10, 12, 14], "grid": [2, 3, 2], "bytes": 2, "boot": boot(), "name": "n"}
    return json.dumps(known | changes).encode()


def write_by_hand(folder, head, flag, size=LAYOUT.nbytes):
    """A region file whose chunks all have one flag and hold 7."""
    content = bytearray(size)
    content[: len(head)] = head
    flags, stamps, voxels = LAYOUT.parts.flags, LAYOUT.parts.stamps, LAYOUT.parts.voxels
    content[flags : flags + 12] = bytes([flag] * 12)
    content[stamps : stamps + 96] = np.full(12, 99, np.uint64).tobytes()
    content[voxels:size] = bytes([7]) * (size - voxels)
    folder.path(KEY).write_bytes(content)
    folder.path(KEY).chmod(0o600)


@pytest.mark.parametrize(
    ("changes", "flag", "counts"),
    [
        ({}, FILLED, True),
        ({}, SYNCED, True),
        ({"boot": "another"}, FILLED, False),  # in the memory of a machine that stopped
        ({"boot": "another"}, SYNCED, True),  # on its disk
        ({"inode": 1}, FILLED, False),  # a copy
        ({"inode": 1}, SYNCED, True),
        ({"key": OTHER}, SYNCED, False),
        ({"shape": [10, 12, 13]}, SYNCED, False),
        ({"grid": [3, 2, 2]}, SYNCED, False),
        ({"bytes": 1}, SYNCED, False),
        ({"format": 0}, SYNCED, False),
        ({"format": 1}, SYNCED, False),
    ],
)
def test_valid_flags_after_a_restart(folder, changes, flag, counts):
    folder.path(KEY).touch()
    write_by_hand(folder, header(**({"inode": folder.path(KEY).stat().st_ino} | changes)), flag)
    mapped = folder.attach(KEY, LAYOUT)
    assert (mapped.flags == (flag if counts else EMPTY)).all()
    if counts:
        assert (mapped.stamps == 99).all()
        assert (mapped.voxels == 7).all()
    known = json.loads(folder.path(KEY).read_bytes()[:4096].rstrip(b"\0"))
    assert (known["boot"], known["key"], known["shape"], known["bytes"]) == (boot(), KEY, [10, 12, 14], 2)


@pytest.mark.parametrize(
    "head",
    [b"", b"\x00" * 50, b"{", b"not a header", b"\xff\xfe\xfd", b"[1, 2]", b"{}", b"12", b"x" * 4096],
    ids=["none", "zeros", "half", "text", "bytes", "list", "empty", "number", "long"],
)
@pytest.mark.parametrize("flag", [FILLED, SYNCED])
def test_a_corrupt_header_is_replaced(folder, head, flag):
    write_by_hand(folder, head, flag)
    assert (folder.attach(KEY, LAYOUT).flags == EMPTY).all()
    put(folder.attach(KEY, LAYOUT), (0, 0, 0), 3)
    again = reopened(folder)
    assert again.flags.sum() == FILLED
    assert (again.voxels[:5, :4, :7] == 3).all()


@pytest.mark.parametrize("size", [1, 4095, 4096, 20000, LAYOUT.nbytes - 1, LAYOUT.nbytes + 4096])
def test_a_file_of_another_size_is_replaced_and_never_cut(folder, size):
    """A process that has it mapped would be killed by the system when it touches what was cut."""
    write_by_hand(folder, header(), SYNCED, max(size, LAYOUT.nbytes))
    earlier = folder.attach(KEY, LAYOUT) if size > LAYOUT.nbytes else None
    if earlier is None:
        os.truncate(folder.path(KEY), size)
    number = folder.path(KEY).stat().st_ino
    mapped = folder.attach(KEY, LAYOUT)
    assert (mapped.flags == EMPTY).all()
    assert folder.path(KEY).stat().st_size == LAYOUT.nbytes
    mapped.voxels[...] = 1
    if earlier is not None:
        earlier.voxels.sum()
        assert folder.path(KEY).stat().st_ino == number or (earlier.voxels != 1).any()


def test_a_region_that_is_in_use_is_not_cut_when_another_layout_has_its_key(folder):
    """Not this version's doing, but an earlier one's: the key is the same and the file is another."""
    mapped = folder.attach(KEY, LAYOUT)
    put(mapped, (1, 2, 1), 5)
    other = Layout((4, 4, 4), (1, 1, 1), 1)
    found = reopened(folder, other)
    assert found.flags.tolist() == [[[EMPTY]]]
    assert (mapped.voxels[5:, 8:, 7:] == 5).all()
    assert folder.path(KEY).stat().st_size == other.nbytes


@pytest.mark.parametrize("name", ["crop1: 3 classes", "ü" * 2000, "体" * 1000, "\U0001f9e0" * 500, 'a"\\\n' * 400])
def test_a_region_file_has_a_description(folder, name):
    folder.attach(KEY, LAYOUT, name)
    found = folder.name(folder.path(KEY))
    assert len(found) >= min(len(name), 50)
    assert name.startswith(found)
    assert folder.name(folder.path(OTHER)) == ""


def test_filled_chunks_are_on_disk_after_sync(folder):
    mapped = folder.attach(KEY, LAYOUT)
    put(mapped, (0, 0, 0), 3)
    put(mapped, (1, 1, 1), 4, SYNCED)
    mapped.sync()
    assert mapped.flags[0, 0, 0] == mapped.flags[1, 1, 1] == SYNCED
    assert (mapped.flags == EMPTY).sum() == 10
    content = folder.path(KEY).read_bytes()
    assert content[LAYOUT.parts[0]] == SYNCED


# -- who uses what, and what may go


def age(folder, key, seconds):
    stat = folder.path(key).stat()
    os.utime(folder.path(key), (stat.st_atime, stat.st_mtime - seconds))


def make(folder, keys):
    """Regions of earlier runs, the first the longest unused."""
    for number, key in enumerate(keys):
        mapped = folder.attach(key, LAYOUT)
        mapped.voxels[...] = 1
        del mapped
        folder.release(key)
        age(folder, key, 1000 - number)


def test_least_recently_used_regions_are_evicted_first(folder):
    keys = [f"{n:040x}" for n in (0xB << 150, 0xA << 150, 0xD << 150, 0xC << 150)]
    make(folder, keys)
    assert [path.stem for path, _, _ in folder.files()] == keys
    size = folder.files()[0][1]
    assert size >= LAYOUT.shape[0] * LAYOUT.shape[1] * LAYOUT.shape[2] * 2
    assert folder.evict(1, set()) == size
    assert [path.stem for path, _, _ in folder.files()] == keys[1:]
    reopened(folder, key=keys[1])
    folder.release(keys[1])
    assert [path.stem for path, _, _ in folder.files()][-1] == keys[1], "used again just now"
    assert folder.evict(2 * size, {keys[2]}) == 2 * size
    assert [path.stem for path, _, _ in folder.files()] == [keys[2]], "what is wanted stays"
    assert folder.evict(size, {keys[2]}) == 0
    assert (folder.folder / "locks").exists()


def test_regions_in_use_are_not_evicted(folder):
    keys = [f"{n << 130:040x}" for n in range(1, 5)]
    make(folder, keys)
    mine, theirs = FORK.Pipe()

    def child():
        mapped = RegionFolder(folder.folder).attach(keys[0], LAYOUT)
        theirs.send("uses it")
        theirs.recv()
        theirs.send(bool((mapped.voxels == 1).all()))
        theirs.recv()

    process = FORK.Process(target=child)
    process.start()
    assert mine.recv() == "uses it"
    folder.attach(keys[1], LAYOUT)  # this process
    folder.attach(keys[1], LAYOUT)
    folder.evict(10**9, set())
    assert {path.stem for path, _, _ in folder.files()} == set(keys[:2])
    folder.release(keys[1])
    folder.evict(10**9, set())
    assert {path.stem for path, _, _ in folder.files()} == set(keys[:2]), "two used it, and one does not any more"
    folder.release(keys[1])
    folder.evict(10**9, set())
    assert {path.stem for path, _, _ in folder.files()} == {keys[0]}
    mine.send("look")
    assert mine.recv() is True
    process.kill()
    process.join()
    folder.evict(10**9, set())
    assert folder.files() == []


def test_a_failed_attach_uses_nothing(folder):
    """Regions that no process has mapped can be evicted."""
    folder.attach(KEY, LAYOUT)
    folder.release(KEY)
    folder.path(KEY).chmod(0o644)
    with pytest.raises(CacheError):
        folder.attach(KEY, LAYOUT)
    assert folder.evict(10**9, set()) > 0


def test_a_removed_region_file_is_created_again(folder):
    mapped = folder.attach(KEY, LAYOUT)
    put(mapped, (0, 0, 0), 5)
    folder.path(KEY).unlink()
    assert (mapped.voxels[:5, :4, :7] == 5).all(), "who has it continues"
    assert (reopened(folder).flags == EMPTY).all()


# -- room


def test_a_failed_creation_leaves_no_file(folder):
    """Here because files may not be so large."""
    queue = FORK.SimpleQueue()

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (LAYOUT.nbytes // 2, LAYOUT.nbytes // 2))
        try:
            folder.attach(KEY, LAYOUT)
        except NoRoomError as e:
            folder.complain(e)
            folder.complain(e)
            queue.put((str(folder.path(KEY)) in str(e), "File too large" in str(e)))

    process = FORK.Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert queue.get() == (True, True)
    assert not folder.path(KEY).exists()
    assert folder.attach(KEY, LAYOUT).flags.shape == LAYOUT.grid


def emulated(fd, offset, size):
    """As the C library does where the file system cannot reserve: a zero in each block that holds none of data."""
    for at in range(offset, offset + size, 4096):
        empty = os.pread(fd, 1, at) == b"\0"
        time.sleep(0.01)
        if empty:
            os.pwrite(fd, b"\0", at)


def test_reserving_never_writes_over_voxels_of_another_thread(folder, monkeypatch):
    """A second thread must not still be reserving a plane that the first one already fills."""
    layout = Layout((4, 32, 64), (1, 2, 1), 1)
    mapped = folder.attach(KEY, layout)
    monkeypatch.setattr(os, "posix_fallocate", emulated)
    barrier = threading.Barrier(2)

    def fill(half):
        barrier.wait(120)
        if half:
            time.sleep(0.015)
        mapped.reserve((0, 4), 0)
        mapped.voxels[:, 16 * half : 16 * (half + 1)] = 7

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, range(2)))
    assert (mapped.voxels == 7).all()


MOUNTED = """
    import os, sys
    from pathlib import Path
    import numpy as np
    from cellmap_lightning.io.chunks import ChunkReader
    from cellmap_lightning.cache.region import Region
    from cellmap_lightning.cache.region_store import RegionStore

    free, data = int(sys.argv[1]), np.random.default_rng(0).integers(0, 255, (64, 64, 64)).astype(np.uint8)

    def decode(start, shape):
        return data[tuple(slice(a, a + n) for a, n in zip(start, shape))]

    def fill(leave):
        fd = os.open("/mnt/fill", os.O_WRONLY | os.O_CREAT)
        try:
            while os.write(fd, bytes(4096)):
                pass
        except OSError:
            pass
        os.ftruncate(fd, max(0, os.fstat(fd).st_size - 4096 * leave))
        os.close(fd)

    store = RegionStore("disk")
    regions = [
        Region(data.shape, (16, 64, 64), data.dtype, decode, store.chunks, n, identity=lambda n=n: (n,)) for n in "ab"
    ]
    store.plan(regions, False, "test")
    if free >= 0:
        fill(free)
    for region in regions:
        out = np.empty(data.shape, np.uint8)
        for start in (48, 0, 16, 32):  # twice, so that the cache is read as well
            region.read_into((start, 0, 0), out[start : start + 16])
        assert (out == data).all()
        out[...] = 0
        region.read_into((0, 0, 0), out)
        assert (out == data).all()
    store.close()
    print("right", store.decoded)
"""


def can_mount():
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False, timeout=120).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="this user may not mount anything")
@pytest.mark.parametrize(
    ("free", "size"), [*((n, "4m") for n in (0, 1, 2, 3, 5, 66, 70, 140, -1)), (-1, "4m,nr_inodes=3")]
)
def test_a_disk_that_fills_up_does_not_end_the_process(tmp_path, free, size):
    """Another program fills the disk after the plan: voxels that do not fit are read again, with one log line."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(MOUNTED))
    mount = f"mount -t tmpfs -o size={size} none /mnt && exec {sys.executable} {script} {free}"
    env = {**os.environ, "CELLMAP_CACHE_DIR": "/mnt/cache", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount], env=env, capture_output=True, check=False, text=True, timeout=120
    )
    assert (done.returncode, done.stdout[:5]) == (0, "right"), done.stderr
    full = 0 <= free < 140 or "inodes" in size
    assert len(done.stderr.splitlines()) == full, done.stderr
    if full:
        assert "no room for decoded voxels in /mnt/cache/" in done.stderr
