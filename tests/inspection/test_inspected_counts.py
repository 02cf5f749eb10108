"""Counts of metadata that contradict the voxels, and coarser levels of labels that were averaged."""

import json

import numpy as np
import pytest

from cellmap_lightning.inspection import report as report_module
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale

SIZE = 16**3
#: Voxels of the class and unknown ones that are stored.
STORED, UNKNOWN = 600, 96
KIND = {"type": "semantic_segmentation", "encoding": {"absent": 0, "present": 1, "unknown": 255}}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """Use a cache folder that no other test has written to."""
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def large_labels(monkeypatch):
    """Labels count as too large to be read without ``deep``."""
    monkeypatch.setattr(report_module, "COUNTED_AT_ONCE", 0)


def look(folder, labels, deep, attributes=None, levels=1, mode="mode", scale=8):
    """The report of two crops with the same labels, ``{class: voxels}``, and their counts ``{class: counts}``."""
    storage = ArrayOptions(chunks=(16, 16, 16))
    placed = {"scale": (8, 8, 8), "storage": storage}
    write_multiscale(folder / "em", np.full((16, 16, 32), 7, np.uint8), translation=(4, 4, 4), levels=2, **placed)
    rows = []
    for number in range(2):
        for name, voxels in labels.items():
            path = folder / f"crop{number}" / name
            translation = (4, 4, 4 + 128 * number)
            write_multiscale(path, voxels, translation=translation, levels=levels, mode=mode, **placed)
            if attributes and name in attributes:
                (path / "s0" / ".zattrs").write_text(json.dumps(attributes[name]))
        rows.append({"raw": str(folder / "em"), "gt": f"{folder}/crop{number}/[{','.join(labels)}]"})
    data = {"datasets": {"train": rows[:1], "val": rows[1:]}}
    return inspect(data, {"scale": [scale] * 3, "shape": [4] * 3}, None, deep)


def voxels_with(present, unknown):
    voxels = np.zeros(SIZE, np.uint8)
    voxels[:present] = 1
    voxels[SIZE - unknown :] = 255
    return voxels.reshape(16, 16, 16)


def counted(absent, unknown, **more):
    counts = {"absent": absent, "unknown": unknown, **more}
    return {"cellmap": {"annotation": {"annotation_type": KIND, "complement_counts": counts}}}


def of_kind(report, kind):
    return [problem.text for problem in report.problems if problem.kind == kind and problem.where.endswith("crop0")]


