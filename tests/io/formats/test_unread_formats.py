"""Files of formats that are not read: the error says so, with the way to one that is."""

import numpy as np
import pytest
from PIL import Image

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.images import read_image


@pytest.mark.parametrize(
    ("name", "suffix", "remedy"),
    [
        ("v.npz", ".npz", "save one of them with np.save as .npy"), ("v.nii.gz", ".nii.gz", "to TIFF with Fiji"),
        ("v.CZI", ".czi", "bioformats2raw"), ("v.lif", ".lif", "bioformats2raw"), ("v.nd2", ".nd2", "bioformats2raw"),
        ("v.png", ".png", "give the folder of its sections"), ("v.xyz", ".xyz", "convert it to one of these"),
        ("volume", "", "convert it to one of these"),
    ],
)  # fmt: skip
def test_files_of_other_formats(tmp_path, name, suffix, remedy):
    path = tmp_path / name
    if suffix == ".npz":
        np.savez(path, raw=np.zeros((4, 4, 4), np.uint8))
    elif suffix == ".png":
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    else:
        path.write_bytes(b"\0" * 100)
    with pytest.raises(MetadataError) as e:
        read_image(str(path))
    kind = f"files with the suffix {suffix}" if suffix else "files without a suffix"
    assert f"{path}: {kind} are not read; " in str(e.value)
    assert remedy in str(e.value)
    assert "HDF5, TIFF" in str(e.value)
    assert "multiscales" not in str(e.value)


@pytest.mark.parametrize("names", [[], ["a.txt"], ["a.npz", "b.npz"]])
def test_folders_without_an_image_are_no_files(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(MetadataError, match="holds no OME-NGFF multiscale image"):
        read_image(str(tmp_path))
