"""Tiles of an evaluation: every annotated voxel once, low-discrepancy orders, and stratified subsets."""

import itertools
import math
import pickle

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cellmap_lightning import CellMapDataLoader, CellMapDataModule, CellMapDataset, CellMapError, CellMapMultiDataset
from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale
from cellmap_lightning.sampling.tiles import TileOrder, golden_stride, halved, stratified
from cellmap_lightning.training.masked import DiceScore
from tests.make import make_dataset

SHAPE = (14, 17, 19)
SCALE = (8.0, 4.0, 4.0)
#: Where the crop lies in raw, voxels.
START = (3, 2, 5)
#: How raw is larger than the crop, so that there is raw around it.
RAW = (22, 24, 28)
CLASSES = ["a", "b", "c"]
ENCODING = {"annotation_type": {"type": "semantic_segmentation", "encoding": {"absent": 0, "unknown": 255}}}


def attributes(level, array):
    counts = {"absent": int((array == 0).sum()), "unknown": int((array == 255).sum())}
    return {"cellmap": {"annotation": {**ENCODING, "complement_counts": counts}}}


class Stored:
    """Raw and the labels of a crop in it: a and b are annotated, c is not; a fifth of the voxels is unknown."""

    def __init__(self, root, scale=SCALE):
        self.root = root
        rng = np.random.default_rng(3)
        self.raw = rng.integers(0, 256, RAW).astype(np.uint8)
        write_group(root)
        write_multiscale(
            root / "raw", self.raw, scale=scale, translation=(0, 0, 0), levels=1, storage=ArrayOptions(chunks=(8, 8, 8))
        )
        self.labels = {}
        for name in "ab":
            self.labels[name] = rng.choice([0, 0, 1, 1, 255], SHAPE).astype(np.uint8)
            write_multiscale(
                root / "crop1" / name, self.labels[name], scale=scale, translation=np.multiply(START, scale).tolist(),
                levels=2, mode="mode", storage=ArrayOptions(chunks=(8, 8, 8)), array_attributes=attributes,
            )  # fmt: skip
        self.target = f"{root}/crop1/[a,b]"

    def dataset(self, shape, targets=None, scale=SCALE, **kwargs):
        spec = {"shape": shape, "scale": scale}
        targets = {"labels": spec} if targets is None else targets
        given = {"pad": True, "target_path": self.target, "classes": CLASSES}
        return make_dataset(self.root / "raw", input_arrays={"raw": spec}, target_arrays=targets, **(given | kwargs))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return Stored(tmp_path_factory.mktemp("tiles") / "volume.zarr")


# -- every voxel once


class Count(L.LightningModule):
    """Says of each voxel what raw says there, so that every count can be computed from the arrays on disk."""

    def __init__(self, pairs):
        super().__init__()
        self.pairs = pairs
        self.scores = torch.nn.ModuleDict({target: DiceScore(CLASSES) for _, target in pairs})

    def validation_step(self, batch, batch_idx):
        for name, target in self.pairs:
            logits = (batch[name] * 255 - 127.5).expand(-1, len(CLASSES), *[-1] * (batch[name].ndim - 2))
            wanted = batch[target]
            if f"{target}_mask" in batch:
                wanted = wanted.masked_fill(~batch[f"{target}_mask"], math.nan)
            self.scores[target].update(logits, wanted)

    def counts(self, target):
        score = self.scores[target]
        return {n: getattr(score, n).tolist() for n in ("tp", "predicted", "positive", "known")}


def validated(stored, inputs, targets, **kwargs):
    """The counts of a full validation by a Trainer."""
    model = Count(list(zip(inputs, targets, strict=True)))
    run = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    crops = {"val": [{"raw": str(stored.root / "raw"), "gt": stored.target}]}
    with CellMapDataModule(CLASSES, inputs, targets, datasets=crops, batch_size=3, **kwargs) as data:
        run.validate(model, data, verbose=False)
    return {target: model.counts(target) for target in targets}


