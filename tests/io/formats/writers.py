"""Volumes in each format, written by the programs that define it."""

from typing import Any

import h5py
import imageio.v3 as imageio
import mrcfile
import numpy as np
import tensorstore
import tifffile
import zarr


def npy(path, voxels, size=(8, 4, 4)):
    np.save(path / "volume.npy", voxels)
    return path / "volume.npy"


def fortran(path, voxels, size=(8, 4, 4)):
    np.save(path / "volume.npy", np.asfortranarray(voxels))
    return path / "volume.npy"


def zarr_array(path, voxels, size=(8, 4, 4), zarr_format=2):
    array = zarr.create_array(
        path / "volume.zarr", shape=voxels.shape, chunks=(16, 16, 16), dtype=voxels.dtype, zarr_format=zarr_format
    )
    array[...] = voxels
    array.attrs.update({"resolution": list(size), "offset": [0, 0, 0]})
    return path / "volume.zarr"


def hdf5(path, voxels, size=(8, 4, 4), **options):
    with h5py.File(path / "volume.h5", "w") as file:
        dataset = file.create_dataset("volumes/raw", data=voxels, **options)
        dataset.attrs["resolution"] = size
        file.create_dataset("volumes/other", data=voxels[:2])
    return path / "volume.h5" / "volumes" / "raw"


def tiff(path, voxels, size=(8, 4, 4), name="volume.tif", **options):
    tifffile.imwrite(path / name, voxels, photometric="minisblack", **options)
    return path / name


def ome_tiff(path, voxels, size=(8, 4, 4), **options):
    z, y, x = (s / 1000 for s in size)
    metadata = {"axes": "ZYX", "PhysicalSizeX": x, "PhysicalSizeY": y, "PhysicalSizeZ": z}
    return tiff(path, voxels, size, "volume.ome.tif", ome=True, metadata=metadata, **options)


def ome_pyramid(path, voxels, size=(8, 4, 4)):
    """An OME-TIFF with two levels, the second one half as large along y and x."""
    z, y, x = (s / 1000 for s in size)
    metadata = {"axes": "ZYX", "PhysicalSizeX": x, "PhysicalSizeY": y, "PhysicalSizeZ": z}
    half = voxels.reshape(voxels.shape[0], voxels.shape[1] // 2, 2, voxels.shape[2] // 2, 2).mean((2, 4))
    with tifffile.TiffWriter(path / "volume.ome.tif", ome=True) as writer:
        options: dict[str, Any] = {"tile": (32, 32), "compression": "zlib", "photometric": "minisblack"}
        writer.write(voxels, subifds=1, metadata=metadata, **options)
        writer.write(half.astype(voxels.dtype), subfiletype=1, **options)
    return path / "volume.ome.tif"


def imagej(path, voxels, size=(8, 4, 4)):
    return tiff(
        path, voxels, imagej=True, resolution=(1000 / size[2], 1000 / size[1]),
        metadata={"axes": "ZYX", "spacing": size[0] / 1000, "unit": "um"},
    )  # fmt: skip


def slices(path, voxels, size=(8, 4, 4), suffix=".png"):
    for number, plane in enumerate(voxels, 8):
        file = path / f"section_{number}{suffix}"
        if suffix == ".png":
            imageio.imwrite(file, plane)
        else:
            tifffile.imwrite(file, plane, compression="zlib")
    return path


def mrc(path, voxels, size=(8, 4, 4)):
    with mrcfile.new(path / "volume.mrc") as file:
        file.set_data(voxels.astype(np.int16))
        file.voxel_size = tuple(10 * s for s in reversed(size))
    return path / "volume.mrc"


def n5(path, voxels, size=(8, 4, 4), compression=None, block=(32, 32, 16)):
    store = tensorstore.open(
        {
            "driver": "n5", "kvstore": {"driver": "file", "path": str(path / "volume.n5" / "raw")},
            "metadata": {
                "dimensions": list(voxels.shape[::-1]), "blockSize": list(block), "dataType": str(voxels.dtype),
                "compression": compression or {"type": "gzip"},
                "axes": ["x", "y", "z"], "units": ["nm"] * 3, "resolution": list(size[::-1]),
            },
        },
        create=True,
    ).result()  # fmt: skip
    store[...] = voxels.T
    return path / "volume.n5" / "raw"


def precomputed(path, voxels, size=(8, 4, 4), offset=(0, 0, 0), **scale):
    """A volume of Neuroglancer, with an offset in voxels (z, y, x)."""
    store = tensorstore.open(
        {
            "driver": "neuroglancer_precomputed", "kvstore": {"driver": "file", "path": str(path / "volume")},
            "multiscale_metadata": {"data_type": str(voxels.dtype), "num_channels": 1, "type": "image"},
            "scale_metadata": {
                "size": list(voxels.shape[::-1]), "resolution": list(size[::-1]), "voxel_offset": list(offset[::-1]),
                "chunk_size": [32, 32, 16], "encoding": "raw", **scale,
            },
        },
        create=True,
    ).result()  # fmt: skip
    store[..., 0] = voxels.T
    return path / "volume"
