"""Ways in which the files of a volume change without a change of their names, sizes or modification times."""

import os
import shutil
import zipfile
from pathlib import Path


def chunk_files(array: Path) -> list[Path]:
    """Return the chunk files of an array of Zarr v2, relative to it."""
    return sorted(p.relative_to(array) for p in array.rglob("*") if p.is_file() and p.name[0].isdigit())


def with_times(path: Path, like: os.stat_result) -> None:
    """Give a file the modification time of another."""
    os.utime(path, ns=(like.st_atime_ns, like.st_mtime_ns))


def edit_in_place(array: Path, content: Path) -> None:
    """Write the bytes of another array's chunks into the files of an array."""
    for name in chunk_files(array):
        times = (array / name).stat()
        (array / name).write_bytes((content / name).read_bytes())
        with_times(array / name, times)


def rename_over(array: Path, content: Path) -> None:
    """Replace the chunk files of an array by those of another, as ``rsync -a`` does."""
    for name in chunk_files(array):
        draft = array / ".draft"
        shutil.copyfile(content / name, draft)
        with_times(draft, (array / name).stat())
        draft.replace(array / name)


def retarget_chunks(array: Path, content: Path) -> None:
    """Have the links that are an array's chunks lead to those of another array."""
    for name in chunk_files(array):
        with_times(content / name, (array / name).stat())
        (array / name).unlink()
        (array / name).symlink_to(content / name)


def as_links(array: Path, store: Path) -> None:
    """Move the chunks of an array to a content store, and put links to them in their place."""
    for number, name in enumerate(chunk_files(array)):
        store.mkdir(exist_ok=True)
        (array / name).replace(store / str(number))
        (array / name).symlink_to(store / str(number))


def packed(folder: Path, archive: Path) -> None:
    """Write a zip file with all that a folder holds, without compression and with equal times."""
    draft = archive.with_name("draft.zip")
    with zipfile.ZipFile(draft, "w") as out:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                out.writestr(zipfile.ZipInfo(path.relative_to(folder.parent).as_posix()), path.read_bytes())
    draft.replace(archive)
    os.utime(archive, ns=(10**18, 10**18))
