"""The job of ``cellmap-segment``: the objects of a prediction, as a Zarr group, a list and a picture."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cellmap_lightning.commands.recorded_raw import draw_over_raw
from cellmap_lightning.commands.signals import ExitOnSignal
from cellmap_lightning.crops.section_gaps import fits_memory, gaps_text, section_facts, unknown_setting
from cellmap_lightning.errors import CellMapValueError, MissingExtraError
from cellmap_lightning.instances.options import SegmentationOptions, SourceOptions, StorageOptions
from cellmap_lightning.instances.picture import draw_objects
from cellmap_lightning.instances.source import SegmentationSource, open_source
from cellmap_lightning.instances.tuned import SOURCE_KEYS, parameters_of, read_tuned, with_explicit
from cellmap_lightning.instances.volume import SegmentationSummary, VolumeSegmentation
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.store import local_path
from cellmap_lightning.runtime.scheduling import SchedulerOptions, open_scheduler

log = logging.getLogger(__name__)


def segment(
    input: str,  # noqa: A002  the key of the command
    out: str | Path,
    class_name: str | None = None,
    *,
    source: SourceOptions | None = None,
    tuned: str | Path | None = None,
    storage: Mapping[str, Any] | None = None,
    scheduling: SchedulerOptions | None = None,
    picture: bool = True,
    raw: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> SegmentationSummary:
    """Segment one class of a prediction.

    Args:
        input: see `open_source`, as ``class_name``.
        out: the Zarr group to write.
        class_name: the class.
        source: the kind, the channels and the values of the prediction, or of the annotation.
        tuned: a file of ``cellmap-tune`` with the parameters of the class; those that are given here replace them.
        storage: fields of `StorageOptions`.
        scheduling: the processes, or the Dask cluster; by default this process.
        picture: draw ``<out>.png`` beside the output.
        raw: the raw volume that the picture shows; None for that which the prediction records, if it is there.
        overwrite: replace another segmentation in the output.
        options: fields of `SegmentationOptions`.

    Raises:
        CellMapError: a setting, the input or the output is invalid; see `VolumeSegmentation`.

    Example:
        >>> segment("prediction.zarr", "segmentation.zarr", "mito", method="watershed")  # doctest: +SKIP
    """
    path = local_path(out)
    if path.suffix != ".zarr":
        raise CellMapValueError(f"out={out}: the name of a segmentation must end with .zarr")
    source, scheduling = source or SourceOptions(), scheduling or SchedulerOptions()
    if tuned is not None:
        given = {key: getattr(source, key) for key in SOURCE_KEYS}
        explicit = options | {key: value for key, value in given.items() if value is not None}
        class_name, options = _tuned(tuned, class_name, explicit)
        source = replace(source, **{key: options.pop(key, None) for key in SOURCE_KEYS})
    opened = open_source(input, class_name, source.kind, source.offsets, source.channels, source.values, source.unknown)
    _report_empty_sections(opened)
    if picture and raw is not None:
        read_image(raw)  # an error now rather than after the segmentation
    files = StorageOptions(overwrite=overwrite, **(storage or {}))
    volume = VolumeSegmentation(opened, path, SegmentationOptions(**options), files)
    workers = open_scheduler(scheduling.scheduler, scheduling.processes, scheduling.address)
    with ExitOnSignal(lambda: "the same command continues"), workers as scheduler:
        summary = volume.run(scheduler)
    return replace(summary, picture=_draw(opened, summary, raw, input)) if picture else summary


def _report_empty_sections(source: SegmentationSource) -> None:
    """Log the sections of an annotation without a voxel of the class whose objects continue on both sides.

    Raises:
        ChunkError: the annotation cannot be read.
    """
    if source.annotation is None or source.meaning is None:
        return
    level = source.readers[0].level
    if not fits_memory(level):
        log.info("%s: not searched for empty sections; cellmap-inspect deep=true does", source.path)
        return
    gaps = section_facts(level, source.meaning.encoding, source.name).gaps
    if gaps:
        setting = unknown_setting({255: source.name})
        log.warning(
            "%s: no voxel of %s in section %s, counted from 0, though objects continue on both sides and are cut "
            "there; annotate these sections, or make them unknown: in a mask from Fiji fill them with %s, and convert "
            "it with %s",
            source.path, source.name, gaps_text(gaps, source.lattice.box.lower[0], source.lattice.step[0]), *setting,
        )  # fmt: skip


def _draw(source: SegmentationSource, summary: SegmentationSummary, raw: str | None, prediction: str) -> Path | None:
    """Draw the objects over raw, or beside the prediction where the recorded raw volume cannot be read.

    Returns:
        The file; None without matplotlib, which is logged.
    """
    path = summary.output.with_suffix(".png")

    def draw(shown: str | None) -> None:
        draw_objects(source, summary.labels, path, summary.objects, shown, summary.table)

    try:
        draw_over_raw(draw, raw, prediction, path)
    except MissingExtraError as e:
        log.warning("%s: no picture is drawn: %s", path, e)
        return None
    return path


def _tuned(path: str | Path, name: str | None, explicit: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the class and its parameters in a file, replaced by explicit ones.

    Raises:
        CellMapError: the file is invalid, or has no parameters of the class.
        CellMapValueError: it has several classes, and none is chosen.
    """
    tuned = read_tuned(path)
    if name is None and len(tuned) > 1:
        raise CellMapValueError(f"class: tuned={path} has parameters of {', '.join(tuned)}; choose one with class=...")
    name = name if name is not None else next(iter(tuned))
    return name, with_explicit(parameters_of(tuned, name, path), explicit, name, path)
