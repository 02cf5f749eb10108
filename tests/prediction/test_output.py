"""The output of a prediction: its journal while it is unfinished, and what other programs find when it is done."""

import hashlib
import json
import os
import shutil
import sys
import threading
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import zarr
from ome_zarr_models.v04 import BioFormats2Raw as Container04
from ome_zarr_models.v04 import Image as Image04
from ome_zarr_models.v05 import BioFormats2Raw as Container05
from ome_zarr_models.v05 import Image as Image05

from cellmap_lightning.errors import CellMapFileExistsError, CellMapValueError, MetadataError
from cellmap_lightning.geometry.lattice import Lattice
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.store import children
from cellmap_lightning.prediction.blocks import BlockGrid
from cellmap_lightning.prediction.journal import Journal, journal_folder, record_checksum
from cellmap_lightning.prediction.output import PredictionOutput
from cellmap_lightning.prediction.quantize import StoredValues

SHAPE, BLOCK, STEP = (32, 70, 64), (16, 32, 32), (16.0, 8.0, 8.0)
#: Formats, types and classes, each with each of the others at least once.
KINDS = [
    ("v2", "uint8", ("mito", "er")),
    ("v2", "labels", ("mito",)),
    ("v2", "float16", ("mito", "er", "pm")),
    ("v3", "uint8", ("mito",)),
    ("v3", "float32", ("mito", "er")),
    ("sharded", "labels", ("mito", "er")),
    ("sharded", "float32", ("mito",)),
]
kinds = pytest.mark.parametrize(("kind", "dtype", "classes"), KINDS)


def settings(**changed):
    return {"model": "m", "shape": SHAPE, "classes": ["mito"], "levels": 2, "pyramid factors": [(1, 2, 2)]} | changed


def new(path, kind="v2", dtype="uint8", classes=("mito",), levels=2, step=STEP, rank=0):
    grid = BlockGrid(Lattice((8.0, 4.0, -3.5), step, SHAPE), (0, 0, 0), SHAPE, BLOCK)
    chunks, shards = ((8, 16, 16), BLOCK) if kind == "sharded" else (BLOCK, None)
    zarr_format = 2 if kind == "v2" else 3
    return PredictionOutput(path, classes, grid, StoredValues(dtype), chunks, shards, zarr_format, levels, rank)


def write(output, **kwargs):
    """Open it, write all its blocks, and return its voxels."""
    output.open(settings(classes=list(output.classes)), **kwargs)
    values = np.random.default_rng(0).random((len(output.classes), *SHAPE)).astype(np.float32)
    stored = np.empty(values.shape, output.values.dtype)
    output.values.store(values, stored, "it")
    for number in range(len(output.grid)):
        start, length = output.grid[number]
        block = stored[:, *(slice(a, a + n) for a, n in zip(start, length, strict=True))]
        output.write(number, block, output.values.reached(block, block.astype(np.float32)))
    return stored


def finish(output):
    return output.finish(0, 1, lambda: None)


def predict(path, *args, **kwargs):
    output = new(path, *args, **kwargs)
    stored = write(output)
    assert finish(output)
    return output, stored


def attributes(path):
    """The attributes of a group as they are on disk."""
    if (path / "zarr.json").exists():
        return json.loads((path / "zarr.json").read_text())["attributes"]
    return json.loads((path / ".zattrs").read_text())


def contents(path):
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in path.rglob("*") if p.is_file()
    }


# ------------------------------------------------------------------------------------------------------ the journal


