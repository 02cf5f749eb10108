"""The challenge's score: hand-computed cases, a reference implementation, and the toolbox where it is installed."""

import json
import math
import os
import subprocess

import numpy as np
import pytest
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.evaluation.challenge import INSTANCE_CLASSES
from cellmap_lightning.evaluation.csc_score import (
    Counts,
    CropCounts,
    instance_counts,
    missing_counts,
    pooled,
    semantic_counts,
)

pytest.importorskip("cc3d")

VOXEL = (4.0, 2.0, 2.0)
DIAGONAL = math.sqrt(24)


def boxes(shape, *parts, dtype=np.uint16):
    """A volume with ids in boxes ``(id, (z, y, x), (dz, dy, dx))``."""
    values = np.zeros(shape, dtype)
    for number, start, size in parts:
        values[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = number
    return values


SHAPE = (20, 30, 40)
LONGEST = 30.0  # half the shortest edge: 30 voxels of 2 nm
LOST = 1.01 ** (-LONGEST / DIAGONAL)
A = (23, (2, 2, 2), (6, 6, 6))
B = (29, (2, 2, 20), (6, 6, 6))


def moved(part, number, by):
    return (number, tuple(np.add(part[1], by).tolist()), part[2])


@pytest.mark.parametrize(
    ("prediction", "counts"),
    [
        ([A, B], Counts(2, 0, 0, 2.0, 2)),
        ([], Counts(0, 0, 2, 2 * LOST, 2)),
        ([A], Counts(1, 0, 1, 1 + LOST, 2)),
        # Moved by a voxel along x, 2 nm, each face is that far away.
        ([moved(A, 1, (0, 0, 1)), B], Counts(2, 0, 0, 1 + 1.01 ** (-2 / DIAGONAL), 2)),
        # Along z it is 4 nm.
        ([moved(A, 1, (1, 0, 0)), B], Counts(2, 0, 0, 1 + 1.01 ** (-4 / DIAGONAL), 2)),
        # An object that is nowhere near one.
        ([A, B, (5, (14, 20, 30), (2, 2, 2))], Counts(2, 1, 0, 2 + LOST, 3)),
        # One id for two objects that do not touch is two objects; the same number twice is no fault.
        ([(1, *A[1:]), (1, *B[1:])], Counts(2, 0, 0, 2.0, 2)),
    ],
)
def test_instance_counts_of_small_examples(prediction, counts):
    _is(instance_counts(boxes(SHAPE, *prediction), boxes(SHAPE, A, B), VOXEL), counts)


def _is(result, counts):
    assert (result.tp, result.fp, result.fn, result.distances) == (counts.tp, counts.fp, counts.fn, counts.distances)
    assert result.boundary == pytest.approx(counts.boundary, abs=1e-6)


@pytest.mark.parametrize(("third", "counted"), [(3, 1), (4, 0), (1, 0)])
def test_unmatched_object_with_the_number_of_a_true_object(third, counted):
    """The third component has the number 3, and is far from the true object with that number."""
    truth = boxes(SHAPE, (third, *A[1:]), (2, *B[1:]))
    prediction = boxes(SHAPE, A, B, (5, (14, 20, 30), (2, 2, 2)))
    _is(instance_counts(prediction, truth, VOXEL), Counts(2, 1, 0, 2 + LOST - counted * (1 - LOST), 3))


@pytest.mark.parametrize(("separated", "tp", "fn"), [(True, 2, 0), (False, 1, 1)])
def test_touching_objects_with_two_ids_are_two_objects(separated, tp, fn):
    truth = boxes(SHAPE, (1, (2, 2, 2), (6, 6, 6)), (2, (2, 2, 8), (6, 6, 6)))
    result = instance_counts(truth if separated else (truth > 0).astype(np.uint8), truth, VOXEL)
    assert (result.tp, result.fp, result.fn) == (tp, 0, fn)


@pytest.mark.parametrize(("by", "objects"), [((2, 0, 0), 1), ((2, 2, 0), 1), ((2, 2, 2), 1), ((3, 0, 0), 2)])
def test_parts_of_an_id_with_26_connectivity_are_one_object(by, objects):
    part = (7, (4, 4, 4), (2, 2, 2))
    prediction = boxes(SHAPE, part, moved(part, 7, by))
    result = instance_counts(prediction, prediction, VOXEL)
    assert result.tp + result.fp == objects


@pytest.mark.parametrize(
    ("objects", "true", "skipped"),
    [(50, 1, False), (51, 1, True), (23, 10, False), (176, 10, True), (0, 3, False), (600, 0, False)],
)
def test_too_many_objects_skip_the_crop(objects, true, skipped):
    # The most are 10 n + 50 n exp(-n / 5): 50.9 of one, 167.7 of ten; without a true object any number counts.
    shape = (12, 40, 60)
    prediction, truth = np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)
    prediction[::2, ::2, ::2].flat[:objects] = 0
    places = np.argwhere(np.indices(shape).sum(0) >= 0)
    places = places[(places % 2 == 0).all(1)]
    for number, place in enumerate(places[:objects], 1):
        prediction[tuple(place)] = number
    for number, place in enumerate(places[:true], 1):
        truth[tuple(place)] = number
    result = instance_counts(prediction, truth, VOXEL)
    assert (result is None) == skipped
    if result is not None:
        assert result.tp == min(objects, true)
        assert result.tp + result.fp == objects


