"""Headers, separators and repeated rows of a CSV of crops."""

import pytest

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.splits.entries import read_csv

CROP = "a.zarr/crop1/[mito,er]"


@pytest.fixture
def read(tmp_path):
    """A function that reads the lines of a CSV, and returns the only crop for training."""

    def read(*lines):
        (tmp_path / "crops.csv").write_text("\n".join(lines))
        (entry,) = read_csv(tmp_path / "crops.csv")["train"]
        assert entry.input_path == str(tmp_path / "a.zarr/em")
        assert entry.target_path == str(tmp_path / CROP)
        return entry

    return read


@pytest.mark.parametrize("separator", [";", "\t", "; "], ids=repr)
@pytest.mark.parametrize("target", [CROP, f'"{CROP}"'], ids=["bare", "quoted"])
@pytest.mark.parametrize("head", [(), ("usage{}raw{}target",), ("# [mito;er]",)], ids=len)
def test_commas_between_classes_separate_no_cells(read, separator, target, head):
    read(*(line.replace("{}", separator) for line in head), separator.join(("train", "a.zarr/em", target)))


def test_label_maps_between_semicolons_need_no_quotes(tmp_path):
    (tmp_path / "crops.csv").write_text("train;a.zarr/em;a.zarr/all/{1:mito,2:er}\n")
    assert read_csv(tmp_path / "crops.csv")["train"][0].target.names == ("mito", "er")


@pytest.mark.parametrize(
    ("header", "row", "weight", "metadata"),
    [
        ("target,usage,raw", f'"{CROP}",train,a.zarr/em', None, {}),
        ("Target,RAW,usage,unit", f'"{CROP}",a.zarr/em,train,nm', None, {"unit": "nm"}),
        ("usage,weight,raw,unknown,target", f'train,2,a.zarr/em,255,"{CROP}"', 2, {"unknown": 255}),
        ("raw,target,usage,weight", f'a.zarr/em,"{CROP}",train', None, {}),
        ("usage,raw,target,weight,unknown", f'train,a.zarr/em,"{CROP}"', None, {}),
        ("usage,raw,target,weight,unknown", f'train,a.zarr/em,"{CROP}",3', 3, {}),
        ("usage,raw,target,,", f'train,a.zarr/em,"{CROP}",,', None, {}),
        ("usage,raw,target", f'train,a.zarr/em,"{CROP}",,,', None, {}),
        # Names that stand for themselves; the columns are in the usual order.
        ("usage,em,ground truth", f'train,a.zarr/em,"{CROP}"', None, {}),
        ("usage,zarr,raw,zarr,target,weight", 'train,a.zarr,em,a.zarr,"crop1/[mito,er]",4', 4, {}),
        ("usage,raw,target", 'train,a.zarr,em,a.zarr,"crop1/[mito,er]"', None, {}),
    ],
)
def test_columns_are_read_by_their_names(read, header, row, weight, metadata):
    entry = read(header, row)
    assert (entry.weight, entry.metadata) == (weight, metadata)


@pytest.mark.parametrize("row", ["predict,a.zarr/em", "predict,a.zarr/em,", 'predict,a.zarr/em,,"[8, 8, 8]"'])
@pytest.mark.parametrize("header", ["usage,raw,target,voxel_size"])
def test_rows_for_prediction_may_leave_out_cells(tmp_path, header, row):
    (tmp_path / "crops.csv").write_text(f"{header}\n{row}\n")
    (entry,) = read_csv(tmp_path / "crops.csv")["predict"]
    assert (entry.input_path, entry.target_path) == (str(tmp_path / "a.zarr/em"), None)
    assert entry.metadata == ({"voxel_size": [8, 8, 8]} if "8" in row else {})


