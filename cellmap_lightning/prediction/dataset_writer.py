"""Predictions written patch by patch from a loop of one's own: the writers of cellmap-data.

`PredictionWriter` does it under a Trainer, with patches that overlap, pyramids and restarts; here nothing is blended,
and each patch is on disk when it was assigned.
"""

import dataclasses
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch.utils.data import Dataset, Subset

from cellmap_lightning.batches.arrays import ArraySpecs, parse_classes, parse_inputs
from cellmap_lightning.crops.options import IntensityOptions, ReadOptions
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.datasets.renamed import renamed
from cellmap_lightning.errors import (
    CellMapFileExistsError,
    CellMapKeyError,
    CellMapTypeError,
    CellMapValueError,
    OutputError,
)
from cellmap_lightning.geometry.lattice import AXES, LATTICE_TOLERANCE, Lattice, Shape, to_vector, vector
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.io.meanings import (
    Kind,
    WrittenMeaning,
    check_kind,
    prediction_attributes,
    recorded_kind,
)
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.writer import codec_of, create_level, make_room, multiscale_attributes, write_group
from cellmap_lightning.loading.dataloader import CellMapDataLoader
from cellmap_lightning.prediction.blending import Tiling
from cellmap_lightning.prediction.block_patches import patch_placement
from cellmap_lightning.prediction.blocks import centred_voxels, output_lattice, parse_region
from cellmap_lightning.prediction.output import check_apart, why_not_written
from cellmap_lightning.prediction.volumes import volumes_source

log = logging.getLogger(__name__)

AnyArray = npt.NDArray[Any]

#: What a batch says of itself, which is not written.
_ABOUT = ("idx", "__metadata__")


