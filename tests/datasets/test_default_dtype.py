"""Neither torch's default dtype and device nor a Trainer's precision change what a batch holds."""

import ast
import contextlib
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import cellmap_lightning
from cellmap_lightning import CellMapDataLoader, CellMapImage
from cellmap_lightning.batches.layout import BatchLayout
from cellmap_lightning.callbacks import StreamPrefetch
from cellmap_lightning.compat.transforms import augment
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.training.heads import kind_of
from cellmap_lightning.training.masked import DiceScore, MeanOverSamples, one_against_all
from cellmap_lightning.training.reconstruction import ReconstructionTask
from cellmap_lightning.visualization.display import display
from tests.conftest import CLASSES, INPUTS, TARGETS
from tests.make import make_dataset
from tests.runs import GT, Watch, module, task, trainer

VALUES = {
    "blur": [4, 9], "contrast": [0.7, 1.3], "brightness": [-0.1, 0.1], "gamma": [0.7, 1.4], "noise": [0.01, 0.05],
    "low_resolution": {"probability": 0.7, "voxel_size": [16, 40]},
    "motion_blur": {"probability": 0.7, "length": [16, 40]},
    "match_histogram": {"probability": 0.7, "quantiles": [0.1, 0.5, 0.9]},
    "section_contrast": {"probability": 0.7},
    "dark_section": {"probability": 0.3},
    "stripes": {"probability": 0.7, "amplitude": [0.1, 0.3], "width": [10, 40]},
    "poisson": {"probability": 0.7, "counts": [10, 100]},
    "salt_pepper": {"probability": 0.7, "fraction": [0, 0.2]},
    "cutnoise": {"probability": 0.7, "size": [20, 60], "std": [0.1, 0.3]},
    "cutout": {"probability": 0.7, "size": [20, 60]},
    "missing_section": {"probability": 0.2, "unknown": True},
}  # fmt: skip
SPATIAL = {"mirror": {"axes": {"z": 0.5, "y": 0.5, "x": 0.5}}, "rotate": {"axes": {"z": [-90, 90]}}}
KINDS = {
    "binary": {},
    "labels": {"kind": "labels"},
    "instances": {"kind": "instances"},
    "affinities": {"kind": "affinities", "offsets": [[1, 0, 0], [0, 1, 0]]},
    "sdt": {"kind": "sdt", "nm": 50.0},
}
OLDER = {
    "gaussian": [augment.Normalize(), augment.GaussianNoise(std=0.1), augment.GaussianBlur(3, 0.6, dim=3)],
    "random": [augment.RandomContrast(), augment.RandomGamma(), augment.NaNtoNum({"nan": 0})],
}
DEFAULTS = ["float64", "bfloat16", "float16", "meta"]


@contextlib.contextmanager
def default(name):
    """Another default dtype, or another default device, of torch."""
    before = torch.get_default_dtype()
    try:
        if name == "meta":
            torch.set_default_device("meta")
        elif name is not None:
            torch.set_default_dtype(getattr(torch, name))
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def same(one, other):
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].device == other[name].device, name
        # Bit by bit, NaN included.
        assert one[name].cpu().numpy().tobytes() == other[name].cpu().numpy().tobytes(), name


def samples(volume, name, workers=0, target=KINDS["binary"], **kwargs):
    """Batches of a loader, a single item and a patch, all made under that default."""
    with default(name):
        spec = {"labels": {**TARGETS["labels"], **target}}
        with make_dataset(
            volume.raw_path,
            f"{volume.path}/{GT}/crop2/[mito,er,pm]",
            CLASSES,
            INPUTS,
            spec,
            is_train=True,
            read=ReadOptions(pad=True),
            **{"spatial_transforms": SPATIAL, "intensity_transforms": VALUES} | kwargs,
        ) as data:
            loader = CellMapDataLoader(data, 2, workers, 4, persistent_workers=False)
            return [*loader, data[3]]


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_the_defaults(volume, name, kind):
    for one, other in zip(
        samples(volume, None, target=KINDS[kind]), samples(volume, name, target=KINDS[kind]), strict=True
    ):
        same(one, other)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"workers": 2},
        {"nan_targets": False, "raw_value_transforms": None},
        {"raw_value_transforms": OLDER["gaussian"], "intensity_transforms": None},
        {"raw_value_transforms": OLDER["random"]},
        {"target_value_transforms": augment.Binarize()},
        {"normalize": {"percentile": [1, 99]}},
    ],
    ids=["workers", "mask", "older, blur", "older, random", "binarize", "percentile"],
)
def test_nor_do_workers_and_value_transforms(volume, name, kwargs):
    for one, other in zip(samples(volume, None, **kwargs), samples(volume, name, **kwargs), strict=True):
        same(one, other)


