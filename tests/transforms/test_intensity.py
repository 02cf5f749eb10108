import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from cellmap_lightning import CellMapDataLoader, CellMapDataset
from cellmap_lightning.crops.options import IntensityOptions
from cellmap_lightning.transforms.intensity import IntensityTransforms

SCALE = [8.0, 4.0, 4.0]


def patch(count=3, shape=(8, 12, 10)):
    return torch.from_numpy(np.random.default_rng(0).random((count, 1, *shape), np.float32))


def change(config, raw, samples=(5, 6, 7), seed=1, number=0):
    return IntensityTransforms(config)(raw, seed, samples, number, SCALE)


def test_each_intensity_transform_equals_its_definition():
    raw = patch()
    torch.testing.assert_close(change({"contrast": [2, 2]}, raw), (raw - 0.5) * 2 + 0.5)
    torch.testing.assert_close(change({"brightness": [-0.25, -0.25]}, raw), raw - 0.25)
    torch.testing.assert_close(change({"gamma": [2, 2]}, raw - 0.5), (raw - 0.5).square() * (raw - 0.5).sign())
    torch.testing.assert_close(
        change({"contrast": [0.5, 0.5], "brightness": [0.1, 0.1], "gamma": [2, 2]}, raw), (raw * 0.5 + 0.35).square()
    )
    noise = change({"noise": [0.2, 0.2]}, torch.zeros(2, 1, 32, 32, 32), (0, 1))
    assert abs(noise.std() - 0.2) < 0.002
    assert abs(noise.mean()) < 0.003
    assert not torch.equal(noise[0], noise[1])


def test_blur_is_a_gaussian_in_nm():
    raw = patch()
    blurred = change({"blur": [6, 6]}, raw)
    for sample, right in zip(blurred, raw, strict=True):
        expected = gaussian_filter(right[0].double().numpy(), [6 / s for s in SCALE], mode="nearest", radius=[3, 5, 5])
        np.testing.assert_allclose(sample[0], expected, atol=1e-6)
    thin = raw[:, :, :1]
    assert change({"blur": [6, 6]}, thin).shape == thin.shape
    torch.testing.assert_close(change({"blur": [0, 0]}, raw), raw)


ALL = {"blur": [0, 8], "contrast": [0.5, 1.5], "brightness": [-0.1, 0.1], "gamma": [0.5, 2], "noise": [0, 0.1]}


def test_a_sample_depends_on_seed_and_number_alone():
    raw = patch()
    before = raw.clone()
    whole = change(ALL, raw)
    assert torch.equal(raw, before), "what was given stays as it is"
    for row in range(3):
        assert torch.equal(change(ALL, raw[row : row + 1], [5 + row])[0], whole[row])
    assert not torch.equal(change(ALL, raw, seed=2), whole)
    assert not torch.equal(change(ALL, raw, (6, 7, 8)), whole)
    # Another input of the same samples changes alike, but for its noise.
    alike = {name: span for name, span in ALL.items() if name != "noise"}
    torch.testing.assert_close(change(alike, raw, number=1), change(alike, raw))
    assert not torch.equal(change({"noise": [1, 1]}, raw, number=1), change({"noise": [1, 1]}, raw))


@pytest.mark.parametrize("name", ALL)
def test_the_last_bit_depends_on_neither_threads_nor_the_other_samples(name):
    """In patches that torch shares out over its threads, whose parts do not end where its vectors do."""
    raw, samples = patch(4, (37, 65, 63)) - 0.1, [0, 1, 2, 3]
    config, before = {name: ALL[name]}, torch.get_num_threads()
    found = {}
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for size in (1, 2, 3, 4):
                parts = [slice(at, at + size) for at in range(0, 4, size)]
                found[threads, size] = torch.cat([change(config, raw[part], samples[part]) for part in parts])
    finally:
        torch.set_num_threads(before)
    different = [how for how, values in found.items() if not torch.equal(values, found[1, 1])]
    assert different == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"constrast": [1, 1]}, "has no 'constrast'; did you mean 'contrast'"),
        ({"contrast": 1.5}, r"contrast must be \[lowest, highest\], none below 0, got 1.5"),
        ({"noise": [0.2, 0.1]}, "noise must be"),
        ({"gamma": [-1, 1]}, "none below 0"),
        ({"brightness": [0, float("inf")]}, "brightness must be"),
    ],
)
def test_invalid_ranges_are_refused(config, message):
    with pytest.raises((KeyError, ValueError), match=message):
        IntensityTransforms(config)


def test_batches_are_changed_while_training_alone(volume):
    arrays = {"raw": {"shape": [8, 16, 24], "scale": [10.48, 8, 8]}}
    targets = {"labels": {"shape": [8, 16, 24], "scale": [10.48, 8, 8]}}
    path = volume.label_path(volume.crops[1], "[mito,er,pm]")

    def batches(train, augment, **more):
        dataset = CellMapDataset(
            volume.raw_path,
            path,
            ["mito", "er"],
            arrays,
            targets,
            is_train=train,
            seed=3,
            intensity=IntensityOptions(intensity_transforms=augment),
        )
        with dataset:
            return list(CellMapDataLoader(dataset, 2, samples_per_epoch=4, is_train=train, **more))

    plain, changed = batches(True, None), batches(True, ALL)
    for a, b in zip(plain, changed, strict=True):
        assert torch.equal(a["labels"].nan_to_num(9), b["labels"].nan_to_num(9))
        expected = IntensityTransforms(ALL)(a["raw"], 3, [0, 1] if a is plain[0] else [2, 3], 0, [10.48, 8, 8])
        torch.testing.assert_close(b["raw"], expected)
        assert not torch.equal(a["raw"], b["raw"])
    for a, b in zip(batches(False, None), batches(False, ALL), strict=True):
        assert torch.equal(a["raw"], b["raw"])
