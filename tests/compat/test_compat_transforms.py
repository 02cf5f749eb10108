"""Value transforms and spatial transforms in cellmap-data's form."""

import importlib
import pickle

import numpy as np
import pytest
import torch
import zarr

from cellmap_lightning import compat
from cellmap_lightning.compat.transforms import augment
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.transforms.normalization import Chain

pytestmark = pytest.mark.usefixtures("no_threads_left")

PATCH = {"shape": (16, 32, 32), "scale": (10.48, 8, 8)}

CLASSES = ["mito", "er"]


def make(volume, crop="crop2", **kwargs):
    target = f"{volume.path}/recon-1/labels/groundtruth/{crop}/[mito,er]"
    return compat.CellMapDataset(volume.raw_path, target, CLASSES, {"input": PATCH}, {"output": PATCH}, **kwargs)


def test_transforms_run_on_stored_raw_and_on_known_targets(volume):
    transforms = torch.nn.Sequential(augment.Normalize(), augment.NaNtoNum({"nan": 0}))
    with make(volume) as plain, make(volume, raw_value_transforms=transforms) as scaled:
        assert torch.allclose(scaled[3]["input"], plain[3]["input"] / 255)
        scaled.set_raw_value_transforms(None)
        assert torch.equal(scaled[3]["input"], plain[3]["input"])
        scaled.set_target_value_transforms(augment.Binarize(2.0))
        found, expected = scaled[3]["output"], plain[3]["output"]
        assert torch.equal(found.isnan(), expected.isnan())
        assert not (found == 1).any()
        assert scaled.target_value_transforms.threshold == 2


def test_spatial_transforms_are_set_afterwards(volume):
    with make(volume) as dataset:
        before = dataset[7]["input"]
        assert not dataset.is_train
        dataset.set_spatial_transforms({"mirror": {"axes": {"x": 1.0}}})
        assert torch.equal(dataset[7]["input"], before.flip(-1))
        dataset.set_spatial_transforms(None)
        assert torch.equal(dataset[7]["input"], before)


def shifted(raw):
    """A transform that wraps around in uint8."""
    return (raw - 128) / 64


class Recorded:
    """Notes what a transform is given."""

    def __init__(self):
        self.given = []

    def __call__(self, values):
        self.given.append(values.clone())
        return values


@pytest.mark.parametrize("shape", [(16, 32, 32), (1, 32, 32)])
def test_raw_value_transforms_get_floats(volume, shape):
    """Of the stored values, unscaled, without an axis of channels: what cellmap-data hands them."""
    arrays = {"input": {"shape": shape, "scale": PATCH["scale"]}}
    target = f"{volume.path}/recon-1/labels/groundtruth/crop2/[mito,er]"
    note = Recorded()
    given = volume.raw_path, target, CLASSES, arrays, {"output": arrays["input"]}
    with (
        compat.CellMapDataset(*given) as plain,
        compat.CellMapDataset(*given, raw_value_transforms=note) as noted,
        compat.CellMapDataset(*given, raw_value_transforms=shifted) as moved,
    ):
        stored = plain[5]["input"]
        assert stored.max() > 128 > stored.min()
        assert torch.equal(noted[5]["input"], stored)
        (given,) = note.given
        assert (given.dtype, given.shape) == (torch.float32, shape)
        assert torch.equal(given.reshape(stored.shape), stored)
        torch.testing.assert_close(moved[5]["input"], (stored - 128) / 64)
        assert moved.raw_value_transforms is shifted


def test_raw_value_transforms_of_every_kind(volume):
    """A chain, a callable object and one that is set afterwards; they are compared and pickled as before."""
    for transform in (shifted, Chain([shifted, shifted]), torch.nn.ReLU()):
        with (
            make(volume, raw_value_transforms=transform) as first,
            make(volume, raw_value_transforms=transform) as other,
        ):
            assert first.layout.raw_transforms == other.layout.raw_transforms
            before = first[3]["input"]
            assert torch.equal(pickle.loads(pickle.dumps(first))[3]["input"], before)
            other.set_raw_value_transforms(shifted)
            torch.testing.assert_close(other[3]["input"], shifted(make_stored(volume, 3)))


def make_stored(volume, index):
    with make(volume) as plain:
        return plain[index]["input"]