@kinds
def test_a_finished_output_is_listed_without_a_warning(tmp_path, kind, dtype, classes):
    out = tmp_path / "out.zarr"
    output = new(out, kind, dtype, classes)
    write(output)
    assert (out / journal_folder("prediction") / "settings.json").exists()
    assert finish(output)
    assert not [
        p.name for p in out.iterdir() if p.name.startswith(".") and p.name not in (".zgroup", ".zattrs", ".zmetadata")
    ]
    group = zarr.open_group(str(out), mode="r")  # warnings are errors
    tree = str(group.tree())
    levels = {f"{name}/s{level}" for name in classes for level in range(2)}
    assert dict(group.members(max_depth=None)).keys() == {"OME", *classes, *levels}
    assert all(name in tree for name in (*classes, "s0", "s1"))
    for name in classes:
        assert dict(group[name].members()).keys() == {"s0", "s1"}
        np.testing.assert_array_equal(group[name]["s0"][...], output.array(name)[...])
        assert group[name].attrs.asdict() == attributes(out / name)
    assert group.attrs.asdict() == attributes(out)


@kinds
def test_root_group_records_the_prediction(tmp_path, kind, dtype, classes):
    output, stored = predict(tmp_path / "out.zarr", kind, dtype, classes)
    about = attributes(tmp_path / "out.zarr")["cellmap"]
    least = {"uint8": 128, "labels": 1}.get(dtype, 0.5)
    counts = {name: int((voxels >= least).sum()) for name, voxels in zip(classes, stored, strict=True)}
    record = {
        "settings": json.loads(json.dumps(settings(classes=list(classes)))),
        "blocks": len(output.grid),
        "reached": counts,
    }
    assert about["prediction"] == record | {"checksum": record_checksum(record)}
    assert ("annotation" in about) == (dtype == "labels")
    assert output.fractions() == {name: n / np.prod(SHAPE) for name, n in counts.items()}
    journal = Journal(tmp_path / "out.zarr")
    assert journal.complete
    assert journal.settings == about["prediction"]["settings"]
    assert sorted(journal.finished) == list(range(len(output.grid)))
    assert journal.unfinished == set()


def test_until_it_is_finished_the_journal_is_a_folder(tmp_path):
    out = tmp_path / "out.zarr"
    output = new(out)
    output.open(settings())
    output.write(0, np.full((1, *BLOCK), 200, np.uint8), [7])
    assert not finish(output)
    journal = Journal(out)
    assert (journal.record, journal.complete, journal.finished) == (None, False, {0: [7]})
    assert output.fractions() == {"mito": 7 / np.prod(BLOCK)}
    assert "bioformats2raw.layout" not in attributes(out)
    assert not (out / "OME").exists()
    with pytest.raises(MetadataError):
        read_multiscale(out / "mito")


@pytest.mark.parametrize("kind", ["v2", "v3", "sharded"])
def test_a_finished_output_is_recognised(tmp_path, kind):
    out = tmp_path / "out.zarr"
    first, _ = predict(out, kind)
    before = contents(out)
    again = new(out, kind)
    again.open(settings())
    assert sorted(again.journal.finished) == list(range(len(again.grid)))
    assert finish(again)
    assert again.fractions() == first.fractions()
    for changed, text in (
        ({"model": "n"}, "model: 'm' is there, now 'n'"),
        (
            {"levels": 1, "pyramid factors": []},
            r"levels: 2 is there, now 1\n  pyramid factors: \[\[1, 2, 2\]\] is there",
        ),
        ({"more": 3}, "more: None is there, now 3"),
    ):
        with pytest.raises(CellMapFileExistsError, match=text):
            new(out, kind).open(settings(**changed))
    assert contents(out) == before
    assert not (out / journal_folder("prediction")).exists()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("kind", ["v2", "v3", "sharded"])
def test_overwrite_replaces_only_the_prediction(tmp_path, kind, finished):
    out, other = tmp_path / "out.zarr", "v3" if kind == "v2" else "v2"
    if finished:
        predict(out, kind, "labels", ("mito", "er"))
    else:
        write(new(out, kind, "labels", ("mito", "er")))
    (out / "mine").mkdir()
    (out / "mine" / "thesis.txt").write_text("all of it")
    output = new(out, other)
    stored = write(output, overwrite=True)
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == [journal_folder("prediction"), "mine", "mito"]
    assert finish(output)
    np.testing.assert_array_equal(zarr.open_array(str(out / "mito" / "s0"), mode="r")[...], stored[0])
    names = {p.name for p in out.iterdir() if p.is_file()}
    assert names == ({".zgroup", ".zattrs", ".zmetadata"} if other == "v2" else {"zarr.json"})
    assert set(attributes(out)["cellmap"]) == {"prediction"}
    assert (out / "mine" / "thesis.txt").read_text() == "all of it"


