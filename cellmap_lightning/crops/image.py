"""Multiscale images: choice of a level, stored voxels, and patches of a fixed size and resolution."""

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.patches import MapTo, stored_box
from cellmap_lightning.cache.region import Region
from cellmap_lightning.crops.finite_raw import check_finite, is_reported, unusable
from cellmap_lightning.errors import CellMapIndexError, CellMapValueError, ChunkError, EmptyChunkError
from cellmap_lightning.geometry.lattice import (
    AXES,
    EDGE_TOLERANCE,
    LATTICE_TOLERANCE,
    SCALE_TOLERANCE,
    Box,
    FloatArray,
    Lattice,
    Shape,
    patch_map,
    vector,
)
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.geometry.resample import AnyArray, Method, evaluate
from cellmap_lightning.geometry.rotation import sub_points
from cellmap_lightning.geometry.sample_map import VoxelMap
from cellmap_lightning.io.array_reader import chunk_shape
from cellmap_lightning.io.chunk_names import check_chunk_names
from cellmap_lightning.io.chunks import Reader
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import NO_OVERRIDES, Level, Multiscale, Overrides, first_time, report, volume_of
from cellmap_lightning.io.ngff.notes import FOR_ENTRY
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy, power_of_two
from cellmap_lightning.io.store import identity_of
from cellmap_lightning.validation import one_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

#: Policy for samples that show raw chunks that are not stored: an ``error``; or fill values, which are logged each time
#: (``warn``), logged once (``fill``), or combined with unknown targets (``mask``). ``auto`` is ``mask`` for a partial
#: copy, else ``error``.
MissingRaw = Literal["auto", "error", "warn", "fill", "mask"]
MISSING_RAW: tuple[MissingRaw, ...] = ("auto", "error", "warn", "fill", "mask")
ADVICE = (
    "Fetch it again; or, if it was left out because it only holds the fill value, set missing_raw=warn; "
    "missing_raw=mask makes targets there unknown"
)
ADVICE_EMPTY = (
    "Fetch it again; or, if it stands for the fill value, set missing_raw=warn; "
    "missing_raw=mask makes targets there unknown"
)
#: Limit of the chunks of a crop whose existence is checked when it is opened.
MOST_COUNTED = 1 << 14
#: Largest ratio of the finest stored voxel size to that of a patch; larger ones are refused.
MAX_UPSAMPLING = 2.0


def check_missing_raw(value: Any) -> MissingRaw:
    """Check the setting ``missing_raw`` and return it.

    Raises:
        CellMapValueError: it is not a policy.
    """
    policy: MissingRaw = one_of("missing_raw", value, MISSING_RAW)
    return policy


def choose_level(
    image: Multiscale, scale: Sequence[float], what: str = "", max_upsampling: float | None = None
) -> Level:
    """Return the coarsest level that is not coarser than ``scale`` (within 1 %) on any axis, else the finest.

    Args:
        image: the multiscale image.
        scale: the requested voxel size, nm (z, y, x).
        what: name of the image in messages.
        max_upsampling: largest ratio of the finest level's voxel size to ``scale``; None for no limit.

    Raises:
        CellMapValueError: ``scale`` is finer; the message has the ratio per axis.
    """
    name = f"{what}: " if what else ""

    def fits(level: Level) -> bool:
        return all(s <= requested * (1 + SCALE_TOLERANCE) for s, requested in zip(level.scale, scale, strict=True))

    def size(level: Level) -> float:
        return float(np.prod(level.scale))

    fitting = [level for level in image.present if fits(level)]
    if fitting:
        level = max(fitting, key=size)
        better = [m for m in image.levels if m.info is None and fits(m) and size(m) > size(level)]
        if better and first_time(str(image.path), f"level {better[-1].name} missing"):
            log.warning(
                "%s%s lists level %s, which is not on disk; the finer level %s is read instead of it (%s nm)",
                name, image.path, better[-1].name, level.name, list(level.scale),
            )  # fmt: skip
        return level
    level = min(image.present, key=size)
    ratios = np.divide(level.scale, scale)
    if max_upsampling is not None and ratios.max() > max_upsampling * (1 + SCALE_TOLERANCE):
        raise CellMapValueError(_too_coarse_text(f"{name}{image.path}", image, level, scale, max_upsampling))
    absent_finer = [m for m in image.levels if m.info is None and size(m) < size(level)]
    if absent_finer:
        wanted = max(filter(fits, absent_finer), key=size, default=absent_finer[0])
        if first_time(str(image.path), f"level {wanted.name} missing"):
            log.warning(
                "%s%s lists level %s (%s nm), which is not on disk; the coarser level %s (%s nm) is read instead of "
                "it, upsampled to %s nm",
                name, image.path, wanted.name, list(wanted.scale), level.name, list(level.scale), list(scale),
            )  # fmt: skip
        return level
    _report_upsampled(name, image, level, scale)
    return level


