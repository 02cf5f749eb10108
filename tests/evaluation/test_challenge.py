"""Manifests and submissions of the challenge, on voxels that are not aligned with those of the prediction."""

import json
import os
import re
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from omegaconf import OmegaConf

from cellmap_lightning.commands.resolvers import register_resolvers
from cellmap_lightning.commands.submit import submit
from cellmap_lightning.compat.patch_writer import CellMapDatasetWriter
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.evaluation.challenge import class_names, listed_crops
from cellmap_lightning.evaluation.numbering import check_min_volume, components
from cellmap_lightning.io.ngff import read_encoding, read_multiscale
from cellmap_lightning.io.writer import write_multiscale
from cellmap_lightning.splits.manifests import read_manifest
from cellmap_lightning.transforms.implied import DEFAULT_TABLE
from tests.commands.test_cli import run_forked
from tests.commands.test_predict_command import checkpoint  # noqa: F401

HEADER = "crop_name,dataset,class_label,voxel_size,translation,shape"


def row(crop, name, step, origin, shape, dataset="jrc_a"):
    lists = ("[" + ";".join(map(str, values)) + "]" for values in (step, origin, shape))
    return ",".join([str(crop), dataset, name, *lists])


def manifest(folder, *rows):
    path = folder / "test_crop_manifest.csv"
    path.write_text("\n".join([HEADER, *rows]))
    return path


@pytest.fixture
def layout(volume, tmp_path):
    """The folders of the challenge with downloaded data."""
    folder = tmp_path / "data"
    (folder / "jrc_a").mkdir(parents=True)
    (folder / "jrc_a" / "jrc_a.zarr").symlink_to(volume.path)
    return folder


def wave(lattice_origin, step, shape):
    """A linear function of the position, nm: 0 at 0, 1 at 200."""
    z, y, x = (o + s * np.arange(n) for o, s, n in zip(lattice_origin, step, shape, strict=True))
    return (z[:, None, None] + 2 * y[:, None] + x) / 800


def predicted(folder, name, values, origin, step, **more):
    path = folder / "predictions" / "jrc_a.zarr" / "crop7" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_multiscale(path, values, scale=step, translation=origin, **more)


def read(path):
    return zarr.open_array(str(path), mode="r", zarr_format=2)


def test_submission_is_resampled_at_voxel_centres_of_the_manifest(tmp_path):
    step, origin, shape = (4.0, 3.0, 2.0), (24.5, 20.25, 21.0), (40, 50, 60)
    coarse = (8.0, 8.0, 8.0)
    field = wave((0, 0, 0), coarse, (32, 32, 32))
    predicted(tmp_path, "er", field.astype(np.float32), (0, 0, 0), coarse)
    predicted(tmp_path, "pm", np.rint(np.clip(field, 0, 1) * 255).astype(np.uint8), (0, 0, 0), coarse)
    listed = manifest(tmp_path, *(row(7, name, step, origin, shape) for name in ("er", "pm")))
    path, missing = submit(
        tmp_path / "predictions", listed, tmp_path / "submission.zarr", threshold=0.35, values={"pm": "scaled"}
    )
    assert path == tmp_path / "submission.zip"
    assert missing == []
    exact = wave(origin, step, shape)
    for name, blur in (("er", 1e-6), ("pm", 1 / 255)):
        array = read(tmp_path / "submission.zarr" / "crop7" / name)
        assert array.dtype == np.uint8
        about = {"cellmap": {"prediction": {"class_name": name, "values": "mask"}}}
        lattice = {"voxel_size": list(step), "translation": list(origin), "shape": list(shape)}
        assert dict(array.attrs) == lattice | about
        sure = np.abs(exact - 0.35) > blur
        np.testing.assert_array_equal(array[...][sure], (exact >= 0.35)[sure])
        assert 0 < array[...].mean() < 1
    with zipfile.ZipFile(path) as archive:
        assert {".zgroup", "crop7/.zgroup", "crop7/er/.zarray", "crop7/er/.zattrs"} <= set(archive.namelist())


def two_of(present):
    return present.astype(np.int64) * 300


