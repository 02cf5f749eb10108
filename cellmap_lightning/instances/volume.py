"""Segmentation of a stored prediction, block by block.

1. Each block is segmented with its halo (`BlockTasks.label`), in any order and process.
2. The objects of neighbouring blocks are compared at their faces (`BlockTasks.join`).
3. Pairs become objects, which are filtered and numbered (`joining`): one process, no voxels.
4. Each block is written with its final ids, and the coarser levels (`BlockTasks.write`).
5. The rest of the pyramid, the metadata and the list of objects are written; the journal is removed.

A finished step of a block is a line of the journal, written after its files are on the disk. A run that was killed
continues with the other steps, and ends with the same bytes.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cellmap_lightning.errors import CellMapError, CellMapFileExistsError, CellMapValueError, OutputError
from cellmap_lightning.instances.block_tasks import BlockTasks
from cellmap_lightning.instances.joining import BlockNumbers, id_type, join_objects
from cellmap_lightning.instances.objects import write_objects
from cellmap_lightning.instances.options import SegmentationOptions, StorageOptions
from cellmap_lightning.instances.output import SegmentationOutput
from cellmap_lightning.instances.segmenter import BlockSegmenter
from cellmap_lightning.instances.source import SegmentationSource
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.prediction.blocks import BlockGrid
from cellmap_lightning.prediction.journal import journal_folder
from cellmap_lightning.prediction.output_checks import check_apart, write_failure
from cellmap_lightning.runtime.scheduling import Scheduler, SerialScheduler
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentationSummary:
    """The result of a segmentation.

    Attributes:
        output: the Zarr group.
        labels: the multiscale group of the class.
        table: the list of objects.
        objects: number of objects.
        blocks: number of blocks.
        resumed: number of blocks that were finished before.
        picture: the picture, if one was drawn.
    """

    output: Path
    labels: Path
    table: Path
    objects: int
    blocks: int
    resumed: int
    picture: Path | None = None


class VolumeSegmentation:
    """The segmentation of one class of a prediction; see docs/instances.md.

    Args:
        source: the prediction, from `open_source`.
        output: the Zarr group to write, ``segmentation.zarr``.
        options: the method and its parameters.
        storage: the options of the files.

    Raises:
        CellMapValueError: the method does not read this kind of prediction, or the output lies in the input.

    Example:
        >>> source = open_source("prediction.zarr", "mito")  # doctest: +SKIP
        >>> VolumeSegmentation(source, "segmentation.zarr", SegmentationOptions("watershed")).run()  # doctest: +SKIP
    """

    def __init__(
        self,
        source: SegmentationSource,
        output: str | Path,
        options: SegmentationOptions | None = None,
        storage: StorageOptions | None = None,
    ) -> None:
        options, self._storage = options or SegmentationOptions(), storage or StorageOptions()
        self._path = path = _local(output)
        if isinstance(source.path, Path):
            check_apart(path, source.path.parent)
        segmenter = BlockSegmenter.of(source, options)
        lattice = source.lattice
        block = self._storage.block_shape(lattice.shape, segmenter.halo, segmenter.voxel_bytes)
        grid = BlockGrid(lattice, (0, 0, 0), lattice.shape, block)
        raw = [level.scale for level in read_multiscale(source.path).levels] if not source.record["channels"] else []
        self._output = SegmentationOutput(path, source.name, grid, self._storage, raw[1:], source.annotation)
        self._source, self._segmenter, self._options, self._grid = source, segmenter, options, grid
        self._tasks = BlockTasks(
            source, segmenter, grid, path / journal_folder("segmentation"), path, self._output.chunks,
            self._output.shards, self._storage.zarr_format, self._output.pyramid,
        )  # fmt: skip

    @property
    def table(self) -> Path:
        """The list of objects, a CSV file beside the output."""
        return self._path.with_name(f"{self._path.stem}-objects.csv")

    def run(self, scheduler: Scheduler | None = None, report: Callable[[str], None] = log.info) -> SegmentationSummary:
        """Segment the volume, or the rest of it.

        Args:
            scheduler: executes the steps of blocks; by default in this process.
            report: prints a line about the progress.

        Raises:
            CellMapFileExistsError: the output is that of another segmentation, or something else.
            OutputError: the output cannot be written.
            CellMapValueError: there is no foreground for a watershed, or there are more objects than ids.
        """
        scheduler = scheduler or SerialScheduler()
        output = self._output
        output.open(self._settings(), self._storage.overwrite, self._storage.check_space)
        try:
            record = output.journal.record
            if record is not None:
                report(f"{output.path}: finished before, with {plural(record['objects'], 'object')}")
                return self._summary(record["objects"], len(self._grid))
            return self._run(scheduler, report)
        except CellMapValueError:
            output.discard(alone=True)  # it would block a segmentation with other parameters
            raise
        except OSError as e:
            if isinstance(e, CellMapError):
                raise
            raise OutputError(
                f"{output.path} cannot be written to: {write_failure(e)}. Finished blocks remain; run the same command "
                "again to resume"
            ) from e
        finally:
            output.close()

    def _run(self, scheduler: Scheduler, report: Callable[[str], None]) -> SegmentationSummary:
        output, journal, tasks = self._output, self._output.journal, self._tasks
        resumed = len(journal.finished)
        report(
            f"{output.path}: {self._segmenter.method} of {list(self._grid.shape)} voxels, in "
            f"{plural(len(self._grid), 'block')} of {list(self._grid.block)} with a halo of "
            f"{list(self._segmenter.halo)}"
        )
        self._check_input()
        stored = output.stored()
        if stored is None:
            self._step(scheduler, "labelled", tasks.label, report)
            self._step(scheduler, "joined", tasks.join, report)
            numbers = BlockNumbers.of(journal.reached("labelled"))
            objects = join_objects(numbers, tasks.files("faces"), tasks.files("pairs"), self._limits())
            self._check_seeds(numbers)
            where = f"{output.path / self._source.name}"
            unknown = self._unknown_voxels()
            output.store(objects, id_type(len(objects.measures), self._storage.ids, where, unknown > 0), unknown)
            del objects  # its measures are mapped from their files from here on
            stored = output.stored()
        if stored is None:
            raise OutputError(f"{output.path}: the joined objects were removed; start over with overwrite=True")
        dtype, measures = stored
        code = output.unknown_id
        count = len(measures)
        first = BlockNumbers.of(journal.reached("labelled")).first
        self._step(scheduler, "done", partial(_write, tasks, dtype.name, first.tolist(), code), report)
        output.remove_drafts()
        write_objects(self.table, self._source.name, measures, self._source.lattice)
        del stored, measures  # the files are removed with the journal
        output.finish(0, 1, lambda: None)
        report(f"{output.path}: {plural(count, 'object')}")
        return self._summary(count, resumed)

    def _check_input(self) -> None:
        """Check that the input of blocks that were segmented before has not changed.

        Raises:
            CellMapFileExistsError: it has.
        """
        for number, notes in self._output.journal.reached("labelled").items():
            if self._tasks.stamp(number) != notes[2]:
                raise CellMapFileExistsError(
                    f"{self._output.path}: {self._source.path} has changed since block {number} was segmented, so the "
                    "segmentation cannot be resumed; replace it with overwrite=True"
                )

    def _step(
        self,
        scheduler: Scheduler,
        word: str,
        step: Callable[[int], list[int]],
        report: Callable[[str], None],
    ) -> None:
        """Execute a step for the blocks that have not reached it, and record each in the journal."""
        journal = self._output.journal
        reached = journal.reached(word)
        left = [number for number in range(len(self._grid)) if number not in reached]
        if len(reached):
            report(f"{word}: {len(reached)} of {plural(len(self._grid), 'block')} before")
        for number, notes in scheduler.run(step, left):
            self._output.check_owned()
            journal.write(word, number, notes)
        report(f"{word}: {len(self._grid)} of {plural(len(self._grid), 'block')}")

    def _unknown_voxels(self) -> int:
        """Return the number of unannotated voxels of the input, from the notes of labelled blocks."""
        return sum(notes[3] for notes in self._output.journal.reached("labelled").values() if len(notes) > 3)

    def _limits(self) -> tuple[int, float]:
        """Return the least and the largest number of voxels of an object."""
        voxel, options = math.prod(self._source.lattice.step), self._options
        largest = math.inf if options.max_volume is None else math.floor(options.max_volume / voxel + 1e-9)
        return max(1, math.ceil(options.min_volume / voxel - 1e-9)), largest

    def _check_seeds(self, numbers: BlockNumbers) -> None:
        """Check that a watershed has found foreground.

        Raises:
            CellMapValueError: it has not.
        """
        if numbers.objects.any() or self._segmenter.method not in ("watershed", "agglomeration"):
            return
        options = self._segmenter
        raise CellMapValueError(
            f"{self._source.path}: there are no seeds: no voxel is foreground at threshold={options.threshold:g}; "
            f"use a {'higher' if options.kind == 'boundary' else 'lower'} threshold"
        )

    def _settings(self) -> dict[str, Any]:
        """Return everything that the stored bytes depend on, so that only the same segmentation is resumed."""
        output, lattice = self._output, self._source.lattice
        return {
            **self._source.record, "classes": list(output.classes), **self._segmenter.record,
            "voxel size": list(lattice.step), "translation": list(lattice.origin), "shape": list(lattice.shape),
            "zarr_format": output.zarr_format, "chunks": list(output.chunks),
            "shards": list(output.shards) if output.shards else None, "block": list(self._grid.block),
            "ids": self._storage.ids, "levels": output.levels,
            "pyramid factors": [list(step) for step in output.pyramid.steps],
        }  # fmt: skip

    def _summary(self, objects: int, resumed: int) -> SegmentationSummary:
        return SegmentationSummary(
            self._path, self._path / self._source.name, self.table, objects, len(self._grid), resumed
        )


def _local(output: str | Path) -> Path:
    """Return the path of an output.

    Raises:
        CellMapValueError: it is an address.
    """
    if "://" in str(output):
        raise CellMapValueError(
            f"{output}: segmentations are written to a folder of this machine, since blocks exchange files there; "
            "choose a path, and copy the finished group"
        )
    return Path(output)


def _write(tasks: BlockTasks, dtype: str, first: list[int], unknown_id: int | None, number: int) -> list[int]:
    """Write a block; see `BlockTasks.write`."""
    return tasks.write(number, dtype, first[number], unknown_id)
