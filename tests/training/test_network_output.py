"""Networks whose output does not fit: one error with the shapes and the remedy."""

import logging

import pytest
import torch
from torch import nn

from cellmap_lightning import CellMapDataModule, CellMapError
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.training.reconstruction import ReconstructionTask
from cellmap_lightning.training.task import SegmentationTask
from tests.runs import GT, trainer

pytestmark = pytest.mark.usefixtures("quiet_lightning")

PATCH = {"shape": [8, 16, 24], "scale": [10.48, 8, 8]}
INPUT = r"input \[2, 1, 8, 16, 24\] \(N, C, z, y, x\)"
NEEDED = r"needed \[2, 2, 8, 16, 24\]"


class Returning(nn.Module):
    """A network that returns something made of two channels of the right shape, and of its input."""

    def __init__(self, what):
        super().__init__()
        self.conv, self.what = nn.Conv3d(1, 2, 3, padding=1), what

    def forward(self, x):
        return self.what(self.conv(x), x)


class Flat(nn.Module):
    """A network of slices."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


class Broken(Returning):
    """A network with a mistake in its code."""

    def forward(self, x):
        return self.convolution(x)


NETWORKS = {
    "valid convolutions": (
        lambda: nn.Conv3d(1, 2, 3),
        (
            rf"^Conv3d: the target 'labels' has \[8, 16, 24\] voxels, and the network returns \[6, 14, "
            rf"22\]; {INPUT}, output "
            rf"\[2, 2, 6, 14, 22\], {NEEDED}; pad the convolutions \(padding='same'\), or give "
            rf"data.target_arrays.labels the"
        ),
    ),
    "a stride": (
        lambda: nn.Conv3d(1, 2, 3, padding=1, stride=2),
        rf"returns \[4, 8, 12\]; {INPUT}, output \[2, 2, 4, 8, 12\], {NEEDED}; upsample the output by 2x2x2, or give ",
    ),
    "larger": (
        lambda: nn.Conv3d(1, 2, 3, padding=3),
        r"returns \[12, 20, 28\]; .*; crop the output, or give",
    ),
    "channels": (
        lambda: nn.Conv3d(1, 5, 3, padding=1),
        (
            rf"^Conv3d: the network returns 5 channels, and the targets need 2: labels \(binary\) 2; {INPUT}, output "
            rf"\[2, 5, 8, 16, 24\], {NEEDED}; set its out_channels to 2"
        ),
    ),
    "one channel": (lambda: nn.Conv3d(1, 1, 1), r"the network returns 1 channel, and the targets need 2"),
    "two input channels": (
        lambda: nn.Conv3d(2, 2, 1),
        (
            r"^Conv3d: the network fails with the input \[2, 1, 8, 16, 24\] \(N, C, z, y, x\).*: "
            r"RuntimeError: .*; it must "
            r"return \[2, 2, 8, 16, 24\] of it$"
        ),
    ),
    "slices": (
        Flat,
        (
            r"^Flat: the network fails with the input \[2, 1, 8, 16, 24\] \(N, C, z, y, x\) in "
            r"test_network_output.py, line "
            r"\d+: RuntimeError: .*; its layers are those of slices: a patch.shape with a 1, as \[1, 64, 64\], gives"
        ),
    ),
    "without channels": (
        lambda: Returning(lambda logits, _: logits[:, 0]),
        rf"^Returning: the network returns 4 axes, and the targets have 5: {INPUT}, output \[2, 8, 16, 24\], {NEEDED}$",
    ),
    "features after logits": (
        lambda: Returning(lambda logits, x: (logits, x.mean((2, 3, 4)))),
        (
            r"returns 2 tensors, which are read as .* \(deep supervision\), and number 2 is \[2, 1\] where number 1 is "
            r"\[2, 2, 8, 16, 24\]; return the logits alone, \[2, 2, 8, 16, 24\]"
        ),
    ),
    "two outputs of one size": (
        lambda: Returning(lambda logits, _: (logits, logits.tanh())),
        (
            r"^Returning: the network returns 2 tensors, .* number 2 is \[2, 2, 8, 16, 24\] where number 1 is "
            r"\[2, 2, 8, 16, 24\]; for several targets return one tensor with the channels of all, .*own_module.md"
        ),
    ),
    "a third output of the second's size": (
        lambda: Returning(lambda logits, _: [logits, *[nn.functional.avg_pool3d(logits, 2)] * 2]),
        r"returns 3 tensors, .* number 3 is \[2, 2, 4, 8, 12\] where number 2 is \[2, 2, 4, 8, 12\]; for several",
    ),
    "a larger second output": (
        lambda: Returning(lambda logits, _: [logits, nn.functional.interpolate(logits, scale_factor=2)]),
        r"number 2 is \[2, 2, 16, 32, 48\] where number 1 is \[2, 2, 8, 16, 24\]; for several targets",
    ),
    "features before logits": (
        lambda: Returning(lambda logits, x: (x, logits)),
        r"returns 1 channel, and .*; set its out_channels to 2; of the 2 outputs that it returns the first is meant",
    ),
    "a number beside": (
        lambda: Returning(lambda logits, x: (logits, 3)),
        r"^Returning: the network must return a tensor .*, got tuple; return the logits alone, \[2, 2, 8, 16, 24\]",
    ),
    "a mapping": (
        lambda: Returning(lambda logits, x: {"logits": logits, "features": x}),
        r"got dict with the keys logits, features; return the logits alone",
    ),
}


def data_of(volume, patch=PATCH):
    entry, other = ({"raw": volume.raw_path, "gt": f"{volume.path}/{GT}/crop{n}/[mito,er]"} for n in (2, 4))
    return CellMapDataModule(
        classes=["mito", "er"], input_arrays={"raw": patch}, target_arrays={"labels": patch},
        datasets={"train": [entry], "val": [other]}, batch_size=2, batches_per_epoch=2, val_samples=2,
    )  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("validating", [False, True])
@pytest.mark.cover(1)
def test_the_first_step_names_shapes_and_remedy(volume, tmp_path, name, validating):
    make, message = NETWORKS[name]
    task = SegmentationTask(make(), ["mito", "er"])
    run = trainer(tmp_path, num_sanity_val_steps=0, limit_val_batches=1 if validating else 0)
    with data_of(volume) as data, pytest.raises(CellMapError, match=message):
        (run.validate if validating else run.fit)(task, data)
    assert run.global_step == 0


def test_volumes_for_a_network_get_slices(volume, tmp_path):
    patch = {"shape": [1, 16, 24], "scale": [10.48, 8, 8]}
    task = SegmentationTask(Returning(lambda logits, _: logits[:, :, 0]), ["mito", "er"])
    message = r"\(N, C, y, x\).*; its layers are those of volumes: a patch.shape without a 1, as \[64, 64, 64\], gives"
    with data_of(volume, patch) as data, pytest.raises(CellMapValueError, match=message):
        trainer(tmp_path).fit(task, data)


def test_mistakes_in_code_are_raised_as_they_are(volume, tmp_path):
    task = SegmentationTask(Broken(None), ["mito", "er"])
    with data_of(volume) as data, pytest.raises(AttributeError, match="convolution"):
        trainer(tmp_path).fit(task, data)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), CellMapValueError("mine: wrong; right")],
    ids=["memory", "an error of the package"],
)
def test_errors_that_are_no_matter_of_shapes(volume, tmp_path, error):
    def fail(logits, x):
        raise error

    task = SegmentationTask(Returning(fail), ["mito", "er"])
    with data_of(volume) as data, pytest.raises(type(error)) as caught:
        trainer(tmp_path).fit(task, data)
    assert caught.value is error


def test_errors_of_later_steps_are_raised_as_they_are(volume, tmp_path):
    steps = []

    def fail_later(logits, x):
        steps.append(1)
        if len(steps) > 1:
            raise RuntimeError("later")
        return logits

    task = SegmentationTask(Returning(fail_later), ["mito", "er"])
    with data_of(volume) as data, pytest.raises(RuntimeError, match=r"^later$"):
        trainer(tmp_path, num_sanity_val_steps=0).fit(task, data)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Conv3d(1, 2, 1), r"^Conv3d: the network returns 2 channels, and the targets need 1; input"),
        (
            nn.Conv3d(1, 1, 3),
            r"^Conv3d: the input has \[8, 16, 24\] voxels, and the network returns \[6, 14, 22\]; .*pad",
        ),
        (Flat(), "its layers are those of slices"),
    ],
)
def test_reconstructions_have_the_shape_of_the_input(volume, tmp_path, network, message):
    """Shapes that could be broadcast would be compared in silence."""
    with data_of(volume) as data, pytest.raises(CellMapValueError, match=message):
        trainer(tmp_path).fit(ReconstructionTask(network), data)


def pooled(logits, *factors):
    return [logits, *(nn.functional.avg_pool3d(logits, factor) for factor in factors)]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda logits, _: pooled(logits, 2),
            ("2 outputs, deep supervision: weights 2/3 and 1/3 of the losses at [8, 16, 24] and [4, 8, 12] voxels"),
        ),
        (
            lambda logits, _: tuple(pooled(logits, (1, 2, 2), (2, 4, 4))),
            (
                "3 outputs, deep supervision: weights 4/7, 2/7 and 1/7 of the losses at [8, 16, 24], [8, 8, 12] "
                "and [4, 4, 6] voxels"
            ),
        ),
        (
            lambda logits, _: torch.stack([logits, logits], 1),
            ("2 outputs, deep supervision: weights 2/3 and 1/3 of the losses at [8, 16, 24] and [8, 16, 24] voxels"),
        ),
        (lambda logits, _: [logits], None),
    ],
    ids=["two", "anisotropic", "stacked", "one"],
)
def test_deep_supervision_is_logged_once(volume, tmp_path, caplog, make, text):
    with data_of(volume) as data, caplog.at_level(logging.INFO, "cellmap_lightning.training.task"):
        trainer(tmp_path).fit(SegmentationTask(Returning(make), ["mito", "er"]), data)
    lines = [r.getMessage() for r in caplog.records if "deep supervision" in r.getMessage()]
    assert lines == ([] if text is None else [f"Returning: {text}"])
