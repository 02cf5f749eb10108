"""Strategies that draw patches around voxels of a class."""

import numpy as np
import pytest
import torch

from cellmap_lightning import (
    CellMapDataset,
    CellMapMultiDataset,
)
from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale
from cellmap_lightning.runtime.rng import PLACE, uniforms
from cellmap_lightning.sampling.strategy import NUMBERS
from tests.sampling.sampled_crops import CLASSES, choose, make

TURNS = {
    "straight": None,
    "quarter turns": {"mirror": {"axes": {"x": 0.5, "z": 0.5}}, "transpose": {"axes": ["x", "y"]}},
}


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("jitter", [0, 0.5, 1])
@pytest.mark.parametrize("shape", [[8, 16, 16], [1, 24, 24], [7, 9, 11]])
def test_the_voxel_is_in_its_patch(volume, shape, jitter, turns):
    """Every one: read, not computed."""
    spec = {"shape": shape, "scale": [10.48, 8, 8]}
    options = {"name": "foreground", "jitter": jitter}
    with make(volume, options, spec, spatial_transforms=TURNS[turns]) as dataset:
        count = 150
        draws = dataset.draw(range(count), True, 0)
        found = dataset.strategy.choose(uniforms(0, PLACE, range(count), NUMBERS), [d.turn for d in draws])
        target = dataset.layout.finish(dataset.read(draws))["labels"].reshape(count, len(CLASSES), -1)
        assert set(found.classes) == {0, 1, 2, 3}
        assert (target[torch.arange(count), torch.from_numpy(found.classes)] == 1).any(dim=1).all()


@pytest.mark.parametrize("jitter", [0, 0.5, 1])
def test_the_voxel_is_in_its_zoomed_and_sheared_patch(volume, jitter):
    """Unless a magnified patch at the border of the crop does not reach it."""
    spec = {"shape": [8, 16, 16], "scale": [10.48, 8, 8]}
    transforms = {"zoom": [1.3, 2.5], "shear": {"axes": {"zx": [-0.5, 0.5]}}, "rotate": {"axes": {"z": [-180, 180]}}}
    with make(volume, {"name": "foreground", "jitter": jitter}, spec, spatial_transforms=transforms) as dataset:
        turns = np.stack(dataset.spatial.turns(0, range(300)))
        rng, geometry = np.random.default_rng(0), dataset.crop_table.geometry
        crop = dataset.crops[1]
        low, high = np.asarray(crop.placement.centers.lower), np.asarray(crop.placement.centers.upper)
        points = rng.uniform(low, high, (300, 3))
        offsets = (2 * rng.random((300, 3)) - 1) * jitter
        positions = geometry.around(np.ones(300, np.int64), points, offsets, turns)
        centers = np.stack([crop.placement.center(int(p)) for p in positions])
        inside = np.einsum("nij,nj->ni", np.linalg.inv(turns), points - centers)
        clipped = ((centers == low) | (centers == high)).any(axis=1)
        assert (np.abs(inside) <= crop.half + 1e-6)[~clipped].all()
        assert (~clipped).sum() > 30


def test_slices_in_each_plane_hold_it_too(volume):
    spec = {"shape": [24, 24], "scale": [8, 8]}
    for plane in ("xy", "xz", "yz"):
        with make(volume, "foreground", spec, plane=plane, crops={2: "mito,er"}, classes=["mito", "er"]) as dataset:
            draws = dataset.draw(range(60), True, 0)
            target = dataset.layout.finish(dataset.read(draws))["labels"].reshape(60, 2, -1)
            found = choose(dataset, 60)
            assert (target[torch.arange(60), torch.from_numpy(found.classes)] == 1).any(dim=1).all()


