"""Targets of every kind in contact sheets."""

import numpy as np
import pytest
import torch

from cellmap_lightning import CellMapError
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.io.meanings import Meaning
from cellmap_lightning.transforms.kinds.registry import make_kind
from cellmap_lightning.visualization.display import display, display_prediction, prediction_title
from cellmap_lightning.visualization.figures import SheetSample, contact_sheet
from cellmap_lightning.visualization.figures.canvas import as_pixels
from cellmap_lightning.visualization.figures.samples import SampleArrays
from cellmap_lightning.visualization.figures.slices import best_slice

NAN = float("nan")
SHAPE = (3, 8, 9)


def kind_of(name, classes=1, **options):
    return make_kind("target", Window(SHAPE, (8.0, 8.0, 8.0)), classes, {"kind": name, **options})


def test_instances_of_one_class_have_different_colors():
    ids = torch.zeros(1, *SHAPE, dtype=torch.int64)
    ids[:, :, :3], ids[:, :, 5:], ids[:, 0] = 4, 9, -1
    shown = display(kind_of("instances"), ids)
    assert shown.picture.shape == (*SHAPE, 4)
    first, second, background = shown.picture[1, 0, 0], shown.picture[1, 6, 0], shown.picture[1, 4, 0]
    assert (first[:3] - second[:3]).abs().max() > 0.2
    assert background[3] == 0 < first[3]
    assert shown.masks.isnan().sum() == 72
    again = display(kind_of("ids"), ids.float().masked_fill(ids < 0, NAN))
    torch.testing.assert_close(again.picture, shown.picture)


def test_distances_are_outlined_at_zero():
    values = torch.linspace(-1, 1, 216).reshape(1, *SHAPE)
    values[0, 0, 0, 0] = NAN
    shown = display(kind_of("sdt", nm=20), values)
    assert shown.picture is None
    assert (shown.masks > 0.5).sum() == (values > 0).sum()
    assert shown.masks[0, 0, 0, 0].isnan()
    assert prediction_title(kind_of("sdt", nm=20)) == "prediction ≥ 0"


def test_affinities_are_red_green_and_blue():
    kind = kind_of("affinities", 2, offsets=[[1, 0, 0], [0, 1, 0]])
    values = torch.zeros(4, *SHAPE)
    values[0, 0], values[3, 1], values[:, 2] = 1, 1, NAN
    shown = display(kind, values)
    assert shown.picture[0, 0, 0].tolist() == pytest.approx([1, 0, 0, 0.8])
    assert shown.picture[1, 0, 0].tolist() == pytest.approx([0, 1, 0, 0.8])
    assert shown.picture[2, 0, 0, 3] == 0
    assert [int((mask > 0.5).sum()) for mask in shown.masks] == [72, 72]
    assert shown.masks[:, 2].isnan().all()


def test_vectors_are_colors_of_their_components():
    values = torch.zeros(3, *SHAPE)
    values[0, 0], values[2, 1] = -1, 1
    shown = display(kind_of("flow", nm=20), values)
    assert shown.picture[0, 0, 0].tolist() == pytest.approx([0, 0.5, 0.5, 0.8])
    assert shown.picture[1, 0, 0].tolist() == pytest.approx([0.5, 0.5, 1, 0.8])
    assert shown.picture[2, 0, 0, 3] == 0


def test_predictions_are_shown_by_their_kind():
    probabilities = torch.rand(2, *SHAPE)
    for kind in (None, kind_of("binary", 2), kind_of("labels", 2), kind_of("instances", 2)):
        torch.testing.assert_close(display_prediction(kind, probabilities, 2).masks, probabilities)
    inside = display_prediction(kind_of("sdt", 2, nm=20), 2 * probabilities - 1, 2)
    torch.testing.assert_close(inside.masks, probabilities)
    assert display_prediction(kind_of("skeleton_distance", 2, nm=20), probabilities, 2).picture is not None
    lsd = kind_of("lsd", 2, sigma=10)
    assert display_prediction(lsd, torch.rand(20, *SHAPE), 2).picture.shape == (*SHAPE, 4)


@pytest.mark.parametrize("flat", [False, True])
def test_pictures_are_drawn_in_their_panels(flat):
    rng = np.random.default_rng(0)
    shape = SHAPE[1:] if flat else SHAPE
    red = np.zeros((*shape, 4))
    red[..., 0] = red[..., 3] = 1
    target = (rng.random((1, *shape)) > 0.5).astype(float)
    sample = SheetSample(rng.random(shape), target, target, (8, 8, 8), "", {"target": red})
    figure = contact_sheet([sample], ["mito"])
    drawn = [image.get_gid() for axes in figure.axes for image in axes.images if image.get_gid()]
    assert drawn == ["picture:target"]
    pixels = as_pixels(figure)
    assert ((pixels == [255, 0, 0]).all(-1)).mean() > 0.05
    plain = as_pixels(contact_sheet([SheetSample(sample.raw, target, target, (8, 8, 8))], ["mito"]))
    assert not (plain == [255, 0, 0]).all(-1).any()


@pytest.mark.parametrize("picture", [{"target": np.zeros((*SHAPE, 3))}, {"prediction": np.zeros((*SHAPE, 4))},
                                     {"target": np.zeros((8, 9, 4))}])  # fmt: skip
def test_pictures_that_do_not_fit_are_refused(picture):
    sample = SheetSample(np.zeros(SHAPE), np.zeros((1, *SHAPE)), None, (8, 8, 8), "", picture)
    with pytest.raises(
        CellMapError, match=r"a picture of (target|prediction) needs an array .* beside it and the shape"
    ):
        contact_sheet([sample], ["mito"])


@pytest.mark.parametrize(("value", "shown"), [(0.49, False), (0.5, True), (0.51, True), (float("nan"), False)])
def test_a_voxel_at_the_threshold_is_outlined_as_predictions_store_it(value, shown):
    values = np.zeros((1, 3, 8, 8), np.float32)
    values[0, 2] = value
    assert Meaning("probability").present(values, 0.5).any() == shown
    assert (best_slice(None, values, (3, 8, 8)) == 2) == shown
    arrays = SampleArrays(np.zeros((3, 8, 8)), {"prediction": values}, (8.0, 8.0, 8.0))
    assert arrays.occurring == ({0} if shown else set())
