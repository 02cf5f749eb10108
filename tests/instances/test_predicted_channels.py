"""Predictions of several channels, as ``cellmap-predict`` writes and describes them."""

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapError
from cellmap_lightning.instances.source import open_source
from cellmap_lightning.io.writer import write_group, write_multiscale

SHAPE = (6, 8, 10)
POSITION = {"scale": (8, 4, 4), "translation": (0, 0, 0)}
OFFSETS = [[1, 0, 0], [0, 1, 0], [0, 0, 6]]


def write(folder, name, values, **target):
    attributes = {"cellmap": {"prediction": {"class_name": name, "values": "scaled", "probability_1": 255}}}
    attributes["cellmap"]["prediction"]["target"] = {"class": "mito", **target}
    write_multiscale(folder / name, values, **POSITION, attributes=attributes)


@pytest.fixture
def affinities(tmp_path):
    """Affinities in the order of their names, which is not that of the numbers in them."""
    folder = tmp_path / "pred.zarr"
    write_group(folder)
    for number, (z, y, x) in enumerate(OFFSETS):
        values = np.full(SHAPE, 50 * (number + 1), np.uint8)
        write(folder, f"mito_affinity_{z}_{y}_{x}", values, kind="affinities", offset=[z, y, x], range=[0, 1])
    return folder


def test_channels_of_affinities_are_found_by_the_class(affinities):
    source = open_source(str(affinities), "mito")
    assert source.kind == "affinities"
    values = source.read((0, 0, 0), SHAPE)
    assert values.shape == (3, *SHAPE)
    by_offset = {offset: float(values[n, 0, 0, 0]) for n, offset in enumerate(source.offsets)}
    assert by_offset == pytest.approx({tuple(o): 50 * (n + 1) / 255 for n, o in enumerate(OFFSETS)})


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float16"])
def test_signed_distances_are_in_nm(tmp_path, dtype):
    folder = tmp_path / "pred.zarr"
    write_group(folder)
    distances = np.linspace(-1, 1, int(np.prod(SHAPE))).reshape(SHAPE)
    stored = np.rint((distances + 1) / 2 * 255).astype(np.uint8) if dtype == "uint8" else distances.astype(dtype)
    write(folder, "mito_sdt", stored, kind="sdt", nm=100.0, range=[-1, 1])
    source = open_source(str(folder), "mito")
    assert source.kind == "distance"
    np.testing.assert_allclose(source.read((0, 0, 0), SHAPE), distances * 100, atol=0.5)


def test_several_kinds_need_a_choice(affinities):
    write(affinities, "mito_sdt", np.zeros(SHAPE, np.float32), kind="sdt", nm=100.0, range=[-1, 1])
    with pytest.raises(CellMapError, match=r"'mito' was predicted in several kinds; choose kind=affinities \(.*sdt"):
        open_source(str(affinities), "mito")
    assert open_source(str(affinities), "mito", "distance").kind == "distance"
    assert len(open_source(str(affinities), "mito", "affinities").offsets) == 3


@pytest.mark.parametrize("name", ["er", "mitto"])
def test_a_class_that_was_not_predicted(affinities, name):
    with pytest.raises(CellMapError, match=f"it has no class '{name}'"):
        open_source(str(affinities), name)
