"""Where decoded voxels may be kept, and how many bytes of them."""

import logging
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError

log = logging.getLogger(__name__)

#: On disk or in memory as fits the machine (``auto``), on a disk of this machine, in memory, the last chunks in the
#: memory of each process, or not at all.
CacheMode = Literal["auto", "disk", "memory", "chunks", "none"]
CACHE_MODES = ("auto", "disk", "memory", "chunks", "none")
#: Bytes on disk at most, when nothing else is said.
MOST_DISK_BYTES = 200 * 10**9
#: File systems whose files several machines see: a mapping of theirs is not coherent between machines, and slow.
_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fhgfs", "fuse.ceph", "fuse.glusterfs", "fuse.gcsfuse", "fuse.goofys",
    "fuse.lustre", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4",
    "panfs", "pvfs2", "smb", "smb3", "smbfs", "virtiofs", "wekafs",
}  # fmt: skip
#: Which devices hold such a file system, of those that were asked for.
_devices: dict[int, bool] = {}


@dataclass(frozen=True)
class Location:
    """Where decoded voxels are kept.

    Attributes:
        folder: on disk, where; None in memory.
        budget: bytes.
        why: what a log line says about the choice.
    """

    folder: Path | None
    budget: int
    why: str


def check_mode(mode: Any, budget: Any) -> None:
    """Refuse what is no mode, and what is no number of bytes.

    Raises:
        CellMapKeyError: an unknown mode.
        CellMapValueError: ``budget`` is neither None nor a positive whole number.
    """
    if mode not in CACHE_MODES:
        raise CellMapKeyError(f"cache is one of {', '.join(CACHE_MODES)}, got {mode!r}")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise CellMapValueError(f"cache_bytes must be a positive whole number of bytes, or null, got {budget!r}")


def cache_folder() -> Path:
    """The folder for small measurements: ``CELLMAP_CACHE_DIR``, else the user's cache folder."""
    given = os.environ.get("CELLMAP_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cellmap_lightning"


def region_folder() -> Path:
    """The user's own folder for decoded voxels: in ``CELLMAP_CACHE_DIR``, else in the job's scratch, else at home."""
    mine = f"regions-{os.getuid() if hasattr(os, 'getuid') else 'me'}"
    if not os.environ.get("CELLMAP_CACHE_DIR"):
        for name in ("SLURM_TMPDIR", "TMPDIR"):
            scratch = os.environ.get(name)
            if scratch and Path(scratch).is_dir():
                return Path(scratch) / f"cellmap_lightning-{mine}"
    return cache_folder() / mine


def choose(mode: CacheMode, budget: int | None, held: int = 0) -> Location:
    """Where to keep decoded voxels.

    Args:
        mode: see `CacheMode`; not ``chunks`` or ``none``.
        budget: bytes; by default half of what is free, on disk at most 200 GB.
        held: bytes in the folder that may be used again, or given up.
    """
    if mode in ("auto", "disk"):
        folder = region_folder()
        refusal = _refusal(folder)
        if refusal is None:
            free = shutil.disk_usage(folder).free + held
            allowed = budget if budget is not None else min(free // 2, MOST_DISK_BYTES)
            return Location(folder, min(allowed, free), f"{free / 1e9:.1f} GB free there")
        if mode == "disk":
            log.warning("cache=disk: %s, so decoded voxels are kept in memory instead; set CELLMAP_CACHE_DIR", refusal)
        else:
            log.info("decoded voxels are kept in memory: %s", refusal)
    free = available_memory()
    return Location(None, budget if budget is not None else free // 2, f"{free / 1e9:.1f} GB of memory free")


def _refusal(folder: Path) -> str | None:
    """Why mapped files cannot lie in a folder, or None; the folder is made."""
    if not sys.platform.startswith("linux"):
        return "files are shared between processes on Linux only"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as e:
        return f"{folder} cannot be made ({e.strerror})"
    if folder.stat().st_uid != os.getuid():
        return f"{folder} belongs to another user"
    if folder.stat().st_mode & 0o022:
        return f"others may write to {folder}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} cannot be written to"
    kind = filesystem(folder)
    if kind in _NETWORK:
        return f"{folder} is on a network file system ({kind})"
    return None


def on_network(path: Path) -> bool:
    """Whether a path is on a file system of other machines, as far as the system says."""
    device = path.stat().st_dev
    if device not in _devices:  # thousands of arrays lie on one
        _devices[device] = filesystem(path) in _NETWORK
    return _devices[device]


def filesystem(path: Path, mounts: str = "/proc/self/mountinfo") -> str:
    """The kind of file system that holds a path, such as ``ext4``; empty where the system does not say."""
    try:
        lines = os.fsdecode(Path(mounts).read_bytes()).splitlines()
    except OSError:
        return ""
    wanted = path.resolve()
    best, kind = -1, ""
    for line in lines:
        before, _, after = line.partition(" - ")
        # Spaces and the like stand there as octal numbers.
        name = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), os.fsencode(before.split()[4]))
        point = Path(os.fsdecode(name))
        # The last of the mounts on one place hides those before it.
        if wanted.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split()[0]
    return kind


def available_memory() -> int:
    """Bytes of memory that this process may still take: of the machine, or of its control group if that has less."""
    free = 4 << 30
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
