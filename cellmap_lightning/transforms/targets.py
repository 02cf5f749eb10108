"""Binary targets, packed as bits in compact batches and unpacked to 0, 1 and NaN in finished ones.

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

#: Voxels that are unpacked at a time: their bytes, and those of one class, fit into the L2 cache of a core.
_PART = 1 << 17
#: ``byte * 0x6AC00000`` modulo 2^32 has the float32 bits of 0, 1 and NaN for the bytes 0, 250 and 253. This replaces a
#: branch per voxel, and is 20 times as fast where known and unknown voxels alternate.
_ONE, _NAN, _TO_BITS = np.uint8(250), np.uint8(253), np.uint32(0x6AC00000)
Relations = Mapping[int, Sequence[int]]


def packed_bytes(classes: int) -> int:
    """Return the bytes per voxel of packed classes."""
    return 2 * -(-classes // 8)


def pack(
    labels: Iterable[tuple[int, np.ndarray[Any, Any], int, int | None]], shape: tuple[int, int, int], depth: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pack stored labels to voxels uint8 ``[z, y, x, depth]``.

    Args:
        labels: for each annotated class its position, its stored integers ``[z, y, x]``, their value where the class is
            absent, and their value where it is unannotated, or None.
        shape: voxels.
        depth: bytes of a packed voxel.
    """
    # Classes are collected in one byte plane per eight classes, and interleaved at the end: fewer strided writes.
    present, known = np.zeros((2, depth // 2, *shape), np.uint8)
    for index, stored, absent, unknown in labels:
        byte, bit = index // 8, np.uint8(1 << (index % 8))
        is_present = stored != absent
        if unknown is None:
            known[byte] |= bit
        else:
            is_known = stored != unknown
            is_present &= is_known
            known[byte] |= is_known.view(np.uint8) * bit
        present[byte] |= is_present.view(np.uint8) * bit
    out = np.empty((*shape, depth // 2), np.dtype("<u2"))
    for byte in range(depth // 2):
        pair = known[byte].astype(out.dtype)
        pair <<= np.uint16(8)
        pair |= present[byte]
        out[..., byte] = pair
    return out.view(np.uint8)


def unpack_class(packed: np.ndarray[Any, Any], index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return bool ``[z, y, x]`` of one class: where it is present, and where it is known."""
    byte, bit = 2 * (index // 8), np.uint8(1 << (index % 8))
    return (packed[..., byte] & bit) != 0, (packed[..., byte + 1] & bit) != 0


def set_bits(
    packed: np.ndarray[Any, Any], index: int, present: np.ndarray[Any, Any], known: np.ndarray[Any, Any]
) -> None:
    """Set the bits of one class where bool ``[z, y, x]`` masks are True; other bits stay."""
    byte, bit = 2 * (index // 8), np.uint8(1 << (index % 8))
    packed[..., byte] |= present.view(np.uint8) * bit
    packed[..., byte + 1] |= known.view(np.uint8) * bit


def infer_exclusive(packed: np.ndarray[Any, Any], relations: Relations) -> None:
    """Mark a class as known to be absent where it is unknown and a class that excludes it is present; in place.

    Args:
        packed: ``[z, y, x, packed_bytes]`` uint8.
        relations: for the position of a class, the positions of the classes that exclude it.
    """
    present = packed[..., 0::2].copy()
    for index, others in relations.items():
        excluded = np.zeros(packed.shape[:-1], np.uint8)
        for other in others:
            excluded |= (present[..., other // 8] >> np.uint8(other % 8)) & np.uint8(1)
        packed[..., 2 * (index // 8) + 1] |= excluded << np.uint8(index % 8)


def unpack(packed: "torch.Tensor", classes: int) -> "torch.Tensor":
    """Unpack bits to float32: 1 where a class is present, 0 where it is absent, NaN where it is unknown.

    The result is bit-identical on every device.

    Args:
        packed: uint8 ``[N, z, y, x, bytes]``.
        classes: number of classes.

    Returns:
        float32 ``[N, classes, z, y, x]``.
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
    """Unpack a few planes at a time, so that their bytes stay in the CPU cache while each class is written once."""
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
                # Bits of the classes that are known in all of these voxels, and of those known in any.
                all_known, any_known = _fold(np.bitwise_and, known), _fold(np.bitwise_or, known)
                values = scratch[: len(present)]
                for bit in range(min(8, classes - first)):
                    channel = target[first + bit, z : z + planes]
                    if not any_known >> bit & 1:
                        channel.fill(np.nan)
                        continue
                    np.bitwise_and(present, np.uint8(1 << bit), out=values)
                    np.not_equal(values, 0, out=values.view(np.bool_))
                    if all_known >> bit & 1:
                        np.copyto(channel, values)
                    else:
                        values *= _ONE
                        values |= (known & np.uint8(1 << bit) == 0).view(np.uint8) * _NAN
                        float_bits = channel.view(np.uint32)
                        np.copyto(float_bits, values)
                        float_bits *= _TO_BITS
    return out


def _fold(operation: np.ufunc, values: np.ndarray[Any, Any]) -> int:
    """Reduce all bytes of an array by a bitwise operation, eight bytes at a time."""
    flat = values.reshape(-1)
    words = len(flat) // 8 * 8
    rest = [int(v) for v in flat[words:]]
    if words:
        rest += operation.reduce(flat[:words].view(np.uint64)).tobytes()
    return functools.reduce(lambda a, b: int(operation(a, b)), rest)


def class_transforms(transforms: Any, classes: Sequence[str], what: str) -> dict[int, Callable[..., Any]]:
    """Return the transform of each class, from one for all, a list (one per class) or ``{class: transform}``.

    Raises:
        CellMapKeyError: a class that is not requested.
        CellMapValueError: a list of another length, or something that cannot be called.
    """
    if transforms is None:
        return {}
    if isinstance(transforms, Mapping):
        unknown = [name for name in transforms if name not in classes]
        if unknown:
            raise CellMapKeyError(f"{what}: {unknown} are not among the classes {list(classes)}")
        by_class = {classes.index(name): transform for name, transform in transforms.items()}
    elif isinstance(transforms, Sequence) and not isinstance(transforms, str):
        if len(transforms) != len(classes):
            raise CellMapValueError(
                f"{what}: {len(transforms)} transforms for {len(classes)} classes; one each is needed"
            )
        by_class = dict(enumerate(transforms))
    else:
        by_class = dict.fromkeys(range(len(classes)), transforms)
    for index, transform in by_class.items():
        if not callable(transform):
            raise CellMapValueError(f"{what}: the transform of {classes[index]!r} cannot be called: {transform!r}")
    return by_class