def test_names_from_a_journal_are_no_paths(tmp_path):
    """The settings of an output may come from anywhere: nothing beside it is removed."""
    (tmp_path / "mine").mkdir()
    out = tmp_path / "out.zarr"
    output = new(out)
    output.open(settings(classes=["../mine", "mito", "", "."]))
    output.close()
    new(out).open(settings(), overwrite=True)
    assert (tmp_path / "mine").exists()
    assert (out / "mito").exists()


def test_a_group_of_another_kind_is_no_prediction(tmp_path):
    for number, about in enumerate(({}, {"cellmap": 3}, {"cellmap": {"prediction": {"class_name": "a"}}})):
        out = tmp_path / f"{number}.zarr"
        zarr.create_group(str(out), zarr_format=2 + number % 2, attributes=about)
        for overwrite in (False, True):
            with pytest.raises(CellMapFileExistsError, match="contains no prediction of this package"):
                new(out).open(settings(), overwrite)
        assert not (out / journal_folder("prediction")).exists()


def test_a_journal_of_an_earlier_version_is_refused_or_replaced(tmp_path):
    out = tmp_path / "out.zarr"
    output = new(out)
    output.open(settings())
    output.close()
    (out / journal_folder("prediction") / "settings.json").write_text(json.dumps(settings()))
    with pytest.raises(CellMapValueError, match=r"settings.json is damaged, or of an earlier version.*overwrite=True"):
        new(out).open(settings())
    new(out).open(settings(), overwrite=True)
    assert Journal(out).finished == {}


def killed_at(moment, output, run, appends=False):
    """Run something in a process that is killed before one of its changes of files of the output; its exit code."""
    child = os.fork()
    if child == 0:
        left = moment

        def hook(event, args):
            nonlocal left
            changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (
                event == "open"
                and (set(args[1]) & set("wxa+") if isinstance(args[1], str) else appends and args[2] & os.O_WRONLY)
            )
            if changes and str(output) in str(args[0]):
                left -= 1
                if left == 0:
                    os._exit(9)

        try:
            sys.addaudithook(hook)
            run()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("kind", "dtype", "classes"), [KINDS[0], *(pytest.param(*KINDS[n], marks=pytest.mark.slow) for n in (3, 5))]
)
def test_kill_during_finish_leaves_a_resumable_or_finished_output(tmp_path, kind, dtype, classes):
    whole, out = tmp_path / "whole" / "out.zarr", tmp_path / "out.zarr"
    predict(whole, kind, dtype, classes)
    before = tmp_path / "before" / "out.zarr"
    write(new(before, kind, dtype, classes))
    given = settings(classes=list(classes))

    def go_on():
        output = new(out, kind, dtype, classes)
        output.open(given)
        assert len(output.journal.finished) == len(output.grid)
        assert finish(output)

    moment, ends = 1, set()
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)
        code = killed_at(moment, out, go_on)
        assert code in (0, 9)
        ends.add(Journal(out).complete)
        go_on()
        assert contents(out) == contents(whole), moment
        if code == 0:
            break
        moment += 1
    assert moment > 15
    assert ends == {True, False}


