"""Options of a conversion."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.io.label_ids import parse_label_map
from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.runtime.scheduling import SchedulerName, check_scheduler
from cellmap_lightning.runtime.thread_pool import default_workers
from cellmap_lightning.validation import int_at_least, one_of

#: Downsampling of the coarser levels: means (raw), the most frequent value (labels), by type (``auto``), or no levels.
Downsampling = Literal["auto", "mean", "mode", "none"]

#: Options that do not change the voxels, and the label map, which is recorded in another form.
_NOT_STORED = ("workers", "scheduler", "address", "output", "overwrite", "classes")


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """The volume to convert and the format of the output; see docs/formats.md.

    Attributes:
        input: the volume, of any format.
        output: the group that is written.
        classes: label map ``{id: class}``: each class becomes a mask in a group of its name; None for one image.
        pyramid: see `Downsampling`; ``auto`` is ``mode`` for label maps and integers from 32 bits on, else ``mean``.
        zarr_format: 2 for OME-NGFF 0.4, 3 for 0.5.
        chunks: voxels of a chunk along each axis.
        workers: threads, or processes of a local Dask cluster; None for the default of reading.
        scheduler: ``threads``, ``processes``, or ``dask`` for a Dask cluster whose workers see the same files.
        address: address of a Dask scheduler, ``tcp://host:port``; None for a local cluster.
        voxel_size: voxel size in place of the stored one, nm (z, y, x).
        translation: centre of voxel 0 in place of the stored one, nm (z, y, x).
        unit: unit in place of the stored one.
        axes: names of the stored axes.
        overwrite: replace another conversion in the output. Anything else at that path is an error.

    Raises:
        CellMapError: an invalid value.
    """

    input: str
    output: str
    classes: Mapping[Any, Any] | None = None
    pyramid: Downsampling = "auto"
    zarr_format: Literal[2, 3] = 2
    chunks: int = 64
    workers: int | None = None
    scheduler: SchedulerName = "threads"
    address: str | None = None
    voxel_size: Any = None
    translation: Any = None
    unit: Any = None
    axes: Any = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        one_of("pyramid", self.pyramid, ("auto", "mean", "mode", "none"))
        one_of("zarr_format", self.zarr_format, (2, 3))
        int_at_least("chunks", self.chunks, 8)
        check_scheduler(self.scheduler, self.address)
        default_workers(self.workers, False)
        _ = self.label_map, self.overrides
        if not isinstance(self.overwrite, bool):
            raise CellMapTypeError(f"overwrite must be true or false, got {self.overwrite!r}")
        if "://" in self.output:
            raise CellMapValueError(f"output={self.output}: only a path of this machine can be written")

    @property
    def label_map(self) -> tuple[tuple[int, str], ...]:
        """Ids and names of the label map; empty for one image."""
        return parse_label_map(self.classes) if self.classes is not None else ()

    @property
    def overrides(self) -> Overrides:
        """Settings that override the metadata of the input."""
        return Overrides.parse(self.unit, self.voxel_size, self.translation, axes=self.axes)

    @property
    def settings(self) -> dict[str, Any]:
        """The values on which the written voxels depend, as JSON."""
        values = asdict(self)
        return {key: value for key, value in values.items() if key not in _NOT_STORED} | {
            "classes": [list(pair) for pair in self.label_map]
        }
