"""The synthetic volume: stored like the field's data, deterministic, and with labels exactly on the structures."""

import csv
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr

from cellmap_lightning.demo import synthetic
from cellmap_lightning.demo.labels import crop_label
from cellmap_lightning.demo.scene import Scene
from cellmap_lightning.demo.specimen import CROPS, LABEL_SHAPE, membership
from cellmap_lightning.demo.staging import is_complete
from cellmap_lightning.demo.texture import paint_raw
from cellmap_lightning.errors import CellMapFileExistsError, CellMapValueError
from cellmap_lightning.io.downsampling import downsample_mode

RAW_SCALE = np.array([5.24, 4, 4])


def read(path, level=0):
    return zarr.open_group(str(path), mode="r", use_consolidated=False)[f"s{level}"]


def attributes(path):
    return zarr.open_group(str(path), mode="r", use_consolidated=False).attrs.asdict()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def geometry(path, level=0):
    about = attributes(path)
    transforms = about.get("ome", about)["multiscales"][0]["datasets"][level]["coordinateTransformations"]
    return np.array(transforms[0]["scale"]), np.array(transforms[1]["translation"])


def box(path, level=0):
    """Return the physical corners of an array in nm."""
    scale, translation = geometry(path, level)
    return translation - scale / 2, translation + (np.array(read(path, level).shape) - 0.5) * scale


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    return synthetic.write_volume(tmp_path_factory.mktemp("synthetic") / "demo.zarr")


@pytest.fixture(scope="module")
def scene():
    return Scene(0)


@pytest.fixture
def quick(monkeypatch, scene):
    """Write the same files in a tenth of the time: one small crop, and raw that is constant."""
    monkeypatch.setattr(synthetic, "CROPS", CROPS[4:])
    monkeypatch.setattr(synthetic, "Scene", lambda seed: scene)
    monkeypatch.setattr(synthetic, "paint_raw", lambda scene, seed: np.full((8, 8, 8), seed, np.uint8))


def raw_slices(volume, crop, name):
    """Return the raw voxels of a label's box, as slices of raw s0."""
    low, high = box(volume.label_path(crop, name))
    first, last = low / RAW_SCALE + 0.5, high / RAW_SCALE + 0.5
    np.testing.assert_allclose(first, np.rint(first), atol=1e-9)
    np.testing.assert_allclose(last, np.rint(last), atol=1e-9)
    return tuple(slice(round(a), round(b)) for a, b in zip(first.tolist(), last.tolist(), strict=True))


# -- layout


def test_csv_rows_name_existing_arrays(volume):
    text = Path(volume.csv_path).read_text()
    assert all(line.startswith('"') and line.endswith('"') for line in text.splitlines())
    with Path(volume.csv_path).open(newline="") as file:
        rows = list(csv.reader(file))
    assert {row[0] for row in rows} == {"train", "validate"}
    folder = Path(volume.csv_path).parent
    for crop, (usage, *parts) in zip(volume.crops, rows, strict=True):
        assert usage == volume.usage[crop]
        assert str(folder / parts[0] / parts[1]) == volume.raw_path
        stem, classes = parts[3].rstrip("]").split("[")
        assert tuple(classes.split(",")) == volume.annotated[crop]
        for name in volume.annotated[crop]:
            assert str(folder / parts[2] / stem / name) == volume.label_path(crop, name)
            assert len(read(volume.label_path(crop, name), 2).shape) == 3


def test_raw_geometry(volume):
    raw = read(volume.raw_path)
    assert raw.shape == (128, 320, 320)
    assert raw.dtype == np.uint8
    assert raw.chunks == (64, 128, 128)
    for level in range(3):
        scale, translation = geometry(volume.raw_path, level)
        np.testing.assert_allclose(scale, RAW_SCALE * 2**level)
        np.testing.assert_allclose(translation, RAW_SCALE * (2**level - 1) / 2)
        np.testing.assert_allclose(box(volume.raw_path, level), box(volume.raw_path), atol=1e-9)