@pytest.mark.parametrize("pairs", [2, 3, 4])
def test_too_many_overlaps_skip_the_crop(monkeypatch, pairs):
    monkeypatch.setattr("cellmap_lightning.evaluation.csc_score.MOST_PAIRS", 3)
    prediction = np.arange(1, 3).repeat(4).reshape(1, 1, 8)
    truth = np.array([1, 1, 1, 1, 1, 1, 1, 1] if pairs == 2 else [1, 1, 1, 1, 1, 1, 2, 2] if pairs == 3 else [1, 2] * 4)
    assert (instance_counts(prediction, truth.reshape(1, 1, 8), VOXEL) is None) == (pairs > 3)


def test_semantic_counts_of_a_small_example():
    truth = boxes(SHAPE, (1, (0, 0, 0), (10, 10, 10)), (2, (10, 0, 0), (1, 1, 1)))
    prediction = boxes(SHAPE, (5, (0, 0, 5), (10, 10, 10)))
    assert semantic_counts(prediction, truth) == Counts(500, 500, 501)


@pytest.mark.parametrize("instances", [True, False])
def test_counts_of_missing_classes(instances):
    truth = boxes(SHAPE, A, B)
    expected = Counts(fn=2, distances=2) if instances else Counts(fn=24000)
    assert missing_counts(truth, instances) == expected
    empty = instance_counts(truth * 0, truth, VOXEL) if instances else semantic_counts(truth * 0, truth)
    name = "mito" if instances else "er"
    (missing,) = pooled([CropCounts("crop1", name, expected, "missing")], INSTANCE_CLASSES).classes
    (nothing,) = pooled([CropCounts("crop1", name, empty)], INSTANCE_CLASSES).classes
    assert missing.score == nothing.score == 0
    assert missing.counts.fn >= nothing.counts.fn
    assert missing.counts.boundary <= nothing.counts.boundary


def test_counts_are_summed_over_crops_before_division():
    rows = [
        CropCounts("crop1", "er", Counts(90, 10, 0)),
        CropCounts("crop2", "er", Counts(0, 0, 900)),
        CropCounts("crop1", "pm", Counts()),
        CropCounts("crop1", "mito", Counts(1, 1, 0, 1.5, 2)),
        CropCounts("crop2", "mito", Counts(3, 0, 4, 2.5, 7)),
        CropCounts("crop1", "nuc", Counts(), "skipped"),
        CropCounts("crop2", "ves", Counts(fn=2, distances=2), "missing"),
    ]
    score = pooled(rows, INSTANCE_CLASSES)
    by_name = {c.name: c for c in score.classes}
    assert by_name["er"].score == 90 / 1000
    assert by_name["pm"].score == 1  # nothing anywhere
    assert by_name["mito"].f1 == pytest.approx(8 / 13)
    assert by_name["mito"].score == pytest.approx(math.sqrt(8 / 13 * 4 / 9))
    assert by_name["nuc"].score == 1
    assert (by_name["nuc"].crops, by_name["mito"].crops) == (0, 2)
    assert by_name["ves"].score == 0
    assert score.semantic == pytest.approx((0.09 + 1) / 2)
    assert score.instance == pytest.approx((by_name["mito"].score + 1 + 0) / 3)
    assert score.overall == pytest.approx(math.sqrt(score.instance * score.semantic))
    assert pooled(rows[:3], INSTANCE_CLASSES).overall == 0