def directly(stored, inside=((0, 0),) * 3):
    """The same counts, from the arrays; ``inside`` says how much less than the crop is covered on each side."""
    cut = tuple(slice(a, n - b) for (a, b), n in zip(inside, SHAPE, strict=True))
    raw = stored.raw[tuple(slice(s, s + n) for s, n in zip(START, SHAPE, strict=True))][cut] > 127
    found = {"tp": [], "predicted": [], "positive": [], "known": []}
    for name in CLASSES:
        label = stored.labels[name][cut] if name in stored.labels else np.full(raw.shape, 255)
        known, positive = label != 255, label == 1
        found["tp"].append(int((raw & positive).sum()))
        found["predicted"].append(int((raw & known).sum()))
        found["positive"].append(int(positive.sum()))
        found["known"].append(int(known.sum()))
    return found


@pytest.mark.usefixtures("quiet_lightning")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((5, 7, 9), {}),
        ((5, 7, 9), {"pad": False}),
        ((13, 16, 18), {"nan_targets": False}),
        ((14, 6, 19), {"num_workers": 1, "multiprocessing_context": "fork"}),
        ((20, 7, 6), {}),  # larger than the crop along z: one tile there
        ((20, 20, 20), {"nan_targets": False}),
        ((1, 7, 9), {}),
        ((14, 1, 9), {"pad": False}),
        ((7, 9), {}),
    ],
    ids=str,
)
def test_a_full_validation_counts_every_voxel(stored, shape, options):
    spec = {"shape": shape, "scale": SCALE[-len(shape) :]}
    assert validated(stored, {"raw": spec}, {"labels": spec}, **options)["labels"] == directly(stored)


@pytest.mark.usefixtures("quiet_lightning")
@pytest.mark.parametrize("planes", [["xz"], ["yz"], ["xy", "xz", "yz"]], ids=str)
def test_in_each_plane_every_voxel_counts_once(tmp_path, planes):
    stored = Stored(tmp_path / "volume.zarr", scale=(8, 8, 8))
    spec = {"shape": (7, 9), "scale": (8, 8)}
    expected = {name: [len(planes) * n for n in counts] for name, counts in directly(stored).items()}
    assert validated(stored, {"raw": spec}, {"labels": spec}, planes=planes)["labels"] == expected


@pytest.mark.usefixtures("quiet_lightning")
def test_each_of_two_targets_counts_its_own_voxels_once(stored):
    """All around one centre: tiles follow the smaller one, so that the larger ones overlap by more than the last."""
    small, large = ({"shape": shape, "scale": SCALE} for shape in ((3, 5, 7), (7, 11, 7)))
    counts = validated(stored, {"raw": small, "wide": large}, {"labels": small, "context": large})
    assert counts["context"] == directly(stored)
    assert counts["labels"] == directly(stored)
    # Without raw around the crop the larger one lies in it, and the smaller one keeps away from its edge.
    counts = validated(stored, {"raw": small, "wide": large}, {"labels": small, "context": large}, pad=False)
    assert counts["context"] == directly(stored)
    assert counts["labels"] == directly(stored, ((2, 2), (3, 3), (0, 0)))


@pytest.mark.usefixtures("quiet_lightning")
def test_a_smaller_target_beside_one_that_holds_the_crop(stored):
    small, large = ({"shape": shape, "scale": SCALE} for shape in ((6, 21, 21), (20, 21, 21)))
    counts = validated(stored, {"raw": small, "wide": large}, {"labels": small, "context": large})
    assert counts["context"] == directly(stored)
    assert counts["labels"] == directly(stored)


def scattered(dataset, target):
    """Return counts of known voxels over all tiles, and their values, on the lattice of the first position's patch."""
    loader = CellMapDataLoader(dataset, 4, is_train=False)
    (crop,) = dataset.crops
    window = crop.arrays.targets[target].window
    placement = crop.placement
    low = placement.first - window.extent / 2
    size = np.rint((placement.centers.extent + window.extent) / window.scale).astype(int)
    channels = crop.arrays.targets[target].kind.channels
    times = np.zeros((channels, *size), int)
    values = np.full((channels, *size), np.nan)
    for batch in loader:
        for row, position in enumerate(batch["idx"].tolist()):
            center = np.asarray([dataset.get_center(position)[axis] for axis in "zyx"])
            start = np.rint((center - window.extent / 2 - low) / window.scale).astype(int)
            where = (slice(None), *(slice(s, s + n) for s, n in zip(start, window.shape, strict=True)))
            patch = batch[target][row].numpy().reshape(channels, *window.shape)
            known = ~np.isnan(patch) if patch.dtype.kind == "f" else patch >= 0
            times[where] += known
            values[where] = np.where(known, patch, values[where])
    return times, values