@pytest.mark.parametrize(
    ("header", "cells", "message"),
    [
        (
            "usage,raw,target,weigth,voxelsize",
            ',2,"[4,4,4]"',
            "columns 'weigth', 'voxelsize'; did you mean 'weight'",
        ),
        ("usage,raw,target,voxelsize", ',"[4,4,4]"', "unknown column 'voxelsize'; did you mean 'voxel_size'"),
        ("usage,raw,target,weight,boxes", ",2,", "unknown column 'boxes'; did you mean 'box'"),
        (
            "usage,raw,target,,note",
            ",,x",
            "unknown columns number 4 without a name, 'note'; columns are usage",
        ),
        ("split,raw_path,gt_path", "", "line 1: the header has unknown columns 'split', 'raw_path', 'gt_path'; "),
        ("split,raw,target", "", "unknown column 'split'; columns are usage, raw, target, weight"),
        ("target,usage,input", "", "unknown column 'input'"),
        ("target,usage", "", "the header has no column 'raw'"),
        ("usage,raw,target,weight,weight", ",1,2", "names the column 'weight' twice"),
        ("usage,raw,target,,", ",,2", "line 2  5 cells, and the header names 3 columns"),
    ],
)
def test_columns_that_mean_nothing_are_named(read, header, cells, message):
    with pytest.raises(CellMapValueError, match=message):
        read(header, f'train,a.zarr/em,"{CROP}"{cells}')


RAW_AND_CROP = f'a.zarr/em,"{CROP}"'


@pytest.mark.parametrize(
    "again",
    [
        RAW_AND_CROP,
        'a.zarr//em,"a.zarr/crop1//[mito,er]"',
        './a.zarr/em/,"b/../a.zarr/crop1/[er, mito]"',
        'a.zarr/em,"a.zarr/crop1/[mito,er]/"',
        '{folder}/a.zarr/em,"{folder}/a.zarr/crop1/[mito,er]"',
    ],
)
@pytest.mark.parametrize("usages", [("train", "Train"), ("val", "validate")])
def test_a_row_that_repeats_a_crop_is_refused(tmp_path, again, usages):
    other = RAW_AND_CROP.replace("crop1", "crop2")
    rows = [f"{usages[0]},{RAW_AND_CROP}", f"{usages[0]},{other}", f"{usages[1]},{again.format(folder=tmp_path)}"]
    (tmp_path / "crops.csv").write_text("\n".join(rows))
    split = "val" if usages[0] == "val" else "train"
    message = f"1 row of (?s:.*) repeats (?s:.*)line 3  the crop of line 1 again, for '{split}'"
    with pytest.raises(CellMapValueError, match=message):
        read_csv(tmp_path / "crops.csv")


def test_addresses_are_compared_with_their_protocol(tmp_path):
    row = "train,{0}://host/a.zarr/em,{0}://host/a.zarr/crop1/mito"
    (tmp_path / "crops.csv").write_text("\n".join([row.format("s3"), row.format("gs")]))
    assert len(read_csv(tmp_path / "crops.csv")["train"]) == 2
    (tmp_path / "crops.csv").write_text("\n".join([row.format("s3"), row.format("s3")]))
    with pytest.raises(CellMapValueError, match="line 2  the crop of line 1 again"):
        read_csv(tmp_path / "crops.csv")


@pytest.mark.parametrize(
    "rows",
    [
        [f"train,{RAW_AND_CROP},", f"val,{RAW_AND_CROP},"],
        [f"train,{RAW_AND_CROP},", 'train,a.zarr/em,"a.zarr/crop1/[mito,pm]",'],
        [f"train,{RAW_AND_CROP},", f"train,b.zarr/em,{RAW_AND_CROP.split(',', 1)[1]},"],
        [f'train,{RAW_AND_CROP},"0:40 0:72 0:88 voxels"', f'train,{RAW_AND_CROP},"40:80 0:72 0:88 voxels"'],
        ["predict,a.zarr/em,,", "predict,a.zarr/em,,"],
    ],
    ids=["usage", "classes", "raw", "box", "predict"],
)
def test_rows_that_share_a_part_are_read(tmp_path, rows):
    (tmp_path / "crops.csv").write_text("\n".join(["usage,raw,target,box", *rows]))
    assert sum(map(len, read_csv(tmp_path / "crops.csv").values())) == 2


BARE = CROP.replace(",", ", ")