@pytest.mark.parametrize(
    ("prediction", "truth", "match"),
    [
        (np.zeros((2, 2, 2), int), np.zeros((2, 2, 3), int), "annotation must have the same shape"),
        (np.zeros((2, 2), int), np.zeros((2, 2, 2), int), "annotation must have the same shape"),
        (np.zeros((2, 2, 2), int), np.full((2, 2, 2), -1), "must be at least 0, got -1"),
    ],
)
def test_invalid_volumes(prediction, truth, match):
    with pytest.raises(CellMapValueError, match=match):
        instance_counts(prediction, truth, VOXEL)


def scattered(seed, shape=(24, 32, 40), objects=14, ids=None, touching=False):
    """Random ellipsoids of random ids."""
    rng = np.random.default_rng(seed)
    values = np.zeros(shape, np.uint16)
    chosen = rng.permutation(np.arange(1, 2 * objects + 1))[:objects] if ids is None else ids
    grid = np.indices(shape)
    for number in chosen:
        centre = rng.uniform(0, shape)
        radii = rng.uniform(2, 6, 3)
        inside = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) < 1
        values[inside & ((values == 0) | touching)] = number
    return values


def perturbed(truth, seed):
    """Its objects moved, merged, dropped and joined by others."""
    rng = np.random.default_rng(seed)
    values = np.roll(truth, rng.integers(-2, 3, 3), (0, 1, 2))
    ids = np.unique(values)[1:]
    drop, merge = rng.choice(ids, 2, replace=False), rng.choice(ids, 2, replace=False)
    values[np.isin(values, drop)] = 0
    values[values == merge[0]] = merge[1]
    more = scattered(seed + 1000, truth.shape, 4)
    values[(values == 0) & (more > 0)] = more[(values == 0) & (more > 0)] + 100
    return values


def independently(prediction, truth, voxel):
    """Compute the counts by a reference implementation: a dense linear assignment, distances over all voxels."""
    parts = [
        (ndimage.label(prediction == v, np.ones((3, 3, 3)))) for v in np.unique(prediction)[1:]
    ]  # fmt: skip
    predicted = [labels == n for labels, count in parts for n in range(1, count + 1)]
    # The scorer's numbers follow the order of the first voxels.
    import cc3d

    numbers = cc3d.connected_components(prediction)
    predicted.sort(key=lambda mask: int(numbers[mask][0]))
    ids = np.unique(truth)[1:]
    true = [truth == value for value in ids]
    overlap = np.array([[(t & f).sum() / (t | f).sum() for f in predicted] for t in true], np.float32)
    cost = np.where(overlap > 0, ((1 - overlap.astype(float)) * 1e6).astype(int), 10**9)
    table = np.hstack([cost, np.where(np.eye(len(true), dtype=bool), 10**6 + 1, 10**9)])
    matches = {r: c for r, c in zip(*linear_sum_assignment(table), strict=True) if c < len(predicted)}
    longest = min(s * n / 2 for s, n in zip(voxel, truth.shape, strict=True))
    distances = []
    for number, value in enumerate(ids):
        mask = predicted[matches[number]].copy() if number in matches else np.zeros(truth.shape, bool)
        if value <= len(predicted) and value - 1 not in matches.values():
            mask |= predicted[value - 1]
        if not mask.any():
            distances.append(longest)
            continue
        one, other = (ndimage.distance_transform_edt(~m, sampling=voxel) for m in (mask, true[number]))
        distances.append(min(longest, max(one[true[number]].max(), other[mask].max())))
    distances += [longest] * (len(predicted) - len(matches))
    boundary = sum(1.01 ** (-d / np.linalg.norm(voxel)) for d in distances)
    return Counts(len(matches), len(predicted) - len(matches), len(ids) - len(matches), boundary, len(distances))


@pytest.mark.parametrize("seed", range(6))
def test_random_objects_equal_a_dense_reference(seed):
    truth = scattered(seed)
    prediction = perturbed(truth, seed)
    result, expected = instance_counts(prediction, truth, VOXEL), independently(prediction, truth, VOXEL)
    assert (result.tp, result.fp, result.fn, result.distances) == (
        expected.tp, expected.fp, expected.fn, expected.distances,
    )  # fmt: skip
    assert result.boundary == pytest.approx(expected.boundary, abs=1e-5)
    assert 0 < result.tp < len(np.unique(truth))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.uint64])
def test_dtypes_of_ids(dtype):
    truth, prediction = scattered(1), perturbed(scattered(1), 1)
    result = instance_counts(prediction.astype(dtype), truth.astype(dtype), VOXEL)
    assert result == instance_counts(prediction, truth, VOXEL)
    assert missing_counts(truth.astype(dtype), True) == missing_counts(truth, True)