def test_object_numbers_use_the_smallest_dtype(tmp_path):
    values = np.zeros((32, 32, 64), np.uint8)
    values[::4, ::4, ::8] = 255  # 512 objects
    predicted(tmp_path, "mito", values, (4, 4, 4), (8, 8, 8))
    predicted(tmp_path, "ves", values[:, :, :16], (4, 4, 4), (8, 8, 8))
    rows = [row(7, "mito", (8, 8, 8), (4, 4, 4), values.shape), row(7, "ves", (8, 8, 8), (4, 4, 4), (32, 32, 16))]
    out = tmp_path / "submission.zarr"
    submit(tmp_path / "predictions", manifest(tmp_path, *rows), out)
    mito, ves = read(out / "crop7" / "mito"), read(out / "crop7" / "ves")
    assert (mito.dtype, ves.dtype) == (np.uint16, np.uint8)
    assert len(np.unique(mito[...])) == 513
    np.testing.assert_array_equal(mito[...] != 0, values != 0)
    with pytest.raises(CellMapError, match="exists already"):
        submit(tmp_path / "predictions", tmp_path / "test_crop_manifest.csv", out)
    submit(
        tmp_path / "predictions", tmp_path / "test_crop_manifest.csv", out, instances=f"{__name__}.two_of",
        overwrite=True,
    )  # fmt: skip
    assert np.unique(read(out / "crop7" / "ves")[...]).tolist() == [0, 300]


def diagonal(touching):
    """Two cubes of 2³ voxels that share a face, an edge, a corner or nothing."""
    values = np.zeros((8, 8, 8), bool)
    values[2:4, 2:4, 2:4] = True
    start = {"face": (4, 2, 2), "edge": (4, 4, 2), "corner": (4, 4, 4), "nothing": (5, 2, 2)}[touching]
    values[tuple(slice(a, a + 2) for a in start)] = True
    return values


@pytest.mark.parametrize(("touching", "objects"), [("face", 1), ("edge", 1), ("corner", 1), ("nothing", 2)])
def test_components_use_26_connectivity(touching, objects):
    numbers = components(diagonal(touching))
    np.testing.assert_array_equal(numbers > 0, diagonal(touching))
    assert numbers.max() == objects


@pytest.mark.parametrize(
    ("min_volume", "left"),
    [(0, {1, 8, 27}), (8 * 512, {8, 27}), (8 * 512 + 1, {27}), ({"mito": 4096}, {8, 27}), ({"ves": 1e9}, {1, 8, 27}),
     ({"*": 1e9, "mito": 4097}, {27}), (1e9, set())],
)  # fmt: skip
@pytest.mark.parametrize("ids", [False, True])
def test_small_objects_are_removed(tmp_path, min_volume, left, ids):
    values = np.zeros((16, 16, 16), np.uint16)
    for number, size in enumerate((1, 2, 3)):  # 512 nm³ a voxel
        values[5 * number : 5 * number + size, :size, :size] = 9 * (number + 1) if ids else 1
    predicted(tmp_path, "mito", values, (4, 4, 4), (8, 8, 8))
    predicted(tmp_path, "er", values, (4, 4, 4), (8, 8, 8))
    rows = [row(7, name, (8, 8, 8), (4, 4, 4), values.shape) for name in ("mito", "er")]
    submit(tmp_path / "predictions", manifest(tmp_path, *rows), tmp_path / "submission.zarr", min_volume=min_volume)
    ids_and_counts = np.unique(read(tmp_path / "submission.zarr" / "crop7" / "mito")[...], return_counts=True)
    assert {int(n) for value, n in zip(*ids_and_counts, strict=True) if value} == left
    if ids:
        assert set(ids_and_counts[0].tolist()) <= {0, 9, 18, 27}
    # Of a class without objects nothing is left out.
    np.testing.assert_array_equal(read(tmp_path / "submission.zarr" / "crop7" / "er")[...], values > 0)


@pytest.mark.parametrize("value", [-1, float("inf"), "large", {"mito": None}, True])
def test_invalid_min_volume(value):
    with pytest.raises(CellMapError, match="min_volume must be at least 0 nm³"):
        check_min_volume(value)


