"""The synthetic volume: stored as the field's data are, deterministic, and with labels exactly on the structures."""

import csv
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr

from cellmap_lightning.demo import synthetic
from cellmap_lightning.errors import CellMapFileExistsError, CellMapValueError
from cellmap_lightning.io.writer import downsample_mode

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
    """Physical corners of an array in nm."""
    scale, translation = geometry(path, level)
    return translation - scale / 2, translation + (np.array(read(path, level).shape) - 0.5) * scale


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    return synthetic.write_volume(tmp_path_factory.mktemp("synthetic") / "demo.zarr")


@pytest.fixture(scope="module")
def scene():
    return synthetic._Scene(0)


@pytest.fixture
def quick(monkeypatch, scene):
    """The same files in a tenth of the time: one small crop, and no picture."""
    monkeypatch.setattr(synthetic, "_CROPS", synthetic._CROPS[4:])
    monkeypatch.setattr(synthetic, "_Scene", lambda seed: scene)
    monkeypatch.setattr(synthetic, "_paint_raw", lambda scene, seed: np.full((8, 8, 8), seed, np.uint8))


def raw_slices(volume, crop, name):
    """The raw voxels of a label's box, as slices of raw s0."""
    low, high = box(volume.label_path(crop, name))
    first, last = low / RAW_SCALE + 0.5, high / RAW_SCALE + 0.5
    np.testing.assert_allclose(first, np.rint(first), atol=1e-9)
    np.testing.assert_allclose(last, np.rint(last), atol=1e-9)
    return tuple(slice(round(a), round(b)) for a, b in zip(first.tolist(), last.tolist(), strict=True))


# ------------------------------------------------------------------------------------------------------------ layout


def test_rows_of_the_csv_lead_to_the_arrays(volume):
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


def test_raw(volume):
    raw = read(volume.raw_path)
    assert raw.shape == (128, 320, 320)
    assert raw.dtype == np.uint8
    assert raw.chunks == (64, 128, 128)
    for level in range(3):
        scale, translation = geometry(volume.raw_path, level)
        np.testing.assert_allclose(scale, RAW_SCALE * 2**level)
        np.testing.assert_allclose(translation, RAW_SCALE * (2**level - 1) / 2)
        np.testing.assert_allclose(box(volume.raw_path, level), box(volume.raw_path), atol=1e-9)


def test_crops_lie_on_raw_corners_and_do_not_overlap(volume):
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


def test_a_crop_says_which_classes_it_has(volume):
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


def test_class_attributes_and_counted_values(volume):
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


def test_the_traps_of_real_data_are_there(volume):
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


def test_all_and_the_classes_agree(volume):
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
def test_every_seed_has_the_classes_to_train_on(seed, scene):
    """At 10.48 x 8 x 8 nm, in the training crops together and in each validation crop."""
    scene = scene if seed == 0 else synthetic._Scene(seed)
    found = {"train": dict.fromkeys(synthetic.TRAIN_CLASSES, 0)}
    for crop in synthetic._CROPS:
        material, owner = scene.paint(crop.offset, crop.shape)
        counts = found.setdefault(
            "train" if crop.usage == "train" else crop.name, dict.fromkeys(synthetic.TRAIN_CLASSES, 0)
        )
        for name in set(synthetic.TRAIN_CLASSES) & set(crop.classes):
            label = synthetic._label(name, crop, material, owner)
            counts[name] += int((downsample_mode(downsample_mode(label)) != 0).sum())
        if "ves" in crop.classes:
            ids = np.unique(synthetic._label("ves", crop, material, owner))
            assert {0, 255, 256} <= set(ids.tolist())
        if crop.name == "crop1":
            assert not np.isin(material, synthetic._MEMBERS["nuc"]).any()
        if crop.name == "crop5":
            assert np.isin(material, synthetic._MEMBERS["mito"]).mean() > 0.1
    assert len(found) == 2
    for counts in found.values():
        assert min(counts.values()) > 500, counts


# ----------------------------------------------------------------------------------------------------------- picture


def test_a_box_is_painted_as_the_whole_is(scene):
    whole, owners = scene.paint((64, 280, 200), (24, 120, 300))
    part, owner = scene.paint((69, 301, 333), (11, 64, 101))
    inside = np.s_[5:16, 21:85, 133:234]
    np.testing.assert_array_equal(part, whole[inside])
    np.testing.assert_array_equal(owner, owners[inside])


