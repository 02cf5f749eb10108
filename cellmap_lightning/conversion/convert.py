"""Conversion of a volume to OME-NGFF, block by block: out of core, parallel, and resumable."""

import logging
import math
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from cellmap_lightning.conversion.empty_sections import report_empty_sections
from cellmap_lightning.conversion.journal import Block, ConversionJournal
from cellmap_lightning.conversion.label_like import MOST_VALUES, few_values, report_few_values
from cellmap_lightning.conversion.options import ConversionOptions
from cellmap_lightning.conversion.output import (
    begun,
    check_apart,
    check_output,
    is_complete,
    opened,
    record_of,
    write_parents,
)
from cellmap_lightning.errors import MetadataError, OutputError
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.images import read_image, replaced_values
from cellmap_lightning.io.label_ids import (
    BACKGROUND,
    UNANNOTATED,
    UNKNOWN,
    LabelIds,
    class_names,
    ids_of,
    unlisted_text,
)
from cellmap_lightning.io.label_values import read_labels, stored_ids
from cellmap_lightning.io.local_paths import expanded
from cellmap_lightning.io.ngff import Level, Multiscale, Note, report
from cellmap_lightning.io.ngff.notes import without_entry
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.writer import multiscale_attributes, write_group
from cellmap_lightning.prediction.blocks import BlockGrid
from cellmap_lightning.prediction.output_levels import OutputLevels
from cellmap_lightning.prediction.pyramid import Pyramid, plan_pyramid, units_left
from cellmap_lightning.prediction.quantize import StoredValues
from cellmap_lightning.runtime.scheduling import Scheduler, open_scheduler
from cellmap_lightning.runtime.thread_pool import default_workers

log = logging.getLogger(__name__)

#: Chunks along each axis of the blocks that are written at a time, and bytes of larger blocks of whole pages.
_CHUNKS_OF_A_BLOCK, _BLOCK_BYTES = 2, 1 << 27
#: Chunks that are read again and compared when an image is complete.
_VERIFIED = 16
#: Level of zstd.
COMPRESSION_LEVEL = 5


def convert(options: ConversionOptions) -> Path:
    """Convert a volume to OME-NGFF, and return the group that was written.

    A conversion that was interrupted is resumed by the same call, and replaced by one with other settings. The input is
    never written to.

    Raises:
        CellMapFileExistsError: the output exists, and is not an unfinished conversion; see ``overwrite``. Or another
            job writes to it.
        CellMapValueError: the output lies in the input, or the input in the output.
        OutputError: the written voxels are not those of the input.
        MetadataError: a label map lacks ids.
        CellMapError: the input cannot be read.

    Example:
        >>> convert(ConversionOptions(input="stack.tif", output="vol.zarr", voxel_size=[50, 4.6, 4.6]))
        PosixPath('vol.zarr')
    """
    output = expanded(str(options.output))
    image = _read(options)
    check_apart(output, image.path)
    level = image.finest
    workers = default_workers(options.workers, not open_reader(level).local)
    with open_scheduler(options.scheduler, workers, options.address) as scheduler:
        _convert(output, level, options, scheduler)
    write_parents(output, options.zarr_format)
    return output


def _read(options: ConversionOptions) -> Multiscale:
    """Return the image that is converted, after a report of what was assumed about its metadata."""
    try:
        image = read_image(options.input, options.overrides)
    except MetadataError as e:
        e.args = (without_entry(str(e)),)
        raise
    notes = [Note(note.kind, without_entry(note.text)) for note in image.notes if note.kind != "access"]
    # What is wrong with the voxel size is seen after the conversion, whose output is then in the way.
    again = ", with overwrite=True where the output exists already"
    for text in replaced_values(options.input, options.overrides):
        log.warning("%s: %s", options.input, text)
    report(image.path, [Note(n.kind, n.text + again if n.kind in ("scale", "unit") else n.text) for n in notes])
    return image


def _convert(output: Path, level: Level, options: ConversionOptions, scheduler: Scheduler) -> None:
    names = class_names(options.label_map)
    if not names:
        image = _Image(output, level, options, None)
        values = few_values(image.reader, image.grid) if image.may_be_labels else []
        if values:
            report_few_values(options.input, values)
            image = _Image(output, level, replace(options, pyramid="mode"), None)
        with begun(output, image.settings, options.overwrite) as journal:
            image.write(scheduler, journal)
        return
    settings = _source_settings(level, options) | {"masks": list(names)}
    check_output(output, settings, options.overwrite)
    _check_ids(level, options)
    with begun(output, settings, options.overwrite) as journal:
        for name in names:
            image = _Image(output / name, level, options, ids_of(options.label_map, name))
            if is_complete(image.path, image.settings):
                log.info("%s is complete", output / name)
                continue
            image.write(scheduler, opened(image.path, image.settings))
        write_group(output, {"cellmap": record_of(settings)}, options.zarr_format)
        journal.finish()
    report_empty_sections(output, names, options)