def whole(stored, target, scale=SCALE, **kwargs):
    """The target of the crop as one patch of it."""
    shape = np.rint(np.multiply(SHAPE, SCALE) / scale).astype(int).tolist()
    with stored.dataset(shape, {"labels": {"shape": shape, "scale": scale, **target}}, scale, **kwargs) as dataset:
        assert len(dataset) == 1
        value = dataset[0]["labels"].numpy().astype(float)
    return np.where(value < 0, np.nan, value) if target.get("kind") in ("labels", "instances") else value


@settings(max_examples=25, derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.tuples(*(st.integers(3, n + 3) for n in SHAPE)), st.sampled_from(["binary", "labels", "instances"]))
def test_every_annotated_voxel_is_shown_once(stored, shape, kind):
    target = {"shape": shape, "scale": SCALE, "kind": kind}
    with stored.dataset(shape, {"labels": target}) as dataset:
        times, values = scattered(dataset, "labels")
    expected = whole(stored, {"kind": kind})
    # A patch that is larger than the crop holds it, and is unknown around it.
    inside = times.any(0)
    cut = tuple(slice(w[0], w[-1] + 1) for w in (np.nonzero(inside.any(o))[0] for o in ((1, 2), (0, 2), (0, 1))))
    times, values = times[(slice(None), *cut)], values[(slice(None), *cut)]
    np.testing.assert_array_equal(times, ~np.isnan(expected))
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize(
    "target", [{"kind": "affinities", "offsets": [[1, 0, 0], [0, -2, 3]]}, {"kind": "sdt", "nm": 12}], ids=str
)
def test_targets_with_a_halo(stored, target):
    with stored.dataset((5, 7, 9), {"labels": {"shape": (5, 7, 9), "scale": SCALE, **target}}) as dataset:
        times, values = scattered(dataset, "labels")
    expected = whole(stored, target)
    np.testing.assert_array_equal(times, ~np.isnan(expected))
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize(
    ("scale", "options"),
    [
        ((8, 8, 8), {}),  # coarser than the labels, between their levels
        ((16, 8, 8), {}),  # their second level
        ((16, 8, 8), {"label_downsample": "majority"}),
        ((4, 2, 2), {"too_coarse": "upsample", "max_upsampling": 4}),
        ((8, 5.1, 5.1), {"pad": True}),  # on no lattice that is stored
    ],
    ids=str,
)
def test_other_resolutions_than_the_stored_one(stored, scale, options):
    """Each voxel of the target, on its own lattice, once."""
    with stored.dataset((4, 5, 6), scale=scale, **{"pad": False, **options}) as dataset:
        times, values = scattered(dataset, "labels")
        shape = list(times.shape[1:])
        spec = {"shape": shape, "scale": scale}
        one = stored.dataset(shape, {"labels": spec}, scale, **{**options, "pad": True})
    with one:
        center = [one.get_center(i) for i in range(len(one))]
        wanted = dataset.placement.first + (np.asarray(shape) - (4, 5, 6)) * scale / 2
        position = next(i for i, c in enumerate(center) if np.allclose([c[a] for a in "zyx"], wanted, atol=1e-6))
        expected = one[position]["labels"].numpy()
    np.testing.assert_array_equal(times, ~np.isnan(expected))
    np.testing.assert_array_equal(values, expected)