@pytest.mark.parametrize("header", [None, "usage,raw,target", "target,usage,raw", "usage,raw,target,weight"])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (CROP, r'a bracket with commas needs quotes around its cell, as in "a.zarr/crop1/\[mito,er\]"'),
        (BARE, r'a bracket with commas needs quotes around its cell, as in "a.zarr/crop1/\[mito,er\]"'),
        (
            "a.zarr/all/{1:mito,2:er}",
            r'a bracket with commas needs quotes around its cell, as in "a.zarr/all/\{1:mito,2:er\}"',
        ),
        (f"“{CROP}”", 'the quote “ is not one of a CSV; use "'),
        (f"„{CROP}“", 'the quote „ is not one of a CSV; use "'),
        (f"'{CROP}'", "the quote ' is not one of a CSV; use \""),
        ("‘a.zarr/crop1/mito’", 'the quote ‘ is not one of a CSV; use "'),
        ("'a.zarr/crop1/mito'", "the quote ' is not one of a CSV; use \""),
    ],
)
def test_missing_and_other_quotes_are_named(tmp_path, header, target, message):
    names = (header or "usage,raw,target").split(",")
    cells = {"usage": "train", "raw": "a.zarr/em", "target": target}
    row = ",".join(cells[name] for name in names if name in cells)
    (tmp_path / "crops.csv").write_text("\n".join([*([header] if header else []), row, ""]), encoding="utf-8")
    number = 1 + (header is not None)
    with pytest.raises(CellMapValueError, match=f"(?s)1 row .*line {number}  {message}"):
        read_csv(tmp_path / "crops.csv")


@pytest.mark.parametrize(
    ("option", "cell", "example"),
    [("labels", "{1: mito, 2: er}", r"\{1: mito,2: er\}"), ("voxel_size", "[8, 4, 4]", r"\[8,4,4\]")],
)
def test_settings_with_commas_need_quotes(tmp_path, option, cell, example):
    text = f"usage,raw,target,{option}\ntrain,a.zarr/em,a.zarr/all,"
    (tmp_path / "crops.csv").write_text(f"{text}{cell}\n")
    with pytest.raises(CellMapValueError, match=rf'needs quotes around its cell, as in "{example}"'):
        read_csv(tmp_path / "crops.csv")
    (tmp_path / "crops.csv").write_text(f'{text}"{cell}"\n')
    assert len(read_csv(tmp_path / "crops.csv")["train"]) == 1


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("after", [1, 2])
def test_a_quote_that_is_not_closed_is_named_with_its_line(tmp_path, before, after):
    rows = [f'train,a.zarr/em{n},"{CROP}"' for n in range(before)]
    rows += [f'train,a.zarr/em,"{CROP}', *(f"val,b.zarr/em{n},b.zarr/crop1/mito" for n in range(after)), ""]
    (tmp_path / "crops.csv").write_text("\n".join(rows))
    message = rf"line {before + 1}  the quote \" before 'a.zarr/crop1/\[mito,er\]' is not closed, "
    with pytest.raises(CellMapValueError, match=rf"{message}so that its cell has {after} more line"):
        read_csv(tmp_path / "crops.csv")


@pytest.mark.parametrize(
    ("raw", "target"),
    [
        ("Müller’s/em", "a [1/crop1/mito"), ("a[1/em", "a[1/crop1/[mito]"), ('"[2024, x]/em"', '"a/[mito, er]"'),
        ("a/em", "a/it's/mito"),
    ],
)  # fmt: skip
def test_quotes_and_brackets_inside_of_names_are_read(tmp_path, raw, target):
    (tmp_path / "crops.csv").write_text(f"usage,raw,target,unit\ntrain,{raw},{target},'nm'\n", encoding="utf-8")
    (entry,) = read_csv(tmp_path / "crops.csv")["train"]
    assert (entry.input_path, entry.target_path) == tuple(str(tmp_path / path.strip('"')) for path in (raw, target))
    assert entry.metadata == {"unit": "nm"}


@pytest.mark.parametrize("text", [f"train,a.zarr/em,“{CROP}”", "train,Müller/em,Müller/crop1/mito", "\x00ÿþ"])
def test_a_file_in_another_encoding_is_refused(tmp_path, text):
    (tmp_path / "crops.csv").write_bytes(text.encode("cp1252"))
    with pytest.raises(CellMapValueError, match=r"crops\.csv is not a text file in UTF-8 .*; save it as CSV in UTF-8"):
        read_csv(tmp_path / "crops.csv")