def _check_ids(level: Level, options: ConversionOptions) -> None:
    """Check that the label map lists all ids of the input, before anything is written.

    Raises:
        MetadataError: it does not; the message names all of them.
    """
    listed = dict(options.label_map)
    stored = stored_ids(level, options.input)
    unlisted = [i for i in stored if i not in listed and i != 0]
    named = [i for i, name in listed.items() if name not in (BACKGROUND, UNKNOWN)]
    if len(unlisted) == len(named) == 1 and named[0] not in stored:  # such as 255 for a mask of 0 and 1
        (right,), (wrong,) = unlisted, named
        pairs = [f"{right if i == wrong else i}: {name}" for i, name in listed.items()]
        raise MetadataError(
            f"{unlisted_text(options.input, unlisted)}; the id {wrong} of {listed[wrong]} does not occur in it, so "
            f"'classes={{{', '.join(pairs)}}}' is probably right"
        )
    if unlisted:
        pairs = [f"{i}: {name}" for i, name in listed.items()] + [f"{i}: NAME" for i in unlisted]
        example = f", as in 'classes={{{', '.join(pairs)}}}'" if len(pairs) <= MOST_VALUES else ""
        raise MetadataError(unlisted_text(options.input, unlisted) + example)


def _source_settings(level: Level, options: ConversionOptions) -> dict[str, Any]:
    """Return everything on which voxels of an output depend, apart from its blocks, as JSON."""
    reader = open_reader(level, options.input)
    stamp = reader.stamp((0, 0, 0), reader.shape)
    return options.settings | {"identity": repr(reader.identity()), "stamp": stamp}


class _Stored(StoredValues):
    """The type of the written voxels, and the rule of their pyramid: ``labels`` for the most frequent value."""

    def __init__(self, dtype: npt.DTypeLike, by_mode: bool) -> None:
        super().__init__("labels" if by_mode else "float32")
        self.dtype = np.dtype(dtype)


