"""Conversion to OME-NGFF: voxels, pyramids, label maps, resuming and refusals."""

import subprocess
import sys

import numpy as np
import pytest
import zarr
from ome_zarr_models.v04.image import Image

from cellmap_lightning.conversion import convert as module
from cellmap_lightning.conversion.convert import convert
from cellmap_lightning.conversion.journal import NAME
from cellmap_lightning.conversion.options import ConversionOptions
from cellmap_lightning.errors import CellMapError, CellMapFileExistsError, MetadataError, OutputError
from cellmap_lightning.io.ngff import read_encoding, read_multiscale
from tests.io.formats import writers

COMMAND = [sys.executable, "-c", "from cellmap_lightning.commands.convert_command import main; main()"]
VOXELS = np.random.default_rng(0).integers(1, 255, (40, 96, 128)).astype(np.uint8)


def options(path, **values):
    defaults = {"input": str(path), "output": str(path.parent / "out.zarr"), "voxel_size": [40, 8, 8], "chunks": 16}
    return ConversionOptions(**defaults | values)


def stored(path):
    return np.asarray(zarr.open_array(path, mode="r")[...])


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("write", [writers.tiff, writers.hdf5, writers.n5], ids=["tiff", "hdf5", "n5"])
def test_voxels_and_geometry(tmp_path, write, zarr_format):
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in", VOXELS)
    out = convert(options(path, output=str(tmp_path / "out.zarr"), translation=[5, 6, 7], zarr_format=zarr_format))
    image = read_multiscale(out)
    np.testing.assert_array_equal(stored(out / "s0"), VOXELS)
    assert (image.finest.scale, image.finest.translation) == ((40, 8, 8), (5, 6, 7))
    assert not image.notes
    assert not (out / NAME).exists()
    if zarr_format == 2:
        Image.from_zarr(zarr.open_group(out, mode="r"))


def test_a_pyramid_becomes_isotropic(tmp_path):
    out = convert(options(writers.npy(tmp_path, VOXELS)))
    image = read_multiscale(out)
    assert [level.scale for level in image.present][:3] == [(40, 8, 8), (40, 16, 16), (40, 32, 32)]
    assert image.present[1].translation == (0, 4, 4)
    half = VOXELS.reshape(40, 48, 2, 64, 2).mean((2, 4))
    assert np.abs(stored(out / "s1") - half).max() <= 0.5


@pytest.mark.parametrize("pyramid", ["mode", "none"])
def test_other_pyramids(tmp_path, pyramid):
    ids = np.repeat(np.repeat(np.random.default_rng(1).integers(0, 9, (8, 48, 64)), 2, 1), 2, 2).astype(np.uint8)
    out = convert(options(writers.npy(tmp_path, ids), pyramid=pyramid))
    if pyramid == "none":
        assert len(read_multiscale(out).levels) == 1
        return
    np.testing.assert_array_equal(stored(out / "s1"), ids[:, ::2, ::2])


@pytest.mark.parametrize("dtype", ["uint32", "int64"])
def test_ids_are_not_averaged(tmp_path, dtype):
    ids = np.random.default_rng(1).integers(0, 2, (8, 64, 64)).astype(dtype) * 1000
    out = convert(options(writers.npy(tmp_path, ids)))
    assert set(np.unique(stored(out / "s1"))) <= {0, 1000}


def test_a_label_map_becomes_masks(tmp_path):
    ids = np.random.default_rng(1).choice([0, 1, 2, 255], (16, 32, 32)).astype(np.uint8)
    out = convert(options(writers.npy(tmp_path, ids), classes={1: "mito", 2: "er", 255: "unknown"}))
    for name, value in (("mito", 1), ("er", 2)):
        image = read_multiscale(out / name)
        np.testing.assert_array_equal(stored(out / name / "s0"), np.where(ids == 255, 255, ids == value))
        encoding = read_encoding(image, image.finest)
        assert (encoding.absent, encoding.unknown) == (0, 255)
    with pytest.raises(MetadataError, match="holds the id 2, which its label map does not list"):
        convert(options(tmp_path / "volume.npy", output=str(tmp_path / "other"), classes={1: "mito", 255: "unknown"}))


