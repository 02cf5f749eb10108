"""Tests that every implementation of a volume format should pass; see `FormatConformance`."""

import hashlib
import multiprocessing
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.errors import CellMapError
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.array_reader import ArrayReader
from cellmap_lightning.io.formats.registry import find_format
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import NO_OVERRIDES, Multiscale, Overrides
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.store import parse_location

__all__ = ["FormatConformance"]

#: Seconds that a read in another process may take.
_PATIENCE = 60.0


class FormatConformance:
    """Tests of one volume format, collected by pytest from a subclass whose name begins with ``Test``.

    A subclass overrides `write`, and sets `overrides` if the format cannot store the voxel size.

    Example:
        >>> class TestMyFormat(FormatConformance):
        ...     def write(self, path, voxels):
        ...         my_library.save(path / "volume.my", voxels, voxel_size_nm=(8, 4, 4))
        ...         return path / "volume.my"
    """

    #: Settings with which the volume is read.
    overrides: Overrides = NO_OVERRIDES
    #: Voxel size in nm (z, y, x), and type and shape of the voxels that are written.
    voxel_size: tuple[float, float, float] = (8.0, 4.0, 4.0)
    dtype: str = "uint8"
    shape: tuple[int, int, int] = (20, 70, 90)

    def write(self, path: Path, voxels: AnyArray) -> Path:
        """Write a volume into an empty folder with a program that is not the reader under test.

        Args:
            path: the folder.
            voxels: ``[z, y, x]``.

        Returns:
            The location of the volume.
        """
        raise NotImplementedError

    def voxels(self, seed: int = 0) -> AnyArray:
        """Return different voxels for each seed, none of them 0."""
        return np.random.default_rng(seed).integers(1, 200, self.shape).astype(self.dtype)

    def image(self, path: Path) -> Multiscale:
        """Return the image at a location."""
        return read_image(str(path), self.overrides)

    def reader(self, path: Path) -> ArrayReader:
        """Return a reader of the finest level of the image at a location."""
        return open_reader(self.image(path).finest, "volume")

    # -- tests

    def test_the_format_is_found(self, tmp_path: Path) -> None:
        """The location is that of this format alone."""
        path = self.write(tmp_path, self.voxels())
        found = find_format(parse_location(path))
        assert found is not None
        assert found[0].matches(found[1])

    def test_the_geometry(self, tmp_path: Path) -> None:
        """Shape, type and voxel size are those that were written, and levels are listed finest first."""
        image = self.image(self.write(tmp_path, self.voxels()))
        level = image.finest
        assert level.lattice.shape == self.shape
        np.testing.assert_allclose(level.scale, self.voxel_size, rtol=1e-5)
        assert level.array.dtype == np.dtype(self.dtype)
        assert level.array.dtype.isnative
        sizes = [np.prod(level.scale) for level in image.present]
        assert sizes == sorted(sizes)
        assert len({str(level.path) for level in image.present}) == len(sizes)

    def test_the_chunk_grid(self, tmp_path: Path) -> None:
        """Files consist of whole chunks, and exist."""
        path = self.write(tmp_path, self.voxels())
        reader, array = self.reader(path), self.image(path).finest.array
        assert len(array.shape) == len(array.chunks) == len(array.files)
        assert all(f % c == 0 or f >= n for f, c, n in zip(array.files, array.chunks, array.shape, strict=True))
        indices = list(reader.files((0, 0, 0), self.shape))
        assert len(indices) == len(set(indices))
        assert all(reader.has_chunk(index) for index in indices)
        assert reader.missing_chunks((0, 0, 0), self.shape) == []
        if reader.local:
            assert len(reader.stored()) == len(indices)

    def test_boxes(self, tmp_path: Path) -> None:
        """Every box has the voxels that were written: the whole, single voxels, edges, and random boxes."""
        voxels = self.voxels()
        reader = self.reader(self.write(tmp_path, voxels))
        rng = np.random.default_rng(1)
        boxes: list[tuple[Any, Any]] = [((0, 0, 0), self.shape), (tuple(n - 1 for n in self.shape), (1, 1, 1))]
        for _ in range(20):
            start = tuple(int(rng.integers(0, n)) for n in self.shape)
            ends = zip(start, self.shape, strict=True)
            boxes.append((start, tuple(int(rng.integers(1, n - a + 1)) for a, n in ends)))
        for start, shape in boxes:
            expected = voxels[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
            box = reader.read(start, shape)
            assert box.flags.c_contiguous
            assert box.flags.writeable
            assert box.dtype == reader.dtype
            np.testing.assert_array_equal(box, expected)

    def test_threads(self, tmp_path: Path) -> None:
        """Many threads read at the same time."""
        voxels = self.voxels()
        reader = self.reader(self.write(tmp_path, voxels))
        barrier = threading.Barrier(4)

        def read(z: int) -> bool:
            if z < 4:
                barrier.wait(_PATIENCE)
            box = reader.read((z, 0, 3), (1, self.shape[1], self.shape[2] - 3))
            return bool((box == voxels[z : z + 1, :, 3:]).all())

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, range(self.shape[0])))

    def test_other_processes(self, tmp_path: Path) -> None:
        """A pickled reader reads the same, and so does a forked process if the format allows it."""
        voxels = self.voxels()
        reader = self.reader(self.write(tmp_path, voxels))
        np.testing.assert_array_equal(reader.read((0, 0, 0), self.shape), voxels)
        again: ArrayReader = pickle.loads(pickle.dumps(reader))
        np.testing.assert_array_equal(again.read((0, 0, 0), self.shape), voxels)
        assert again.identity() == reader.identity()
        source = reader.level.source
        if source is None or not source.forks or "fork" not in multiprocessing.get_all_start_methods():
            return
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=_send, args=(queue, reader, self.shape))
        process.start()
        process.join(_PATIENCE)
        assert process.exitcode == 0
        assert queue.get() == _digest(voxels)

    def test_stamps(self, tmp_path: Path) -> None:
        """Stamps are stable, and change when the volume is written again; the new voxels are read."""
        (tmp_path / "first").mkdir()
        path = self.write(tmp_path / "first", self.voxels())
        reader = self.reader(path)
        before = reader.stamp((0, 0, 0), self.shape)
        assert before == self.reader(path).stamp((0, 0, 0), self.shape)
        reader.read((0, 0, 0), (1, 1, 1))
        shutil.rmtree(tmp_path / "first")
        (tmp_path / "first").mkdir()
        new = self.voxels(2)
        assert self.write(tmp_path / "first", new) == path
        assert reader.stamp((0, 0, 0), self.shape) != before
        np.testing.assert_array_equal(self.reader(path).read((0, 0, 0), self.shape), new)

    def test_a_removed_volume(self, tmp_path: Path) -> None:
        """A volume that has disappeared is an error of this package, or shows in the missing chunks."""
        (tmp_path / "first").mkdir()
        reader = self.reader(self.write(tmp_path / "first", self.voxels()))
        shutil.rmtree(tmp_path / "first")
        try:
            reader.read((0, 0, 0), self.shape)
        except CellMapError:
            return
        assert reader.missing_chunks((0, 0, 0), self.shape)


def _send(queue: Any, reader: ArrayReader, shape: tuple[int, int, int]) -> None:
    queue.put(_digest(reader.read((0, 0, 0), shape)))


def _digest(voxels: AnyArray) -> str:
    return hashlib.sha256(voxels.tobytes()).hexdigest()


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
