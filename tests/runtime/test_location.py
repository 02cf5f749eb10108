"""Cache locations: the order of folders, network file systems, and budgets."""

import logging
import os
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest

from cellmap_lightning.errors import CellMapError
from cellmap_lightning.io.store import identity_of, metadata_cache
from cellmap_lightning.runtime import location
from cellmap_lightning.runtime.location import (
    MOST_DISK_BYTES,
    Location,
    available_memory,
    cache_folder,
    check_mode,
    choose,
    filesystem,
    on_network,
    region_folder,
)

Usage = namedtuple("Usage", "total used free")
MINE = f"regions-{os.getuid()}"
#: The mounts of a cluster node: a network home, scratch on a disk, names with spaces and with letters like é.
MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /proc rw,nosuid - proc proc rw
30 22 0:40 / {root}/home rw,relatime shared:7 - nfs4 filer:/home rw,vers=4.2
31 30 8:17 / {root}/home/me/fast rw,relatime shared:8 master:3 - xfs /dev/sdb1 rw
32 22 0:41 / {root}/scratch rw - ext4 /dev/sdc1 rw
33 22 0:42 / {root}/scratch rw - lustre mds@tcp:/scratch rw
34 22 0:43 / {root}/two\\040words\\011and\\134more rw - cifs //server/share rw
35 22 0:44 / {root}/donn\u00e9es rw - beegfs beegfs_nodev rw
36 22 0:45 / {root}/dat rw - ceph mon:/ rw
37 22 0:46 / {root}/bucket rw - fuse.gcsfuse bucket rw
38 22 0:47 / {root}/memory rw - tmpfs tmpfs rw,size=1024k
"""


@pytest.fixture
def mounts(tmp_path):
    """Return the folder that holds the mounts, and a mountinfo file."""
    root = tmp_path / "root"
    file = tmp_path / "mountinfo"
    file.write_text(MOUNTS.format(root=root), encoding="utf-8")
    for name in ("home/me/fast", "scratch", "two words\tand\\more", "données", "dat", "data", "bucket", "memory"):
        (root / name).mkdir(parents=True)
    return root, str(file)


@pytest.fixture
def no_folders(monkeypatch, tmp_path):
    """Unset all variables with a folder, and set an empty home."""
    for name in ("CELLMAP_CACHE_DIR", "SLURM_TMPDIR", "TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def test_the_order_of_folders(no_folders, monkeypatch):
    """CELLMAP_CACHE_DIR, the job's scratch, the user's cache folder."""
    root = no_folders
    for name in ("mine", "slurm", "tmp"):
        (root / name).mkdir()
    assert region_folder() == root / "home/.cache/cellmap_lightning" / MINE
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "xdg"))
    assert region_folder() == root / "xdg/cellmap_lightning" / MINE
    monkeypatch.setenv("TMPDIR", str(root / "tmp"))
    assert region_folder() == root / f"tmp/cellmap_lightning-{MINE}"
    monkeypatch.setenv("SLURM_TMPDIR", str(root / "slurm"))
    assert region_folder() == root / f"slurm/cellmap_lightning-{MINE}"
    monkeypatch.setenv("SLURM_TMPDIR", str(root / "gone"))
    assert region_folder() == root / f"tmp/cellmap_lightning-{MINE}", "a folder that does not exist is skipped"
    # Small measurements outlive the job.
    assert cache_folder() == root / "xdg/cellmap_lightning"
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(root / "mine"))
    assert region_folder() == root / "mine" / MINE
    assert cache_folder() == root / "mine"
    monkeypatch.setenv("CELLMAP_CACHE_DIR", "~/cache")
    assert region_folder() == root / "home/cache" / MINE


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("elsewhere", "ext4"),
        ("home/me", "nfs4"),
        ("home/me/fast/cache", "xfs"),
        ("scratch/x", "lustre"),  # mounted over what was there before
        ("two words\tand\\more", "cifs"),
        ("données/x", "beegfs"),
        ("dat", "ceph"),
        ("data", "ext4"),  # begins with the same letters as another mount
        ("bucket", "fuse.gcsfuse"),
        ("memory/not/there/yet", "tmpfs"),
    ],
)
def test_the_file_system_of_a_path(mounts, path, kind):
    root, file = mounts
    assert filesystem(root / path, file) == kind


def test_the_file_system_behind_a_link(mounts, tmp_path):
    root, file = mounts
    (tmp_path / "link").symlink_to(root / "scratch")
    assert filesystem(tmp_path / "link" / "x", file) == "lustre"
    assert filesystem(tmp_path, str(tmp_path / "no such file")) == ""


def test_the_file_system_of_a_name_that_is_not_utf_8(tmp_path):
    """A mount point in another encoding is not an error."""
    file = tmp_path / "mountinfo"
    file.write_bytes(b"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n23 22 0:9 / /mnt/\xe9\xff rw - nfs4 filer:/ rw\n")
    assert filesystem(tmp_path, str(file)) == "ext4"
    assert filesystem(Path(os.fsdecode(b"/mnt/\xe9\xff/x")), str(file)) == "nfs4"


def test_values_of_this_machine(tmp_path):
    assert not on_network(Path("/proc/self"))
    assert filesystem(Path("/proc/self")) == "proc"
    assert filesystem(Path("/")) not in ("", "proc")
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < available_memory() <= int(total.split()[1]) * 1024


@pytest.mark.parametrize("mode", ["auto", "disk"])
@pytest.mark.parametrize(
    ("folder", "kind"), [("home/me", "nfs4"), ("scratch", "lustre"), ("données", "beegfs"), ("bucket", "fuse.gcsfuse")]
)
def test_a_network_file_system_is_refused(mounts, monkeypatch, caplog, mode, folder, kind):
    root, file = mounts
    monkeypatch.setattr(location, "filesystem", partial(filesystem, mounts=file))
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(root / folder))
    with caplog.at_level(logging.INFO, logger="cellmap_lightning"):
        chosen = choose(mode, 1000)
    assert (chosen.folder, chosen.budget) == (None, 1000)
    assert "memory free" in chosen.why
    (record,) = caplog.records
    assert record.levelno == (logging.WARNING if mode == "disk" else logging.INFO)
    assert f"on a network file system ({kind})" in record.getMessage()
    assert str(root / folder) in record.getMessage()
    assert "memory" in record.getMessage()


@pytest.mark.parametrize("folder", ["home/me/fast", "elsewhere", "memory"])
def test_a_disk_of_this_machine_is_taken(mounts, monkeypatch, caplog, folder):
    root, file = mounts
    monkeypatch.setattr(location, "filesystem", partial(filesystem, mounts=file))
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(root / folder))
    with caplog.at_level(logging.INFO, logger="cellmap_lightning"):
        chosen = choose("disk", 1000)
    assert chosen == Location(root / folder / MINE, 1000, chosen.why)
    assert caplog.records == []
    assert chosen.folder.stat().st_mode & 0o777 == 0o700, "other users have no access"


def refused(caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="cellmap_lightning"):
        chosen = choose("disk", 1000)
    assert chosen.folder is None
    (record,) = caplog.records
    return record.getMessage()


def test_a_folder_that_cannot_be_created_is_refused(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "file"))
    assert "cannot be created (Not a directory)" in refused(caplog)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can change the owner of a folder")
def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch, caplog):
    """Another user could replace files under a running training."""
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path))
    (tmp_path / MINE).mkdir()
    os.chown(tmp_path / MINE, 12345, 12345)
    assert f"{tmp_path / MINE} belongs to another user" in refused(caplog)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path))
    (tmp_path / MINE).mkdir(mode=0o500)
    assert "cannot be written to" in refused(caplog)


def test_the_budget(tmp_path, monkeypatch):
    """Half of the free space and at most 200 GB; space of older regions is reusable; never more than there is."""
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path))
    for free, budget, held, expected in (
        (100, None, 0, 50),
        (100, None, 60, 80),
        (10**12, None, 0, MOST_DISK_BYTES),
        (10**12, 3 * 10**11, 0, 3 * 10**11),
        (100, 70, 0, 70),
        (100, 700, 0, 100),
        (100, 700, 50, 150),
        (0, None, 0, 0),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(10**13, 0, free))
        assert choose("disk", budget, held).budget == expected
    monkeypatch.setattr(location, "available_memory", lambda: 1000)
    assert choose("memory", None) == Location(None, 500, choose("memory", None).why)
    assert choose("memory", 300).budget == 300


def test_arguments():
    for mode in ("auto", "disk", "memory", "chunks", "none"):
        check_mode(mode, None)
        check_mode(mode, 1)
    with pytest.raises(CellMapError, match="cache must be one of auto, device, disk, memory, chunks, none, got 'ssd'"):
        check_mode("ssd", None)
    for budget in (0, -1, 1.5, True, "1GB"):
        with pytest.raises(CellMapError, match="cache_bytes must be a whole number of at least 1, got"):
            check_mode("auto", budget)


def test_resolved_paths_equal_realpath(tmp_path):
    """Inside the cache context and outside, with links at every depth, which are resolved again each time."""
    (tmp_path / "data" / "a" / "s0").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b").symlink_to("a")
    (tmp_path / "data" / "a" / "s1").symlink_to("s0")
    paths = [
        tmp_path / p for p in ("data/a/s0", "link/a/s0", "link/b/s0", "link/b/s1", "data/a/none", "link/../data/a")
    ]
    expected = [os.path.realpath(path) for path in paths]
    with metadata_cache():
        assert [identity_of(path) for path in paths] == expected
        assert [identity_of(path) for path in paths] == expected
        (tmp_path / "data" / "a" / "s0").rmdir()
        (tmp_path / "data" / "a" / "s0").symlink_to(tmp_path)
        assert identity_of(paths[0]) == str(tmp_path.resolve())
    assert [identity_of(path) for path in paths] == [os.path.realpath(path) for path in paths]
    assert identity_of(Path("/")) == "/"
