"""Cache locations: folders and budgets for decoded voxels, and what the file systems allow."""

import logging
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cellmap_lightning.errors import CellMapKeyError
from cellmap_lightning.validation import int_at_least, one_of

log = logging.getLogger(__name__)

#: Cache decoded voxels on disk or in memory as fits the machine (``auto``), on a disk of this machine, in memory, only
#: the most recent chunks in the memory of each process, or not at all; ``device`` is ``auto`` here, and adds the memory
#: of the device that trains.
CacheMode = Literal["auto", "device", "disk", "memory", "chunks", "none"]
CACHE_MODES = ("auto", "device", "disk", "memory", "chunks", "none")
#: Default of the bytes on disk at most.
MOST_DISK_BYTES = 200 * 10**9
#: File systems shared by several machines: memory maps of their files are slow, and not coherent between machines.
_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fhgfs", "fuse.ceph", "fuse.glusterfs", "fuse.gcsfuse", "fuse.goofys",
    "fuse.lustre", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4",
    "panfs", "pvfs2", "smb", "smb3", "smbfs", "virtiofs", "wekafs",
}  # fmt: skip
#: Whether each device that was examined holds such a file system.
_devices: dict[int, bool] = {}


@dataclass(frozen=True)
class Location:
    """A cache location for decoded voxels.

    Attributes:
        folder: the folder on disk; None in memory.
        budget: bytes.
        why: reason for the choice, for the log.
    """

    folder: Path | None
    budget: int
    why: str


def check_mode(mode: Any, budget: Any) -> None:
    """Check a cache mode and its budget in bytes.

    Raises:
        CellMapKeyError: an unknown mode.
        CellMapValueError: ``budget`` is neither None nor a positive whole number.
    """
    one_of("cache", mode, CACHE_MODES, CellMapKeyError)
    if budget is not None:
        int_at_least("cache_bytes", budget, 1)


def cache_folder() -> Path:
    """Return the folder for small measurements: ``CELLMAP_CACHE_DIR``, else the user's cache folder."""
    folder = os.environ.get("CELLMAP_CACHE_DIR")
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cellmap_lightning"


def region_folder() -> Path:
    """Return the user's folder for decoded voxels: in ``CELLMAP_CACHE_DIR``, else in job scratch, else at home."""
    name = f"regions-{os.getuid() if hasattr(os, 'getuid') else 'me'}"
    if not os.environ.get("CELLMAP_CACHE_DIR"):
        for variable in ("SLURM_TMPDIR", "TMPDIR"):
            scratch = os.environ.get(variable)
            if scratch and Path(scratch).is_dir():
                return Path(scratch) / f"cellmap_lightning-{name}"
    return cache_folder() / name


def choose(mode: CacheMode, budget: int | None, held: int = 0) -> Location:
    """Choose the cache location for decoded voxels.

    Args:
        mode: see `CacheMode`; not ``chunks`` or ``none``.
        budget: bytes; by default half of the free space, on disk at most 200 GB.
        held: bytes of files in the folder that can be reused or evicted.
    """
    if mode in ("auto", "device", "disk"):
        folder = region_folder()
        refusal = _refusal(folder)
        if refusal is None:
            free = shutil.disk_usage(folder).free + held
            allowed = budget if budget is not None else min(free // 2, MOST_DISK_BYTES)
            return Location(folder, min(allowed, free), f"{free / 1e9:.1f} GB free there")
        if mode == "disk":
            log.warning(
                "cache=disk: %s, so decoded voxels are cached in memory instead; set CELLMAP_CACHE_DIR", refusal
            )
        else:
            log.info("decoded voxels are cached in memory: %s", refusal)
    free = available_memory()
    return Location(None, budget if budget is not None else free // 2, f"{free / 1e9:.1f} GB of memory free")


def _refusal(folder: Path) -> str | None:
    """Create a folder, and return the reason why memory-mapped files cannot be in it, or None."""
    if not sys.platform.startswith("linux"):
        return "files are shared between processes on Linux only"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as e:
        return f"{folder} cannot be created ({e.strerror})"
    if folder.stat().st_uid != os.getuid():
        return f"{folder} belongs to another user"
    if folder.stat().st_mode & 0o022:
        return f"others may write to {folder}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} cannot be written to"
    name = filesystem(folder)
    if name in _NETWORK:
        return f"{folder} is on a network file system ({name})"
    return None


def on_network(path: Path) -> bool:
    """Return whether a path is on a network file system, as far as the system reports it."""
    device = path.stat().st_dev
    if device not in _devices:  # cached, since thousands of arrays lie on one device
        _devices[device] = filesystem(path) in _NETWORK
    return _devices[device]


def filesystem(path: Path, mounts: str = "/proc/self/mountinfo") -> str:
    """Return the type of the file system that holds a path, such as ``ext4``; "" where it is not reported."""
    try:
        lines = os.fsdecode(Path(mounts).read_bytes()).splitlines()
    except OSError:
        return ""
    target = path.resolve()
    depth, kind = -1, ""
    for line in lines:
        before, _, after = line.partition(" - ")
        # The file escapes spaces and the like as octal numbers.
        name = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), os.fsencode(before.split()[4]))
        point = Path(os.fsdecode(name))
        # The deepest mount point counts; of several mounts on it, the last one hides the others.
        if target.is_relative_to(point) and len(point.parts) >= depth:
            depth, kind = len(point.parts), after.split()[0]
    return kind


def available_memory() -> int:
    """Return the available memory in bytes: of the machine, or of the control group (cgroup) if that has less."""
    free = 4 << 30  # where the system does not report it
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except OSError:
        pass
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return free
