"""Datasets of the synthetic volume whose patches are copied, resampled, or both."""

from cellmap_lightning import CellMapMultiDataset
from cellmap_lightning.loading.resident_reader import ResidentReader
from cellmap_lightning.resident.device_cache import DeviceCache
from tests.conftest import CLASSES
from tests.make import make_dataset

ANNOTATED = {"crop1": ["mito", "er"], "crop2": CLASSES, "crop3": CLASSES}
MIRROR = {"mirror": {"axes": {"x": 0.5, "y": 0.5, "z": 0.5}}, "transpose": {"axes": ["x", "y"]}}
STORED, COARSE, BETWEEN = [5.24, 4, 4], [10.48, 8, 8], [9, 7.1, 11.3]
ANY = {**MIRROR, "rotate": {"axes": {axis: [-180, 180] for axis in "zyx"}}}
SLIP = {"slip": {"probability": 0.3, "max_shift": 16, "thickness": 10.48}}
MISALIGN = {"misalign": {"probability": 0.3, "max_shift": 16, "thickness": 10.48, "rotate": 4}}
ELASTIC = {"elastic": {"spacing": 40, "magnitude": 12}}
WARP = ELASTIC | SLIP | MISALIGN
#: Voxel size and spatial augmentation.
SETS = {
    "boxes of a level": (COARSE, MIRROR),
    "boxes of resampled voxels": (BETWEEN, MIRROR),
    "rotated about z": (STORED, {**MIRROR, "rotate": {"axes": {"z": [-180, 180]}}}),
    "rotated by any angle": (STORED, ANY),
    "rotated and averaged": (BETWEEN, ANY),
    "averaged about z": (BETWEEN, {"rotate": {"axes": {"z": [-180, 180]}}}),
    "elastic": (STORED, ELASTIC),
    "elastic and averaged": (BETWEEN, ANY | ELASTIC),
    "displaced sections": (STORED, SLIP | MISALIGN),
    "displaced sections, rotated": (STORED, ANY | SLIP | MISALIGN),
    "quarter turns": (STORED, {"rotate": {"axes": {"z": [90, 90], "x": [90, 90]}}}),
}
#: Also affine, and a displacement, which is evaluated on the host.
ZOOMED = {"zoom": [0.7, 1.4]}
SHEARED = {"zoom": {"axes": {"y": [0.8, 1.6]}}, "shear": {"axes": {"zx": [-0.3, 0.3]}}}
SETS |= {
    "zoomed": (STORED, ZOOMED),
    "zoomed and sheared": (COARSE, SHEARED),
    "deformed": (STORED, {"elastic": {"spacing": 60, "magnitude": 4}}),
}
KINDS = {"binary": {}, "numbers": {"kind": "labels"}, "ids": {"kind": "instances"}, "stored": {"kind": "ids"}}
COMPUTED = {"pairs": {"kind": "affinities", "offsets": [[1, 0, 0]]}, "near": {"kind": "sdt", "nm": 30}}


def open_set(volume, name, shape=(6, 15, 17), kinds=KINDS, train=True, cache="memory", threads=1, **more):
    """Three crops, with a target of each kind."""
    scale, spatial = SETS[name]
    array = {"shape": list(shape), "scale": scale}
    return CellMapMultiDataset(
        [
            make_dataset(
                volume.raw_path, f"{volume.path}/recon-1/labels/groundtruth/{crop}/[{','.join(classes)}]", CLASSES,
                {"raw": array}, {target: array | kind for target, kind in kinds.items()}, spatial if train else None,
                train, too_coarse="upsample", pad=True, cache=cache, max_workers=threads, **more,
            )
            for crop, classes in ANNOTATED.items()
        ]
    )  # fmt: skip


def reader_of(dataset, budget=1 << 30, **more):
    """A reader of a cache without a limit that counts, on the CPU."""
    return ResidentReader(dataset, DeviceCache("cpu", budget, **more))


def finished(dataset, reader, draws):
    """A batch as the reader delivers it, finished."""
    batch = reader.read(draws)
    batch.layout = dataset.layout
    return batch.finish()


def described(batch):
    """The number of samples of each array that are gathered."""
    return {name: len(rows.described) for name, rows in batch._arrays.items()}
