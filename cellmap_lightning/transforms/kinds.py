"""Kinds of targets: presence, class numbers, instance ids, affinities and distances.

Each kind defines its compact form, its finished form, and the halo that it reads around the patch. Presence is
transferred as bits (see `targets`), ids in the signed type one size above the widest stored one, so that -1 means
unknown without a conflict with an id (negative ids are refused).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError, missing_extra
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.targets import packed_bytes, set_bits, unpack, unpack_class
from cellmap_lightning.validation import positive_number

UNKNOWN_ID = -1


class TargetKind(ABC):
    """The content of a target array; see docs/targets.md.

    Attributes:
        name: value of ``kind`` in a configuration.
        reads: ``bits`` (packed presence) or ``ids``.
        options: the other keys of its specification.
        margin: halo, in voxels, that is read on every side of the patch and cropped when it is encoded.
        channels: channels of the finished target.
        dtype: type of the finished target.
        computed: True if it is computed from the stored labels, False if it is a copy of them.
        unknown: value of unannotated voxels in its compact form.
        channels_first: True if its compact form is ``[channels, z, y, x]``, else ``[z, y, x, bytes]``.
    """

    unknown: ClassVar[float] = 0
    channels_first: ClassVar[bool] = False
    computed: ClassVar[bool] = False
    name: ClassVar[str]
    reads: ClassVar[Literal["bits", "ids"]] = "bits"
    options: ClassVar[tuple[str, ...]] = ()
    dtype: torch.dtype = torch.float32

    def __init__(self, window: Window, classes: int) -> None:
        self.window = window
        self.classes = classes
        self.channels = classes
        self.margin: Shape = (0, 0, 0)

    @property
    def identity(self) -> tuple[Any, ...]:
        """All that it depends on, for comparison."""
        return (self.name,)

    def compact(self, id_dtype: np.dtype[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape (of one sample) and type of its compact form."""
        return (*self.window.shape, packed_bytes(self.classes)), np.dtype(np.uint8)

    def encode(self, stored: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """Write the labels that were read, with the margin, to the compact form; kinds without margin skip this."""
        raise NotImplementedError

    def forget(self, compact: np.ndarray[Any, Any], counts: Sequence[int]) -> None:
        """Mark the first voxels along z, y and x of a sample's compact form as unknown, in place.

        Args:
            compact: one sample, see `compact`.
            counts: voxels along each axis, at most those of the patch.
        """
        voxels = np.moveaxis(compact, 0, -1) if self.channels_first else compact
        for axis, count in enumerate(counts):
            voxels[(slice(None),) * axis + (slice(count),)] = self.unknown

    @abstractmethod
    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Convert the compact form of a batch to ``[N, channels, z, y, x]``, on its device."""


class Binary(TargetKind):
    """1 where a class is present, 0 where it is absent, NaN where unannotated; see docs/targets.md."""

    name = "binary"

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Unpack the bits."""
        return unpack(compact, self.classes)


class Labels(TargetKind):
    """One number per voxel, for a softmax: 0 background, ``i + 1`` class ``i``, the first listed class that is present.

    Voxels in which no class is known to be present and some class is unannotated have the ignore index.

    Args:
        ignore_index: number of incompletely annotated voxels.
    """

    name = "labels"
    options = ("ignore_index",)
    dtype = torch.int64

    def __init__(self, window: Window, classes: int, ignore_index: int = -100) -> None:
        super().__init__(window, classes)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int) or 0 <= ignore_index <= classes:
            raise CellMapValueError(
                f"ignore_index must be a whole number outside the classes' 0 to {classes}, got {ignore_index!r}"
            )
        self.ignore_index = ignore_index
        self.channels = 1

    @property
    def identity(self) -> tuple[Any, ...]:
        """Name and ignore index."""
        return self.name, self.ignore_index

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Convert the bits to class numbers."""
        out = torch.zeros(compact.shape[:-1], dtype=torch.int64, device=compact.device)
        for index in range(self.classes):
            known = compact[..., 2 * (index // 8) + 1] & (1 << (index % 8))
            out.masked_fill_(known == 0, self.ignore_index)
        # From last to first, so that the first listed class that is present wins.
        for index in reversed(range(self.classes)):
            present = compact[..., 2 * (index // 8)] & (1 << (index % 8))
            out.masked_fill_(present != 0, index + 1)
        return out[:, None]


class Instances(TargetKind):
    """The stored instance id of each class, 0 where it is absent, -1 where unannotated; see docs/targets.md."""

    name = "instances"
    reads = "ids"
    unknown = UNKNOWN_ID
    channels_first = True
    dtype = torch.int64

    def compact(self, id_dtype: np.dtype[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return the shape of ids, and their signed type."""
        return (self.classes, *self.window.shape), id_dtype

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Convert the ids to int64."""
        return compact.to(torch.int64)


class StoredIds(Instances):
    """The stored id of each class as float32, 0 where it is absent, NaN where unannotated; see docs/targets.md.

    Value transforms are applied to it. Ids above 2^24 are rounded.
    """

    name = "ids"
    dtype = torch.float32

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Convert the ids to float32."""
        return compact.to(torch.float32).masked_fill_(compact == UNKNOWN_ID, float("nan"))