#: Volume, voxel size and scale of the upsampled levels that were logged; once per process, since each class of each
#: crop would be logged, and all of them again in each dataset of a training.
_upsampled: set[tuple[str, tuple[float, ...], tuple[float, ...]]] = set()


def _report_upsampled(name: str, image: Multiscale, level: Level, scale: Sequence[float]) -> None:
    """Log that a level is upsampled, once per volume, voxel size and scale."""
    key = volume_of(image.path), tuple(level.scale), tuple(scale)
    if key in _upsampled:
        return
    _upsampled.add(key)
    log.info(
        "%s%s has no level as fine as %s nm; %s (%s nm) is upsampled, like others of these voxels in %s",
        name, image.path, list(scale), level.name, list(level.scale), PurePosixPath(key[0]).name,
    )  # fmt: skip


def _ratio(value: float) -> str:
    """Return a ratio with three digits, never as a power of ten: ``2.62`` or ``1,000``."""
    return f"{float(f'{value:.3g}'):,.15g}"


def _too_coarse_text(where: str, image: Multiscale, level: Level, scale: Sequence[float], max_upsampling: float) -> str:
    """Return the message of a scale that is too fine for the finest level of an image."""
    ratios = np.divide(level.scale, scale)
    finer = [f"{_ratio(r)}x finer along {a}" for a, r in zip(AXES, ratios, strict=True) if r > 1 + SCALE_TOLERANCE]
    absent = [m.name for m in image.levels if m.info is None]
    return (
        f"{where}: the scale {[float(s) for s in scale]} nm is {', '.join(finer)} than its finest level {level.name} "
        f"({list(level.scale)} nm); at most {max_upsampling:g}x is allowed"
        + (f". Levels {', '.join(absent)} are listed but not on disk" if absent else "")
        + _scale_hint(scale, level.scale)
    )


def _scale_hint(scale: Sequence[float], stored: Sequence[float]) -> str:
    """Return the end of a message about a scale that fits in another order or unit, or nothing."""

    def fits(values: Sequence[float]) -> bool:
        return bool(np.all(np.divide(values, stored) > 1 / 1.5) and np.all(np.divide(values, stored) < 16))

    for power in (3, 6):
        meant = [s / 10**power for s in stored]
        if min(scale) >= 1 and min(meant) >= 1 and max(np.divide(meant, scale)) < 1.5:
            unit = {3: "micrometers", 6: "millimeters"}[power]
            return (
                f". If its voxel size is in nm and was stored as {unit}, correct its metadata, or set "
                f"voxel_size={[round(v, 6) for v in meant]}{FOR_ENTRY}"
            )
    for text, values in (
        ("the order is z, y, x", list(scale)[::-1]),
        ("the unit is nm", [s * 1000 for s in scale]),
        ("the order is z, y, x and the unit nm", [s * 1000 for s in scale][::-1]),
    ):
        if fits(values):
            return f". If {text}, it would be {[round(float(v), 6) for v in values]}"
    return ""


