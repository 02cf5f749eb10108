"""Objects numbered from an annotation keep its unknown voxels unknown."""

from dataclasses import replace

import cc3d
import numpy as np
import pytest
import zarr

from cellmap_lightning.commands.segment import segment
from cellmap_lightning.conversion.convert import convert
from cellmap_lightning.conversion.options import ConversionOptions
from cellmap_lightning.errors import CellMapValueError, OutputError
from cellmap_lightning.evaluation.evaluate import evaluate
from cellmap_lightning.evaluation.pairs import Annotation
from cellmap_lightning.instances.options import SourceOptions
from cellmap_lightning.io.ngff import read_encoding, read_multiscale
from cellmap_lightning.io.writer import write_multiscale
from tests.instances.volumes import same_partition, touching_spheres, write_prediction

SHAPE = (32, 40, 48)
STORAGE = {"chunks": (16, 16, 16), "block": (16, 32, 32), "levels": 2}
TOP = {"uint8": 255, "uint16": 65_535, "auto": 2**32 - 1, "uint64": 2**63 - 1}


def annotated(unknown=255):
    """A mask of spheres with unknown voxels: a slab that cuts some of them, and a corner."""
    mask = (touching_spheres(SHAPE) > 0).astype(np.uint8)
    mask[:, 12:17, 5:] = mask[:9, :9, :9] = unknown
    return mask


def attributes(unknown):
    encoding = {"absent": 0, "present": 1, "unknown": unknown}
    return {
        "cellmap": {
            "annotation": {
                "class_name": "mito",
                "annotation_type": {"type": "semantic_segmentation", "encoding": encoding},
            }
        }
    }


def converted(folder, mask):
    """A mask of 255 with unknown voxels of 128, as a TIFF that is converted."""
    import tifffile

    tifffile.imwrite(folder / "mask.tif", np.where(mask == 255, 128, mask * 255).astype(np.uint8))
    classes = {128: "unknown", 255: "mito"}
    options = {"voxel_size": [8, 8, 8], "translation": [4, 4, 4], "classes": classes, "workers": 1}
    convert(ConversionOptions(input=str(folder / "mask.tif"), output=str(folder / "crop1"), **options))


def declared(folder, mask):
    """A mask whose group declares 7 as unknown."""
    mask = np.where(mask == 255, 7, mask)
    settings = {"scale": (8, 8, 8), "translation": (4, 4, 4), "attributes": attributes(7), "mode": "mode"}
    write_multiscale(folder / "crop1" / "mito", mask, **settings)


def in_array(folder, mask):
    """A mask whose array alone declares 255 as unknown, as CellMap's crops."""
    write_multiscale(folder / "crop1" / "mito", mask, scale=(8, 8, 8), translation=(4, 4, 4), mode="mode")
    zarr.open_array(str(folder / "crop1" / "mito" / "s0"), mode="r+").attrs.update(attributes(255))


def stored(labels):
    return zarr.open_array(str(labels / "s0"), mode="r")[...]


def numbered(folder, out="t.zarr", source=None, **options):
    storage = STORAGE | {key: options.pop(key) for key in ("ids",) if key in options}
    options = {"method": "components", **options}
    return segment(
        str(folder / "crop1"), folder / out, "mito", source=source, storage=storage, picture=False, **options
    )


@pytest.mark.parametrize("write", [converted, declared, in_array])
@pytest.mark.parametrize("ids", list(TOP))
def test_unknown_voxels_stay_unknown(tmp_path, write, ids):
    mask = annotated()
    write(tmp_path, mask)
    summary = numbered(tmp_path, ids=ids)
    labels = stored(summary.labels)
    assert ((labels == TOP[ids]) == (mask == 255)).all()
    assert same_partition(np.where(mask == 1, labels, 0), cc3d.connected_components(mask == 1, connectivity=26))
    assert summary.objects == len(np.unique(labels[mask == 1]))
    image = read_multiscale(summary.labels)
    for level in image.levels:
        encoding = read_encoding(image, level)
        assert (encoding.absent, encoding.unknown, encoding.ambiguous) == (0, TOP[ids], False)
    truth = Annotation(tmp_path / "t.zarr", "mito", (8, 8, 8)).read(image.finest.lattice, (0, 0, 0), SHAPE)
    assert ((truth == -1) == (mask == 255)).all()
    assert ((truth > 0) == (mask == 1)).all()
    counts = image.finest.array.attributes["cellmap"]["annotation"]["complement_counts"]
    assert counts == {"absent": np.count_nonzero(mask == 0), "unknown": np.count_nonzero(mask == 255)}
    coarse = zarr.open_array(str(summary.labels / "s1"), mode="r")[...]
    assert 0.8 < np.mean(coarse == TOP[ids]) / np.mean(mask == 255) < 1.25
    assert coarse[coarse != TOP[ids]].max() <= summary.objects