# Bounds of a crop in the words of cellmap-data, the corner being the translation of its first voxel.
@pytest.mark.parametrize("origin", [(0.0, 0.0, 0.0), (3.0, 5.0, 7.0), (4.0, 4.0, 4.0), (100.5, 99.0, 33.25)])
@pytest.mark.parametrize(("step", "shape"), [((2.0, 2.0, 2.0), (30, 31, 33)), ((2.62, 2.0, 2.0), (29, 37, 32))])
def test_bounds_that_are_not_multiples_of_the_voxel_size(tmp_path, volume, origin, step, shape):
    origin = tuple(np.add(origin, 200).tolist())
    bounds = {a: [o, o + n * s] for a, o, n, s in zip("zyx", origin, shape, step, strict=True)}
    spec = {"shape": (8, 8, 8), "scale": (8, 8, 8)}
    path = tmp_path / "predictions" / "jrc_a.zarr" / "crop7"
    with CellMapDatasetWriter(volume.raw_path, str(path), ["er"], spec, {"output": spec}, {"output": bounds}) as writer:
        for batch in writer.loader(batch_size=64):
            writer[batch["idx"]] = {"output": torch.ones(len(batch["idx"]), 1, 8, 8, 8)}
    submit(tmp_path / "predictions", manifest(tmp_path, row(7, "er", step, origin, shape)), tmp_path / "s.zarr")
    assert read(tmp_path / "s.zarr" / "crop7" / "er")[...].all()


def test_stored_ids_are_resampled_to_the_nearest_voxel(volume, tmp_path):
    """An annotation, submitted as a prediction."""
    names = ("er", "ves")
    rows = []
    for name in names:
        image = read_multiscale(volume.label_path("crop4", name))
        lattice = image.finest.lattice
        rows.append(row(4, name, lattice.step, lattice.origin, lattice.shape))
    folder = tmp_path / "predictions" / "jrc_a.zarr"
    folder.mkdir(parents=True)
    (folder / "crop4").symlink_to(Path(volume.label_path("crop4", "er")).parent)
    submit(tmp_path / "predictions", manifest(tmp_path, *rows), tmp_path / "submission.zarr")
    for name in names:
        image = read_multiscale(volume.label_path("crop4", name))
        stored = zarr.open_array(str(image.finest.path), mode="r")[...]
        there = read_encoding(image, image.finest).present(stored)
        labels = read(tmp_path / "submission.zarr" / "crop4" / name)[...]
        np.testing.assert_array_equal(labels, np.where(there, stored, 0) if name == "ves" else there)


def test_missing_predictions_are_listed(tmp_path):
    predicted(tmp_path, "er", np.zeros((8, 8, 8), np.uint8), (0, 0, 0), (8, 8, 8))
    rows = [row(7, "er", (8, 8, 8), (0, 0, 0), (8, 8, 8)), row(8, "pm", (8, 8, 8), (0, 0, 0), (8, 8, 8))]
    paths = tmp_path / "predictions", manifest(tmp_path, *rows), tmp_path / "submission.zarr"
    with pytest.raises(CellMapError, match=r"1 of 2 .* not in .*: jrc_a/crop8/pm; .*allow_missing=true"):
        submit(*paths)
    assert submit(*paths, allow_missing=True)[1] == ["jrc_a/crop8/pm"]
    manifest(tmp_path, row(7, "er", (8, 8, 8), (8, 0, 0), (8, 8, 8)))
    with pytest.raises(CellMapError, match=r"jrc_a/crop7/er: the prediction .* does not contain"):
        submit(*paths, overwrite=True)


def test_unreadable_manifests(tmp_path):
    good = row(7, "er", (8, 8, 8), (0, 0, 0), (8, 8, 8))
    for rows, match in (
        ([good, row(7, "er", (8, 8, 8), (1, 0, 0), (8, 8, 8))], "line 3 .* is listed before, with other voxels"),
        ([row(7, "er", (8, 0, 8), (0, 0, 0), (8, 8, 8))], "must be positive"),
        ([row(7, "er", (8, 8, 8), (0, 0, 0), (8, 8.5, 8))], "a shape whole"),
    ):
        with pytest.raises(CellMapError, match=match):
            listed_crops(manifest(tmp_path, *rows))
    with pytest.raises(CellMapError, match=r"^crops: '8' matches nothing"):
        listed_crops(manifest(tmp_path, good), [8])
    assert [str(crop.name) for crop in listed_crops(manifest(tmp_path, good), 7)] == ["jrc_a/crop7"]


def test_manifest_with_crop_numbers(layout, tmp_path):
    path = tmp_path / "manifest.csv"
    path.write_text("crop_number,collection,alignment,crop_url,em_url\n3,jrc_a,recon-1,s3://a,s3://b\n")
    (crop,) = read_manifest(path, layout)
    assert Path(crop.folder).name == "crop3"
    assert {"ecs", "mito"} <= set(crop.classes)


