"""Batches that are gathered from a device against those that the host reads."""

import itertools

import numpy as np
import pytest
import torch

from cellmap_lightning import CellMapMultiDataset
from tests.cache.annotated_volume import Volume, blocks
from tests.resident.datasets import (
    COMPUTED,
    ELASTIC,
    KINDS,
    MISALIGN,
    SETS,
    SLIP,
    WARP,
    described,
    finished,
    open_set,
    reader_of,
)

#: Of 48 samples, those that are gathered: raw, targets of bits, ids.
GATHERED = {
    "boxes of a level": (48, 48, 48),
    "boxes of resampled voxels": (48, 24, 24),  # with x and y exchanged, bits of two lattices
    "rotated about z": (48, 48, 48),
    "rotated by any angle": (48, 48, 48),
    "rotated and averaged": (48, 0, 48),  # classes of two lattices
    "averaged about z": (48, 0, 48),
    "quarter turns": (48, 48, 48),
    "zoomed": (48, 48, 48),
    "zoomed and sheared": (48, 48, 48),
    "deformed": (48, 48, 48),
    "elastic": (48, 48, 48),
    "elastic and averaged": (48, 0, 48),
    "displaced sections": (8, 48, 48),  # sections between the lattice's voxels
    "displaced sections, rotated": (48, 48, 48),
}


def same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(torch.nan_to_num(found[name], -7), torch.nan_to_num(tensor, -7)), name


@pytest.mark.parametrize("name", SETS)
def test_samples_have_the_bits_of_the_host(volume, name):
    """Raw of bytes is rounded, so that sums that agree to 1e-6 are the same bytes except where they are half-way."""
    with open_set(volume, name) as dataset:
        reader, draws = reader_of(dataset), dataset.draw(range(48), True, 3)
        batch = reader.read(draws)
        counts = described(batch)
        if GATHERED[name][2] != 24:
            assert (counts["raw"], counts["binary"], counts["ids"]) == GATHERED[name]
        else:
            assert 16 < counts["raw"] == counts["binary"] == counts["ids"] < 32
        same(finished(dataset, reader, draws), dataset.read(draws).finish())


@pytest.mark.parametrize("name", ["boxes of a level", "boxes of resampled voxels"])
def test_tiles_are_unknown_where_earlier_ones_cover_them(volume, name):
    with open_set(volume, name, train=False, shape=(6, 40, 50)) as dataset:
        reader, draws = reader_of(dataset), dataset.draw(range(dataset.tile_count), False, 3)
        found = finished(dataset, reader, draws)
        same(found, dataset.read(draws).finish())
        assert found["binary"].isnan().any()
        assert (found["ids"] == -1).any()


def test_computed_kinds_are_read_on_the_host(volume):
    with open_set(volume, "boxes of a level", kinds=KINDS | COMPUTED) as dataset:
        reader, draws = reader_of(dataset), dataset.draw(range(8), True, 3)
        counts = described(reader.read(draws))
        assert counts == dict.fromkeys(["raw", *KINDS], 8) | dict.fromkeys(COMPUTED, 0)
        same(finished(dataset, reader, draws), dataset.read(draws).finish())


TURN = {"mirror": {"axes": {"x": 0.5}}, "rotate": {"axes": {axis: [-180, 180] for axis in "zyx"}}}
SHAPE = (40, 44, 52)


def raw_of(dtype, seed=0):
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max, SHAPE, dtype, endpoint=True)


