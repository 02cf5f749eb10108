"""Files of formats that are not read, with the way to one that is."""

from pathlib import Path

#: Programs that convert most formats of microscopes.
_BIOFORMATS = "convert it to OME-Zarr with bioformats2raw, or to OME-TIFF with Fiji (Bio-Formats)"
_MEDICAL = "convert it to TIFF with Fiji, or to .npy with the library that reads it"
_PICTURE = "give the folder of its sections, as TIFF or PNG files"
#: The remedy for suffixes in lower case; those of two parts before their last part.
_REMEDIES = {
    ".npz": "it is an archive of arrays: save one of them with np.save as .npy",
    ".nii.gz": _MEDICAL, ".nii": _MEDICAL, ".nrrd": _MEDICAL, ".nhdr": _MEDICAL, ".mha": _MEDICAL, ".mhd": _MEDICAL,
    ".am": _MEDICAL, ".mat": "save the array with np.save as .npy, after scipy.io.loadmat",
    ".czi": _BIOFORMATS, ".lif": _BIOFORMATS, ".nd2": _BIOFORMATS, ".lsm": _BIOFORMATS, ".oib": _BIOFORMATS,
    ".oif": _BIOFORMATS, ".vsi": _BIOFORMATS, ".dm3": _BIOFORMATS, ".dm4": _BIOFORMATS, ".ims": _BIOFORMATS,
    ".png": _PICTURE, ".jpg": _PICTURE, ".jpeg": _PICTURE, ".bmp": _PICTURE,
}  # fmt: skip
_READ = "OME-NGFF, Zarr, N5, Neuroglancer precomputed, HDF5, TIFF, folders of TIFF or PNG sections, MRC and .npy"


def unread_format(path: Path) -> str:
    """Return a sentence on a file of a format that is not read; empty for other paths.

    Args:
        path: a path that no format matches.
    """
    if not path.is_file():
        return ""
    name = path.name.lower()
    suffix = next((known for known in _REMEDIES if name.endswith(known)), path.suffix)
    if suffix in (".zip", ".ozx", ".json", ".zarray", ".zattrs", ".zgroup"):  # parts of Zarr volumes
        return ""
    kind = f"files with the suffix {suffix}" if suffix else "files without a suffix"
    remedy = _REMEDIES.get(suffix, "convert it to one of these")
    return f"{path}: {kind} are not read; {remedy}. Read are {_READ} (docs/formats.md)"
