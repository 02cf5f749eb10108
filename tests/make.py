"""Datasets and splits from options in one mapping, as parametrized tests have them."""

import inspect
from dataclasses import fields, replace

from cellmap_lightning import CellMapDataset, CellMapDataSplit
from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from cellmap_lightning.splits.options import SplitOptions


def grouped(defaults, options):
    """The options with those of each group in its dataclass; `defaults` are the groups without any."""
    options = dict(options)
    for name, default in defaults.items():
        group = options.pop(name, default)
        changes = {f.name: options.pop(f.name) for f in fields(group) if f.name in options}
        options[name] = replace(group, **changes)
    return options


def make_dataset(*args, **options):
    """A `CellMapDataset`; options of reading, labels and intensity are keywords like any other."""
    groups = {"read": ReadOptions(), "labels": LabelOptions(), "intensity": IntensityOptions()}
    return CellMapDataset(*args, **grouped(groups, options))


def make_split(*args, **options):
    """A `CellMapDataSplit`; options of the split, reading, labels and intensity are keywords like any other."""
    groups = {
        "options": SplitOptions(), "read": ReadOptions(), "labels": LabelOptions(too_coarse="drop"),
        "intensity": IntensityOptions(),
    }  # fmt: skip
    names = list(inspect.signature(CellMapDataSplit).parameters)
    return CellMapDataSplit(**grouped(groups, dict(zip(names, args, strict=False)) | options))