class ImageWriter:
    """Patches of one class, written to a Zarr array by their centres.

    The array is made when the first patch is written, as OME-NGFF 0.4 in Zarr v2 with one level. One that is there with
    the same voxels is written to; another one is refused.

    Args:
        path: the multiscale group, such as ``predictions.zarr/mito``. Folders above it are made Zarr groups from the
            one that ends in ``.zarr`` on.
        target_class: name of the class.
        scale: voxel size, nm (z, y, x), or by axis.
        bounding_box: ``{axis: [lower, upper]}``, the edges of what is written, nm.
        write_voxel_shape: voxels of a patch (z, y, x), or by axis; also of a chunk.
        scale_level: 0.
        axis_order: ``zyx``.
        context: not used.
        overwrite: replace a Zarr group that is at ``path``, when the first patch is written.
        dtype: type of a voxel. Floats are rounded to whole numbers for an integer type.
        fill_value: value of what is not written.
        values: what the values mean, recorded in the metadata: ``probability``, ``scaled`` (probability 1 is the
            largest value of the type), ``mask`` or ``ids``. None to record what the written values show.

    Attributes:
        lattice: the voxels of the array.

    Raises:
        CellMapFileExistsError: something else is at ``path``.
        CellMapValueError: arguments that cannot be.
    """

    def __init__(
        self,
        path: str,
        target_class: str,
        scale: Mapping[str, float] | Sequence[float],
        bounding_box: Mapping[str, Sequence[float]],
        write_voxel_shape: Mapping[str, int] | Sequence[int],
        scale_level: int = 0,
        axis_order: str = "zyx",
        context: Any = None,
        overwrite: bool = False,
        dtype: npt.DTypeLike = np.float32,
        fill_value: float = 0,
        values: Kind | None = None,
    ) -> None:
        _check_axes(axis_order)
        if scale_level != 0:
            raise CellMapValueError(f"one level is written, s0; got scale_level={scale_level!r}")
        self.path = Path(path)
        self.target_class = target_class
        self.overwrite = bool(overwrite)
        self.dtype, self.fill_value = np.dtype(dtype), fill_value
        self.values = None if values is None else check_kind(values)
        window = Window(_by_axis(write_voxel_shape), _by_axis(scale))
        box = parse_region(dict(bounding_box))
        counts = np.ceil(box.extent / window.scale - LATTICE_TOLERANCE).astype(int).tolist()
        first = np.add(box.lower, window.scale / 2)
        self.write_voxel_shape = window.shape
        self.lattice = Lattice(to_vector(first), to_vector(window.scale), (counts[0], counts[1], counts[2]))
        self._lock = threading.Lock()
        self._array: zarr.Array[Any] | None = None
        self._meaning: WrittenMeaning | None = None
        if not self.overwrite:
            self._same()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_array": None, "_meaning": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def shape(self) -> dict[str, int]:
        """Voxels of the array, by axis."""
        return dict(zip(AXES, self.lattice.shape, strict=True))

    @property
    def bounding_box(self) -> dict[str, list[float]]:
        """The edges of what is written, ``{axis: [lower, upper]}``, nm."""
        return self.lattice.box.as_dict()

    def _same(self) -> bool:
        """Whether the array is there, of the same voxels.

        Raises:
            CellMapFileExistsError: there is another one.
        """
        if not (self.path / "s0").exists():
            return False
        level = read_multiscale(str(self.path)).finest
        if level.lattice.matches(self.lattice) and level.array.dtype == self.dtype:
            return True
        there, now = level.lattice, self.lattice
        raise CellMapFileExistsError(
            f"{self.path} holds {list(there.shape)} voxels of {list(there.step)} nm from {list(there.origin)} nm on, "
            f"{level.array.dtype}; now they are {list(now.shape)} of {list(now.step)} nm from {list(now.origin)} nm "
            f"on, {self.dtype}. Choose another path, or pass overwrite=True"
        )

    def _open(self) -> zarr.Array[Any]:
        if self._array is None:
            begun = not self.overwrite and self._same()
            if not begun:
                make_room(self.path, self.overwrite or not any(self.path.glob("*")))
                self._create()
            recorded = recorded_kind(read_multiscale(str(self.path)), str(self.path)) if begun else None
            self._meaning = WrittenMeaning(self.dtype, self.values, recorded, begun)
            self._array = zarr.open_array(str(self.path / "s0"), mode="r+", zarr_format=2)
        return self._array

    def _create(self) -> None:
        above = list(self.path.parents)
        roots = [n for n, folder in enumerate(above) if folder.suffix == ".zarr"]
        for folder in above[roots[-1] :: -1] if roots else []:
            write_group(folder)
        write_group(self.path)
        create_level(
            self.path / "s0", self.lattice.shape, self.dtype,
            [min(n, m) for n, m in zip(self.write_voxel_shape, self.lattice.shape, strict=True)], 2,
            codec_of("zstd", 2), fill_value=self.fill_value,
        )  # fmt: skip
        block = multiscale_attributes(self.target_class, self.lattice.step, self.lattice.origin, 1)
        write_group(self.path, {"cellmap": prediction_attributes(self.target_class, self.values, self.dtype), **block})

    def start(self, center: Mapping[str, float]) -> Shape:
        """First voxel of the patch around a centre, counted in the array.

        Raises:
            CellMapValueError: the patch would lie between the voxels.
        """
        lower = vector(center, "a centre") - np.multiply(self.write_voxel_shape, self.lattice.step) / 2
        exact = (lower - self.lattice.box.lower) / self.lattice.step
        found = np.rint(exact)
        if (np.abs(exact - found) > LATTICE_TOLERANCE).any():
            near = self.lattice.box.lower + (found + np.divide(self.write_voxel_shape, 2)) * self.lattice.step
            raise CellMapValueError(
                f"{self.path}: a patch of {list(self.write_voxel_shape)} voxels around {dict(center)} lies between the "
                f"voxels; one that lies on them is around {dict(zip(AXES, near.tolist(), strict=True))}"
            )
        z, y, x = found.astype(int).tolist()
        return z, y, x

    def write(self, start: Shape, values: AnyArray) -> None:
        """Write a patch from its first voxel on; what sticks out of the array is left out.

        Args:
            start: first voxel, counted in the array.
            values: ``[z, y, x]``.

        Raises:
            CellMapValueError: no part of it lies in the array, or its values are none of the array's type.
            OutputError: the disk is full or read-only.
        """
        inside = [(max(a, 0), min(a + n, m)) for a, n, m in zip(start, values.shape, self.lattice.shape, strict=True)]
        if any(a >= b for a, b in inside):
            raise CellMapValueError(
                f"{self.path}: a patch of {list(values.shape)} voxels at {list(start)} lies outside the "
                f"{list(self.lattice.shape)} voxels of the array"
            )
        part = values[tuple(slice(a - s, b - s) for (a, b), s in zip(inside, start, strict=True))]
        stored = self._stored(part)
        try:
            with self._lock:  # patches may share a chunk
                array = self._open()
                self._record(part)
                array[tuple(slice(a, b) for a, b in inside)] = stored
        except OSError as e:
            if isinstance(e, CellMapFileExistsError):
                raise
            raise OutputError(f"{self.path} cannot be written to: {why_not_written(e)}") from e

    def _record(self, values: AnyArray) -> None:
        """Record in the metadata what the values mean, before they are written, where that has changed."""
        if self._meaning is not None and self._meaning.add(values):
            block = prediction_attributes(self.target_class, self._meaning.kind, self.dtype)
            write_group(self.path, {"cellmap": block})

    def _stored(self, values: AnyArray) -> AnyArray:
        if self.dtype.kind not in "iu" or values.dtype.kind == "b":
            return values.astype(self.dtype, copy=False)
        info = np.iinfo(self.dtype)
        whole = np.rint(values) if values.dtype.kind == "f" else values
        if not (whole.min() >= info.min and whole.max() <= info.max):  # which NaN fails as well
            raise CellMapValueError(
                f"{self.path}: values from {values.min():g} to {values.max():g} cannot be stored as {self.dtype}"
            )
        return whole.astype(self.dtype)

    def __setitem__(self, center: Mapping[str, Any], values: Any) -> None:
        """Write a patch ``[z, y, x]`` around a centre in nm, or several of them around as many.

        Raises:
            CellMapTypeError: a single number.
            CellMapValueError: patches of another shape; see also `start` and `write`.
        """
        data = _numbers(values, self.target_class)
        several = any(np.ndim(v) for v in center.values())
        if not several:
            data = _shaped(data, [(), (1,)], self.write_voxel_shape, self.target_class)
            self.write(self.start(center), data.reshape(self.write_voxel_shape))
            return
        count = max(len(v) for v in center.values())
        data = _shaped(data, [(count,), (count, 1)], self.write_voxel_shape, self.target_class)
        for number, patch in enumerate(data.reshape(count, *self.write_voxel_shape)):
            self.write(self.start({a: float(v[number]) for a, v in center.items()}), patch)

    def __getitem__(self, center: Mapping[str, float]) -> torch.Tensor:
        """What is stored of the patch around a centre in nm; less of it where it sticks out of the array."""
        places = zip(self.start(center), self.write_voxel_shape, self.lattice.shape, strict=True)
        inside = tuple(slice(max(a, 0), min(a + n, m)) for a, n, m in places)
        with self._lock:
            return torch.from_numpy(np.asarray(self._open()[inside]))

    def __repr__(self) -> str:
        return f"ImageWriter({str(self.path)!r}, {self.target_class!r}, {list(self.lattice.step)} nm)"


