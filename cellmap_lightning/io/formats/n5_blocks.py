"""Blocks of N5 datasets: a header in big-endian byte order, then compressed voxels.

Specification: https://github.com/saalfeldlab/n5#file-system-specification.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.formats.stored_bytes import stored_bytes
from cellmap_lightning.io.store import StorePath
from cellmap_lightning.validation import did_you_mean

_TYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float32", "float64")
#: Compressors and the codecs of numcodecs that decode them.
_CODECS = {"raw": "", "gzip": "gzip", "bzip2": "bz2", "xz": "lzma", "blosc": "blosc", "zstd": "zstd"}


class N5Blocks:
    """The decoder of the blocks of one dataset.

    Args:
        file: its attributes file, for messages.
        attributes: its attributes.

    Raises:
        MetadataError: an unknown data type or compressor.
    """

    def __init__(self, file: StorePath, attributes: Mapping[str, Any]) -> None:
        kind = attributes.get("dataType")
        if kind not in _TYPES:
            raise MetadataError(f"{file}: dataType must be one of {', '.join(_TYPES)}, got {kind!r}")
        self.dtype = np.dtype(kind).newbyteorder(">")
        # Older versions of N5 wrote the name of the compressor alone.
        settings = attributes.get("compression", attributes.get("compressionType", "raw"))
        self.settings: Mapping[str, Any] = settings if isinstance(settings, Mapping) else {"type": settings}
        self.name = str(self.settings.get("type"))
        if self.name not in _CODECS:
            raise MetadataError(
                f"{file}: blocks are compressed with {self.name!r}; those of {', '.join(_CODECS)} can be read"
                f"{did_you_mean(self.name, _CODECS)}"
            )
        self.block: Sequence[int] = attributes["blockSize"]
        #: The size of a block at most; the header of a damaged one may have any.
        self.most = math.prod(attributes["blockSize"]) * self.dtype.itemsize

    def read(self, folder: StorePath, key: str, cut: Sequence[int]) -> AnyArray | None:
        """Return the voxels of a block with reversed axes; None where it is not stored.

        Args:
            folder: the dataset.
            key: the block.
            cut: its voxels inside the array along the stored axes of N5, x first.

        Raises:
            ValueError: the block is damaged, or of another size than that of the grid.
            OSError: it cannot be read.
        """
        stored = stored_bytes(folder, key)
        if not stored:
            return None
        mode, ndim = struct.unpack_from(">HH", stored)
        shape = struct.unpack_from(f">{ndim}I", stored, 4)
        head = 4 + 4 * ndim + (4 if mode == 1 else 0)
        nbytes = math.prod(shape) * self.dtype.itemsize
        if mode > 1 or nbytes > self.most:
            raise ValueError(f"block {key} has mode {mode} and {nbytes} bytes, and a block has {self.most} at most")
        # At the upper edge of the array some programs cut blocks, others fill them.
        if len(shape) != len(cut) or any(n not in (a, b) for n, a, b in zip(shape, cut, self.block, strict=True)):
            raise ValueError(
                f"block {key} has {list(shape)} voxels by its header, and the grid {list(cut)} there (x first): "
                "dimensions, blockSize or the order of the folders are those of another dataset"
            )
        decoded = self._decode(memoryview(stored)[head:], nbytes)
        if len(decoded) < nbytes:
            raise ValueError(f"block {key} decodes to {len(decoded)} bytes, its header declares {nbytes}")
        return np.frombuffer(decoded, self.dtype, math.prod(shape)).reshape(shape[::-1])

    def _decode(self, data: memoryview, nbytes: int) -> Any:
        if self.name == "raw":
            return data
        if self.name == "gzip":
            import zlib

            # `useZlib` writes the zlib header in place of gzip's; 32 detects either.
            stream = zlib.decompressobj(47)
            decoded = stream.decompress(data, nbytes)  # no more, also of a longer stream
            if not stream.eof:
                stream.decompress(stream.unconsumed_tail, 1)
            if not stream.eof:
                raise ValueError("the compressed block is cut off, or longer than its header declares")
            return decoded
        import numcodecs

        settings = {"id": "lzma", "format": 1} if self.name == "xz" else {"id": _CODECS[self.name]}
        return memoryview(numcodecs.get_codec(settings).decode(data)).cast("B")
