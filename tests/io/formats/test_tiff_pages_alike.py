"""TIFF pages that are not stored alike, or belong to several images: nothing is misread or dropped in silence."""

import numpy as np
import pytest
import tifffile

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.io.readers import open_reader

VOXELS = np.random.default_rng(0).integers(1, 255, (12, 32, 48)).astype(np.uint8)
SIZE = Overrides(voxel_size=(8, 8, 8))


def pages(path, planes, options=None, **of_all):
    """Write each plane as a page with its own tags; ``options`` maps numbers of pages to their own options."""
    with tifffile.TiffWriter(
        path, bigtiff=of_all.pop("bigtiff", False), byteorder=of_all.pop("byteorder", "<")
    ) as file:
        for number, plane in enumerate(planes):
            own = {"photometric": "minisblack", "contiguous": False, "metadata": None} | of_all
            file.write(plane, **own | (options or {}).get(number, {}))
    return path


def with_page(number, plane):
    return [*VOXELS[:number], plane, *VOXELS[number + 1 :]]


def refusal(path):
    with pytest.raises(MetadataError) as e:
        read_image(str(path), SIZE)
    assert str(e.value).startswith(str(path))
    return str(e.value)


def read(path):
    image = read_image(str(path), SIZE)
    level = image.finest
    return open_reader(level).read((0, 0, 0), level.lattice.shape), {note.kind: note.text for note in image.notes}


@pytest.mark.parametrize("number", [2, 5, 10, 11])
@pytest.mark.parametrize("dtype", [np.uint16, np.int8, np.float32])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}, {"bigtiff": True}, {"byteorder": ">"}]
)
def test_a_page_of_another_type(tmp_path, number, dtype, options):
    """tifffile decodes it with the type of the first page."""
    path = pages(tmp_path / "v.tif", with_page(number, VOXELS[number].astype(dtype)), **options)
    text = refusal(path)
    assert f"page {number} has shape [32, 48] and type {np.dtype(dtype).name}, and page 0 has shape" in text
    assert "and type uint8" in text


@pytest.mark.parametrize("number", [2, 5, 11])
@pytest.mark.parametrize("shape", [(31, 48), (32, 47), (33, 48)])
def test_a_page_of_another_size(tmp_path, number, shape):
    path = pages(tmp_path / "v.tif", with_page(number, np.zeros(shape, np.uint8)))
    assert f"page {number} has shape {list(shape)} and type uint8, and page 0 has shape [32, 48]" in refusal(path)


@pytest.mark.parametrize("first", [1, 7, 10])
def test_pages_that_change_their_size(tmp_path, first):
    """tifffile takes them for two images; the second one would be left out."""
    path = pages(tmp_path / "v.tif", [*VOXELS[:first], *VOXELS[first:, :, :47]])
    assert f"page {first} has shape [32, 47] and type uint8, and page 0 has shape [32, 48]" in refusal(path)


@pytest.mark.parametrize("number", [2, 5, 11])
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"compression": "zlib"}, "Compression 8"), ({"rowsperstrip": 5}, "RowsPerStrip 5"),
        ({"extratags": [(274, 3, 1, 4, True)]}, "Orientation 4"),
    ],
)  # fmt: skip
def test_a_page_that_is_stored_otherwise(tmp_path, number, options, name):
    path = pages(tmp_path / "v.tif", VOXELS, {number: options}, rowsperstrip=32)
    text = refusal(path)
    assert f"page {number} has {name}, and page 0 has" in text
    assert "store all pages alike" in text


@pytest.mark.parametrize(
    "options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}, {"bigtiff": True}, {"byteorder": ">"}]
)
def test_pages_that_are_alike_are_read(tmp_path, options):
    stored, notes = read(pages(tmp_path / "v.tif", VOXELS, **options))
    np.testing.assert_array_equal(stored, VOXELS)
    assert not notes


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}])
def test_pages_that_were_written_one_by_one_are_a_stack(tmp_path, options):
    with tifffile.TiffWriter(tmp_path / "v.tif") as file:
        for plane in VOXELS:
            file.write(plane, **options)
    np.testing.assert_array_equal(read(tmp_path / "v.tif")[0], VOXELS)
    with tifffile.TiffWriter(tmp_path / "w.tif") as file:
        for plane in with_page(5, VOXELS[5].astype(np.uint16)):
            file.write(plane, **options)
    assert "holds 12 images, 0: [32, 48] (yx), 1: " in refusal(tmp_path / "w.tif")


@pytest.mark.parametrize("step", [2, 3, 4])
@pytest.mark.parametrize("is_marked", [True, False])
def test_a_thumbnail_after_the_last_page(tmp_path, step, is_marked):
    """It is left out, with a warning where it is not marked as one."""
    options = {len(VOXELS): {"subfiletype": 1}} if is_marked else {}
    stored, notes = read(pages(tmp_path / "v.tif", [*VOXELS, VOXELS[0, ::step, ::step]], options))
    np.testing.assert_array_equal(stored, VOXELS)
    assert [*notes] == ([] if is_marked else ["thumbnail"])
    assert is_marked or "its last page (12)" in notes["thumbnail"]


