"""For any metadata and chunk files that writers of four conventions produce, a sample is right, or setup is an error.

The conventions: chunks of Zarr v2 flat or in folders, of Zarr v3 in folders, and of Zarr v3 with the names of v2. The
metadata may be of one and the files of another, as after a copy or a conversion; chunks may be lost; levels may have
translations of voxel centres, none, or all the same. Right is what zarr-python reads from the array, at the place that
`level_translations` gives it.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from cellmap_lightning import CellMapDataset
from cellmap_lightning.crops.options import IntensityOptions, ReadOptions
from cellmap_lightning.errors import CellMapError
from tests.foreign import SEMANTIC, annotated, metadata_file, write_image

#: Format, and the names of chunks.
CONVENTIONS = {
    "v2 flat": (2, {"name": "v2", "separator": "."}),
    "v2 nested": (2, {"name": "v2", "separator": "/"}),
    "v3": (3, {"name": "default", "separator": "/"}),
    "v3 as v2": (3, {"name": "v2", "separator": "/"}),
}
SCALE = np.array([8.0, 4.0, 4.0])


def coarse(data):
    z, y, x = (n // 2 for n in data.shape)
    return data[: 2 * z : 2, : 2 * y : 2, : 2 * x : 2].copy()


@st.composite
def volumes(draw):
    """A label image, and what may have happened to it."""
    convention = draw(st.sampled_from(sorted(CONVENTIONS)))
    shape = tuple(draw(st.lists(st.integers(9, 24), min_size=3, max_size=3)))
    kind = draw(st.sampled_from(["presence", "mask", "ids", "ids with 255", "annotated", "counted"]))
    values = {"presence": [0, 1], "mask": [0, 255], "ids": [0, 1, 7, 254], "ids with 255": [0, 3, 255]}
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    coarse_blocks = rng.choice(values.get(kind, [0, 1, 255]), size=[-(-n // 4) for n in shape])
    data = np.kron(coarse_blocks, np.ones((4, 4, 4), int))[: shape[0], : shape[1], : shape[2]]
    return {
        "convention": convention,
        "files": draw(st.sampled_from([convention, convention, *sorted(CONVENTIONS)])),
        "data": data.astype(draw(st.sampled_from(["u1", "u2", "i4"]))),
        "chunks": draw(st.sampled_from([4, 7, 16])),
        "kind": kind,
        "lost": draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])),
        "translations": draw(st.sampled_from(["centres", "none", "equal"])),
        "of raw": draw(st.sampled_from(["centres", "none", "equal"])),
        "level": draw(st.integers(0, 1)),
        "reader": draw(st.sampled_from(["zarr", "zarr", "tensorstore"])),
        "seed": draw(st.integers(0, 1000)),
    }


def placed(convention, origin):
    """The levels of an image whose finest one begins at a place."""
    offsets = {"centres": [origin, origin + SCALE / 2], "equal": [origin, origin], "none": [None, None]}[convention]
    return {f"s{k}": ((SCALE * 2**k).tolist(), None if t is None else t.tolist()) for k, t in enumerate(offsets)}


def write(root, made):
    """Write the image with the files of a convention; return its path and the values that zarr-python reads."""
    zarr_format, names = CONVENTIONS[made["convention"]]
    arrays = {"s0": made["data"], "s1": coarse(made["data"])}
    origin = np.zeros(3) if "none" in (made["translations"], made["of raw"]) else np.array([80.0, 0.0, 40.0])
    levels = placed(made["translations"], origin)
    options = {"chunks": made["chunks"], "levels": levels}
    path = root / "v.zarr" / "crop" / "mito"
    data = made["data"]
    counts = {"absent": int((data == 0).sum()), "unknown": int((data == 255).sum())}
    if made["kind"] in ("annotated", "counted"):
        options["attributes"] = annotated(SEMANTIC)
    if made["kind"] == "counted":
        options["array_attributes"] = annotated(SEMANTIC, counts)
    write_image(path, arrays, zarr_format=zarr_format, chunk_key_encoding=names, **options)
    if made["files"] != made["convention"]:
        other_format, other_names = CONVENTIONS[made["files"]]
        other = write_image(root / "other", arrays, zarr_format=other_format, chunk_key_encoding=other_names, **options)
        for level in ("s0", "s1"):
            for entry in (path / level).iterdir():
                if entry.name not in (".zarray", ".zattrs", "zarr.json"):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            for entry in (other / level).iterdir():
                if entry.name not in (".zarray", ".zattrs", "zarr.json"):
                    entry.rename(path / level / entry.name)
    rng = np.random.default_rng(made["seed"])
    for level in ("s0", "s1"):
        for file in sorted(p for p in (path / level).rglob("*") if p.is_file()):
            if file.name not in (".zarray", ".zattrs", "zarr.json") and rng.random() < made["lost"]:
                file.unlink()
    # Raw covers the same voxels, and its values tell each from its neighbours.
    grey = np.random.default_rng(made["seed"]).random(made["data"].shape).astype("f4")
    write_image(
        root / "v.zarr" / "em", {"s0": grey, "s1": coarse(grey)}, chunks=made["chunks"],
        levels=placed(made["of raw"], origin),
    )  # fmt: skip
    read = [np.asarray(zarr.open_array(f"{path}/s{k}", mode="r", zarr_format=zarr_format)[...]) for k in (0, 1)]
    return path, read, (grey, coarse(grey))[made["level"]], origin


def same_names(made):
    """Return True if files of one convention have the names in the metadata of the other."""
    (_, a), (_, b) = CONVENTIONS[made["convention"]], CONVENTIONS[made["files"]]
    return a == b


def check(made):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        root = Path(folder)
        patch.setenv("CELLMAP_CACHE_DIR", f"{folder}/cache")
        path, (fine, small), grey, origin = write(root, made)
        level = made["level"]
        stored = (fine, small)[level]
        scale = SCALE * 2**level
        assume(min(stored.shape) >= 4)
        spec = {"shape": [4] * 3, "scale": scale.tolist()}
        try:
            data = CellMapDataset(
                f"{root}/v.zarr/em",
                f"{path.parent}/[mito]",
                ["mito"],
                {"raw": spec},
                {"labels": spec},
                read=ReadOptions(cache="none", max_workers=1, reader=made["reader"]),
                intensity=IntensityOptions(raw_value_transforms=None),
            )
        except CellMapError as error:
            return "error", str(error)
        with data:
            sample = {name: value[0].numpy() for name, value in data[len(data) // 2].items() if name != "idx"}
            center = np.array(list(data.get_center(len(data) // 2).values()))
        # The first voxel of the patch among those of the level, which all begin where the finest one does.
        first = (center - 1.5 * scale - origin - SCALE * (2**level - 1) / 2) / scale
        assert np.abs(first - np.rint(first)).max() < 1e-6, "the levels of raw and labels do not lie on each other"
        z, y, x = np.rint(first).astype(int)
        box = np.s_[z : z + 4, y : y + 4, x : x + 4]
        part = stored[box]
        np.testing.assert_array_equal(sample["raw"], grey[box])
        named = made["kind"] in ("annotated", "counted")
        expected = np.where((part == 255) & named, np.nan, part != 0)
        np.testing.assert_array_equal(sample["labels"], expected)
        return "sample", ""


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(volumes())
def test_a_sample_is_right_or_setup_is_an_error(made):
    outcome, text = check(made)
    event(outcome)
    if outcome == "error":
        assert any(
            words in text
            for words in (
                "chunks are named as",
                "complement_counts declare",
                "set unknown=255 or unknown=null",
                "has no chunk, but s0 declares",
            )
        ), text
        # No valid volume is refused: its own files, all there, and values that say what they are.
        assert not (same_names(made) and made["lost"] == 0 and made["kind"] != "ids with 255"), text
    elif not same_names(made) and made["lost"] == 0:
        there = made["data"] if made["level"] == 0 else coarse(made["data"])
        assert not there.any(), "files under other names were read as the fill value"


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(volumes())
def test_many_more_conventions(made):
    test_a_sample_is_right_or_setup_is_an_error.hypothesis.inner_test(made)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions_match_their_names(tmp_path, convention):
    zarr_format, names = CONVENTIONS[convention]
    path = write_image(tmp_path / "v", np.ones((8, 8, 8), "u1"), zarr_format=zarr_format, chunk_key_encoding=names)
    first = {"v2 flat": "0.0.0", "v2 nested": "0/0/0", "v3": "c/0/0/0", "v3 as v2": "0/0/0"}[convention]
    assert (path / "s0" / first).is_file()
    assert json.loads(metadata_file(path, zarr_format).read_text())["zarr_format"] == zarr_format