class CellMapDatasetWriter(Dataset[dict[str, torch.Tensor]]):
    """The patches of a volume, read to predict from them, and written where they were read.

    In the words of cellmap-data::

        with CellMapDatasetWriter(raw, "pred.zarr", ["mito"], inputs, {"output": spec}) as writer:
            for batch in writer.loader(batch_size=4):
                writer[batch["idx"]] = {"output": model(batch["input"])}

    A position is an index from 0 to ``len(writer) - 1``, one for each voxel at which a patch may begin. The tiles among
    them, `writer_indices`, cover everything that is written; along an axis the last one lies at the end and overlaps
    the one before it where they do not divide. A patch that is larger than all that is written is centred.

    What is written are ``<target_path>/<class>/s0``, see `ImageWriter`: the voxels of raw where the target has their
    size, and otherwise voxels that begin at raw's lower edge.

    Args:
        input_path: the raw multiscale group.
        target_path: the Zarr group to write, one group per class in it.
        classes: the classes that are written.
        input_arrays: ``{name: {"shape": voxels, "scale": nm}}`` (z, y, x) of the inputs, or one bare description.
        target_arrays: the same of the model's output, concentric with the inputs; one array.
        target_bounds: ``{target array: {axis: [lower, upper]}}`` in nm: the voxels whose centres lie from ``lower`` on
            and before ``upper``, so that bounds which are edges of voxels, and bounds which cellmap-data takes from the
            ``translation`` of voxels, name the same ones. What lies outside the volume is predicted from 0. None for
            the whole volume.
        raw_value_transforms: see `CellMapDataset`, with another default: as in cellmap-data, None gives stored values.
            A model that was trained on data with this package's default needs ``"auto"``.
        axis_order: ``zyx``.
        context: not used, as in cellmap-data.
        rng: not used, nothing is random.
        empty_value: value of what is not written.
        overwrite: replace what is there, class by class when its first patch is written.
        device: not used, as in cellmap-data: batches are on the CPU.
        model_classes: the channels of the model's output, where it gives more than ``classes``.
        dtype: type of a voxel.
        values: what the values mean, see `ImageWriter`.
        max_workers: reading threads, see `CellMapDataset`.
        raw_path: older name of ``input_path``.

    Attributes:
        target_array_writers: ``{target array: {class: ImageWriter}}``.

    Raises:
        CellMapFileExistsError: something else is at ``target_path``.
        CellMapError: anything else that is wrong with the arguments, the volume, or their combination.
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
            raise CellMapTypeError("input_path, target_path, classes, input_arrays and target_arrays are needed")
        _check_axes(axis_order)
        self.raw_path, self.target_path = str(input_path), str(target_path)
        check_apart(Path(target_path), Path(input_path))
        self.classes = parse_classes(classes)
        self.model_classes = parse_classes(model_classes) if model_classes is not None else self.classes
        unknown = [name for name in self.classes if name not in self.model_classes]
        if unknown:
            raise CellMapKeyError(f"the model gives {list(self.model_classes)}, and no {unknown} that is to be written")
        targets = parse_inputs(target_arrays, "target_arrays", "output")
        if len(targets) != 1:
            raise CellMapValueError(
                f"target_arrays has {list(targets)}, which would all be written to {target_path}/<class>; use a writer "
                "for each"
            )
        self.array, target = next(iter(targets.items()))
        strange = sorted(set(target_bounds or ()) - set(targets))
        if strange:
            raise CellMapKeyError(f"target_bounds names {strange}, and the target array is {self.array!r}")

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
            log.info("%s is given as it is stored; raw_value_transforms='auto' maps it to [0, 1]", self.raw_path)

    # -- where patches lie

    @property
    def bounding_box(self) -> dict[str, list[float]]:
        """The edges of what is written, ``{axis: [lower, upper]}``, nm."""
        return self.lattice.box.as_dict()

    @property
    def sampling_box(self) -> dict[str, list[float]]:
        """Lowest and highest centre of a patch, ``{axis: [lower, upper]}``, nm."""
        return self._placement.centers.as_dict()

    @property
    def _placement(self) -> Placement:
        return self._dataset.crops[0].placement

    @cached_property
    def writer_indices(self) -> list[int]:
        """Positions of the tiles, in the order z, y, x."""
        return self._dataset.validation_indices

    @property
    def blocks(self) -> "Subset[dict[str, torch.Tensor]]":
        """The tiles as a dataset."""
        return Subset(self, self.writer_indices)

    def get_indices(self, chunk_size: Mapping[str, float]) -> list[int]:
        """Positions every ``chunk_size`` nm along each axis, the last at the end.

        Args:
            chunk_size: ``{axis: nm}``, at least a voxel.
        """
        strides = np.floor(vector(chunk_size, "chunk_size") / self.lattice.step + LATTICE_TOLERANCE).clip(1)
        z, y, x = strides.astype(int).tolist()
        placement = dataclasses.replace(self._placement, stride=(z, y, x))
        return [placement.tile(number) for number in range(placement.tile_count)]

    def __len__(self) -> int:
        """Number of positions."""
        return len(self._dataset)

    def get_center(self, idx: int) -> dict[str, float]:
        """Centre of the patch at a position, ``{axis: nm}``.

        Raises:
            CellMapIndexError: there is no such position.
        """
        return self._dataset.get_center(idx)

    def _start(self, idx: int) -> Shape:
        """First voxel of the patch at a position, counted in the array."""
        crop, local = self._dataset.locate(idx)
        z, y, x = (a + b for a, b in zip(crop.placement.place(local), self._lowest, strict=True))
        return z, y, x

    # -- reading

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """The inputs at a position, each ``[1, z, y, x]``, and ``idx``.

        Raises:
            CellMapIndexError: there is no such position.
        """
        return self._dataset[idx]

    def loader(self, batch_size: int = 1, num_workers: int = 0, **kwargs: Any) -> CellMapDataLoader:
        """The tiles in batches, in the order z, y, x.

        Args:
            batch_size: tiles of a batch.
            num_workers: worker processes; threads read, so that 0 is the fast way.
            **kwargs: see `CellMapDataLoader`. Without ``rank`` and ``world`` every process gets all tiles.
        """
        given: dict[str, Any] = {"tiles": range(self._dataset.tile_count), "rank": 0, "world": 1} | kwargs
        return self._loader(self._dataset, batch_size, num_workers, is_train=False, **given)

    def _loader(self, *args: Any, **kwargs: Any) -> CellMapDataLoader:
        return CellMapDataLoader(*args, **kwargs)

    # -- writing

    def __setitem__(self, idx: Any, arrays: Mapping[str, Any]) -> None:
        """Write what a model gives for the patch at a position, or for several.

        Args:
            idx: a position, or ``[N]`` of them, such as ``batch["idx"]``.
            arrays: ``{target array: [C, z, y, x]}`` with the channels of ``model_classes``, or ``{target array: {class:
                [z, y, x]}}``, or ``{class: [z, y, x]}``; for several positions ``[N, ...]``. An axis of length 1 may be
                missing. Inputs and ``idx`` of a batch may be among them, and are passed over.

        Raises:
            CellMapIndexError: there is no such position.
            CellMapKeyError: something that is no target array and no class.
            CellMapTypeError: a single number.
            CellMapValueError: arrays of another shape, or nothing to write.
            OutputError: the disk is full or read-only.
        """
        positions = np.asarray(idx.cpu() if isinstance(idx, torch.Tensor) else idx)
        if positions.ndim > 1 or positions.dtype.kind not in "iu":
            raise CellMapTypeError(f"a position is a whole number, or several are [N] of them, got {idx!r}")
        starts = [self._start(int(n)) for n in positions.reshape(-1)]
        lead = positions.shape
        parts = [(name, _shaped(v, leads, self._patch, name)) for name, v, leads in self._channels(arrays, lead)]
        if not parts:
            raise CellMapValueError(f"nothing to write: {sorted(arrays)} holds none of {list(self.classes)}")
        for name, values in parts:
            writer = self.target_array_writers[self.array][name]
            for start, patch in zip(starts, values.reshape(len(starts), *self._patch), strict=True):
                writer.write(start, patch)

    def _channels(
        self, arrays: Mapping[str, Any], lead: tuple[int, ...]
    ) -> Iterator[tuple[str, AnyArray, list[tuple[int, ...]]]]:
        """Each class that is written, its values, and what may stand before their axes in space."""
        if not isinstance(arrays, Mapping):
            raise CellMapTypeError(f"what is written is {{{self.array!r}: values}}, got {type(arrays).__name__}")
        by_class: dict[str, Any] = {}
        for key, value in arrays.items():
            if key == self.array and isinstance(value, Mapping):
                by_class |= value
            elif key == self.array:
                count, data = len(self.model_classes), _numbers(value, key)
                leads = [(*lead, count), *([lead] if count == 1 else [])]
                data = _shaped(data, leads, self._patch, key).reshape(-1, count, *self._patch)
                for number, name in enumerate(self.model_classes):
                    if name in self.classes:
                        yield name, data[:, number], [data[:, number].shape[:1]]
            elif key not in (*_ABOUT, *self._dataset.layout.inputs):
                by_class[key] = value
        for name, value in by_class.items():
            if name not in self.model_classes:
                raise CellMapKeyError(
                    f"{name!r} is neither the target array {self.array!r} nor one of {list(self.model_classes)}"
                )
            if name in self.classes:
                yield name, _numbers(value, name), [lead, (*lead, 1)]

    # -- the end

    def close(self) -> None:
        """End the reading threads, and drop what is cached. A later use starts anew."""
        self._dataset.close()

    def __enter__(self) -> "CellMapDatasetWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"CellMapDatasetWriter({self.target_path!r}: {list(self.classes)}, {len(self)} positions)"


def _check_axes(axis_order: str) -> None:
    if "".join(axis_order) != "zyx":
        raise CellMapValueError(f"axis_order must be 'zyx', got {axis_order!r}: volumes are written in that order")


def _by_axis(value: Mapping[str, Any] | Sequence[Any]) -> list[Any]:
    if isinstance(value, Mapping):
        if set(value) != set(AXES):
            raise CellMapKeyError(f"the axes z, y and x are needed, got {sorted(value)}")
        return [value[axis] for axis in AXES]
    return list(value)


def _numbers(value: Any, what: str) -> AnyArray:
    """An array of a tensor, wherever it is, or of anything else that is one."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    data = np.asarray(value)
    if data.ndim == 0 or data.dtype.kind not in "fiub":
        got = "a single number" if data.ndim == 0 else str(data.dtype)
        raise CellMapTypeError(f"{what}: a patch is an array or a tensor of numbers, got {got}")
    return data


def _shaped(data: AnyArray, leads: Sequence[tuple[int, ...]], patch: Shape, what: str) -> AnyArray:
    """Values with all axes of a patch, of which those of length 1 may be missing.

    Raises:
        CellMapValueError: they have another shape.
    """
    thin = tuple(n for n in patch if n != 1)
    for lead in leads:
        if data.shape in ((*lead, *patch), (*lead, *thin)):
            return data.reshape(*lead, *patch)
    raise CellMapValueError(f"{what}: {[*leads[0], *patch]} was expected, got {list(data.shape)}")
