"""Conversion of a volume to OME-NGFF, block by block: out of core, with threads, and resumable."""

import itertools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from tqdm import tqdm

from cellmap_lightning.conversion.journal import Block, ConversionJournal
from cellmap_lightning.conversion.options import ConversionOptions
from cellmap_lightning.errors import CellMapFileExistsError, OutputError
from cellmap_lightning.geometry.grids import touched_cells
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.label_ids import UNANNOTATED, LabelIds, class_names, ids_of
from cellmap_lightning.io.label_values import read_labels
from cellmap_lightning.io.ngff import Level
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.writer import (
    codec_of,
    create_level,
    downsample_mean,
    downsample_mode,
    multiscale_attributes,
    write_group,
)
from cellmap_lightning.prediction.pyramid import Pyramid, plan_pyramid
from cellmap_lightning.runtime.thread_pool import default_workers

log = logging.getLogger(__name__)

#: Chunks along each axis of the blocks that a thread writes at a time.
_CHUNKS_OF_A_BLOCK = 2
#: Blocks that are read again and compared when an image is complete.
_VERIFIED = 16


def convert(options: ConversionOptions) -> Path:
    """Convert a volume to OME-NGFF, and return the group that was written.

    A conversion that was interrupted is resumed by the same call. The input is never written to.

    Raises:
        CellMapFileExistsError: the output exists, and is not an unfinished conversion of the same input.
        OutputError: the written voxels are not those of the input.
        CellMapError: the input cannot be read.

    Example:
        >>> convert(ConversionOptions(input="stack.tif", output="vol.zarr", voxel_size=[50, 4.6, 4.6]))
        PosixPath('vol.zarr')
    """
    output = Path(options.output).expanduser()
    level = read_image(options.input, options.overrides).finest
    names = class_names(options.label_map)
    if not names:
        _Image(output, level, options, None).write()
        return output
    if output.exists() and not any((output / name).exists() for name in names):
        raise CellMapFileExistsError(f"{output} exists already; choose another output")
    for name in names:
        if _is_complete(output / name):
            log.info("%s is complete", output / name)
            continue
        _Image(output / name, level, options, ids_of(options.label_map, name)).write()
    write_group(output, zarr_format=options.zarr_format)
    return output


def _is_complete(path: Path) -> bool:
    """Return whether an image of an interrupted conversion of several classes is complete."""
    return any((path / name).is_file() for name in (".zattrs", "zarr.json"))


