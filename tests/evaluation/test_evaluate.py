"""Voxel scores of stored predictions."""

import numpy as np
import pytest
import torch
import zarr

from cellmap_lightning.commands.predict_config import groundtruth
from cellmap_lightning.errors import CellMapValueError, ChunkError
from cellmap_lightning.evaluation import pairs
from cellmap_lightning.evaluation.crop_parts import trained_crops
from cellmap_lightning.evaluation.evaluate import SCORES, check_prediction, evaluate
from cellmap_lightning.evaluation.instance_scores import NoInstancesError
from cellmap_lightning.evaluation.pairs import Annotation
from cellmap_lightning.evaluation.voxel_scores import Score
from cellmap_lightning.io.ngff import read_encoding, read_multiscale
from cellmap_lightning.io.store import LISTING
from cellmap_lightning.io.writer import write_group, write_multiscale


def test_scores_ignore_unannotated_voxels(volume, tmp_path):
    """A prediction that equals the labels is perfect; one with the labels removed in one half has half the recall."""
    crop = f"{volume.path}/recon-1/labels/groundtruth/crop2/mito"
    image = read_multiscale(crop)
    level, encoding = image.finest, read_encoding(image, image.finest)
    stored = zarr.open_array(str(level.path), mode="r")[...]
    known, there = stored != encoding.unknown, (stored != encoding.absent) & (stored != encoding.unknown)
    spoilt = there.copy()
    spoilt[: len(spoilt) // 2] = False
    for values, name in ((there, "whole"), (spoilt, "spoilt")):
        position = {"scale": level.scale, "translation": level.translation}
        write_multiscale(tmp_path / name / "mito", np.where(values, 255, 0).astype(np.uint8), **position)
    (whole,) = [s for s in scores_of(tmp_path / "whole", volume) if s.crop == "crop2"]
    assert (whole.known, whole.tp, whole.fp, whole.fn) == (known.sum(), there.sum(), 0, 0)
    assert whole.dice == whole.iou == whole.precision == whole.recall == 1
    (half,) = [s for s in scores_of(tmp_path / "spoilt", volume) if s.crop == "crop2"]
    left = int(spoilt.sum())
    assert (half.tp, half.fp, half.fn) == (left, 0, there.sum() - left)
    assert half.precision == 1
    assert half.recall == pytest.approx(left / there.sum())


def test_scores_equal_torchmetrics():
    from torchmetrics.classification import BinaryF1Score, BinaryJaccardIndex, BinaryPrecision, BinaryRecall

    rng = torch.Generator().manual_seed(0)
    truth, there = (torch.rand(500, generator=rng) > 0.6 for _ in range(2))
    known = torch.rand(500, generator=rng) > 0.3
    tp, fp, fn = ((known & a & b).sum().item() for a, b in ((there, truth), (there, ~truth), (~there, truth)))
    score = Score("crop", "mito", int(known.sum()), tp, fp, fn)
    for name, metric in (
        ("dice", BinaryF1Score()), ("iou", BinaryJaccardIndex()), ("precision", BinaryPrecision()),
        ("recall", BinaryRecall()),
    ):  # fmt: skip
        expected = metric(there[known].int(), truth[known].int()).item()
        assert getattr(score, name) == pytest.approx(expected, abs=1e-6)


def scores_of(output, volume):
    return [s.voxels for s in evaluate(output, groundtruth(volume.raw_path), ["mito"])]


@pytest.fixture
def objects(tmp_path):
    """An annotated crop with three objects and an unannotated corner, and a prediction with their ids, one shifted."""
    truth = np.zeros((20, 24, 28), np.uint8)
    truth[2:8, 2:8, 2:8], truth[10:16, 2:8, 2:8], truth[2:8, 12:20, 12:24] = 1, 2, 3
    truth[16:, 16:, 16:] = 255
    predicted = np.roll(np.where(truth == 255, 0, truth), 1, 2).astype(np.uint16) * 5
    predicted[truth == 255] = 45
    annotation = {"type": "instance_segmentation", "encoding": {"absent": 0, "unknown": 255}}
    crop = tmp_path / "crops" / "crop1"
    crop.mkdir(parents=True)
    position = {"scale": (8, 4, 4), "translation": (80, 40, 40)}
    write_multiscale(
        crop / "mito", truth, **position,
        attributes={"cellmap": {"annotation": {"class_name": "mito", "annotation_type": annotation}}},
    )  # fmt: skip
    write_multiscale(
        tmp_path / "pred.zarr" / "mito", predicted, **position,
        attributes={"cellmap": {"prediction": {"class_name": "mito", "values": "ids"}}},
    )  # fmt: skip
    return tmp_path, truth, predicted


def test_every_score_of_a_crop(objects):
    folder, truth, predicted = objects
    (score,) = evaluate(folder / "pred.zarr", folder / "crops", ["mito"], scores=SCORES)
    known, positive, present = truth != 255, (truth > 0) & (truth != 255), predicted > 0
    assert score.voxels.known == known.sum()
    assert score.voxels.tp == (positive & present).sum()
    assert score.voxels.fp == (known & ~positive & present).sum()
    assert score.surface.hausdorff_nm == 4
    assert 0 < score.surface.surface_distance_nm < 4
    overlap = 5 / 7  # of six voxels along x, shifted by one
    assert (score.instances.objects, score.instances.matched) == (3, 3)
    matched = [overlap, overlap, 11 / 13]
    assert score.instances.predicted == 3  # not the one in the unannotated corner
    assert score.instances.panoptic_quality == pytest.approx(sum(matched) / 3)


@pytest.mark.parametrize("block", [(7, 9, 11), (20, 5, 28), (128, 256, 256)], ids=str)
def test_scores_do_not_depend_on_blocks(objects, monkeypatch, block):
    folder, *_ = objects
    (whole,) = evaluate(folder / "pred.zarr", folder / "crops", ["mito"], scores=SCORES)
    monkeypatch.setattr(pairs, "BLOCK", block)
    (score,) = evaluate(folder / "pred.zarr", folder / "crops", ["mito"], scores=SCORES)
    assert score.voxels == whole.voxels
    assert score.instances == whole.instances
    assert score.surface.hausdorff_nm == whole.surface.hausdorff_nm
    assert score.surface.surface_distance_nm == pytest.approx(whole.surface.surface_distance_nm)


def test_a_prediction_without_ids_is_numbered(objects):
    folder, truth, _ = objects
    mask = ((truth > 0) & (truth != 255)).astype(np.uint8)
    write_multiscale(folder / "mask.zarr" / "mito", mask, scale=(8, 4, 4), translation=(80, 40, 40))
    (score,) = evaluate(folder / "mask.zarr", folder / "crops", ["mito"], scores=SCORES)
    assert (score.instances.predicted, score.instances.f1, score.voxels.dice) == (3, 1, 1)


@pytest.mark.parametrize(("scale", "translation"), [((4, 2, 2), (78, 39, 39)), ((8, 4, 4), (64, 36, 32))], ids=str)
def test_annotations_are_those_of_the_nearest_voxel(objects, scale, translation):
    """A prediction with smaller voxels, and one that begins elsewhere, of the same content."""
    folder, truth, _ = objects
    mask = ((truth > 0) & (truth != 255)).astype(np.uint8)
    finer = scale[0] == 4
    mask = mask.repeat(2, 0).repeat(2, 1).repeat(2, 2) if finer else np.pad(mask, [(2, 0), (1, 0), (2, 0)])
    write_multiscale(folder / "other.zarr" / "mito", mask, scale=scale, translation=translation)
    (score,) = evaluate(folder / "other.zarr", folder / "crops", ["mito"], scores=SCORES)
    assert (score.voxels.dice, score.instances.f1, score.surface.hausdorff_nm) == (1, 1, 0)
    assert score.voxels.known == (truth != 255).sum() * (8 if finer else 1)


@pytest.mark.parametrize("kind", ["csv", "folder", "other"])
def test_crops_that_were_trained_on_are_marked(objects, kind):
    folder, *_ = objects
    crop = folder / "crops" / ("crop1" if kind != "other" else "crop2")
    (folder / "split.csv").write_text(f'train,raw.zarr/em,"{crop}/[mito]"\n')
    trained = trained_crops(folder / "split.csv" if kind == "csv" else folder)
    (score,) = evaluate(folder / "pred.zarr", folder / "crops", ["mito"], trained=trained)
    assert score.trained is (kind != "other")


def test_the_list_of_images_is_no_class(objects):
    """Outputs of prediction and segmentation, which have the group OME, can be both prediction and ground truth."""
    folder, *_ = objects
    write_group(folder / "pred.zarr" / LISTING, {"series": ["mito"]})
    assert check_prediction(folder / "pred.zarr", None) == ["mito"]


def test_annotation_without_instances(objects):
    folder, truth, _ = objects
    crop = folder / "masks" / "crop1"
    crop.mkdir(parents=True)
    write_multiscale(
        crop / "mito", ((truth > 0) & (truth != 255)).astype(np.uint8), scale=(8, 4, 4), translation=(80, 40, 40)
    )
    with pytest.raises(NoInstancesError, match="crop1/mito: the annotation marks the class and not its instances"):
        evaluate(folder / "pred.zarr", folder / "masks", ["mito"], scores=["instances"])


def test_voxels_outside_of_an_annotation_are_unknown(objects):
    folder, truth, _ = objects
    annotation = Annotation(folder / "crops" / "crop1", "mito", (8, 4, 4))
    lattice = read_multiscale(folder / "pred.zarr" / "mito").finest.lattice
    ids = annotation.read(lattice, (-2, -3, -4), (24, 30, 36))
    inside = ids[2:22, 3:27, 4:32]
    np.testing.assert_array_equal(inside, np.where(truth == 255, -1, truth.astype(int)))
    assert (ids != -1).sum() == (inside != -1).sum()


@pytest.mark.parametrize("scores", SCORES)
def test_a_damaged_chunk_of_a_prediction_is_an_error(objects, scores):
    """A file of 0 bytes is what a crash leaves; it is not an empty part of the prediction."""
    folder, *_ = objects
    files = sorted(p for p in (folder / "pred.zarr" / "mito" / "s0").rglob("*") if p.is_file())
    chunk = next(p for p in files if p.name[0].isdigit())
    chunk.write_bytes(b"")
    with pytest.raises(ChunkError, match=r"0 bytes|empty"):
        evaluate(folder / "pred.zarr", folder / "crops", ["mito"], scores=[scores])


@pytest.mark.parametrize("where", [".", "mito"])
@pytest.mark.parametrize(("work", "command"), [("prediction", "cellmap-predict"), ("segmentation", "cellmap-segment")])
def test_an_unfinished_prediction_is_not_scored(objects, where, work, command):
    folder, *_ = objects
    journal = folder / "pred.zarr" / where / f".cellmap-{work}"
    journal.mkdir()
    (journal / "settings.json").write_text("{}")
    with pytest.raises(CellMapValueError, match=f"the {work} is not finished; run the same {command} again"):
        check_prediction(folder / "pred.zarr", ["mito"])