def test_the_voxel_is_anywhere_in_its_patch_with_jitter_1_and_in_its_middle_with_0(volume):
    """In a crop that is much larger than the patch, so that few patches have to be moved."""
    spec = {"shape": [4, 8, 8], "scale": [10.48, 8, 8]}
    for jitter, low, high in ((0, 0.99, 1.01), (1, 0.4, 0.75)):
        options = {"name": "foreground", "classes": "nuc", "jitter": jitter}
        with make(volume, options, spec, crops={2: "nuc"}, classes=["nuc"]) as dataset:
            target = dataset.layout.finish(dataset.read(dataset.draw(range(200), True, 0)))["labels"]
            middle = target[:, 0, 1:3, 3:5, 3:5] == 1
            shown = middle.flatten(1).any(dim=1).float().mean()
            assert shown >= low if jitter == 0 else shown > 0.5
            assert shown <= high or jitter == 1


@pytest.mark.parametrize("jitter", [0, 1])
@pytest.mark.parametrize(
    "turns", [{}, {"rotate": {"axes": {"z": [-180, 180], "y": [-40, 40]}}, "transpose": {"axes": ["x", "z"]}}]
)
def test_the_only_voxel_is_nowhere_outside_its_patch(tmp_path, turns, jitter):
    """By geometry, along the patch's own axes; of a class of one voxel, so that no neighbour stands in for it."""
    stored = np.zeros((48, 48, 48), np.uint8)
    stored[20, 25, 22] = 1
    write_group(tmp_path / "v.zarr")
    for name in ("raw", "crop1/a"):
        write_multiscale(
            tmp_path / "v.zarr" / name,
            stored,
            scale=(8, 8, 8),
            translation=(0, 0, 0),
            levels=1,
            storage=ArrayOptions(chunks=(16, 16, 16)),
        )
    spec = {"shape": [5, 8, 12], "scale": [8, 8, 8]}
    crop = CellMapDataset(
        tmp_path / "v.zarr/raw",
        f"{tmp_path}/v.zarr/crop1/[a]",
        ["a"],
        {"raw": spec},
        {"labels": spec},
        is_train=True,
        spatial_transforms=turns,
    )
    with CellMapMultiDataset([crop], {"name": "foreground", "jitter": jitter}) as dataset:
        offsets = []
        for draw in dataset.draw(range(400), True, 0):
            away = np.multiply(8, (20, 25, 22)) - crop.placement.center(draw.position)
            offsets.append(away if draw.turn is None else draw.turn.T @ away)
    reach = np.abs(offsets) / (np.multiply(8, spec["shape"]) / 2)
    assert reach.max() <= 1 + 1e-9
    if jitter:
        assert (reach.max(axis=0) > 0.75).all()  # and it is anywhere in it
    else:
        assert (np.linalg.norm(offsets, axis=1) <= 8 * 3**0.5 / 2 + 1e-9).all()  # as near the middle as positions allow


def test_turned_by_any_angle_few_corners_miss_it(volume):
    turns = {"rotate": {"axes": {"z": [-180, 180]}}}
    with make(volume, "foreground", spatial_transforms=turns) as dataset:
        count = 300
        draws = dataset.draw(range(count), True, 0)
        found = dataset.strategy.choose(uniforms(0, PLACE, range(count), NUMBERS), [d.turn for d in draws])
        target = dataset.layout.finish(dataset.read(draws))["labels"].reshape(count, len(CLASSES), -1)
        shown = (target[torch.arange(count), torch.from_numpy(found.classes)] == 1).any(dim=1)
        assert shown.float().mean() > 0.97


def test_patches_are_never_centred_on_unannotated_voxels(volume):
    """Half of er in crop2 is marked unknown."""
    with make(volume, "foreground", crops={2: "er"}, classes=["er"]) as dataset:
        index = dataset.crop_table.index(0, 0)
        crop = dataset.crops[0]
        stored = crop.label_images["er"]
        level = next(m for m in stored.present if m.lattice == index.lattice)
        import zarr

        values = np.asarray(zarr.open_array(level.path, mode="r")[:])
        assert (values == 255).any()
        assert set(values[tuple(index.voxels.T)].tolist()) <= set(np.unique(values).tolist()) - {0, 255}