def test_class_names(tmp_path):
    (tmp_path / "tested.csv").write_text("ecs\npm\n")
    assert class_names(tmp_path / "tested.csv") == ["ecs", "pm"]
    assert class_names(DEFAULT_TABLE, "mito") == ["mito_mem", "mito_lum", "mito_ribo"]
    register_resolvers()
    config = OmegaConf.create({"classes": f"${{classes:{tmp_path / 'tested.csv'}}}"})
    assert OmegaConf.to_container(config, resolve=True) == {"classes": ["ecs", "pm"]}
    OmegaConf.resolve(config)  # as cellmap-inspect and cellmap-preview do
    assert config.classes == ["ecs", "pm"]
    with pytest.raises(CellMapError, match="has no class 'mitochondria'"):
        class_names(DEFAULT_TABLE, "mitochondria")


def test_predict_and_submit_test_crops_from_the_command_line(checkpoint, layout, tmp_path):  # noqa: F811
    step, shape = (5.24, 4.0, 4.0), (20, 30, 40)
    listed = manifest(
        tmp_path, row(7, "mito", step, (201.3, 402.0, 402.0), shape), row(7, "er", step, (201.3, 402.0, 402.0), shape),
        row(8, "er", step, (301.3, 302.0, 602.0), shape), row(8, "np", step, (301.3, 302.0, 602.0), shape),
    )  # fmt: skip
    overrides = [f"ckpt={checkpoint}", "crops=test", f"manifest={listed}", f"search_path={layout}", "trainer=cpu"]
    there = tmp_path / "predictions" / "jrc_a.zarr"
    for finished in (0, 2):  # the second run finds both crops done
        code, errors = run_forked(*overrides, cwd=tmp_path, command="predict")
        assert code == 0, errors
        assert errors.count(": complete already: ") == finished  # once for each crop
        assert errors.count("context: ") == 1
        # The voxels of both crops before the first, and an estimate where something was computed.
        assert re.findall(r"2 crops, ([\d,]+) voxels in all|of (2 crops) done; about \d+ \w+ left", errors) == [
            (f"{sum(read(there / crop / 'er' / 's0').size for crop in ('crop7', 'crop8')):,}", ""),
            *([] if finished else [("", "2 crops")]),
        ]
    assert sorted(p.parent.name + "/" + p.name for p in there.glob("*/[!.]*") if p.is_dir()) == [
        "crop7/OME", "crop7/er", "crop7/mito", "crop8/OME", "crop8/er",
    ]  # fmt: skip
    code, errors = run_forked(f"manifest={listed}", cwd=tmp_path, command="submit")
    assert code == 1
    assert "jrc_a/crop8/np" in errors
    code, errors = run_forked(f"manifest={listed}", "allow_missing=true", cwd=tmp_path, command="submit")
    assert code == 0, errors
    assert read(tmp_path / "submission.zarr" / "crop8" / "er").shape == shape
    code, errors = run_forked(*overrides, "region=crop2", cwd=tmp_path, command="predict")
    assert code == 1
    assert "leave out region" in errors


SCORE = """
import json, sys
from cellmap_segmentation_challenge.utils.eval_utils.submission import score_submission
scores = score_submission(sys.argv[1], truth_path=sys.argv[2])
print("SCORES " + json.dumps({k: scores[k] for k in ("overall_instance_score", "overall_semantic_score")}))
"""


@pytest.mark.slow
def test_official_scorer_gives_1_for_perfect_labels(volume, tmp_path):
    """Set CSC_PYTHON to the Python of an environment that has the challenge's toolbox; it needs zarr < 3."""
    python = os.environ.get("CSC_PYTHON")
    if not python:
        pytest.skip("CSC_PYTHON does not name a Python that has the challenge's toolbox")
    test_stored_ids_are_resampled_to_the_nearest_voxel(volume, tmp_path)
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        archive.extractall(tmp_path / "truth.zarr")
    done = subprocess.run(
        [python, "-c", SCORE, str(tmp_path / "submission.zip"), str(tmp_path / "truth.zarr")],
        capture_output=True, text=True, timeout=600, check=False,
        env={
            **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            "CSC_TEST_CROP_MANIFEST_URL": f"file://{tmp_path / 'test_crop_manifest.csv'}",
            "MAX_SEMANTIC_THREADS": "1", "MAX_INSTANCE_THREADS": "1", "PER_INSTANCE_THREADS": "1",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("SCORES "))
    assert json.loads(line.removeprefix("SCORES ")) == {"overall_instance_score": 1.0, "overall_semantic_score": 1.0}
