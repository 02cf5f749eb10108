"""The output of a prediction: volumes ``<output>/<class>/s0..``, written block by block, and their pyramids.

A group has its multiscale metadata once it is complete, as all groups that `writer` writes, and the root group lists
its images once all of them are.
"""

import errno
import logging
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy.typing as npt
import zarr
import zarr.codecs

from cellmap_lightning.errors import CellMapError, CellMapFileExistsError, CellMapValueError, OutputError
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.io.object_folder import ObjectFolder, OutputPath, output_path, remove_tree
from cellmap_lightning.io.store import LISTING, Remote
from cellmap_lightning.io.writer import ZarrFormat, multiscale_attributes, write_group
from cellmap_lightning.prediction.blocks import BlockGrid
from cellmap_lightning.prediction.channels import Targets, channel_attributes
from cellmap_lightning.prediction.container import write_container
from cellmap_lightning.prediction.durable import flush, write_text
from cellmap_lightning.prediction.journal import Journal, input_hash, new_token, plain, record_checksum
from cellmap_lightning.prediction.object_lock import ObjectLock
from cellmap_lightning.prediction.output_checks import write_failure
from cellmap_lightning.prediction.output_levels import OutputLevels
from cellmap_lightning.prediction.output_lock import FILE, OutputLock, read_owner
from cellmap_lightning.prediction.pyramid import plan_pyramid, units_left, units_within
from cellmap_lightning.prediction.quantize import StoredValues

log = logging.getLogger(__name__)

#: A file in each group of an unfinished output, with the token of its journal.
TOKEN = ".cellmap-token"


def _empty(path: OutputPath) -> bool:
    return path.is_dir() and all(inside.name == FILE for inside in path.iterdir())


def _can_name(name: str) -> bool:
    """Return True if a name is possible for a group of the output, also on file systems that ignore case."""
    return bool(name) and "/" not in name and not name.startswith(".") and name.upper() != LISTING