def test_largest_ids():
    truth, prediction = scattered(1), perturbed(scattered(1), 1)
    ids = np.unique(truth)
    far = np.concatenate([[0], (1 << 40) + ids[1:].astype(np.uint64)]).astype(np.uint64)
    result = instance_counts(prediction, far[np.searchsorted(ids, truth)], VOXEL)
    expected = instance_counts(prediction, truth, VOXEL)
    assert (result.tp, result.fp, result.fn) == (expected.tp, expected.fp, expected.fn)


TOOLBOX = """
import json, sys
import numpy as np
from cellmap_segmentation_challenge.utils.eval_utils.aggregation import combine_scores
from cellmap_segmentation_challenge.utils.eval_utils.scoring import score_instance, score_semantic
with np.load(sys.argv[1]) as volumes:
    voxel = tuple(volumes["voxel"].tolist())
    scores = {}
    for key in volumes.files:
        if key.startswith("truth/"):
            _, crop, name = key.split("/")
            pair = volumes[f"prediction/{crop}/{name}"], volumes[key]
            score = score_instance(*pair, voxel) if name in volumes["instances"] else score_semantic(*pair)
            scores.setdefault(crop, {})[name] = dict(score, is_missing=False)
scores = combine_scores(scores)
def plain(value):
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else (
        value if value is None or isinstance(value, str) else float(value))
print("SCORES " + json.dumps(plain(scores)))
"""


def toolbox_volumes():
    """Yield crop, class, prediction and annotation: random objects, and the special cases of the scorer."""
    for seed in range(8):
        for name in ("mito", "nuc", "ves", "er", "pm"):
            truth = scattered(seed + 50 * len(name), objects=3 + seed * 3, touching=bool(seed % 2))
            prediction = perturbed(truth, seed)
            if (seed, name) in ((3, "mito"), (4, "er")):
                prediction = np.zeros_like(prediction)
            if (seed, name) in ((5, "mito"), (6, "nuc")):
                truth = np.zeros_like(truth)
            if (seed, name) == (7, "ves"):
                prediction = (np.random.default_rng(0).random(truth.shape) < 0.05).astype(np.uint8)
                truth = boxes(truth.shape, A)
            yield f"crop{seed}", name, prediction, truth


def toolbox_scores(python, folder, volumes):
    """Return the scores of the challenge's toolbox, run by another Python."""
    np.savez(folder / "volumes.npz", voxel=VOXEL, instances=["mito", "nuc", "ves"], **volumes)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"PER_INSTANCE_THREADS": "1", "CSC_TEST_CROP_MANIFEST_URL": (folder / "manifest.csv").as_uri()}
    (folder / "manifest.csv").write_text("crop_name,dataset,class_label,voxel_size,translation,shape\n")
    command = [python, "-c", TOOLBOX, str(folder / "volumes.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("SCORES ")).removeprefix("SCORES "))


def test_score_equals_the_official_toolbox(tmp_path):
    """Set CSC_PYTHON to the Python of an environment that has the challenge's toolbox."""
    python = os.environ.get("CSC_PYTHON")
    if not python:
        pytest.skip("CSC_PYTHON does not name a Python that has the challenge's toolbox")
    volumes, rows = {}, []
    for crop, name, prediction, truth in toolbox_volumes():
        volumes[f"truth/{crop}/{name}"], volumes[f"prediction/{crop}/{name}"] = truth, prediction
        semantic = name in ("er", "pm")
        counts = semantic_counts(prediction, truth) if semantic else instance_counts(prediction, truth, VOXEL)
        rows.append(CropCounts(crop, name, counts or Counts(), "scored" if counts else "skipped"))
    expected = toolbox_scores(python, tmp_path, volumes)
    for row in rows:
        scores = expected[row.crop][row.name]
        assert [row.counts.tp, row.counts.fp, row.counts.fn] == [scores[key] for key in ("tp", "fp", "fn")], row
        if row.name in INSTANCE_CLASSES:
            assert row.counts.boundary == pytest.approx(scores["hausdorff_norm_sum"], abs=1e-6)
    assert "skipped" in [row.status for row in rows]
    score = pooled(rows, INSTANCE_CLASSES)
    for c in score.classes:
        key = "combined_score" if c.instances else "iou"
        assert c.score == pytest.approx(expected["label_scores"][c.name][key], abs=1e-6)
    for value, key in ((score.instance, "instance_"), (score.semantic, "semantic_"), (score.overall, "")):
        assert value == pytest.approx(expected[f"overall_{key}score"], abs=1e-6)
    assert 0.2 < score.overall < 0.95
