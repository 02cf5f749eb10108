"""Values of targets, compared with an independent computation from stored labels."""

import json

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from cellmap_lightning import CellMapDataset, CellMapError, CellMapMultiDataset, batch_memory
from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale
from tests.make import make_dataset

SHAPE = (16, 20, 24)
SCALE = (8.0, 4.0, 4.0)
NAN = float("nan")


def annotation(kind="semantic_segmentation", unknown_count=0, **encoding):
    return {
        "cellmap": {
            "annotation": {
                "annotation_type": {"type": kind, "encoding": {"absent": 0, "unknown": 255, **encoding}},
                **({} if unknown_count is None else {"complement_counts": {"absent": 0, "unknown": unknown_count}}),
            }
        }
    }


def counted(attributes, array):
    """The same with the count of absent voxels that the array has."""
    found = json.loads(json.dumps(attributes))
    block = found["cellmap"]["annotation"]
    if "complement_counts" in block:
        block["complement_counts"]["absent"] = int((array == block["annotation_type"]["encoding"]["absent"]).sum())
    return found


class Crop:
    """A raw volume and label arrays that fill it exactly."""

    def __init__(self, root):
        self.root = root
        rng = np.random.default_rng(0)
        self.raw = rng.integers(1, 255, SHAPE).astype(np.uint8)
        write_group(root)
        write_multiscale(
            root / "raw", self.raw, scale=SCALE, translation=(0, 0, 0), levels=1, storage=ArrayOptions(chunks=(8, 8, 8))
        )
        self.labels, self.made = {}, []

    def add(self, name, stored, attributes=None, levels=1):
        self.labels[name] = np.asarray(stored)
        write_multiscale(
            self.root / "crop1" / name,
            self.labels[name],
            scale=SCALE,
            translation=(0, 0, 0),
            levels=levels,
            mode="mode",
            storage=ArrayOptions(chunks=(8, 8, 8)),
            array_attributes=lambda level, array: counted(attributes or annotation(), array),
        )
        return self

    def dataset(self, classes, shape=SHAPE, scale=SCALE, names=None, **kwargs):
        spec = {"shape": shape, "scale": scale}
        targets = kwargs.pop("target", {})
        made = make_dataset(
            self.root / "raw",
            f"{self.root}/crop1/[{','.join(names or self.labels)}]",
            classes,
            {"raw": spec},
            {"target": {**spec, **targets}},
            **kwargs,
        )
        self.made.append(made)
        return made


@pytest.fixture
def crop(tmp_path):
    found = Crop(tmp_path / "volume.zarr")
    yield found
    for dataset in found.made:
        dataset.close()


def random_ids(seed, values, dtype=np.uint8):
    """Blocks of ids, so that neighbours often agree."""
    coarse = np.random.default_rng(seed).choice(values, size=(4, 5, 6))
    return np.kron(coarse, np.ones((4, 4, 4), int))[: SHAPE[0], : SHAPE[1], : SHAPE[2]].astype(dtype)


def whole(dataset):
    """The only position of a patch as large as the crop."""
    assert len(dataset) == 1
    with dataset:
        finished = dataset[0]
        batch = dataset.layout.finish(dataset.read(dataset.draw([0, 0], shuffle=False, seed=0)))
        memory = dataset.batch_memory(2)
        assert memory.arrays == {n: t.nbytes for n, t in batch.items() if n != "idx"}
        compact = dataset.read(dataset.draw([0, 0], shuffle=False, seed=0))
        assert memory.compact.arrays == {n: t.nbytes for n, t in compact.tensors.items() if n not in ("idx", "sample")}
    return finished["target"]


def test_labels_for_a_softmax(crop):
    crop.add("a", random_ids(1, [0, 1, 255])).add("b", random_ids(2, [0, 1, 255]))
    labels = whole(crop.dataset(["a", "b"], target={"kind": "labels", "ignore_index": -1}))
    a, b = crop.labels["a"], crop.labels["b"]
    expected = np.where(a == 1, 1, np.where(b == 1, 2, np.where((a == 255) | (b == 255), -1, 0)))
    assert labels.dtype == torch.int64
    np.testing.assert_array_equal(labels[0].numpy(), expected)
    with pytest.raises(CellMapError, match="ignore_index must be a whole number outside the classes"):
        crop.dataset(["a", "b"], target={"kind": "labels", "ignore_index": 2})


