"""Several images of one class in a crop: an error that names them, and no silent choice."""

import numpy as np
import pytest
import tifffile

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.io.writer import write_multiscale

VOXELS = (np.random.default_rng(0).random((16, 16, 16)) < 0.3).astype(np.uint8)


def write(folder, name):
    path = folder / name
    if path.suffix == ".npy":
        np.save(path, VOXELS)
    elif path.suffix.lower() in (".tif", ".tiff"):
        tifffile.imwrite(path, VOXELS, photometric="minisblack")
    elif path.suffix == ".h5":
        path.write_bytes(b"")
    else:
        write_multiscale(path, VOXELS, scale=(8, 8, 8), translation=(0, 0, 0))


def setup(folder, target, classes=("mito",)):
    if not (folder / "raw").exists():
        write(folder, "raw")
    patch = {"shape": [8, 8, 8], "scale": [8, 8, 8]}
    entry = {"raw": str(folder / "raw"), "gt": target, "voxel_size": {"gt": [8, 8, 8]}}
    with CellMapDataModule(
        classes=list(classes), input_arrays={"raw": patch}, target_arrays={"labels": patch},
        datasets={"train": [entry]}, batch_size=1, batches_per_epoch=1,
    ) as data:  # fmt: skip
        data.setup("fit")
        return len(data.train_dataset)


@pytest.mark.parametrize(
    "names",
    [
        ("mito", "mito.tif"), ("mito.npy", "mito.tif"), ("mito.tif", "mito.tiff"), ("mito.TIF", "mito.tif"),
        ("mito", "mito.h5"),
    ],
)  # fmt: skip
def test_several_images_of_a_class(tmp_path, names):
    crop = tmp_path / "crop1"
    crop.mkdir()
    for name in names:
        write(crop, name)
    write(crop, "er.tif")
    with pytest.raises(CellMapError) as e:
        setup(tmp_path, f"{crop}/[mito,er]")
    assert f"{crop} has {' and '.join(names)}, each of which may be the class 'mito'" in str(e.value)
    assert "move all but one elsewhere" in str(e.value)
    assert setup(tmp_path, f"{crop}/[er]", ["er"])


@pytest.mark.parametrize("name", ["mito", "mito.npy", "mito.tif"])
@pytest.mark.parametrize("other", ["mito.txt", "mito2.tif", "mito.ome.tif", "mito.json"])
def test_other_files_beside_a_class(tmp_path, name, other):
    (tmp_path / "crop1").mkdir()
    write(tmp_path / "crop1", name)
    (tmp_path / "crop1" / other).write_text("x")
    assert setup(tmp_path, f"{tmp_path}/crop1/[mito]")


@pytest.mark.parametrize("names", [("em.npy", "em.tif"), ("em.tif", "em.tiff"), ("em.h5", "em.npy")])
def test_a_path_without_a_suffix(tmp_path, names):
    """Only one that exists as it is given is unambiguous."""
    for name in names:
        write(tmp_path, name)
    with pytest.raises(CellMapError, match=rf"has {names[0]} and {names[1]}, each of which may be meant"):
        read_image(str(tmp_path / "em"), Overrides(voxel_size=(8, 8, 8)))
    write(tmp_path, "em")
    assert read_image(str(tmp_path / "em")).finest.array.shape == VOXELS.shape
