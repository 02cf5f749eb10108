"""``cellmap-tune`` over predictions of crops, from the command line."""

import shutil
from itertools import permutations

import pytest
import yaml

from tests.commands.test_cli import run_forked
from tests.evaluation.test_predicted_crops import CROPS, annotate, folder, predict  # noqa: F401


def tune(folder, *arguments, prediction="predictions", truth="data"):  # noqa: F811
    given = [f"prediction={prediction}", f"truth={truth}", "class=mito", "metric=dice", "method=components"]
    return run_forked(*given, *arguments, cwd=folder, command="tune")


def test_all_crops_that_are_predicted_and_annotated_are_used(folder):  # noqa: F811
    annotate(folder, "jrc_b.zarr/crop7")
    code, text = tune(folder, "out=mito.yaml")
    assert code == 0, text
    assert 0.7 <= yaml.safe_load((folder / "mito.yaml").read_text())["mito"]["threshold"] <= 0.9
    rows = {line[:8].strip(): line.split("  ")[-1] for line in text.splitlines()}
    assert rows["search"] == "jrc_a.zarr/crop1, jrc_a.zarr/crop12"
    assert rows["held out"] == "jrc_b.zarr/crop1"
    assert "left out (annotated with mito, not predicted): jrc_b.zarr/crop7" in text
    assert "no crop" not in text


def test_parameters_do_not_depend_on_the_order_of_folders(folder):  # noqa: F811
    shutil.rmtree(folder / "predictions" / "jrc_a.zarr" / "crop12")
    predict(folder, "jrc_a.zarr/crop12", inside=235, outside=200)  # needs a higher threshold
    files = []
    for number, order in enumerate(permutations(CROPS)):
        if number % 2:
            continue
        prediction = f"[{','.join(f'predictions/{crop}' for crop in order)}]"
        truth = f"[{','.join(f'data/{d}/{d}.zarr' for d in dict.fromkeys(c[:5] for c in order))}]"
        code, text = tune(folder, f"out={number}.yaml", prediction=prediction, truth=truth)
        assert code == 0, text
        files.append((folder / f"{number}.yaml").read_bytes())
    code, text = tune(folder, "out=folder.yaml", "crops=[jrc_a/crop12,jrc_a/crop1]")
    assert code == 0, text
    assert set(files) == {(folder / "folder.yaml").read_bytes()}


@pytest.mark.parametrize("arguments", [["held_out=0"], ["crops=[jrc_a/crop1]", "held_out=[]"], ["one"]])
def test_a_score_of_the_search_alone_is_warned_of(folder, arguments):  # noqa: F811
    if arguments == ["one"]:
        shutil.rmtree(folder / "predictions" / "jrc_b.zarr")
        shutil.rmtree(folder / "predictions" / "jrc_a.zarr" / "crop12")
        arguments = []
    code, text = tune(folder, "out=mito.yaml", *arguments)
    assert code == 0, text
    assert "no crop is held out" in text
    assert ("jrc_a.zarr/crop1 alone is predicted and annotated" in text) == (not arguments)
    assert "these are scores of the crops that were searched; on other crops they will be lower" in text


def test_fewer_crops_held_out_than_asked_for_are_warned_of(folder):  # noqa: F811
    code, text = tune(folder, "out=mito.yaml", "held_out=5")
    assert code == 0, text
    assert "held_out=5: 2 crops are held out, since there are no more" in text


@pytest.mark.parametrize("values", [(150, 140), (175, 20), (128, 10)])
def test_parameters_that_are_worse_than_the_defaults_are_named(folder, values):  # noqa: F811
    shutil.rmtree(folder / "predictions" / "jrc_b.zarr" / "crop1")
    predict(folder, "jrc_b.zarr/crop1", inside=values[0], outside=values[1])  # a high threshold loses its objects
    code, text = tune(folder, "out=mito.yaml")
    assert code == 0, text
    content = (folder / "mito.yaml").read_text()
    (advice,) = [line for line in text.splitlines() if line.startswith("on the held-out crops")]
    assert ": keep the defaults, or search on other crops" in advice
    default, tuned = (next(line for line in text.splitlines() if line.startswith("held out"))).split()[2:4]
    assert f"({default} to {tuned})" in advice
    assert float(tuned) < float(default)
    assert content.startswith(f"# {advice}\nmito:")
    assert yaml.safe_load(content)["mito"]["method"] == "components"


def test_parameters_that_are_better_have_no_comment(folder):  # noqa: F811
    code, text = tune(folder, "out=mito.yaml")
    assert code == 0, text
    assert "keep the defaults" not in text
    assert (folder / "mito.yaml").read_text().startswith("mito:")


@pytest.mark.parametrize(
    ("trained", "search", "held_out"),
    [
        (CROPS[:1], "jrc_a.zarr/crop12", "jrc_b.zarr/crop1"),
        (CROPS[2:], "jrc_a.zarr/crop1", "jrc_a.zarr/crop12"),
        (CROPS[1:], "jrc_a.zarr/crop1", "jrc_b.zarr/crop1 *"),
    ],
)
def test_crops_that_were_trained_on_are_marked(folder, trained, search, held_out):  # noqa: F811
    lines = ["usage,raw,target"]
    for crop in trained:
        (path,) = (folder / "data").rglob(crop.replace("/", "/recon-1/labels/groundtruth/"))
        lines.append(f"train,{folder / 'raw'},{path}/[mito]")
    (folder / "crops.csv").write_text("\n".join(lines) + "\n")
    code, text = tune(folder, "out=mito.yaml", "trained=crops.csv")
    assert code == 0, text
    rows = {line[:8].strip(): line.split("  ")[-1] for line in text.splitlines()}
    assert (rows["search"], rows["held out"]) == (search, held_out)
    assert ("* trained on" in text.splitlines()) == held_out.endswith("*")
    assert ("the network was trained on jrc_b.zarr/crop1: the held-out score is too high" in text) == (
        held_out.endswith("*")
    )
    unused = [crop for crop in trained if crop != held_out.removesuffix(" *")]
    assert f"left out (trained on): {', '.join(unused)}" in text


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("truth=nowhere", "truth=nowhere does not exist; give the folder of the annotated crops"),
        ("prediction=nowhere", "prediction=nowhere does not exist; give the output of cellmap-predict"),
        ("prediction=predictions/jrc_a.zarr/crop1/mito", "it holds no <dataset>.zarr/<crop>/<class>"),
        ("crops=[crop1]", "'crop1' is the name of several crops; give one of jrc_a.zarr/crop1, jrc_b.zarr/crop1"),
        ("class=mitto", "no crop is both predicted and annotated with 'mitto'; predicted are jrc_a.zarr/crop1, "),
        ("class=mitto", "annotated with it none; did you mean 'mito'?"),
        ("truth=[]", "truth must be a path or a list of paths, got []"),
        ("method=watersheds", "did you mean 'watershed'?"),
    ],
)
def test_wrong_arguments_for_predictions_of_crops(folder, argument, message):  # noqa: F811
    given = {"prediction": "predictions", "truth": "data", "class": "mito", "out": "x.yaml"}
    given |= dict([argument.split("=", 1)])
    code, text = run_forked(*(f"{k}={v}" for k, v in given.items()), cwd=folder, command="tune")
    assert code == 1, text
    assert message in text
    assert "Traceback" not in text
