"""Outputs of conversions: an unfinished one blocks no other, and what no conversion has written is never changed."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import zarr

from cellmap_lightning.conversion import convert as module
from cellmap_lightning.conversion import output as output_module
from cellmap_lightning.conversion.convert import convert
from cellmap_lightning.conversion.journal import NAME, ConversionJournal
from cellmap_lightning.conversion.options import ConversionOptions
from cellmap_lightning.errors import CellMapError, CellMapFileExistsError, CellMapValueError, MetadataError
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.prediction.output_lock import FILE, OutputLock

RAW = np.random.default_rng(0).integers(1, 255, (12, 40, 40)).astype(np.uint8)
IDS = (np.indices((12, 40, 40)).sum(0) // 16 % 4).astype(np.uint8)
MITO, ALL = {1: "mito"}, {1: "mito", 2: "er", 3: "pm"}
COMMAND = [sys.executable, "-c", "from cellmap_lightning.commands.convert_command import main; main()"]


@pytest.fixture(autouse=True)
def own_records(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))


def write(path, voxels=RAW):
    tifffile.imwrite(path, voxels, photometric="minisblack", metadata={"axes": "ZYX"})
    return path


def options(folder, voxels=RAW, **values):
    path = folder / f"{len(np.unique(voxels))}.tif"
    if not path.exists():
        write(path, voxels)
    defaults = {"input": str(path), "output": str(folder / "v.zarr" / "out"), "voxel_size": [8, 8, 8], "chunks": 16}
    return ConversionOptions(**defaults | values)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stored(path):
    return np.asarray(zarr.open_array(path, mode="r")[...])


class StoppedError(Exception):
    pass


def interrupted(monkeypatch, given, after=0):
    """Convert, and stop after some blocks have been written; return the output."""
    written, copy = [], module._Image.copy

    def counted(image, number):
        if len(written) == after:
            raise StoppedError
        written.append(number)
        copy(image, number)

    with monkeypatch.context() as patch:
        patch.setattr(module._Image, "copy", counted)
        with pytest.raises(StoppedError):
            convert(given)
    return output_module.Path(given.output)


def check_masks(out, classes, size=(8, 8, 8)):
    assert {p.name for p in out.iterdir() if p.is_dir()} == set(classes.values())
    for number, name in classes.items():
        np.testing.assert_array_equal(stored(out / name / "s0"), number == IDS)
        assert read_multiscale(out / name).finest.scale == size
    assert not list(out.rglob(NAME))
    assert not list(out.rglob(FILE))


@pytest.mark.parametrize(
    ("classes", "ids"), [(MITO, "2, 3"), ({2: "er", 3: "pm"}, "1"), ({1: "mito", 3: "unknown"}, "2")]
)
def test_ids_without_a_class_are_all_named_before_anything_is_written(tmp_path, classes, ids):
    given = options(tmp_path, IDS, classes=classes)
    with pytest.raises(MetadataError, match=rf"holds the ids? {ids}, which its label map does not list; .*NAME"):
        convert(given)
    assert not (tmp_path / "v.zarr").exists()
    check_masks(convert(options(tmp_path, IDS, classes=ALL)), ALL)


@pytest.mark.parametrize(
    ("first", "after", "change"),
    [
        ({"classes": {1: "mitto", 2: "er", 3: "pm"}}, 0, {"classes": ALL}),
        ({"classes": {1: "er", 2: "mitto", 3: "pm"}}, 2, {"classes": ALL}),
        ({"classes": ALL}, 2, {"classes": {1: "mito", 2: "mito", 3: "pm"}}),
        ({"classes": ALL}, 0, {"classes": ALL, "voxel_size": [16, 8, 8]}),
        ({"classes": ALL}, 1, {"classes": ALL, "voxel_size": [16, 8, 8]}),
        ({"classes": ALL}, 1, {"classes": ALL, "zarr_format": 3}),
        ({"classes": ALL}, 2, {}),
        ({}, 0, {"classes": ALL}),
    ],
)
def test_an_unfinished_output_does_not_block_another_conversion(tmp_path, monkeypatch, caplog, first, change, after):
    """A mask that is complete is part of the unfinished output too: nothing of the first conversion is left."""
    interrupted(monkeypatch, options(tmp_path, IDS, **first), after)
    caplog.clear()
    out = convert(options(tmp_path, IDS, **change))
    (line,) = [r.getMessage() for r in caplog.records if "unfinished" in r.getMessage()]
    assert line.startswith(f"{out}: replaces an unfinished conversion, whose settings differ (")
    expected = options(tmp_path, IDS, **change, output=str(tmp_path / "w.zarr" / "out"))
    assert files(convert(expected)) == files(out)
    if change.get("classes") == ALL:
        check_masks(out, ALL, tuple(change.get("voxel_size", (8, 8, 8))))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_masks_are_resumed(tmp_path, monkeypatch, caplog, after):
    given = options(tmp_path, IDS, classes=ALL)
    out = interrupted(monkeypatch, given, after)
    before = files(out)
    read, reads = module._Image.copy, []
    monkeypatch.setattr(module._Image, "copy", lambda image, n: (reads.append(image.path.name), read(image, n)))
    convert(given)
    assert reads == ["mito", "er", "pm"][after:]
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    check_masks(out, ALL)
    for name in list(ALL.values())[:after]:
        assert files(out)[f"{name}/.zattrs"] == before[f"{name}/.zattrs"]


@pytest.mark.parametrize("classes", [None, MITO | {2: "er", 3: "er"}, ALL], ids=["image", "two", "three"])
def test_a_complete_output_is_replaced_with_overwrite_alone(tmp_path, classes):
    voxels = RAW if classes is None else IDS
    out = convert(options(tmp_path, voxels, classes=classes))
    before = files(out)
    for change in ({}, {"voxel_size": [16, 8, 8]}, {"chunks": 8}):
        with pytest.raises(CellMapFileExistsError, match=r"exists already, a complete .*overwrite=True, or"):
            convert(options(tmp_path, voxels, classes=classes, **change))
    assert files(out) == before
    changed = options(tmp_path, voxels, classes=classes, chunks=8, voxel_size=[16, 8, 8], overwrite=True)
    assert files(convert(changed)) != before
    again = {"classes": classes, "chunks": 8, "voxel_size": [16, 8, 8], "output": str(tmp_path / "w.zarr" / "out")}
    assert files(out) == files(convert(options(tmp_path, voxels, **again)))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("place", ["note.txt", "labels/mito/s0/.zarray", "s7/.zarray"])
def test_other_files_in_an_output_stay(tmp_path, place, zarr_format):
    out = convert(options(tmp_path))
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    (out / place).write_text("mine")
    convert(options(tmp_path, zarr_format=zarr_format, overwrite=True))
    assert (out / place).read_text() == "mine"
    np.testing.assert_array_equal(stored(out / "s0"), RAW)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["er/s0/.zarray", "er/note.txt", "mito/s0/.zarray"])
def test_masks_of_others_are_not_replaced(tmp_path, place, overwrite):
    """Also where the group around them is from a conversion."""
    out = convert(options(tmp_path, IDS, classes={1: "pm", 2: "pm", 3: "pm"}))
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    (out / place).write_text("mine")
    if not overwrite:
        (out / NAME).write_text("{}\n")  # unfinished
    before = files(out)
    with pytest.raises(CellMapFileExistsError, match=rf"{place.split('/')[0]} exists already and is not from a conv"):
        convert(options(tmp_path, IDS, classes=ALL, overwrite=overwrite))
    assert files(out) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", ["file", "folder", "zarr", "link", "dangling link"])
def test_what_no_conversion_has_written_is_refused(tmp_path, content, overwrite):
    given = options(tmp_path, overwrite=overwrite)
    out = tmp_path / "v.zarr" / "out"
    out.parent.mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("x")
    if content == "file":
        out.write_text("x")
    elif content == "folder":
        (out / "mine").mkdir(parents=True)
    elif content == "zarr":
        zarr.create_group(out, zarr_format=2, attributes={"cellmap": {"annotation": {}}})
    else:
        out.symlink_to(tmp_path / ("other" if content == "link" else "nothing"))
    before = files(tmp_path)
    with pytest.raises(CellMapFileExistsError, match=r"exists already and is not from a conversion, .* remove it, or"):
        convert(given)
    assert files(tmp_path) == before


@pytest.mark.parametrize("journal", [None, "", '{"chunks": 1', "[]", "\x00" * 40], ids=repr)
def test_an_output_that_was_hardly_begun_is_replaced(tmp_path, journal):
    """The disk may be full as soon as the folder is made, or the process killed."""
    out = tmp_path / "v.zarr" / "out"
    out.mkdir(parents=True)
    if journal is not None:
        (out / NAME).write_text(journal)
    convert(options(tmp_path))
    np.testing.assert_array_equal(stored(out / "s0"), RAW)
    assert not (out / NAME).exists()


@pytest.mark.parametrize("classes", [None, ALL], ids=["image", "masks"])
@pytest.mark.parametrize("kept", [0, 1, 3, 6])
def test_a_removal_that_was_interrupted_is_completed(tmp_path, monkeypatch, classes, kept):
    """Whatever was removed before: the rest is unfinished, so that the next conversion replaces it."""
    voxels = RAW if classes is None else IDS
    out = convert(options(tmp_path, voxels, classes=classes))
    calls, unlink, rmtree = [], output_module.Path.unlink, output_module.shutil.rmtree

    def counted(function):
        def call(*args, **kwargs):
            if len(calls) >= kept:
                raise StoppedError
            calls.append(args)
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(output_module.Path, "unlink", counted(unlink))
        patch.setattr(output_module.shutil, "rmtree", counted(rmtree))
        with pytest.raises(StoppedError):
            convert(options(tmp_path, voxels, classes=classes, chunks=8, overwrite=True))
    assert (out / NAME).is_file()
    convert(options(tmp_path, voxels, classes=classes, chunks=8))
    expected = convert(options(tmp_path, voxels, classes=classes, chunks=8, output=str(tmp_path / "w.zarr" / "out")))
    assert files(out) == files(expected)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("change", [{}, {"chunks": 8}, {"classes": dict.fromkeys(range(1, 255), "mito")}])
def test_an_output_that_another_job_writes_is_not_replaced(tmp_path, monkeypatch, change, overwrite):
    out = interrupted(monkeypatch, options(tmp_path))
    lock = OutputLock(out)
    lock.acquire()
    try:
        before = files(out)
        with pytest.raises(CellMapFileExistsError, match="already writes there"):
            convert(options(tmp_path, overwrite=overwrite, **change))
        assert files(out) == before
    finally:
        lock.release()
    convert(options(tmp_path, **change))


@pytest.mark.parametrize(
    ("source", "output"),
    [("a.zarr/em", "a.zarr/em"), ("a.zarr/em", "a.zarr"), ("a.zarr/em", "a.zarr/em/copy"), ("link/em", "a.zarr/em/s9")],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_input_is_never_written_to(tmp_path, source, output, overwrite):
    convert(options(tmp_path, output=str(tmp_path / "a.zarr" / "em")))
    (tmp_path / "link").symlink_to("a.zarr")
    before = files(tmp_path)
    given = {"input": str(tmp_path / source), "output": str(tmp_path / output), "voxel_size": None}
    with pytest.raises(CellMapValueError, match="must not be inside of each other"):
        convert(options(tmp_path, overwrite=overwrite, **given))
    assert files(tmp_path) == before


def test_a_journal_names_no_folder_outside_of_its_group(tmp_path):
    for name in ("../other", "..", "a/b", ""):
        out = tmp_path / "v.zarr" / "out"
        convert(options(tmp_path, overwrite=True))
        convert(options(tmp_path, output=str(tmp_path / "v.zarr" / "other"), overwrite=True))
        before = files(tmp_path / "v.zarr" / "other")
        ConversionJournal(out).begin({"masks": [name]})
        (out / ".zattrs").unlink()
        with pytest.raises(CellMapFileExistsError, match="s0 exists already"):  # which the journal does not list
            convert(options(tmp_path))
        assert files(tmp_path / "v.zarr" / "other") == before
        shutil.rmtree(out)


def test_a_killed_command_blocks_no_other(tmp_path):
    path = write(tmp_path / "raw.tif")
    code = (
        "import os, signal\n"
        "from cellmap_lightning.conversion import convert as module\n"
        "module._Image._verify = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from cellmap_lightning.commands.convert_command import main; main()"
    )
    arguments = [f"input={path}", "output=v.zarr/em", "voxel_size=[8,8,8]"]
    environment = dict(os.environ)
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "v.zarr" / "em" / FILE).exists()
    for more, expected, status in (
        (
            ["voxel_size=[16,8,8]"],
            "v.zarr/em: replaces an unfinished conversion, whose settings differ (voxel_size)",
            0,
        ),
        (["voxel_size=[16,8,8]"], "a complete conversion; replace it with overwrite=true, or choose", 1),
        (["voxel_size=[4,8,8]", "overwrite=true"], "v.zarr/em: replaces the conversion that is there", 0),
    ):
        done = subprocess.run(
            [*COMMAND, *arguments[:2], *more], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
        assert expected in done.stdout + done.stderr
    assert read_multiscale(tmp_path / "v.zarr" / "em").finest.scale == (4, 8, 8)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_overwrite_is_true_or_false(tmp_path, value):
    with pytest.raises(CellMapError, match="overwrite must be true or false, got"):
        options(tmp_path, overwrite=value)


# -- groups above the output


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    ("place", "groups"), [("v.zarr/em", ["v.zarr"]), ("a/v.zarr/b/em", ["a/v.zarr", "a/v.zarr/b"])]
)
def test_folders_above_an_output_are_groups(tmp_path, zarr_format, place, groups):
    convert(options(tmp_path, output=str(tmp_path / place), zarr_format=zarr_format))
    for name in groups:
        group = zarr.open_group(str(tmp_path / name), mode="r", zarr_format=zarr_format)
        assert dict(group.attrs) == {}
    assert "em" in zarr.open(str(tmp_path / groups[-1]), mode="r")
    assert not any((tmp_path / folder / name).exists() for folder in (".", "a") for name in (".zgroup", "zarr.json"))


def test_groups_above_an_output_that_exist_are_not_changed(tmp_path):
    root = zarr.create_group(str(tmp_path / "v.zarr"), zarr_format=3, attributes={"mine": 1})
    root.create_group("b")
    before = files(tmp_path / "v.zarr")
    convert(options(tmp_path, output=str(tmp_path / "v.zarr" / "b" / "c" / "em"), zarr_format=3))
    after = files(tmp_path / "v.zarr")
    assert before.items() <= after.items()
    assert dict(zarr.open_group(str(tmp_path / "v.zarr"), mode="r").attrs) == {"mine": 1}
    assert "em" in zarr.open_group(str(tmp_path / "v.zarr" / "b" / "c"), mode="r")


def test_masks_of_a_label_map_lie_in_groups(tmp_path):
    convert(options(tmp_path, IDS, output=str(tmp_path / "v.zarr" / "crop1"), classes=ALL))
    assert sorted(zarr.open_group(str(tmp_path / "v.zarr"), mode="r")["crop1"].group_keys()) == ["er", "mito", "pm"]
