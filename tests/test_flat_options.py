from dataclasses import fields
from inspect import signature

import pytest

from cellmap_lightning import CellMapDataModule, CellMapDataset, CellMapDataSplit
from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from cellmap_lightning.errors import CellMapError, CellMapTypeError
from cellmap_lightning.flat_options import from_flat
from cellmap_lightning.splits.options import SplitOptions

GROUPS = (SplitOptions, ReadOptions, LabelOptions, IntensityOptions)
INPUTS = {"raw": {"shape": [8, 8, 8], "scale": [8, 8, 8]}}
#: A value that is not the default, neither of the data module nor of the dataclass, for each flat option.
CHANGED = {
    "split": "random", "val_fraction": 0.4, "fold": 1, "n_folds": 3, "manifest": "crops.csv", "only_datasets": ["*"],
    "only_crops": ["raw*"], "planes": ["xz"], "strategy": "uniform", "balance_datasets": True, "leakage": "warn",
    "held_out": "test.csv",
    "max_workers": 3, "cache": "none", "cache_bytes": 10**9, "device_cache_bytes": 10**6, "reader": "tensorstore",
    "missing_raw": "fill", "max_upsampling": 3.0, "read_attempts": 2, "read_timeout": 7.0,
    "storage_options": {"anon": True}, "level_translations": "stored",
    "target_value_transforms": abs, "class_relation_dict": {"er": ["mito"]}, "infer": ["subset"],
    "class_table": "classes.csv", "label_downsample": "any", "unknown": 255, "missing_labels": "unknown",
    "unannotated_classes": "unknown", "nan_targets": False, "too_coarse": "upsample",
    "raw_value_transforms": None, "normalize": "zscore", "invert": True, "intensity_transforms": {"noise": [0, 0.1]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "given", "match"),
    [
        (CellMapDataset, {"cache": "disk"}, r"CellMapDataset: .*'cache'; use read=ReadOptions\(cache=\.\.\.\)"),
        (CellMapDataset, {"nan_targets": False}, r"use labels=LabelOptions\(nan_targets=\.\.\.\)"),
        (CellMapDataset, {"normalize": "zscore"}, r"use intensity=IntensityOptions\(normalize=\.\.\.\)"),
        (CellMapDataset, {"clases": ["mito"]}, r"no argument 'clases'; did you mean 'classes'\?"),
        (CellMapDataset, {"cach": "disk"}, r"no argument 'cach'; did you mean 'cache'\?"),
        (CellMapDataset, {"qqq": 1}, r"no argument 'qqq'; it has input_path, .*, intensity$"),
        (CellMapDataSplit, {"pad": True}, r"CellMapDataSplit: .*'pad'; use read=ReadOptions\(pad=\.\.\.\)"),
        (CellMapDataSplit, {"fold": 1}, r"use options=SplitOptions\(fold=\.\.\.\)"),
        (CellMapDataSplit, {"infer": ["er"]}, r"use labels=LabelOptions\(infer=\.\.\.\)"),
    ],
)
def test_flat_option(owner, given, match):
    with pytest.raises(CellMapTypeError, match=match):
        owner("raw", **given)


@pytest.mark.parametrize("kind", GROUPS)
def test_each_option_has_the_value_of_its_key(kind):
    defaults = kind()
    values = {field.name: getattr(defaults, field.name) for field in fields(kind)}
    assert from_flat(kind, {"unrelated": 1}) == defaults
    for name, value in CHANGED.items():
        options = from_flat(kind, {"unrelated": 1, name: value})
        expected = value if name in values else None
        assert getattr(options, name, None) == expected
        rest = {other: getattr(options, other) for other in values if other != name}
        assert rest == {other: default for other, default in values.items() if other != name}


def test_an_invalid_flat_value_is_refused_by_its_dataclass():
    with pytest.raises(CellMapError, match="cache must be"):
        from_flat(ReadOptions, {"cache": "nowhere", "pad": True})


def test_no_key_belongs_to_two_dataclasses():
    names = [field.name for kind in GROUPS for field in fields(kind)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", sorted({*CHANGED, "pad"} - {"manifest"}))  # a manifest is read at once
def test_each_key_of_the_data_module_reaches_its_options(name):
    """The options are picked by name: a key that is misspelt in either place would be dropped in silence."""
    value = CHANGED.get(name, False)
    datasets = {"train": [{"raw": "raw1"}, {"raw": "raw2"}]}
    data = CellMapDataModule(input_arrays=INPUTS, datasets=datasets, **{name: value})
    groups = (data.splits.options, data.splits.read, data.splits.labels, data.splits.intensity)
    assert [getattr(group, name) for group in groups if hasattr(group, name)] == [value]


def test_the_changed_keys_are_all_of_the_data_module_that_are_options():
    options = {field.name for kind in GROUPS for field in fields(kind)}
    # `pad` is left out, whose value that is not the default of one is the default of the other.
    assert {*CHANGED, "pad"} == options & set(signature(CellMapDataModule).parameters)
