"""Patches of one class, written to a Zarr array by their positions."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr

from cellmap_lightning.errors import (
    CellMapFileExistsError,
    CellMapKeyError,
    CellMapTypeError,
    CellMapValueError,
    OutputError,
)
from cellmap_lightning.geometry.lattice import AXES, LATTICE_TOLERANCE, Lattice, Shape, to_vector, vector
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.io.meanings import Kind, WrittenMeaning, check_kind, prediction_attributes, recorded_kind
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.store import local_path
from cellmap_lightning.io.writer import codec_of, create_level, make_room, multiscale_attributes, write_group
from cellmap_lightning.prediction.blocks import parse_region
from cellmap_lightning.prediction.output_checks import write_failure

AnyArray = npt.NDArray[Any]


class ImageWriter:
    """A writer of patches of one class to a Zarr array, addressed by their centres.

    The array is created with the first patch, as OME-NGFF 0.4 in Zarr v2 with one level. An existing array with the
    same voxels is written to; any other one is an error.

    Example:
        >>> writer = ImageWriter(  # doctest: +SKIP
        ...     "out.zarr/mito", "mito", [8, 8, 8], {"z": [0, 512], "y": [0, 512], "x": [0, 512]}, [64, 64, 64]
        ... )
        >>> writer[{"z": 256, "y": 256, "x": 256}] = probabilities  # doctest: +SKIP

    Args:
        path: the multiscale group, such as ``predictions.zarr/mito``. Folders above it become Zarr groups, up to the
            last one with the suffix ``.zarr``.
        target_class: name of the class.
        scale: voxel size, nm (z, y, x), or by axis.
        bounding_box: ``{axis: [lower, upper]}``, the edges of the array, nm.
        write_voxel_shape: voxels of a patch (z, y, x), or by axis; also of a chunk.
        scale_level: 0.
        axis_order: ``zyx``.
        context: not used.
        overwrite: replace a Zarr group at ``path``, when the first patch is written.
        dtype: type of a voxel. Floats are rounded to whole numbers for an integer type.
        fill_value: value of voxels that are not written.
        values: meaning of the values, recorded in the metadata: ``probability``, ``scaled`` (probability 1 is the
            largest value of the type), ``mask`` or ``ids``. None to infer it from the written values.

    Attributes:
        lattice: the voxels of the array.

    Raises:
        CellMapFileExistsError: ``path`` contains another array.
        CellMapValueError: an argument is invalid.
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
        check_axes(axis_order)
        if scale_level != 0:
            raise CellMapValueError(f"scale_level must be 0, as only s0 is written, got {scale_level!r}")
        self.path = local_path(path)
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
            self._exists()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_array": None, "_meaning": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def shape(self) -> dict[str, int]:
        """The voxels of the array, by axis."""
        return dict(zip(AXES, self.lattice.shape, strict=True))

    @property
    def bounding_box(self) -> dict[str, list[float]]:
        """The edges of the array, ``{axis: [lower, upper]}``, nm."""
        return self.lattice.box.as_dict()

    def _exists(self) -> bool:
        """Return True if the array exists, with the same voxels.

        Raises:
            CellMapFileExistsError: an array with other voxels exists.
        """
        if not (self.path / "s0").exists():
            return False
        level = read_multiscale(str(self.path)).finest
        if level.lattice.matches(self.lattice) and level.array.dtype == self.dtype:
            return True
        old, new = level.lattice, self.lattice
        raise CellMapFileExistsError(
            f"{self.path} has {list(old.shape)} voxels of {list(old.step)} nm from {list(old.origin)} nm on, "
            f"{level.array.dtype}, got {list(new.shape)} of {list(new.step)} nm from {list(new.origin)} nm on, "
            f"{self.dtype}; choose another path, or pass overwrite=True"
        )

    def _open(self) -> zarr.Array[Any]:
        if self._array is None:
            begun = not self.overwrite and self._exists()
            if not begun:
                make_room(self.path, self.overwrite or not any(self.path.glob("*")))
                self._create()
            recorded = recorded_kind(read_multiscale(str(self.path)), str(self.path)) if begun else None
            self._meaning = WrittenMeaning(self.dtype, self.values, recorded, begun)
            self._array = zarr.open_array(str(self.path / "s0"), mode="r+", zarr_format=2)
        return self._array

    def _create(self) -> None:
        """Create the group and the array, and the groups above up to the container."""
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
        """Return the first voxel of the patch around a centre, as an index of the array.

        Raises:
            CellMapValueError: the patch is not aligned to the voxels.
        """
        lower = vector(center, "a centre") - np.multiply(self.write_voxel_shape, self.lattice.step) / 2
        exact = (lower - self.lattice.box.lower) / self.lattice.step
        nearest = np.rint(exact)
        if (np.abs(exact - nearest) > LATTICE_TOLERANCE).any():
            aligned = self.lattice.box.lower + (nearest + np.divide(self.write_voxel_shape, 2)) * self.lattice.step
            raise CellMapValueError(
                f"{self.path}: a patch of {list(self.write_voxel_shape)} voxels around {dict(center)} lies between the "
                f"voxels; the nearest aligned one is around {dict(zip(AXES, aligned.tolist(), strict=True))}"
            )
        z, y, x = nearest.astype(int).tolist()
        return z, y, x

    def write(self, start: Shape, values: AnyArray) -> None:
        """Write a patch from its first voxel on, cropped to the array.

        Args:
            start: first voxel, as an index of the array.
            values: ``[z, y, x]``.

        Raises:
            CellMapValueError: no part of it is in the array, or its values do not fit the array's type.
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
            raise OutputError(f"{self.path} cannot be written to: {write_failure(e)}") from e

    def _record(self, values: AnyArray) -> None:
        """Record a changed meaning of the values in the metadata, before they are written."""
        if self._meaning is not None and self._meaning.add(values):
            block = prediction_attributes(self.target_class, self._meaning.kind, self.dtype)
            write_group(self.path, {"cellmap": block})

    def _stored(self, values: AnyArray) -> AnyArray:
        """Return values in the type of the array."""
        if self.dtype.kind not in "iu" or values.dtype.kind == "b":
            return values.astype(self.dtype, copy=False)
        info = np.iinfo(self.dtype)
        whole = np.rint(values) if values.dtype.kind == "f" else values
        if not (whole.min() >= info.min and whole.max() <= info.max):  # false for NaN too
            raise CellMapValueError(
                f"{self.path}: values from {values.min():g} to {values.max():g} cannot be stored as {self.dtype}"
            )
        return whole.astype(self.dtype)

    def __setitem__(self, center: Mapping[str, Any], values: Any) -> None:
        """Write a patch ``[z, y, x]`` around a centre in nm, or several patches around as many centres.

        Raises:
            CellMapTypeError: the values are a single number.
            CellMapValueError: the patches have another shape; see also `start` and `write`.
        """
        data = as_numbers(values, self.target_class)
        several = any(np.ndim(v) for v in center.values())
        if not several:
            data = with_lead(data, [(), (1,)], self.write_voxel_shape, self.target_class)
            self.write(self.start(center), data.reshape(self.write_voxel_shape))
            return
        count = max(len(v) for v in center.values())
        data = with_lead(data, [(count,), (count, 1)], self.write_voxel_shape, self.target_class)
        for number, patch in enumerate(data.reshape(count, *self.write_voxel_shape)):
            self.write(self.start({a: float(v[number]) for a, v in center.items()}), patch)

    def __getitem__(self, center: Mapping[str, float]) -> torch.Tensor:
        """Return the stored values of the patch around a centre in nm, cropped to the array."""
        spans = zip(self.start(center), self.write_voxel_shape, self.lattice.shape, strict=True)
        inside = tuple(slice(max(a, 0), min(a + n, m)) for a, n, m in spans)
        with self._lock:
            return torch.from_numpy(np.asarray(self._open()[inside]))

    def __repr__(self) -> str:
        return f"ImageWriter({str(self.path)!r}, {self.target_class!r}, {list(self.lattice.step)} nm)"


def check_axes(axis_order: str) -> None:
    """Check that an order of axes is z, y, x, the only one that is written.

    Raises:
        CellMapValueError: it is another one.
    """
    if "".join(axis_order) != "zyx":
        raise CellMapValueError(f"axis_order must be 'zyx', got {axis_order!r}")


def _by_axis(value: Mapping[str, Any] | Sequence[Any]) -> list[Any]:
    if isinstance(value, Mapping):
        if set(value) != set(AXES):
            raise CellMapKeyError(f"the axes must be z, y and x, got {sorted(value)}")
        return [value[axis] for axis in AXES]
    return list(value)


def as_numbers(value: Any, name: str) -> AnyArray:
    """Return an array of a tensor on any device, or of another array-like object.

    Raises:
        CellMapTypeError: it is a single number, or contains no numbers.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    data = np.asarray(value)
    if data.ndim == 0 or data.dtype.kind not in "fiub":
        got = "a single number" if data.ndim == 0 else str(data.dtype)
        raise CellMapTypeError(f"{name}: a patch must be an array or a tensor of numbers, got {got}")
    return data


def with_lead(data: AnyArray, leads: Sequence[tuple[int, ...]], patch: Shape, name: str) -> AnyArray:
    """Return values with all axes of a patch; axes of length 1 may be missing in ``data``.

    Args:
        data: the values.
        leads: possible shapes of the axes before those of the patch.
        patch: voxels of a patch.
        name: name of the values, for messages.

    Raises:
        CellMapValueError: they have another shape.
    """
    thin = tuple(n for n in patch if n != 1)
    for lead in leads:
        if data.shape in ((*lead, *patch), (*lead, *thin)):
            return data.reshape(*lead, *patch)
    raise CellMapValueError(f"{name}: the shape must be {[*leads[0], *patch]}, got {list(data.shape)}")