def test_the_same_seed_gives_the_same_bytes(volume, scene, monkeypatch):
    again = synthetic._Scene(0)
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "RAW_SHAPE", (24, 64, 80))
        patch.setattr(synthetic, "_SHAPE", (48, 128, 160))
        raw = synthetic._paint_raw(scene, 0)
        np.testing.assert_array_equal(synthetic._paint_raw(again, 0), raw)
        assert (synthetic._paint_raw(scene, 1) != raw).any()
    crop, scene = synthetic._CROPS[4], again
    material, owner = scene.paint(crop.offset, crop.shape)
    np.testing.assert_array_equal(
        synthetic._label("mito", crop, material, owner), read(volume.label_path("crop5", "mito"))[:]
    )
    other = synthetic._Scene(1).paint((0, 0, 0), (1, *synthetic._SHAPE[1:]))[0]
    assert (other != scene.paint((0, 0, 0), (1, *synthetic._SHAPE[1:]))[0]).any()


def test_labels_sit_on_the_structures(volume):
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


def test_the_picture_is_not_saturated(volume):
    raw = read(volume.raw_path)[:]
    assert 120 < raw.mean() < 180
    assert np.mean((raw == 0) | (raw == 255)) < 1e-3


# ------------------------------------------------------------------------------------------------- writing and reuse


def stamps(path):
    return {p: p.stat().st_mtime_ns for p in Path(path).parent.rglob("*")}


def test_a_complete_volume_is_reused(volume):
    before = stamps(volume.path)
    assert synthetic.demo_csv(volume.path) == volume.csv_path
    assert stamps(volume.path) == before


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_both_formats(tmp_path, quick, zarr_format):
    made = synthetic.write_volume(tmp_path / "a.zarr", zarr_format=zarr_format)
    assert read(made.raw_path).metadata.zarr_format == zarr_format
    assert read(made.label_path("crop5", "mito")).metadata.zarr_format == zarr_format
    assert (read(made.raw_path).shards is not None) == (zarr_format == 3)
    low, _ = box(made.label_path("crop5", "mito"))
    np.testing.assert_allclose(low / RAW_SCALE + 0.5, [32, 20, 160], atol=1e-9)
    node = zarr.open_group(made.path, mode="r", zarr_format=zarr_format)
    assert "recon-1/labels/groundtruth/crop5/all" in node
    assert names(tmp_path) == ["a.csv", "a.zarr"]
    assert hash(made) == hash(synthetic._describe(tmp_path / "a.zarr"))


def test_what_is_damaged_or_of_another_seed_is_written_again(tmp_path, quick):
    path = tmp_path / "new" / "a.zarr"
    synthetic.demo_csv(path, seed=1)
    raw = path / synthetic._RAW
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


def test_an_interrupted_write_leaves_nothing_at_the_path(tmp_path, quick, monkeypatch):
    path = tmp_path / "a.zarr"

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "_write_crop", stop)
        with pytest.raises(KeyboardInterrupt):
            synthetic.demo_csv(path)
    assert names(tmp_path) == []

    # A process that was killed could not even tidy up.
    killed, busy = tmp_path / ".a.zarr.1-00.partial", tmp_path / ".a.zarr.2-00.partial"
    for folder in (killed, busy):
        (folder / "recon-1").mkdir(parents=True)
    os.utime(killed, (0, 0))
    synthetic.demo_csv(path)
    assert not killed.exists()
    assert busy.exists()
    assert synthetic._is_complete(path, {"seed": 0})


def test_a_race_ends_with_a_good_volume(tmp_path, quick):
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
    assert synthetic._is_complete(path, {"seed": 3, "zarr_format": 2})
    assert names(tmp_path) == ["a.csv", "a.zarr"]


def test_foreign_things_are_never_replaced(tmp_path, quick):
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
    assert read(tmp_path / "b.zarr" / synthetic._RAW)[0, 0, 0] == 5


@pytest.mark.parametrize("wrong", [{"path": "a"}, {"path": "a.zarr", "seed": -1}, {"path": "a.zarr", "zarr_format": 4}])
def test_impossible_arguments(tmp_path, wrong):
    path = tmp_path / wrong.pop("path")
    for function in (synthetic.demo_csv, synthetic.write_volume):
        with pytest.raises(CellMapValueError):
            function(path, **wrong)
    assert names(tmp_path) == []
