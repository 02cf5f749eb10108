"""The output of a segmentation: OME-NGFF labels ``<output>/<class>/s0..``, with journal and lock of a prediction."""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.instances.block_tasks import IDS, ObjectIds
from cellmap_lightning.instances.joining import Objects, unknown_id_of
from cellmap_lightning.instances.measures import MEASURES, Measures
from cellmap_lightning.instances.options import StorageOptions
from cellmap_lightning.prediction.blocks import BlockGrid
from cellmap_lightning.prediction.durable import flush, write_text
from cellmap_lightning.prediction.journal import journal_folder
from cellmap_lightning.prediction.output import PredictionOutput

#: The file that marks joined objects as complete, with the type of ids.
_JOINED = "joined.json"


class SegmentationOutput(PredictionOutput):
    """The output of a segmentation on disk, its journal and its lock; see docs/instances.md.

    The arrays are created once the number of objects, and so the type of ids, is known.

    Args:
        path: the output, a local Zarr group with the group of the class.
        name: the class.
        grid: the voxels, in blocks.
        storage: the options of its files.
        raw: voxel sizes of the levels of the input, which the pyramid follows.
        source: the group of the annotation whose objects are numbered; None for a prediction.

    Raises:
        CellMapValueError: the arguments contradict each other.
    """

    work = "segmentation"

    def __init__(
        self,
        path: Path,
        name: str,
        grid: BlockGrid,
        storage: StorageOptions,
        raw: Sequence[Sequence[float]] = (),
        source: Path | None = None,
    ) -> None:
        self._source = source
        ids = ObjectIds(np.uint32 if storage.ids == "auto" else storage.ids)
        z, y, x = storage.chunks
        self._folder, self._group = path / journal_folder(self.work), path / name
        #: Numbers of voxels that are not of an object, if some of them are unannotated.
        self._complement: dict[str, int] = {}
        super().__init__(
            path, (name,), grid, ids, (z, y, x), storage.unit if storage.shards else None, storage.zarr_format,
            storage.levels, raw=raw,
        )  # fmt: skip

    @property
    def _created(self) -> bool:
        return (self._folder / _JOINED).exists()

    def _create_levels(self, name: str) -> None:
        """Create no arrays yet; see `store`."""

    @property
    def unknown_id(self) -> int | None:
        """The stored value of unannotated voxels; None without such voxels, and before `stored`."""
        return unknown_id_of(self.values.dtype) if self._complement else None

    def store(self, objects: Objects, dtype: np.dtype[Any], unknown: int = 0) -> None:
        """Store the ids and measures of joined objects, and create the arrays; a kill before the end repeats it.

        Args:
            objects: the objects.
            dtype: type of the ids.
            unknown: number of unannotated voxels.
        """
        folder, name = self._folder, self.classes[0]
        for file, array in ((IDS, objects.ids), *((f"{k}.npy", v) for k, v in objects.measures.as_arrays().items())):
            draft = folder / f"{file}.draft"
            with draft.open("wb") as handle:
                np.save(handle, array)
            draft.replace(folder / file)
            flush([str(folder / file)])
        self.values.dtype = dtype
        if unknown:
            absent = math.prod(self.grid.shape) - unknown - int(objects.measures.voxels.sum())
            self._complement = {"absent": absent, "unknown": unknown}
        for level in range(self.levels):
            path = self._group / f"s{level}"
            if path.exists():
                shutil.rmtree(path)
            attributes = self._attributes(name)
            if self._complement and level == 0:
                attributes["annotation"]["complement_counts"] = self._complement
            self._levels.create(name, level, {"cellmap": attributes})
        write_text(folder / _JOINED, json.dumps({"dtype": dtype.name, "complement": self._complement}))

    def stored(self) -> tuple[np.dtype[Any], Measures] | None:
        """Return the type of ids and the measures of joined objects; None before `store` is complete."""
        if not self._created:
            return None
        folder = self._folder
        joined = json.loads((folder / _JOINED).read_text(encoding="utf-8"))
        self.values.dtype, self._complement = np.dtype(joined["dtype"]), joined.get("complement", {})
        # Mapped, not read: the list of objects is written some rows at a time.
        return self.values.dtype, Measures(
            **{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in MEASURES}
        )

    def remove_drafts(self) -> None:
        """Remove chunks that a process had not renamed when it was killed; no process may write blocks now.

        The journal does not record which blocks a process had begun, and one of a cluster may end at any time.
        """
        for folder, _, files in os.walk(self._group):
            for name in files:
                if name.endswith(".partial"):
                    Path(folder, name).unlink(missing_ok=True)

    def _root_attributes(self) -> dict[str, Any]:
        """Return CellMap's attributes of the root group, by which scores recognize a crop that was trained on."""
        attributes = super()._root_attributes()
        return attributes if self._source is None else attributes | {"numbered_from": str(self._source.absolute())}

    def _attributes(self, name: str) -> dict[str, Any]:
        """Return CellMap's attributes of labels with ids."""
        encoding = {"absent": 0} if self.unknown_id is None else {"absent": 0, "unknown": self.unknown_id}
        kind = {"type": "instance_segmentation", "encoding": encoding}
        return {"annotation": {"class_name": name, "annotation_type": kind}}

    def _image_attributes(self, name: str, multiscale: dict[str, Any]) -> dict[str, Any]:
        """Return the attributes of the group of labels, ``image-label`` included.

        Source: https://ngff.openmicroscopy.org/0.5/#label-md.
        """
        attributes = super()._image_attributes(name, multiscale)
        if self.zarr_format == 3:
            return attributes | {"ome": {**multiscale["ome"], "image-label": {}}}
        return attributes | {"image-label": {"version": "0.4"}}

    def _counts(self, notes: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        """Return the number of objects, for the record."""
        stored = self.stored()
        return {"objects": len(stored[1]) if stored is not None else 0}
