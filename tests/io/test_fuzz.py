"""Any metadata and any CSV: a valid description, or an error of our own; never another exception, nor much memory."""

import copy
import json
import tracemalloc

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.io.ngff import read_encoding, read_multiscale
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from cellmap_lightning.splits.entries import read_csv

SPEC = {"shape": [4, 4, 4], "scale": [4, 4, 4]}
#: Bytes that reading metadata may take.
MOST_BYTES = 64 << 20

NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, 1e308, 5e-324])
)
WORDS = ["z", "../..", "|O", "scale", "<u2"]
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(WORDS)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


def write(path, zarr_format):
    """An image with an annotation, as small as can be, and its JSON files."""
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    more = {"dimension_names": list("zyx")} if zarr_format == 3 else {}
    array = group.create_array("s0", shape=(8, 8, 8), dtype="uint8", chunks=(4, 4, 4), **more)
    array[...] = np.ones((8, 8, 8), np.uint8)
    kind = {"type": "semantic_segmentation", "encoding": {"absent": 0, "unknown": 255}}
    note = {"cellmap": {"annotation": {"annotation_type": kind, "complement_counts": {"absent": 3, "unknown": 0}}}}
    array.attrs.update(note)
    steps = [{"type": "scale", "scale": [4, 4, 4]}, {"type": "translation", "translation": [2, 2, 2]}]
    image = {
        "version": "0.4", "axes": [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"],
        "datasets": [{"path": "s0", "coordinateTransformations": steps}],
    }  # fmt: skip
    group.attrs.update({"ome": {"multiscales": [image]}} if zarr_format == 3 else {"multiscales": [image]})
    return sorted(p for p in path.rglob("*") if p.name in ("zarr.json", ".zattrs", ".zarray"))


@pytest.fixture(scope="module", params=[2, 3])
def image(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "crop1" / "mito"
    files = write(path, request.param)
    return path, {file: json.loads(file.read_text()) for file in files}


def places(value, at=()):
    """Ways to every value inside a JSON value."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


def changed(content, at, new):
    """The content with one value replaced, or removed."""
    if not at:
        return new
    found = copy.deepcopy(content)
    inner = found
    for key in at[:-1]:
        inner = inner[key]
    if new is REMOVED:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return found


REMOVED = object()


def look(path):
    """All that setup reads, and a sample."""
    found = read_multiscale(path)
    for level in found.present:
        _ = level.lattice, read_encoding(found, level)
    with CellMapDataset(
        path,
        f"{path.parent}/[{path.name}]",
        [path.name],
        {"raw": SPEC},
        {"labels": SPEC},
        read=ReadOptions(pad=True, cache="memory", read_attempts=1, read_timeout=30.0, max_upsampling=1e12),
    ) as data:
        _ = data.class_counts
        data[0]


def check(path):
    tracemalloc.start()
    try:
        look(path)
    except CellMapError:
        pass
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < MOST_BYTES


def try_metadata(image, data):
    path, contents = image
    file = data.draw(st.sampled_from(list(contents)))
    content = contents[file]
    at = data.draw(st.sampled_from(list(places(content))))
    new = data.draw(st.one_of(JSON, st.just(REMOVED)))
    try:
        file.write_text("" if not at and new is REMOVED else json.dumps(changed(content, at, new)))
        check(path)
    finally:
        file.write_text(json.dumps(content))


def try_bytes(image, file, content):
    path, contents = image
    file = sorted(contents)[file % len(contents)]
    try:
        file.write_bytes(content)
        check(path)
    finally:
        file.write_text(json.dumps(contents[file]))


def try_csv(tmp_path, content):
    file = tmp_path / "crops.csv"
    file.write_bytes(content)
    try:
        read_csv(file)
        split = CellMapDataSplit(file, classes=["mito"], input_arrays={"raw": SPEC}, target_arrays={"labels": SPEC})
        for name in split.entries:
            split[name].close()
    except CellMapError:
        pass


CELLS = st.one_of(
    st.sampled_from(["train", "validate", "usage", "weight", "a[mito]", "x.zarr", "[", "]", "#", '"', ""]),
    st.text(max_size=6),
)
ROWS = st.lists(st.lists(CELLS, max_size=6).map(",".join), max_size=4)
CSVS = st.one_of(st.binary(max_size=60), ROWS.map(lambda rows: "\n".join(rows).encode(errors="replace")))
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
FEW, MANY = settings(max_examples=60, derandomize=True, **QUIET), settings(max_examples=1500, **QUIET)
pytestmark = pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning", "ignore:.*overflow.*:RuntimeWarning")


@FEW
@given(data=st.data())
def test_any_value_in_the_metadata(image, data):
    try_metadata(image, data)


@FEW
@given(file=st.integers(0, 9), content=st.binary(max_size=40))
def test_any_bytes_as_metadata(image, file, content):
    try_bytes(image, file, content)


@FEW
@given(content=CSVS)
def test_any_csv(tmp_path, content):
    try_csv(tmp_path, content)


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_any_value_in_the_metadata_at_length(image, data):
    try_metadata(image, data)


@pytest.mark.slow
@MANY
@given(content=CSVS)
def test_any_csv_at_length(tmp_path, content):
    try_csv(tmp_path, content)


def test_metadata_nested_without_end_is_refused(image):
    try_bytes(image, 0, b"[" * 100_000)
    try_bytes(image, 0, b'{"a":' * 100_000)
    try_bytes(image, 0, b'{"multiscales": ' + b"9" * 10_000 + b"}")
