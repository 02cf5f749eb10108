"""Scores as a table and as a picture."""

import pytest

from cellmap_lightning.evaluation.evaluate import CropScore
from cellmap_lightning.evaluation.instance_scores import InstanceScore
from cellmap_lightning.evaluation.score_files import draw, table
from cellmap_lightning.evaluation.surface_scores import SurfaceScore
from cellmap_lightning.evaluation.voxel_scores import Score


def test_a_class_without_a_true_voxel_is_not_in_the_crop(tmp_path):
    present = CropScore("crop1", "mito", Score("crop1", "mito", known=100, tp=9, fp=1, fn=1))
    absent = CropScore("crop1", "pm", Score("crop1", "pm", known=100, tp=0, fp=1234, fn=0))
    first, second = table([present, absent]).splitlines()[1:]
    assert "0.900" in first
    assert second.split() == ["crop1", "pm", "not", "in", "this", "crop;", "1,234", "voxels", "are", "predicted"]
    draw([present, absent], tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 1000


@pytest.mark.parametrize("counts", [(28, 6, 4), (1, 12345, 0), (0, 3, 0)])
def test_objects_are_a_table_of_their_own_with_their_numbers(counts):
    instances = InstanceScore(*counts, 0.235, 0.07, 0.13, 0.04, 0.145, 0.698, 12.182, 0.63)
    surface = SurfaceScore(12345.6, 1234.5, 123.4)
    scores = [
        CropScore("crop113", name, Score("crop113", name, 100, 9, 1, 1), surface, some, True)
        for name, some in (("mito", instances), ("er", None))
    ]
    lines = table(scores).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split()[2:] == ["dice", "iou", "precision", "recall", "hausdorff_nm", "surface_nm"]
    assert lines[1].split()[3:] == ["0.900", "0.818", "0.900", "0.900", "12345.6", "123.4"]
    head, *rows = lines[lines.index("") + 1 :]
    assert head.split()[2:] == ["true", "predicted", "matched", "f1_50", "ap", "pq", "split", "merge"]
    assert [row.split()[3:] for row in rows[:-1]] == [
        [*map(str, counts), "0.235", "0.040", "0.145", "0.698", "12.182"]  # and no row of er, which has no instances
    ]
    assert rows[-1] == "* trained on"


@pytest.mark.parametrize("missing", [[], ["er"], ["mito", "er"]])
def test_cells_of_classes_that_a_crop_lacks_have_a_dash(tmp_path, monkeypatch, missing):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    full = [CropScore("crop1", name, Score("crop1", name, known=100, tp=9, fp=1, fn=1)) for name in ("mito", "er")]
    other = [
        CropScore("crop2", name, Score("crop2", name, known=100, tp=0 if name in missing else 9, fp=1, fn=0))
        for name in ("mito", "er")
    ]
    draw([*full, *other], tmp_path / "scores.png")
    texts = {text.get_position(): text.get_text() for text in drawn[0].axes[0].texts}
    assert len(texts) == 4
    assert [texts[column, 1] == "-" for column in (0, 1)] == [name in missing for name in ("mito", "er")]
    assert "-" not in (texts[0, 0], texts[1, 0])
