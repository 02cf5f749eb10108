"""Predictions written patch by patch from a custom inference loop, with the writers of cellmap-data's interface.

`PredictionWriter` does it under a Trainer, with overlapping patches, pyramids and restarts; here nothing is blended,
and each patch is on disk when its assignment returns.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, Subset

from cellmap_lightning.batches.arrays import ArraySpecs, parse_classes, parse_inputs
from cellmap_lightning.compat.array_writer import AnyArray, ImageWriter, as_numbers, check_axes, with_lead
from cellmap_lightning.crops.options import IntensityOptions, ReadOptions
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.datasets.renamed import renamed
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import LATTICE_TOLERANCE, Shape, vector
from cellmap_lightning.geometry.placement import Placement
from cellmap_lightning.io.meanings import Kind
from cellmap_lightning.io.store import local_path, parse_location
from cellmap_lightning.loading.dataloader import CellMapDataLoader
from cellmap_lightning.loading.options import LoaderOptions
from cellmap_lightning.prediction.blending import Tiling
from cellmap_lightning.prediction.block_patches import patch_placement
from cellmap_lightning.prediction.blocks import centred_voxels, output_lattice, parse_region
from cellmap_lightning.prediction.output_checks import check_apart
from cellmap_lightning.prediction.volumes import volumes_source
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)

#: Entries of a batch that are not written.
_METADATA = ("idx", "__metadata__")


class CellMapDatasetWriter(Dataset[dict[str, torch.Tensor]]):
    """The patches of a volume as a dataset, whose predictions are written at the same positions.

    Example:
        The interface is that of cellmap-data::

            with CellMapDatasetWriter(raw, "pred.zarr", ["mito"], inputs, {"output": spec}) as writer:
                for batch in writer.loader(batch_size=4):
                    writer[batch["idx"]] = {"output": model(batch["input"])}

    A position is an index from 0 to ``len(writer) - 1``, one for each voxel at which a patch may begin. The tiles among
    them, `writer_indices`, cover the whole output; along an axis the last tile ends at the upper edge and overlaps the
    one before it if the length is no multiple of a patch. A patch larger than the output is centred on it.

    The output arrays are ``<target_path>/<class>/s0``, see `ImageWriter`. They have the voxels of raw if the target has
    their size, and otherwise voxels that begin at raw's lower edge.

    Args:
        input_path: the raw multiscale group.
        target_path: the Zarr group to write, with one group per class.
        classes: the classes to write.
        input_arrays: ``{name: {"shape": voxels, "scale": nm}}`` (z, y, x) of the inputs, or one bare description.
        target_arrays: the same for the model's output, concentric with the inputs; one array.
        target_bounds: ``{target array: {axis: [lower, upper]}}`` in nm: the voxels whose centres are at least ``lower``
            and below ``upper``, so that bounds at the edges of voxels, and bounds that cellmap-data computes from the
            ``translation`` of voxels, select the same ones. Outside of the volume, raw is 0. None for the whole volume.
        raw_value_transforms: see `IntensityOptions`, with another default: as in cellmap-data, None returns stored
            values. A model that was trained on data with this package's default needs ``"auto"``.
        axis_order: ``zyx``.
        context: not used, as in cellmap-data.
        rng: not used, nothing is random.
        empty_value: value of voxels that are not written.
        overwrite: replace existing arrays, each when its first patch is written.
        device: not used, as in cellmap-data: batches are on the CPU.
        model_classes: the channels of the model's output, if it has more than ``classes``.
        dtype: type of a voxel.
        values: meaning of the values, see `ImageWriter`.
        max_workers: reading threads, see `ReadOptions`.
        raw_path: older name of ``input_path``.

    Attributes:
        target_array_writers: ``{target array: {class: ImageWriter}}``.

    Raises:
        CellMapFileExistsError: ``target_path`` contains other arrays.
        CellMapError: the arguments, the volume, or their combination are invalid.
    """

    #: Writes the patches of a class.
    image_writer: type[ImageWriter] = ImageWriter

    def __init__(
        self,
        input_path: str | None = None,
        target_path: str | None = None,
        classes: Sequence[str] | None = None,
        input_arrays: ArraySpecs | None = None,
        target_arrays: ArraySpecs | None = None,
        target_bounds: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
        *,
        raw_value_transforms: Any = None,
        axis_order: str = "zyx",
        context: Any = None,
        rng: Any = None,
        empty_value: float = 0,
        overwrite: bool = False,
        device: Any = None,
        model_classes: Sequence[str] | None = None,
        dtype: npt.DTypeLike = np.float32,
        values: Kind | None = None,
        max_workers: int | None = None,
        raw_path: str | None = None,
    ) -> None:
        input_path = renamed("input_path", input_path, raw_path=raw_path)
        if input_path is None or target_path is None or classes is None or target_arrays is None:
            raise CellMapTypeError("give input_path, target_path, classes, input_arrays and target_arrays")
        check_axes(axis_order)
        self.raw_path, self.target_path = str(input_path), str(target_path)
        check_apart(local_path(target_path), parse_location(input_path))
        self.classes = parse_classes(classes)
        self.model_classes = parse_classes(model_classes) if model_classes is not None else self.classes
        unknown = [name for name in self.classes if name not in self.model_classes]
        if unknown:
            raise CellMapKeyError(f"classes {unknown} are not among the model's {list(self.model_classes)}")
        targets = parse_inputs(target_arrays, "target_arrays", "output")
        if len(targets) != 1:
            raise CellMapValueError(
                f"target_arrays must be one array, got {list(targets)}, which would all be written to "
                f"{target_path}/<class>; use a writer for each"
            )
        self.array, target = next(iter(targets.items()))
        unknown_arrays = sorted(set(target_bounds or ()) - set(targets))
        if unknown_arrays:
            raise CellMapKeyError(
                f"target_bounds must be those of the target array {self.array!r}, got {unknown_arrays}"
            )

        volume = CellMapDataset(
            self.raw_path,
            input_arrays=input_arrays,
            # Sparse volumes store no chunks of zeros.
            read=ReadOptions(pad=True, max_workers=max_workers, missing_raw="fill"),
            intensity=IntensityOptions(raw_value_transforms=raw_value_transforms),
        )
        window = volume.crop.in_volume(target.window, target.flat)
        whole = output_lattice(window, volume.raw_box, [level.lattice for level in volume.levels.values()])
        self.lattice = whole
        if target_bounds:
            self.lattice = centred_voxels(whole, parse_region(dict(target_bounds[self.array])))
        tiling = Tiling(self.lattice.shape, window.shape, overlap=0)
        self._patch, self._lowest = window.shape, tiling.bounds()[0]
        placed = volume.crop.placed(patch_placement(tiling, self.lattice, window))
        self._dataset = volumes_source([placed], volume.layout, volume.seed)
        self.target_array_writers = {
            self.array: {
                name: self.image_writer(
                    f"{target_path}/{name}", name, self.lattice.step, self.lattice.box.as_dict(), window.shape,
                    overwrite=overwrite, dtype=dtype, fill_value=empty_value, values=values,
                )
                for name in self.classes
            }
        }  # fmt: skip
        if raw_value_transforms is None:
            log.info("%s: stored values are returned; raw_value_transforms='auto' maps them to [0, 1]", self.raw_path)

    # -- positions of patches

    @property
    def bounding_box(self) -> dict[str, list[float]]:
        """The edges of the output, ``{axis: [lower, upper]}``, nm."""
        return self.lattice.box.as_dict()

    @property
    def sampling_box(self) -> dict[str, list[float]]:
        """The lowest and the highest centre of a patch, ``{axis: [lower, upper]}``, nm."""
        return self._placement.centers.as_dict()

    @property
    def _placement(self) -> Placement:
        return self._dataset.crops[0].placement

    @cached_property
    def writer_indices(self) -> list[int]:
        """The positions of the tiles, in the order z, y, x."""
        return self._dataset.validation_indices

    @property
    def blocks(self) -> "Subset[dict[str, torch.Tensor]]":
        """The tiles as a dataset."""
        return Subset(self, self.writer_indices)

    def get_indices(self, chunk_size: Mapping[str, float]) -> list[int]:
        """Return positions every ``chunk_size`` nm along each axis, the last one at the end.

        Args:
            chunk_size: ``{axis: nm}``, at least a voxel.
        """
        strides = np.floor(vector(chunk_size, "chunk_size") / self.lattice.step + LATTICE_TOLERANCE).clip(1)
        z, y, x = strides.astype(int).tolist()
        placement = dataclasses.replace(self._placement, stride=(z, y, x))
        return [placement.tile(number) for number in range(placement.tile_count)]

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self._dataset)

    def get_center(self, idx: int) -> dict[str, float]:
        """Return the centre of the patch at a position, ``{axis: nm}``.

        Raises:
            CellMapIndexError: the position is out of range.
        """
        return self._dataset.get_center(idx)

    def _start(self, idx: int) -> Shape:
        """Return the first voxel of the patch at a position, as an index of the array."""
        crop, local = self._dataset.locate(idx)
        z, y, x = (a + b for a, b in zip(crop.placement.grid_index(local), self._lowest, strict=True))
        return z, y, x

    # -- reading

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """Return the inputs at a position, each ``[1, z, y, x]``, and ``idx``.

        Raises:
            CellMapIndexError: the position is out of range.
        """
        return self._dataset[idx]

    def loader(self, batch_size: int = 1, num_workers: int = 0, **kwargs: Any) -> CellMapDataLoader:
        """Return a loader of the tiles, in the order z, y, x.

        Args:
            batch_size: tiles per batch.
            num_workers: worker processes; the dataset reads with threads, so 0 is usually fastest.
            **kwargs: see `CellMapDataLoader`. Without ``options`` every process reads all tiles.
        """
        options: dict[str, Any] = {
            "tiles": range(self._dataset.tile_count), "options": LoaderOptions(rank=0, world=1)
        } | kwargs  # fmt: skip
        return self._loader(self._dataset, batch_size, num_workers, is_train=False, **options)

    def _loader(self, *args: Any, **kwargs: Any) -> CellMapDataLoader:
        return CellMapDataLoader(*args, **kwargs)

    # -- writing

    def __setitem__(self, idx: Any, arrays: Mapping[str, Any]) -> None:
        """Write the output of a model for the patch at a position, or for several.

        Args:
            idx: a position, or ``[N]`` of them, such as ``batch["idx"]``.
            arrays: ``{target array: [C, z, y, x]}`` with the channels of ``model_classes``, or ``{target array: {class:
                [z, y, x]}}``, or ``{class: [z, y, x]}``; for several positions ``[N, ...]``. An axis of length 1 may be
                missing. Inputs and ``idx`` of a batch are ignored.

        Raises:
            CellMapIndexError: a position is out of range.
            CellMapKeyError: a key is no target array and no class.
            CellMapTypeError: a value is a single number.
            CellMapValueError: an array has another shape, or there is nothing to write.
            OutputError: the disk is full or read-only.
        """
        positions = np.asarray(idx.cpu() if isinstance(idx, torch.Tensor) else idx)
        if positions.ndim > 1 or positions.dtype.kind not in "iu":
            raise CellMapTypeError(f"idx must be a whole number, or [N] of them, got {idx!r}")
        starts = [self._start(int(n)) for n in positions.reshape(-1)]
        lead = positions.shape
        parts = [(name, with_lead(v, leads, self._patch, name)) for name, v, leads in self._channels(arrays, lead)]
        if not parts:
            raise CellMapValueError(f"nothing to write: {sorted(arrays)} has none of {list(self.classes)}")
        for name, values in parts:
            writer = self.target_array_writers[self.array][name]
            for start, patch in zip(starts, values.reshape(len(starts), *self._patch), strict=True):
                writer.write(start, patch)

    def _channels(
        self, arrays: Mapping[str, Any], lead: tuple[int, ...]
    ) -> Iterator[tuple[str, AnyArray, list[tuple[int, ...]]]]:
        """Yield each class to write, its values, and the possible shapes before their spatial axes."""
        if not isinstance(arrays, Mapping):
            raise CellMapTypeError(f"arrays must be {{{self.array!r}: values}}, got {type(arrays).__name__}")
        by_class: dict[str, Any] = {}
        for key, value in arrays.items():
            if key == self.array and isinstance(value, Mapping):
                by_class |= value
            elif key == self.array:
                count, data = len(self.model_classes), as_numbers(value, key)
                leads = [(*lead, count), *([lead] if count == 1 else [])]
                data = with_lead(data, leads, self._patch, key).reshape(-1, count, *self._patch)
                for number, name in enumerate(self.model_classes):
                    if name in self.classes:
                        yield name, data[:, number], [data[:, number].shape[:1]]
            elif key not in (*_METADATA, *self._dataset.layout.inputs):
                by_class[key] = value
        for name, value in by_class.items():
            if name not in self.model_classes:
                raise CellMapKeyError(
                    f"{name!r} is neither the target array {self.array!r} nor one of {list(self.model_classes)}"
                )
            if name in self.classes:
                yield name, as_numbers(value, name), [lead, (*lead, 1)]

    # -- the end

    def close(self) -> None:
        """End the reading threads, and drop the cache. The writer can be used again."""
        self._dataset.close()

    def __enter__(self) -> "CellMapDatasetWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"CellMapDatasetWriter({self.target_path!r}: {list(self.classes)}, {plural(len(self), 'position')})"
