"""Arrays that other programs wrote, read here and by zarr-python: equal, or refused by both.

The fixtures of other implementations are theirs, so they are not part of this project. Name a folder that holds them,
at any depth, and every array of three or more axes in it is compared:

    CELLMAP_FIXTURES=/data/zarr-fixtures pytest -n 0 tests/io/test_foreign_fixtures.py
"""

import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from cellmap_lightning.errors import CellMapError
from cellmap_lightning.io.chunk_names import check_chunk_names
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import Level, read_array
from cellmap_lightning.io.retrying import RetryPolicy
from tests.foreign import ramp, write_image

FOLDER = os.environ.get("CELLMAP_FIXTURES")


def arrays(folder):
    """Every folder that holds an array."""
    for file in sorted(p for name in (".zarray", "zarr.json") for p in Path(folder).rglob(name)):
        if file.name == ".zarray" or '"array"' in file.read_text(errors="replace"):
            yield file.parent, 2 if file.name == ".zarray" else 3


def by_zarr(path, zarr_format):
    """The whole array, or None where zarr-python refuses it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(zarr.open_array(path, mode="r", zarr_format=zarr_format)[...])
    except Exception:
        return None


def by_ours(path):
    """The whole array (z, y, x), or the error; None where it has fewer than three axes or is of another shape."""
    try:
        info = read_array(path)
        if info is None or len(info.shape) < 3 or any(n != 1 for n in info.shape[:-3]):
            return None
        n = len(info.shape)
        level = Level(path, path.name, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (n - 3, n - 2, n - 1), n)
        check_chunk_names(info)
        reader = ChunkReader(level, retry_policy=RetryPolicy(attempts=1))
        return reader.read((0, 0, 0), reader.shape)
    except CellMapError as e:
        return e


def compared(path, zarr_format):
    """``equal``, ``refused`` by both, ``refused here``, ``read here``, ``different``, or ``other shape``."""
    ours = by_ours(path)
    if ours is None:
        return "other shape"
    theirs = by_zarr(path, zarr_format)
    if isinstance(ours, CellMapError):
        return "refused" if theirs is None else f"refused here: {ours}"
    if theirs is None:
        return "read here"
    theirs = theirs.reshape(theirs.shape[-3:])
    same = np.array_equal(ours, theirs.astype(ours.dtype), equal_nan=ours.dtype.kind == "f")
    return "equal" if same else "different"


@pytest.mark.skipif(not FOLDER, reason="CELLMAP_FIXTURES names no folder of other programs' arrays")
def test_arrays_of_other_programs():
    outcomes = {path: compared(path, zarr_format) for path, zarr_format in arrays(FOLDER)}
    counts = Counter(outcome.partition(":")[0] for outcome in outcomes.values())
    print(dict(counts))
    assert counts, f"{FOLDER} holds no arrays"
    wrong = [f"{path}: {o}" for path, o in outcomes.items() if o.startswith(("different", "refused here", "read here"))]
    assert not wrong, "\n".join(wrong)


def test_the_comparison_itself(tmp_path):
    """With arrays of TensorStore and zarr-python, of both formats: right ones, and damaged ones."""
    data = ramp((20, 24, 28), "u2")
    for driver, zarr_format in (("zarr", 2), ("zarr3", 3)):
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{tmp_path}/ts{zarr_format}"}}
        array = tensorstore.open(spec, create=True, dtype="uint16", shape=data.shape).result()
        array.write(data).result()
        write_image(tmp_path / f"zarr{zarr_format}", data, zarr_format=zarr_format)
        write_image(tmp_path / f"cut{zarr_format}", data, zarr_format=zarr_format)
        chunk = tmp_path / f"cut{zarr_format}" / "s0" / ("0/0/0" if zarr_format == 2 else "c/0/0/0")
        chunk.write_bytes(chunk.read_bytes()[:9])
        zarr.create_array(f"{tmp_path}/flat{zarr_format}", shape=(5, 5), dtype="u1", zarr_format=zarr_format)
    found = {str(path.relative_to(tmp_path)): compared(path, fmt) for path, fmt in arrays(tmp_path)}
    assert found == {
        **dict.fromkeys(("ts2", "ts3", "zarr2/s0", "zarr3/s0"), "equal"),
        **dict.fromkeys(("cut2/s0", "cut3/s0"), "refused"),
        **dict.fromkeys(("flat2", "flat3"), "other shape"),
    }
