"""Files of parameters per class, as cellmap-tune writes them."""

import logging

import pytest
import yaml

from cellmap_lightning.errors import CellMapError, CellMapFileNotFoundError, CellMapKeyError, CellMapValueError
from cellmap_lightning.evaluation.tuning import settings_of
from cellmap_lightning.instances.options import SegmentationOptions
from cellmap_lightning.instances.tuned import parameters_of, read_tuned, with_explicit


def test_what_the_search_writes_is_read(tmp_path):
    options = SegmentationOptions("watershed", threshold=0.7, seed_distance=160, min_volume=1e6)
    written = {"mito": settings_of(options, ["threshold", "seed_distance", "min_volume"])}
    file = tmp_path / "mito.yaml"
    file.write_text(yaml.safe_dump(written, sort_keys=False))
    assert read_tuned(file) == written
    assert SegmentationOptions(**read_tuned(file)["mito"]) == options
    # Files of several classes, one after the other, are one file.
    (tmp_path / "all.yaml").write_text(file.read_text() + "nuc:\n  method: components\n  min_volume: 1e6\n")
    assert list(read_tuned(tmp_path / "all.yaml")) == ["mito", "nuc"]
    assert read_tuned(tmp_path / "all.yaml")["nuc"]["min_volume"] == 1e6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no parameters of classes; cellmap-tune writes a mapping of classes, such as mito:"),
        ("just text", "has no parameters of classes; cellmap-tune writes"),
        ("- mito\n- nuc\n", "has no parameters of classes; cellmap-tune writes"),
        ("method: watershed\nthreshold: 0.5\n", "has no parameters of classes; cellmap-tune writes"),
        ("{mito: [0.5]}", "has no parameters of classes"),
        ("mito: {threshold: 0.5", "cannot be read .*; cellmap-tune writes"),
        ("mito: {threshold: 0.5}\nmito: {threshold: 0.6}\n", "cannot be read .*duplicate key mito"),
        ("mito: {treshold: 0.5}", "a key of mito must be one of method, threshold.*did you mean 'threshold'"),
        ("mito: {values: scaled}", "a key of mito must be one of"),
        ("{mito: {}, data: {csv_path: crops.csv}}", "a key of data must be one of"),
        ("mito: {threshold: high}", "mito: threshold must be a number, got 'high'"),
        ("mito: {method: watersheds}", "mito: method must be one of .*did you mean 'watershed'"),
        ("mito: {min_volume: -1}", "mito: min_volume must be a number of at least 0"),
        ("mito: {threshold: '${oc.env:HOME}'}", r"mito: threshold must be a number, got '\$\{oc.env:HOME\}'"),
    ],
)
def test_other_files_are_one_sentence(tmp_path, content, message):
    (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(CellMapValueError, match=f"t.yaml.*{message}") as caught:
        read_tuned(tmp_path / "t.yaml")
    assert "\n" not in str(caught.value)


def test_binary_and_missing_files(tmp_path):
    (tmp_path / "b.yaml").write_bytes(b"\x00\xff\x89PNG")
    with pytest.raises(CellMapValueError, match=r"b.yaml cannot be read"):
        read_tuned(tmp_path / "b.yaml")
    for path in (tmp_path / "no.yaml", tmp_path, tmp_path / "no" / "t.yaml"):
        with pytest.raises(CellMapFileNotFoundError, match="no such file; give the one that cellmap-tune has written"):
            read_tuned(path)


@pytest.mark.parametrize(
    ("name", "hint"), [("mitos", "did you mean 'mito'"), ("er", "run cellmap-tune with class=er"), ("", "mito, nuc")]
)
def test_a_class_without_parameters(name, hint):
    with pytest.raises(CellMapKeyError, match=f"has no parameters of '{name}', but of mito, nuc.*") as caught:
        parameters_of({"mito": {}, "nuc": {}}, name, "t.yaml")
    assert hint in str(caught.value)
    assert isinstance(caught.value, CellMapError)


def test_explicit_values_replace_those_of_the_file_and_are_logged(caplog):
    tuned = {"method": "watershed", "threshold": 0.7, "min_volume": 10.0}
    with caplog.at_level(logging.INFO):
        result = with_explicit(tuned, {"threshold": 0.4, "min_volume": 10.0, "halo": 5}, "mito", "t.yaml")
    assert result == {"method": "watershed", "threshold": 0.4, "min_volume": 10.0, "halo": 5}
    assert [r.getMessage() for r in caplog.records] == ["mito: threshold=0.4 replaces 0.7 of tuned=t.yaml"]