class StoppedError(Exception):
    pass


def stop(image, array):
    raise StoppedError


def test_an_interrupted_conversion_is_resumed(tmp_path, monkeypatch):
    """Blocks that were written are not read again, and the result is that of one run."""
    path = writers.npy(tmp_path, VOXELS)
    reads, read = [], module._Image._read

    def counted(image, box):
        reads.append(box)
        if len(reads) == 7:
            raise StoppedError
        return read(image, box)

    monkeypatch.setattr(module._Image, "_read", counted)
    with pytest.raises(StoppedError):
        convert(options(path, workers=1))
    out = tmp_path / "out.zarr"
    assert (out / NAME).exists()
    with pytest.raises(CellMapError):
        _ = read_multiscale(out).finest
    first = {str(box) for box in reads[:6]}
    reads[:] = [None] * 10
    monkeypatch.setattr(module._Image, "_verify", lambda image, array: None)
    convert(options(path, workers=2))
    assert not first & {str(box) for box in reads[10:]}
    np.testing.assert_array_equal(stored(out / "s0"), VOXELS)


@pytest.mark.parametrize("change", [{"voxel_size": [1, 1, 1]}, {"chunks": 32}, {"input": "other"}])
def test_another_conversion_does_not_resume(tmp_path, monkeypatch, change):
    path = writers.npy(tmp_path, VOXELS)
    np.save(tmp_path / "other.npy", VOXELS)
    with monkeypatch.context() as patch:
        patch.setattr(module._Image, "_verify", stop)
        with pytest.raises(StoppedError):
            convert(options(path))
    if "input" in change:
        change = {"input": str(tmp_path / "other.npy")}
    with pytest.raises(CellMapFileExistsError, match="unfinished conversion"):
        convert(options(path, **change))


@pytest.mark.parametrize("kind", ["folder", "finished", "file"])
def test_nothing_is_overwritten(tmp_path, kind):
    path = writers.npy(tmp_path, VOXELS)
    out = tmp_path / "out.zarr"
    if kind == "finished":
        convert(options(path))
    elif kind == "folder":
        out.mkdir()
    else:
        out.write_text("mine")
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(CellMapFileExistsError, match="exists already"):
        convert(options(path))
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_damage_during_a_conversion_is_found(tmp_path, monkeypatch):
    path = writers.npy(tmp_path, VOXELS)
    verify = module._Image._verify

    def damaged(image, array):
        array[0, 0, 0] += 1
        verify(image, array)

    monkeypatch.setattr(module._Image, "_verify", damaged)
    with pytest.raises(OutputError, match="are not those of"):
        convert(options(path))


@pytest.mark.parametrize(
    "values",
    [
        {"pyramid": "max"}, {"zarr_format": 4}, {"chunks": 0}, {"chunks": "x"}, {"workers": 0}, {"classes": {}},
        {"classes": [1]}, {"voxel_size": [1]}, {"axes": "zz"}, {"output": "s3://bucket/v.zarr"}, {"unit": "s"},
    ],
)  # fmt: skip
def test_bad_options(tmp_path, values):
    with pytest.raises(CellMapError):
        options(tmp_path / "a.npy", **values)


def test_the_command(tmp_path):
    path = writers.npy(tmp_path, VOXELS)
    arguments = [f"input={path}", "output=out.zarr", "voxel_size=[40,8,8]", "pyramid=none"]
    done = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("out.zarr")
    np.testing.assert_array_equal(stored(tmp_path / "out.zarr" / "s0"), VOXELS)


def test_errors_of_the_command(tmp_path):
    path = writers.npy(tmp_path, VOXELS)
    arguments = [f"input={path}", "output=."]
    done = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "set voxel_size=[z, y, x] in nm" in done.stderr
    assert "Traceback" not in done.stderr
