"""The picture of the crops with the lowest Dice: its colours, and the place of its slices."""

import numpy as np
import pytest

from cellmap_lightning.evaluation.error_picture import _COLORS, _painted, draw_worst
from cellmap_lightning.evaluation.evaluate import evaluate
from cellmap_lightning.io.writer import write_multiscale


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_errors_on_white_have_the_colours_of_the_legend(kind):
    kinds = np.array([[0, kind, 4]], np.uint8)
    picture = _painted(np.ones((1, 3)), kinds, 1.0)
    np.testing.assert_allclose(picture[0], [(1, 1, 1), list(_COLORS.values())[kind - 1], (0.6, 0.6, 0.6)])
    over_raw = _painted(np.ones((1, 3)), kinds, 0.6)
    assert (over_raw[0, 1] >= picture[0, 1]).all()


@pytest.mark.parametrize(("z", "origin"), [(3, 0), (5, 100), (9, 1000)])
def test_the_title_has_the_place_of_an_annotated_slice(tmp_path, monkeypatch, z, origin):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    truth = np.full((12, 16, 16), 255, np.uint8)  # unannotated but for one slice
    truth[z] = 0
    truth[z, 4:9, 4:9] = 1
    place = {"scale": (50, 8, 8), "translation": (origin, 0, 0)}
    write_multiscale(tmp_path / "crop1" / "mito", truth, **place)
    write_multiscale(tmp_path / "p.zarr" / "mito", np.full((12, 16, 16), 255, np.uint8), **place)
    scores = evaluate(tmp_path / "p.zarr", tmp_path / "crop1", ["mito"], unknown=255)
    draw_worst(scores, tmp_path / "p.zarr", tmp_path / "crop1", tmp_path / "w.png", unknown=255)
    title = drawn[0].axes[0].get_title()
    assert f"slice z={z} at {origin + 50 * z:,} nm" in title