def test_crops_start_on_raw_corners_and_do_not_overlap(volume):
    taken = np.zeros(read(volume.raw_path).shape, int)
    corners = []
    for crop in volume.crops:
        for name in (*volume.annotated[crop], "all"):
            where = raw_slices(volume, crop, name)
            scale, translation = geometry(volume.label_path(crop, name))
            np.testing.assert_allclose(scale, RAW_SCALE / 2)
            np.testing.assert_allclose(translation / scale % 1, 0.5, atol=1e-9)
            # Label s1 has raw's voxels, in edge space, where only the centre convention puts it.
            assert read(volume.label_path(crop, name), 1).shape == tuple(s.stop - s.start for s in where)
            np.testing.assert_allclose(geometry(volume.label_path(crop, name), 1)[0], RAW_SCALE)
            np.testing.assert_allclose(
                geometry(volume.label_path(crop, name), 1)[1],
                [s.start * v for s, v in zip(where, RAW_SCALE, strict=True)],
            )
        taken[where] += 1
        corners.append(where)
    assert taken.max() == 1
    assert any(s.start % 2 for where in corners for s in where), "a crop between the voxels of raw s1"
    border = corners[volume.crops.index("crop3")]
    assert [s.start for s in border][:2] == [0, 0]
    assert border[2].stop == taken.shape[2]
    assert min(s.stop - s.start for s in corners[volume.crops.index("crop5")]) == 16


def test_crop_attributes_list_the_annotated_classes(volume):
    for crop in volume.crops:
        folder = Path(volume.label_path(crop, "all")).parent
        annotation = attributes(folder)["cellmap"]["annotation"]
        assert annotation["class_names"] == list(volume.annotated[crop])
        assert annotation["version"] == "0.1.1"
        assert annotation["name"] == crop
        expected = {
            "created_by",
            "created_with",
            "start_date",
            "end_date",
            "duration_days",
            "protocol_uri",
            "description",
        }
        assert expected <= set(annotation)
        assert {p.name for p in folder.iterdir() if p.is_dir()} == {*volume.annotated[crop], "all"}
    assert set(volume.classes) == {name for listed in volume.annotated.values() for name in listed}


def test_class_attributes_match_the_stored_values(volume):
    bare = []
    for crop in volume.crops:
        assert "cellmap" not in attributes(volume.label_path(crop, "all"))
        for name in volume.annotated[crop]:
            path = volume.label_path(crop, name)
            annotation = attributes(path)["cellmap"]["annotation"]
            kind = annotation["annotation_type"]
            instances = name in ("mito", "nuc", "ves")
            assert annotation["class_name"] == name
            assert kind["type"] == ("instance_segmentation" if instances else "semantic_segmentation")
            assert kind["encoding"] == (
                {"absent": 0, "unknown": 255} if instances else {"absent": 0, "present": 1, "unknown": 255}
            )
            label = read(path)[:]
            stored = read(path).attrs.asdict()
            if not stored:
                bare.append((crop, name))
                continue
            stored = stored["cellmap"]["annotation"]
            assert stored["class_name"] == name
            assert stored["annotation_type"] == kind
            unknown = 0 if instances else int((label == 255).sum())
            assert stored["complement_counts"] == {"absent": int((label == 0).sum()), "unknown": unknown}
            assert not read(path, 1).attrs.asdict()
            if not instances:
                assert set(np.unique(label)) <= {0, 1, 255}
    assert bare == [("crop5", "mito_mem")]


def test_volume_contains_the_difficulties_of_real_data(volume):
    ves = read(volume.label_path("crop1", "ves"))
    assert ves.dtype == np.uint16
    ids = np.unique(ves[:])
    assert 255 in ids
    assert ids.max() > 255
    assert ves.attrs["cellmap"]["annotation"]["complement_counts"]["unknown"] == 0

    assert not read(volume.label_path("crop1", "nuc"))[:].any(), "annotated and absent"
    assert not Path(volume.label_path("crop3", "nuc")).exists(), "not annotated"
    for name in ("er", "er_mem"):
        values = read(volume.label_path("crop2", name))[:]
        assert (values[:, :, 162:] == 255).all()
        assert not (values[:, :, :162] == 255).any()
    assert read(volume.label_path("crop2", "er")).attrs["cellmap"]["annotation"]["complement_counts"]["unknown"] > 0


def test_label_all_agrees_with_the_class_labels(volume):
    members = {"mito": [3, 4], "er": [16, 17], "nuc": [37], "pm": [2], "ecs": [1], "ves": [8, 9], "cyto": [35]}
    for crop in volume.crops:
        everything = read(volume.label_path(crop, "all"))[:]
        assert set(np.unique(everything)) <= set(synthetic.CLASS_IDS.values())
        for name in set(members) & set(volume.annotated[crop]):
            label = read(volume.label_path(crop, name))[:]
            known = label != 255 if name not in ("mito", "nuc", "ves") else np.ones(label.shape, bool)
            np.testing.assert_array_equal((label != 0)[known], np.isin(everything, members[name])[known])
        np.testing.assert_array_equal(read(volume.label_path(crop, "all"), 1)[:], downsample_mode(everything))


