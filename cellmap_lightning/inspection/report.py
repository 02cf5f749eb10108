"""The whole of an inspection: looked at, as text and as JSON."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.crops.encodings import check_unknown
from cellmap_lightning.crops.image import MAX_UPSAMPLING
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.errors import CellMapError, CellMapValueError
from cellmap_lightning.inspection.costs import Costs, costs
from cellmap_lightning.inspection.facts import (
    CropFacts,
    LevelFacts,
    Values,
    VolumeFacts,
    at_scale,
    look_at_crops,
    look_at_volumes,
)
from cellmap_lightning.inspection.problems import KINDS, Problem, find_problems
from cellmap_lightning.inspection.proposal import Proposal, propose
from cellmap_lightning.io.ngff import shared_metadata
from cellmap_lightning.io.store import children, local_path
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from cellmap_lightning.splits.entries import SPLITS, CropRecord, read_csv, read_mapping
from cellmap_lightning.splits.manifests import GROUNDTRUTH, RAW, find_crops, read_manifest
from cellmap_lightning.splits.options import SplitOptions

#: Problems of one kind that are printed.
SHOWN = 8
#: Labels without an encoding that are printed.
MOST_READ_AS = 40
#: Classes of a crop whose names are printed.
NAMED = 5
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        volumes: raw volumes.
        crops: annotated crops.
        problems: what is wrong.
        proposal: settings that fit.
        costs: of the configuration, where the user's is incomplete of the proposal.
        refused: why the configuration does not fit the data.
        complete: whether the user gave all of classes, scale and shape.
    """

    volumes: Sequence[VolumeFacts]
    crops: Sequence[CropFacts]
    problems: Sequence[Problem]
    proposal: Proposal | None
    costs: Costs | None
    refused: str | None
    complete: bool

    def json(self) -> str:
        """One JSON document."""
        names = ("cellmap-lightning", "torch", "lightning", "numpy", "zarr")
        found = {
            "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
            "system": platform.platform(),
            **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)},
        }
        return json.dumps(found, indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        parts = [_volumes(self.volumes)]
        if self.crops:
            parts += [_crops(self.crops), _classes(self.crops)]
            read_as = _read_as(self.crops)
            if read_as:
                parts.append(read_as)
        parts.append(_problems(self.problems))
        if self.costs is not None:
            parts.append(_costs(self.costs, self.complete))
        if self.proposal is not None:
            parts.append(
                "Proposal, to be pasted into my_configs/experiment/mine.yaml\n\n" + self.proposal.yaml.rstrip()
            )
        return "\n\n".join(parts)


def inspect(
    data: Mapping[str, Any],
    patch: Mapping[str, Any],
    input_path: str | None,
    deep: bool = False,
    device_bytes: int = 16 << 30,
) -> Inspection:
    """Look at volumes and crops.

    Args:
        data: arguments of `CellMapDataModule`; classes and arrays may be missing.
        patch: ``shape`` and ``scale``, each perhaps None.
        input_path: a raw volume instead of crops; those of its groundtruth are looked at too.
        deep: read voxels: values of volumes, counts that the metadata does not have, some samples.
        device_bytes: memory of the device that will train.

    Raises:
        CellMapError: the crops cannot be found.
    """
    settings = {name: value for name, value in data.items() if name != "_target_"}
    if input_path is not None:
        settings |= _around(input_path)
    settings = _with_rule(settings)
    with shared_metadata():
        entries = _entries(settings)
        paths = list(dict.fromkeys(entry.input_path for _, entry in entries))
        overrides = {entry.input_path: entry.overrides[0] for _, entry in entries}
        volumes = look_at_volumes(paths, deep, overrides)
        annotated = [pair for pair in entries if pair[1].target_path is not None]
        crops = look_at_crops(annotated, check_unknown(settings.get("unknown", "metadata")))
        wanted = {"scale": patch.get("scale"), "shape": patch.get("shape"), "classes": settings.get("classes")}
        named = {
            name: settings[name]
            for name in ("csv_path", "search_path", "manifest", "datasets", "split", "only_datasets", "only_crops")
            if settings.get(name) is not None and not (name == "split" and settings[name] == "csv")
        }
        upsampling = float(settings.get("max_upsampling") or MAX_UPSAMPLING)
        proposal = propose(volumes, crops, {"csv_path": None, **named}, device_bytes, wanted, upsampling)
        refused, cost, problems = None, None, []
        if proposal is not None:
            crops = at_scale(crops, proposal.scale, deep)
            settings["batch_size"] = settings.get("batch_size") or proposal.batch_size
            try:
                cost = costs(_complete(settings, proposal), device_bytes, deep)
            except CellMapError as e:
                refused = str(e)
                problems.append(Problem("config", "", refused))
        names = list(wanted["classes"] or dict.fromkeys(name for crop in crops for name in crop.classes))
        problems += find_problems(
            volumes, crops, names, proposal.scale if proposal else None, proposal.shape if proposal else None,
            bool(settings.get("pad", True)), settings.get("too_coarse", "drop"), settings.get("held_out"),
        )  # fmt: skip
    return Inspection(volumes, crops, problems, proposal, cost, refused, all(v is not None for v in wanted.values()))


def _around(input_path: str) -> dict[str, Any]:
    """A volume, and the crops of its groundtruth where it lies as in the challenge."""
    path = local_path(input_path).absolute()
    parts = len(Path(RAW).parts)
    found = []
    if len(path.parents) >= parts:
        crops = path.parents[parts - 1] / GROUNDTRUTH
        for name in children(crops):
            # `all` has the ids of all classes: a copy of the others.
            groups = [group for group in children(crops / name) if group != "all"]
            classes = [
                c for c in groups if any((crops / name / c / file).exists() for file in (".zattrs", "zarr.json"))
            ]
            if classes:
                found.append({"raw": str(path), "gt": f"{crops / name}/[{','.join(classes)}]"})
    if found:
        return {"datasets": {"train": found}, "split": "stratified" if len(found) > 1 else "csv"}
    return {"datasets": {"predict": [{"raw": str(path)}]}}


def _with_rule(settings: dict[str, Any]) -> dict[str, Any]:
    if settings.get("search_path") is not None and settings.get("split", "csv") == "csv":
        return settings | {"split": "stratified"}  # a folder does not say which crops validate
    return settings


def _entries(settings: Mapping[str, Any]) -> list[tuple[str, CropRecord]]:
    """Usage and entry of every crop, with every class that it annotates."""
    classes = settings.get("classes")
    if settings.get("search_path") is not None and classes is None:
        where, manifest = settings["search_path"], settings.get("manifest")
        listed = find_crops(where) if manifest is None else read_manifest(manifest, where)
        classes = sorted({name for crop in listed for name in crop.classes if name != "all"})
    elif classes is None:
        given = read_csv(settings["csv_path"]) if settings.get("csv_path") else read_mapping(settings["datasets"])
        targets = [entry.target for entries in given.values() for entry in entries]
        classes = list(dict.fromkeys(name for target in targets if target is not None for name in target.names))

    def chosen(*names: str) -> dict[str, Any]:
        return {name: settings[name] for name in names if settings.get(name) is not None}

    options = chosen("manifest", "split", "val_fraction", "fold", "n_folds", "only_datasets", "only_crops")
    crops = CellMapDataSplit(
        classes=classes or None,
        options=SplitOptions(**options),
        read=ReadOptions(**chosen("level_translations")),
        **chosen("csv_path", "datasets", "search_path", "seed"),
    )
    return [(split, entry) for split in SPLITS for entry in crops.entries.get(split, [])]


def _complete(settings: Mapping[str, Any], proposal: Proposal) -> dict[str, Any]:
    """Arguments of `CellMapDataModule`, what the user did not say taken from the proposal."""
    found = dict(settings)
    found["classes"] = list(settings.get("classes") or proposal.classes) or None
    if proposal.only_datasets is not None:
        found["only_datasets"] = list(proposal.only_datasets)
    for kind in ("input_arrays", "target_arrays"):
        arrays = settings.get(kind) or {"raw" if kind == "input_arrays" else "labels": {}}
        found[kind] = {
            name: {
                **array,
                "shape": array.get("shape") or list(proposal.shape),
                "scale": array.get("scale") or list(proposal.scale),
            }
            for name, array in arrays.items()
        }
    if found["classes"] is None:
        found["target_arrays"] = None
    return found


# -- as text


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first row as their heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{n}}" for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)