@pytest.mark.parametrize(
    "spatial",
    [{"mirror": {"axes": {"x": 0.5, "z": 0.5}}}, TURN, TURN | WARP | {"zoom": [0.5, 1.5]}, TURN | SLIP | MISALIGN],
    ids=["mirrored", "rotated", "elastic", "sections"],
)
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32"])
def test_stored_types_of_raw(tmp_path, dtype, spatial):
    volume = Volume(tmp_path).add_raw(raw_of(dtype))
    volume.add("a", blocks(np.random.default_rng(1), SHAPE, [0, 1, 255]).astype("u1"))
    with volume.dataset(["a"], (9, 12, 15), is_train=True, spatial_transforms=spatial, cache="memory") as dataset:
        reader, draws = reader_of(dataset), dataset.draw(range(16), True, 0)
        assert described(reader.read(draws)) == {"raw": 16, "target": 16}
        same(finished(dataset, reader, draws), dataset.read(draws).finish())


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint64"])
def test_types_that_are_not_resampled_on_the_device(tmp_path, dtype):
    volume = Volume(tmp_path).add_raw((raw_of("uint8") > 100).astype(dtype))
    volume.add("a", blocks(np.random.default_rng(1), SHAPE, [0, 1, 255]).astype("u1"))
    for spatial, gathered in (({"mirror": {"axes": {"x": 0.5}}}, 16), (TURN, 0), (TURN | WARP, 0)):
        with volume.dataset(["a"], (9, 12, 15), is_train=True, spatial_transforms=spatial, cache="memory") as dataset:
            reader, draws = reader_of(dataset), dataset.draw(range(16), True, 0)
            assert described(reader.read(draws)) == {"raw": gathered, "target": 16}
            same(finished(dataset, reader, draws), dataset.read(draws).finish())


def test_crops_of_different_types_are_rounded_in_their_own(tmp_path):
    datasets = []
    for dtype in ("uint8", "uint16"):
        volume = Volume(tmp_path / dtype).add_raw(raw_of(dtype))
        volume.add(
            "a", blocks(np.random.default_rng(1), SHAPE, [0, 1, 300]).astype("u2" if dtype == "uint16" else "u1")
        )
        datasets.append(
            volume.dataset(
                ["a"], (9, 12, 15), is_train=True, spatial_transforms=TURN, cache="memory", unknown=None,
                target={"kind": "instances"},
            )
        )  # fmt: skip
    with CellMapMultiDataset(datasets) as dataset:
        reader, draws = reader_of(dataset), dataset.draw(range(16), True, 0)
        assert described(reader.read(draws)) == {"raw": 16, "target": 16}
        same(finished(dataset, reader, draws), dataset.read(draws).finish())


@pytest.mark.parametrize("count", [1, 8, 9, 24, 25, 40])
def test_any_number_of_classes(tmp_path, count):
    """Voxels of 2, 4, 6, 8 and 10 bytes; the last class is not annotated."""
    classes = [f"c{i}" for i in range(count)]
    volume = Volume(tmp_path, chunk=32).add_raw(raw_of("uint8"))
    rng = np.random.default_rng(2)
    for name in classes[: max(1, count - 1)]:
        volume.add(name, blocks(rng, SHAPE, [0, 0, 1, 255]).astype("u1"))
    for spatial in ({"mirror": {"axes": {"y": 0.5}}, "transpose": {"axes": ["z", "x"]}}, TURN, TURN | WARP):
        with volume.dataset(classes, (7, 9, 8), is_train=True, spatial_transforms=spatial, cache="memory") as dataset:
            reader, draws = reader_of(dataset), dataset.draw(range(6), True, 0)
            assert described(reader.read(draws)) == {"raw": 6, "target": 6}
            same(finished(dataset, reader, draws), dataset.read(draws).finish())


@pytest.mark.parametrize("plane", ["xy", "xz", "yz"])
def test_slices_in_any_plane(tmp_path, plane):
    volume = Volume(tmp_path).add_raw(raw_of("uint8"))
    volume.add("a", blocks(np.random.default_rng(1), SHAPE, [0, 1, 255]).astype("u1"))
    for spatial in (
        {"mirror": {"axes": {"x": 0.5, "y": 0.5}}},
        {"rotate": {"axes": {"z": [-180, 180]}}},
        {"elastic": ELASTIC["elastic"] | {"axes": ["y", "x"]}},
    ):
        with volume.dataset(
            ["a"], (14, 9), (8, 8), is_train=True, spatial_transforms=spatial, cache="memory", plane=plane
        ) as dataset:
            reader, draws = reader_of(dataset), dataset.draw(range(12), True, 0)
            assert described(reader.read(draws)) == {"raw": 12, "target": 12}
            same(finished(dataset, reader, draws), dataset.read(draws).finish())