@pytest.mark.parametrize("method", ["components", "watershed"])
def test_scores_are_those_without_the_unknown_voxels(tmp_path, method):
    """Dice and F1 against the numbered annotation are those of the known voxels, compared by numpy."""
    mask = annotated()
    converted(tmp_path, mask)
    numbered(tmp_path, method=method)
    predicted = touching_spheres(SHAPE) > 0
    predicted[:, :, 20:24] = False
    write_prediction(tmp_path / "p.zarr", predicted.astype(np.uint8), kind="mask")
    (score,) = evaluate(tmp_path / "p.zarr", tmp_path / "t.zarr", ["mito"], scores=("voxels", "instances"))
    known, present = mask != 255, mask == 1
    pairs = (predicted, present), (predicted, ~present), (~predicted, present)
    tp, fp, fn = (np.count_nonzero(known & a & b) for a, b in pairs)
    assert (score.voxels.tp, score.voxels.fp, score.voxels.fn) == (tp, fp, fn)
    assert score.voxels.dice == 2 * tp / (2 * tp + fp + fn)
    (of_mask,) = evaluate(tmp_path / "p.zarr", tmp_path / "crop1", ["mito"])
    assert replace(score.voxels, crop="") == replace(of_mask.voxels, crop="")
    truth = np.where(known, stored(tmp_path / "t.zarr" / "mito"), 0).astype(np.int64)
    objects = np.where(known, cc3d.connected_components(predicted, connectivity=26), 0).astype(np.int64)
    hits = 0
    for number in np.unique(truth[truth > 0]):
        others, counts = np.unique(objects[truth == number], return_counts=True)
        for other, count in zip(others, counts, strict=True):
            hits += other > 0 and 2 * count >= np.count_nonzero((truth == number) | (objects == other))
    every = len(np.unique(truth)) - 1 + len(np.unique(objects)) - 1
    assert score.instances.f1_50 == pytest.approx(2 * hits / every)


def test_background_beside_unknown_voxels_is_no_hole(tmp_path):
    mask = np.zeros(SHAPE, np.uint8)
    mask[4:28, 4:36, 4:44] = 1
    mask[8:14, 8:14, 8:14] = 0  # a hole
    mask[8:24, 20:30, 20:40] = 0  # across blocks, a part of it unknown
    mask[20:22, 22:25, 30:36] = 255
    declared(tmp_path, mask)
    labels = stored(numbered(tmp_path, fill_holes=True).labels)
    expected = np.where(mask == 255, np.uint32(TOP["auto"]), mask)
    expected[8:14, 8:14, 8:14] = 1
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("kind", ["mask", "scaled"])
def test_nothing_is_unknown_in_the_objects_of_a_prediction(tmp_path, kind):
    values = (touching_spheres(SHAPE) > 0).astype(np.uint8) * (255 if kind == "scaled" else 1)
    write_prediction(tmp_path / "crop1", values, kind=kind)
    image = read_multiscale(numbered(tmp_path).labels)
    assert read_encoding(image, image.finest).unknown is None
    assert "complement_counts" not in image.finest.array.attributes["cellmap"]["annotation"]


def test_an_annotation_without_unknown_voxels_gives_the_objects_of_a_mask(tmp_path):
    declared(tmp_path, (touching_spheres(SHAPE) > 0).astype(np.uint8))
    image = read_multiscale(numbered(tmp_path).labels)
    assert read_encoding(image, image.finest).unknown is None


def test_the_setting_values_keeps_what_is_unknown(tmp_path):
    mask = annotated()
    in_array(tmp_path, mask)
    labels = stored(numbered(tmp_path, source=SourceOptions(values="mask")).labels)
    assert ((labels == TOP["auto"]) == (mask == 255)).all()


def test_ids_that_leave_none_for_unknown_voxels_are_an_error(tmp_path):
    mask = np.zeros((16, 64, 64), np.uint8)
    mask[:8:2, ::8, ::8] = 1  # 4 x 8 x 8 single voxels
    mask[0, 0, 0] = 0  # 255 are as many as uint8 has ids
    mask[15] = 255
    declared(tmp_path, mask)
    with pytest.raises(CellMapValueError, match="255 objects and unknown voxels, and ids=uint8 ends at 255"):
        numbered(tmp_path, ids="uint8")


def test_a_killed_run_is_resumed_with_the_unknown_voxels(tmp_path, monkeypatch):
    mask = annotated()
    declared(tmp_path, mask)
    expected = stored(numbered(tmp_path, "whole.zarr").labels)
    from cellmap_lightning.instances.block_tasks import BlockTasks

    write, written = BlockTasks.write, []

    def interrupted(self, number, *arguments):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(number)
        return write(self, number, *arguments)

    monkeypatch.setattr(BlockTasks, "write", interrupted)
    with pytest.raises(OutputError, match="run the same command again to resume"):
        numbered(tmp_path)
    monkeypatch.setattr(BlockTasks, "write", write)
    summary = numbered(tmp_path)
    np.testing.assert_array_equal(stored(summary.labels), expected)
    assert summary.resumed == 3
    names = (".zattrs", "s0/.zattrs")
    for name in names:
        assert (summary.labels / name).read_bytes() == (tmp_path / "whole.zarr" / "mito" / name).read_bytes()


def test_the_picture_has_no_object_at_unknown_voxels(tmp_path):
    from PIL import Image

    mask = annotated()
    declared(tmp_path, mask)
    segment(str(tmp_path / "crop1"), tmp_path / "t.zarr", "mito", storage=STORAGE, method="components")
    with Image.open(tmp_path / "t.png") as picture:
        assert picture.size[0] > 100
    from cellmap_lightning.instances.picture import _section
    from cellmap_lightning.instances.source import open_source
    from cellmap_lightning.io.chunks import ChunkReader

    image = read_multiscale(tmp_path / "t.zarr" / "mito")
    _, ids = _section(
        open_source(str(tmp_path / "crop1"), "mito"), ChunkReader(image.finest, "mito"), 0, None,
        read_encoding(image, image.finest), (15, 15, 15),
    )  # fmt: skip
    assert ((ids > 0) == (mask[15] == 1)).all()