@pytest.mark.parametrize(
    ("absent", "unknown", "text"),
    [
        (SIZE - STORED - UNKNOWN, UNKNOWN, None),
        (SIZE - 100 - UNKNOWN, UNKNOWN, "100 voxels of the class, and 600 are stored"),  # too few
        (SIZE - 2000 - UNKNOWN, UNKNOWN, "2,000 voxels of the class, and 600 are stored"),  # too many
        (SIZE - STORED - UNKNOWN + 50, UNKNOWN - 50, "46 unknown voxels, and 96 are stored"),
        (SIZE - STORED, 0, "0 unknown voxels, and 96 are stored"),
        (SIZE, 0, "0 voxels of the class, and 600 are stored; 0 unknown voxels, and 96 are stored"),
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_wrong_counts_are_found_in_the_voxels(tmp_path, absent, unknown, text, deep):
    report = look(tmp_path, {"mito": voxels_with(STORED, UNKNOWN)}, deep, {"mito": counted(absent, unknown)})
    assert of_kind(report, "counts") == ([f"mito: {text}"] if deep and text else [])
    facts = report.crops[0].classes["mito"]
    if deep:
        assert (facts.voxels, facts.unknown) == (STORED, UNKNOWN / SIZE)
        assert ("wrong complement_counts in the metadata" in str(report)) == (text is not None)
        assert not of_kind(report, "unreadable")
    else:  # by the metadata
        assert (facts.voxels, facts.unknown) == (SIZE - absent - unknown, unknown / SIZE)


@pytest.mark.parametrize("deep", [False, True])
def test_a_class_that_is_only_in_the_counts(tmp_path, deep):
    attributes = {"mito": counted(SIZE - 700, 0), "er": counted(SIZE - STORED, 0)}
    report = look(tmp_path, {"mito": voxels_with(0, 0), "er": voxels_with(STORED, 0)}, deep, attributes)
    assert report.crops[0].classes["er"].contradiction is None
    if deep and not of_kind(report, "unreadable"):
        assert of_kind(report, "counts") == ["mito: 700 voxels of the class, and 0 are stored"]
    else:  # its chunk, which holds nothing, is not stored
        (text,) = of_kind(report, "unreadable")
        assert "declare 700 voxels that are not absent" in text
        assert "chunks are missing, or the counts are wrong; copy them again or correct the counts" in text


@pytest.mark.parametrize(
    "counts",
    [
        {"absent": SIZE, "unknown": 1},
        {"absent": 9, "unknown": -1},
        {"absent": 0, "unknown": 2 * SIZE},
        {"absent": "many"},
        {"absent": SIZE - STORED, "unknown": 0, "mito_mem": STORED + 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("deep", [False, True])
def test_counts_that_cannot_be_are_not_used(tmp_path, counts, deep):
    attributes = {"cellmap": {"annotation": {"annotation_type": KIND, "complement_counts": counts}}}
    report = look(tmp_path, {"mito": voxels_with(STORED, UNKNOWN)}, deep, {"mito": attributes})
    (text,) = of_kind(report, "counts")
    assert text == f"mito: {counts} cannot be counts of the 4,096 voxels of s0, and are not used"
    facts = report.crops[0].classes["mito"]
    assert (facts.voxels, facts.unknown) == ((STORED, UNKNOWN / SIZE) if deep else (None, None))


# -- averaged levels


def stripes(value, dtype):
    voxels = np.zeros((16, 16, 16), dtype)
    voxels[:, :, 1::4] = value
    voxels[:, :, 2::8] = value
    return voxels


@pytest.mark.parametrize(("value", "dtype"), [(255, np.uint8), (1, np.float32), (1000, np.uint16)])
@pytest.mark.parametrize(("scale", "read"), [(8, []), (16, ["s1"]), (32, ["s2"])])
@pytest.mark.parametrize("deep", [False, True])
def test_averaged_levels_are_reported(tmp_path, value, dtype, scale, read, deep):
    labels = {"mito": stripes(value, dtype)}
    report = look(tmp_path, labels, deep, levels=3, mode="mean", scale=scale)
    texts = of_kind(report, "averaged") + of_kind(report, "unreadable")
    named = [level for level in ("s1", "s2") for text in texts if f"{level} holds" in text]
    assert named == (["s1", "s2"] if deep else read)
    # A level that is not read makes nothing unreadable.
    assert len(of_kind(report, "unreadable")) <= len(read)


@pytest.mark.parametrize("mode", ["mode", "mean"])
def test_levels_that_share_the_values_are_no_problem(tmp_path, mode):
    solid = np.zeros((16, 16, 16), np.uint8)
    solid[8:] = 255
    assert not of_kind(look(tmp_path, {"mito": solid}, True, levels=2, mode=mode), "averaged")


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("names", [["mito"], ["mito", "er"], ["mito", "er", "nuc"]])
def test_what_is_counted_is_not_proposed_to_be_counted(tmp_path, deep, names):
    report = look(tmp_path, {name: voxels_with(STORED, 0) for name in names}, deep)
    assert (report.crops[0].classes["mito"].voxels is not None) is deep
    text = (
        f"the metadata do not say how many voxels of {', '.join(names)} the crops have, so a crop without any would "
        "count too: repeat the cellmap-inspect command with deep=true at its end to count them"
    )
    assert (text in report.proposal.reasons["classes"]) is not deep
    printed = " ".join(word for word in str(report).split() if word != "#")  # comments of the proposal are wrapped
    assert ("with deep=true at its end" in printed) is not deep
