"""The table of the runs of a sweep."""

import json
import math
import statistics

import pytest
import yaml

from cellmap_lightning.commands.sweep_table import sweep_table, write_scores


def write_run(folder, overrides, value, **classes):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    if value is not None:
        scores = {name: {"dice": dice, "constant": 0.1} for name, dice in classes.items()}
        write_scores(folder, "val/dice", value, scores)


def cells(line):
    return [part.strip() for part in line.split("  ") if part.strip()]


def test_folds_have_a_mean(tmp_path):
    values = [0.0, 0.625, 0.75]
    for fold, value in enumerate(values):
        write_run(tmp_path / str(fold), ["data.split=kfold", f"data.fold={fold}", "+x=1"], value, mito=value / 2)
    head, *rows, mean = sweep_table(tmp_path).splitlines()
    assert cells(head) == ["run", "data.fold", "val/dice", "mito"]
    assert [cells(row) for row in rows] == [[str(i), str(i), f"{v:.3f}", f"{v / 2:.3f}"] for i, v in enumerate(values)]
    spread = statistics.stdev(values)
    assert cells(mean) == [
        "mean ± sd",
        "all folds",
        f"{statistics.mean(values):.3f} ± {spread:.3f}",
        f"{statistics.mean(values) / 2:.3f} ± {spread / 2:.3f}",
    ]


def test_folds_of_other_settings_are_apart(tmp_path):
    for number, (rate, fold, value) in enumerate([(1, 0, 0.2), (1, 1, 0.4), (2, 0, 0.6), (2, 1, 0.8)]):
        write_run(tmp_path / str(number), [f"task.lr={rate}", f"data.fold={fold}"], value)
    means = [cells(line) for line in sweep_table(tmp_path).splitlines() if line.startswith("mean")]
    assert [row[1:4] for row in means] == [["1", "all folds", "0.300 ± 0.141"], ["2", "all folds", "0.700 ± 0.141"]]


@pytest.mark.parametrize("value", [None, math.nan])
def test_runs_that_failed_are_named_and_not_averaged(tmp_path, value):
    write_run(tmp_path / "0", ["data.fold=0"], 0.5)
    write_run(tmp_path / "1", ["data.fold=1"], value)
    _, _, failed, mean = map(cells, sweep_table(tmp_path).splitlines())
    assert failed == ["1", "1", "failed"]
    assert mean[-1] == "0.500 ± 0.000"


def test_runs_are_in_order_and_without_scores_there_is_no_table(tmp_path):
    assert sweep_table(tmp_path) == ""
    write_run(tmp_path / "0", ["seed=0"], None)
    assert sweep_table(tmp_path) == ""
    for number in range(1, 12):
        write_run(tmp_path / str(number), [f"seed={number}"], number / 100)
    assert [cells(line)[0] for line in sweep_table(tmp_path).splitlines()[1:]] == [str(n) for n in range(12)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_scores_that_are_not_finite_are_null(tmp_path, value):
    run = tmp_path / "0"
    write_run(run, ["seed=0"], 0.5)
    write_scores(run, "val/dice", value, {"mito": {"dice": 0.25}, "er": {"dice": math.nan}})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    scores = json.loads((run / "scores.json").read_text(), parse_constant=refuse)
    assert scores == {"monitor": "val/dice", "value": None, "classes": {"mito": 0.25, "er": None}}
    assert cells(sweep_table(tmp_path).splitlines()[1]) == ["0", "failed", "0.250", "failed"]
