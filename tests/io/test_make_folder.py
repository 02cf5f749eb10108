"""Outputs below a file are an error of one line."""

import pytest

from cellmap_lightning.conversion.convert import ConversionOptions, convert
from cellmap_lightning.errors import CellMapError, CellMapValueError
from cellmap_lightning.io.files import make_folder
from cellmap_lightning.visualization.figures.canvas import save
from tests.foreign import ramp, write_image


@pytest.fixture
def file(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    return tmp_path / "x.txt"


@pytest.mark.parametrize("below", ["", "a", "a/b/c"])
def test_a_folder_below_a_file(file, below):
    with pytest.raises(CellMapValueError, match=r"cannot be made, since \S+x.txt is a file; choose another output"):
        make_folder(file / below)
    assert file.read_text() == "x"
    make_folder(file.parent / "folder" / below)
    make_folder(file.parent / "folder" / below)
    assert (file.parent / "folder" / below).is_dir()


@pytest.mark.parametrize("below", ["a", "a/b"])
def test_outputs_of_a_conversion(tmp_path, file, below):
    source = write_image(tmp_path / "em", ramp())
    with pytest.raises(CellMapError, match=r"x\.txt is a file"):
        convert(ConversionOptions(input=str(source), output=str(file / below)))
    assert file.read_text() == "x"


@pytest.mark.parametrize("below", ["a.png", "a/b.png"])
def test_pictures(file, below):
    from matplotlib.figure import Figure

    with pytest.raises(CellMapValueError, match=r"x\.txt is a file"):
        save(Figure(), file / below)