class PredictionOutput:
    """The output of a prediction on disk, its journal and its lock; see docs/prediction.md.

    Args:
        path: the output, a Zarr group with one group per class; a path or an address.
        classes: names of the channels.
        grid: the voxels, in blocks.
        values: the conversion to stored values.
        chunks: voxels of a chunk.
        shards: voxels of a shard, for Zarr v3; None without shards.
        zarr_format: 2 or 3.
        levels: number of levels of the pyramid; None for as many as leave the longest axis 32 voxels.
        rank: rank of this process.
        raw: voxel sizes of raw's levels, which the pyramid follows; see `plan_pyramid`.
        targets: descriptions of channels; see `channels`.

    Raises:
        CellMapValueError: the arguments contradict each other.
    """

    #: The kind of the output, in its journal and in messages.
    work = "prediction"

    def __init__(
        self,
        path: str | os.PathLike[str] | Remote,
        classes: Sequence[str],
        grid: BlockGrid,
        values: StoredValues,
        chunks: Shape = (64, 64, 64),
        shards: Shape | None = None,
        zarr_format: ZarrFormat = 2,
        levels: int | None = None,
        rank: int = 0,
        raw: Sequence[Sequence[float]] = (),
        targets: Targets | None = None,
    ) -> None:
        invalid = [name for name in classes if not _can_name(name)]
        if invalid:
            raise CellMapValueError(
                f"classes {invalid} cannot be names of groups; choose names without / and leading ."
            )
        self.path = output_path(path)
        self.classes, self.grid, self.values, self.targets = tuple(classes), grid, values, targets or {}
        self.untrained: Collection[str] = ()
        self.chunks, self.shards = chunks, shards
        self.pyramid = plan_pyramid(grid.shape, grid.whole.step, levels, raw)
        self.levels = self.pyramid.levels
        self.zarr_format: ZarrFormat = zarr_format
        self.journal = Journal(self.path, rank, self.work)
        self._lock = ObjectLock(self.path) if isinstance(self.path, ObjectFolder) else OutputLock(self.path)
        self._rank = rank
        #: Token of the writing job, as first read by processes other than 0.
        self._owner: str | None = None
        self._settings: dict[str, Any] | None = None
        #: Folders that did not exist before this process began the output; None if it did not begin it.
        self._begun: list[Path] | None = None
        self._levels = OutputLevels(self.path, grid, values, chunks, shards, zarr_format, self.pyramid)

    @property
    def nbytes(self) -> int:
        """The bytes of all voxels of all levels, before compression."""
        voxels = sum(math.prod(self.pyramid.level_shape(level)) for level in range(self.levels))
        return len(self.classes) * voxels * self.values.dtype.itemsize

    # -- the beginning

    def open(self, settings: Mapping[str, Any], overwrite: bool = False, check_space: bool = True) -> None:
        """Create the groups, or open those of the same prediction. Called in one process, before the others read.

        From then on the output belongs to this job, until `close`.

        Args:
            settings: plain values that define the prediction; see `Journal.check`.
            overwrite: replace another prediction in the output.
            check_space: raise an error if the disk has less free space than the rest takes without compression.

        Raises:
            CellMapFileExistsError: the path contains something else, or another job writes there.
            OutputError: the disk is read-only, or has too little free space.
        """
        try:
            with self._clear_errors("cannot be begun"):
                self._open(settings, overwrite, check_space)
        except BaseException:
            if self._begun is None:  # otherwise `discard` releases it
                self._lock.release()
            raise

    def _open(self, settings: Mapping[str, Any], overwrite: bool, check_space: bool) -> None:
        if self.path.exists() and not _empty(self.path) and not self._replaceable(overwrite):
            raise CellMapFileExistsError(
                f"{self.path} exists and contains no {self.work} of this package, so it is not changed; choose another "
                "output"
            )
        folders = () if isinstance(self.path, ObjectFolder) else (self.path, *self.path.absolute().parents)
        begun = [folder for folder in folders if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._acquire()
        if overwrite or self.journal.removed_classes is not None:
            self._remove()
        self._settings = plain(settings)
        if self.journal.settings is not None:
            self.journal.check(settings, {key: settings[key] for key in ("raw metadata",) if key in settings})
            if self.journal.record is not None:
                self.journal.remove()  # files left by a kill
                self._remove_tokens()
                self._lock.release()
                return
            self._check_whole()
            self._sweep()
        else:
            self._begun = begun
            self.journal.remove()  # files left by a kill, of an output that was removed
        self.journal.make_folder()
        if check_space:
            self._check_space()
        if self.journal.settings is None:
            token = new_token()
            self._create(token)
            self.journal.begin(settings, token)  # last: a kill before it leaves an output that is created again

    def _replaceable(self, overwrite: bool) -> bool:
        """Return True if the output contains a prediction of this package."""
        try:
            return self.journal.folder.is_dir() or self.journal.record is not None
        except CellMapValueError:  # damaged
            if overwrite:
                return True
            raise

    def _acquire(self) -> None:
        """Acquire the lock, which a finished output on a read-only disk does not need."""
        try:
            self._lock.acquire()
        except CellMapError:
            raise
        except OSError as e:
            if e.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or self.journal.record is None:
                raise

    def close(self) -> None:
        """Release the output, so that other jobs can write to it."""
        self._lock.release()

    def check_owned(self) -> None:
        """Check that the output still belongs to this job.

        Raises:
            OutputError: it was removed, or another job has taken it over.
        """
        if self._rank == 0:
            self._lock.check()
            return
        owner = (read_owner(self.path) or {}).get("token")
        if self._owner is None:
            self._owner = owner
        elif owner != self._owner:
            raise OutputError(f"{self.path} was removed, or taken over by another job; this job stops")

    def _create(self, token: str) -> None:
        """Create all groups and their levels, and replace those that a kill has left of an earlier attempt."""
        attributes = self._root_attributes()
        (self.path / ".zmetadata").unlink(missing_ok=True)
        write_group(self.path, {"cellmap": attributes} if attributes else {}, self.zarr_format)
        for name in self.classes:
            if (self.path / name).exists():
                remove_tree(self.path / name)
            write_group(self.path / name, zarr_format=self.zarr_format)
            self._create_levels(name)
            write_text(self.path / name / TOKEN, token)

    def _create_levels(self, name: str) -> None:
        """Create the arrays of a group."""
        attributes = {"cellmap": self._attributes(name)} if self.values.kind == "labels" else None
        for level in range(self.levels):
            self._levels.create(name, level, attributes)

    @property
    def _created(self) -> bool:
        """True if the arrays of the groups exist."""
        return True

    def _check_whole(self) -> None:
        """Check that the groups belong to the journal, by their tokens.

        Raises:
            CellMapFileExistsError: a group was removed, or replaced.
        """
        file = "zarr.json" if self.zarr_format == 3 else ".zarray"
        for name in self.classes:
            try:
                token = (self.path / name / TOKEN).read_text(encoding="utf-8")
            except (OSError, ValueError):
                token = ""
            names = [f"s{level}" for level in range(self.levels if self._created else 0)]
            missing = [level for level in names if not (self.path / name / level / file).exists()]
            if missing or token != self.journal.token:
                change = f"lacks {missing[0]}" if missing else "was removed or replaced"
                raise CellMapFileExistsError(
                    f"{self.path / name} {change} since blocks of it were finished, so the {self.work} cannot be "
                    "resumed; replace it with overwrite=True"
                )

    def _remove_tokens(self) -> None:
        for name in self.classes:
            (self.path / name / TOKEN).unlink(missing_ok=True)

    def discard(self, alone: bool) -> None:
        """Remove the output if this process began it and no block of it is finished.

        Otherwise an empty output would block another prediction. Files from before are not removed.

        Args:
            alone: no other process writes to it. Otherwise the folder of the journal remains, so that the next
                prediction replaces files that the others may still write.
        """
        if self._begun is None or self.journal.finished:
            return
        begun, self._begun = self._begun, None
        try:
            self._remove()
            if alone:
                self.journal.remove()
        except OSError as e:
            log.warning("%s: no block was finished, and the unfinished output cannot be removed (%s)", self.path, e)
            return
        if alone:
            self._lock.release()
        for folder in begun if alone else ():
            with suppress(OSError):  # it contains other files by now
                folder.rmdir()
        log.info("%s: no block was finished, so the output is removed", self.path)

    def _root_attributes(self) -> dict[str, Any]:
        """Return CellMap's attributes of the root group."""
        return {"annotation": {"class_names": list(self.classes)}} if self.values.kind == "labels" else {}

    def _attributes(self, name: str) -> dict[str, Any]:
        """Return CellMap's attributes of a channel."""
        return channel_attributes(name, self.values, self.targets.get(name), name in self.untrained)

    def _remove(self) -> None:
        """Remove the files of an earlier prediction, and no others."""
        classes = self.journal.removed_classes
        if classes is None:
            try:
                if not self.journal.folder.is_dir() and self.journal.record is None:
                    return
                classes = list((self.journal.settings or {}).get("classes", ()))
            except CellMapValueError:  # damaged
                classes = []
        names = [name for name in dict.fromkeys([*classes, *self.classes]) if _can_name(name)]
        # First invalidate the finished blocks. The folder is removed last: it marks the rest as replaceable.
        self.journal.mark_removed(names)
        for name in (".zattrs", "zarr.json", ".zgroup", ".zmetadata"):
            (self.path / name).unlink(missing_ok=True)
        for name in (*names, LISTING):
            if (self.path / name).is_dir():
                remove_tree(self.path / name)
        self.journal.remove()
        self.journal.make_folder()

    def _sweep(self) -> None:
        """Remove temporary files that were not renamed before a kill."""
        if isinstance(self.path, ObjectFolder):
            return
        folders = [self.path, self.path / LISTING]
        for name in self.classes:
            folders += [self.path / name, self.path / name / "s0"]
            for number in self.journal.unfinished:
                folders += self._folders(self.path, name, number)
            if len(self.journal.finished) == len(self.grid):  # killed while the rest of the pyramid was built
                for level in range(1, self.levels):
                    folders += [Path(folder) for folder, _, _ in os.walk(self.path / name / f"s{level}")]
        for folder in folders:
            for path in (*folder.glob("*.partial"), *folder.glob("*.draft")):
                path.unlink(missing_ok=True)

    def _folders(self, path: Path, name: str, number: int) -> Iterator[Path]:
        """Yield the folders of the chunks of a block, and of the coarser chunks that it determines."""
        for level in range(self.levels):
            units = units_within(self.grid, number, self.pyramid.factors(level), self.shards or self.chunks)
            if units is None:
                return
            root = path / name / f"s{level}" / ("c" if self.zarr_format == 3 else "")
            for z, y in product(*(range(part.start, part.stop) for part in units[:2])):
                yield root / str(z) / str(y)

    def _check_space(self) -> None:
        if isinstance(self.path, ObjectFolder):
            return
        needed = self.nbytes * (1 - len(self.journal.finished) / len(self.grid))
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise OutputError(
                f"the {self.work} takes {needed / 1e9:.3g} GB before compression ({len(self.classes)} classes, "
                f"{self.values.kind}), and {self.path} has {free / 1e9:.3g} GB left; free some, predict a region, or "
                "disable this check with check_space=False"
            )

    # -- blocks

    def array(self, name: str, level: int = 0) -> zarr.Array[Any]:
        """Return the array of a level of a class."""
        return self._levels.array(name, level)

    def write(self, number: int, stored: npt.NDArray[Any], reached: Sequence[int], stamp: str = "-") -> None:
        """Write a block, flush it to the disk, and then record in the journal that it is done.

        Args:
            number: number of the block.
            stored: stored values, ``[C, z, y, x]``, see `StoredValues`.
            reached: number of voxels of each channel that reach the threshold.
            stamp: stamp of the chunks that were read for it.

        Raises:
            OutputError: the disk is full or read-only, and earlier blocks are unchanged; or the output no longer
                belongs to this job.
        """
        with self._clear_errors(f"cannot be written to at block {number}"):
            self.check_owned()
            self.journal.write("begun", number)
            files = []
            for name, channel in zip(self.classes, stored, strict=True):
                files += self._levels.put_block(name, number, channel)
            flush(files)
            self.check_owned()
            self.journal.write("done", number, reached, stamp)

    def skip(self, number: int, stamp: str = "-") -> None:
        """Record in the journal that a block without written chunks is done: its voxels are 0.

        Raises:
            OutputError: see `write`.
        """
        with self._clear_errors(f"cannot be written to at block {number}"):
            self.check_owned()
            self.journal.write("done", number, [0] * len(self.classes), stamp)

    def fractions(self) -> dict[str, float]:
        """Return the fraction of the finished voxels of each class that reach the threshold."""
        record = self.journal.record
        if record is not None:
            return {name: record["reached"][name] / math.prod(self.grid.shape) for name in self.classes}
        notes = self.journal.finished
        voxels = sum(math.prod(self.grid[number][1]) for number in notes)
        return {name: count / max(1, voxels) for name, count in self._reached(notes).items()}

    def _reached(self, notes: Mapping[int, Sequence[int]]) -> dict[str, int]:
        """Return the number of voxels of each class that reach the threshold, from the notes of blocks."""
        counts = [sum(along) for along in zip([0] * len(self.classes), *notes.values(), strict=True)]
        return dict(zip(self.classes, counts, strict=True))

    # -- the end

    def finish(
        self, rank: int, world: int, barrier: Callable[[], None], broadcast: Callable[[bool], bool] = bool
    ) -> bool:
        """Build the rest of the pyramids out of core, and write the metadata of the groups.

        Every process builds a part of each level.

        Args:
            rank: rank of this process.
            world: number of processes.
            barrier: waits for all processes.
            broadcast: returns the value of process 0 in all processes: on a network file system each might see another
                state, and one that continued alone would deadlock.

        Returns:
            True if all blocks are done, so that the output is finished.
        """
        unit = self.shards or self.chunks
        with self._clear_errors("cannot be finished"):
            barrier()  # all blocks are written
            if not broadcast(len(self.journal.finished) == len(self.grid)):
                return False
            if broadcast(self.journal.record is not None):
                return True
            for level in range(1, self.levels):
                self.check_owned()
                tasks = product(self.classes, units_left(self.grid, self.pyramid.factors(level), unit))
                for name, index in islice(tasks, rank, None, world):
                    self._levels.make(level, name, index)
                barrier()
            barrier()  # no process reads the journal after this
            if rank == 0:
                self._write_metadata()
                self._lock.release()
            barrier()
            return True

    def _write_metadata(self) -> None:
        """Write the metadata of the groups, with the record of the journal in the root; then remove the journal.

        If the process is killed in between, the next run resumes the prediction and writes them again.
        """
        self.check_owned()
        lattice = self.grid.lattice
        for name in self.classes:
            block = multiscale_attributes(
                name, lattice.step, lattice.origin, self.levels, zarr_format=self.zarr_format, steps=self.pyramid.steps
            )
            write_group(self.path / name, self._image_attributes(name, block), self.zarr_format)
        notes = self.journal.finished
        settings = self._settings or self.journal.settings
        record: dict[str, Any] = {"settings": settings, "blocks": len(notes), **self._counts(notes)}
        stamps = input_hash(self.journal.inputs)
        if stamps is not None:
            record["input"] = stamps
        record["checksum"] = record_checksum(record)
        attributes = {"cellmap": {**self._root_attributes(), self.work: record}}
        write_container(self.path, self.classes, lattice, self.values.dtype, attributes, self.zarr_format)
        if not isinstance(self.path, ObjectFolder):
            groups = [self.path, *(self.path / name for name in (*self.classes, LISTING))]
            flush(str(file) for group in groups for file in group.iterdir() if file.is_file() and file.name != FILE)
        self.journal.remove()
        self._remove_tokens()

    def _image_attributes(self, name: str, multiscale: dict[str, Any]) -> dict[str, Any]:
        """Return the attributes of the group of a class."""
        return {"cellmap": self._attributes(name), **multiscale}

    def _counts(self, notes: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        """Return what the record of the finished output counts, from the notes of its blocks."""
        return {"reached": self._reached(notes)}

    @contextmanager
    def _clear_errors(self, problem: str) -> Iterator[None]:
        """Turn errors of the file system into an `OutputError` that explains them."""
        try:
            yield
        except CellMapError:
            raise
        except OSError as e:
            remedy = "; choose another output, or make this place writable"
            if self._has_blocks():
                remedy = ". Finished blocks remain; run the same command again to resume"
            raise OutputError(f"{self.path} {problem}: {write_failure(e)}{remedy}") from e

    def _has_blocks(self) -> bool:
        """Return True if an earlier start, or this one, has begun the output."""
        try:
            return self.journal.settings is not None
        except (OSError, CellMapError):  # it cannot be read either
            return False
