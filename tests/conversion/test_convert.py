"""Conversion to OME-NGFF: voxels, pyramids, label maps, resuming and refusals."""

import pickle
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import tifffile
import zarr
from ome_zarr_models.v04.image import Image

from cellmap_lightning.conversion import convert as module
from cellmap_lightning.conversion.convert import block_of, convert
from cellmap_lightning.conversion.journal import NAME
from cellmap_lightning.conversion.options import ConversionOptions
from cellmap_lightning.errors import CellMapError, CellMapFileExistsError, MetadataError, OutputError
from cellmap_lightning.io.formats.tiff_pages import TiffPages
from cellmap_lightning.io.label_ids import parse_label_map
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
def test_another_conversion_replaces_an_unfinished_one(tmp_path, monkeypatch, caplog, change):
    path = writers.npy(tmp_path, VOXELS)
    np.save(tmp_path / "other.npy", VOXELS[::-1])
    with monkeypatch.context() as patch:
        patch.setattr(module._Image, "_verify", stop)
        with pytest.raises(StoppedError):
            convert(options(path))
    if "input" in change:
        change = {"input": str(tmp_path / "other.npy")}
    assert (tmp_path / "out.zarr" / NAME).is_file()
    out = convert(options(path, **change))
    (line,) = [r.getMessage() for r in caplog.records if "unfinished" in r.getMessage()]
    assert line.startswith(f"{out}: replaces an unfinished conversion, whose settings differ (")
    assert next(iter(change)) in line
    expected = VOXELS[::-1] if "input" in change else VOXELS
    np.testing.assert_array_equal(stored(out / "s0"), expected)
    image = read_multiscale(out)
    assert image.finest.scale == tuple(change.get("voxel_size", (40, 8, 8)))
    assert image.finest.array.chunks == (change.get("chunks", 16),) * 3
    assert not (out / NAME).exists()


@pytest.mark.parametrize("kind", ["folder", "finished", "file"])
def test_nothing_is_overwritten(tmp_path, kind):
    path = writers.npy(tmp_path, VOXELS)
    out = tmp_path / "out.zarr"
    if kind == "finished":
        convert(options(path))
    elif kind == "folder":
        (out / "mine").mkdir(parents=True)
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
        {"scheduler": "slurm"}, {"address": "tcp://host:1"}, {"scheduler": "processes", "address": "tcp://host:1"},
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
    assert VOXELS.shape == (40, 96, 128)
    place = "[40, 96, 128] voxels of 40 x 8 x 8 nm (z, y, x) as uint8"
    box = "box z -20..1580 y -4..764 x -4..1020 nm"
    assert done.stdout.splitlines()[:2] == [f"out.zarr: {place}", f"out.zarr: {box}"]
    assert max(map(len, done.stdout.splitlines())) <= 100
    np.testing.assert_array_equal(stored(tmp_path / "out.zarr" / "s0"), VOXELS)


def test_errors_of_the_command(tmp_path):
    path = writers.npy(tmp_path, VOXELS)
    arguments = [f"input={path}", "output=."]
    done = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "set voxel_size=[z, y, x] in nm" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("size", [[0.04, 0.008, 0.008], [8, 8, 8e6], [2e6, 2e6, 2e6], [40, 8, 8]])
def test_an_implausible_voxel_size_is_corrected_by_a_second_conversion(tmp_path, caplog, size):
    """The command that corrects it finds a complete output, and so needs ``overwrite``."""
    path = writers.npy(tmp_path, VOXELS[:8, :8, :8])
    convert(options(path, voxel_size=size))
    assert ("overwrite=True where the output exists already" in caplog.text) == (size != [40, 8, 8])
    convert(options(path, voxel_size=[40, 8, 8], overwrite=True))
    assert read_multiscale(tmp_path / "out.zarr").finest.scale == (40, 8, 8)