@pytest.mark.parametrize(
    ("kind", "dtype", "classes"), [KINDS[0], *(pytest.param(*KINDS[n], marks=pytest.mark.slow) for n in (3, 6))]
)
def test_a_block_that_is_marked_as_done_is_stored(tmp_path, kind, dtype, classes):
    """Killed before any change of a file while blocks are written, and just after the last one is marked."""
    whole, out = tmp_path / "whole" / "out.zarr", tmp_path / "out.zarr"
    output, stored = predict(whole, kind, dtype, classes)
    before, given = tmp_path / "before" / "out.zarr", settings(classes=list(classes))
    new(before, kind, dtype, classes).open(given)

    def block(number):
        start, length = output.grid[number]
        return stored[:, *(slice(a, a + n) for a, n in zip(start, length, strict=True))]

    def write_blocks(numbers):
        going = new(out, kind, dtype, classes)
        going.open(given)
        for number in numbers:
            if number not in going.journal.finished:
                values = block(number)
                going.write(number, values, going.values.reached(values, values.astype(np.float32)))
        return going

    moment, marked = 1, set()
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)
        code = killed_at(moment, out, lambda: write_blocks((0, 1)), appends=True)
        assert code in (0, 9)
        done = Journal(out).finished
        marked.add(len(done))
        for number in done:
            start, length = output.grid[number]
            for name, expected in zip(classes, block(number), strict=True):
                box = tuple(slice(a, a + n) for a, n in zip(start, length, strict=True))
                found = new(out, kind, dtype, classes).array(name)[box]
                np.testing.assert_array_equal(found, expected, f"block {number}, killed before change {moment}")
        if code == 0 or moment % 5 == 0:
            assert finish(write_blocks(range(len(output.grid))))
            assert contents(out) == contents(whole)
        if code == 0:
            break
        moment += 1
    assert marked == {0, 1, 2}


@pytest.mark.parametrize("kind", ["v2", pytest.param("v3", marks=pytest.mark.slow)])
def test_kill_during_overwrite_leaves_a_replaceable_output(tmp_path, kind):
    before, out = tmp_path / "before" / "out.zarr", tmp_path / "out.zarr"
    predict(before, kind)
    moment = 1
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)
        code = killed_at(moment, out, lambda: new(out, kind).open(settings(model="n"), overwrite=True))
        assert code in (0, 9)
        if Journal(out).complete:
            assert contents(out).items() >= contents(before).items()
        output = new(out, kind)
        output.open(settings(model="n"), overwrite=True)
        assert Journal(out).settings["model"] == "n"
        assert Journal(out).finished == {}
        if code == 0:
            break
        moment += 1
    assert moment > 10


@pytest.mark.parametrize("levels", [1, 2])
def test_journal_is_removed_after_its_last_reader(tmp_path, levels):
    out = tmp_path / "out.zarr"
    output = new(out, levels=levels)
    write(output)
    there = []
    assert output.finish(0, 2, lambda: there.append((out / journal_folder("prediction")).exists()))
    assert there == [True] * (levels + 1) + [False]


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_several_processes_finish_it_together(tmp_path, kind, monkeypatch):
    out, world = tmp_path / "out.zarr", 3
    write(new(out, kind, classes=("mito", "er")))
    outputs = [new(out, kind, classes=("mito", "er"), rank=rank) for rank in range(world)]
    outputs[0].open(settings(classes=["mito", "er"]))
    meeting, said, results = threading.Barrier(world, timeout=120), {}, {}
    describing = []
    monkeypatch.setattr(
        PredictionOutput,
        "_write_metadata",
        lambda self, real=PredictionOutput._write_metadata: describing.append(1) or real(self),
    )

    def run(rank):
        calls = iter(range(100))

        def broadcast(own):
            call = next(calls)
            if rank == 0:
                said[call] = own
            meeting.wait()
            return said[call]

        done = outputs[rank].finish(rank, world, meeting.wait, broadcast)
        results[rank] = done, outputs[rank].fractions(), len(outputs[rank].journal.finished)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone, _ = predict(tmp_path / "alone" / "out.zarr", kind, classes=("mito", "er"))
    assert describing == [1, 1], "by one process, and by the one that is alone"
    assert [results[rank] for rank in range(world)] == [(True, alone.fractions(), len(alone.grid))] * world
    assert contents(out) == contents(tmp_path / "alone" / "out.zarr")


