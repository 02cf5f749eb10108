"""The public conformance tests, run on each format of this package."""

from functools import partial

from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.testing import FormatConformance
from tests.io.formats import writers

#: Voxel size for formats that store none.
SIZE = Overrides(voxel_size=(8.0, 4.0, 4.0))


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