LATTICE = {"mirror": {"axes": dict.fromkeys("zyx", 0.5)}, "transpose": {"axes": ["z", "x"]}}


@pytest.mark.parametrize("spatial", [LATTICE, TURN, TURN | WARP], ids=["boxes", "rotated", "displaced"])
@pytest.mark.parametrize("kind", [{}, {"kind": "instances"}], ids=["bits", "ids"])
def test_crops_smaller_than_a_patch_at_the_border(tmp_path, kind, spatial):
    """Raw is filled outside the volume, with what is normalized to 0, and targets outside the crop are unknown."""
    volume = Volume(tmp_path).add_raw(raw_of("uint16")).add("a", np.ones((4, 6, 8), "u1"), origin=(0, 304, 0))
    with volume.dataset(
        ["a"], (12, 12, 12), is_train=True, spatial_transforms=spatial, cache="memory", target=kind,
        raw_value_transforms="auto", normalize={"range": [40000, 65000]},
    ) as dataset:  # fmt: skip
        reader, draws = reader_of(dataset), dataset.draw(range(24), True, 0)
        assert described(reader.read(draws)) == {"raw": 24, "target": 24}
        found = finished(dataset, reader, draws)
        same(found, dataset.read(draws).finish())
        assert (found["target"] == -1).any() if kind else found["target"].isnan().any()
        assert (found["raw"] == 0).sum() > 1000


def test_samples_with_hidden_targets_are_read_on_the_host(tmp_path):
    """Targets are unknown where raw ends inside of the crop: only samples that show this are read."""
    volume = Volume(tmp_path).add_raw(raw_of("uint8")).add("a", np.ones((40, 44, 40), "u1"), origin=(0, 0, 160))
    with volume.dataset(["a"], (9, 9, 9), is_train=True, spatial_transforms=TURN, cache="memory") as dataset:
        reader, draws = reader_of(dataset), dataset.draw(range(32), True, 0)
        counts = described(reader.read(draws))
        assert counts["raw"] == 32
        assert 4 < counts["target"] < 28
        found = finished(dataset, reader, draws)
        same(found, dataset.read(draws).finish())
        assert found["target"].isnan().any()


ABOUT_Z = {"mirror": {"axes": {"y": 0.5}}, "rotate": {"axes": {"z": [-180, 180]}}}
QUARTERS = {"rotate": {"axes": {"z": [90, 90], "x": [90, 90]}}}


@pytest.mark.parametrize("spatial", [ABOUT_Z, QUARTERS], ids=["about z", "quarter turns"])
@pytest.mark.parametrize("scale", [(16, 16, 16), (20, 8, 13), (8, 24, 8)])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32"])
def test_exact_means(tmp_path, dtype, scale, spatial):
    """Patches that are coarser than raw, at the border of the volume too."""
    volume = Volume(tmp_path).add_raw(raw_of(dtype)).add("a", np.ones(SHAPE, "u1"))
    with volume.dataset(
        ["a"], (9, 11, 12), scale, is_train=True, spatial_transforms=spatial, cache="memory"
    ) as dataset:
        reader, draws = reader_of(dataset), dataset.draw(range(12), True, 0)
        assert described(reader.read(draws))["raw"] == 12
        same(finished(dataset, reader, draws), dataset.read(draws).finish())


