"""Packages of bioimage.io: their own library loads and tests them."""

import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import yaml

from cellmap_lightning.errors import (
    CellMapFileExistsError,
    CellMapFileNotFoundError,
    CellMapTypeError,
    CellMapValueError,
)
from cellmap_lightning.export.bioimageio import PackageOptions
from cellmap_lightning.export.targets import export_model
from cellmap_lightning.export.trained_model import restore_model
from cellmap_lightning.transforms.normalization import Normalize

OPTIONS = PackageOptions(authors=["Jane Doe", {"name": "A. B.", "affiliation": "C"}], license="CC-BY-4.0")

CHECK = """
import sys
from bioimageio.core import test_model
summary = test_model(sys.argv[1], devices=["cpu"])
print(summary.status)
sys.exit(0 if summary.status == "passed" else summary.display())
"""


def package(save, path, **changes):
    export_model(restore_model(save(**changes)), "bioimageio", path, package=OPTIONS)
    return zipfile.ZipFile(path)


def test_weights_and_preprocessing_give_the_test_output(save, tmp_path):
    with package(save, tmp_path / "mito.zip") as files:
        rdf = yaml.safe_load(files.read("rdf.yaml"))
        (tmp_path / "model.ts").write_bytes(files.read(rdf["weights"]["torchscript"]["source"]))
        given, expected = (np.load(io.BytesIO(files.read(f"test_{name}.npy"))) for name in ("input", "output"))
        readme = files.read("README.md").decode()
    (raw,), (prediction,) = rdf["inputs"], rdf["outputs"]
    assert given.dtype == np.uint8
    scaling = raw["preprocessing"][1]["kwargs"]
    x = torch.from_numpy(given.astype(np.float32) * scaling["gain"] + scaling["offset"]).float()
    output = torch.jit.load(str(tmp_path / "model.ts"))(x)
    np.testing.assert_allclose(output.detach().numpy(), expected, atol=1e-5)
    assert [axis.get("scale") for axis in raw["axes"]] == [None, None, 16, 8, 8]
    assert prediction["axes"][1]["channel_names"] == ["mito", "er"]
    assert "(stored - 210) * -0.005" in readme


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rule": Normalize("zscore")},
        {"target": {"kind": "affinities", "offsets": [[1, 0, 0]]}, "classes": ("mito 1", "er")},
    ],
    ids=["affine", "z-score", "affinities"],
)
def test_the_library_of_bioimageio_accepts_it(save, tmp_path, changes):
    pytest.importorskip("bioimageio.core")
    package(save, tmp_path / "mito.zip", **changes).close()
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(tmp_path / "mito.zip")], capture_output=True, text=True, timeout=300,
        check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"authors": "Jane"}, CellMapTypeError, "authors must be a list of names"),
        ({"authors": [{"affiliation": "C"}]}, CellMapTypeError, "authors must be a list of names"),
        ({"cite": [{"text": "A paper"}]}, CellMapTypeError, "cite must be a list of"),
        ({"cover": "nowhere.png"}, CellMapFileNotFoundError, r"cover=nowhere\.png: there is no such file"),
    ],
)
def test_invalid_options(options, error, match):
    with pytest.raises(error, match=match):
        PackageOptions(**options)


def test_a_package_needs_authors_and_a_zip_file(save, tmp_path):
    model = restore_model(save())
    with pytest.raises(CellMapValueError, match="to=bioimageio needs authors"):
        export_model(model, "bioimageio", tmp_path / "mito.zip")
    with pytest.raises(CellMapValueError, match=r"must end in \.zip for to=bioimageio"):
        export_model(model, "bioimageio", tmp_path / "mito", package=OPTIONS)
    with pytest.raises(CellMapValueError, match="must be a folder"):
        export_model(model, "torchscript", tmp_path / "mito.zip")
    assert [p.name for p in tmp_path.iterdir()] == ["best.ckpt"]


def test_only_packages_are_replaced(save, tmp_path):
    model = restore_model(save())
    for name in ("text.zip", "data.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as other:
            other.writestr("data.csv", "1")
    (tmp_path / "text.zip").write_text("no zip file")
    for name in ("text.zip", "data.zip"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(CellMapFileExistsError, match="exists and is not an export"):
            export_model(model, "bioimageio", tmp_path / name, overwrite=True, package=OPTIONS)
        assert (tmp_path / name).read_bytes() == before
    package(save, tmp_path / "mito.zip").close()
    with pytest.raises(CellMapFileExistsError, match="set overwrite=true"):
        package(save, tmp_path / "mito.zip")
    export_model(model, "bioimageio", tmp_path / "mito.zip", overwrite=True, package=OPTIONS)
