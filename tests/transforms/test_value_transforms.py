"""Value transforms of other libraries are reproducible: samples depend on seed and number alone."""

import pickle

import pytest
import torch
from monai import transforms as monai
from torch import nn

from cellmap_lightning.crops.options import IntensityOptions
from cellmap_lightning.transforms.normalization import OnDictionary
from tests.conftest import CLASSES, INPUTS, TARGETS
from tests.make import make_dataset
from tests.runs import GT, Watch, module, task, trainer


def dataset(volume, transform, **kwargs):
    target = f"{volume.path}/{GT}/crop2/[mito,er,pm]"
    given = {"classes": CLASSES, "input_arrays": INPUTS, "target_arrays": TARGETS, "cache": "memory"}
    return make_dataset(
        volume.raw_path, target, intensity=IntensityOptions(raw_value_transforms=transform), **given | kwargs
    )


def scaled(raw):
    return raw.to(torch.float32) / 255


def dropped(raw):
    return nn.functional.dropout(scaled(raw))


def noise():
    return monai.RandGaussianNoise(prob=1.0, std=0.1)


RANDOM = {
    "array": lambda: [scaled, noise()],
    "composed": lambda: monai.Compose([scaled, monai.RandScaleIntensity(0.5, prob=0.5), noise()]),
    "dictionary": lambda: OnDictionary(
        monai.Compose([monai.ScaleIntensityd("raw"), monai.RandGaussianNoised("raw", prob=1.0, std=0.1)])
    ),
    "dictionary in a list": lambda: [scaled, OnDictionary(monai.RandGaussianNoised("em", prob=1.0, std=0.1), "em")],
    "plain": lambda: dropped,
}


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM)
def test_a_sample_follows_from_its_number(volume, make):
    with dataset(volume, make()) as first, dataset(volume, make()) as second, dataset(volume, make(), seed=1) as other:
        samples = [first[n]["raw"] for n in (0, 1, 2)]
        again = [second[n]["raw"] for n in (2, 0, 1)]
        with pickle.loads(pickle.dumps(second)) as copy:
            assert torch.equal(copy[1]["raw"], samples[1])
        assert torch.equal(first[0]["raw"], samples[0])
        assert all(torch.equal(a, b) for a, b in zip(samples, [again[1], again[2], again[0]], strict=True))
        assert not torch.equal(other[0]["raw"], samples[0])
        assert type(samples[0]) is torch.Tensor


def test_transforms_of_a_chain_have_different_seeds(volume):
    with dataset(volume, [scaled, noise()]) as one, dataset(volume, [scaled, noise(), noise()]) as two:
        with dataset(volume, scaled) as none:
            plain = none[0]["raw"]
        first, both = one[0]["raw"] - plain, two[0]["raw"] - plain
        assert abs(torch.corrcoef(torch.stack([first.flatten(), (both - first).flatten()]))[0, 1]) < 0.1


def test_a_dictionary_transform_is_that_of_the_tensor(volume):
    with dataset(volume, OnDictionary(monai.ScaleIntensityd("raw"))) as ours, dataset(volume, None) as stored:
        torch.testing.assert_close(ours[0]["raw"], monai.ScaleIntensity()(stored[0]["raw"]).as_subclass(torch.Tensor))


def test_two_of_the_same_are_equal():
    transform = noise()
    assert OnDictionary(transform) == OnDictionary(transform)
    assert len({OnDictionary(transform), OnDictionary(transform)}) == 1
    assert OnDictionary(transform) != OnDictionary(transform, "em")


def test_a_batch_at_a_time_on_the_device(volume, tmp_path, quiet_lightning):
    class Own(type(task())):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.training:
                batch["raw"] = batch["raw"] * 0 - 1
            return batch

    watch = Watch()
    model = Own(nn.Conv3d(1, 3, 1), CLASSES)
    with module(volume, batches_per_epoch=1, cache="memory") as data:
        trainer(tmp_path, callbacks=[watch], num_sanity_val_steps=0).fit(model, data)
    assert (watch.batches[0]["raw"] == -1).all()
    assert (watch.batches[1]["raw"] >= 0).all()


def test_torchvision(volume):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise(sigma=0.1), v2.GaussianBlur(3)])
    with dataset(volume, transform) as ours:
        assert torch.equal(ours[0]["raw"], ours[0]["raw"])
        assert not torch.equal(ours[0]["raw"], ours[1]["raw"])


def test_torchio(volume):
    torchio = pytest.importorskip("torchio")
    with dataset(volume, [scaled, torchio.RandomNoise(std=(0.1, 0.2))]) as ours:
        assert torch.equal(ours[0]["raw"], ours[0]["raw"])
        assert not torch.equal(ours[0]["raw"], ours[1]["raw"])
        assert type(ours[0]["raw"]) is torch.Tensor


def test_kornia(volume):
    augmentation = pytest.importorskip("kornia.augmentation")
    spec = {"shape": [1, 16, 24], "scale": [10.48, 8, 8]}
    blur = augmentation.RandomGaussianBlur((3, 3), (0.5, 1.5), p=1.0, keepdim=True)
    with dataset(volume, [scaled, blur], input_arrays={"raw": spec}, target_arrays={"labels": spec}) as ours:
        assert torch.equal(ours[0]["raw"], ours[0]["raw"])
        assert ours[0]["raw"].shape == (1, 16, 24)