def test_instances_keep_their_ids(crop):
    """255 is an instance where nothing is unknown, and means unknown where something is; ids go beyond it."""
    crop.add("a", random_ids(1, [0, 1, 255, 300, 65535], np.uint16), annotation("instance_segmentation", 0))
    crop.add("b", random_ids(2, [0, 7, 255]), annotation("instance_segmentation", 99))
    ids = whole(crop.dataset(["b", "c", "a"], target={"kind": "instances"})).numpy()
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids[2], crop.labels["a"])
    np.testing.assert_array_equal(ids[0], np.where(crop.labels["b"] == 255, -1, crop.labels["b"].astype(int)))
    assert (ids[1] == -1).all()


def test_affinities(crop):
    crop.add("a", random_ids(1, [0, 1, 2, 255]), annotation("instance_segmentation", 1))
    offsets = [[1, 0, 0], [0, -2, 0], [0, 0, 3], [-1, 1, 0]]
    found = whole(crop.dataset(["a"], target={"kind": "affinities", "offsets": offsets})).numpy()
    stored = np.pad(crop.labels["a"].astype(float), 3, constant_values=255)
    here = crop.labels["a"]
    for channel, offset in enumerate(offsets):
        there = stored[tuple(slice(3 + o, 3 + o + n) for o, n in zip(offset, SHAPE, strict=True))]
        expected = ((here == there) & (here != 0)).astype(float)
        expected[(here == 255) | (there == 255)] = NAN  # unannotated outside the crop
        np.testing.assert_array_equal(found[channel], expected)
    memory = batch_memory(
        {"shape": SHAPE, "scale": SCALE},
        {"shape": SHAPE, "scale": SCALE, "kind": "affinities", "offsets": offsets},
        ["a"],
    )
    assert memory.arrays["output"] == 4 * 4 * np.prod(SHAPE)


def test_affinities_see_beyond_the_patch(crop):
    """A patch inside the crop depends on its neighbours outside: the margin is read and cropped."""
    crop.add("a", random_ids(1, [0, 1, 2]))
    with crop.dataset(["a"], (4, 4, 4), target={"kind": "affinities", "offsets": [[3, 0, 0]]}) as dataset:
        assert not dataset[0]["target"].isnan().any()


def test_signed_distances(crop):
    crop.add("a", random_ids(3, [0, 0, 1]))
    found = whole(crop.dataset(["a"], target={"kind": "sdt", "nm": 200.0}))[0].numpy()
    present = crop.labels["a"] == 1
    expected = np.where(
        present, distance_transform_edt(present, sampling=SCALE), -distance_transform_edt(~present, sampling=SCALE)
    )
    known = ~np.isnan(found)
    np.testing.assert_allclose(found[known], np.clip(expected[known] / 200, -1, 1), atol=1e-6)
    # Unannotated outside the crop: a voxel is certain if it is nearer to a boundary than to the border.
    border = distance_transform_edt(np.pad(np.ones(SHAPE, bool), 1), sampling=SCALE)[1:-1, 1:-1, 1:-1]
    np.testing.assert_array_equal(known, border >= np.minimum(np.abs(expected), 200))


def test_signed_distances_around_the_unknown(crop):
    stored = np.zeros(SHAPE, np.uint8)
    stored[8, 10, 8] = 1
    stored[8, 10, 18] = 255
    found = whole(crop.add("a", stored).dataset(["a"], target={"kind": "sdt", "nm": 16}))[0]
    row = found[8, 10]
    assert row[8] == pytest.approx(4 / 16)
    assert row[9] == pytest.approx(-4 / 16)
    assert row[12] == -1
    assert row[14] == -1  # the unknown voxel is exactly as far as what becomes -1
    assert row[15:22].isnan().all()