def _times(values: Sequence[float] | None) -> str:
    if values is None:
        return "-"
    if len(set(values)) == 1:
        return f"{values[0]:g}^3"
    return "x".join(f"{v:g}" for v in values)


def _nm(values: Sequence[float]) -> str:
    rounded = [float(f"{v:.5g}") for v in values]
    return f"{rounded[0]:g}" if len(set(rounded)) == 1 else " ".join(f"{v:g}" for v in rounded)


def _box(box: Mapping[str, Sequence[float]] | None) -> str:
    return " ".join(f"{axis} {low:g}..{high:g}" for axis, (low, high) in box.items()) if box else "-"


def _storage(levels: Sequence[LevelFacts]) -> tuple[str, str, str]:
    first = next((level for level in levels if level.shape is not None), None)
    if first is None:
        return "-", "-", "-"
    files = f" in {_times(first.files)}" if first.files != first.chunks else ""
    return first.dtype, _times(first.chunks) + files, first.codec


def _volumes(volumes: Sequence[VolumeFacts]) -> str:
    lines = []
    for volume in volumes:
        if volume.wrong is not None:
            lines.append(f"{volume.name}  {volume.path}\n  {volume.wrong}")
            continue
        rows = [["  level", "nm (z y x)", "voxels", "type", "chunks", "codec"]]
        for level in volume.levels:
            if level.shape is None:
                rows.append([f"  {level.name}", _nm(level.scale), "not on disk", "", "", ""])
            else:
                rows.append([f"  {level.name}", _nm(level.scale), _times(level.shape), *_storage([level])])
        lines.append(
            f"{volume.name}  {volume.path}\n  box {_box(volume.box)} nm\n{table(rows)}\n  {_values(volume.values)}"
        )
    return f"Raw volumes ({len(volumes)})\n\n" + "\n\n".join(lines)


