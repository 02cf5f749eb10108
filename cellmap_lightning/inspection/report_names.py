"""Names of the crops of a report, which tell crops of one name apart."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from cellmap_lightning.io.store import parts_of
from cellmap_lightning.splits.crop_names import target_of
from cellmap_lightning.splits.entries import CropRecord


def report_names(entries: Sequence[CropRecord]) -> list[str]:
    """Return the name of each entry: ``jrc_a/crop1``, and where several share it, as much more as tells them apart.

    That is the end of the path of the crop, and of one crop with several raw volumes also that of raw. Entries with one
    crop and one raw volume, such as the parts of a crop that is cut, have one name.

    Args:
        entries: the crops; one whose target is malformed is named by its place in the configuration or CSV.
    """
    places: list[tuple[str, str]] = []
    labels: list[str] = []
    for entry in entries:
        target = target_of(entry)
        places.append((target.before if target else entry.where, entry.input_path))
        labels.append(target.label if target else entry.where)
    sharing: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for label, place in zip(labels, places, strict=True):
        sharing[label].add(place)
    names: dict[str, dict[tuple[str, str], str]] = {}
    for label, several in sharing.items():
        crops = _ends({crop for crop, _ in several}, label)
        raws = {crop: _ends({raw for other, raw in several if other == crop}, "") for crop in crops}
        names[label] = {
            (crop, raw): crops[crop] + (f" ({raws[crop][raw]})" if raws[crop][raw] else "") for crop, raw in several
        }
    return [names[label][place] for label, place in zip(labels, places, strict=True)]


def _ends(paths: Iterable[str], alone: str) -> Mapping[str, str]:
    """Return the shortest ends of some paths that differ, of a whole number of folders; ``alone`` for a single path."""
    parts = {path: parts_of(path).parts for path in sorted(paths)}
    if len(parts) == 1:
        return dict.fromkeys(parts, alone)
    for length in range(1, max(map(len, parts.values())) + 1):
        ends = {path: "/".join(of[-length:]) for path, of in parts.items()}
        if len(set(ends.values())) == len(ends):
            return ends
    return {path: path for path in parts}
