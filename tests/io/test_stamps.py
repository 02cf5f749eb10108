"""The stamp of a file changes whenever its content may have."""

import os
import shutil
import subprocess

import pytest

from cellmap_lightning.io import stamps
from cellmap_lightning.io.stamps import ABSENT, digest_of, file_stamp


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "0.0.0"
    path.write_bytes(b"old voxels")
    return path


def replaced(file, how):
    """Replace a file by one of equal size and modification time."""
    times = file.stat()
    other = file.parent / "other"
    other.write_bytes(b"new voxels")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    if how == "rename":
        other.replace(file)
    elif how == "in place":
        file.write_bytes(b"new voxels")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif how == "cp -p":
        subprocess.run(["cp", "-p", other, file], check=True)
    elif how == "copy2":
        file.unlink()
        shutil.copy2(other, file)
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (times.st_mtime_ns, times.st_size)
    assert file.read_bytes() == b"new voxels"


@pytest.mark.parametrize("how", ["rename", "in place", "cp -p", "copy2"])
def test_equal_time_and_size_do_not_hide_a_change(file, how):
    before = file_stamp(str(file))
    assert file_stamp(str(file)) == before
    replaced(file, how)
    assert file_stamp(str(file)) != before


@pytest.mark.parametrize("size", [0, 9, 11])
def test_a_change_of_size(file, size):
    before = file_stamp(str(file))
    file.write_bytes(bytes(size))
    assert file_stamp(str(file)) != before


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_link_that_leads_elsewhere(file, tmp_path, depth):
    """Also where the change is behind other links."""
    other = tmp_path / "other"
    os.link(file, other)  # the same inode, so that only the link tells them apart
    names = [tmp_path / f"link{n}" for n in range(depth)]
    for name, target in zip(names, [*names[1:], file], strict=True):
        name.symlink_to(target)
    before = file_stamp(str(names[0]))
    assert file_stamp(str(names[0])) == before
    names[0].unlink()
    names[0].symlink_to(other)
    assert file_stamp(str(names[0])) != before


def test_a_change_behind_links(file, tmp_path):
    (tmp_path / "b").symlink_to(file)
    (tmp_path / "a").symlink_to("b")
    before = file_stamp(str(tmp_path / "a"))
    replaced(file, "rename")
    assert file_stamp(str(tmp_path / "a")) != before


def test_a_folder_on_the_way_that_leads_elsewhere(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0").write_bytes(b"voxels")
        os.utime(tmp_path / name / "0", ns=(0, 0))
    (tmp_path / "s0").symlink_to("one")
    before = file_stamp(str(tmp_path / "s0/0"))
    (tmp_path / "s0").unlink()
    (tmp_path / "s0").symlink_to("two")
    assert file_stamp(str(tmp_path / "s0/0")) != before


@pytest.mark.parametrize(
    ("kind", "counts"),
    [("ext4", True), ("nfs4", True), ("fuseblk", True), ("", True), ("fuse", False), ("fuse.sshfs", False),
     ("fuse.rclone", False)],
)  # fmt: skip
def test_inodes_count_where_they_last(file, kind, counts, monkeypatch):
    """The kind of a file system stands in for its mount, which tests have no permission for."""
    monkeypatch.setattr(stamps, "filesystem", lambda path: kind)
    monkeypatch.setattr(stamps, "_masks", {})
    link = file.with_name("link")
    link.symlink_to(file)
    status = file.stat()
    for path in (file, link):
        inode, *others = stamps._PACKED.unpack_from(file_stamp(str(path)))
        assert inode == (status.st_ino if counts else 0)
        assert others == [status.st_ctime_ns, status.st_mtime_ns, status.st_size]


def test_stamps_of_missing_files(file, tmp_path):
    assert file_stamp(str(tmp_path / "no")) == file_stamp(str(file / "below")) == ABSENT
    (tmp_path / "dead").symlink_to("no")
    (tmp_path / "other dead").symlink_to("nowhere")
    stamps = {file_stamp(str(tmp_path / name)) for name in ("dead", "other dead", "no", file.name)}
    assert len(stamps) == 4


def test_a_digest_depends_on_every_part_and_its_place():
    parts = [[], [b"a"], [b"a", b"b"], [b"b", b"a"], [b"ab"], ["a"], [("a", 1)], [("a", 2)]]
    assert len({digest_of(some) for some in parts}) == len(parts)
    assert digest_of([b"a"]) == digest_of(iter([b"a"]))
