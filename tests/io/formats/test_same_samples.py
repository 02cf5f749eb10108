"""One volume in every format: the same samples, facts and predictions' input, with labels in the format of raw."""

import h5py
import numpy as np
import pytest

from cellmap_lightning import CellMapDataLoader, CellMapDataset
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.inspection.facts import read_crop_facts
from cellmap_lightning.splits.entries import read_mapping
from tests.io.formats import writers

SHAPE = {"shape": [8, 16, 16], "scale": [8, 4, 4]}
GEOMETRY = {"voxel_size": [8, 4, 4], "translation": [0, 0, 0]}


def hdf5_crop(folder, arrays):
    with h5py.File(folder / "crop.h5", "w") as file:
        for name, voxels in arrays.items():
            file.create_dataset(f"labels/{name}", data=voxels, chunks=(8, 16, 16), compression="gzip")
    return folder / "crop.h5" / "labels"


def crop_of(writer):
    """Return a function that writes each class beside the others, as a file or folder with its name."""

    def write(folder, arrays):
        for name, voxels in arrays.items():
            (folder / "parts" / name).mkdir(parents=True)
            path = writer(folder / "parts" / name, voxels)
            (folder / "crop").mkdir(exist_ok=True)
            path.rename(folder / "crop" / f"{name}{path.suffix if path.is_file() else ''}")
        return folder / "crop"

    return write


FORMATS = {
    "zarr": (writers.zarr_array, crop_of(writers.zarr_array)),
    "npy": (writers.npy, crop_of(writers.npy)),
    "hdf5": (writers.hdf5, hdf5_crop),
    "tiff": (writers.tiff, crop_of(writers.tiff)),
    "ome-tiff": (writers.ome_tiff, crop_of(writers.tiff)),
    "png": (writers.slices, crop_of(writers.slices)),
    "n5": (writers.n5, crop_of(writers.n5)),
    "precomputed": (writers.precomputed, crop_of(writers.precomputed)),
    "mixed": (writers.precomputed, crop_of(writers.tiff)),
}


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    raw = rng.integers(1, 255, (32, 48, 64)).astype(np.uint8)
    return raw, {name: (rng.random(raw.shape) < 0.3).astype(np.uint8) for name in ("mito", "er")}


@pytest.fixture
def written(request, tmp_path, arrays):
    raw, labels = arrays
    write, write_crop = FORMATS[request.param]
    (tmp_path / "raw").mkdir()
    (tmp_path / "gt").mkdir()
    return str(write(tmp_path / "raw", raw)), f"{write_crop(tmp_path / 'gt', labels)}/[mito,er]"


@pytest.mark.parametrize("written", FORMATS, indirect=True)
@pytest.mark.parametrize("cache", ["none", "disk"])
def test_samples_are_the_voxels(written, arrays, cache):
    raw, labels = arrays
    options = ReadOptions(**GEOMETRY, cache=cache)
    with CellMapDataset(*written, ["mito", "er"], {"raw": SHAPE}, {"labels": SHAPE}, read=options) as dataset:
        for index in (0, len(dataset) // 2, len(dataset) - 1):
            center = [dataset.get_center(index)[axis] for axis in "zyx"]
            start = np.rint(np.divide(center, (8, 4, 4)) - (np.array([8, 16, 16]) - 1) / 2).astype(int)
            box = tuple(slice(a, a + n) for a, n in zip(start, (8, 16, 16), strict=True))
            sample = dataset[index]
            np.testing.assert_allclose(sample["raw"][0].numpy(), raw[box] / np.float32(255), rtol=1e-6)
            for number, name in enumerate(("mito", "er")):
                np.testing.assert_array_equal(sample["labels"][number].numpy(), labels[name][box])


@pytest.mark.parametrize("written", FORMATS, indirect=True)
def test_facts(written, arrays):
    _, labels = arrays
    [entry] = read_mapping({"train": [{"raw": written[0], "gt": written[1], **GEOMETRY}]})["train"]
    [facts] = read_crop_facts([("train", entry)])
    assert facts.wrong is None
    assert facts.levels[0].shape == labels["mito"].shape
    assert facts.off == (0, 0, 0)
    assert {name: of_class.wrong for name, of_class in facts.classes.items()} == {"mito": None, "er": None}
    assert {name: of_class.scale for name, of_class in facts.classes.items()} == {"mito": (8, 4, 4), "er": (8, 4, 4)}


@pytest.mark.parametrize(
    "written", ["hdf5", "tiff", "n5", pytest.param("precomputed", marks=pytest.mark.slow)], indirect=True
)
def test_worker_processes(written, arrays):
    options = ReadOptions(**GEOMETRY)
    with CellMapDataset(*written, ["mito", "er"], {"raw": SHAPE}, {"labels": SHAPE}, read=options) as dataset:
        loader = CellMapDataLoader(dataset, batch_size=4, num_workers=1, is_train=False)
        try:
            batch = next(iter(loader))
        finally:
            loader.close()
        expected = np.stack([dataset[i]["raw"] for i in batch["idx"].tolist()])
    np.testing.assert_array_equal(batch["raw"].numpy(), expected)