def test_only_tiles_are_marked(stored):
    with stored.dataset((5, 7, 9)) as dataset:
        last = dataset.tile(dataset.tile_count - 1)
        alone = dataset[last]["labels"]
        (batch,) = CellMapDataLoader(dataset, 1, is_train=False, tiles=[dataset.tile_count - 1])
        tile = batch["labels"][0]
        assert tile.isnan().sum() > alone.isnan().sum()
        assert torch.equal(tile[~tile.isnan()], alone[~tile.isnan()])
        with pytest.raises(CellMapError, match="tiles need is_train=False"):
            CellMapDataLoader(dataset, tiles=[0])
        with pytest.raises(IndexError, match=r"tile must be in \[0, "):
            next(iter(CellMapDataLoader(dataset, is_train=False, tiles=[99999])))


# -- the order


@pytest.mark.parametrize("grids", [[(1, 1, 1)], [(2, 1, 1)], [(3, 5, 7), (1, 1, 1), (2, 9, 4)], [(31, 1, 17)]])
def test_the_order_has_each_tile_once(grids):
    spread = TileOrder(grids)
    assert sorted(spread) == list(range(sum(map(math.prod, grids))))
    assert spread[-1] == list(spread)[-1]
    assert pickle.loads(pickle.dumps(spread))[: len(spread)] == list(spread)


def test_every_beginning_is_spread_over_crops_and_inside_them():
    grids = [(8, 8, 8), (4, 16, 2), (32, 4, 4)]
    order = list(TileOrder(grids))
    sizes = [math.prod(g) for g in grids]
    octants = np.concatenate(
        [
            8 * crop + (np.indices(g).reshape(3, -1) >= np.divide(g, 2)[:, None]).T @ [4, 2, 1]
            for crop, g in enumerate(grids)
        ]
    )
    total = np.bincount(octants) / len(order)
    for n in range(1, len(order)):
        seen = np.bincount(octants[order[:n]], minlength=len(total))
        assert abs(seen - n * total).max() < 5, "of no octant of a crop are there five more or less than its share"
        crops = seen.reshape(3, 8).sum(1)
        assert abs(crops - n * np.divide(sizes, len(order))).max() < 3


def test_any_number_of_tiles_costs_nothing():
    spread = TileOrder([(1000, 1000, 1000), (300, 1, 7)])
    first = [spread[n] for n in range(1000)]
    assert len(set(first)) == 1000
    assert len(pickle.dumps(spread)) < 1000
    for count in itertools.chain(range(1, 300), [10**7, 10**7 + 19]):
        assert math.gcd(golden_stride(count), count) == 1


def test_neighbours_in_the_halved_grid_are_near():
    grid = (8, 16, 8)
    places = np.array(np.unravel_index([halved(n, grid) for n in range(math.prod(grid))], grid)).T
    for part in places.reshape(-1, 64, 3):  # sixty-four that follow each other fill a box of 4 x 4 x 4
        assert (np.ptp(part, axis=0) == 3).all()


# -- the few of a fit


def test_strata_take_turns():
    everything = TileOrder([(10, 10, 10)])
    rare, common = np.array([5, 500]), np.arange(0, 900, 3)
    chosen = stratified([common, rare], everything, 60, seed=0)
    assert len(chosen) == len(set(chosen)) == 60
    assert {5, 500} <= set(chosen[:6])
    assert 24 <= len(set(chosen) & set(common.tolist())) < 60
    assert stratified([common, rare], everything, 60, seed=0) == chosen
    assert stratified([common, rare], everything, 60, seed=1) != chosen
    assert sorted(stratified([np.array([3])], TileOrder([(2, 2, 2)]), 8, 0)) == list(range(8))


@pytest.fixture
def sparse(tmp_path):
    """Two crops of 4 x 4 x 4 tiles each; b is in one corner of the second only, c is nowhere."""
    root = tmp_path / "sparse.zarr"
    write_group(root)
    raw = np.zeros((32, 32, 96), np.uint8)
    write_multiscale(
        root / "raw", raw, scale=(8, 8, 8), translation=(0, 0, 0), levels=1, storage=ArrayOptions(chunks=(16, 16, 16))
    )
    for crop in (1, 2):
        labels = {name: np.zeros((32, 32, 32), np.uint8) for name in "abc"}
        labels["a"][:, :16] = 1
        if crop == 2:
            labels["b"][24:29, 25:31, 26:30] = 1
        for name, label in labels.items():
            write_multiscale(
                root / f"crop{crop}" / name, label, scale=(8, 8, 8), translation=(0, 0, 256 * crop),
                levels=3, mode="mode", storage=ArrayOptions(chunks=(16, 16, 16)), array_attributes=attributes,
            )  # fmt: skip
    return root


