"""Blocks of a prediction beside the annotation of one class of one crop, on the voxels of the prediction."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.crops.crop_box import CropBox, restricted
from cellmap_lightning.crops.encodings import LabelEncodings, Unknown
from cellmap_lightning.crops.id_labels import id_dtype, id_region
from cellmap_lightning.crops.image import choose_level
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.evaluation.numbering import Numbering
from cellmap_lightning.geometry.grids import covering_boxes
from cellmap_lightning.geometry.lattice import EDGE_TOLERANCE, Box, FloatArray, Lattice, Shape, box_map
from cellmap_lightning.geometry.resample import evaluate
from cellmap_lightning.io.meanings import ValuesSetting, meaning_of
from cellmap_lightning.io.ngff import Multiscale, read_multiscale
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.transforms.kinds.kind import UNKNOWN_ID

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

#: Shape of the blocks that are compared at a time, voxels.
BLOCK: Shape = (128, 256, 256)
#: Voxels of a crop in which connected components of a prediction are numbered in memory, at most.
MAX_NUMBERED = 1 << 29


@dataclass(frozen=True, eq=False)
class Block:
    """A box of voxels of a crop.

    Attributes:
        start: its first voxel, counted from the first voxel of the crop.
        truth: ids of the annotation ``[z, y, x]``, 0 where the class is absent and -1 where it is unannotated.
        predicted: mask of the voxels that are predicted to be of the class.
        ids: ids of the predicted objects, 0 outside of them; None for a prediction without ids.
        inner: the part without the halo.
    """

    start: Shape
    truth: Ids
    predicted: Mask
    ids: Ids | None = None
    inner: tuple[slice, ...] = ()


class Annotation:
    """The annotation of one class of one crop, read without raw; see docs/evaluation.md.

    Args:
        crop: folder of the crop, with a multiscale group per class.
        name: the class.
        voxel_size: voxel size at which it is read, nm (z, y, x), from which the level follows.
        unknown: the stored value of unannotated voxels, if the metadata do not define it; see `LabelOptions`.
        part: the part of the crop that is read, as if the annotation ended there; None for all of it.
        image: the label image, where it is not an OME-NGFF group in the folder.

    Attributes:
        box: the annotated box, nm.
        kind: type of annotation in the metadata, such as ``instance_segmentation``; empty without one.

    Raises:
        CellMapError: it cannot be read.

    Example:
        >>> annotation = Annotation(Path("jrc_a.zarr/recon-1/labels/groundtruth/crop1"), "mito", (8, 8, 8))
    """

    def __init__(
        self,
        crop: Path,
        name: str,
        voxel_size: Sequence[float],
        unknown: Unknown = "metadata",
        part: CropBox | None = None,
        image: Multiscale | None = None,
    ) -> None:
        label, image = f"{crop.name}/{name}", image or read_multiscale(crop / name)
        if part is not None:
            image = restricted(crop.name, {name: image}, part)[0][name]
        level = choose_level(image, voxel_size, label)
        encoding = LabelEncodings(crop.name, unknown).of(name, image, level)
        self._region = id_region(level, encoding, id_dtype({name: image}), label, ChunkCache())
        self._lattice = level.lattice
        self.box = image.finest.lattice.box
        annotation = image.attributes.get("cellmap", {}).get("annotation", {})
        self.kind = str(annotation.get("annotation_type", {}).get("type", ""))

    def read(self, lattice: Lattice, first: tuple[int, int, int], shape: Shape) -> Ids:
        """Return the ids of a box of some lattice: 0 where the class is absent, -1 where it is unannotated."""
        ids = np.empty(shape, self._region.dtype)
        amap = box_map(lattice, first, shape, self._lattice)
        evaluate(self._region, amap, ids, method="nearest", fill=UNKNOWN_ID)
        return ids.astype(np.int64)


def voxels_inside(lattice: Lattice, box: Box) -> tuple[Shape, Shape]:
    """Return the first voxel whose centre lies in a box, and their number along each axis, which may be 0."""
    lower = np.subtract(box.lower, lattice.origin) / lattice.step
    upper = np.subtract(box.upper, lattice.origin) / lattice.step
    first = np.clip(np.ceil(lower - EDGE_TOLERANCE), 0, lattice.shape).astype(int)
    # A centre on the upper edge belongs to the next box.
    end = np.clip(np.ceil(upper - EDGE_TOLERANCE), first, lattice.shape).astype(int)
    a, b, c = first.tolist()
    z, y, x = (end - first).tolist()
    return (a, b, c), (z, y, x)


class CropPair:
    """A class of a crop: its annotation, and a prediction that covers the crop; see docs/evaluation.md.

    Annotations are those at the level that a training at the voxel size of the prediction would read; each voxel of the
    prediction whose centre lies in the crop has the annotation of the nearest voxel.

    Args:
        prediction: the multiscale group of the predicted class.
        crop: folder of the crop, with a multiscale group per class.
        name: the class.
        threshold: probability from which a voxel is positive.
        unknown: the stored value of unannotated voxels, if the metadata do not define it; see `LabelOptions`.
        values: the meaning of the stored values of the prediction, see `meaning_of`.
        part: the part of the crop that is compared; None for all of it.

    Attributes:
        voxel_size: voxel size of the prediction, nm (z, y, x).
        shape: voxels of the prediction inside the crop.

    Raises:
        CellMapError: the prediction or the annotation cannot be read.

    Example:
        >>> pair = CropPair(Path("pred.zarr/mito"), Path("jrc_a.zarr/recon-1/labels/groundtruth/crop1"), "mito")
        >>> sum(int((block.truth > 0).sum()) for block in pair.blocks())
    """

    def __init__(
        self,
        prediction: Path,
        crop: Path,
        name: str,
        threshold: float = 0.5,
        unknown: Unknown = "metadata",
        values: ValuesSetting = "auto",
        part: CropBox | None = None,
    ) -> None:
        self.crop, self.name, self.threshold = crop, name, threshold
        self.label = f"{crop.name}/{name}"
        image = read_multiscale(prediction)
        self.meaning = meaning_of(image, f"{prediction}", values)
        # Chunks that hold the fill value alone are not stored; a file of 0 bytes is a damaged one.
        self._reader = open_reader(image.finest, f"{prediction}")
        self._lattice = image.finest.lattice
        self.voxel_size = self._lattice.step
        self.annotation = Annotation(crop, name, self.voxel_size, unknown, part)
        box = self.annotation.box
        self._first, self.shape = voxels_inside(self._lattice, box)
        if 0 in self.shape:
            raise CellMapValueError(
                f"{self.label}: no voxel centre of the prediction {prediction} lies in the crop's {box}; predict with "
                f"a voxel size below {[float(e) for e in box.extent]} nm"
            )

    def blocks(self, halo: int = 0) -> Iterator[Block]:
        """Yield the voxels of the crop in blocks.

        Args:
            halo: voxels by which blocks overlap their neighbours, inside the crop.
        """
        for corner, _ in covering_boxes(self.shape, BLOCK):
            low = [max(0, c - halo) for c in corner]
            high = [min(c + b + halo, n) for c, b, n in zip(corner, BLOCK, self.shape, strict=True)]
            block = self.block((low[0], low[1], low[2]), (high[0] - low[0], high[1] - low[1], high[2] - low[2]))
            inner = tuple(slice(c - start, c - start + b) for c, start, b in zip(corner, low, BLOCK, strict=True))
            yield replace(block, inner=inner)

    def block(self, start: Shape, shape: Shape) -> Block:
        """Return a box of the crop."""
        first: Any = tuple(np.add(self._first, start).tolist())
        truth = self.annotation.read(self._lattice, first, shape)
        stored = self._reader.read(first, shape)
        self.meaning.check(stored, self.label)
        present = self.meaning.present(stored, self.threshold)
        ids = np.where(present, stored, 0).astype(np.int64) if self.meaning.kind == "ids" else None
        return Block(start, truth, present, ids)

    def center(self, start: Shape, shape: Shape) -> FloatArray:
        """Return the centre of a box of the crop, nm."""
        middle = np.add(self._first, start) + np.subtract(shape, 1) / 2
        centre: FloatArray = np.asarray(self._lattice.origin) + middle * np.asarray(self.voxel_size)
        return centre

    def numbered(self, number: Numbering) -> Iterator[Block]:
        """Yield the voxels of the crop with ids of the predicted objects.

        A prediction that holds no ids is read as a whole, and ``number`` assigns them.

        Raises:
            CellMapValueError: the crop is too large for that.
        """
        if self.meaning.kind == "ids":
            yield from self.blocks()
            return
        if math.prod(self.shape) > MAX_NUMBERED:
            raise CellMapValueError(
                f"{self.label}: the prediction holds no ids, and the {math.prod(self.shape)} voxels of the crop are "
                f"too many to number their objects in memory (at most {MAX_NUMBERED}); write objects with "
                "cellmap-segment and evaluate these"
            )
        whole = self.block((0, 0, 0), self.shape)
        yield Block(whole.start, whole.truth, whole.predicted, np.asarray(number(whole.predicted), np.int64))

    @property
    def declares_instances(self) -> bool:
        """True if the metadata of the annotation declare instances."""
        return self.annotation.kind == "instance_segmentation"
