"""Parameters of a segmentation that are searched on annotated crops."""

import math
from itertools import product

import numpy as np
import pytest
import yaml

from cellmap_lightning.errors import CellMapError
from cellmap_lightning.evaluation.tuning import Tuner, read_crop
from cellmap_lightning.instances.options import SegmentationOptions
from cellmap_lightning.instances.source import open_source
from cellmap_lightning.io.writer import write_group, write_multiscale
from tests.commands.test_cli import run_forked

STEP = (8, 8, 8)


def scene(seed):
    """Balls with an id each, and probabilities that are high in them, 0.6 between them, with specks of noise."""
    rng = np.random.default_rng(seed)
    grid = np.moveaxis(np.indices((24, 48, 48)), 0, -1)
    truth = np.zeros(grid.shape[:3], np.uint8)
    for number, (y, x) in enumerate(product((12, 36), (12, 36)), 1):
        truth[((grid - (12, y, x)) ** 2).sum(-1) <= 8**2] = number
    probability = np.where(truth > 0, 0.95, 0.1)
    probability[10:14, :, 10:14] = np.maximum(probability[10:14, :, 10:14], 0.6)  # a bridge between two of them
    specks = rng.integers(0, (24, 48, 48), (12, 3))
    probability[tuple(specks.T)] = 0.9
    return truth, np.rint(probability * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three crops side by side, and their prediction."""
    path = tmp_path_factory.mktemp("tuning")
    write_group(path / "pred.zarr")
    scenes = [scene(seed) for seed in range(3)]
    whole = np.concatenate([stored for _, stored in scenes], axis=2)
    attributes = {"cellmap": {"prediction": {"class_name": "mito", "values": "scaled", "probability_1": 255}}}
    write_multiscale(path / "pred.zarr" / "mito", whole, scale=STEP, translation=(0, 0, 0), attributes=attributes)
    annotation = {"type": "instance_segmentation", "encoding": {"absent": 0, "unknown": 255}}
    for number, (truth, _) in enumerate(scenes):
        crop = path / "crops" / f"crop{number + 1}"
        crop.mkdir(parents=True)
        write_multiscale(
            crop / "mito", truth, scale=STEP, translation=(0, 0, 8 * 48 * number),
            attributes={"cellmap": {"annotation": {"class_name": "mito", "annotation_type": annotation}}},
        )  # fmt: skip
    return path


def tuner(folder, metric, held_out=1, **options):
    source = open_source(str(folder / "pred.zarr"), "mito")
    crops = [read_crop(source, folder / "crops" / f"crop{n}", "mito") for n in (1, 2, 3)]
    split = len(crops) - held_out
    return Tuner(source, crops[:split], crops[split:], metric, SegmentationOptions(method="components", **options))


@pytest.mark.parametrize("metric", ["dice", "f1", "csc"])
def test_the_best_parameters_are_found(folder, metric):
    result = tuner(folder, metric).run()
    assert result.score > result.default
    assert result.held_out > result.held_out_default
    assert min(result.score, result.held_out) > 0.997  # specks that touch an object stay
    assert 0.6 < result.options.threshold <= 0.95
    assert 1 < result.options.min_volume / 8**3 < 2000


def test_the_result_is_that_of_all_combinations(folder):
    search = tuner(folder, "f1")
    best = search.run()
    grid = [
        search.score(SegmentationOptions("components", threshold=t, min_volume=v), search.crops)
        for t, v in product(*search.lists.values())
    ]
    assert best.score == max(grid)
    assert best.combinations < len(grid)


def test_crops_that_are_held_out_do_not_matter(folder):
    whole, part = tuner(folder, "f1"), tuner(folder, "f1", held_out=1)
    part.held_out = []
    a, b = whole.run(), part.run()
    assert a.options == b.options
    assert math.isnan(b.held_out)


def test_the_command_writes_what_a_submission_takes(folder, tmp_path):
    arguments = [f"prediction={folder}/pred.zarr", f"truth={folder}/crops", "class=mito", "method=components"]
    code, text = run_forked(*arguments, "out=mito.yaml", cwd=tmp_path, command="tune")
    assert code == 0, text
    ((name, options),) = yaml.safe_load((tmp_path / "mito.yaml").read_text()).items()
    assert name == "mito"
    assert SegmentationOptions(**options).method == "components"
    assert "search" in text
    assert "held out" in text
    assert text.index("crop1, crop2") < text.index("crop3")
    code, text = run_forked(*arguments, "out=mito.yaml", cwd=tmp_path, command="tune")
    assert code == 1
    assert "mito.yaml exists; set overwrite=true" in text


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("metric=f2", "metric must be one of dice, f1, csc, got 'f2'"),
        ("class=er", "it has no class 'er'"),
        ("crops=[crop9]", "no crop 'crop9' is both predicted and annotated; there are crop1, crop2, crop3"),
        ("held_out=[crop1,crop2,crop3]", "no crop is left for the search"),
        ("held_out=many", "held_out must be names of crops or a number of them"),
        ("truth=nowhere", "truth=nowhere does not exist"),
        ("method=watersheds", "did you mean 'watershed'?"),
        ("prediction=nowhere", "nowhere"),
    ],
)  # fmt: skip
def test_wrong_arguments(folder, tmp_path, argument, message):
    given = {"prediction": folder / "pred.zarr", "truth": folder / "crops", "class": "mito", "out": "x.yaml"}
    given |= dict([argument.split("=", 1)])
    code, text = run_forked(*(f"{k}={v}" for k, v in given.items()), cwd=tmp_path, command="tune")
    assert code == 1, text
    assert message in text
    assert "Traceback" not in text


def test_instances_are_needed_to_score_them(folder, tmp_path):
    source = open_source(str(folder / "pred.zarr"), "mito")
    crop = read_crop(source, folder / "crops" / "crop1", "mito")
    crop.truth[crop.truth > 0] = 1
    text = "mito: no annotation of crop1 has instances, which metric=f1 needs; .* cellmap-segment method=components"
    with pytest.raises(CellMapError, match=text):
        Tuner(source, [crop], [], "f1")