class StoredImage:
    """Stored voxels of one level of raw, a `Source` of patches.

    Args:
        level: the level.
        cache: cache of single chunks, used without a mapping.
        label: name in messages.
        reader: see `chunks.Reader`.
        retry_policy: retries and timeouts of reads.
        missing: see `MissingRaw`; None for labels, in which missing chunks are normal.

    Attributes:
        quiet: True once missing chunks were reported, so that they are not reported again.
    """

    def __init__(
        self,
        level: Level,
        cache: ChunkCache,
        label: str = "",
        reader: Reader = "zarr",
        retry_policy: RetryPolicy = DEFAULT_RETRY,
        missing: MissingRaw | None = None,
    ) -> None:
        self.level = level
        self.lattice = level.lattice
        self.reader = open_reader(
            level, label, reader, retry_policy, "missing" if missing in ("warn", "fill", "mask") else "error"
        )
        self.missing = missing
        self._is_stored: dict[tuple[int, ...], bool] = {}
        self._missing_reads = 0
        self.quiet = False
        self._reporter: dict[str, object] = {}
        self.region = Region(
            self.reader.shape, chunk_shape([self.reader]), self.reader.dtype, self._decode, cache,
            identity_of(level.path), stamp=self.reader.stamp, identity=self.identity, name=f"{label} {level.path}",
            check=self._check_cached if missing is not None and self.reader.dtype.kind == "f" else None,
        )  # fmt: skip

    def _decode(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        """Return the voxels of a box.

        Raises:
            ChunkError: a chunk cannot be read, is missing and that is an error, or holds infinite values of raw.
        """
        try:
            voxels = self.reader.read(start, shape)
        except EmptyChunkError as e:
            if self.missing is not None:
                e.args = (f"{e}. {ADVICE_EMPTY}",)
            raise
        missed = self.reader.missing_chunks(start, shape, voxels) if self.missing is not None else []
        if missed and self.missing in ("error", "auto"):
            raise ChunkError(self._missing_text(missed, start, shape) + f". {ADVICE}")
        for index in missed:
            self._missing_reads += 1
            if power_of_two(self._missing_reads) and self._is_reporting():
                log.warning(
                    "%s and reads as the fill value (times that this happened: %d)",
                    self._missing_text([index], start, shape), self._missing_reads,
                )  # fmt: skip
        if self.missing is not None:  # raw
            check_finite(self.reader, voxels, start, shape, is_stored=not missed)
        return voxels

    def _check_cached(self, start: tuple[int, int, int], voxels: AnyArray) -> None:
        """Report NaN of raw that another process or an earlier run decoded; see `check_finite`."""
        if is_reported(self.reader) or unusable(voxels) is None:
            return
        z, y, x = voxels.shape
        # Files are looked up only where NaN was found: it may be the fill value.
        is_stored = all(map(self.stored, self.reader.files(start, (z, y, x))))
        check_finite(self.reader, voxels, start, (z, y, x), is_stored)

    def _is_reporting(self) -> bool:
        """Return True if missing chunks are reported now; with ``fill`` only for the first of several threads."""
        if self.quiet or self.missing != "fill":
            return not self.quiet
        token = object()
        return self._reporter.setdefault("first", token) is token  # setdefault is atomic: one thread wins the race

    def _missing_text(self, missed: Sequence[tuple[int, ...]], start: tuple[int, int, int], shape: Shape) -> str:
        part = self.reader.common(missed[0], start, shape)
        more = f" and {len(missed) - 1} more of the box" if len(missed) > 1 else ""
        array = self.level.array
        file = array.file(missed[0])
        empty = self.reader.local and self.reader.is_empty(missed[0])
        state = "is empty (0 bytes)" if empty else "is missing"
        if not empty and self.reader.local and os.path.isfile(file):  # noqa: PTH113  of a file that holds many chunks
            file = f"{array.key(missed[0])} of {file}"
        return f"{self.reader.where(*part)} are not stored: chunk {file}{more} {state}; {self.reader.box(*part)}"

    def count_missing(self) -> tuple[int, int] | None:
        """Return the missing chunks and all chunks of the box that patches can touch; None if that takes too long."""
        start, shape = self.region.extent
        files = list(itertools.islice(self.reader.files(start, shape), MOST_COUNTED + 1))
        if not self.reader.local or len(files) > MOST_COUNTED:
            return None
        return sum(not self.stored(index) for index in files), len(files)

    def stored(self, index: tuple[int, ...]) -> bool:
        """Return True if a chunk or shard is stored, looked up once."""
        is_stored = self._is_stored.get(index)
        if is_stored is None:
            is_stored = self._is_stored[index] = self.reader.has_chunk(index)
        return is_stored

    def missing_mask(self, amap: VoxelMap) -> npt.NDArray[np.bool_] | None:
        """Return a mask of a patch's voxels that show, or are interpolated from, raw that is not stored.

        Args:
            amap: map from the patch's voxels to those of the level.

        Returns:
            bool ``[z, y, x]``; None if all is stored.
        """
        # Half the box over which a voxel is averaged along each of its axes that is coarser than the array.
        averaged = sub_points(amap.matrix, "linear") > 1
        reach = np.abs(amap.matrix) @ averaged / 2
        lowest, highest = amap.bounds()
        count = np.asarray(self.lattice.shape)
        if bool(np.any(lowest > count - 0.5 + EDGE_TOLERANCE) or np.any(highest < -0.5 - EDGE_TOLERANCE)):
            return None

        def first_and_last(low: FloatArray, high: FloatArray) -> tuple[FloatArray, FloatArray]:
            """Return the first and the last voxel that contribute; beyond the outermost centres, two do."""
            first = np.clip(np.floor(low - reach + LATTICE_TOLERANCE), 0, np.maximum(count - 2, 0))
            last = np.clip(np.ceil(high + reach - LATTICE_TOLERANCE), np.minimum(1, count - 1), count - 1)
            return first, np.maximum(first, last)

        lo, last = (ends.astype(int) for ends in first_and_last(lowest, highest))
        hi = last + 1
        (z, y, x), (dz, dy, dx) = lo.tolist(), (hi - lo).tolist()
        files = [index for index in self.reader.files((z, y, x), (dz, dy, dx)) if not self.stored(index)]
        if not files:
            return None
        size = np.asarray(self.level.zyx(self.level.array.files))
        first = lo // size
        missing_chunks = np.zeros((hi - 1) // size - first + 1, np.bool_)
        for index in files:
            missing_chunks[tuple(self.level.zyx(index) - first)] = True
        points = amap.points()
        inside = ((points >= -0.5 - EDGE_TOLERANCE) & (points <= count - 0.5 + EDGE_TOLERANCE)).all(axis=-1)
        first_voxel, last_voxel = first_and_last(points, points)
        mask: npt.NDArray[np.bool_] = np.zeros(amap.shape, np.bool_)
        # Places in the box of voxels that contribute to a point, close enough to each other to reach all of its chunks.
        steps = np.ceil((2 * reach + 2) / size).astype(int) + 1
        for part in itertools.product(*(np.linspace(0, 1, n) for n in steps)):
            voxel = np.floor(first_voxel + np.array(part) * (last_voxel - first_voxel)).astype(int)
            z, y, x = np.moveaxis(np.clip(voxel, lo, last) // size - first, -1, 0)
            mask |= inside & missing_chunks[z, y, x]
        return mask

    def evaluate(self, where: MapTo, out: AnyArray, fill: float) -> None:
        """Write a patch to ``out``, linearly interpolated."""
        evaluate(self.region, where(self.lattice), out, method="linear", fill=fill)

    @property
    def lattices(self) -> list[Lattice]:
        """The lattice of its voxels, in a list."""
        return [self.lattice]

    def stamp(self, box: Box) -> int:
        """Return the stamp of a physical box and of the neighbours used for interpolation; see `ArrayReader.stamp`."""
        voxels = stored_box(self.lattice, box, 2)
        return self.reader.stamp(*voxels) if voxels is not None else 1

    def identity(self) -> tuple[object, ...]:
        """Return the reader's identity, and whether cached voxels may be fill values of missing chunks."""
        return "raw", self.missing == "error", *self.reader.identity()


class CellMapImage:
    """Patches of one OME-NGFF image, at any centre and resolution.

    Args:
        path: the multiscale group.
        target_class: name of the content, for messages (``raw``, ``mito``).
        target_scale: voxel size of a patch in nm (z, y, x).
        target_voxel_shape: voxels of a patch (z, y, x).
        pad: allow images smaller than a patch: patches then contain the whole image instead of lying inside it.
        pad_value: value of voxels outside the image.
        interpolation: ``nearest`` (labels) or ``linear`` (raw) if a patch is not aligned with the stored voxels;
            linear is the mean over the patch's voxel if that is coarser than the level.
        axis_order: the order of axes in ``target_scale``, ``target_voxel_shape`` and the patches: a permutation of
            ``zyx``.
        max_upsampling: largest ratio of the finest level's voxel size to ``target_scale``.
        cache: chunk cache shared with other images; by default a new one.
        overrides: unit, voxel size, translation and other values in place of the stored ones, such as
            ``Overrides.parse(unit="micrometer")`` of `cellmap_lightning.io.ngff`.
        missing_raw: see `MissingRaw`; None if it is not raw: missing chunks show the fill value, and a chunk file of
            0 bytes is an error.

    Raises:
        CellMapFileNotFoundError: the image does not exist, or none of its levels is on disk.
        MetadataError: its metadata violate the specification.
        CellMapValueError: the scale is too fine, or the image is smaller than a patch and ``pad`` is off.

    Example:
        >>> image = CellMapImage("jrc_a.zarr/recon-1/em/fibsem-uint8", "raw", [8, 8, 8], [64, 64, 64])
        >>> patch = image[image.get_center(0)]  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str,
        target_class: str,
        target_scale: Sequence[float],
        target_voxel_shape: Sequence[int],
        pad: bool = False,
        pad_value: float = float("nan"),
        interpolation: Method = "nearest",
        axis_order: str = "zyx",
        *,
        max_upsampling: float = MAX_UPSAMPLING,
        cache: ChunkCache | None = None,
        overrides: Overrides = NO_OVERRIDES,
        missing_raw: MissingRaw | None = None,
    ) -> None:
        if sorted(axis_order) != sorted(AXES):
            raise CellMapValueError(f"axis_order must be a permutation of 'zyx', got {axis_order!r}")
        for what, value in (("target_scale", target_scale), ("target_voxel_shape", target_voxel_shape)):
            if len(value) != 3:
                raise CellMapValueError(f"{what} needs three numbers ({', '.join(axis_order)}), got {list(value)}")
        if interpolation not in ("nearest", "linear"):
            raise CellMapValueError(f"interpolation must be 'nearest' or 'linear', got {interpolation!r}")
        self.path = str(path)
        self.target_class = target_class
        self.axis_order = axis_order
        order = [axis_order.index(a) for a in AXES]
        self.window = Window([target_voxel_shape[i] for i in order], [target_scale[i] for i in order])
        self.pad = pad
        self.pad_value = pad_value
        self.interpolation: Method = interpolation
        self.image = read_image(path, overrides)
        report(self.image.path, self.image.notes)
        self.level = choose_level(self.image, self.window.scale.tolist(), target_class, max_upsampling)
        check_chunk_names(self.level.array, target_class)
        chunks = cache if cache is not None else ChunkCache()
        self.region = StoredImage(self.level, chunks, target_class, missing=missing_raw).region
        #: The positions of patches.
        self.placement = Placement.plan(
            self.image.finest.lattice.box,
            [self.window],
            [(self.window, self.level.lattice)],
            pad,
            target_class,
        )

    @property
    def scale_level(self) -> int:
        """Index of the level that is read, in the order of the metadata."""
        return self.image.levels.index(self.level)

    @property
    def bounding_box(self) -> dict[str, list[float]]:
        """The physical box of the image, voxel edges included: ``{axis: [lower, upper]}`` in nm."""
        return self.image.finest.lattice.box.as_dict()

    @property
    def sampling_box(self) -> dict[str, list[float]]:
        """Lowest and highest centre of a patch: ``{axis: [lower, upper]}``, nm."""
        return self.placement.centers.as_dict()

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self.placement)

    def get_center(self, index: int) -> dict[str, float]:
        """Return the centre of the patch at a position, ``{axis: nm}``.

        Raises:
            CellMapIndexError: the position does not exist.
        """
        if not -len(self) <= index < len(self):
            raise CellMapIndexError(f"{self.path}: position must be in [{-len(self)}, {len(self)}), got {index}")
        return dict(zip(AXES, self.placement.center(index % len(self)).tolist(), strict=True))

    def read_into(self, center: FloatArray, out: AnyArray, turn: FloatArray | None = None) -> None:
        """Write the patch around ``center`` to ``out`` ``[z, y, x]``; see `patch_map` for ``turn``."""
        amap = patch_map(center, self.window.shape, self.window.scale, self.level.lattice, turn)
        evaluate(self.region, amap, out, method=self.interpolation, fill=self.pad_value)

    def __getitem__(self, center: Mapping[str, float]) -> "torch.Tensor":
        """Return the patch centred on ``center`` (``{axis: nm}``) as float32, in ``axis_order``."""
        import torch

        out = np.empty(self.window.shape, np.float32)
        self.read_into(vector(center, "a centre"), out)
        patch = torch.from_numpy(out)
        return patch.permute(*(AXES.index(a) for a in self.axis_order))

    def __repr__(self) -> str:
        return (
            f"CellMapImage({self.path!r}, {self.target_class!r}, level={self.level.name!r}, "
            f"shape={list(self.window.shape)}, scale={self.window.scale.tolist()})"
        )