class Affinities(TargetKind):
    """1 where a voxel and its neighbour at an offset belong to one instance, else 0; NaN where either is unknown.

    Channels are ``class * offsets + offset``.

    Args:
        offsets: neighbours, in voxels of the target (z, y, x).
    """

    computed = True
    name = "affinities"
    reads = "ids"
    options = ("offsets",)

    def __init__(self, window: Window, classes: int, offsets: Sequence[Sequence[int]] = ()) -> None:
        super().__init__(window, classes)
        if len(offsets) == 0 or not all(_is_offset(offset) for offset in offsets):
            raise CellMapValueError(
                f"affinities need offsets: a list of neighbours [z, y, x] in whole voxels, not [0, 0, 0]; "
                f"got {offsets!r}"
            )
        self.offsets = tuple((int(o[0]), int(o[1]), int(o[2])) for o in offsets)
        z, y, x = (max(abs(o[a]) for o in self.offsets) for a in range(3))
        self.margin = (z, y, x)
        self.channels = classes * len(self.offsets)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Name and offsets."""
        return self.name, self.offsets

    def compact(self, id_dtype: np.dtype[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return the shape of bits, packed as for presence, of every channel."""
        return (*self.window.shape, packed_bytes(self.channels)), np.dtype(np.uint8)

    def encode(self, stored: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """Compare each voxel with its neighbours."""
        out[...] = 0
        inner = tuple(slice(m, m + n) for m, n in zip(self.margin, self.window.shape, strict=True))
        for c in range(self.classes):
            ids = stored[c][inner]
            for k, offset in enumerate(self.offsets):
                shifted = zip(self.margin, offset, self.window.shape, strict=True)
                neighbours = stored[c][tuple(slice(m + o, m + o + n) for m, o, n in shifted)]
                known = (ids != UNKNOWN_ID) & (neighbours != UNKNOWN_ID)
                same = known & (ids == neighbours) & (ids != 0)
                set_bits(out, c * len(self.offsets) + k, same, known)

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Unpack the bits."""
        return unpack(compact, self.channels)


class SignedDistance(TargetKind):
    """Signed distance to the boundary of a class in units of ``nm``, positive inside, clipped to [-1, 1].

    Inside it is the distance from the voxel's centre to the nearest centre outside, outside the negative distance to
    the nearest centre inside. NaN where an unknown voxel is nearer than that, since it could be nearest of either kind.

    Args:
        nm: the distance that is scaled to 1.
    """

    computed = True
    name = "sdt"
    unknown = math.nan
    channels_first = True
    options = ("nm",)

    def __init__(self, window: Window, classes: int, nm: float = 0.0) -> None:
        super().__init__(window, classes)
        self.nm = positive_number("nm (the distance that an sdt scales to 1)", nm)
        z, y, x = (math.ceil(self.nm / s) if n > 1 else 0 for s, n in zip(window.scale, window.shape, strict=True))
        self.margin = (z, y, x)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Name and distance."""
        return self.name, self.nm

    def compact(self, id_dtype: np.dtype[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return the shape of distances, and float32."""
        return (self.classes, *self.window.shape), np.dtype(np.float32)

    def encode(self, stored: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """Compute the distances."""
        try:
            from scipy.ndimage import distance_transform_edt
        except ImportError:
            raise missing_extra("targets", "targets of kind sdt need scipy") from None
        inner = tuple(slice(m, m + n) for m, n in zip(self.margin, self.window.shape, strict=True))
        for index in range(self.classes):
            present, known = unpack_class(stored, index)

            def nearest(mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
                """Return the distance of every voxel of the patch to the nearest voxel of a mask, nm."""
                if not mask.any():
                    return np.full(self.window.shape, np.inf)
                distances: np.ndarray[Any, Any] = distance_transform_edt(~mask, sampling=self.window.scale)[inner]
                return distances

            inside, outside = nearest(known & ~present), nearest(present)
            distance = np.where(present[inner], inside, -outside)
            # An unknown voxel closer than the boundary could be of either kind, and then the distance would differ.
            uncertain = nearest(~known) < np.minimum(np.abs(distance), self.nm)
            value = np.clip(distance / self.nm, -1, 1)
            value[uncertain | ~known[inner]] = np.nan
            out[index] = value

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Return the distances, which need no decoding."""
        return compact


KINDS: Mapping[str, type[TargetKind]] = {
    k.name: k for k in (Binary, Labels, Instances, StoredIds, Affinities, SignedDistance)
}


def make_kind(where: str, window: Window, classes: int, spec: Mapping[str, Any]) -> TargetKind:
    """Create the kind of a target from its specification.

    Args:
        where: the argument, for messages.
        window: its patch.
        classes: number of classes.
        spec: the specification, without shape and scale.

    Raises:
        CellMapKeyError: an unknown kind, or a key that this kind does not have.
        CellMapValueError: an invalid value of an option.
    """
    name = spec.get("kind", "binary")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise CellMapKeyError(f"{where}.kind must be one of {', '.join(KINDS)}, got {name!r}")
    options = {key: value for key, value in spec.items() if key != "kind"}
    for key in options:
        if key not in kind.options:
            options_text = f"it has {', '.join(kind.options)}" if kind.options else "it has no options"
            raise CellMapKeyError(f"{where} has no {key!r}: for kind {name!r} {options_text}")
    try:
        return kind(window, classes, **options)
    except CellMapValueError as e:
        raise CellMapValueError(f"{where}: {e}") from None


def _is_offset(offset: Any) -> bool:
    """Return True for three whole numbers that are not all 0."""
    return isinstance(offset, Sequence) and len(offset) == 3 and all(isinstance(n, int) for n in offset) and any(offset)


def signed(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the signed integer type that holds every value of ``dtype`` and -1; int64 at most."""
    if dtype.kind == "i":
        return dtype
    if dtype.kind == "f":
        return np.dtype(np.int64)
    return np.dtype(f"i{min(2 * dtype.itemsize, 8)}")
