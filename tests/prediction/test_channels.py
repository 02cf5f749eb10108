"""Predictions of affinities, distances and vectors: names, metadata and stored values of their channels."""

import lightning as L
import numpy as np
import pytest
import torch
import zarr
from torch import nn

from cellmap_lightning import CellMapDataModule, CellMapError
from cellmap_lightning.callbacks import make_prediction_writer
from cellmap_lightning.io.meanings import meaning_of
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.training.task import SegmentationTask

pytestmark = pytest.mark.usefixtures("quiet_lightning")

PATCH = {"shape": [16, 32, 32], "scale": [20.96, 16, 16]}
TARGETS = {
    "near": {**PATCH, "kind": "sdt", "nm": 60},
    "edges": {**PATCH, "kind": "affinities", "offsets": [[1, 0, 0], [0, -2, 0]]},
    "mask": PATCH,
}
NAMES = ["mito_sdt", "mito_affinity_1_0_0", "mito_affinity_0_-2_0", "mito"]


def predict(volume, output, names=("near", "edges", "mask"), **options):
    torch.manual_seed(0)
    network = nn.Conv3d(1, sum(2 if name == "edges" else 1 for name in names), 3, padding=1)
    nn.init.uniform_(network.weight, -2, 2)
    task = SegmentationTask(network, ["mito"], target_name=list(names))
    writer = make_prediction_writer(str(output), context=2, chunks=(16, 32, 32), levels=1, **options)
    with CellMapDataModule(
        classes=["mito"], input_arrays={"raw": PATCH}, target_arrays=TARGETS, batch_size=4,
        datasets={"predict": [{"raw": volume.raw_path}]},
    ) as data:  # fmt: skip
        L.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[writer],
        ).predict(task, data)  # fmt: skip
    return writer


def stored(output, name):
    return zarr.open_array(str(output / name / "s0"), mode="r")[...]


def test_channels_say_class_kind_and_offset(volume, tmp_path):
    writer = predict(volume, tmp_path / "bytes.zarr")
    assert writer.names == NAMES
    found = {
        name: zarr.open_group(str(writer.output / name), mode="r").attrs["cellmap"]["prediction"] for name in NAMES
    }
    assert found["mito_sdt"] == {
        "class_name": "mito_sdt", "values": "scaled", "probability_1": 255,
        "target": {"kind": "sdt", "nm": 60.0, "class": "mito", "range": [-1.0, 1.0]},
    }  # fmt: skip
    assert found["mito_affinity_0_-2_0"]["target"] == {
        "kind": "affinities", "class": "mito", "offset": [0, -2, 0], "offset_nm": [0.0, -32.0, 0.0],
        "range": [0.0, 1.0],
    }  # fmt: skip
    assert "target" not in found["mito"]


def test_signed_values_are_stored_as_bytes_and_as_floats(volume, tmp_path):
    scaled, floats, masks = (
        predict(volume, tmp_path / f"{dtype}.zarr", dtype=dtype).output for dtype in ("uint8", "float32", "labels")
    )
    values = stored(floats, "mito_sdt")
    assert values.min() < -0.2
    assert values.max() > 0.2
    np.testing.assert_allclose(stored(scaled, "mito_sdt") / 127.5 - 1, values, atol=1 / 255 + 1e-6)
    np.testing.assert_array_equal(stored(masks, "mito_sdt"), values >= 0)
    edges = stored(floats, "mito_affinity_1_0_0")
    assert 0 <= edges.min() < edges.max() <= 1
    np.testing.assert_allclose(stored(scaled, "mito_affinity_1_0_0") / 255, edges, atol=0.5 / 255 + 1e-6)
    # Distances are no probabilities: what reads predictions asks, rather than compare them with 0.5.
    assert meaning_of(read_multiscale(floats / "mito_affinity_1_0_0"), "a").kind == "probability"
    with pytest.raises(CellMapError, match="metadata do not record their meaning"):
        meaning_of(read_multiscale(floats / "mito_sdt"), "mito_sdt")


def test_a_part_of_the_channels_is_written(volume, tmp_path):
    writer = predict(volume, tmp_path / "part.zarr", only=["mito_sdt", "mito"], tta_flips="zyx")
    assert writer.names == ["mito_sdt", "mito"]
    groups = {path.name for path in writer.output.iterdir() if path.is_dir()}
    assert groups >= {"mito", "mito_sdt"}
    assert not groups & {"mito_affinity_1_0_0", "mito_affinity_0_-2_0"}


def test_directions_are_not_mirrored(volume, tmp_path):
    with pytest.raises(CellMapError, match=r"tta_flips=yx: mito_affinity_1_0_0, .* are of kind affinities, whose"):
        predict(volume, tmp_path / "flips.zarr", tta_flips="yx")


@pytest.mark.parametrize("classes", [["a", "b"], ["mito"], ["mito", "er", "pm"]])
def test_given_names_replace_the_descriptions(volume, tmp_path, classes):
    with pytest.raises(CellMapError, match=rf"must return {len(classes)} channels, one for each of .*, got 4"):
        predict(volume, tmp_path / "named.zarr", classes=classes)


def test_another_kind_is_another_prediction(volume, tmp_path):
    output = tmp_path / "once.zarr"
    predict(volume, output, ("near",), classes=["mito_sdt"], model_id="m")
    with pytest.raises(CellMapError, match="overwrite"):
        predict(volume, output, ("mask",), classes=["mito_sdt"], model_id="m")


class Odd(SegmentationTask):
    output_channels = "mine"


def test_an_attribute_of_user_code_is_ignored(volume, tmp_path):
    from cellmap_lightning.prediction.channels import described_channels

    assert described_channels(Odd(nn.Conv3d(1, 1, 1), ["mito"])) == {}
    assert described_channels(nn.Conv3d(1, 1, 1)) == {}
