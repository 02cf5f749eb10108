import numpy as np
import pytest
import torch

from cellmap_lightning.transforms.targets import infer_exclusive, pack, packed_bytes, unpack


@pytest.mark.parametrize("classes", [1, 3, 8, 9, 48])
def test_packed_classes_come_back(classes):
    rng = np.random.default_rng(classes)
    stored = rng.choice([0, 1, 255], size=(classes, 3, 4, 5)).astype(np.uint8)
    annotated = [index for index in range(classes) if index != 2]  # the third class is not
    packed = pack(((index, stored[index], 0, 255) for index in annotated), (3, 4, 5), packed_bytes(classes))
    expected = np.where(stored == 255, np.nan, stored).astype(np.float32)
    if classes > 2:
        expected[2] = np.nan
    np.testing.assert_array_equal(unpack(torch.from_numpy(packed)[None], classes)[0].numpy(), expected)
    assert packed_bytes(classes) == 2 * ((classes + 7) // 8)


def test_instances():
    stored = np.array([[[0, 1, 255, 256, 70000]]], np.uint32)
    packed = pack([(0, stored, 0, None)], (1, 1, 5), 2)
    assert unpack(torch.from_numpy(packed)[None], 1).flatten().tolist() == [0, 1, 1, 1, 1]


def test_exclusive_classes():
    packed = pack([(0, np.array([[[0, 1, 1, 255]]], np.uint8), 0, 255)], (1, 1, 4), 2)
    infer_exclusive(packed, {1: [0]})
    labels = unpack(torch.from_numpy(packed)[None], 2)[0, 1].flatten()
    assert labels.isnan().tolist() == [True, False, False, True]
    assert labels[1] == 0


@pytest.mark.parametrize("classes", [3, 8, 11])
def test_every_device_unpacks_to_the_same_bits(classes):
    """The road of a device, walked on the CPU by way of torch's own kernels."""
    rng = np.random.default_rng(0)
    known = rng.integers(0, 256, (2, 3, 4, 5, packed_bytes(classes) // 2), dtype=np.uint8)
    packed = np.stack([known & rng.integers(0, 256, known.shape, dtype=np.uint8), known], -1).reshape(
        *known.shape[:-1], -1
    )

    class Elsewhere(torch.Tensor):
        """A CPU tensor that says that it is not on one."""

        @property
        def device(self):
            class Device:
                type = "elsewhere"

            return Device()

    here = unpack(torch.from_numpy(packed), classes)
    elsewhere = torch.from_numpy(packed).as_subclass(Elsewhere)
    real_empty, real_arange = torch.empty, torch.arange

    def without_device(function):
        def call(*args, device=None, **options):
            return function(*args, **options)

        return call

    try:
        torch.empty, torch.arange = without_device(real_empty), without_device(real_arange)
        there = unpack(elsewhere, classes)
    finally:
        torch.empty, torch.arange = real_empty, real_arange
    assert torch.equal(here.view(torch.int32), there.as_subclass(torch.Tensor).view(torch.int32))