class _Image:
    """One image that is written, by threads or processes that each have a copy.

    Args:
        path: its group.
        level: the level of the input that becomes its first level.
        options: options of the conversion.
        ids: meaning of the ids of a label map for its class; None to copy values.
    """

    def __init__(self, path: Path, level: Level, options: ConversionOptions, ids: LabelIds | None) -> None:
        self.path, self.level, self.options, self.ids = path.absolute(), level, options, ids
        self.reader = open_reader(level, path.name)
        dtype = np.dtype(np.uint8) if ids is not None else self.reader.dtype
        shape = self.reader.shape
        self.pyramid = plan_pyramid(shape, level.scale) if options.pyramid != "none" else Pyramid(shape)
        is_ids = ids is not None or dtype.kind == "b" or (dtype.kind in "iu" and dtype.itemsize >= 4)
        by_mode = options.pyramid == "mode" or (options.pyramid == "auto" and is_ids)
        z, y, x = (min(options.chunks, n) for n in shape)
        #: Whether it is not known if the values are labels, whose coarser levels must not be means.
        self.may_be_labels = (
            self.pyramid.levels > 1 and options.pyramid == "auto" and dtype.kind in "iu" and not by_mode
        )
        self.grid = BlockGrid(
            level.lattice, (0, 0, 0), shape, block_of(shape, (z, y, x), self.reader.chunks, dtype.itemsize)
        )  # fmt: skip
        self.levels = OutputLevels(
            self.path, self.grid, _Stored(dtype, by_mode), (z, y, x), None, options.zarr_format, self.pyramid,
            COMPRESSION_LEVEL,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        return _Image, (self.path, self.level, self.options, self.ids)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything on which its voxels depend, and the levels that are written, as JSON."""
        source = _source_settings(self.level, self.options)
        return source | {"block": list(self.grid.block), "levels": self.pyramid.levels}

    def write(self, scheduler: Scheduler, journal: ConversionJournal) -> None:
        """Write all blocks that are not written yet, the rest of the pyramid, and then the metadata."""
        name = self.options.output if self.ids is None else f"{self.options.output}/{self.path.name}"
        size = " x ".join(f"{length:g}" for length in self.level.lattice.step)
        box = " ".join(f"{axis} {a:g}..{b:g}" for axis, (a, b) in self.level.lattice.box.as_dict().items())
        log.info(
            "%s: %s voxels of %s nm (z, y, x) as %s", name, list(self.reader.shape), size, self.levels.values.dtype
        )
        log.info("%s: box %s nm", name, box)
        for number in range(self.pyramid.levels):
            if not any((self.path / f"s{number}" / name).is_file() for name in (".zarray", "zarr.json")):
                self.levels.create("", number, None)
        blocks: list[Block] = [(0, number) for number in range(len(self.grid))]
        self._run(scheduler, journal, blocks, "s0")
        for number in range(1, self.pyramid.levels):
            left = units_left(self.grid, self.pyramid.factors(number), self.levels.chunks)
            self._run(scheduler, journal, [(number, *index) for index in left], f"s{number}")
        self._verify(self.levels.array(""))
        attributes = multiscale_attributes(
            self.path.name, self.grid.whole.step, self.grid.whole.origin, self.pyramid.levels,
            zarr_format=self.options.zarr_format, steps=self.pyramid.steps,
        )  # fmt: skip
        cellmap = self._annotation() | record_of(self.settings)
        write_group(self.path, attributes | {"cellmap": cellmap}, self.options.zarr_format)
        journal.finish()

    def _run(self, scheduler: Scheduler, journal: ConversionJournal, blocks: list[Block], title: str) -> None:
        """Write the blocks that are not written yet, and record them."""
        left = [block for block in blocks if block not in journal.done]
        done = scheduler.run(partial(_write, self, left), range(len(left)))
        bar = tqdm(done, f"{self.path.name}/{title}", len(left), unit="block", disable=None, leave=False)
        for number, _ in bar:
            journal.add(left[number])

    def copy(self, number: int) -> None:
        """Write a block, and the chunks of coarser levels that it determines."""
        start, shape = self.grid[number]
        box = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        self.levels.put_block("", number, self._read(box))

    def _read(self, box: tuple[slice, ...]) -> AnyArray:
        (z, y, x), (dz, dy, dx) = ([b.start for b in box], [b.stop - b.start for b in box])
        if self.ids is None:
            return self.reader.read((z, y, x), (dz, dy, dx))
        stored = read_labels(self.reader, (z, y, x), (dz, dy, dx))
        return self.ids.decode(stored, self.reader.name)

    def _verify(self, array: Any) -> None:
        """Compare evenly spaced chunks of the first level with the input, as deep as the input's chunks.

        Raises:
            OutputError: they differ.
        """
        deep = min(self.levels.chunks[0], self.reader.chunks[0])
        along = [range(0, n, c) for n, c in zip(array.shape, self.levels.chunks, strict=True)]
        count = math.prod(map(len, along))
        for number in np.unique(np.linspace(0, count - 1, _VERIFIED).astype(int)).tolist():
            index = np.unravel_index(number, [len(part) for part in along])
            start = [part[i] for part, i in zip(along, index, strict=True)]
            shape = (deep, *self.levels.chunks[1:])
            box = tuple(slice(a, min(a + n, end)) for a, n, end in zip(start, shape, array.shape, strict=True))
            if not np.array_equal(np.asarray(array[box]), self._read(box), equal_nan=array.dtype.kind == "f"):
                raise OutputError(
                    f"{self.path}: voxels {box} are not those of {self.options.input}: either was changed during the "
                    "conversion; convert again with overwrite=True"
                )

    def _annotation(self) -> dict[str, Any]:
        """Return CellMap's annotation attributes of a class; none for an image."""
        if self.ids is None:
            return {}
        encoding = {"absent": 0, "present": 1, "unknown": UNANNOTATED}
        kind = {"type": "semantic_segmentation", "encoding": encoding}
        return {"annotation": {"class_name": self.path.name, "annotation_type": kind}}


def _write(image: _Image, blocks: list[Block], number: int) -> list[int]:
    """Write one of some blocks."""
    level, *index = blocks[number]
    if level:
        z, y, x = index
        image.levels.make(level, "", (z, y, x))
    else:
        image.copy(index[0])
    return []


def block_of(shape: Shape, chunks: Shape, stored: Shape, itemsize: int) -> Shape:
    """Return the voxels of the blocks that are read and written at a time, in whole chunks of the output.

    A block holds whole chunks of the input, such as pages, which would otherwise be decoded several times, as far as
    it stays below `_BLOCK_BYTES`.

    Args:
        shape: voxels of the volume.
        chunks: voxels of a chunk of the output.
        stored: voxels of a chunk of the input.
        itemsize: bytes of a voxel.
    """
    counts = [
        max(1, min(-(-n // c), max(_CHUNKS_OF_A_BLOCK, -(-s // c))))
        for n, c, s in zip(shape, chunks, stored, strict=True)
    ]
    least = [min(count, _CHUNKS_OF_A_BLOCK) for count in counts]

    def nbytes() -> int:
        return math.prod(count * c for count, c in zip(counts, chunks, strict=True)) * itemsize

    if nbytes() > _BLOCK_BYTES and stored[0] <= chunks[0]:
        counts[0] = 1
    while nbytes() > _BLOCK_BYTES and counts[1:] != least[1:]:
        axis = max((1, 2), key=lambda axis: counts[axis] / least[axis])
        counts[axis] = max(least[axis], -(-counts[axis] // 2))
    z, y, x = (count * c for count, c in zip(counts, chunks, strict=True))
    return z, y, x
