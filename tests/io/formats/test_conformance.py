"""The public conformance tests, run on each format of this package."""

from functools import partial

from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.testing import FormatConformance
from tests.io.formats import writers

#: Voxel size for formats that store none.
SIZE = Overrides(voxel_size=(8.0, 4.0, 4.0))
BLOSC = {"type": "blosc", "cname": "zstd", "clevel": 3, "shuffle": 1}
SEGMENTATION = {"encoding": "compressed_segmentation", "compressed_segmentation_block_size": [8, 8, 8]}
SHARDS = {
    "@type": "neuroglancer_uint64_sharded_v1", "preshift_bits": 1, "minishard_bits": 1, "shard_bits": 1,
    "hash": "identity",
}  # fmt: skip


class TestNpy(FormatConformance):
    overrides = SIZE
    write = staticmethod(writers.npy)


class TestNpyFortran(FormatConformance):
    overrides = SIZE
    dtype = "float32"
    write = staticmethod(writers.fortran)


class TestNpyBigEndian(FormatConformance):
    overrides = SIZE
    dtype = "uint16"

    def write(self, path, voxels):
        return writers.npy(path, voxels.astype(">u2"))


class TestHdf5(FormatConformance):
    write = staticmethod(writers.hdf5)


class TestHdf5Chunks(FormatConformance):
    write = staticmethod(partial(writers.hdf5, chunks=(8, 16, 16), compression="gzip"))


class TestTiff(FormatConformance):
    overrides = SIZE
    write = staticmethod(writers.tiff)


class TestTiffBigEndian(FormatConformance):
    overrides = SIZE
    dtype = "uint16"
    write = staticmethod(partial(writers.tiff, byteorder=">"))


class TestTiffStrips(FormatConformance):
    overrides = SIZE
    dtype = "uint16"
    write = staticmethod(partial(writers.tiff, compression="lzw", rowsperstrip=16, byteorder=">"))


class TestTiffTiles(FormatConformance):
    overrides = SIZE
    dtype = "float32"
    write = staticmethod(partial(writers.tiff, compression="zlib", predictor=3, tile=(32, 48)))


class TestOmeTiff(FormatConformance):
    write = staticmethod(writers.ome_tiff)


class TestOmePyramid(FormatConformance):
    write = staticmethod(writers.ome_pyramid)


class TestImageJ(FormatConformance):
    write = staticmethod(writers.imagej)


class TestPngSlices(FormatConformance):
    overrides = SIZE
    write = staticmethod(writers.slices)


class TestPngSlices16(FormatConformance):
    overrides = SIZE
    dtype = "uint16"
    write = staticmethod(writers.slices)


class TestTiffSlices(FormatConformance):
    overrides = SIZE
    dtype = "uint16"
    write = staticmethod(partial(writers.slices, suffix=".tif"))


class TestMrc(FormatConformance):
    dtype = "int16"
    write = staticmethod(writers.mrc)


class TestN5(FormatConformance):
    write = staticmethod(writers.n5)


class TestN5Raw(FormatConformance):
    dtype = "uint16"
    write = staticmethod(partial(writers.n5, compression={"type": "raw"}))


class TestN5Zlib(FormatConformance):
    write = staticmethod(partial(writers.n5, compression={"type": "gzip", "useZlib": True}))


class TestN5Blosc(FormatConformance):
    dtype = "float32"
    write = staticmethod(partial(writers.n5, compression=BLOSC))


class TestN5Bzip2(FormatConformance):
    dtype = "int16"
    write = staticmethod(partial(writers.n5, compression={"type": "bzip2"}))


class TestN5Xz(FormatConformance):
    write = staticmethod(partial(writers.n5, compression={"type": "xz"}))


class TestN5Zstd(FormatConformance):
    write = staticmethod(partial(writers.n5, compression={"type": "zstd"}))


class TestPrecomputed(FormatConformance):
    write = staticmethod(writers.precomputed)


class TestPrecomputedSegmentation(FormatConformance):
    dtype = "uint64"
    write = staticmethod(partial(writers.precomputed, offset=(5, 10, 20), **SEGMENTATION))


class TestPrecomputedShards(FormatConformance):
    write = staticmethod(partial(writers.precomputed, sharding=SHARDS))