def test_ties_of_displaced_labels(tmp_path):
    """Half-way between two voxels along z, the lower one is shown, although float32 misses the middle."""
    labels = np.random.default_rng(1).integers(0, 2, SHAPE, "u1")
    volume = Volume(tmp_path).add_raw(raw_of("uint8")).add("a", labels)
    spatial = {"elastic": ELASTIC["elastic"] | {"axes": ["y", "x"]}}
    with volume.dataset(
        ["a"], (9, 12, 15), (16, 8, 8), is_train=True, spatial_transforms=spatial, cache="memory",
        target={"kind": "instances"},
    ) as dataset:  # fmt: skip
        reader, draws = reader_of(dataset), dataset.draw(range(12), True, 0)
        assert described(reader.read(draws)) == {"raw": 12, "target": 12}
        same(finished(dataset, reader, draws), dataset.read(draws).finish())


def test_displaced_samples_that_leave_raw_are_read_on_the_host(tmp_path):
    """Targets are unknown where the volume ends inside the crop: in some samples, by the displacement alone."""
    volume = Volume(tmp_path).add_raw(raw_of("uint8")).add("a", np.ones(SHAPE, "u1"), origin=(-80, 0, 0))
    with volume.dataset(
        ["a"], (9, 12, 15), is_train=True, spatial_transforms=ELASTIC, cache="memory", pad=True
    ) as dataset:
        reader, draws = reader_of(dataset), dataset.draw(range(64), True, 0)
        counts = described(reader.read(draws))
        assert counts["raw"] == 64
        assert 0 < counts["target"] < 64
        same(finished(dataset, reader, draws), dataset.read(draws).finish())


def test_every_turn_of_the_lattice(tmp_path):
    """All 48, each against the voxels themselves."""
    raw = raw_of("uint16")
    volume = Volume(tmp_path).add_raw(raw).add("a", (raw > 30000).astype("u1"))
    spatial = {"mirror": {"axes": dict.fromkeys("zyx", 0.5)}, "transpose": {"axes": ["z", "y", "x"]}}
    with volume.dataset(["a"], (10, 10, 10), is_train=True, spatial_transforms=spatial, cache="memory") as dataset:
        reader, draws = reader_of(dataset), dataset.draw(range(400), True, 0)
        assert len({draw.turn.tobytes() for draw in draws}) == 48
        found = finished(dataset, reader, draws)
        for row, draw in enumerate(draws):
            z, y, x = dataset.crop.placement.grid_index(draw.position)
            order = np.abs(draw.turn).argmax(axis=0)
            # Axis i of the patch runs along axis order[i] of the volume, against it where the sign is negative.
            patch = raw[z : z + 10, y : y + 10, x : x + 10].transpose(order)
            signs = draw.turn[order, range(3)]
            patch = patch[tuple(slice(None, None, int(sign)) for sign in signs)]
            assert np.array_equal(found["raw"][row, 0].numpy(), patch)
            assert np.array_equal(found["target"][row, 0].numpy(), patch > 30000)


def test_rows_of_both_kinds_in_one_batch(volume):
    """Any subset of the samples of a batch is gathered, and the others are read."""
    with open_set(volume, "boxes of a level") as dataset:
        draws = dataset.draw(range(8), True, 3)
        expected = dataset.read(draws).finish()
        sizes = [sum(r.extent_bytes for r in reader_of(dataset).regions(n)) for n in range(3)]
        seen = set()
        for budget in (0, *sizes, *(a + b for a, b in itertools.combinations(sizes, 2)), sum(sizes)):
            reader = reader_of(dataset, budget)
            batch = reader.read(draws)
            seen.add(described(batch)["raw"])
            same(finished(dataset, reader, draws), expected)
            assert reader.cache.nbytes <= budget
        assert {0, 8} < seen


def test_batches_that_were_read_before_the_first_was_gathered(volume):
    """Both stage the chunks that they show; they are uploaded once, and either order is right."""
    with open_set(volume, "boxes of a level") as dataset:
        draws = dataset.draw(range(8), True, 3)
        expected = dataset.read(draws).tensors
        reader = reader_of(dataset)
        first, second = reader.read(draws), reader.read(draws)
        for batch in (second, first):
            found = batch.gathered().tensors
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
            uploaded = reader.cache.uploaded
        assert uploaded == sum(voxels.nbytes for *_, voxels in reader_of(dataset).read(draws)._staged)
