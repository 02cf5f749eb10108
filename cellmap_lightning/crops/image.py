"""One multiscale array, read as patches of a fixed size and resolution."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.patches import MapTo, stored_box
from cellmap_lightning.cache.region import Region
from cellmap_lightning.errors import CellMapIndexError, CellMapValueError, ChunkError, EmptyChunkError
from cellmap_lightning.geometry.lattice import (
    AXES,
    LATTICE_TOLERANCE,
    SCALE_TOLERANCE,
    AffineMap,
    Box,
    FloatArray,
    Lattice,
    Shape,
    patch_map,
    vector,
)
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.geometry.resample import AnyArray, Method, evaluate
from cellmap_lightning.io.chunk_names import check_chunk_names
from cellmap_lightning.io.chunks import ChunkReader, Reader, chunk_shape
from cellmap_lightning.io.ngff import Level, LevelTranslations, Multiscale, Overrides, read_multiscale, report
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy, power_of_two
from cellmap_lightning.io.store import identity_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

#: What becomes of samples that show raw of which a chunk is not stored: an ``error``, or fill values, which are logged
#: each time (``warn``) or once (``fill``), and beneath which targets are unknown (``mask``); ``auto`` is ``mask`` or
#: ``error``, by the copy.
MissingRaw = Literal["auto", "error", "warn", "fill", "mask"]
MISSING_RAW = ("auto", "error", "warn", "fill", "mask")
ADVICE = (
    "Fetch it again; or, if it was left out because it holds nothing but the fill value, say missing_raw=warn; "
    "missing_raw=mask makes targets there unknown"
)
ADVICE_EMPTY = (
    "Fetch it again; or, if it stands for the fill value, say missing_raw=warn; missing_raw=mask makes targets there "
    "unknown"
)
#: Chunks of a crop that are looked for when it is opened.
MOST_COUNTED = 1 << 14
#: How many times finer than the finest stored level a patch may be before it is refused.
MAX_UPSAMPLING = 2.0


def check_missing_raw(value: Any) -> MissingRaw:
    """The policy of that name.

    Raises:
        CellMapValueError: there is none.
    """
    if value not in MISSING_RAW:
        raise CellMapValueError(f"missing_raw must be one of {', '.join(MISSING_RAW)}, got {value!r}")
    found: MissingRaw = value
    return found


def choose_level(
    image: Multiscale, scale: Sequence[float], what: str = "", max_upsampling: float | None = None
) -> Level:
    """The coarsest level that is not coarser than ``scale`` (within 1 %) on any axis, else the finest.

    Args:
        image: the multiscale image.
        scale: the voxel size asked for, nm (z, y, x).
        what: what messages call the image.
        max_upsampling: how many times finer than the finest level ``scale`` may be; None for any.

    Raises:
        CellMapValueError: ``scale`` is finer than that; the message has the ratio per axis.
    """
    name = f"{what}: " if what else ""

    def fits(level: Level) -> bool:
        return all(s <= asked * (1 + SCALE_TOLERANCE) for s, asked in zip(level.scale, scale, strict=True))

    def size(level: Level) -> float:
        return float(np.prod(level.scale))

    fine = [level for level in image.present if fits(level)]
    if fine:
        level = max(fine, key=size)
        lost = [m for m in image.levels if m.info is None and fits(m) and size(m) > size(level)]
        if lost:
            log.warning(
                "%s%s lists level %s, which is not on disk; the finer level %s is read instead of it",
                name, image.path, lost[-1].name, level.name,
            )  # fmt: skip
        return level
    level = min(image.present, key=size)
    ratios = np.divide(level.scale, scale)
    if max_upsampling is not None and ratios.max() > max_upsampling * (1 + SCALE_TOLERANCE):
        gone = [m.name for m in image.levels if m.info is None]
        raise CellMapValueError(
            f"{name}{image.path}: the scale {[float(s) for s in scale]} nm is "
            + ", ".join(
                f"{r:.3g}x finer along {a}" for a, r in zip(AXES, ratios, strict=True) if r > 1 + SCALE_TOLERANCE
            )
            + f" than its finest level {level.name} ({list(level.scale)} nm); at most {max_upsampling:g}x is allowed"
            + (f". Levels {', '.join(gone)} are listed but not on disk" if gone else "")
        )
    log.info(
        "%s%s has no level as fine as %s nm; %s (%s nm) is upsampled",
        name, image.path, list(scale), level.name, list(level.scale),
    )  # fmt: skip
    return level


class StoredImage:
    """The stored voxels of one level of raw.

    Args:
        level: the level.
        cache: where decoded chunks are kept that have no other place.
        label: what messages call it.
        reader: see `chunks.Reader`.
        retry_policy: how long an object is tried for.
        missing: see `MissingRaw`; None where it is no matter, as in labels.
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
        self.reader = ChunkReader(
            level, label, reader, retry_policy, "missing" if missing in ("warn", "fill", "mask") else "error"
        )
        self.missing = missing
        #: Chunks of which it is known whether they are stored.
        self._stores: dict[tuple[int, ...], bool] = {}
        self._said = 0
        #: Whether chunks that are not stored were reported, and are not reported again.
        self.quiet = False
        self._reporter: dict[str, object] = {}
        self.region = Region(
            self.reader.shape, chunk_shape([self.reader]), self.reader.dtype, self._decode, cache,
            identity_of(level.path), stamp=self.reader.stamp, identity=self.identity, name=f"{label} {level.path}",
        )  # fmt: skip

    def _decode(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        """The voxels of a box.

        Raises:
            ChunkError: a chunk could not be read, or is missing where that is an error.
        """
        try:
            voxels = self.reader.read(start, shape)
        except EmptyChunkError as e:
            if self.missing is not None:
                e.args = (f"{e}. {ADVICE_EMPTY}",)
            raise
        missed = self.reader.missed(start, shape, voxels) if self.missing is not None else []
        if missed and self.missing in ("error", "auto"):
            raise ChunkError(self._missing_text(missed, start, shape) + f". {ADVICE}")
        for _ in missed:
            self._said += 1
            if power_of_two(self._said) and self._reports():
                log.warning(
                    "%s and reads as the fill value (times that this happened: %d)",
                    self._missing_text(missed, start, shape), self._said,
                )  # fmt: skip
        return voxels

    def _reports(self) -> bool:
        """Return whether missing chunks are reported now; with ``fill`` once, by the first of several threads."""
        if self.quiet or self.missing != "fill":
            return not self.quiet
        this = object()
        return self._reporter.setdefault("first", this) is this  # atomic

    def _missing_text(self, missed: Sequence[tuple[int, ...]], start: tuple[int, int, int], shape: Shape) -> str:
        part = self.reader.common(missed[0], start, shape)
        more = f" and {len(missed) - 1} more of the box" if len(missed) > 1 else ""
        file = self.level.array.file(missed[0])
        empty = self.reader.local and self.reader.is_empty(missed[0])
        what = "is empty (0 bytes)" if empty else "is missing"
        return f"{self.reader.where(*part)} are not stored: chunk {file}{more} {what}; {self.reader.box(*part)}"

    def count_missing(self) -> tuple[int, int] | None:
        """How many chunks of what can be read here are missing, and of how many; None where counting takes too long."""
        start, shape = self.region.extent
        files = list(itertools.islice(self.reader.files(start, shape), MOST_COUNTED + 1))
        if not self.reader.local or len(files) > MOST_COUNTED:
            return None
        return sum(not self.stored(index) for index in files), len(files)

    def stored(self, index: tuple[int, ...]) -> bool:
        """Return whether a chunk or shard is stored, asked for once."""
        found = self._stores.get(index)
        if found is None:
            found = self._stores[index] = self.reader.stores(index)
        return found

    def missing_mask(self, amap: AffineMap) -> npt.NDArray[np.bool_] | None:
        """Where a patch shows raw that is not stored, or is interpolated from it; None where it nowhere does.

        Args:
            amap: from the patch's voxels to those of the level.
        """
        # Half of what is averaged, and the neighbours of an interpolant.
        reach = np.maximum(np.abs(amap.matrix).sum(axis=1) - 1, 0) / 2
        corners = np.array(list(itertools.product(*((0, n - 1) for n in amap.shape)))) @ amap.matrix.T + amap.offset
        low = np.floor(corners.min(axis=0) - reach + LATTICE_TOLERANCE).astype(int)
        high = np.ceil(corners.max(axis=0) + reach - LATTICE_TOLERANCE).astype(int)
        lo, hi = np.maximum(low, 0), np.minimum(high + 1, self.lattice.shape)
        if bool(np.any(lo >= hi)):
            return None
        (z, y, x), (dz, dy, dx) = lo.tolist(), (hi - lo).tolist()
        files = [index for index in self.reader.files((z, y, x), (dz, dy, dx)) if not self.stored(index)]
        if not files:
            return None
        size = np.asarray(self.level.zyx(self.level.array.files))
        first = lo // size
        grid = np.zeros((hi - 1) // size - first + 1, np.bool_)
        for index in files:
            grid[tuple(self.level.zyx(index) - first)] = True
        points = np.moveaxis(np.indices(amap.shape), 0, -1) @ amap.matrix.T + amap.offset
        ends = np.floor(points - reach + LATTICE_TOLERANCE), np.ceil(points + reach - LATTICE_TOLERANCE)
        found: npt.NDArray[np.bool_] = np.zeros(amap.shape, np.bool_)
        for corner in itertools.product((0, 1), repeat=3):
            voxel = np.stack([ends[side][..., axis] for axis, side in enumerate(corner)], axis=-1).astype(int)
            inside = ((voxel >= lo) & (voxel < hi)).all(axis=-1)
            z, y, x = np.moveaxis(np.where(inside[..., None], voxel, lo) // size - first, -1, 0)
            found |= inside & grid[z, y, x]
        return found

    def evaluate(self, where: MapTo, out: AnyArray, fill: float) -> None:
        """Write a linear patch to ``out``."""
        evaluate(self.region, where(self.lattice), out, method="linear", fill=fill)

    @property
    def lattices(self) -> list[Lattice]:
        """Where its voxels are."""
        return [self.lattice]

    def stamp(self, box: Box) -> int:
        """See `ChunkReader.stamp`; of a physical box and the neighbours that interpolate at its border."""
        found = stored_box(self.lattice, box, 2)
        return self.reader.stamp(*found) if found is not None else 1

    def identity(self) -> tuple[object, ...]:
        """See `ChunkReader.identity`; and whether what is kept may hold fill values of missing chunks."""
        return "raw", self.missing == "error", *self.reader.identity()


class CellMapImage:
    """Patches of one OME-NGFF image, at any centre, on a lattice of the caller's resolution.

    Args:
        path: the multiscale group.
        target_class: what the image shows, for messages (``raw``, ``mito``).
        target_scale: voxel size of a patch in nm (z, y, x).
        target_voxel_shape: voxels of a patch (z, y, x).
        pad: allow images smaller than a patch: positions then hold the whole image instead of lying inside it.
        pad_value: value of the voxels outside the image.
        interpolation: ``nearest`` (labels) or ``linear`` (raw) where a patch does not fall on the stored voxels;
            linear is the mean over the patch's voxel when that is coarser than the level read.
        axis_order: the order of axes in ``target_scale``, ``target_voxel_shape`` and the patches: a permutation of
            ``zyx``.
        max_upsampling: how many times finer than the finest level ``target_scale`` may be.
        cache: decoded chunks to share with other images; by default the image keeps its own.
        unit: unit of the axes in place of the stored one, such as ``micrometer``.
        voxel_size: voxel size of the finest level in place of the stored one, nm (z, y, x).
        translation: centre of voxel 0 of the finest level in place of the stored one, nm (z, y, x).
        multiscale: name of the image to read where the group lists several.
        level_translations: where levels lie whose translations are missing or all the same: ``auto`` (all levels cover
            the same box) or ``stored``.

    Raises:
        CellMapFileNotFoundError: there is no such image, or none of its levels is on disk.
        MetadataError: its metadata breaks the specification.
        CellMapValueError: the scale is too fine for it, or it is smaller than a patch and ``pad`` is off.
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
        unit: str | None = None,
        voxel_size: Sequence[float] | None = None,
        translation: Sequence[float] | None = None,
        multiscale: str | None = None,
        level_translations: LevelTranslations = "auto",
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
        self.image = read_multiscale(
            path, Overrides.parse(unit, voxel_size, translation, multiscale, level_translations)
        )
        report(self.image.path, self.image.notes)
        self.level = choose_level(self.image, self.window.scale.tolist(), target_class, max_upsampling)
        check_chunk_names(self.level.array, target_class)
        self.region = StoredImage(self.level, cache if cache is not None else ChunkCache(), target_class).region
        #: Where patches may lie.
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
        """Lowest and highest centre of a patch: ``{axis: [lower, upper]}`` in nm."""
        return self.placement.centers.as_dict()

    def __len__(self) -> int:
        """Number of positions."""
        return len(self.placement)

    def get_center(self, index: int) -> dict[str, float]:
        """Centre of the patch at a position, ``{axis: nm}``.

        Raises:
            CellMapIndexError: there is no such position.
        """
        if not -len(self) <= index < len(self):
            raise CellMapIndexError(f"{self.path}: position {index} of {len(self)}")
        return dict(zip(AXES, self.placement.center(index % len(self)).tolist(), strict=True))

    def read_into(self, center: FloatArray, out: AnyArray, turn: FloatArray | None = None) -> None:
        """Write the patch around ``center`` to ``out`` ``[z, y, x]``; see `patch_map` for ``turn``."""
        amap = patch_map(center, self.window.shape, self.window.scale, self.level.lattice, turn)
        evaluate(self.region, amap, out, method=self.interpolation, fill=self.pad_value)

    def __getitem__(self, center: Mapping[str, float]) -> "torch.Tensor":
        """The patch whose physical box is centred on ``center`` (``{axis: nm}``), float32, in ``axis_order``."""
        # torch is needed only to hand out what a caller of this method asks for.
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