# ------------------------------------------------------------------------------------------------ the list of images


@kinds
def test_the_root_lists_its_images(tmp_path, kind, dtype, classes):
    out = tmp_path / "out.zarr"
    _, stored = predict(out, kind, dtype, classes)
    root, listing = attributes(out), attributes(out / "OME")
    if kind == "v2":
        assert root["bioformats2raw.layout"] == 3
        assert listing == {"series": list(classes)}
    else:
        assert root["ome"] == {"version": "0.5", "bioformats2raw.layout": 3}
        assert listing == {"ome": {"version": "0.5", "series": list(classes)}}
    group = zarr.open_group(str(out), mode="r")
    assert group["OME"].attrs.asdict() == listing
    container, image = (Container04, Image04) if kind == "v2" else (Container05, Image05)
    about = container.from_zarr(group).attributes
    assert (about if kind == "v2" else about.ome).bioformats2raw_layout == 3
    for name, voxels in zip(classes, stored, strict=True):
        found = image.from_zarr(group[name])
        multiscale = (found.attributes if kind == "v2" else found.attributes.ome).multiscales[0]
        assert [d.path for d in multiscale.datasets] == ["s0", "s1"]
        assert multiscale.coordinateTransformations is None
        np.testing.assert_array_equal(group[name]["s0"][...], voxels)


@kinds
def test_the_images_are_described_as_ome_xml(tmp_path, kind, dtype, classes):
    """As napari-ome-zarr finds them: the path of an image is in its ID."""
    out = tmp_path / "out.zarr"
    predict(out, kind, dtype, classes)
    space = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"
    root = ET.parse(out / "OME" / "METADATA.ome.xml").getroot()
    assert root.tag == f"{space}OME"
    group = zarr.open_group(str(out), mode="r")
    images = list(root)
    assert [image.attrib for image in images] == [{"ID": f"Image:{name}", "Name": name} for name in classes]
    for image in images:
        attrs = group[image.attrib["ID"].removeprefix("Image:")].attrs.asdict()
        assert "multiscales" in attrs.get("ome", attrs)
        (pixels,) = image
        assert [pixels.attrib[f"Size{axis}"] for axis in "XYZCT"] == ["64", "70", "32", "1", "1"]
        assert [float(pixels.attrib[f"PhysicalSize{axis}"]) for axis in "XYZ"] == [8, 8, 16]
        assert {pixels.attrib[f"PhysicalSize{axis}Unit"] for axis in "XYZ"} == {"nm"}
        assert pixels.attrib["DimensionOrder"] == "XYZCT"
        assert pixels.attrib["Type"] == {"uint8": "uint8", "labels": "uint8"}.get(dtype, "float")
        assert [child.tag for child in pixels] == [f"{space}Channel", f"{space}MetadataOnly"]


def test_the_list_of_images_is_no_class(tmp_path):
    predict(tmp_path / "out.zarr", "v3", "labels", ("mito", "er"))
    assert children(tmp_path / "out.zarr") == ["er", "mito"]
    for name in ("OME", "ome", "", ".er", "a/b"):
        with pytest.raises(CellMapValueError, match="cannot be names of groups"):
            new(tmp_path / "no.zarr", classes=("mito", name))
    with pytest.raises(MetadataError, match=r"images below it: er, mito"):
        read_multiscale(tmp_path / "out.zarr")


def test_a_class_that_is_added_is_read_although_the_consolidated_metadata_do_not_have_it(tmp_path):
    out = tmp_path / "out.zarr"
    predict(out)
    shutil.copytree(out / "mito", out / "er")
    assert children(out) == ["er", "mito"]
    assert read_multiscale(out / "er").finest.lattice.shape == SHAPE