@pytest.mark.parametrize("name", DEFAULTS)
def test_nor_do_patches_scores_and_hidden_blocks(volume, name):
    logits = torch.randn(2, 4, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    target = torch.randint(0, 4, (2, 1, 3, 4, 5), generator=torch.Generator().manual_seed(1))
    x = torch.rand(2, 1, 8, 16, 16, generator=torch.Generator().manual_seed(2))
    found = []
    for given in (None, name):
        metric, mean, hiding = DiceScore(CLASSES), MeanOverSamples(), ReconstructionTask(nn.Conv3d(1, 1, 3))
        older = augment.GaussianBlur(3, 0.6, dim=3)
        image = CellMapImage(volume.raw_path, "raw", [10.48, 8, 8], [8, 16, 24])
        with default(given):
            against, wanted = one_against_all(logits, target, target > 0)
            metric.update(against, wanted)
            mean.update(x.mean(), 2)
            seen, mask = hiding.hide(x, [3, 4])
            found.append(
                {
                    "against": against, "wanted": wanted, "mean": mean.compute(), "seen": seen, "mask": mask,
                    "numbered": display(kind_of(target, CLASSES), target[0]).masks, "blur": older(x),
                    "patch": image[image.get_center(0)],
                    **metric.compute(),
                }
            )  # fmt: skip
    same(*found)


class Together(torch.nn.Module):
    """A network during whose forward the thread that reads ahead finishes the next batch, and only then."""

    def __init__(self, batches):
        super().__init__()
        self.batches, self.steps, self.ahead = batches, 0, 0
        self.computing, self.finished = threading.Event(), threading.Semaphore(0)
        self.network = nn.Conv3d(1, 3, 1)

    def forward(self, x):
        self.steps += 1
        self.computing.set()
        assert self.steps == self.batches or self.finished.acquire(timeout=30)
        self.computing.clear()
        return self.network(x)

    def around(self, finish):
        def finished(layout, batch):
            ahead = threading.current_thread() is not threading.main_thread()
            first = ahead and self.ahead == 0
            self.ahead += ahead
            assert not ahead or first or self.computing.wait(30)
            out = finish(layout, batch)
            if ahead and not first:
                self.finished.release()
            return out

        return finished


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true", "64-true", "bf16-mixed"])
@pytest.mark.usefixtures("quiet_lightning", "no_threads_left")
def test_reading_ahead_gives_the_same_batches_at_every_precision(volume, tmp_path, monkeypatch, precision):
    finish, seen = BatchLayout.finish, []
    for ahead in (False, True):
        watch, one = Watch(), task()
        one.network = Together(4) if ahead else nn.Conv3d(1, 3, 1)
        monkeypatch.setattr(BatchLayout, "finish", one.network.around(finish) if ahead else finish)
        with module(volume, batches_per_epoch=4, intensity_transforms=VALUES, spatial_transforms=SPATIAL) as data:
            trainer(
                tmp_path, precision=precision, callbacks=[watch, StreamPrefetch(enabled=ahead, depth=1)],
                limit_val_batches=0,
            ).fit(one, data)  # fmt: skip
        seen.append(watch.batches)
    assert one.network.steps == len(seen[0]) == len(seen[1]) == 4
    for plain, read_ahead in zip(*seen, strict=True):
        same(*({name: t.view(torch.uint8) for name, t in batch.items()} for batch in (plain, read_ahead)))
        assert {name: t.dtype for name, t in plain.items()} == {name: t.dtype for name, t in read_ahead.items()}


#: What makes a tensor out of nothing, and so takes torch's defaults for what is not named.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand",
    "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
#: Parts of a module, which follow it from device to device, as its parameters do.
STATE = {"register_buffer", "add_state", "Parameter"}


def unnamed(source):
    """Lines of tensor factories that leave the dtype or the device to torch's defaults."""
    tree, found = ast.parse(source), []
    state = {
        id(part) for call in ast.walk(tree) if isinstance(call, ast.Call) and _name(call) in STATE
        for argument in [*call.args, *(k.value for k in call.keywords)] for part in ast.walk(argument)
    }  # fmt: skip
    for call in ast.walk(tree):
        made = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
        if not made or not isinstance(call.func.value, ast.Name) or call.func.value.id != "torch":
            continue
        given = {keyword.arg for keyword in call.keywords}
        if call.func.attr == "Generator" and not call.args and "device" not in given:
            found.append(call.lineno)
        if call.func.attr in FACTORIES:
            needed = {"dtype"} if id(call) in state else {"dtype", "device"}
            if needed - given:
                found.append(call.lineno)
    return found


def _name(call):
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)


def test_every_tensor_names_its_dtype_and_device():
    package = Path(cellmap_lightning.__file__).parent
    found = {str(p.relative_to(package)): lines for p in package.rglob("*.py") if (lines := unnamed(p.read_text()))}
    assert found == {}


def test_unnamed_classes_count_for_leave_one_out():
    assert unnamed("torch.zeros(3)\ntorch.ones(3, dtype=torch.int64)\ntorch.Generator()") == [1, 2, 3]
    assert unnamed("self.register_buffer('a', torch.ones(3))") == [1]
    assert unnamed("torch.ones(3, dtype=d, device=e)\nself.add_state('a', torch.ones(3, dtype=d))") == []