@pytest.mark.parametrize(
    ("given", "ids", "end"),
    [
        ({255: "mito"}, [0, 1], "the id 255 of mito does not occur in it, so 'classes={1: mito}' is probably right"),
        ({1: "mito"}, [0, 255], "the id 1 of mito does not occur in it, so 'classes={255: mito}' is probably right"),
        ({255: "a", 9: "unknown"}, [0, 1, 9], "so 'classes={9: unknown, 1: a}' is probably right"),
        ({1: "mito"}, [0, 1, 2], "as in 'classes={1: mito, 2: NAME}'"),
        ({1: "a", 3: "b"}, [0, 1, 2], "as in 'classes={1: a, 3: b, 2: NAME}'"),
    ],
)
def test_the_id_of_a_mask_is_corrected(tmp_path, given, ids, end):
    path = writers.npy(tmp_path, np.resize(np.array(ids, np.uint8), (8, 8, 8)))
    with pytest.raises(MetadataError) as caught:
        convert(options(path, classes=given))
    assert str(caught.value).endswith(end)


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ({"mito": 1}, "; swap ids and classes: {1: mito}"),
        ({"mito": 1, "er": 2}, "; swap ids and classes: {1: mito, 2: er}"),
        ({"mito": 1, "er": 1}, "got the id 'mito'"),
        ({"mito": "er"}, "got the id 'mito'"),
    ],
)
def test_a_swapped_label_map_is_turned(given, end):
    with pytest.raises(CellMapError) as caught:
        parse_label_map(given)
    assert str(caught.value).endswith(end)


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("classes", [None, dict.fromkeys(range(1, 255), "mito")], ids=["image", "classes"])
def test_a_dask_cluster_writes_the_same_files(tmp_path, classes):
    pytest.importorskip("distributed")
    path = writers.tiff(tmp_path, VOXELS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # distributed warns about ports and versions
        for name, more in (("threads", {}), ("dask", {"scheduler": "dask", "workers": 2})):
            convert(options(path, output=str(tmp_path / name / "vol.zarr"), classes=classes, **more))
    assert files(tmp_path / "dask") == files(tmp_path / "threads")


@pytest.mark.parametrize("write", [writers.tiff, writers.hdf5, writers.n5, writers.npy])
def test_a_block_is_written_by_another_process(tmp_path, write):
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in", VOXELS)
    given = options(path, output=str(tmp_path / "out.zarr"))
    level = module.read_image(given.input, given.overrides).finest
    image = module._Image(tmp_path / "out.zarr", level, given, None)
    image.levels.create("", 0, None)
    image.levels.create("", 1, None)
    image.levels.create("", 2, None)
    copy = pickle.loads(pickle.dumps(partial(module._write, image, [(0, n) for n in range(len(image.grid))])))
    for number in range(len(image.grid)):
        assert copy(number) == []
    np.testing.assert_array_equal(stored(tmp_path / "out.zarr" / "s0"), VOXELS)


@pytest.mark.parametrize(
    ("shape", "stored_chunk", "block"),
    [
        ((1000, 2048, 2048), (1, 2048, 2048), (64, 1024, 2048)),
        ((1000, 1000, 1000), (1, 1000, 1000), (128, 1024, 1024)),
        ((1000, 1000, 1000), (1, 8, 1000), (128, 128, 1024)),
        ((1000, 1000, 1000), (64, 64, 64), (128, 128, 128)),
        ((1000, 30000, 30000), (1, 30000, 30000), (64, 960, 1920)),
        ((1000, 1000, 1000), (200, 64, 64), (256, 128, 128)),
        ((40, 50, 1000), (1, 50, 1000), (40, 50, 1024)),
    ],
)
def test_blocks_hold_whole_pages(shape, stored_chunk, block):
    chunks = tuple(min(64, n) for n in shape)
    found = block_of(shape, chunks, stored_chunk, 1)
    assert found == block
    assert all(n % c == 0 for n, c in zip(found, chunks, strict=True))
    assert np.prod(found) <= 1 << 27


def test_each_page_is_decoded_once(tmp_path, monkeypatch):
    """A page is one compressed piece: blocks that cut pages would decode each page several times."""
    voxels = np.random.default_rng(0).integers(0, 255, (24, 200, 200)).astype(np.uint8)
    path = tmp_path / "pages.tif"
    tifffile.imwrite(path, voxels, compression="deflate", rowsperstrip=200, photometric="minisblack")
    decoded, read = [], TiffPages.read_into

    def counted(pages, level, number, start, out):
        decoded.append(number)
        read(pages, level, number, start, out)

    monkeypatch.setattr(TiffPages, "read_into", counted)
    monkeypatch.setattr(module._Image, "_verify", lambda image, array: None)
    out = convert(options(path))
    assert decoded[0] == 0  # whose values tell raw from labels
    assert sorted(decoded[1:]) == list(range(24))
    np.testing.assert_array_equal(stored(out / "s0"), voxels)