def test_masks_instead_of_nan(crop):
    crop.add("a", random_ids(1, [0, 1, 255]))
    with crop.dataset(["a", "b"], nan_targets=False) as dataset:
        sample = dataset[0]
        assert sample["target_mask"].dtype == torch.bool
        np.testing.assert_array_equal(sample["target_mask"][0].numpy(), crop.labels["a"] != 255)
        np.testing.assert_array_equal(sample["target"][0].numpy(), crop.labels["a"] == 1)
        assert not sample["target_mask"][1].any()
        assert (sample["target"][1] == 0).all()
        batch = dataset.layout.finish(dataset.read(dataset.draw([0], False, 0)))
        assert dataset.batch_memory(1).arrays == {n: t.nbytes for n, t in batch.items() if n != "idx"}


def test_ids_above_the_encoding_need_a_word(crop):
    crop.add("a", random_ids(1, [0, 3, 255, 300], np.uint16), annotation("instance_segmentation", None))
    with pytest.raises(CellMapError, match=r"crop1/a: .*ids above 255.*unknown=255 or unknown=null"):
        crop.dataset(["a"])[0]
    unknown = whole(crop.dataset(["a"], unknown=255))[0].numpy()
    np.testing.assert_array_equal(np.isnan(unknown), crop.labels["a"] == 255)
    none = whole(crop.dataset(["a"], unknown=None))[0].numpy()
    np.testing.assert_array_equal(none, crop.labels["a"] != 0)
    with pytest.raises(CellMapError, match="unknown must be 'metadata', a stored value or null"):
        crop.dataset(["a"], unknown="none")


def test_negative_labels_are_refused(crop):
    crop.add("a", np.where(random_ids(1, [0, 1]) == 1, -1, 0).astype(np.int32))
    said = r"crop1/a: .* holds the negative label -1, which its encoding does not explain"
    with pytest.raises(CellMapError, match=said):
        crop.dataset(["a"])[0]


def test_another_encoding(crop):
    crop.add("a", random_ids(1, [2, 1, 9]), annotation(absent=2, unknown=9))
    found = whole(crop.dataset(["a"]))[0].numpy()
    np.testing.assert_array_equal(found, np.where(crop.labels["a"] == 9, NAN, crop.labels["a"] == 1))


def test_float_labels(crop, tmp_path):
    crop.add("a", random_ids(1, [0, 1, 255], np.float32))
    found = whole(crop.dataset(["a"]))[0].numpy()
    np.testing.assert_array_equal(np.isnan(found), crop.labels["a"] == 255)
    other = Crop(tmp_path / "nan.zarr").add("a", np.full(SHAPE, np.nan, np.float32))
    with other.dataset(["a"]) as dataset, pytest.raises(CellMapError, match="labels that are not whole numbers"):
        dataset[0]


