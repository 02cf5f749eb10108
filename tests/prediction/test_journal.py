"""Journals that are damaged, half removed, moved or of another output, which are never valid."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapError, CellMapFileExistsError, CellMapValueError, OutputError
from cellmap_lightning.prediction import durable
from cellmap_lightning.prediction.journal import Journal, journal_folder
from cellmap_lightning.prediction.output import TOKEN
from cellmap_lightning.prediction.output_lock import FILE
from tests.prediction.test_output import attributes, contents, finish, killed_at, new, predict, settings, write


@pytest.fixture
def half(tmp_path):
    """An output with some finished blocks, as a kill leaves it; and a complete one."""
    whole, out = tmp_path / "whole" / "out.zarr", tmp_path / "out.zarr"
    output, stored = predict(whole)
    going = new(out)
    going.open(settings())
    for number in (0, 1, 4, 11):
        start, length = output.grid[number]
        block = stored[:, *(slice(a, a + n) for a, n in zip(start, length, strict=True))]
        going.write(number, block, [number], f"{number:016x}")
    going.close()

    def resume():
        again = new(out)
        again.open(settings())
        done = set(again.journal.finished)
        for number in range(len(again.grid)):
            if number not in done:
                start, length = output.grid[number]
                block = stored[:, *(slice(a, a + n) for a, n in zip(start, length, strict=True))]
                again.write(number, block, output.values.reached(block, block.astype("float32")))
        return again, done

    return out, whole, resume


def voxels(path):
    """Every file of the classes, with its bytes."""
    return {name: digest for name, digest in contents(path).items() if name.startswith("mito/") and TOKEN not in name}


def test_notes_round_trip(half):
    out, whole, resume = half
    journal = Journal(out)
    assert journal.finished == {0: [0], 1: [1], 4: [4], 11: [11]}
    assert journal.inputs == {number: f"{number:016x}" for number in (0, 1, 4, 11)}
    again, done = resume()
    assert done == {0, 1, 4, 11}
    assert finish(again)
    assert voxels(out) == voxels(whole)


def damage(path, how, at):
    content = bytearray(path.read_bytes())
    at = at % len(content)
    if how == "cut":
        del content[at:]
    elif how == "zeroed":
        content[at : at + 16] = bytes(len(content[at : at + 16]))
    elif how == "flipped":
        content[at] ^= 1
    elif how == "exchanged":
        content[at], content[(at + 1) % len(content)] = content[(at + 1) % len(content)], content[at]
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "zeroed", "flipped", "exchanged"])
def test_damaged_line_is_ignored(half, how):
    out, _, _ = half
    file = out / journal_folder("prediction") / "blocks-0.txt"
    content = file.read_bytes()
    before = Journal(out)
    there, inputs = before.finished, before.inputs
    for at in range(len(content)):
        damage(file, how, at)
        journal = Journal(out)
        assert journal.finished.items() <= there.items(), at
        assert journal.inputs.items() <= inputs.items(), at
        assert len(journal.finished) >= (0 if how == "cut" else 2)
        file.write_bytes(content)


def test_with_a_damaged_line_the_prediction_is_completed(half):
    out, whole, resume = half
    damage(out / journal_folder("prediction") / "blocks-0.txt", "flipped", 60)
    again, done = resume()
    assert len(done) == 3
    assert finish(again)
    assert voxels(out) == voxels(whole)


@pytest.mark.parametrize("how", ["cut", "zeroed", "flipped"])
def test_damaged_settings_are_an_error_with_advice(half, how):
    out, whole, _ = half
    file = out / journal_folder("prediction") / "settings.json"
    content = file.read_bytes()
    for at in range(0, len(content) - 1, 1 if how == "flipped" else 7):
        damage(file, how, at)
        with pytest.raises(CellMapValueError, match=r"settings\.json is damaged.*overwrite=True starts over"):
            new(out).open(settings())
        file.write_bytes(content)
    damage(file, how, 3)
    output = new(out)
    write(output, overwrite=True)
    assert finish(output)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_a_damaged_record_is_an_error(tmp_path, kind):
    out = tmp_path / "out.zarr"
    predict(out, kind)
    file = out / ("zarr.json" if kind == "v3" else ".zattrs")
    content = json.loads(file.read_text())
    prediction = (content["attributes"] if kind == "v3" else content)["cellmap"]["prediction"]
    for key, value in (("blocks", 3), ("reached", {"mito": 1}), ("settings", {"model": "n"}), ("checksum", "0" * 16)):
        kept, prediction[key] = prediction[key], value
        file.write_text(json.dumps(content))
        with pytest.raises(CellMapValueError, match=r"record of a finished prediction is damaged.*overwrite=True"):
            new(out, kind).open(settings())
        prediction[key] = kept
    write(new(out, kind), overwrite=True)


def test_lines_of_another_output_are_ignored(half, tmp_path):
    """Of the output before it was replaced, or of another folder."""
    out, whole, _ = half
    lines = (out / journal_folder("prediction") / "blocks-0.txt").read_bytes()
    output = new(out)
    output.open(settings(), overwrite=True)
    (out / journal_folder("prediction") / "blocks-3.txt").write_bytes(lines)
    assert Journal(out).finished == {}
    output.close()
    output = new(out)
    write(output)
    assert finish(output)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("gone", ["class", "level", "metadata", "replaced", "exchanged"])
def test_groups_that_were_removed_or_replaced_are_not_resumed(half, gone, tmp_path):
    out, whole, _ = half
    if gone == "class":
        shutil.rmtree(out / "mito")
    elif gone == "level":
        shutil.rmtree(out / "mito" / "s1")
    elif gone == "metadata":
        (out / "mito" / "s0" / ".zarray").unlink()
    elif gone == "replaced":
        shutil.rmtree(out / "mito")
        shutil.copytree(whole / "mito", out / "mito")
    else:
        other = new(tmp_path / "other.zarr")
        other.open(settings())
        shutil.rmtree(out / "mito")
        shutil.copytree(tmp_path / "other.zarr" / "mito", out / "mito")
    with pytest.raises(CellMapFileExistsError, match=r"mito (lacks s|was removed or replaced).*overwrite=True"):
        new(out).open(settings())
    output = new(out)
    write(output, overwrite=True)
    assert finish(output)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_an_output_in_another_folder_is_resumed(half, tmp_path, how):
    out, whole, resume = half
    elsewhere = tmp_path / "elsewhere.zarr"
    if how == "moved":
        out.rename(elsewhere)
    else:
        shutil.copytree(out, elsewhere)
        shutil.rmtree(out)
    elsewhere.rename(out)
    again, done = resume()
    assert len(done) == 4
    assert finish(again)
    assert voxels(out) == voxels(whole)


# -------------------------------------------------------------------------------------------------- steps and failures


def there(path):
    """The files of an output, without those that a kill leaves behind and that say nothing."""
    return {name: digest for name, digest in contents(path).items() if not name.endswith((".draft", FILE))}


@pytest.mark.parametrize(
    ("kind", "finished"),
    [
        ("v2", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("v3", True), ("v2", True), ("sharded", False))),
    ],
)
def test_kill_during_removal(tmp_path, kind, finished):
    """The same command without overwrite is refused while all is there, and otherwise begins again."""
    before, out, whole = (tmp_path / name / "out.zarr" for name in ("before", "out", "whole"))
    predict(whole, kind, "labels", ("mito", "er"))
    old = new(before, kind, "labels", ("mito", "er"))
    write(old)
    if finished:
        assert finish(old)
    old.close()
    moment, refused = 1, set()
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)
        code = killed_at(moment, out, lambda: new(out, kind).open(settings(model="n"), overwrite=True))
        assert code in (0, 9)
        output = new(out, kind)
        if (Journal(out).settings or {}).get("model") == "m":  # nothing was removed yet
            with pytest.raises(CellMapFileExistsError, match="model: 'm' is there, now 'n'"):
                output.open(settings(model="n"))
            assert there(out) == there(before)
            refused.add(True)
        else:
            output.open(settings(model="n"))
            assert output.journal.finished == {}
            assert not (output.array("mito")[...]).any()
            assert not (out / "er").exists()  # a group of what was replaced
            refused.add(False)
        output.close()
        if code == 0:
            break
        moment += 1
    assert refused == {True, False}
    assert moment > 10


@pytest.mark.parametrize("kind", ["v2", "v3", "sharded"])
def test_a_block_is_done_when_its_files_are_on_the_disk(tmp_path, kind, monkeypatch):
    out, flushed, done = tmp_path / "out.zarr", set(), []
    fsync = os.fsync

    def noting(handle):
        path = str(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)
        if "/mito/" in path and journal_folder("prediction") not in path:
            flushed.add(path)
            done.append(len(Journal(out).finished))

    monkeypatch.setattr(os, "fsync", noting)
    output = new(out, kind)
    write(output)
    files = {str(p) for p in (out / "mito").rglob("*") if p.is_file() and p.name[0] not in ".z"}
    assert files <= flushed
    assert {str(p) for p in map(os.path.dirname, files)} <= flushed  # the entries of the folders too
    assert sorted(set(done)) == [0, *range(len(output.grid))] or sorted(set(done)) == list(range(len(output.grid)))
    flushed.clear()
    assert finish(output)
    coarse = {str(p) for p in (out / "mito" / "s1").rglob("*") if p.is_file() and p.name[0] not in ".z"}
    assert coarse - files <= flushed


@pytest.mark.parametrize("fault", ["write", "flush", "folder"])
@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_a_block_that_was_not_written_whole_is_not_done(tmp_path, kind, fault, monkeypatch):
    out = tmp_path / "out.zarr"
    output = new(out, kind)
    output.open(settings())
    output.skip(0)
    block = np.full((1, *output.grid[1][1]), 9, np.uint8)

    def fails(*args, **kwargs):
        raise OSError(errno.EIO if fault != "write" else errno.ENOSPC, "injected")

    with monkeypatch.context() as patch:
        if fault == "write":
            patch.setattr("cellmap_lightning.prediction.output_levels.OutputLevels._put", fails)
        elif fault == "flush":
            patch.setattr(os, "fsync", fails)
        else:
            flush = durable._flush
            patch.setattr(durable, "_flush", lambda path: fails() if Path(path).is_dir() else flush(path))
        with pytest.raises(OutputError, match=r"cannot be written to at block 1.*run the same command again"):
            output.write(1, block, [1])
    assert set(output.journal.finished) == {0}
    output.write(1, block, [1])
    assert set(output.journal.finished) == {0, 1}
    output.close()


def test_file_systems_that_cannot_flush_are_no_error(tmp_path, monkeypatch):
    def refused(handle):
        raise OSError(errno.EINVAL, "injected")

    monkeypatch.setattr(os, "fsync", refused)
    output = new(tmp_path / "out.zarr")
    write(output)
    assert finish(output)
    assert attributes(tmp_path / "out.zarr")["cellmap"]["prediction"]["blocks"] == len(output.grid)


def test_a_foreign_folder_of_that_name_is_an_error_and_stays(tmp_path):
    (tmp_path / "out.zarr").mkdir()
    (tmp_path / "out.zarr" / "thesis.txt").write_text("all of it")
    with pytest.raises(CellMapError, match="contains no prediction of this package"):
        new(tmp_path / "out.zarr").open(settings(), overwrite=True)
    assert [p.name for p in (tmp_path / "out.zarr").iterdir()] == ["thesis.txt"]
