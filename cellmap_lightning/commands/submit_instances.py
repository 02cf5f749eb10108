"""Methods of instance segmentation for classes of a submission."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.evaluation.numbering import Labels
from cellmap_lightning.evaluation.prediction_labels import prediction_labels
from cellmap_lightning.instances.libraries import library
from cellmap_lightning.instances.options import SegmentationOptions
from cellmap_lightning.instances.segmenter import BlockSegmenter
from cellmap_lightning.instances.source import SegmentationSource, open_source
from cellmap_lightning.instances.tuned import OPTION_KEYS, SOURCE_KEYS, read_tuned, with_explicit
from cellmap_lightning.instances.volume import VolumeSegmentation
from cellmap_lightning.io.meanings import ValuesSetting, meaning_of
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.splits.manifests import ManifestRow
from cellmap_lightning.validation import did_you_mean, one_of

#: Options of `SegmentationOptions`, and the keys of `open_source`, for each class.
Methods = Mapping[str, Mapping[str, Any]]


def tuned_methods(
    tuned: str | Path,
    instances: str | Callable[..., Any] | Methods | None,
    threshold: float | None,
    min_volume: float | Mapping[str, float] | None,
    listed: Sequence[str],
) -> Methods:
    """Return the methods of the classes of a file of ``cellmap-tune``, replaced by explicit settings of a submission.

    Args:
        tuned: the file.
        instances: see `submit`, as ``threshold`` and ``min_volume``.
        threshold: None if it is not given.
        min_volume: None if it is not given.
        listed: the classes of the manifest.

    Raises:
        CellMapValueError: the file is invalid, a class is not listed, or ``instances`` is a function.
    """
    parameters = read_tuned(tuned)
    if instances is not None and not isinstance(instances, Mapping):
        raise CellMapValueError(
            f"instances={instances} numbers the objects of every class, and tuned={tuned} defines the method of "
            f"{', '.join(parameters)}; leave one of them out"
        )
    methods: dict[str, Mapping[str, Any]] = dict(instances or {})
    for name, settings in parameters.items():
        one_of(f"tuned={tuned}: a class", name, listed)
        volume = min_volume.get(name) if isinstance(min_volume, Mapping) else min_volume
        given = {"threshold": threshold, "min_volume": volume}
        explicit = {key: value for key, value in given.items() if value is not None}
        entry = methods.get(name, {})
        if isinstance(entry, Mapping):  # others are reported by `InstanceMethods`
            methods[name] = with_explicit(settings, {**explicit, **entry}, name, tuned)
    return methods


class InstanceMethods:
    """The methods by which some classes of a submission are segmented.

    A prediction is segmented at its own voxel size, out of core and restartable, in
    ``<out>-instances/<dataset>/<crop>/<class>.zarr``; its ids are those of the nearest voxel in the submission.

    Args:
        methods: the options of each class.
        classes: the classes that may have a method.
        out: the submission.

    Raises:
        CellMapValueError: a class is not one of them, or an option is invalid.

    Example:
        >>> methods = InstanceMethods({"mito": {"method": "watershed"}}, ["mito", "nuc"], Path("submission.zarr"))
        >>> "nuc" in methods
        False
    """

    def __init__(self, methods: Methods, classes: Sequence[str], out: Path) -> None:
        self._folder = out.with_name(f"{out.stem}-instances")
        self._options: dict[str, SegmentationOptions] = {}
        self._source: dict[str, dict[str, Any]] = {}
        for name, settings in methods.items():
            if name not in classes:
                raise CellMapValueError(
                    f"instances={{{name}: ...}}: {name!r} is not among instance_classes ({', '.join(classes)}), whose "
                    f"objects are numbered{did_you_mean(name, classes)}; add it with instance_classes=[...,{name}], "
                    f"or leave {name} out of instances"
                )
            if not isinstance(settings, Mapping):
                raise CellMapValueError(
                    f"instances.{name} must be a mapping such as {{method: watershed}}, got {settings!r}"
                )
            for key in settings:
                one_of(f"instances.{name}", key, [*OPTION_KEYS, *SOURCE_KEYS])
            self._source[name] = {key: settings[key] for key in SOURCE_KEYS if key in settings}
            self._options[name] = SegmentationOptions(**{key: settings[key] for key in settings if key in OPTION_KEYS})

    def __contains__(self, name: object) -> bool:
        return name in self._options

    def _open(self, row: ManifestRow, path: Path, values: ValuesSetting) -> SegmentationSource:
        return open_source(str(path.parent), row.name, values=values, **self._source[row.name])

    def check(self, row: ManifestRow, path: Path, values: ValuesSetting) -> None:
        """Check that the method of a class reads its prediction. Do nothing for other classes.

        Raises:
            CellMapError: it does not.
        """
        if row.name in self:
            BlockSegmenter.of(self._open(row, path, values), self._options[row.name])

    def labels(self, row: ManifestRow, path: Path, values: ValuesSetting) -> Labels:
        """Return the objects of a prediction on the voxels of a manifest.

        Objects that consist of several parts there are numbered part by part, as the challenge's scorer does
        (26-connected components of equal ids).

        Args:
            row: the voxels and the class.
            path: the prediction.
            values: see `meaning_of`.
        """
        out = self._folder / row.dataset / row.crop / f"{row.name}.zarr"
        summary = VolumeSegmentation(self._open(row, path, values), out, self._options[row.name]).run()
        ids = prediction_labels(
            row, summary.labels, 0.5, _unchanged, meaning_of(read_multiscale(summary.labels), row.label)
        )
        return np.asarray(library("cc3d").connected_components(np.ascontiguousarray(ids), connectivity=26))


def _unchanged(numbers: Labels) -> Labels:
    return numbers
