"""The challenge's toolbox, run for real on a small layout: training, prediction, processing, packaging and the score.

Two environments are needed, since the toolbox's packaging and scorer need zarr < 3 and this package zarr 3:
``CSC_PYTHON`` names a Python with the toolbox as it is, ``CSC_COMPAT_PYTHON`` one with its source, its dependencies but
zarr and numcodecs, and those of this package.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import zarr

from cellmap_lightning.commands.submit import submit
from cellmap_lightning.evaluation.csc_evaluation import Predicted, evaluate_csc
from cellmap_lightning.evaluation.numbering import components
from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale
from tests.evaluation.test_challenge import manifest, row

STEPS = Path(__file__).with_name("toolbox_steps.py")
ROOT = Path(__file__).parents[2]
#: First voxel, in voxels of 8 nm, of crops of 32³ such voxels.
CROPS = {1: (0, 0, 0), 2: (48, 0, 48), 3: (40, 56, 30)}
TRAIN = """
import torch
classes = ["er", "mito"]
batch_size = 2
input_array_info = {{"shape": (16, 16, 16), "scale": (8, 8, 8)}}
target_array_info = {{"shape": (16, 16, 16), "scale": (8, 8, 8)}}
epochs = 1
iterations_per_epoch = 3
model_name = "tiny"
model_to_load = "tiny"
load_model = "latest"
device = "cpu"
torch.manual_seed(0)
model = torch.nn.Conv3d(1, 2, 1)
model.weight.data[:, 0, 0, 0, 0] = torch.tensor([8.0, -8.0])
model.bias.data[:] = torch.tensor([-4.0, 4.0])
learning_rate = 1e-6
logs_save_path = "{folder}/tensorboard/{{model_name}}"
model_save_path = "{folder}/checkpoints/{{model_name}}_{{epoch}}.pth"
datasplit_path = "{folder}/datasplit.csv"
spatial_transforms = {{"mirror": {{"axes": {{"x": 0.5}}}}, "transpose": {{"axes": ["x", "y"]}},
    "rotate": {{"axes": {{"z": [-180, 180]}}}}}}
validation_batch_limit = 2
"""
#: The toolbox asks the model once with the axis of length 1 still there, so that a convolution in 2D would refuse it.
SLICES = """
import torch
classes = ["er", "mito"]
batch_size = 7
input_array_info = {"shape": (1, 20, 24), "scale": (8, 8, 8)}
model_name = "slices"
model_to_load = "slices"
load_model = "latest"
device = "cpu"
logs_save_path = "tensorboard/{model_name}"
model_save_path = "checkpoints/{model_name}_{epoch}.pth"
class Pixels(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x, 1 - x], 1)
model = Pixels()
"""
PROCESS = """
classes = ["er", "mito"]
batch_size = 2
input_array_info = {"shape": (16, 16, 16), "scale": (8, 8, 8)}
device = "cpu"
def process_func(x):
    return x > 0
"""


def lattice(start):
    """Translation of the first voxel of a crop with voxels of 4 nm."""
    return tuple(8.0 * a + 2 for a in start)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Raw as `csc fetch-data` leaves it, two crops to train on, and one whose truth is scored."""
    folder = tmp_path_factory.mktemp("challenge")
    recon = folder / "data" / "jrc_x" / "jrc_x.zarr" / "recon-1"
    for path in (recon.parent, recon, recon / "em", recon / "labels", recon / "labels" / "groundtruth"):
        write_group(path)
    rng = np.random.default_rng(0)
    objects = np.kron(rng.integers(0, 2, (12, 12, 12)), np.ones((8, 8, 8), int)).astype(bool)
    raw = np.where(objects, 200, 40).astype(np.uint8)
    em = recon / "em" / "fibsem-uint8"
    write_multiscale(em, raw, scale=(8, 8, 8), translation=(4, 4, 4), storage=ArrayOptions(chunks=(16, 16, 16)))
    for file in (em / "s0").glob("*/*/*"):
        index = [int(part) for part in file.parts[-3:]]
        boxes = [zip(index, start, strict=True) for start in CROPS.values()]
        if not any(all(i * 16 < a + 32 and (i + 1) * 16 > a for i, a in box) for box in boxes):
            file.unlink()
    rows = []
    truth = zarr.open_group(str(folder / "truth.zarr"), mode="w", zarr_format=2)
    for number, start in CROPS.items():
        part = objects[tuple(slice(a, a + 32) for a in start)]
        fine = np.kron(part, np.ones((2, 2, 2), int)).astype(np.uint8)
        for name, values in (("er", fine), ("mito", components(fine == 0).astype(np.uint8))):
            kind = "instance_segmentation" if name == "mito" else "semantic_segmentation"
            encoding = {"absent": 0, "unknown": 255} | ({} if name == "mito" else {"present": 1})
            about = {"annotation": {"class_name": name, "annotation_type": {"type": kind, "encoding": encoding}}}
            path = recon / "labels" / "groundtruth" / f"crop{number}" / name
            write_multiscale(
                path, values, scale=(4, 4, 4), translation=lattice(start), levels=2, mode="mode",
                attributes={"cellmap": about},
            )  # fmt: skip
            if number == 3:
                rows.append(row(3, name, (4.0, 4.0, 4.0), lattice(start), (64, 64, 64), dataset="jrc_x"))
                array = truth.require_group("crop3").create_array(name, data=values)
                array.attrs.update(voxel_size=[4, 4, 4], translation=list(lattice(start)), shape=[64, 64, 64])
    manifest(folder, *rows)
    listed = "crop_number,collection,alignment,crop_url,em_url\n3,jrc_x,recon-1,s3://a/b,s3://a/c\n"
    (folder / "manifest.csv").write_text(listed)
    lines = [
        ",".join(f'"{v}"' for v in (usage, recon.parent, "recon-1/em/fibsem-uint8", recon.parent,
                                    f"recon-1/labels/groundtruth/crop{n}/[er,mito]"))
        for usage, n in (("train", 1), ("validate", 2))
    ]  # fmt: skip
    (folder / "datasplit.csv").write_text("\n".join(lines) + "\n")
    (folder / "train_config.py").write_text(TRAIN.format(folder=folder))
    wide = (
        TRAIN.format(folder=folder).replace('"tiny"', '"all"').replace("Conv3d(1, 2, 1)", "Conv3d(1, len(classes), 1)")
    )
    tested = "from cellmap_segmentation_challenge.utils import get_tested_classes\nclasses = get_tested_classes()"
    wide = "".join(
        line for line in wide.splitlines(keepends=True) if not line.startswith(("model.weight", "model.bias"))
    )
    (folder / "all_config.py").write_text(wide.replace('classes = ["er", "mito"]', tested))
    (folder / "process_config.py").write_text(PROCESS)
    (folder / "slices_config.py").write_text(SLICES)
    return folder