@pytest.mark.parametrize("seed", [0, 1])
def test_every_seed_contains_the_training_classes(seed, scene):
    """Foreground at 10.48 x 8 x 8 nm, in the training crops together and in each validation crop."""
    scene = scene if seed == 0 else Scene(seed)
    counts_of = {"train": dict.fromkeys(synthetic.TRAIN_CLASSES, 0)}
    for crop in CROPS:
        material, owner = scene.paint(crop.offset, crop.shape)
        counts = counts_of.setdefault(
            "train" if crop.usage == "train" else crop.name, dict.fromkeys(synthetic.TRAIN_CLASSES, 0)
        )
        for name in set(synthetic.TRAIN_CLASSES) & set(crop.classes):
            label = crop_label(name, crop, material, owner)
            counts[name] += int((downsample_mode(downsample_mode(label)) != 0).sum())
        if "ves" in crop.classes:
            ids = np.unique(crop_label("ves", crop, material, owner))
            assert {0, 255, 256} <= set(ids.tolist())
        if crop.name == "crop1":
            assert not membership("nuc")[material].any()
        if crop.name == "crop5":
            assert membership("mito")[material].mean() > 0.1
    assert len(counts_of) == 2
    for counts in counts_of.values():
        assert min(counts.values()) > 500, counts


# -- raw image


def test_part_of_a_box_equals_the_same_part_of_a_larger_box(scene):
    whole, owners = scene.paint((64, 280, 200), (24, 120, 300))
    part, owner = scene.paint((69, 301, 333), (11, 64, 101))
    inside = np.s_[5:16, 21:85, 133:234]
    np.testing.assert_array_equal(part, whole[inside])
    np.testing.assert_array_equal(owner, owners[inside])


def test_same_seed_gives_the_same_bytes(volume, scene):
    again, shape = Scene(0), (24, 64, 80)
    raw = paint_raw(scene, 0, shape)
    np.testing.assert_array_equal(paint_raw(again, 0, shape), raw)
    assert (paint_raw(scene, 1, shape) != raw).any()
    crop = CROPS[4]
    material, owner = again.paint(crop.offset, crop.shape)
    np.testing.assert_array_equal(
        crop_label("mito", crop, material, owner), read(volume.label_path("crop5", "mito"))[:]
    )
    plane = (1, *LABEL_SHAPE[1:])
    assert (Scene(1).paint((0, 0, 0), plane)[0] != again.paint((0, 0, 0), plane)[0]).any()


def test_labels_lie_on_the_structures(volume):
    raw = read(volume.raw_path)[:].astype(float)

    def contrast(crop, dark, shift=(0, 0, 0)):
        """Shade of the surroundings less that of a dark class, with its labels moved by whole raw voxels."""
        where = raw_slices(volume, crop, "all")
        ids = read(volume.label_path(crop, "all"), 1)[:]
        moved = tuple(slice(s.start + d, s.stop + d) for s, d in zip(where, shift, strict=True))
        picture = raw[moved]
        bright = (ids == 35) | (ids == 1)
        return picture[bright].mean() - picture[ids == dark].mean()

    for crop, dark in (("crop4", 2), ("crop4", 16), ("crop1", 3)):
        best = contrast(crop, dark)
        assert best > 45
        for axis in range(3):
            for step in (-2, 2):
                shift = [0, 0, 0]
                shift[axis] = step
                # The plasma membrane is a wall across x: moving along it costs less than moving off it.
                assert contrast(crop, dark, shift) < best - (4 if axis == 2 or dark != 2 else 0)
    assert contrast("crop4", 2, (0, 0, 2)) < contrast("crop4", 2, (0, 0, 1)) < contrast("crop4", 2)


def test_raw_is_not_saturated(volume):
    raw = read(volume.raw_path)[:]
    assert 120 < raw.mean() < 180
    assert np.mean((raw == 0) | (raw == 255)) < 1e-3


# -- writing and reuse


def stamps(path):
    return {p: p.stat().st_mtime_ns for p in Path(path).parent.rglob("*")}


