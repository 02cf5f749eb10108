"""The volumes that a prediction writes: ``<output>/<class>/s0..``, block by block, and their pyramids at the end.

A group has its multiscale metadata once it is whole, as everything that `writer` writes, and the root group lists its
images once all of them are.
"""

import errno
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
import zarr.codecs

from cellmap_lightning.errors import CellMapError, CellMapFileExistsError, CellMapValueError, OutputError
from cellmap_lightning.volumes.blocks import BlockGrid
from cellmap_lightning.volumes.container import write_container
from cellmap_lightning.volumes.geometry import Shape
from cellmap_lightning.volumes.integrity import Encoded
from cellmap_lightning.volumes.journal import Journal, plain
from cellmap_lightning.volumes.plain import PlainChunks
from cellmap_lightning.volumes.pyramid import Units, coarser, plan_pyramid, units_left, units_within
from cellmap_lightning.volumes.store import LISTING
from cellmap_lightning.volumes.values import StoredValues
from cellmap_lightning.volumes.writer import (
    ZarrFormat,
    codec_of,
    create_level,
    downsample_mean,
    downsample_mode,
    multiscale_attributes,
    write_group,
)

log = logging.getLogger(__name__)

#: Of the compressor. At 5, probabilities of membranes take 5 % less room and six times as long: 32 MB/s on a core.
EFFORT = 2


def _empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _can_name(name: str) -> bool:
    """Whether a group of the output can have a name: not that of its list of images, whatever the file system."""
    return bool(name) and "/" not in name and not name.startswith(".") and name.upper() != LISTING


