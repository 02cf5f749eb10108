"""What a target array holds: presence, class numbers, instance ids, affinities or distances.

Each kind says how it travels (compact), what it becomes (finished), and how much it must see around the patch. Presence
travels as bits (see `targets`), ids in the signed type one size above the widest stored one, so that -1 can say unknown
without taking an id away (negative ids are refused).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError, MissingExtraError
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.targets import packed_bytes, unpack

UNKNOWN_ID = -1


class TargetKind(ABC):
    """What a target array holds.

    Attributes:
        name: the word for it in a configuration.
        reads: ``bits`` (packed presence) or ``ids``.
        options: the other keys of its specification.
        margin: voxels that are read on every side of the patch, and cropped when it is encoded.
        channels: channels of the finished target.
        dtype: type of the finished target.
        computed: it is computed from what is read, and not a copy of it.
        unknown: what stands in its compact form where nobody says.
        channels_first: whether its compact form is ``[channels, z, y, x]``, else ``[z, y, x, bytes]``.
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
        """What tells it from another kind."""
        return (self.name,)

    def compact(self, id_dtype: np.dtype[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape (of one sample) and type in which it travels."""
        return (*self.window.shape, packed_bytes(self.classes)), np.dtype(np.uint8)

    def encode(self, stored: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """Write what was read, margin included, to its compact form. Kinds without a margin are read in place."""
        raise NotImplementedError

    def forget(self, compact: np.ndarray[Any, Any], counts: Sequence[int]) -> None:
        """Make the first voxels along z, y and x of the compact form of a sample unknown. In place.

        Args:
            compact: one sample, see `compact`.
            counts: how many along each axis, at most those of the patch.
        """
        voxels = np.moveaxis(compact, 0, -1) if self.channels_first else compact
        for axis, count in enumerate(counts):
            voxels[(slice(None),) * axis + (slice(count),)] = self.unknown

    @abstractmethod
    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """``[N, channels, z, y, x]`` from the compact form of a batch, on the device where it is."""


class Binary(TargetKind):
    """1 where a class is present, 0 where it is not, NaN where nobody says."""

    name = "binary"

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Unpack the bits."""
        return unpack(compact, self.classes)


class Labels(TargetKind):
    """One number per voxel, for a softmax: 0 background, ``i + 1`` class ``i``, the first listed class that is present.

    Where no class is known to be present and one of them is not known, it is the ignore index.

    Args:
        ignore_index: number of the voxels that nobody annotated fully.
    """

    name = "labels"
    options = ("ignore_index",)
    dtype = torch.int64

    def __init__(self, window: Window, classes: int, ignore_index: int = -100) -> None:
        super().__init__(window, classes)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int) or 0 <= ignore_index <= classes:
            raise CellMapValueError(
                f"ignore_index must be a whole number that is no class (0 to {classes} are), got {ignore_index!r}"
            )
        self.ignore_index = ignore_index
        self.channels = 1

    @property
    def identity(self) -> tuple[Any, ...]:
        """Name and ignore index."""
        return self.name, self.ignore_index

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Number the classes."""
        out = torch.zeros(compact.shape[:-1], dtype=torch.int64, device=compact.device)
        for index in range(self.classes):
            known = compact[..., 2 * (index // 8) + 1] & (1 << (index % 8))
            out.masked_fill_(known == 0, self.ignore_index)
        for index in reversed(range(self.classes)):
            present = compact[..., 2 * (index // 8)] & (1 << (index % 8))
            out.masked_fill_(present != 0, index + 1)
        return out[:, None]


class Instances(TargetKind):
    """The stored id of each class's instance, 0 where there is none, -1 where nobody says."""

    name = "instances"
    reads = "ids"
    unknown = UNKNOWN_ID
    channels_first = True
    dtype = torch.int64

    def compact(self, id_dtype: np.dtype[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Ids, in a signed type."""
        return (self.classes, *self.window.shape), id_dtype

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Widen the ids."""
        return compact.to(torch.int64)


class StoredIds(Instances):
    """The stored id of each class as float32, 0 where there is none, NaN where unannotated.

    Value transforms are applied to it. Ids above 2^24 are rounded.
    """

    name = "ids"
    dtype = torch.float32

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Convert the ids."""
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
        good = len(offsets) > 0 and all(
            isinstance(o, Sequence) and len(o) == 3 and all(isinstance(n, int) for n in o) and any(o) for o in offsets
        )
        if not good:
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
        """Bits, as for presence, of every channel."""
        return (*self.window.shape, packed_bytes(self.channels)), np.dtype(np.uint8)

    def encode(self, stored: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """Compare each voxel with its neighbours."""
        out[...] = 0
        inner = tuple(slice(m, m + n) for m, n in zip(self.margin, self.window.shape, strict=True))
        for c in range(self.classes):
            here = stored[c][inner]
            for k, offset in enumerate(self.offsets):
                moved = zip(self.margin, offset, self.window.shape, strict=True)
                there = stored[c][tuple(slice(m + o, m + o + n) for m, o, n in moved)]
                known = (here != UNKNOWN_ID) & (there != UNKNOWN_ID)
                same = known & (here == there) & (here != 0)
                index = c * len(self.offsets) + k
                byte, bit = 2 * (index // 8), np.uint8(1 << (index % 8))
                out[..., byte] |= same.view(np.uint8) * bit
                out[..., byte + 1] |= known.view(np.uint8) * bit

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Unpack the bits."""
        return unpack(compact, self.channels)


class SignedDistance(TargetKind):
    """Distance to the boundary of a class in units of ``nm``, positive inside, bounded to [-1, 1].

    Inside it is the distance from the voxel's centre to the nearest centre outside, outside it is the negative
    distance to the nearest centre inside. NaN where an unknown voxel is nearer than that, so that it could be
    otherwise.

    Args:
        nm: the distance that becomes 1.
    """

    computed = True
    name = "sdt"
    unknown = math.nan
    channels_first = True
    options = ("nm",)

    def __init__(self, window: Window, classes: int, nm: float = 0.0) -> None:
        super().__init__(window, classes)
        if isinstance(nm, bool) or not isinstance(nm, int | float) or not math.isfinite(nm) or nm <= 0:
            raise CellMapValueError(f"sdt needs nm, the distance that becomes 1, as a positive number; got {nm!r}")
        self.nm = float(nm)
        z, y, x = (math.ceil(self.nm / s) if n > 1 else 0 for s, n in zip(window.scale, window.shape, strict=True))
        self.margin = (z, y, x)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Name and distance."""
        return self.name, self.nm

    def compact(self, id_dtype: np.dtype[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Distances."""
        return (self.classes, *self.window.shape), np.dtype(np.float32)

    def encode(self, stored: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """Measure the distances."""
        try:
            from scipy.ndimage import distance_transform_edt
        except ImportError:
            raise MissingExtraError(
                'targets of kind sdt need scipy: pip install "cellmap-lightning[targets]"'
            ) from None
        inner = tuple(slice(m, m + n) for m, n in zip(self.margin, self.window.shape, strict=True))
        for index in range(self.classes):
            bit = np.uint8(1 << (index % 8))
            present = (stored[..., 2 * (index // 8)] & bit) != 0
            known = (stored[..., 2 * (index // 8) + 1] & bit) != 0

            def nearest(where: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
                """Distance of every voxel of the patch to the nearest one of these, nm."""
                if not where.any():
                    return np.full(self.window.shape, np.inf)
                found: np.ndarray[Any, Any] = distance_transform_edt(~where, sampling=self.window.scale)[inner]
                return found

            inside, outside = nearest(known & ~present), nearest(present)
            distance = np.where(present[inner], inside, -outside)
            unsure = nearest(~known) < np.minimum(np.abs(distance), self.nm)
            value = np.clip(distance / self.nm, -1, 1)
            value[unsure | ~known[inner]] = np.nan
            out[index] = value

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """They are what they are."""
        return compact


KINDS: Mapping[str, type[TargetKind]] = {
    k.name: k for k in (Binary, Labels, Instances, StoredIds, Affinities, SignedDistance)
}


def make_kind(where: str, window: Window, classes: int, spec: Mapping[str, Any]) -> TargetKind:
    """The kind of a target from its specification.

    Args:
        where: the argument, for messages.
        window: its patch.
        classes: number of classes.
        spec: the specification, without shape and scale.

    Raises:
        CellMapKeyError: an unknown kind, or a key that this kind does not have.
        CellMapValueError: a value that cannot be one.
    """
    name = spec.get("kind", "binary")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise CellMapKeyError(f"{where}.kind must be one of {', '.join(KINDS)}, got {name!r}")
    options = {key: value for key, value in spec.items() if key != "kind"}
    for key in options:
        if key not in kind.options:
            has = f"it has {', '.join(kind.options)}" if kind.options else "it has no options"
            raise CellMapKeyError(f"{where} has no {key!r}: for kind {name!r} {has}")
    try:
        return kind(window, classes, **options)
    except CellMapValueError as e:
        raise CellMapValueError(f"{where}: {e}") from None


def signed(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The signed integer type that holds every value of ``dtype``, and -1; int64 at most."""
    if dtype.kind == "i":
        return dtype
    if dtype.kind == "f":
        return np.dtype(np.int64)
    return np.dtype(f"i{min(2 * dtype.itemsize, 8)}")