def step(folder, *names):
    """Run steps of the toolbox, and return what they print."""
    plain = names[0] in ("package", "score")
    variable = "CSC_PYTHON" if plain else "CSC_COMPAT_PYTHON"
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} does not name a Python that has the challenge's toolbox")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "CSC_TEST_CROP_MANIFEST_URL": (folder / "test_crop_manifest.csv").as_uri(), "MAX_WORKERS": "1",
        "CSC_FETCH_DATA_MANIFEST_URL": (folder / "manifest.csv").as_uri(),
        "PER_INSTANCE_THREADS": "1", "MPLBACKEND": "Agg",
    }  # fmt: skip
    env |= {} if plain else {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, str(STEPS), str(folder), *names], capture_output=True, text=True, timeout=600, env=env, cwd=folder
    )
    passed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("STEP") and "passed" in line]
    assert passed == list(names), f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def test_train(folder):
    step(folder, "train")


def test_train_with_all_classes_on_crops_that_annotate_two(folder):
    step(folder, "train_all")


def test_orthogonal_planes(folder):
    """Slices along each axis and their mean, of a model that gives each pixel and its opposite."""
    step(folder, "orthoplanes")
    raw = zarr.open_array(str(folder / "data/jrc_x/jrc_x.zarr/recon-1/em/fibsem-uint8/s0"), mode="r")
    expected = raw[tuple(slice(a, a + 32) for a in CROPS[3])] / np.float32(255)
    for name, values in (("er", expected), ("mito", 1 - expected)):
        found = zarr.open_array(str(folder / "orthoplanes" / "jrc_x.zarr" / "crop3" / name / "s0"), mode="r")[...]
        np.testing.assert_allclose(found, values, rtol=1e-6)


@pytest.mark.parametrize("predict", ["predict", "predict_test"])
def test_from_predictions_to_a_score(folder, predict):
    """The model is right by its weights, so that the toolbox's score of what it wrote through us is nearly 1."""
    step(folder, predict, "process")
    step(folder, "package")
    output = step(folder, "score")
    theirs = json.loads(next(x for x in output.splitlines() if x.startswith("SCORES ")).removeprefix("SCORES "))
    assert theirs["overall"] > 0.99
    truth = folder / "data" / "jrc_x" / "jrc_x.zarr" / "recon-1" / "labels" / "groundtruth"
    processed = folder / "processed" / "jrc_x.zarr" / "crop3"
    ours = evaluate_csc([Predicted(processed, truth, ("er", "mito"), "crop3")])
    # Both resample from 8 to 4 nm, the toolbox with another interpolation.
    assert ours.overall == pytest.approx(theirs["overall"], abs=2e-3)
    listed = folder / "test_crop_manifest.csv"
    path, missing = submit(folder / "processed", listed, folder / "ours.zarr", overwrite=True)
    assert path.is_file()
    assert not missing
    for name in ("er", "mito"):
        mine, packaged = (
            zarr.open_array(str(folder / group / "crop3" / name), mode="r")[...]
            for group in ("ours.zarr", "submission.zarr")
        )
        assert ((mine > 0) == (packaged > 0)).mean() > 0.999