def _values(values: Values | None) -> str:
    if values is None:
        return "values: not read; deep=true does"
    top = max(values.histogram) or 1.0
    bars = "".join(_BARS[min(8, int(np.ceil(8 * share / top)))] for share in values.histogram)
    tail = "dark" if values.skew < 0 else "bright"
    return (
        f"values: {values.low:g} |{bars}| {values.high:g} (middle 99 %), mean {values.mean:.4g}, std {values.std:.3g}, "
        f"longer tail on the {tail} side"
    )


def _crops(crops: Sequence[CropFacts]) -> str:
    rows = [
        [
            "crop",
            "split",
            "voxels",
            "nm (z y x)",
            "levels",
            "type",
            "chunks",
            "codec",
            "classes",
            "absent",
            "unknown",
            "raw",
            "box (nm)",
        ]
    ]
    for crop in crops:
        if crop.wrong is not None:
            rows.append([crop.name, crop.usage, "cannot be read, see below", *[""] * 10])
            continue
        names = list(crop.classes)
        present = [level for level in crop.levels if level.shape is not None]
        rows.append(
            [
                crop.name,
                crop.usage,
                _times(present[0].shape) if present else "-",
                _nm(crop.scale) if crop.scale else "-",
                f"{len(present)}" + (f" of {len(crop.levels)}" if len(present) < len(crop.levels) else ""),
                *_storage(crop.levels),
                ", ".join(names) if len(names) <= NAMED else str(len(names)),
                ", ".join(crop.absent) if 0 < len(crop.absent) <= NAMED else str(len(crop.absent)),
                f"{crop.unknown:.0%}" if crop.unknown is not None else "?",
                _alignment(crop),
                _box(crop.box),
            ]
        )
    return (
        f"Crops ({len(crops)})\n\n{table(rows)}\n\n"
        "raw: whether edges of the crop are edges of raw's finest voxels (aligned), or by how many of these they miss"
    )


def _alignment(crop: CropFacts) -> str:
    if crop.off is None or crop.ratio is None:
        return "-"
    return "aligned" if not any(crop.off) else "off by " + " ".join(f"{v:.2g}" for v in crop.off)


