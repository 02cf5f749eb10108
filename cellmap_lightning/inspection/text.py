"""The text of an inspection, section by section."""

import shutil
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from cellmap_lightning.inspection.costs import Costs
from cellmap_lightning.inspection.facts import ClassFacts, CropFacts, LevelFacts, Values, VolumeFacts
from cellmap_lightning.inspection.formats import box_text, table, together, voxel_count, voxel_size, wrapped
from cellmap_lightning.inspection.problems import KINDS, Problem
from cellmap_lightning.validation import first_few
from cellmap_lightning.wording import large_count, size_text

#: Problems of one kind that are printed.
SHOWN = 8
#: Labels without an encoding that are printed.
MOST_READ_AS = 40
#: Classes of a crop whose names are printed.
NAMED = 3
#: The reason for the crops of validation, by the setting ``split``.
_RULES = {
    "csv": "as the CSV or data.datasets says",
    "random": "drawn at random with the seed (split=random, data.val_fraction)",
    "stratified": "chosen so that each class has about the same share of its crops there (split=stratified)",
    "by_dataset": "as whole datasets, drawn with the seed (split=by_dataset, data.val_fraction)",
    "leave_one_dataset_out": "as the dataset number data.fold (split=leave_one_dataset_out)",
    "blocks": "as a part of each crop (split=blocks)",
    "kfold": "as the part data.fold of data.n_folds (split=kfold)",
}
_ALIGNED = "aligned, if the edges of the crop lie on edges of raw's finest voxels, else their offset in these voxels"
_BARS = " ▁▂▃▄▅▆▇█"


def volumes_text(volumes: Sequence[VolumeFacts], annotated: Collection[str]) -> str:
    """Return the section of the raw volumes.

    Args:
        volumes: the volumes.
        annotated: paths of those with crops.
    """
    parts = [_volume(volume, volume.path in annotated) for volume in volumes]
    return f"Raw volumes ({len(volumes)})\n\n" + "\n\n".join(parts)


def _volume(volume: VolumeFacts, annotated: bool) -> str:
    if volume.wrong is not None:
        return f"{volume.name}  {volume.path}\n  {volume.wrong}"
    rows = [["level", "nm (z y x)", "voxels", "type", "chunks", "codec"]]
    for level in volume.levels:
        if level.shape is None:
            rows.append([level.name, voxel_size(level.scale), "not on disk", "", "", ""])
        else:
            rows.append([level.name, voxel_size(level.scale), voxel_count(level.shape), *_storage([level])])
    lines = [f"{volume.name}  {volume.path}", f"  box {box_text(volume.box)} nm", table(rows, 2)]
    lines += [] if annotated else ["  raw only: no crop annotates it"]
    return "\n".join([*lines, wrapped(_values(volume.values), 2)])


def _storage(levels: Sequence[LevelFacts]) -> tuple[str, str, str]:
    """Return type, chunks and codec of the first level that is on disk."""
    first = next((level for level in levels if level.shape is not None), None)
    if first is None:
        return "-", "-", "-"
    files = f" in {voxel_count(first.files)}" if first.files != first.chunks else ""
    return first.dtype, voxel_count(first.chunks) + files, first.codec


def _values(values: Values | None) -> str:
    if values is None:
        return "values: not read; deep=true reads them"
    top = max(values.histogram) or 1.0
    bars = "".join(_BARS[min(8, int(np.ceil(8 * share / top)))] for share in values.histogram)
    tail = "dark" if values.skew < 0 else "bright"
    histogram = together(f"{values.low:g} |{bars}| {values.high:g}")
    return (
        f"values: {histogram} (middle 99 %), mean {values.mean:.4g}, std {values.std:.3g}, "
        f"longer tail on the {tail} side"
    )


def crops_text(crops: Sequence[CropFacts], rule: str, proposed: bool = False) -> str:
    """Return the section of the crops; columns that are the same in all crops are one line below the table.

    Args:
        crops: the crops.
        rule: the setting ``split``.
        proposed: whether the proposal cuts the crops.
    """
    heading = [
        "crop", "split", "voxels", "nm (z y x)", "levels", "type", "chunks", "codec", "classes", "absent", "unknown",
        "raw", "box z, y, x (nm)",
    ]  # fmt: skip
    rows = [heading]
    left_out = [crop for crop in crops if crop.left_out is not None]
    named = all(len(crop.classes) <= NAMED for crop in crops)
    for crop in crops:
        if crop.wrong is not None:
            rows.append([crop.name, _usage(crop), "cannot be read, see below", *[""] * (len(heading) - 3)])
        else:
            rows.append(_crop(crop, named))
    equal = [n for n in range(3, len(heading) - 1) if len({row[n] for row in rows[1:]}) == 1]
    shown = [[cell for n, cell in enumerate(row) if n not in equal] for row in rows]
    count = f"{len(crops)}, {len(left_out)} left out" if left_out else f"{len(crops)}"
    lines = [f"Crops ({count})", "", _with_boxes(shown), ""]
    same = [together(f"{heading[n]} {rows[1][n]}") for n in equal if rows[1][n]]
    if same:
        lines.append(wrapped("in all of them: " + ", ".join(same)))
    lines.append(wrapped(_split_text(crops, rule, proposed)))
    lines += [wrapped(line) for line in _left_out(left_out)]
    if any(crop.off is not None for crop in crops):
        lines.append(wrapped(f"raw: {_ALIGNED}"))
    return "\n".join(lines)


