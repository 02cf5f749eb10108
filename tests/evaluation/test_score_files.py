"""Scores as a table and as a picture."""

from cellmap_lightning.evaluation.evaluate import CropScore
from cellmap_lightning.evaluation.score_files import draw, table
from cellmap_lightning.evaluation.voxel_scores import Score


def test_a_class_without_a_true_voxel_is_not_in_the_crop(tmp_path):
    present = CropScore("crop1", "mito", Score("crop1", "mito", known=100, tp=9, fp=1, fn=1))
    absent = CropScore("crop1", "pm", Score("crop1", "pm", known=100, tp=0, fp=1234, fn=0))
    first, second = table([present, absent]).splitlines()[1:]
    assert "0.900" in first
    assert second.split() == ["crop1", "pm", "not", "in", "this", "crop;", "1,234", "voxels", "are", "predicted"]
    draw([present, absent], tmp_path / "scores.png")  # white where there is nothing to score
    assert (tmp_path / "scores.png").stat().st_size > 1000