def sparse_module(root, **kwargs):
    crops = [{"raw": str(root / "raw"), "gt": f"{root}/crop{n}/[a,b,c]"} for n in (1, 2)]
    spec = {"shape": (8, 8, 8), "scale": (8, 8, 8)}
    return CellMapDataModule(
        ["a", "b", "c"], {"raw": spec}, {"labels": spec}, datasets={"train": crops, "val": crops},
        batch_size=2, batches_per_epoch=1, missing_raw="warn", leakage="ignore", **kwargs,
    )  # fmt: skip


class Seen(L.LightningModule):
    """Recorder of the tiles of each validation, and of the classes in them."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.passes = []

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def on_validation_epoch_start(self):
        self.passes.append([])

    def validation_step(self, batch, batch_idx):
        shown = (batch["labels"] == 1).flatten(2).any(2)
        self.passes[-1] += list(zip(batch["idx"].tolist(), map(tuple, shown.tolist()), strict=True))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.usefixtures("quiet_lightning")
def test_stratified_validation_in_fit_and_all_tiles_afterwards(sparse):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    model = Seen()
    with sparse_module(sparse, val_samples=9, seed=4) as data:
        assert len(data.val_dataloader().dataset) == 128  # without a Trainer
        run = L.Trainer(max_epochs=2, devices=1, num_sanity_val_steps=0, **options)
        run.fit(model, data)
        first, second = model.passes
        assert first == second
        assert len({position for position, _ in first}) == 9
        shown = np.array([classes for _, classes in first])
        assert shown.sum(0).tolist()[1:] == [1, 0], "the only tile that has b is there"
        assert shown[:, 0].sum() >= 3
        assert not shown.any(1).all(), "and tiles that have nothing"
        run.validate(model, data, verbose=False)
        assert len({position for position, _ in model.passes[-1]}) == data.val_dataset.tile_count == 128
    with sparse_module(sparse, val_samples=None) as data:
        L.Trainer(max_epochs=1, devices=1, num_sanity_val_steps=0, **options).fit(model, data)
        assert len(model.passes[-1]) == 128


def test_the_chosen_tiles_follow_from_the_crops_and_the_seed(sparse):
    with sparse_module(sparse) as one, sparse_module(sparse) as other:
        chosen = one.val_dataset.select_tiles(16, 0)
        assert other.val_dataset.select_tiles(16, 0) == chosen
        assert other.val_dataset.select_tiles(16, 1) != chosen
        assert isinstance(one.val_dataset.select_tiles(256, 0), TileOrder)
        found = one.val_dataset.crops[1].class_tiles
        assert {name: len(tiles) for name, tiles in found.items()} == {"a": 32, "b": 1, "c": 0}


def test_unreadable_levels_leave_the_class_possible_everywhere(sparse, caplog):
    for chunk in (sparse / "crop2" / "a" / "s2").rglob("*"):
        if chunk.is_file() and not chunk.name.startswith((".", "zarr")):
            chunk.write_bytes(b"not a chunk")
    with sparse_module(sparse) as data:
        assert data.val_dataset.crops[1].class_tiles["a"] is None
        assert len(data.val_dataset.select_tiles(16, 0)) == 16
    assert "sparse/crop2/a: cannot be read" in caplog.text


def test_crops_without_targets_have_tiles_too(stored):
    raw = {"shape": (5, 7, 9), "scale": SCALE}
    with CellMapMultiDataset([CellMapDataset(stored.root / "raw", input_arrays={"raw": raw})]) as dataset:
        assert len(dataset.select_tiles(4, 0)) == 4