def test_complete_volume_is_reused(volume):
    before = stamps(volume.path)
    assert synthetic.demo_csv(volume.path) == volume.csv_path
    assert stamps(volume.path) == before


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_v2_and_v3(tmp_path, quick, zarr_format):
    written = synthetic.write_volume(tmp_path / "a.zarr", zarr_format=zarr_format)
    assert read(written.raw_path).metadata.zarr_format == zarr_format
    assert read(written.label_path("crop5", "mito")).metadata.zarr_format == zarr_format
    assert (read(written.raw_path).shards is not None) == (zarr_format == 3)
    low, _ = box(written.label_path("crop5", "mito"))
    np.testing.assert_allclose(low / RAW_SCALE + 0.5, [32, 20, 160], atol=1e-9)
    node = zarr.open_group(written.path, mode="r", zarr_format=zarr_format)
    assert "recon-1/labels/groundtruth/crop5/all" in node
    assert names(tmp_path) == ["a.csv", "a.zarr"]
    assert hash(written) == hash(synthetic.SyntheticVolume.at(tmp_path / "a.zarr"))


def test_damaged_volume_or_other_seed_is_rewritten(tmp_path, quick):
    path = tmp_path / "new" / "a.zarr"
    synthetic.demo_csv(path, seed=1)
    raw = path / synthetic.RAW
    assert read(raw)[0, 0, 0] == 1
    synthetic.demo_csv(path, seed=2)
    assert read(raw)[0, 0, 0] == 2
    synthetic.demo_csv(path, seed=2, zarr_format=3)
    assert (path / "zarr.json").is_file()

    synthetic.demo_csv(path, seed=2)
    (raw / "s0/0/0/0").unlink()
    synthetic.demo_csv(path, seed=2)
    assert read(raw)[0, 0, 0] == 2
    (raw / "s0/0/0/0").write_bytes(b"")
    synthetic.demo_csv(path, seed=2)
    assert read(raw)[0, 0, 0] == 2
    assert names(path.parent) == ["a.csv", "a.zarr"]

    Path(synthetic.demo_csv(path, seed=2)).unlink()
    before = (path / ".zattrs").stat().st_mtime_ns
    assert Path(synthetic.demo_csv(path, seed=2)).exists()
    assert (path / ".zattrs").stat().st_mtime_ns == before


def test_interrupted_write_leaves_nothing_at_the_path(tmp_path, quick, monkeypatch):
    path = tmp_path / "a.zarr"

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "write_crop", stop)
        with pytest.raises(KeyboardInterrupt):
            synthetic.demo_csv(path)
    assert names(tmp_path) == []

    # A killed process leaves its staged folder behind.
    killed, busy = tmp_path / ".a.zarr.1-00.partial", tmp_path / ".a.zarr.2-00.partial"
    for folder in (killed, busy):
        (folder / "recon-1").mkdir(parents=True)
    os.utime(killed, (0, 0))
    synthetic.demo_csv(path)
    assert not killed.exists()
    assert busy.exists()
    assert is_complete(path, {"seed": 0})


def test_concurrent_writers_leave_a_complete_volume(tmp_path, quick):
    path = tmp_path / "a.zarr"
    gate = threading.Barrier(4)
    errors = []

    def one():
        gate.wait()
        try:
            synthetic.demo_csv(path, seed=3)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert is_complete(path, {"seed": 3, "zarr_format": 2})
    assert names(tmp_path) == ["a.csv", "a.zarr"]


def test_other_files_are_never_replaced(tmp_path, quick):
    precious = tmp_path / "jrc_hela-2.zarr"
    zarr.create_group(str(precious), zarr_format=2)
    (tmp_path / "file.zarr").write_text("x")
    (tmp_path / "listing.csv").write_text("my own")
    for name in ("jrc_hela-2.zarr", "file.zarr", "listing.zarr"):
        with pytest.raises(CellMapFileExistsError):
            synthetic.demo_csv(tmp_path / name)
        with pytest.raises(CellMapFileExistsError):
            synthetic.write_volume(tmp_path / name, overwrite=True)
    assert (tmp_path / "listing.csv").read_text() == "my own"

    synthetic.write_volume(tmp_path / "b.zarr")
    with pytest.raises(CellMapFileExistsError, match="overwrite"):
        synthetic.write_volume(tmp_path / "b.zarr")
    synthetic.write_volume(tmp_path / "b.zarr", seed=5, overwrite=True)
    assert read(tmp_path / "b.zarr" / synthetic.RAW)[0, 0, 0] == 5


@pytest.mark.parametrize("wrong", [{"path": "a"}, {"path": "a.zarr", "seed": -1}, {"path": "a.zarr", "zarr_format": 4}])
def test_invalid_arguments_are_refused(tmp_path, wrong):
    path = tmp_path / wrong.pop("path")
    for function in (synthetic.demo_csv, synthetic.write_volume):
        with pytest.raises(CellMapValueError):
            function(path, **wrong)
    assert names(tmp_path) == []