@pytest.mark.parametrize("one", ["a callable", "for each class", "for one class"])
def test_target_value_transforms_get_stored_ids(volume, one):
    """As float32: a transform of boundaries sees the objects, not one presence."""
    arrays = {"output": {"shape": (64, 128, 128), "scale": PATCH["scale"]}}
    target = f"{volume.path}/recon-1/labels/groundtruth/crop1/[mito,er]"
    note = Recorded()
    transforms = {"a callable": note, "for each class": dict.fromkeys(CLASSES, note), "for one class": {"mito": note}}
    with compat.CellMapDataset(
        volume.raw_path, target, CLASSES, {"input": PATCH}, arrays, pad=True, target_value_transforms=transforms[one]
    ) as dataset:
        index = len(dataset) // 2
        found = dataset[index]["output"]
        stored = zarr.open_array(f"{target.partition('[')[0]}mito/s0", mode="r")[...]
        assert {int(n) for n in np.unique(stored)} >= {0, 1, 2}
        given = note.given[0]
        assert (given.dtype, given.shape) == (torch.float32, (64, 128, 128))
        ids = {float(n) for n in given[~given.isnan()].unique()}
        assert ids <= {float(n) for n in np.unique(stored)}
        assert len(ids) > 2
        assert torch.equal(found[0], given) or torch.equal(torch.nan_to_num(found[0]), torch.nan_to_num(given))
    with compat.CellMapDataset(volume.raw_path, target, CLASSES, {"input": PATCH}, arrays, pad=True) as plain:
        presence = plain[index]["output"]
    same = torch.where(given.isnan(), given, (given > 0).float())
    torch.testing.assert_close(same, presence[0], equal_nan=True)


def test_classes_that_are_not_annotated_are_nan_for_transforms(volume):
    note = Recorded()
    target = f"{volume.path}/recon-1/labels/groundtruth/crop5/[mito]"
    with compat.CellMapDataset(
        volume.raw_path, target, CLASSES, {"input": PATCH}, {"output": PATCH}, pad=True, target_value_transforms=note
    ) as dataset:
        dataset[0]
    assert note.given[1].isnan().all()


@pytest.mark.parametrize(
    "name", ["binarize", "gaussian_blur", "gaussian_noise", "nan_to_num", "random_contrast", "random_gamma"]
)
def test_each_transform_has_a_module(name):
    module = importlib.import_module(f"cellmap_lightning.compat.transforms.augment.{name}")
    (found,) = [value for value in vars(module).values() if isinstance(value, type)]
    assert found is getattr(augment, found.__name__)


def test_values():
    torch.manual_seed(0)
    x = torch.rand(1, 8, 9, 10)
    assert torch.equal(augment.Binarize(0.5)(x), (x > 0.5).float())
    holes = x.clone()
    holes[0, 0] = torch.nan
    assert torch.equal(augment.Binarize()(holes).isnan(), holes.isnan())
    assert augment.Binarize().transform(torch.tensor([0, 3], dtype=torch.uint8), {}).tolist() == [0, 1]
    assert torch.equal(augment.NaNtoNum({"nan": 2.0})(holes), holes.nan_to_num(2.0))
    assert augment.Normalize(1, 0.5)(torch.tensor([3], dtype=torch.uint8)).item() == 2
    noisy = augment.GaussianNoise(1, 0.1)(torch.zeros(20_000))
    assert noisy.mean().item() == pytest.approx(1, abs=0.01)
    assert noisy.std().item() == pytest.approx(0.1, abs=0.01)
    halved = augment.RandomContrast((0.5, 0.5))(x)
    assert halved.mean().item() == pytest.approx(x.mean().item(), abs=1e-5)
    assert halved.std().item() == pytest.approx(x.std().item() / 2, rel=1e-4)
    stored = (x * 255).to(torch.uint8)
    assert augment.RandomContrast((9, 9))(stored).max() == 255
    assert torch.allclose(augment.RandomGamma((2, 2))(stored), (stored / 255) ** 2)
    assert augment.RandomGamma()(holes)[0, 0].abs().max() == 0


@pytest.mark.parametrize(("dim", "shape"), [(2, (12, 14)), (2, (3, 12, 14)), (3, (10, 12, 14)), (3, (1, 10, 12, 14))])
def test_the_blur_is_a_gaussian(dim, shape):
    from scipy.ndimage import correlate

    x = torch.rand(shape)
    found = augment.GaussianBlur(5, 1.2, dim)(x)
    steps = np.stack(np.meshgrid(*[np.arange(-2, 3)] * dim, indexing="ij"))
    kernel = np.exp(-(steps**2).sum(0) / (2 * 1.2**2))
    kernel = (kernel / kernel.sum()).reshape([1] * (len(shape) - dim) + [5] * dim)
    assert found.shape == x.shape
    assert np.abs(found.numpy() - correlate(x.numpy(), kernel, mode="nearest")).max() < 1e-6
    with pytest.raises(CellMapValueError, match="odd"):
        augment.GaussianBlur(4)
