"""The root group of an output, which lists its images, so that viewers that open the root find them.

OME-NGFF has one layout for several images in a container, ``bioformats2raw.layout`` 3: the group ``OME`` lists their
paths, and describes them as OME-XML in the same order. See https://ngff.openmicroscopy.org/0.4/#bf2raw.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import zarr

from cellmap_lightning.geometry.lattice import Lattice
from cellmap_lightning.io.object_folder import OutputPath, zarr_location
from cellmap_lightning.io.store import LISTING
from cellmap_lightning.io.writer import ZarrFormat, write_group
from cellmap_lightning.prediction.durable import write_bytes

_SCHEMA = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_INSTANCE = "http://www.w3.org/2001/XMLSchema-instance"
#: Names of types in OME-XML, which has none for float16.
_TYPES = {"float16": "float", "float32": "float", "float64": "double"}


def write_container(
    path: OutputPath,
    images: Sequence[str],
    lattice: Lattice,
    dtype: np.dtype[Any],
    attributes: Mapping[str, Any],
    zarr_format: ZarrFormat = 2,
) -> None:
    """Write the metadata of a group of images with the same voxels, and consolidate all metadata in it.

    Args:
        path: folder of the group.
        images: names of the images in it, which must exist.
        lattice: voxels of the images at full resolution.
        dtype: type of a voxel.
        attributes: further attributes of the group.
        zarr_format: 2 for OME-NGFF 0.4, 3 for 0.5.
    """
    series: dict[str, Any] = {"series": list(images)}
    layout: dict[str, Any] = {"bioformats2raw.layout": 3}
    if zarr_format == 3:
        series, layout = {"ome": {"version": "0.5", **series}}, {"ome": {"version": "0.5", **layout}}
    write_group(path / LISTING, series, zarr_format)
    write_bytes(path / LISTING / "METADATA.ome.xml", ome_xml(images, lattice, dtype))
    write_group(path, {**attributes, **layout}, zarr_format)
    with warnings.catch_warnings():
        # zarr-python warns about the XML file, which is no Zarr node, when it lists the group without consolidated
        # metadata, and about consolidated metadata in Zarr v3, which other programs may ignore.
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(zarr_location(path), zarr_format=zarr_format)


def ome_xml(images: Sequence[str], lattice: Lattice, dtype: np.dtype[Any]) -> bytes:
    """Return OME-XML that describes images with the same voxels.

    The ID of an image is ``Image:<path>``: napari-ome-zarr reads the path from it.
    """
    root = ET.Element(
        "OME",
        {
            "xmlns": _SCHEMA,
            "xmlns:xsi": _INSTANCE,
            "xsi:schemaLocation": f"{_SCHEMA} {_SCHEMA}/ome.xsd",
            "Creator": "cellmap-lightning",
        },
    )
    sizes = {"SizeC": "1", "SizeT": "1"}
    for axis, count, step in zip("ZYX", lattice.shape, lattice.step, strict=True):
        sizes |= {f"Size{axis}": str(count), f"PhysicalSize{axis}": str(float(step)), f"PhysicalSize{axis}Unit": "nm"}
    for name in images:
        image = ET.SubElement(root, "Image", {"ID": f"Image:{name}", "Name": name})
        about = {"ID": f"Pixels:{name}", "DimensionOrder": "XYZCT", "Type": _TYPES.get(dtype.name, dtype.name)}
        pixels = ET.SubElement(image, "Pixels", about | sizes)
        channel = {"ID": f"Channel:{name}:0", "Name": name, "SamplesPerPixel": "1"}
        ET.SubElement(pixels, "Channel", channel)
        ET.SubElement(pixels, "MetadataOnly")
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'.encode()