def ome(path, *images):
    with tifffile.TiffWriter(path, ome=True) as file:
        for image in images:
            file.write(image, metadata={"axes": "ZYX"[-image.ndim :]}, photometric="minisblack")
    return path


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ([VOXELS[0, ::2, ::2], VOXELS], "holds 2 images, 0: [16, 24] (yx), 1: [12, 32, 48] (zyx)"),
        ([VOXELS, VOXELS[0, ::2]], "holds 2 images, 0: [12, 32, 48] (zyx), 1: [16, 48] (yx)"),
        ([VOXELS, VOXELS, VOXELS[:3]], "holds 3 images, 0: [12, 32, 48] (zyx), 1: [12, 32, 48] (zyx), 2: [3, 32, 48]"),
    ],
)
def test_several_images_in_an_ome_tiff(tmp_path, images, text):
    assert text in refusal(ome(tmp_path / "v.ome.tif", *images))


@pytest.mark.parametrize("count", [4, 11])
@pytest.mark.parametrize("options", [{"rowsperstrip": 32}, {"compression": "zlib"}])
def test_a_description_of_fewer_pages_than_are_stored(tmp_path, count, options):
    description = f"ImageJ=1.53t\nimages={count}\nslices={count}\nunit=nm\nspacing=8\n"
    path = pages(tmp_path / "v.tif", VOXELS, {0: {"description": description}}, **options)
    assert f"its description (imagej) names {count} of its 12 pages, the first other one is page {count}" in refusal(
        path
    )


@pytest.mark.parametrize("number", [2, 7, 11])
@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("BitsPerSample", 16, "shape [16, 24] and type uint16, and page 0 has shape [16, 24] and type uint8"),
        ("PhotometricInterpretation", 0, "PhotometricInterpretation 0, and page 0 has 1"),
        ("Compression", 8, "Compression 8, and page 0 has 1"),
    ],
)
def test_a_page_of_another_type_in_a_pyramid(tmp_path, number, name, value, text):
    """The pages of coarser levels are SubIFDs of those of the finest one."""
    half = VOXELS[:, ::2, ::2]
    with tifffile.TiffWriter(tmp_path / "v.ome.tif", ome=True) as file:
        options = {"tile": (16, 16), "photometric": "minisblack"}
        file.write(VOXELS, subifds=1, metadata={"axes": "ZYX"}, **options)
        file.write(half, subfiletype=1, **options)
    np.testing.assert_array_equal(read(tmp_path / "v.ome.tif")[0], VOXELS)
    content = bytearray((tmp_path / "v.ome.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "v.ome.tif") as file:
        place = file.series[0].levels[1].pages[number].aspage().tags[name].valueoffset
    content[place] = value
    (tmp_path / "v.ome.tif").write_bytes(content)
    assert f"page {number} has {text}" in refusal(tmp_path / "v.ome.tif")


def ome_with(path, data, stored, declared=16):
    """Write an OME-TIFF of so many stored pages whose XML declares more, with these elements TiffData."""
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'UUID="urn:uuid:11111111-1111-1111-1111-111111111111"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        f'DimensionOrder="XYZCT" Type="uint8" SizeX="48" SizeY="32" SizeZ="{declared}" SizeC="1" SizeT="1">'
        f'<Channel ID="Channel:0:0" SamplesPerPixel="1"/>{data}</Pixels></Image></OME>'
    )
    return pages(path, VOXELS[:stored], {0: {"description": xml}})


ONE = '<TiffData IFD="0" PlaneCount="{}"/>'
EACH = "".join(f'<TiffData IFD="{z}" FirstZ="{z}" PlaneCount="1"/>' for z in range(16))
ELSEWHERE = "".join(
    f'<TiffData IFD="{z % 8}" FirstZ="{z}" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{digit * 8}-1111-1111-1111-'
    f"{digit * 12}</UUID></TiffData>"
    for z in range(16)
    for name, digit in [("volume.ome.tif", "1") if z < 8 else ("other.ome.tif", "2")]
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("data", "stored", "first"),
    [(ONE.format(16), 12, 12), (ONE.format(10), 10, 10), (EACH, 12, 12), (ELSEWHERE, 8, 8)],
    ids=["one element", "one element of fewer", "one for each", "a file that is gone"],
)
def test_planes_that_are_declared_and_not_stored(tmp_path, data, stored, first):
    text = refusal(ome_with(tmp_path / "volume.ome.tif", data, stored))
    assert f"{16 - stored} of the 16 planes that its metadata declare are not stored in it" in text
    assert f"the first is plane {first}, counted from 0" in text


def test_planes_that_are_all_stored(tmp_path):
    voxels, _ = read(ome_with(tmp_path / "volume.ome.tif", ONE.format(12), 12, declared=12))
    np.testing.assert_array_equal(voxels, VOXELS)