class _Image:
    """One image that is written.

    Args:
        path: its group.
        level: the level of the input that becomes its first level.
        options: options of the conversion.
        ids: meaning of the ids of a label map for its class; None to copy values.
    """

    def __init__(self, path: Path, level: Level, options: ConversionOptions, ids: LabelIds | None) -> None:
        self.path, self.options, self.ids = path, options, ids
        self.reader = open_reader(level, path.name)
        self.lattice = level.lattice
        self.dtype = np.dtype(np.uint8) if ids is not None else self.reader.dtype
        plan = plan_pyramid(self.reader.shape, level.scale)
        self.pyramid = plan if options.pyramid != "none" else Pyramid(self.reader.shape)
        rule = options.pyramid
        is_ids = ids is not None or (self.dtype.kind in "iu" and self.dtype.itemsize >= 4)
        self.downsample: Callable[..., AnyArray] = (
            downsample_mode if rule == "mode" or (rule == "auto" and is_ids) else downsample_mean
        )
        settings = options.settings | {"identity": repr(self.reader.identity()), "stamp": self._stamp()}
        self.journal = ConversionJournal(path, settings)

    def _stamp(self) -> int:
        return self.reader.stamp((0, 0, 0), self.reader.shape)

    def write(self) -> None:
        """Write all levels that are not written yet, compare a part of the voxels, and then the metadata."""
        arrays = [self._array(number) for number in range(self.pyramid.levels)]
        workers = default_workers(self.options.workers, not self.reader.local)
        for number, array in enumerate(arrays):
            source = self._read if number == 0 else self._coarser(arrays[number - 1], self.pyramid.steps[number - 1])
            blocks = [block for block in self._blocks(number, array.shape) if block not in self.journal.done]

            def copy(block: Block, array: Any = array, source: Any = source) -> None:
                box = self._box(block, array.shape)
                array[box] = source(box)
                self.journal.add(block)

            pool = ThreadPoolExecutor(workers, "cellmap-convert")
            try:
                written = pool.map(copy, blocks)
                title = f"{self.path.name}/s{number}"
                list(tqdm(written, desc=title, total=len(blocks), unit="block", disable=None, leave=False))
            finally:
                pool.shutdown(cancel_futures=True)
        self._verify(arrays[0])
        scale, translation = self.lattice.step, self.lattice.origin
        attributes = multiscale_attributes(
            self.path.name, scale, translation, len(arrays), zarr_format=self.options.zarr_format,
            steps=self.pyramid.steps,
        )  # fmt: skip
        write_group(self.path, attributes | self._annotation(), self.options.zarr_format)
        self.journal.finish()

    def _array(self, number: int) -> Any:
        path, zarr_format = self.path / f"s{number}", self.options.zarr_format
        if any((path / name).is_file() for name in (".zarray", "zarr.json")):
            return zarr.open_array(str(path), mode="r+", zarr_format=zarr_format)
        shape = self.pyramid.level_shape(number)
        chunks = [min(self.options.chunks, n) for n in shape]
        return create_level(path, shape, self.dtype, chunks, zarr_format, codec_of("zstd", zarr_format))

    def _blocks(self, number: int, shape: Shape) -> Iterator[Block]:
        side = self.options.chunks * _CHUNKS_OF_A_BLOCK
        for z, y, x in itertools.product(*touched_cells((0, 0, 0), shape, (side,) * 3)):
            yield number, z, y, x

    def _box(self, block: Block, shape: Shape) -> tuple[slice, ...]:
        side = self.options.chunks * _CHUNKS_OF_A_BLOCK
        return tuple(slice(i * side, min((i + 1) * side, n)) for i, n in zip(block[1:], shape, strict=True))

    def _read(self, box: tuple[slice, ...]) -> AnyArray:
        (z, y, x), (dz, dy, dx) = ([b.start for b in box], [b.stop - b.start for b in box])
        if self.ids is None:
            return self.reader.read((z, y, x), (dz, dy, dx))
        stored = read_labels(self.reader, (z, y, x), (dz, dy, dx))
        return self.ids.decode(stored, self.reader.name)

    def _coarser(self, array: Any, factors: Shape) -> Callable[[tuple[slice, ...]], AnyArray]:
        def read(box: tuple[slice, ...]) -> AnyArray:
            fine = tuple(slice(b.start * f, b.stop * f) for b, f in zip(box, factors, strict=True))
            return self.downsample(np.asarray(array[fine]), factors)

        return read

    def _verify(self, array: Any) -> None:
        """Compare evenly spaced blocks of the first level with the input.

        Raises:
            OutputError: they differ.
        """
        blocks = list(self._blocks(0, array.shape))
        for number in np.unique(np.linspace(0, len(blocks) - 1, _VERIFIED).astype(int)).tolist():
            box = self._box(blocks[number], array.shape)
            if not np.array_equal(np.asarray(array[box]), self._read(box), equal_nan=self.dtype.kind == "f"):
                raise OutputError(
                    f"{self.path}: voxels {box} are not those of {self.options.input}: either was changed during the "
                    "conversion; remove the output and convert again"
                )

    def _annotation(self) -> dict[str, Any]:
        """Return CellMap's annotation attributes of a class; none for an image."""
        if self.ids is None:
            return {}
        encoding = {"absent": 0, "present": 1, "unknown": UNANNOTATED}
        kind = {"type": "semantic_segmentation", "encoding": encoding}
        return {"cellmap": {"annotation": {"class_name": self.path.name, "annotation_type": kind}}}
