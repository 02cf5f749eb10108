"""What cellmap-predict logs of many crops: the context once, their size, and the time that is left."""

import logging
import math
import re

import pytest

from cellmap_lightning.commands.crop_progress import CropProgress
from cellmap_lightning.commands.prediction_context import (
    ContextError,
    predicted_voxels,
    reach_of_task,
    set_contexts,
)
from cellmap_lightning.io.images import read_image
from cellmap_lightning.wording import duration_text
from tests.commands.test_prediction_context import SHAPE, Task, config, unet
from tests.prediction.predictions import SCALE, raw_volume


def region(path, *shape):
    """Return the box of the first voxels of a volume."""
    lower = read_image(str(path)).finest.lattice.box.lower
    return {axis: [a, a + n * step] for axis, a, n, step in zip("zyx", lower, shape, SCALE, strict=True)}


def logged(caplog, configs, reach):
    caplog.clear()
    with caplog.at_level(logging.INFO, "cellmap_lightning"):
        set_contexts(configs, reach)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("norm", ["BATCH", "INSTANCE", "unknown"])
def test_equal_contexts_are_logged_once(tmp_path, caplog, norm):
    path, _ = raw_volume(tmp_path, SHAPE)
    configs = [config(path) for _ in range(3)]
    reach = ContextError("no network") if norm == "unknown" else reach_of_task(configs[0], Task(unet(norm)))
    (line,) = logged(caplog, configs, reach)
    assert line.startswith("context: ")
    assert len({str(cfg) for cfg in configs}) == 1


def test_different_patches_and_costs_are_a_range(tmp_path, caplog):
    path, _ = raw_volume(tmp_path, SHAPE)
    reach = reach_of_task(config(path), Task(unet("INSTANCE")))
    (line,) = logged(caplog, [config(path, region=region(path, 16, 16, 16)), config(path)], reach)
    costs = re.search(r": ([\d.]+) to ([\d.]+) times the voxels of the output$", line)
    assert float(costs[1]) < float(costs[2])
    reach = reach_of_task(config(path), Task(unet("BATCH")))
    shapes = [(48, 64, 40), (48, 40, 64), (48, 64, 48)]  # no context along an axis that the patch fills
    configs = [config(path, patch=shape) for shape in shapes]
    for cfg in configs:
        cfg.adjustable.patch = False
    lines = logged(caplog, configs, reach)
    assert len(lines) == 2
    assert lines[0].startswith("context of 2 of 3 crops: each patch of [48, 64, 40] to [48, 64, 48] voxels (z, y, x)")
    assert "with [0, 0, 16] voxels of context" in lines[0]
    assert lines[1].startswith("context of 1 of 3 crops: each patch of [48, 40, 64] voxels (z, y, x)")


@pytest.mark.parametrize("shape", [(3, 5, 7), (48, 1, 64), None])
def test_voxels_of_a_prediction(tmp_path, shape):
    path, _ = raw_volume(tmp_path, SHAPE)
    cfg = config(path, region=None if shape is None else region(path, *shape))
    assert predicted_voxels(cfg) == math.prod(shape or SHAPE)


def test_size_and_time_left(caplog):
    with caplog.at_level(logging.INFO, "cellmap_lightning"):
        progress = CropProgress([500, 1000, 2500, 1000])
        for computed, seconds, processes in ((0, 60.0, 1), (1000, 20.0, 1), (1250, 25.0, 2), (1000, 10.0, 1)):
            progress.add(computed, seconds, processes)
            progress.log_left()
    assert [record.getMessage() for record in caplog.records] == [
        "4 crops, 5,000 voxels in all",  # the first was complete: nothing is known of the time
        "2 of 4 crops done; about 1 min left",
        "3 of 4 crops done; about 10 s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3570, "1 h"), (9000, "2 h 30 min"), (7e4, "19 h")],
)
def test_duration(seconds, text):
    assert duration_text(seconds) == text
