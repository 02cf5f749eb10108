"""Targets as bits on the way, and as 0, 1 and NaN at the end.

Packed, a voxel has ``2 * ceil(classes / 8)`` bytes: for every eight classes one byte of *present* bits and one byte of
*known* bits, the lowest bit for the first class. A class is present only where it is known.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.runtime.buffers import BUFFERS

if TYPE_CHECKING:
    import torch

#: Voxels that are unpacked at a time: their bytes, and those of one class, stay in the second cache of a core.
_PART = 1 << 17
#: Products, modulo 2^32, with the bytes 0, 250 and 253 are the bits of 0, 1 and NaN as float32: a mixture of them is
#: written without a branch per voxel, which where known and unknown voxels alternate is 20 times as fast.
_ONE, _NAN, _TO_BITS = np.uint8(250), np.uint8(253), np.uint32(0x6AC00000)
Relations = Mapping[int, Sequence[int]]


def packed_bytes(classes: int) -> int:
    """Bytes per voxel of ``classes`` packed classes."""
    return 2 * -(-classes // 8)


def pack(
    labels: Iterable[tuple[int, np.ndarray[Any, Any], int, int | None]], shape: tuple[int, int, int], depth: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Classes as packed voxels ``[z, y, x, depth]``.

    Args:
        labels: of each class that is annotated its position, its stored integers ``[z, y, x]``, their value where the
            class is absent, and their value where nobody annotated, or None.
        shape: voxels.
        depth: bytes of a packed voxel.
    """
    # One plane of bits for all voxels at a time, and the planes of eight classes put together at the end.
    present, known = np.zeros((2, depth // 2, *shape), np.uint8)
    for index, stored, absent, unknown in labels:
        byte, bit = index // 8, np.uint8(1 << (index % 8))
        here = stored != absent
        if unknown is None:
            known[byte] |= bit
        else:
            sure = stored != unknown
            here &= sure
            known[byte] |= sure.view(np.uint8) * bit
        present[byte] |= here.view(np.uint8) * bit
    out = np.empty((*shape, depth // 2), np.dtype("<u2"))
    for byte in range(depth // 2):
        pair = known[byte].astype(out.dtype)
        pair <<= np.uint16(8)
        pair |= present[byte]
        out[..., byte] = pair
    return out.view(np.uint8)


def infer_exclusive(packed: np.ndarray[Any, Any], relations: Relations) -> None:
    """Where a class is not known and one that excludes it is present, it is known to be absent. In place.

    Args:
        packed: ``[z, y, x, packed_bytes]`` uint8.
        relations: for the position of a class, those of the classes that exclude it.
    """
    seen = packed[..., 0::2].copy()
    for index, others in relations.items():
        excluded = np.zeros(packed.shape[:-1], np.uint8)
        for other in others:
            excluded |= (seen[..., other // 8] >> np.uint8(other % 8)) & np.uint8(1)
        packed[..., 2 * (index // 8) + 1] |= excluded << np.uint8(index % 8)


def unpack(packed: "torch.Tensor", classes: int) -> "torch.Tensor":
    """float32 ``[N, classes, z, y, x]`` with 1 present, 0 absent, NaN unknown, from uint8 ``[N, z, y, x, bytes]``.

    The same bits on every device.
    """
    import torch

    if packed.device.type == "cpu":
        return torch.from_numpy(_unpack_on_cpu(packed.numpy(), classes))
    out = torch.empty((packed.shape[0], classes, *packed.shape[1:4]), dtype=torch.float32, device=packed.device)
    for first in range(0, classes, 8):
        count = min(8, classes - first)
        bits = (1 << torch.arange(count, dtype=torch.uint8, device=packed.device)).reshape(1, -1, 1, 1, 1)
        present, known = packed[:, None, ..., first // 4], packed[:, None, ..., first // 4 + 1]
        part = out[:, first : first + count]
        part.copy_((present & bits) != 0)
        part.masked_fill_((known & bits) == 0, float("nan"))
    return out


def _unpack_on_cpu(packed: np.ndarray[Any, Any], classes: int) -> np.ndarray[Any, Any]:
    """A few planes at a time, so that their bytes stay in the cache while each class is written once."""
    out = BUFFERS.empty((packed.shape[0], classes, *packed.shape[1:4]), np.float32)
    pairs = np.ascontiguousarray(packed).view(np.dtype("<u2"))
    planes = max(1, _PART // max(1, packed.shape[2] * packed.shape[3]))
    scratch = np.empty((min(planes, packed.shape[1]), *packed.shape[2:4]), np.uint8)
    for sample, target in zip(pairs, out, strict=True):
        for z in range(0, len(sample), planes):
            for first in range(0, classes, 8):
                pair = sample[z : z + planes, ..., first // 8]
                present = pair.astype(np.uint8)
                known = (pair >> np.uint16(8)).astype(np.uint8)
                every, some = _fold(np.bitwise_and, known), _fold(np.bitwise_or, known)
                one = scratch[: len(present)]
                for bit in range(min(8, classes - first)):
                    channel = target[first + bit, z : z + planes]
                    if not some >> bit & 1:
                        channel.fill(np.nan)
                        continue
                    np.bitwise_and(present, np.uint8(1 << bit), out=one)
                    np.not_equal(one, 0, out=one.view(np.bool_))
                    if every >> bit & 1:
                        np.copyto(channel, one)
                    else:
                        one *= _ONE
                        one |= (known & np.uint8(1 << bit) == 0).view(np.uint8) * _NAN
                        bits = channel.view(np.uint32)
                        np.copyto(bits, one)
                        bits *= _TO_BITS
    return out


def _fold(operation: np.ufunc, values: np.ndarray[Any, Any]) -> int:
    """All bytes of an array, put together bit by bit; eight at a time."""
    flat = values.reshape(-1)
    words = len(flat) // 8 * 8
    rest = [int(v) for v in flat[words:]]
    if words:
        rest += operation.reduce(flat[:words].view(np.uint64)).tobytes()
    return functools.reduce(lambda a, b: int(operation(a, b)), rest)


def class_transforms(transforms: Any, classes: Sequence[str], what: str) -> dict[int, Callable[..., Any]]:
    """Transform of each class, from one for all, a list (one per class) or ``{class: transform}``.

    Raises:
        CellMapKeyError: a class that is not asked for.
        CellMapValueError: a list of another length, or something that cannot be called.
    """
    if transforms is None:
        return {}
    if isinstance(transforms, Mapping):
        unknown = [name for name in transforms if name not in classes]
        if unknown:
            raise CellMapKeyError(f"{what}: {unknown} are not among the classes {list(classes)}")
        found = {classes.index(name): t for name, t in transforms.items()}
    elif isinstance(transforms, Sequence) and not isinstance(transforms, str):
        if len(transforms) != len(classes):
            raise CellMapValueError(
                f"{what}: {len(transforms)} transforms for {len(classes)} classes; one each is needed"
            )
        found = dict(enumerate(transforms))
    else:
        found = dict.fromkeys(range(len(classes)), transforms)
    for index, transform in found.items():
        if not callable(transform):
            raise CellMapValueError(f"{what}: the transform of {classes[index]!r} cannot be called: {transform!r}")
    return found