def _with_boxes(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose last column, that of the boxes, is a table of its own where the terminal is too narrow."""
    text = table(rows)
    if max(map(len, text.splitlines())) <= shutil.get_terminal_size().columns:
        return text
    boxes = table([[row[0], row[-1]] for row in rows])
    return f"{table([row[:-1] for row in rows])}\n\n{boxes}"


def _split_text(crops: Sequence[CropFacts], rule: str, proposed: bool) -> str:
    """Return which crops validate, and the reason."""
    named = [crop.name for crop in crops if crop.usage == "val" and crop.left_out is None]
    validate = f"{first_few(named, NAMED)} for validation" if named else "no crop for validation"
    if proposed:
        return f"split: {validate}; the proposed data.split cuts a part of each crop for it"
    return f"split: {validate}, {_RULES.get(rule, f'by split={rule}')}; data.split changes it"


def _left_out(crops: Sequence[CropFacts]) -> list[str]:
    """Return a line for each reason for which crops are left out."""
    names: dict[str | None, dict[str, None]] = {}
    for crop in crops:
        names.setdefault(crop.left_out, {})[crop.name] = None  # parts of a cut crop have one name
    return [f"left out: {reason}: {first_few(list(of), SHOWN)}" for reason, of in names.items()]


def _usage(crop: CropFacts) -> str:
    return crop.usage if crop.left_out is None else "left out"


def _crop(crop: CropFacts, named: bool) -> list[str]:
    names = list(crop.classes)
    present = [level for level in crop.levels if level.shape is not None]
    return [
        crop.name,
        _usage(crop),
        "by class" if crop.apart else voxel_count(present[0].shape) if present else "-",
        voxel_size(crop.scale) if crop.scale else "-",
        f"{len(present)}" + (f" of {len(crop.levels)}" if len(present) < len(crop.levels) else ""),
        *_storage(crop.levels),
        ", ".join(names) if named else str(len(names)),
        ", ".join(crop.absent) if 0 < len(crop.absent) <= NAMED else str(len(crop.absent)),
        f"{crop.unknown:.0%}" if crop.unknown is not None else "-" if crop.wrong is not None else "?",
        _alignment(crop),
        "  ".join(f"{low:.0f}..{high:.0f}" for low, high in crop.box.values()) if crop.box else "-",
    ]


def _alignment(crop: CropFacts) -> str:
    if crop.off is None or crop.ratio is None:
        return "-"
    return "aligned" if not any(crop.off) else "off by " + " ".join(f"{v:.2g}" for v in crop.off)


def classes_text(crops: Sequence[CropFacts]) -> str:
    """Return the section of the classes, over all crops."""
    rows = [["class", "crops", "with it", "voxels", "share", "unknown", "lost"]]
    names = dict.fromkeys(name for crop in crops for name in crop.classes)
    if not names:
        return ""
    rows += [[name, *_class([crop.classes[name] for crop in crops if name in crop.classes])] for name in names]
    notes = [
        "crops: that annotate the class; with it: those of them that have a voxel of it",
        "share: of the known voxels of those crops whose voxels are counted; unknown: a mean over the crops",
        "lost: part of the foreground, by volume, that is missing at the level that is read",
    ]
    if any("?" in row for row in rows[1:]):
        notes.append("?: not in the metadata; deep=true counts voxels")
    return "\n".join(["Classes", "", table(rows), "", *map(wrapped, notes)])


def _class(annotated: Sequence[ClassFacts]) -> list[str]:
    """Return the row of a class."""
    # Nothing can be counted in a class that cannot be read, or lost of one without a voxel.
    open_count = any(facts.voxels is None and facts.wrong is None for facts in annotated)
    open_loss = any(facts.voxels != 0 and facts.lost is None and facts.wrong is None for facts in annotated)
    present = sum(facts.voxels != 0 and facts.wrong is None for facts in annotated)
    counts = [facts.voxels for facts in annotated if facts.voxels is not None]
    # Crops without a count may have voxels or not: the number of crops is an upper bound, that of voxels a lower one.
    at_most, at_least = ("<= ", ">= ") if len(counts) < len(annotated) else ("", "")
    not_counted, not_lost = "?" if open_count else "-", "?" if open_loss else "-"
    return [
        str(len(annotated)),
        f"{at_most}{present}",
        f"{at_least}{large_count(sum(counts))}" if counts else not_counted,
        _share(annotated) or not_counted,
        _unknown(annotated) or not_counted,
        _lost(annotated) or not_lost,
    ]


def _share(annotated: Sequence[ClassFacts]) -> str:
    """Return the share of the class among the voxels that are known, of the crops with a count; "" without any."""
    counted = [facts for facts in annotated if facts.voxels is not None and facts.size]
    known = sum((facts.size or 0) * (1 - (facts.unknown or 0)) for facts in counted)
    return f"{sum(facts.voxels or 0 for facts in counted) / known:.2%}" if known else ""


def _unknown(annotated: Sequence[ClassFacts]) -> str:
    """Return the mean share of unknown voxels; "" if no crop has it."""
    unknown = [facts.unknown for facts in annotated if facts.unknown is not None]
    return f"{np.mean(unknown):.0%}" if unknown else ""


def _lost(annotated: Sequence[ClassFacts]) -> str:
    """Return the share of foreground that is lost at the scale; "" if no crop has it.

    A coarser level may hold more foreground than the finest: nothing is lost there.
    """
    lost = [max(0.0, facts.lost) for facts in annotated if facts.lost is not None]
    return f"{np.mean(lost):.0%} (worst {max(lost):.0%})" if lost else ""


def encodings_text(crops: Sequence[CropFacts]) -> str:
    """Return the section of labels without an encoding in their metadata; empty without any."""
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


def problems_text(problems: Sequence[Problem], counted: bool = True) -> str:
    """Return the section of the problems.

    Args:
        problems: the problems.
        counted: whether the voxels of labels were read.
    """
    if not problems:
        return "No problems found" if counted else "No problems found in the metadata; deep=true reads the voxels"
    lines = [f"Problems ({len(problems)})"]
    for kind, heading in KINDS.items():
        of_kind = [problem for problem in problems if problem.kind == kind]
        if kind == "config" and of_kind:
            lines.append("\n" + wrapped(heading))
        elif of_kind:
            lines += ["\n" + wrapped(f"{heading}: {len(of_kind)}"), *_problems_of_kind(of_kind)]
    return "\n".join(lines)


def _problems_of_kind(problems: Sequence[Problem]) -> list[str]:
    lines = []
    width = max(len(problem.where) for problem in problems[:SHOWN])
    for problem in problems[:SHOWN]:
        text = problem.text.replace("\n", "\n    ")
        lines.append(wrapped(f"{problem.where:<{width}}  {text}" if problem.where else text, 2))
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more, which json=true lists")
    return lines


def costs_text(costs: Costs, complete: bool) -> str:
    """Return the section of the costs, of the user's configuration if ``complete``, else of the proposal."""
    cache = f"at most {size_text(costs.cache_room)} are cached in {costs.cache_where}"
    lines = [
        "Costs of this configuration" if complete else "Costs of the proposal, with your settings",
        "",
        f"  crops used        {', '.join(f'{split} {n}' for split, n in costs.crops.items())}",
        wrapped(
            f"a batch of {costs.batch_size:<6} {_mib(costs.finished)} for the model, {_mib(costs.compact)} in transfer",
            2,
            18,
        ),
        *(
            wrapped(f"{'' if number else 'prefetch':<18}{together(f'{device}: ')}{why}", 2, 18)
            for number, (device, why) in enumerate(costs.prefetch.items())
        ),
        wrapped(f"decoded voxels    {size_text(costs.cache_bytes)} when everything has been read; {cache}", 2, 18),
    ]
    if costs.unknown is not None:
        lines.append(wrapped(f"training samples  by the strategy {costs.strategy}: {costs.unknown}", 2, 18))
    if costs.frequencies is not None:
        rows = [["class", "drawn for the class", "from a crop with it"]]
        rows += [[name, f"{drawn:.1%}", f"{crop:.1%}"] for name, (drawn, crop) in costs.frequencies.items()]
        heading = f"training samples  by the strategy {costs.strategy}; expected shares:"
        lines += [wrapped(heading, 2, 18), table(rows, 4)]
    if costs.shown is not None:
        heading, _, rest = costs.shown.partition("\n")
        lines += ["", wrapped(heading), rest]
    return "\n".join(lines)


def _mib(arrays: Mapping[str, int]) -> str:
    parts = ", ".join(f"{name} {size / 2**20:.2f}" for name, size in arrays.items())
    return together(f"{sum(arrays.values()) / 2**20:.2f} MiB") + f" ({together(parts)})"