def _classes(crops: Sequence[CropFacts]) -> str:
    rows = [["class", "crops", "hold it", "voxels", "unknown", "lost at the scale"]]
    for name in dict.fromkeys(name for crop in crops for name in crop.classes):
        own = [crop.classes[name] for crop in crops if name in crop.classes]
        counts = [c.voxels for c in own if c.voxels is not None]
        unsure = len(counts) < len(own)
        unknown = [c.unknown for c in own if c.unknown is not None]
        lost = [c.lost for c in own if c.lost is not None]
        rows.append(
            [
                name,
                str(len(own)),
                ("<= " if unsure else "") + str(sum(c.voxels != 0 and c.wrong is None for c in own)),
                ((">= " if unsure else "") + f"{sum(counts):.3g}") if counts else "?",
                f"{np.mean(unknown):.0%}" if unknown else "?",
                f"{np.mean(lost):.0%} (worst {max(lost):.0%})" if lost else "?",
            ]
        )
    text = f"Classes\n\n{table(rows)}"
    if any("?" in row for row in rows[1:]):
        text += "\n\n?: the metadata does not say; deep=true counts voxels"
    return text


def _read_as(crops: Sequence[CropFacts]) -> str:
    """How labels are read whose metadata have no encoding; empty where there are none."""
    rows = [
        [crop.name, name, facts.read_as]
        for crop in crops
        for name, facts in crop.classes.items()
        if facts.read_as is not None
    ]
    if not rows:
        return ""
    more = len(rows) - MOST_READ_AS
    end = f"\nand {more} more, which json=true lists" if more > 0 else ""
    shown = table([["crop", "class", "read as"], *rows[:MOST_READ_AS]])
    return f"Labels without an encoding in their metadata ({len(rows)})\n\n{shown}{end}"


def _problems(problems: Sequence[Problem]) -> str:
    if not problems:
        return "No problems found"
    lines = [f"Problems ({len(problems)})"]
    for kind, heading in KINDS.items():
        own = [problem for problem in problems if problem.kind == kind]
        if not own:
            continue
        if kind == "config":
            lines.append(f"\n{heading}")
            continue
        lines.append(f"\n{heading}: {len(own)}")
        width = max(len(problem.where) for problem in own[:SHOWN])
        for problem in own[:SHOWN]:
            text = problem.text.replace("\n", "\n    ")
            lines.append(f"  {problem.where:<{width}}  {text}" if problem.where else f"  {text}")
        if len(own) > SHOWN:
            lines.append(f"  and {len(own) - SHOWN} more, which json=true lists")
    return "\n".join(lines)


def _costs(found: Costs, complete: bool) -> str:
    def mib(arrays: Mapping[str, int]) -> str:
        parts = ", ".join(f"{name} {size / 2**20:.2f}" for name, size in arrays.items())
        return f"{sum(arrays.values()) / 2**20:.2f} MiB ({parts})"

    lines = [
        "What this configuration costs" if complete else "What the proposal costs, with what you gave",
        "",
        f"  crops used        {', '.join(f'{split} {n}' for split, n in found.crops.items())}",
        f"  a batch of {found.batch_size:<6} {mib(found.finished)} finished, {mib(found.compact)} as it travels",
        *(f"  batches ahead     {device}: {why}" for device, why in found.prefetch.items()),
        f"  decoded voxels    {found.cache_bytes / 1e9:.3g} GB when everything has been read; "
        f"{found.cache_room / 1e9:.3g} GB may be kept in {found.cache_where}",
    ]
    if found.unknown is not None:
        lines.append(f"  classes           {found.strategy}: {found.unknown}")
    if found.frequencies is not None:
        rows = [["    class", "drawn for it", "from a crop that holds it"]]
        rows += [[f"    {name}", f"{drawn:.1%}", f"{crop:.1%}"] for name, (drawn, crop) in found.frequencies.items()]
        lines += [f"  classes           shares of samples with the strategy {found.strategy}", table(rows)]
    if found.shown is not None:
        lines += ["", found.shown]
    return "\n".join(lines)


def refuse(found: Inspection) -> None:
    """Raise what the configuration is refused for, after the report was printed.

    Raises:
        CellMapValueError: it does not fit the data.
    """
    if found.refused is not None:
        raise CellMapValueError(found.refused)
