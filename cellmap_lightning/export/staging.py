"""Outputs that appear complete or not at all."""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cellmap_lightning.errors import CellMapFileExistsError, OutputError
from cellmap_lightning.export.model_card import CARD


def check_output(out: Path, overwrite: bool) -> None:
    """Check that an export can be written.

    Raises:
        CellMapFileExistsError: there is another export, and it is not to be replaced; or something else.
    """
    if not os.path.lexists(out):
        return
    if not _is_export(out) or out.is_symlink():
        raise CellMapFileExistsError(f"out={out} exists and is not an export; give another path with out=...")
    if not overwrite:
        raise CellMapFileExistsError(f"out={out} exists; set overwrite=true to replace it, or give another out=...")


def _is_export(out: Path) -> bool:
    """Return True for a folder, or a zip file, that holds a description of an exported model."""
    if out.is_dir():
        return (out / CARD).is_file()
    if not out.is_file() or not zipfile.is_zipfile(out):
        return False
    with zipfile.ZipFile(out) as package:
        return CARD in package.namelist()


@contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside an output, and move its contents there when the block ends without an error.

    Args:
        out: the output: a folder, which takes the place of the yielded one; or a ``.zip`` file, which is the file of
            that name in it.
        overwrite: replace an earlier export.

    Raises:
        CellMapFileExistsError: see `check_output`.
        OutputError: the folder of ``out`` cannot be written to.
    """
    check_output(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as e:
        raise OutputError(f"out={out} cannot be written: {e.strerror}; give another path with out=...") from e
    try:
        content = folder / "content"
        content.mkdir()
        yield content
        check_output(out, overwrite)
        if os.path.lexists(out):
            out.replace(folder / "replaced")
        (content / out.name if out.suffix == ".zip" else content).replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
