"""Files that spreadsheets write in place of a CSV in UTF-8, and paths of Windows: the error names what they are."""

import pytest

from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.splits.entries import read_csv

TEXT = 'train,a.zarr/em,"a.zarr/crop1/[mito]"\n'


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (TEXT.encode("utf-16"), "is text in UTF-16, no text in UTF-8"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), "is text in UTF-16"),
        (TEXT.encode("utf-16-le"), "holds bytes of 0, as text in UTF-16 does"),
        (b"PK\x03\x04xxxx\0\0", "is a spreadsheet or another zip file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "is a spreadsheet of old versions of Excel"),
    ],
)
def test_files_that_are_no_csv_in_utf8(tmp_path, content, text):
    file = tmp_path / "crops.csv"
    file.write_bytes(content)
    with pytest.raises(CellMapValueError) as e:
        read_csv(file)
    assert f"{file} {text}" in str(e.value)
    assert "save it as CSV in UTF-8" in str(e.value)


@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_csv_in_utf8_is_read(tmp_path, begin, end):
    (tmp_path / "crops.csv").write_bytes(begin + (TEXT * 2).replace("crop1", "zürich", 1).replace("\n", end).encode())
    assert [entry.target_path for entry in read_csv(tmp_path / "crops.csv")["train"]] == [
        str(tmp_path / "a.zarr" / crop / "[mito]") for crop in ("zürich", "crop1")
    ]


@pytest.mark.parametrize("path", ["a.zarr\\em", "a.zarr/x\\em", "b\\em"])
def test_backslashes_in_a_path(tmp_path, monkeypatch, path):
    (tmp_path / "a.zarr" / "em").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CellMapFileNotFoundError, match="a backslash separates no folders on this system; write") as e:
        read_image(path)
    right = path.replace("\\", "/")
    assert f"write {tmp_path}/{right}" in str(e.value)
    assert ("which exists" in str(e.value)) == (right == "a.zarr/em")


@pytest.mark.parametrize("path", ["a.zarr\\crop1\\[mito]", "a.zarr/crop1\\[mito,er]", "c:\\a.zarr\\crop1\\[mito]"])
def test_backslashes_before_a_bracket(path):
    with pytest.raises(CellMapValueError, match="a backslash separates no folders") as e:
        TargetPath.parse(path)
    assert str(e.value).endswith(f"write {path.replace(chr(92), '/')}")
