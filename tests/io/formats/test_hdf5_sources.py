"""Parts of HDF5 datasets that are not stored are an error or follow the policies, and are never silently filled."""

import logging

import h5py
import numpy as np
import pytest

from cellmap_lightning.crops.image import CellMapImage
from cellmap_lightning.errors import ChunkError, MetadataError
from cellmap_lightning.io.formats.open_files import OPEN_FILES
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.io.readers import open_reader

VOXELS = np.random.default_rng(0).integers(1, 255, (32, 32, 32)).astype(np.uint8)
SIZE = Overrides(voxel_size=(8, 8, 8))


def partly_written(path, **options):
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("em", VOXELS.shape, "u1", fillvalue=7, **options)
        if dataset.chunks:
            dataset[:16] = VOXELS[:16]
    return path / "em"


def missing(path):
    level = read_image(str(path), SIZE).finest
    return open_reader(level, "v").missing_chunks((0, 0, 0), level.lattice.shape)


@pytest.mark.parametrize(
    ("options", "count"),
    [({"chunks": (16,) * 3}, 4), ({"chunks": (16, 32, 32), "compression": "gzip"}, 1), ({"chunks": (8, 24, 32)}, 4)],
)
def test_chunks_that_were_never_written(tmp_path, options, count):
    path = partly_written(tmp_path / "v.h5", **options)
    assert len(missing(path)) == count
    level = read_image(str(path), SIZE).finest
    reader = open_reader(level, "v")
    assert {index[0] * options["chunks"][0] for index in missing(path)} <= {16, 24}
    assert not reader.missing_chunks((0, 0, 0), (16, 32, 32))
    assert (reader.read((16, 0, 0), (16, 32, 32)) == 7).all()
    OPEN_FILES.close()  # HDF5 opens a file for reading or for writing
    with h5py.File(tmp_path / "v.h5", "r+") as file:
        file["em"][...] = VOXELS
    assert missing(path) == []


def test_a_dataset_without_chunks(tmp_path):
    assert len(missing(partly_written(tmp_path / "v.h5"))) == 1
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["em"] = VOXELS
        file.create_dataset("early", VOXELS.shape, "u1", chunks=(16,) * 3, fillvalue=7)[0, 0, 0] = 1
    assert missing(tmp_path / "w.h5" / "em") == []
    assert len(missing(tmp_path / "w.h5" / "early")) == 7


@pytest.mark.parametrize("chunks", [(16,) * 3, (16, 32, 32), None])
def test_raw_that_was_never_written_follows_missing_raw(tmp_path, chunks, caplog):
    path = partly_written(tmp_path / "v.h5", chunks=chunks)
    with h5py.File(tmp_path / "v.h5", "r+") as file:
        file["em"].attrs["resolution"] = [8, 8, 8]
    image = CellMapImage(str(path), "raw", (8, 8, 8), (32, 32, 32), missing_raw="error")
    center = dict.fromkeys("zyx", 128.0)
    with pytest.raises(ChunkError, match=r"raw: .*are not stored: chunk \d\.\d\.\d of \S+v\.h5.*missing_raw=warn"):
        image[center]
    with caplog.at_level(logging.WARNING):
        patch = CellMapImage(str(path), "raw", (8, 8, 8), (32, 32, 32), missing_raw="warn")[center]
    assert (patch[16:] == 7).all()
    assert "reads as the fill value" in caplog.text


def virtual(folder, sources, covered=32):
    """A virtual dataset of the halves in ``sources``: names of files and of datasets in them."""
    layout = h5py.VirtualLayout(VOXELS.shape, "u1")
    for number, (file, name) in enumerate(sources):
        part = slice(16 * number, min(16 * (number + 1), covered))
        shape = (part.stop - part.start, 32, 32)
        layout[part] = h5py.VirtualSource(file, name, shape=shape)
    with h5py.File(folder / "v.h5", "a") as file:
        file.create_virtual_dataset("em", layout, fillvalue=3)
    return folder / "v.h5" / "em"


def halves(folder):
    for number in range(2):
        with h5py.File(folder / f"part{number}.h5", "w") as file:
            file["d"] = VOXELS[16 * number : 16 * (number + 1)]
    return [("part0.h5", "d"), ("part1.h5", "d")]


@pytest.mark.parametrize("second", ["part1.h5", "absolute", "."])
def test_whole_virtual_datasets(tmp_path, monkeypatch, second):
    """Sources beside the file, by an absolute path, and in the same file; from any folder."""
    sources = halves(tmp_path)
    monkeypatch.chdir("/")
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["d"] = VOXELS[16:]
    name = str(tmp_path / "part1.h5") if second == "absolute" else second
    image = read_image(str(virtual(tmp_path, [sources[0], (name, "d")])), SIZE)
    np.testing.assert_array_equal(open_reader(image.finest).read((0, 0, 0), VOXELS.shape), VOXELS)
    assert not image.notes
    assert missing(tmp_path / "v.h5" / "em") == []


@pytest.mark.parametrize("lost", ["file", "dataset", "damaged", "deeper"])
def test_a_lost_source_is_named(tmp_path, lost):
    sources = halves(tmp_path)
    path = virtual(tmp_path, sources)
    if lost == "file":
        (tmp_path / "part1.h5").unlink()
    elif lost == "damaged":
        (tmp_path / "part1.h5").write_bytes(b"x" * 999)
    elif lost == "dataset":
        with h5py.File(tmp_path / "part1.h5", "r+") as file:
            file.move("d", "e")
    else:
        layout = h5py.VirtualLayout((16, 32, 32), "u1")
        layout[:] = h5py.VirtualSource("gone.h5", "d", shape=(16, 32, 32))
        with h5py.File(tmp_path / "part1.h5", "w") as file:
            file.create_virtual_dataset("d", layout)
    with pytest.raises(MetadataError, match="gone.h5" if lost == "deeper" else "part1.h5") as caught:
        read_image(str(path), SIZE)
    assert "the fill value would be read" in str(caught.value)


@pytest.mark.parametrize("kind", ["one source", "cut", "unwritten"])
def test_parts_without_a_source_are_a_warning(tmp_path, kind):
    sources = halves(tmp_path)
    if kind == "unwritten":
        with h5py.File(tmp_path / "part1.h5", "w") as file:
            file.create_dataset("d", (16, 32, 32), "u1", chunks=(8, 8, 8))
    path = virtual(tmp_path, sources[:1] if kind == "one source" else sources, 31 if kind == "cut" else 32)
    notes = [note.text for note in read_image(str(path), SIZE).notes]
    assert notes == ["parts of the virtual dataset em are not stored, and are read as its fill value 3"]
