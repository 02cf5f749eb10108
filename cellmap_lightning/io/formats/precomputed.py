"""Neuroglancer precomputed volumes, read with TensorStore.

Specification: https://github.com/google/neuroglancer/blob/master/src/datasource/precomputed/volume.md. Lengths are nm,
axes are listed as x, y, z, and ``voxel_offset`` counts voxels from the origin to the corner of voxel 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError, MissingExtraError
from cellmap_lightning.geometry.lattice import Vector, to_vector
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.formats.open_files import OPEN_FILES
from cellmap_lightning.io.formats.volume import FormatArray, FormatLevel, FormatVolume
from cellmap_lightning.io.store import StorePath, read_json
from cellmap_lightning.io.tensorstore_driver import check_process, kvstore

INFO = "info"


class PrecomputedFormat:
    """Precomputed images and segmentations, local and remote, sharded or not."""

    name = "Neuroglancer precomputed"
    suffixes: tuple[str, ...] = ()

    def matches(self, path: StorePath) -> bool:
        """Return whether a location has an ``info`` file that lists scales."""
        try:
            return "scales" in (read_json(path / INFO) or {})
        except MetadataError:
            return False

    def open(self, path: StorePath) -> FormatVolume:
        """Read the ``info`` file.

        Raises:
            MissingExtraError: TensorStore is not installed.
            MetadataError: the file is malformed.
        """
        try:
            import tensorstore  # noqa: F401
        except ImportError:
            raise MissingExtraError(
                f'{path}: precomputed volumes need TensorStore: pip install "cellmap-lightning[precomputed]"'
            ) from None
        info = read_json(path / INFO) or {}
        scales = info["scales"]
        if not isinstance(scales, list) or not scales or not all(isinstance(scale, dict) for scale in scales):
            raise MetadataError(f"{path / INFO}: scales should list the resolutions, got {scales!r}")
        levels = []
        for number, scale in enumerate(scales):
            try:
                size, offset = _zyx(scale["resolution"]), _zyx(scale.get("voxel_offset", (0, 0, 0)))
                array = _PrecomputedArray(path, info, scale, number)
            except (KeyError, TypeError, ValueError) as e:
                raise MetadataError(f"{path / INFO}: scale {number} is malformed ({e!r})") from e
            center = (np.asarray(offset) + 0.5) * size
            levels.append(FormatLevel(str(scale["key"]), array, "zyxc", size, to_vector(center)))
        return FormatVolume(tuple(levels), attributes=info)

    def children(self, path: StorePath) -> list[str]:
        """Return no names: a location holds one volume."""
        return []


class _PrecomputedArray(FormatArray):
    """One scale of a volume."""

    forks = False  # TensorStore's threads do not survive a fork

    def __init__(self, path: StorePath, info: Mapping[str, Any], scale: Mapping[str, Any], number: int) -> None:
        channels = int(info.get("num_channels", 1))
        shape = (*map(int, _zyx(scale["size"])), channels)
        chunks = (*map(int, _zyx(scale["chunk_sizes"][0])), channels)
        self.number, self.key_of_scale = number, str(scale["key"])
        self.offset = tuple(map(int, _zyx(scale.get("voxel_offset", (0, 0, 0)))))
        self.is_sharded = scale.get("sharding") is not None
        super().__init__(
            path / self.key_of_scale, shape, info["data_type"], chunks, container=path, attributes=scale,
            codec=str(scale["encoding"]), details=(number, scale),
        )  # fmt: skip

    @property
    def metadata(self) -> StorePath:
        return self.container / INFO

    def key(self, index: Sequence[int]) -> str:
        if self.is_sharded:
            return ""
        low = np.multiply(index[:3], self.chunks[:3])
        high = np.minimum(low + self.chunks[:3], self.shape[:3])
        return "_".join(f"{a}-{b}" for a, b in zip((low + self.offset)[::-1], (high + self.offset)[::-1], strict=True))

    def file(self, index: Sequence[int]) -> str:
        """Return the file of a chunk; of a sharded scale its folder, which changes when a shard is replaced."""
        key = self.key(index)
        return str(self.path / key) if key else str(self.path)

    def read(self, start: Sequence[int], shape: Sequence[int]) -> AnyArray:
        check_process(str(self.path))
        low = np.add(start[:3], self.offset)
        box = tuple(slice(int(a), int(a) + n) for a, n in zip(low[::-1], shape[2::-1], strict=True))
        with OPEN_FILES.use(self._opened, str(self.path)) as store:
            stored = np.asarray(store[box].read().result())  # x, y, z, channel
        return stored.transpose(2, 1, 0, 3)

    def _opened(self, path: str) -> Any:
        import tensorstore

        spec = {"driver": "neuroglancer_precomputed", "kvstore": kvstore(self.container), "scale_index": self.number}
        return tensorstore.open(spec, open=True, read=True).result()


def _zyx(values: Sequence[float]) -> Vector:
    x, y, z = values
    return float(z), float(y), float(x)