@pytest.mark.parametrize("rule", ["stored", "majority", "any"])
def test_coarser_labels(crop, rule):
    """A line one voxel thick is lost in a pyramid of modes, and preserved by `any`."""
    stored = np.zeros(SHAPE, np.uint8)
    stored[:, 7, :] = 1
    stored[0:2, 12:14, 0:4] = [[[1, 1, 255, 255], [1, 1, 255, 0]], [[1, 0, 255, 0], [0, 0, 0, 0]]]
    crop.add("a", stored, levels=2)
    coarse = {"shape": [n // 2 for n in SHAPE], "scale": [2 * s for s in SCALE]}
    dataset = CellMapDataset(
        crop.root / "raw",
        f"{crop.root}/crop1/[a]",
        ["a"],
        {"raw": coarse},
        {"target": coarse},
        labels=LabelOptions(label_downsample=rule),
    )
    found = whole(dataset)[0]
    assert (found[:, 3] == (1 if rule == "any" else 0)).all()
    assert found[0, 6, 0] == (1 if rule != "stored" else found[0, 6, 0])
    # Four of the eight voxels of the second block are unknown: not a majority that is known.
    if rule == "majority":
        assert found[0, 6, 1].isnan()
    if rule == "any":
        assert found[0, 6, 1].isnan()


def test_groups_and_parts(crop, tmp_path):
    """er is known by its parts, and a part by the whole; names say nothing, the table does."""
    table = tmp_path / "classes.csv"
    table.write_text('mem,1,""\nlum,2,""\nwhole,3,"1,2"\nother,4,""\n')
    crop.add("mem", random_ids(1, [0, 1, 255])).add("lum", random_ids(2, [0, 1, 255])).add(
        "whole", random_ids(3, [0, 1, 255])
    )
    mem, lum, group = (crop.labels[n] for n in ("mem", "lum", "whole"))

    def of(classes, names, *rules):
        return whole(crop.dataset(classes, names=names, infer=rules, class_table=str(table))).numpy()

    # The whole is not annotated: present where a part is, absent where both are known to be.
    (found,) = of(["whole"], ["mem", "lum"], "subset")
    expected = np.where((mem == 1) | (lum == 1), 1, np.where((mem == 0) & (lum == 0), 0, NAN))
    np.testing.assert_array_equal(found, expected)
    # With one part alone it can only be present.
    (found,) = of(["whole"], ["mem"], "subset")
    np.testing.assert_array_equal(found, np.where(mem == 1, 1, NAN))
    # Annotated voxels are never changed.
    (found,) = of(["whole"], ["mem", "lum", "whole"], "subset", "superset")
    np.testing.assert_array_equal(found, np.where(group != 255, group, expected))
    # The whole is absent, so are its parts.
    found = of(["mem", "other"], ["mem", "whole"], "superset")
    np.testing.assert_array_equal(found[0], np.where(mem != 255, mem, np.where(group == 0, 0, NAN)))
    assert np.isnan(found[1]).all()
    # Off by default.
    (found,) = whole(crop.dataset(["mem"], names=["mem", "whole"])).numpy()
    np.testing.assert_array_equal(np.isnan(found), mem == 255)
    with pytest.raises(CellMapError, match="infer must be a list of subset and superset"):
        of(["mem"], ["mem"], "parts")


def test_the_shipped_table():
    """er is its ids 16 to 23, not two membranes."""
    from cellmap_lightning.transforms.implied import DEFAULT_TABLE, read_table

    table = read_table(DEFAULT_TABLE)
    assert table["er"] == frozenset(range(16, 24))
    assert table["ecs"] == frozenset([1])
    assert table["nuc"] < table["cell"]


def test_exclusion_reads_classes_that_are_not_asked_for(crop):
    crop.add("a", random_ids(1, [0, 1, 255])).add("b", random_ids(2, [0, 1, 255]))
    for relation in (["b"], {"b"}, ("b", "nowhere")):
        (found,) = whole(crop.dataset(["a"], class_relation_dict={"a": relation})).numpy()
        a, b = crop.labels["a"], crop.labels["b"]
        np.testing.assert_array_equal(found, np.where(a != 255, a, np.where(b == 1, 0, NAN)))
    with pytest.raises(CellMapError, match=r"class_relation_dict\['a'\] must be a list or set"):
        crop.dataset(["a"], class_relation_dict={"a": "b"})


def test_several_inputs_and_targets_are_concentric(crop):
    crop.add("a", random_ids(1, [0, 1]))
    inputs = {"detail": {"shape": [4, 4, 4], "scale": SCALE}, "context": {"shape": [4, 4, 4], "scale": [16, 8, 8]}}
    targets = {"fine": {"shape": [4, 4, 4], "scale": SCALE}, "half": {"shape": [2, 2, 2], "scale": SCALE}}
    with CellMapDataset(
        crop.root / "raw", f"{crop.root}/crop1/[a]", ["a"], inputs, targets, read=ReadOptions(pad=True)
    ) as dataset:
        sample = dataset[len(dataset) // 2]
        assert {n: tuple(t.shape) for n, t in sample.items() if n != "idx"} == {
            "detail": (1, 4, 4, 4), "context": (1, 4, 4, 4), "fine": (1, 4, 4, 4), "half": (1, 2, 2, 2),
        }  # fmt: skip
        torch.testing.assert_close(sample["half"], sample["fine"][:, 1:3, 1:3, 1:3])


def test_slices_in_each_plane(crop):
    """Rows and columns of a flat patch lie where the plane says, and the batch can mix planes."""
    crop.add("a", random_ids(1, [0, 1]))
    spec = {"shape": [8, 8], "scale": [8.0, 8.0]}

    def make(plane):
        return CellMapDataset(
            crop.root / "raw",
            f"{crop.root}/crop1/[a]",
            ["a"],
            {"raw": spec},
            {"target": spec},
            plane=plane,
            intensity=IntensityOptions(raw_value_transforms=None),
        )

    for plane, rows in (("xy", "y"), ("xz", "z"), ("yz", "z")):
        with make(plane) as dataset:
            sample = dataset[3]
            assert sample["raw"].shape == (1, 8, 8)
            center = dataset.get_center(3)
            columns = {"xy": "x", "xz": "x", "yz": "y"}[plane]
            for row, column in ((0, 0), (5, 2)):
                at = dict(center)
                at[rows] += (row - 3.5) * 8
                at[columns] += (column - 3.5) * 8
                where = tuple(int(np.ceil(at[a] / s - 0.5 - 1e-6)) for a, s in zip("zyx", SCALE, strict=True))
                assert sample["target"][0, row, column] == crop.labels["a"][where]
    with CellMapMultiDataset([make("xy"), make("xz"), make("yz")]) as mixed:
        assert mixed.layout.finish(mixed.read(mixed.draw(range(9), True, 0)))["raw"].shape == (9, 1, 8, 8)
    with pytest.raises(CellMapError, match="plane 'xz' is for shapes of two lengths"):
        crop.dataset(["a"], plane="xz")
    with pytest.raises(CellMapError, match="a plane is one of xy, xz, yz"):
        crop.dataset(["a"], plane="zx")
    fine = {"shape": [8, 8], "scale": [3.0, 3.0]}
    with pytest.raises(CellMapError, match=r"2.67x finer along z"):
        CellMapDataset(crop.root / "raw", None, None, {"raw": fine}, plane="xz")
    CellMapDataset(crop.root / "raw", None, None, {"raw": fine}, plane="xy")


def test_slices_as_channels(crop):
    crop.add("a", random_ids(1, [0, 1]))
    raw = {"shape": [5, 8, 8], "scale": SCALE, "slices_as": "channels"}
    target = {"shape": [1, 8, 8], "scale": SCALE}
    with CellMapDataset(
        crop.root / "raw",
        f"{crop.root}/crop1/[a]",
        ["a"],
        {"raw": raw},
        {"target": target},
        intensity=IntensityOptions(raw_value_transforms=None),
    ) as dataset:
        sample = dataset[0]
        batch = dataset.layout.finish(dataset.read(dataset.draw(range(2), False, 0)))
        assert batch["raw"].shape == (2, 5, 8, 8)
        assert batch["target"].shape == (2, 1, 8, 8)
        np.testing.assert_array_equal(sample["raw"].numpy(), crop.raw[0:5, 0:8, 0:8])
        np.testing.assert_array_equal(sample["target"][0].numpy(), crop.labels["a"][2, 0:8, 0:8])


def test_normalization_of_a_volume(crop, monkeypatch, tmp_path):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "kept"))
    crop.add("a", random_ids(1, [0, 1]))
    values = crop.raw.astype(float)
    with crop.dataset(["a"], normalize="zscore") as dataset:
        torch.testing.assert_close(
            dataset[0]["raw"][0],
            torch.from_numpy((values - values.mean()) / values.std()).float(),
            atol=1e-5,
            rtol=1e-5,
        )
    assert list((tmp_path / "kept").glob("*.json"))
    low, high = np.percentile(values, [1, 99])
    with crop.dataset(["a"], normalize={"percentile": [1, 99]}, invert=True) as dataset:
        expected = 1 - (values - low) / (high - low)
        torch.testing.assert_close(dataset[0]["raw"][0], torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-5)
    # Voxels outside the volume are 0 for every rule.
    for rule, invert in (("dtype", True), ("zscore", False), ({"range": [50, 200]}, True)):
        big = {"shape": [20, 20, 24], "scale": SCALE}
        with CellMapDataset(
            crop.root / "raw",
            f"{crop.root}/crop1/[a]",
            ["a"],
            {"raw": big},
            {"t": big},
            read=ReadOptions(pad=True),
            intensity=IntensityOptions(normalize=rule, invert=invert),
        ) as dataset:
            outside = dataset[0]["raw"][0, :4]
            assert outside.abs().max() < 0.01


def test_crops_of_different_types_and_contrast_in_one_batch(tmp_path):
    """uint8 and uint16 travel as float32; each is normalized by its own volume."""
    made = []
    for name, dtype, rule in (("one", np.uint8, {"range": [0, 100]}), ("two", np.uint16, {"range": [0, 5000]})):
        raw = np.full(SHAPE, 50 if dtype == np.uint8 else 2500, dtype)
        write_group(tmp_path / name)
        write_multiscale(tmp_path / name / "raw", raw, scale=SCALE, translation=(0, 0, 0), levels=1)
        spec = {"raw": {"shape": [4, 4, 4], "scale": SCALE}}
        made.append(
            CellMapDataset(tmp_path / name / "raw", input_arrays=spec, intensity=IntensityOptions(normalize=rule))
        )
    with CellMapMultiDataset(made) as both:
        draws = both.draw(range(16), True, 0)
        compact = both.read(draws)
        assert compact.tensors["raw"].dtype == torch.float32
        assert set(compact.tensors["raw"].unique().tolist()) == {50.0, 2500.0}
        torch.testing.assert_close(both.layout.finish(compact)["raw"], torch.full((16, 1, 4, 4, 4), 0.5))


def test_the_data_is_never_written_to(crop, tmp_path):
    """Hashed and read-only before and after everything that reads."""
    import hashlib

    crop.add("a", random_ids(1, [0, 1]))
    files = sorted(p for p in crop.root.rglob("*") if p.is_file())
    before = {p: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}
    for p in crop.root.rglob("*"):
        p.chmod(0o555 if p.is_dir() else 0o444)
    try:
        with crop.dataset(["a"], normalize="zscore") as dataset:
            dataset[0]
    finally:
        for p in crop.root.rglob("*"):
            p.chmod(0o755 if p.is_dir() else 0o644)
    assert sorted(p for p in crop.root.rglob("*") if p.is_file()) == files
    assert {p: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files} == before


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (
            {"kind": "semantic"},
            r"kind must be one of binary, labels, .*, sdt, boundary, lsd, flow, skeleton_distance, got 'semantic'",
        ),
        ({"kind": "affinities"}, "affinities need offsets"),
        ({"kind": "affinities", "offsets": [[0, 0, 0]]}, "affinities need offsets"),
        ({"kind": "sdt"}, r"nm \(the distance that an sdt scales to 1\) must be a number above 0"),
        ({"kind": "sdt", "nm": -1}, r"nm \(the distance that an sdt scales to 1\) must be a number above 0"),
        ({"kind": "boundary"}, r"nm \(the distance up to which a boundary is marked\) must be a number above 0, got 0"),
        ({"kind": "boundary", "nm": "near"}, "must be a number above 0, got 'near'"),
        ({"kind": "lsd", "sigma": -8}, r"sigma \(of the window of local shape descriptors, nm\) must be .*, got -8"),
        ({"kind": "lsd", "nm": 8}, "has no 'nm': for kind 'lsd' it has sigma"),
        ({"kind": "flow", "nm": float("inf")}, "nm .the distance within which flow finds .* must be a number above 0"),
        ({"kind": "skeleton_distance", "nm": 0}, "greatest distance of skeleton_distance.* must be a number above 0"),
        ({"kind": "affinities", "offsets": [[1, 0, 0]], "weights": [1, 2]}, "one number from 0 for each of the 1 off"),
        ({"kind": "affinities", "offsets": [[1, 0, 0]], "weights": [-1]}, r"weights must be .*; got \[-1\]"),
        ({"kind": "affinities", "offsets": [[1, 0, 0]], "weights": [0]}, r"not all 0; got \[0\]"),
        ({"kind": "affinities", "offsets": [[1, 0, 0]], "weights": "equal"}, "not all 0; got 'equal'"),
        ({"kind": "binary", "nm": 3}, "has no 'nm': for kind 'binary' it has no options"),
        ({"kinds": "binary"}, "did you mean 'kind'"),
    ],
)
def test_bad_kinds(crop, target, match):
    crop.add("a", random_ids(1, [0, 1]))
    with pytest.raises(CellMapError, match=match):
        crop.dataset(["a"], target=target)
