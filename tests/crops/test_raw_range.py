"""Float raw whose values are not about 0 to 1 is warned of where they become inputs as they are stored."""

import logging

import numpy as np
import pytest
import torch

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from cellmap_lightning.transforms.assumed_range import contradiction

SPEC = {"shape": [8, 8, 8], "scale": [8, 8, 8]}
BYTES = np.random.default_rng(0).integers(1, 251, (24, 24, 24))
PLACE = {"scale": (8, 8, 8), "translation": (0, 0, 0), "storage": ArrayOptions(chunks=(8, 8, 8))}


@pytest.fixture(autouse=True)
def own_records(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))


def volume(folder, name, values):
    """Raw, and two crops in it."""
    write_multiscale(folder / f"{name}.zarr" / "em", values, **PLACE)
    entries = []
    for number in (1, 2):
        group = folder / f"{name}.zarr" / f"crop{number}"
        write_multiscale(group / "mito", (BYTES > 100).astype(np.uint8), **PLACE, mode="mode")
        entries.append({"raw": str(folder / f"{name}.zarr" / "em"), "gt": f"{group}/[mito]"})
    return entries


def warned(caplog, entries, **options):
    """Set up twice and read a batch; return the warnings about values, and the mean of the inputs."""
    given = {"datasets": {"train": entries}, "classes": ["mito"], "input_arrays": {"raw": SPEC}}
    means = []
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with CellMapDataModule(
                **given, target_arrays={"labels": SPEC}, batch_size=4, batches_per_epoch=2, max_workers=1, **options
            ) as data:
                data.setup("fit")
                means += [float(batch["raw"].to(torch.float32).mean()) for batch in data.train_dataloader()]
    return [r.getMessage() for r in caplog.records if "of its values span" in r.getMessage()], float(np.mean(means))


def problems(entries, **settings):
    return [p for p in inspect({"datasets": {"train": entries}, **settings}, {}, None).problems if p.kind == "range"]


@pytest.mark.parametrize(
    ("values", "dtype", "proposal"),
    [
        (BYTES, "f4", "[0, 255]"), (BYTES * 262.14, "f8", "[0, 65535]"), (BYTES * 4, "f2", "[0, 1000]"),
        (BYTES - 500, "f4", "[-500, -250]"), (BYTES / 1e6, "f4", "[0, 0.00025]"),
        (BYTES / 1e5 + 0.5, "f8", "[0.5, 0.5025]"),
    ],
)  # fmt: skip
def test_values_of_another_range_are_reported_once(tmp_path, caplog, values, proposal, dtype):
    entries = volume(tmp_path, "a", values.astype(dtype))
    lines, mean = warned(caplog, entries)
    (line,) = lines
    assert line.startswith(f"raw {entries[0]['raw']}: the middle 99 % of its values span ")
    assert f'set normalize={{"range": {proposal}}}, or normalize={{"percentile": [0.5, 99.5]}} for' in line
    assert mean == pytest.approx(values.astype(dtype).mean(), rel=0.1)
    (problem,) = problems(entries)
    assert line.endswith(problem.text)
    assert problem.where == "a"


@pytest.mark.parametrize("remedy", [{"range": [0, 255]}, {"percentile": [0.5, 99.5]}, "zscore"], ids=str)
@pytest.mark.parametrize("of_entry", [False, True])
def test_each_remedy_is_one(tmp_path, caplog, remedy, of_entry):
    entries = volume(tmp_path, "a", BYTES.astype("f4"))
    settings = {} if of_entry else {"normalize": remedy}
    if of_entry:
        entries = [entry | {"normalize": remedy} for entry in entries]
    lines, mean = warned(caplog, entries, **settings)
    assert lines == []
    assert -0.2 < mean < 1
    assert problems(entries, **settings) == []


@pytest.mark.parametrize(
    "values",
    [
        BYTES.astype("u1"), (BYTES / 250).astype("f4"), ((BYTES - 125) / 70).astype("f4"), (BYTES / 250).astype("f2"),
        np.zeros((24, 24, 24), "f4"), np.full((24, 24, 24), 0.5, "f4"), BYTES.astype("u2"),
    ],
    ids=["uint8", "0-1", "z-score", "float16", "zeros", "constant", "uint16"],
)  # fmt: skip
def test_values_of_the_assumed_range_are_not_reported(tmp_path, caplog, values):
    entries = volume(tmp_path, "a", values)
    assert warned(caplog, entries, missing_raw="warn")[0] == []  # chunks of zeros are not stored
    assert problems(entries) == []


def test_float_raw_beside_bytes_is_named_alone(tmp_path, caplog):
    kinds = {"bytes": "u1", "floats": "f4", "more": "f8"}
    entries = [entry for name, dtype in kinds.items() for entry in volume(tmp_path, name, BYTES.astype(dtype))]
    lines, _ = warned(caplog, entries)
    assert sorted(line.split(":")[0] for line in lines) == [f"raw {tmp_path}/{n}.zarr/em" for n in ("floats", "more")]
    assert [problem.where for problem in problems(entries)] == ["floats", "more"]


@pytest.mark.parametrize("transforms", [None, torch.nn.Identity()])
def test_stored_values_that_are_asked_for_are_not_reported(tmp_path, caplog, transforms):
    entries = volume(tmp_path, "a", BYTES.astype("f4"))
    assert warned(caplog, entries, raw_value_transforms=transforms)[0] == []
    assert problems(entries, raw_value_transforms=transforms) == []


def test_a_chunk_that_cannot_be_read_is_reported_where_it_is_read(tmp_path, caplog):
    entries = volume(tmp_path, "a", BYTES.astype("f4"))
    (tmp_path / "a.zarr" / "em" / "s0" / "0" / "0" / "0").write_bytes(b"damaged")
    with CellMapDataModule(
        datasets={"train": entries}, classes=["mito"], input_arrays={"raw": SPEC}, target_arrays={"labels": SPEC},
        batch_size=4, read_attempts=1,
    ) as data:  # fmt: skip
        data.setup("fit")
        with pytest.raises(OSError, match="0/0/0"):
            for _ in data.train_dataloader():
                pass


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.0, 1.0, None), (-10.0, 10.0, None), (-10.5, 0.0, "[-11, 0]"), (0.0, 10.01, "[0, 11]"), (0.3, 0.3, None),
        (50.0, 50.0, "[50, 51]"), (1000.001, 1000.005, "[1000.001, 1000.005]"), (-3e4, 3.2e4, "[-30000, 32000]"),
    ],
)  # fmt: skip
def test_the_proposed_range_holds_the_values(low, high, text):
    message = contradiction(low, high)
    assert message is None if text is None else f'normalize={{"range": {text}}}' in message
