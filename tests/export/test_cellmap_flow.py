"""Model folders of cellmap-flow. With ``CELLMAP_FLOW_LIBRARIES``, a folder with cellmap-models and funlib.geometry (and
cellmap-flow's ``load_py``, where it is there), their own loaders read them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.export.cellmap_flow import Cropped
from cellmap_lightning.export.targets import export_model
from cellmap_lightning.export.trained_model import restore_model
from tests.export.conftest import UNET

LIBRARIES = os.environ.get("CELLMAP_FLOW_LIBRARIES")

LOADERS = """
import sys
import numpy as np
import torch
from cellmap_models.model_export.cellmap_model import CellmapModel

folder = sys.argv[1]
model = CellmapModel(folder)
x, expected = (np.load(f"{folder}/test_{name}.npy") for name in ("input", "output"))
metadata = model.metadata
assert [*x.shape[2:]] == metadata.input_shape, metadata
assert [*expected.shape[1:]] == [metadata.out_channels, *metadata.output_shape], metadata
with torch.no_grad():
    np.testing.assert_allclose(model.ts_model(torch.from_numpy(x)), expected, atol=1e-5)
script = f"{folder}/cellmap_flow_script.py"
names = {"__file__": script}
exec(compile(open(script).read(), script, "exec"), names)
read, write = (np.array(names[n]) for n in ("read_shape", "write_shape"))
assert (read // np.array(names["input_voxel_size"])).tolist() == metadata.input_shape
assert (write // np.array(names["output_voxel_size"])).tolist() == metadata.output_shape
assert ((read - write) % 2 == 0).all()
with torch.no_grad():
    np.testing.assert_allclose(names["model"](torch.from_numpy(x)), expected, atol=1e-5)
"""


def test_the_output_lacks_the_halo(save, tmp_path):
    network = UNET | {"strides": [1], "num_res_units": 0, "norm": "BATCH"}
    model = restore_model(save(network, shape=[24, 24, 32]))
    card = export_model(model, "cellmap_flow", tmp_path / "flow")
    assert model.card.halo is not None
    margin = [min(h, n // 4) for h, n in zip(model.card.halo, (24, 24, 32), strict=True)]
    assert card.output_shape == tuple(n - 2 * m for n, m in zip((24, 24, 32), margin, strict=True))
    inner = tuple(slice(m, n - m) for m, n in zip(margin, (24, 24, 32), strict=True))
    expected = model.expected[:, :, *inner].numpy()
    np.testing.assert_allclose(np.load(tmp_path / "flow" / "test_output.npy"), expected, atol=1e-6)
    metadata = json.loads((tmp_path / "flow" / "metadata.json").read_text())
    assert metadata["output_shape"] == list(card.output_shape)
    assert metadata["input_voxel_size"] == [16, 8, 8]
    assert metadata["channels_names"] == ["mito", "er"]
    assert "MinMaxNormalizer(min_value=10, max_value=210, invert=True)" in metadata["description"]
    compile((tmp_path / "flow" / "cellmap_flow_script.py").read_text(), "script", "exec")


@pytest.mark.skipif(LIBRARIES is None, reason="CELLMAP_FLOW_LIBRARIES names no folder with cellmap-models")
def test_the_loaders_of_cellmap_flow_read_it(save, tmp_path):
    export_model(restore_model(save()), "cellmap_flow", tmp_path / "flow")
    path = os.pathsep.join([LIBRARIES, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", LOADERS, str(tmp_path / "flow")], capture_output=True, text=True, timeout=200,
        check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_cropping():
    x = torch.rand(2, 3, 8, 9, 10)
    assert torch.equal(Cropped(torch.nn.Identity(), (0, 1, 3))(x), x[:, :, :, 1:8, 3:7])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"network": UNET | {"spatial_dims": 2}, "shape": [16, 16]}, r"needs a network of volumes, got .*\[16, 16\]"),
        ({"network": UNET | {"spatial_dims": 2}, "shape": [1, 16, 16]}, "needs a network of volumes"),
        ({"scale": [10.48, 8, 8]}, r"needs voxel sizes in whole nm, got \[10.48, 8.0, 8.0\]"),
    ],
    ids=["slices", "one slice", "voxel size"],
)
def test_models_that_it_cannot_describe(save, tmp_path, changes, match):
    with pytest.raises(CellMapValueError, match=match):
        export_model(restore_model(save(**changes)), "cellmap_flow", tmp_path / "flow")
    assert not (tmp_path / "flow").exists()
