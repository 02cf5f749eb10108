"""Pictures, pages and tables that this package writes beside an output, and their recognition.

They are replaced each time a command runs. A file of the same name that has another source is not.
"""

from collections.abc import Iterable
from pathlib import Path

from cellmap_lightning.errors import CellMapFileExistsError

#: Text in the metadata of pictures and pages.
MARK = "written by cellmap_lightning"
#: The name of the field for it in the metadata of a picture, as matplotlib's ``savefig`` takes it.
_FIELDS = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}
#: The beginnings of tables of scores, and of lists of links.
_BEGINNINGS = {
    ".csv": ("crop,class,usage,annotated_voxels,", "class,crop,status,usage,"),
    ".txt": ("sample 0 ",),
}  # fmt: skip


def picture_metadata(path: Path) -> dict[str, str] | None:
    """Return the metadata of a picture for ``savefig``; None for formats without any."""
    field = _FIELDS.get(path.suffix.lower())
    return None if field is None else {field: MARK}


def check_replaceable(files: Iterable[Path], where: str, remedy: str) -> None:
    """Check that files do not exist, or were written by this package.

    Args:
        files: the files that are about to be written.
        where: setting that names them, for the message, as ``out=preview.png``.
        remedy: end of the message.

    Raises:
        CellMapFileExistsError: one is something else.
    """
    for file in files:
        if file.exists() and not _is_own(file):
            raise CellMapFileExistsError(
                f"{where}: {file} exists already, and was not written by this command; it is not replaced: {remedy}"
            )


def _is_own(file: Path) -> bool:
    """Return True for a picture, page or table of this package."""
    if not file.is_file():
        return False
    content = file.read_bytes()
    beginnings = _BEGINNINGS.get(file.suffix.lower())
    if beginnings is None:
        return MARK.encode() in content
    return content.startswith(tuple(text.encode() for text in beginnings))