class PredictionOutput:
    """Where a prediction goes.

    Args:
        path: the output, a Zarr group with one group per class.
        classes: names of the channels.
        grid: the voxels, in blocks.
        values: how voxels are stored.
        chunks: voxels of a chunk.
        shards: voxels of a shard, for Zarr v3; None for none.
        zarr_format: 2 or 3.
        levels: levels of the pyramid; None for as many as leave the longest axis 32 voxels.
        rank: number of this process.
        raw: voxel sizes of raw's levels, which the pyramid follows; see `plan_pyramid`.

    Raises:
        CellMapValueError: the arguments contradict each other.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        classes: Sequence[str],
        grid: BlockGrid,
        values: StoredValues,
        chunks: Shape = (64, 64, 64),
        shards: Shape | None = None,
        zarr_format: ZarrFormat = 2,
        levels: int | None = None,
        rank: int = 0,
        raw: Sequence[Sequence[float]] = (),
    ) -> None:
        bad = [c for c in classes if not _can_name(c)]
        if bad:
            raise CellMapValueError(f"{bad} cannot be names of groups")
        self.path = Path(path)
        self.classes, self.grid, self.values = tuple(classes), grid, values
        self.chunks, self.shards = chunks, shards
        self.pyramid = plan_pyramid(grid.shape, grid.whole.step, levels, raw)
        self.levels = self.pyramid.levels
        self.zarr_format: ZarrFormat = zarr_format
        self.journal = Journal(self.path, rank)
        self._settings: dict[str, Any] | None = None
        #: Folders that did not exist before this process began the output; None where it did not.
        self._begun: list[Path] | None = None
        self._arrays: dict[tuple[str, int], zarr.Array[Any]] = {}
        self._coarser = downsample_mode if values.kind == "labels" else downsample_mean

    @property
    def nbytes(self) -> int:
        """Bytes of all voxels of all levels, before compression."""
        voxels = sum(math.prod(self.pyramid.level_shape(level)) for level in range(self.levels))
        return len(self.classes) * voxels * self.values.dtype.itemsize

    # -- the beginning

    def open(self, settings: Mapping[str, Any], overwrite: bool = False, check_space: bool = True) -> None:
        """Make the groups, or find those of the same prediction. One process does it, before the others read.

        Args:
            settings: what is predicted, plain values; see `Journal.check`.
            overwrite: replace another prediction that is there.
            check_space: refuse to begin where the disk has less room than the rest takes without compression.

        Raises:
            CellMapFileExistsError: something else is there.
            OutputError: the disk is read-only, or has too little room.
        """
        with self._clear_errors("cannot be begun"):
            if overwrite:
                self._remove()
            self._settings = plain(settings)
            if self.journal.settings is not None:
                self.journal.check(settings, self._assumed())
                if self.journal.record is not None:
                    self.journal.remove()  # what a kill has left of it
                    return
                self._sweep()
            elif self.path.exists() and not self.journal.folder.is_dir() and not _empty(self.path):
                raise CellMapFileExistsError(
                    f"{self.path} exists and holds no prediction of this package: it is neither added to nor removed; "
                    "choose another output"
                )
            if self.journal.settings is None:
                self._begun = [folder for folder in (self.path, *self.path.absolute().parents) if not folder.exists()]
                self.journal.remove()  # blocks that a kill has left of an output that is gone
            self.journal.folder.mkdir(parents=True, exist_ok=True)
            if check_space:
                self._check_space()
            if self.journal.settings is None:
                self._create()
                self.journal.begin(settings)

    def _create(self) -> None:
        """All groups, and their levels; what a kill has left of an earlier attempt is made anew."""
        about = self._about_all()
        (self.path / ".zmetadata").unlink(missing_ok=True)
        write_group(self.path, {"cellmap": about} if about else {}, self.zarr_format)
        for name in self.classes:
            if (self.path / name).exists():
                shutil.rmtree(self.path / name)
            write_group(self.path / name, zarr_format=self.zarr_format)
            for level in range(self.levels):
                self._level(name, level)

    def discard(self, alone: bool) -> None:
        """Remove the output if this process began it and no block of it is finished.

        Otherwise it would refuse another prediction although nothing is there. What was there before stays.

        Args:
            alone: no other process writes to it. Otherwise the folder of the journal stays, by which the next
                prediction replaces what the others may still write.
        """
        if self._begun is None or self.journal.finished:
            return
        begun, self._begun = self._begun, None
        try:
            self._remove()
            if alone:
                self.journal.remove()
        except OSError as e:
            log.warning("%s: no block was finished, and what was begun cannot be removed (%s)", self.path, e)
            return
        for folder in begun if alone else ():
            with suppress(OSError):  # something else is in it by now
                folder.rmdir()
        log.info("%s: no block was finished, so what was begun is removed", self.path)

    def _level(self, name: str, level: int) -> None:
        codec = codec_of("zstd", self.zarr_format, EFFORT)
        if self.zarr_format == 3:
            codec = [codec, zarr.codecs.Crc32cCodec()]
        attributes = {"cellmap": self._about(name)} if self.values.kind == "labels" else None
        create_level(
            self.path / name / f"s{level}", self.pyramid.level_shape(level), self.values.dtype, self.chunks,
            self.zarr_format, codec, self.shards, attributes=attributes,
        )  # fmt: skip

    def _assumed(self) -> dict[str, Any]:
        """Settings that an earlier state of this package did not write, as it always halved all axes."""
        steps = (self.journal.settings or {}).get("levels", 1) - 1
        return {"pyramid factors": [[2, 2, 2]] * steps}

    def _about_all(self) -> dict[str, Any]:
        """CellMap's attributes of the root group."""
        return {"annotation": {"class_names": list(self.classes)}} if self.values.kind == "labels" else {}

    def _about(self, name: str) -> dict[str, Any]:
        """CellMap's attributes of labels; of probabilities, what the numbers mean."""
        if self.values.kind == "labels":
            encoding = {"absent": 0, "present": 1, "unknown": 255}
            kind = {"type": "semantic_segmentation", "encoding": encoding}
            return {"annotation": {"class_name": name, "annotation_type": kind}}
        values = {"probability_1": 255} if self.values.kind == "uint8" else {}
        return {"prediction": {"class_name": name, **values}}

    def _remove(self) -> None:
        """Take away what an earlier prediction has written, and nothing else."""
        folder = self.journal.folder
        if not folder.is_dir() and self.journal.record is None:
            return
        try:
            classes = (self.journal.settings or {}).get("classes", self.classes)
        except CellMapValueError:
            classes = self.classes
        # First the files that mark a prediction as finished or resumable. The folder stays to the end: it marks the
        # rest as replaceable.
        folder.mkdir(exist_ok=True)
        for name in (".zattrs", "zarr.json", ".zgroup", ".zmetadata"):
            (self.path / name).unlink(missing_ok=True)
        (folder / "settings.json").unlink(missing_ok=True)
        for name in dict.fromkeys([*filter(_can_name, classes), *self.classes, LISTING]):
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
        self.journal.remove()
        folder.mkdir()

    def _sweep(self) -> None:
        """Remove what zarr had not finished writing when it was killed."""
        folders = [self.path, self.path / LISTING]
        for name in self.classes:
            folders += [self.path / name, self.path / name / "s0"]
            for number in self.journal.unfinished:
                folders += self._folders(name, number)
            if len(self.journal.finished) == len(self.grid):  # killed while what was left of the pyramid was built
                for level in range(1, self.levels):
                    folders += [Path(folder) for folder, _, _ in os.walk(self.path / name / f"s{level}")]
        for folder in folders:
            for path in folder.glob("*.partial"):
                path.unlink(missing_ok=True)

    def _folders(self, name: str, number: int) -> Iterator[Path]:
        """Where the files of a block lie, and those of the pyramid that it makes."""
        for level in range(self.levels):
            units = units_within(self.grid, number, self.pyramid.factors(level), self.shards or self.chunks)
            if units is None:
                return
            root = self.path / name / f"s{level}" / ("c" if self.zarr_format == 3 else "")
            for z, y in product(*(range(part.start, part.stop) for part in units[:2])):
                yield root / str(z) / str(y)

    def _check_space(self) -> None:
        left = 1 - len(self.journal.finished) / len(self.grid)
        needed = self.nbytes * left
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise OutputError(
                f"the prediction takes {needed / 1e9:.3g} GB before compression ({len(self.classes)} classes, "
                f"{self.values.kind}), and {self.path} has {free / 1e9:.3g} GB left; free some, predict a region, or "
                "go ahead with check_space=False"
            )

    # -- blocks

    def array(self, name: str, level: int = 0) -> zarr.Array[Any]:
        """A level of a class."""
        if (name, level) not in self._arrays:
            path = str(self.path / name / f"s{level}")
            self._arrays[name, level] = zarr.open_array(path, mode="r+", zarr_format=self.zarr_format)
        return self._arrays[name, level]

    def _files(self, name: str, level: int) -> PlainChunks:
        """The chunks of a level in Zarr v2."""
        return PlainChunks(self.array(name, level), str(self.path / name / f"s{level}"))

    def _coarse(self, name: str, level: int, box: tuple[slice, ...]) -> npt.NDArray[Any]:
        """A box of a level, from the first voxel of a chunk on and of whole voxels of the next level, made coarser."""
        array, step = self.array(name, level), self.pyramid.steps[level]
        if self.zarr_format == 3 or any(c % f for c, f in zip(self.chunks, step, strict=True)):
            return np.asarray(coarser(np.asarray(array[box]), self._coarser, step))
        # Chunk by chunk: each stays in the processor's cache from its decoding on.
        files = self._files(name, level)
        encoded = Encoded(files.codec.codec_id, math.prod(self.chunks) * self.values.dtype.itemsize)
        found = np.empty([(p.stop - p.start) // f for p, f in zip(box, step, strict=True)], self.values.dtype)
        along = [range(p.start, p.stop, c) for p, c in zip(box, self.chunks, strict=True)]
        for start in product(*along):
            chunk = tuple(slice(a, min(a + c, n)) for a, c, n in zip(start, self.chunks, array.shape, strict=True))
            voxels = files.read(chunk, encoded)
            if voxels is None:  # nothing but the fill value, or something that zarr-python says
                voxels = np.asarray(array[chunk])
            inside = voxels[tuple(slice(0, p.stop - a) for a, p in zip(start, box, strict=True))]
            here = tuple(slice((a - p.start) // f, None) for a, p, f in zip(start, box, step, strict=True))
            target = found[here][tuple(slice(0, n // f) for n, f in zip(inside.shape, step, strict=True))]
            target[...] = coarser(inside, self._coarser, step)
        return found

    def _put(self, name: str, level: int, units: Units, origin: Sequence[int], data: npt.NDArray[Any]) -> None:
        """Write whole chunks (or shards) of a level.

        Args:
            name: the class.
            level: the level.
            units: which.
            origin: the first voxel of ``data``.
            data: what they are made of, and perhaps more.
        """
        unit = self.shards or self.chunks
        boxes = [
            [slice(i * u, min((i + 1) * u, n)) for i in range(part.start, part.stop)]
            for part, u, n in zip(units, unit, self.pyramid.level_shape(level), strict=True)
        ]
        array = self.array(name, level)
        if self.zarr_format == 2:
            chunks = self._files(name, level)
            for box in product(*boxes):
                here = tuple(slice(p.start - o, p.stop - o) for p, o in zip(box, origin, strict=True))
                chunks.write([p.start // u for p, u in zip(box, unit, strict=True)], data[here])
            return
        whole = [slice(parts[0].start, parts[-1].stop) for parts in boxes]
        here = tuple(slice(p.start - o, p.stop - o) for p, o in zip(whole, origin, strict=True))
        array[tuple(whole)] = data[here]

    def _put_block(self, name: str, number: int, data: npt.NDArray[Any]) -> None:
        """Write a block of a class, and what of the pyramid it makes by itself."""
        start, _ = self.grid[number]
        for level in range(self.levels):
            units = units_within(self.grid, number, self.pyramid.factors(level), self.shards or self.chunks)
            if units is None:  # then there are none in coarser levels either
                return
            if level:
                data = coarser(data, self._coarser, self.pyramid.steps[level - 1])
            origin = [a // f for a, f in zip(start, self.pyramid.factors(level), strict=True)]
            self._put(name, level, units, origin, data)

    def write(self, number: int, stored: npt.NDArray[Any], reached: Sequence[int]) -> None:
        """Write a block and say that it is done.

        Args:
            number: which.
            stored: its voxels as they are stored, ``[C, z, y, x]``, see `StoredValues`.
            reached: how many of each channel reach the threshold.

        Raises:
            OutputError: the disk is full or read-only; the blocks before are untouched.
        """
        with self._clear_errors(f"cannot be written to at block {number}"):
            self.journal.write("begun", number)
            for name, channel in zip(self.classes, stored, strict=True):
                self._put_block(name, number, channel)
            self.journal.write("done", number, reached)

    def skip(self, number: int) -> None:
        """Say that a block is done of which nothing is written: its voxels are 0.

        Raises:
            OutputError: the disk is full or read-only.
        """
        with self._clear_errors(f"cannot be written to at block {number}"):
            self.journal.write("done", number, [0] * len(self.classes))

    def fractions(self) -> dict[str, float]:
        """The part of the finished voxels of each class that reach the threshold."""
        record = self.journal.record
        if record is not None:
            return {name: record["reached"][name] / math.prod(self.grid.shape) for name in self.classes}
        notes = self.journal.finished
        voxels = sum(math.prod(self.grid[number][1]) for number in notes)
        return {name: count / max(1, voxels) for name, count in self._reached(notes).items()}

    def _reached(self, notes: Mapping[int, Sequence[int]]) -> dict[str, int]:
        """How many voxels of each class reach the threshold, by what was noted of blocks."""
        counts = [sum(along) for along in zip([0] * len(self.classes), *notes.values(), strict=True)]
        return dict(zip(self.classes, counts, strict=True))

    # -- the end

    def _make(self, level: int, name: str, index: Shape) -> None:
        """Make a chunk of a level of the one before."""
        unit = self.shards or self.chunks
        start = [i * u for i, u in zip(index, unit, strict=True)]
        stop = [min(a + u, n) for a, u, n in zip(start, unit, self.pyramid.level_shape(level), strict=True)]
        step = self.pyramid.steps[level - 1]
        fine = tuple(slice(f * a, f * b) for a, b, f in zip(start, stop, step, strict=True))
        z, y, x = (slice(i, i + 1) for i in index)
        self._put(name, level, (z, y, x), start, self._coarse(name, level - 1, fine))

    def finish(
        self, rank: int, world: int, barrier: Callable[[], None], broadcast: Callable[[bool], bool] = bool
    ) -> bool:
        """Build what is left of the pyramids, out of core, and describe the groups: every process a part of each level.

        Returns:
            Whether all blocks are done, so that it could be finished.

        Args:
            rank: this process.
            world: how many there are.
            barrier: waits for all of them.
            broadcast: what process 0 gives, to all of them: on a network file system each might see another state, and
                one that went on alone would wait for the others for ever.
        """
        unit = self.shards or self.chunks
        with self._clear_errors("cannot be finished"):
            barrier()  # all have written what they had to
            if not broadcast(len(self.journal.finished) == len(self.grid)):
                return False
            if broadcast(self.journal.record is not None):
                return True
            if not broadcast(self.journal.complete):
                for level in range(1, self.levels):
                    tasks = product(self.classes, units_left(self.grid, self.pyramid.factors(level), unit))
                    for name, index in islice(tasks, rank, None, world):
                        self._make(level, name, index)
                    barrier()
            barrier()  # the journal, which ends now, is not read any more
            if rank == 0:
                self._describe()
            barrier()
            return True

    def _describe(self) -> None:
        """Write the metadata of the groups, and in those of the root what the journal holds; then end the journal.

        If the process is killed in between, the next run resumes the prediction and writes them again.
        """
        lattice = self.grid.lattice
        for name in self.classes:
            block = multiscale_attributes(
                name, lattice.step, lattice.origin, self.levels, zarr_format=self.zarr_format, steps=self.pyramid.steps
            )
            write_group(self.path / name, {"cellmap": self._about(name), **block}, self.zarr_format)
        notes = self.journal.finished
        record = {
            "settings": self._settings or self.journal.settings,
            "blocks": len(notes),
            "reached": self._reached(notes),
        }
        attributes = {"cellmap": {**self._about_all(), "prediction": record}}
        write_container(self.path, self.classes, lattice, self.values.dtype, attributes, self.zarr_format)
        self.journal.remove()

    @contextmanager
    def _clear_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except CellMapError:
            raise
        except OSError as e:
            raise OutputError(
                f"{self.path} {what}: {why_not_written(e)}. What is finished stays; the same command goes on from there"
            ) from e


def why_not_written(error: OSError) -> str:
    """In words, why a disk refuses."""
    return {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the quota is used up",
        errno.EROFS: "the disk is read-only",
        errno.EACCES: "it may not be written to",
        errno.EPERM: "it may not be written to",
    }.get(error.errno or 0, str(error))


def check_apart(output: Path, raw: Path) -> None:
    """What is read is never written to.

    Raises:
        CellMapValueError: one of them lies in the other.
    """
    a, b = output.absolute(), raw.absolute()
    if a == b or b in a.parents or a in b.parents:
        raise CellMapValueError(f"the output {output} and the raw volume {raw} must not lie in each other")
